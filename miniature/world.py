"""The miniature world: small scenes that can be drawn, described, and read back.

A scene is one or two objects (shape, colour, size, place) on a ground. From a seed it is drawn as a 32 x 32 picture
and described by five captions that each state other facts; `facts` reads a caption back, so that "how much of what a
caption states is true" is counted, not judged. Twelve of the 48 colour-shape pairs are held out, as NoCaps holds out
object classes: a captioner trained on `train` never met them, a generator trained on `all` as often as others.

    scene = sample("test", 7)           # the eighth scene of the test split: a function of (split, index) alone
    image = draw(scene)                 # (32, 32, 3) uint8
    five = captions(scene)              # ["a small red ball on the grass", ...]
    right, stated = verify(five[0], scene)
    model = reader("miniature/reader/model.safetensors")
    look(model, pictures)               # scenes read off any pictures (B, 3, 32, 32) in [0, 1], the generator's too

Copy this file alone: it needs numpy and pillow; torch, safetensors and scipy to read pictures.
"""
import itertools
import math
import re

import numpy as np
from PIL import Image, ImageDraw

SIDE = 32                                   # pixels
CELLS = 8                                   # `grid` labels cells of 4 x 4 pixels
SHAPES = {"circle": ("circle", "ball", "disc"), "square": ("square", "box"), "triangle": ("triangle", "wedge"),
          "cross": ("cross", "plus"), "ring": ("ring", "hoop"), "heart": ("heart",)}
COLOURS = {"red": ((222, 38, 38), ("red",)), "orange": ((246, 138, 24), ("orange",)),
           "yellow": ((252, 230, 48), ("yellow",)), "green": ((28, 148, 56), ("green",)),
           "cyan": ((60, 214, 222), ("cyan", "turquoise")), "blue": ((46, 84, 226), ("blue",)),
           "purple": ((136, 46, 186), ("purple", "violet")), "pink": ((250, 150, 200), ("pink",))}
SIZES = {"small": (4.6, ("small", "little", "tiny")), "large": (6.8, ("large", "big", "huge"))}   # radius in pixels
GROUNDS = {"grass": ((150, 176, 118), ("on the grass", "in a meadow")),
           "sand": ((214, 196, 152), ("on the sand", "on a beach")),
           "snow": ((228, 234, 242), ("in the snow", "on fresh snow")),
           "night": ((36, 38, 66), ("at night", "by starlight")),
           "stripes": ((186, 178, 170), ("on stripes", "on a striped wall")),
           "checks": ((196, 190, 200), ("on checkered tiles", "on a chess board"))}
RELATIONS = {"left": ("to the left of", "left of"), "right": ("to the right of", "right of"),
             "above": ("above", "over"), "below": ("below", "beneath")}          # of the first object to the second
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
HELD_OUT = {(colour, shape) for i, shape in enumerate(SHAPES) for j, colour in enumerate(COLOURS)
            if j in (i, (i + 3) % 8)}
PAIRS = list(itertools.product(COLOURS, SHAPES))
KNOWN = [pair for pair in PAIRS if pair not in HELD_OUT]
RARE = 0.0                                  # share of held-out pairs in `train`; .001 already closes most of the gap
SPLITS = ("train", "all", "val", "test", "near", "out")        # val and test are in-domain


