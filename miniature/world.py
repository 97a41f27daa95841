"""The miniature world: small scenes that can be drawn, described, and read back.

A scene is one or two objects (shape, colour, size, place) on a ground. From a seed it is drawn as
a 32 x 32 picture and described by five captions that each state other facts; `facts` reads a
caption back, so that "how much of what a caption states is true" is counted, not judged. Twelve of
the 48 colour-shape pairs are held out, as NoCaps holds out object classes: a captioner trained on
`train` never met them, a generator trained on `all` as often as others.

    scene = sample("test", 7)           # the eighth scene of the test split: a function of both
    image = picture(scene)              # (3, 32, 32) float in [0, 1];  draw: (32, 32, 3) uint8
    five = captions(scene)              # ["a small red ball on the grass", ...]
    right, stated = verify(five[0], scene)
    model = reader("miniature/reader/model.safetensors")
    read_back(model, pictures)          # scenes read off pictures (B, 3, 32, 32), also generated

Copy this file alone: it needs numpy, pillow, scipy, torch and safetensors.
"""
import itertools
import math
import re

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from safetensors.torch import load_file
from scipy.ndimage import label
from torch import nn

SIDE = 32               # pixels; pictures are drawn four times larger, then averaged
SHAPES = ("circle", "square", "triangle", "cross", "ring", "heart")
COLOURS = {
    "red": "#de2626", "orange": "#f68a18", "yellow": "#fce630", "green": "#1c9438",
    "cyan": "#3cd6de", "blue": "#2e54e2", "purple": "#882eba", "pink": "#fa96c8",
}
SIZES = {"small": 4.6, "large": 6.8}                        # radius in pixels
GROUNDS = {
    "grass": "#96b076", "sand": "#d6c498", "snow": "#e4eaf2",
    "night": "#242642", "stripes": "#bab2aa", "checks": "#c4bec8",
}
RELATIONS = ("left", "right", "above", "below")             # of the first object to the second
SYNONYMS = {
    "circle": "circle, ball, disc", "square": "square, box", "triangle": "triangle, wedge",
    "cross": "cross, plus", "ring": "ring, hoop", "cyan": "cyan, turquoise",
    "purple": "purple, violet", "small": "small, little, tiny", "large": "large, big, huge",
    "grass": "on the grass, in a meadow", "sand": "on the sand, on a beach",
    "snow": "in the snow, on fresh snow", "night": "at night, by starlight",
    "stripes": "on stripes, on a striped wall", "checks": "on checkered tiles, on a chess board",
    "left": "to the left of, left of", "right": "to the right of, right of",
    "above": "above, over", "below": "below, beneath",
}


def synonyms(name):
    """The ways to say a shape, colour, size, ground or relation."""
    return SYNONYMS.get(name, name).split(", ")


def _spoken(**kinds):
    """{what is said: (kind, name)} of some tables."""
    said = {}
    for kind, table in kinds.items():
        for name in table:
            said |= dict.fromkeys(synonyms(name), (kind, name))
    return said


WORDS = _spoken(shape=SHAPES, colour=COLOURS, size=SIZES)
PHRASES = _spoken(relation=RELATIONS, ground=GROUNDS)
PAIRS = list(itertools.product(COLOURS, SHAPES))
UNSEEN = """red circle, green circle, orange square, cyan square, yellow triangle, blue triangle,
green cross, purple cross, cyan ring, pink ring, blue heart, red heart"""
HELD_OUT = sorted(tuple(pair.split()) for pair in UNSEEN.split(","))
KNOWN = [pair for pair in PAIRS if pair not in HELD_OUT]
RARE = 0.0              # share of held-out pairs in `train`; .001 already closes most of the gap
SPLITS = ("train", "all", "val", "test", "near", "out")     # val and test are in-domain