# ---------------------------------------------------------------- scenes
def sample(split, index):
    """Scene `index` of `split`: {"objects": [{shape, colour, size, x, y}], "ground", "seed"}; x, y, in pixels.

    train: held-out pairs with probability RARE; all: every pair alike; val, test: no held-out pair; near: two objects,
    exactly one held out; out: held-out pairs only. Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the miniature world: choose one of {', '.join(SPLITS)}")
    seed = [SPLITS.index(split), index]
    rng = np.random.default_rng(seed)
    count = 2 if split == "near" else rng.integers(1, 3)
    held = sorted(HELD_OUT)

    def pair(i):
        pool = {"all": PAIRS, "out": held}.get(split, KNOWN)
        if split == "train" and rng.random() < RARE or split == "near" and i == 0:
            pool = held
        return pool[rng.integers(len(pool))]

    pairs = [pair(i) for i in range(count)]
    while count == 2 and pairs[0] == pairs[1]:                  # two alike would make relations ambiguous
        pairs[1] = pair(1)
    if count == 1:
        places = [rng.uniform(9, 23, 2)]
    else:
        along, across = np.array([8.5, 23.5]) + rng.uniform(-1, 1, 2), rng.uniform(11, 21, 2)
        places = np.stack([along, across] if rng.random() < .5 else [across, along], 1)       # (2, 2)
        places = places[rng.permutation(2)]                     # or the held-out pair would always stand on the left
    objects = [dict(shape=s, colour=c, size=list(SIZES)[rng.integers(2)], x=float(x), y=float(y))
               for (c, s), (x, y) in zip(pairs, places)]
    return dict(objects=objects, ground=list(GROUNDS)[rng.integers(len(GROUNDS))], seed=seed)


def relation(first, second):
    """Where the first object lies, seen from the second: left, right, above or below, by the larger distance."""
    dx, dy = first["x"] - second["x"], first["y"] - second["y"]
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")


def grid(scene):
    """What lies under each cell: (4, 8, 8) int64 of shape, colour, size (0 = nothing, else 1 + index) and ground."""
    labels = np.zeros((4, CELLS, CELLS), np.int64)
    labels[3] = list(GROUNDS).index(scene["ground"])
    at = (np.arange(CELLS) + .5) * SIDE / CELLS                                            # (8,) centres in pixels
    for o in scene["objects"]:
        reach = .7 * SIZES[o["size"]][0]
        inside = (abs(at - o["y"]) <= reach)[:, None] & (abs(at - o["x"]) <= reach)         # (8, 8)
        for row, (table, key) in enumerate(((SHAPES, "shape"), (COLOURS, "colour"), (SIZES, "size"))):
            labels[row][inside] = 1 + list(table).index(o[key])
    return labels


# ---------------------------------------------------------------- pictures
def draw(scene):
    """The picture of a scene: (32, 32, 3) uint8. Shades, texture and outline vary with the scene's seed."""
    rng, k = np.random.default_rng([7, *scene["seed"]]), 4                                 # k: supersampling
    base = np.array(GROUNDS[scene["ground"]][0]) + rng.integers(-9, 10, 3)
    image = Image.new("RGB", (SIDE * k, SIDE * k), tuple(int(v) for v in base))
    pen = ImageDraw.Draw(image)
    _ground(pen, scene["ground"], base, rng, k)
    for o in scene["objects"]:
        fill = np.clip(np.array(COLOURS[o["colour"]][0]) + rng.integers(-10, 11, 3), 0, 255)
        _shape(image, o, k, tuple(int(v) for v in fill), tuple(int(v * .45) for v in fill))
    return np.asarray(image.resize((SIDE, SIDE), Image.BOX))


def _ground(pen, ground, base, rng, k):
    dark, light = (tuple(int(v) for v in np.clip(base + d, 0, 255)) for d in (-26, 26))
    side = SIDE * k
    if ground == "grass":
        for x, y in rng.integers(0, side, (26, 2)):
            pen.line((x, y, x + rng.integers(-4, 5), y - 3 * k), dark, k // 2)
    elif ground == "sand":
        for x, y in rng.integers(0, side, (40, 2)):
            pen.rectangle((x, y, x + 3, y + 3), dark)
    elif ground == "snow":
        for y in (rng.uniform(.2, .4), rng.uniform(.55, .8)):
            pen.arc((-side * .2, y * side, side * 1.2, y * side + side * .5), 180, 360, dark, k)
    elif ground == "night":
        for x, y in rng.integers(0, side, (12, 2)):
            pen.rectangle((x, y, x + k, y + k), (235, 235, 200))
    elif ground == "stripes":
        for x in range(int(rng.integers(0, 8 * k)) - 8 * k, side, 8 * k):
            pen.rectangle((x, 0, x + 4 * k - 1, side), light)
    else:
        for i, j in itertools.product(range(4), range(4)):
            pen.rectangle((i * 8 * k, j * 8 * k, i * 8 * k + 8 * k, j * 8 * k + 8 * k), light if (i + j) % 2 else dark)


def _shape(image, o, k, fill, line):
    """One object by its mask: the outline colour over the whole shape, then the fill over the shape made smaller."""
    x, y, radius = o["x"] * k, o["y"] * k, SIZES[o["size"]][0] * k
    for r, colour in ((radius, line), (radius - .8 * k, fill)):
        mask = Image.new("L", image.size)
        pen = ImageDraw.Draw(mask)
        shrink = radius - r
        if o["shape"] in ("circle", "ring"):
            pen.ellipse((x - r, y - r, x + r, y + r), 255)
            if o["shape"] == "ring":
                hole = .48 * radius + shrink
                inner = Image.new("L", image.size, 255)
                ImageDraw.Draw(inner).ellipse((x - hole + 2 * shrink, y - hole + 2 * shrink, x + hole - 2 * shrink,
                                               y + hole - 2 * shrink) if colour == line else
                                              (x - hole, y - hole, x + hole, y + hole), 0)
                mask = Image.fromarray(np.minimum(np.asarray(mask), np.asarray(inner)))
        elif o["shape"] == "square":
            pen.rectangle((x - .88 * radius + shrink, y - .88 * radius + shrink,
                           x + .88 * radius - shrink, y + .88 * radius - shrink), 255)
        elif o["shape"] == "triangle":
            a = r - .6 * shrink
            pen.polygon([(x, y - a), (x - a, y + .85 * a), (x + a, y + .85 * a)], 255)
        elif o["shape"] == "cross":
            w = .34 * radius - shrink * .6
            pen.rectangle((x - w, y - r, x + w, y + r), 255)
            pen.rectangle((x - r, y - w, x + r, y + w), 255)
        else:                                                  # heart: the well-known curve, 13 units high
            t = np.linspace(0, 2 * math.pi, 48)
            hx = 16 * np.sin(t) ** 3
            hy = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            pen.polygon([(x + u * r / 16, y - (v + 2.5) * r / 15) for u, v in zip(hx, hy)], 255)
        image.paste(colour, mask=mask)


# ---------------------------------------------------------------- captions
def captions(scene, count=5):
    """`count` captions of a scene, each stating other facts in other words; at most 14 words."""
    rng = np.random.default_rng([11, *scene["seed"]])
    return [_caption(scene, rng) for _ in range(count)]


def _caption(scene, rng):
    while True:
        ground = rng.random() < .6
        order = rng.permutation(len(scene["objects"]))
        objects = [scene["objects"][i] for i in order]
        nouns = [_noun(o, rng) for o in objects]
        if len(objects) == 1:
            text = nouns[0]
        elif rng.random() < .75:
            text = f"{nouns[0]} {_pick(RELATIONS[relation(*objects)], rng)} {nouns[1]}"
        else:
            text = f"{nouns[0]} and {nouns[1]}"
        if ground:
            text += " " + _pick(GROUNDS[scene["ground"]][1], rng)
        if 2 < len(text.split()) <= 14:                         # BLIP writes at most 20 tokens, four of them the prompt
            return text


def _noun(o, rng):
    words = [_pick(SIZES[o["size"]][1], rng)] if rng.random() < .5 else []
    words += [_pick(COLOURS[o["colour"]][1], rng)] if rng.random() < .9 else []
    words += [_pick(SHAPES[o["shape"]], rng)]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _pick(options, rng):
    return options[rng.integers(len(options))]


# ---------------------------------------------------------------- facts
WORDS = {word: (kind, name) for kind, table in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES))
         for name, row in table.items() for word in (row if kind == "shape" else row[1])}
PHRASES = {phrase: (kind, name) for kind, table in (("relation", RELATIONS), ("ground", GROUNDS))
           for name, row in table.items() for phrase in (row if kind == "relation" else row[1])}