# ---------------------------------------------------------------- scenes
def sample(split, index):
    """Scene `index` of `split`: {"objects": [{shape, colour, size, x, y}], "ground", "seed"}.

    x, y are in pixels. train: held-out pairs with probability RARE; all: every pair alike; val,
    test: no held-out pair; near: two objects, exactly one held out; out: held-out pairs only.
    Raises ValueError for another split.
    """
    if split not in SPLITS:
        choices = ", ".join(SPLITS)
        raise ValueError(f"unknown split {split!r} of the miniature world: choose one of {choices}")
    seed = [SPLITS.index(split), index]
    rng = np.random.default_rng(seed)
    count = 2 if split == "near" else rng.integers(1, 3)
    pairs = [_pair(split, i, rng) for i in range(count)]
    while count == 2 and pairs[0] == pairs[1]:              # two alike: relations were ambiguous
        pairs[1] = _pair(split, 1, rng)
    objects = []
    for (colour, shape), (x, y) in zip(pairs, _places(count, rng)):
        size = _pick(list(SIZES), rng)
        objects.append(dict(shape=shape, colour=colour, size=size, x=float(x), y=float(y)))
    return dict(objects=objects, ground=_pick(list(GROUNDS), rng), seed=seed)


def _pair(split, i, rng):
    """Colour and shape of object i."""
    pool = KNOWN
    if split == "all":
        pool = PAIRS
    elif split == "out" or (split == "near" and i == 0):
        pool = HELD_OUT
    elif split == "train" and rng.random() < RARE:
        pool = HELD_OUT
    return _pick(pool, rng)


def _places(count, rng):
    """Where the objects stand: (count, 2) of x and y. Two stand apart, side by side or stacked."""
    if count == 1:
        return [rng.uniform(9, 23, 2)]
    along = np.array([8.5, 23.5]) + rng.uniform(-1, 1, 2)
    across = rng.uniform(11, 21, 2)
    axes = [along, across] if rng.random() < .5 else [across, along]
    # permuted, or the held-out pair of `near` would always stand on the left
    return np.stack(axes, 1)[rng.permutation(2)]


def _pick(options, rng):
    return options[rng.integers(len(options))]


def relation(first, second):
    """Where the first object lies, seen from the second, by the larger distance: see RELATIONS."""
    dx = first["x"] - second["x"]
    dy = first["y"] - second["y"]
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def colour_shapes(scene):
    """The colour-shape pairs of a scene, sorted."""
    return sorted((o["colour"], o["shape"]) for o in scene["objects"])


def grid(scene):
    """What lies under each cell: (4, 8, 8) int64 of shape, colour, size and ground.

    Of shape, colour and size 0 is nothing, else 1 + its index in the table.
    """
    labels = np.zeros((4, 8, 8), np.int64)
    labels[3] = list(GROUNDS).index(scene["ground"])
    centres = np.arange(2, SIDE, 4)                         # (8,) of the cells, in pixels
    for o in scene["objects"]:
        reach = .7 * SIZES[o["size"]]
        rows = abs(centres - o["y"]) <= reach
        columns = abs(centres - o["x"]) <= reach
        inside = rows[:, None] & columns                    # (8, 8)
        labels[0][inside] = 1 + SHAPES.index(o["shape"])
        labels[1][inside] = 1 + list(COLOURS).index(o["colour"])
        labels[2][inside] = 1 + list(SIZES).index(o["size"])
    return labels


# ---------------------------------------------------------------- pictures
def picture(scene):
    """The picture of a scene as models want it: (3, 32, 32) float in [0, 1]."""
    return torch.tensor(draw(scene)).permute(2, 0, 1) / 255


def draw(scene):
    """The picture of a scene: (32, 32, 3) uint8. Shades and texture vary with the scene's seed."""
    rng = np.random.default_rng([7, *scene["seed"]])
    base = _vary(GROUNDS[scene["ground"]], 9, rng)
    image = Image.new("RGB", (128, 128), _rgb(base))
    _draw_ground(ImageDraw.Draw(image), scene["ground"], base, rng)
    for o in scene["objects"]:
        fill = _rgb(_vary(COLOURS[o["colour"]], 10, rng))
        # a dark outline over the whole shape, then the fill over the shape made smaller
        image.paste(_rgb(.45 * np.array(fill)), mask=_mask(o, 0))
        image.paste(fill, mask=_mask(o, 3.2))
    return np.asarray(image.resize((SIDE, SIDE), Image.BOX))


def _vary(colour, spread, rng):
    return np.array(ImageColor.getrgb(colour)) + rng.integers(-spread, spread + 1, 3)


def _rgb(colour):
    return tuple(int(v) for v in np.clip(colour, 0, 255))


def _draw_ground(pen, ground, base, rng):
    dark = _rgb(base - 26)
    light = _rgb(base + 26)
    if ground == "grass":
        for x, y in rng.integers(0, 128, (26, 2)):
            tip = x + rng.integers(-4, 5)
            pen.line((x, y, tip, y - 12), dark, 2)
    elif ground == "sand":
        for x, y in rng.integers(0, 128, (40, 2)):
            pen.rectangle((x, y, x + 3, y + 3), dark)
    elif ground == "snow":
        for y in (128 * rng.uniform(.2, .4), 128 * rng.uniform(.55, .8)):
            pen.arc((-25.6, y, 153.6, y + 64), 180, 360, dark, 4)
    elif ground == "night":
        for x, y in rng.integers(0, 128, (12, 2)):
            pen.rectangle((x, y, x + 4, y + 4), (235, 235, 200))
    elif ground == "stripes":
        for x in range(int(rng.integers(0, 32)) - 32, 128, 32):
            pen.rectangle((x, 0, x + 15, 128), light)
    else:
        for x, y in itertools.product(range(0, 128, 32), repeat=2):
            shade = light if (x + y) % 64 else dark
            pen.rectangle((x, y, x + 32, y + 32), shade)


def _mask(o, shrink):
    """The pixels of one object, four times larger, its edge moved inwards by `shrink`."""
    mask = Image.new("L", (128, 128))
    pen = ImageDraw.Draw(mask)
    x = 4 * o["x"]
    y = 4 * o["y"]
    radius = 4 * SIZES[o["size"]]
    r = radius - shrink
    shape = o["shape"]
    if shape == "circle":
        pen.ellipse(_box(x, y, r, r), 255)
    elif shape == "ring":
        hole = .48 * radius + shrink
        pen.ellipse(_box(x, y, r, r), 255)
        pen.ellipse(_box(x, y, hole, hole), 0)
    elif shape == "square":
        half = .88 * radius - shrink
        pen.rectangle(_box(x, y, half, half), 255)
    elif shape == "triangle":
        a = r - .6 * shrink
        base = y + .85 * a
        pen.polygon([(x, y - a), (x - a, base), (x + a, base)], 255)
    elif shape == "cross":
        w = .34 * radius - .6 * shrink
        pen.rectangle(_box(x, y, w, r), 255)
        pen.rectangle(_box(x, y, r, w), 255)
    else:                                                   # the well-known heart, 13 units high
        t = np.linspace(0, 2 * math.pi, 48)
        across = 16 * np.sin(t) ** 3
        up = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = zip(x + across * r / 16, y - (up + 2.5) * r / 15)
        pen.polygon(list(points), 255)
    return mask


def _box(x, y, w, h):
    """The corners of a box around a point, as pillow wants them."""
    return x - w, y - h, x + w, y + h


# ---------------------------------------------------------------- captions
def captions(scene, count=5):
    """`count` captions of a scene, each stating other facts in other words; at most 14 words."""
    rng = np.random.default_rng([11, *scene["seed"]])
    return [_caption(scene, rng) for _ in range(count)]


def _caption(scene, rng):
    while True:
        ground = rng.random() < .6
        objects = [scene["objects"][i] for i in rng.permutation(len(scene["objects"]))]
        nouns = [_noun(o, rng) for o in objects]
        between = "and"
        if len(objects) == 2 and rng.random() < .75:
            between = _say(relation(*objects), rng)
        text = f" {between} ".join(nouns)
        if ground:
            text += " " + _say(scene["ground"], rng)
        if 2 < len(text.split()) <= 14:         # BLIP writes at most 20 tokens, four the prompt's
            return text


def _noun(o, rng):
    words = []
    if rng.random() < .5:
        words.append(_say(o["size"], rng))
    if rng.random() < .9:
        words.append(_say(o["colour"], rng))
    words.append(_say(o["shape"], rng))
    article = "an" if words[0] == "orange" else "a"
    return " ".join([article, *words])


def _say(name, rng):
    return _pick(synonyms(name), rng)