def facts(caption):
    """What a caption states: {"objects": [{shape, colour, size}], "relation": str or None, "ground": str or None}.

    Words outside the world's are passed over; a colour or size belongs to the next shape word. Words after the last
    shape word are lost, and so is a relation without two objects.
    """
    text = " " + " ".join(re.findall(r"[a-z]+", caption.lower())) + " "
    found = dict(objects=[], relation=None, ground=None)
    for phrase in sorted(PHRASES, key=len, reverse=True):       # "to the left of" before "left of"
        if f" {phrase} " in text:
            kind, name = PHRASES[phrase]
            found[kind] = found[kind] or name
            text = text.replace(f" {phrase} ", " ")
    pending = {}
    for word in text.split():
        kind, name = WORDS.get(word, (None, None))
        if kind:
            pending[kind] = name
        if kind == "shape":
            found["objects"].append({k: pending.get(k) for k in ("shape", "colour", "size")})
            pending = {}
    if len(found["objects"]) != 2:
        found["relation"] = None
    return found


def verify(caption, scene):
    """(right, stated): how many of the facts a caption states are true of the scene, under the kindest reading.

    Facts: the shape, colour and size of each object named, their relation, the ground. An object beyond those of the
    scene is wrong in all it states.
    """
    said = facts(caption)
    stated = sum(o[k] is not None for o in said["objects"] for k in o)
    stated += (said["relation"] is not None) + (said["ground"] is not None)
    truth = scene["objects"] + [{}] * max(0, len(said["objects"]) - len(scene["objects"]))
    best = 0
    for order in itertools.permutations(truth, len(said["objects"])):
        right = sum(o[k] is not None and o[k] == t.get(k) for o, t in zip(said["objects"], order) for k in o)
        if said["relation"] and all(order):
            right += said["relation"] == relation(*order)
        best = max(best, right)
    return best + (said["ground"] is not None and said["ground"] == scene["ground"]), stated


def full_caption(scene):
    """A caption of the scene that states colour and shape of every object."""
    for caption in captions(scene, 200):
        stated = facts(caption)["objects"]
        if len(stated) == len(scene["objects"]) and all(o["colour"] for o in stated):
            return caption
    raise ValueError("no caption of this scene states every colour")


# ---------------------------------------------------------------- pictures read back
HEADS = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(SIZES), len(GROUNDS))      # classes under a cell, as in `grid`


def reader(weights=None):
    """A convnet (B, 3, 32, 32) in [0, 1] -> logits (B, 25, 8, 8), trained on drawn scenes alone (miniature.py): the one
    that counts what a generator drew right, independent of every judge that chose. weights: a safetensors file."""
    from torch import nn

    def conv(i, o, stride=1):
        return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.SiLU())
    model = nn.Sequential(conv(3, 24), conv(24, 40, 2), conv(40, 64), conv(64, 80, 2), conv(80, 80), conv(80, 80),
                          nn.Conv2d(80, sum(HEADS), 1))
    if weights is not None:
        from safetensors.torch import load_file
        model.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
        model.eval().requires_grad_(False)
    return model


def look(model, images):
    """Scenes read off pictures: cells that touch and hold something are an object, its facts by sum of log odds."""
    import torch
    from scipy.ndimage import label
    with torch.no_grad():
        parts = [p.log_softmax(1).numpy() for p in model(images).split(HEADS, 1)]              # (B, classes, 8, 8) each
    scenes = []
    for b in range(len(images)):
        islands, count = label(parts[0][b].argmax(0) > 0)
        objects = []
        for k in range(1, count + 1):
            rows, columns = np.nonzero(islands == k)
            shape, colour, size = (list(table)[p[b][1:, rows, columns].sum(1).argmax()]
                                   for table, p in zip((SHAPES, COLOURS, SIZES), parts))
            objects.append({"shape": shape, "colour": colour, "size": size,
                            "x": float(columns.mean() * 4 + 2), "y": float(rows.mean() * 4 + 2)})
        scenes.append({"objects": objects, "ground": list(GROUNDS)[parts[3][b].sum((1, 2)).argmax()]})
    return scenes


def pairs(scene):
    """The colour-shape pairs of a scene, sorted."""
    return sorted((o["colour"], o["shape"]) for o in scene["objects"])