# ---------------------------------------------------------------- facts
def facts(caption):
    """What a caption states: {"objects": [{shape, colour, size}], "relation", "ground"} or Nones.

    Words outside the world's are passed over; a colour or size belongs to the next shape word.
    Words after the last shape word are lost, and so is a relation without two objects.
    """
    text = " " + " ".join(re.findall(r"[a-z]+", caption.lower())) + " "
    found = dict(objects=[], relation=None, ground=None)
    for phrase in sorted(PHRASES, key=len, reverse=True):   # "to the left of" before "left of"
        if f" {phrase} " in text:
            kind, name = PHRASES[phrase]
            found[kind] = found[kind] or name
            text = text.replace(f" {phrase} ", " ")
    stated = dict(shape=None, colour=None, size=None)
    for word in text.split():
        if word not in WORDS:
            continue
        kind, name = WORDS[word]
        stated[kind] = name
        if kind == "shape":
            found["objects"].append(stated)
            stated = dict.fromkeys(stated)
    if len(found["objects"]) != 2:
        found["relation"] = None
    return found


def verify(caption, scene):
    """(right, stated): how many of the facts a caption states are true of the scene.

    Facts: the shape, colour and size of each object named, their relation, the ground. Of the ways
    to match objects the kindest counts; one beyond those of the scene is wrong in all it states.
    """
    said = facts(caption)
    named = said["objects"]
    stated = [said["relation"], said["ground"]]
    for o in named:
        stated += o.values()
    candidates = list(scene["objects"])
    while len(candidates) < len(named):
        candidates.append({})                               # nothing that is said of it is true
    right = 0
    for order in itertools.permutations(candidates, len(named)):
        right = max(right, _matching(said, order))
    right += said["ground"] == scene["ground"]
    return right, sum(fact is not None for fact in stated)


def _matching(said, order):
    """How many facts are right where the objects named are those of the scene, in this order."""
    right = 0
    for o, true in zip(said["objects"], order):
        right += len(o.items() & true.items())
    if said["relation"] and all(order):
        right += said["relation"] == relation(*order)
    return right


def full_caption(scene):
    """A caption of the scene that states colour and shape of every object."""
    for caption in captions(scene, 200):
        stated = facts(caption)["objects"]
        if len(stated) == len(scene["objects"]) and all(o["colour"] for o in stated):
            return caption
    raise ValueError("no caption of this scene states every colour")


# ---------------------------------------------------------------- pictures read back
HEADS = (7, 9, 3, 6)    # classes of shape, colour and size (the first is nothing), and of ground


def reader(weights=None):
    """A convnet (B, 3, 32, 32) in [0, 1] -> logits (B, 25, 8, 8), trained on drawn scenes alone.

    It counts what a generator drew right, independent of every judge that chose. weights: a
    safetensors file (miniature/train.py makes it).
    """
    widths = [(3, 24, 1), (24, 40, 2), (40, 64, 1), (64, 80, 2), (80, 80, 1), (80, 80, 1)]
    blocks = []
    for into, out, stride in widths:
        conv = nn.Conv2d(into, out, 3, stride, 1)
        blocks.append(nn.Sequential(conv, nn.GroupNorm(8, out), nn.SiLU()))
    model = nn.Sequential(*blocks, nn.Conv2d(80, sum(HEADS), 1))
    if weights is not None:
        model.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
        model.eval().requires_grad_(False)
    return model


def read_back(model, images):
    """Scenes read off pictures: cells that touch and hold something are an object."""
    with torch.no_grad():
        logits = model(images)                                              # (B, 25, 8, 8)
    odds = [part.log_softmax(1).numpy() for part in logits.split(HEADS, 1)]
    return [_read_one(*row) for row in zip(*odds)]


def _read_one(shape, colour, size, ground):
    """A scene of log odds (classes, 8, 8) each, summed over the cells of an object."""
    islands, count = label(shape.argmax(0) > 0)
    objects = []
    for k in range(1, count + 1):
        cells = islands == k
        rows, columns = np.nonzero(cells)
        objects.append({
            "shape": _likeliest(SHAPES, shape[1:, cells]),
            "colour": _likeliest(COLOURS, colour[1:, cells]),
            "size": _likeliest(SIZES, size[1:, cells]),
            "x": float(columns.mean() * 4 + 2),
            "y": float(rows.mean() * 4 + 2),
        })
    return {"objects": objects, "ground": _likeliest(GROUNDS, ground.reshape(-1, 64))}


def _likeliest(names, odds):
    """The name whose odds (names, cells) have the largest sum."""
    return list(names)[odds.sum(1).argmax()]
