"""Measures the frozen cycles on the miniature, into lab/results/*.json.

    python -m lab.findings                       # every part, as committed: hours on two cores
    python -m lab.findings texts --share .1      # a tenth of one, into lab/results/share-0.1
    python -m lab.report                         # RESULTS.md and its figures

Candidates are those of rerank.py: equal seed, item and steps, so equal captions and drawings
(tests/test_lab.py). Run again, it goes on where it stopped; remove out/lab to measure anew.
"""
import functools

import numpy as np
import torch

import cycle
import judges
import losses
import metrics
import records
from captioners import Captioner
from generators import Generator, few_steps
from lab import keep
from lab.keep import DOMAINS, ROOT, by_domain, mean_of, scene_of, spoiled, timed, truth
from miniature import world

PARTS = ("check", "scores", "findings", "texts", "pictures", "words")
SHOWN = ("clip", "dino", "pixel", "denoise", "clipscore", "likelihood")
# of pictures of a text
CONTRASTS = (("clipscore", "clip"), ("denoised less", "clip"), ("denoised less", "denoised"),
             ("per token", "clip"), ("both", "clip"), ("both", "denoised less"),
             ("both", "per token"), ("both", "clipscore"))


# ---------------------------------------------------------------- one picture, one text
@functools.cache
def speakers():
    """Captioner, generator, and a generator that draws in few steps."""
    few = few_steps(Generator.load("miniature", "cpu"))
    return Captioner.load("miniature", "cpu"), Generator.load("miniature", "cpu"), few


@functools.cache
def judge(kind, name):
    found, _ = judges.load([name], kind, "miniature")
    return found[name]


@functools.cache
def reader():
    return world.reader(ROOT / "miniature/reader/model.safetensors")


def jobs(count, *more):
    """{name: (name, domain, index, ...)} of `count` scenes a domain; names, and so chance, are
    those of 500 a domain."""
    found = {}
    for domain, first in zip(DOMAINS, (0, 500, 1000)):
        for index in range(count):
            name = str(first + index)
            found[name] = (name, domain, index, *more)
    return found


def loss_of(pictures, captions, draws, item):
    """Denoising losses (draws, n), without those of the empty caption."""
    generator = speakers()[1]
    timesteps, noise = cycle.noises(generator, draws, item=item)
    return losses.score(generator, pictures, captions, timesteps, noise, empty=False).numpy()


def of_picture(name, domain, index):
    """Ten captions of a picture and beam search's: the scores of the ten, how good they are."""
    captioner, generator, few = speakers()
    clip = judge("image", "clip")
    scene = scene_of(domain, index)
    image, references = world.picture(scene), world.captions(scene)
    (ten,), likelihood = captioner.speak([image], 10, items=[name])
    (beams,), _ = captioner.speak([image], 3, "beam")

    # equal captions are drawn and scored once, all from the noise of the item
    different = list(dict.fromkeys(ten))
    same = [name] * len(different)
    seconds = {}
    drawn = timed(seconds, "clip", generator.draw, different, same, batch=40)      # (k, 3, 32, 32)
    short = timed(seconds, "few", few.draw, different, same, steps=8, batch=40)
    seconds["dino"] = seconds["clip"]
    scores = {}                                                           # (k,) each
    for key in ("clip", "dino", "pixel"):
        scores[key] = judge("image", key).alike(drawn, image[None])
    scores["few"] = clip.alike(short, image[None])
    scores["clipscore"] = clip.score(image[None], different)
    scores["denoise"] = -loss_of(image, different, 12, name).mean(0)
    place = [different.index(caption) for caption in ten]
    scores = {key: values[place] for key, values in scores.items()}       # (10,) each
    scores["likelihood"] = likelihood[0].tolist()

    captions = [*ten, beams[0]]
    return {"domain": domain, "captions": captions, "references": references,
            "different": len(different), "scores": scores, "seconds": seconds,
            "quality": qualities(captions, references, scene)}


def qualities(captions, references, scene):
    """How good captions are: {name: (k,)}. CIDEr is of all rows at once."""
    found = {"facts": [truth(caption, scene) for caption in captions]}
    said = np.repeat(captions, len(references)).tolist()
    for key in ("clip", "sbert"):
        likeness = judge("text", key).alike(said, references * len(captions))
        found[key.upper()] = likeness.reshape(len(captions), -1).mean(1)  # over references
    return found


def of_text(name, domain, index, steps):
    """Ten drawings of a text: their scores, how good they are, and what they are as a set."""
    captioner, generator, few = speakers()
    scene = scene_of(domain, index)
    true, text = world.picture(scene), world.captions(scene)[0]
    painter = few if steps == 8 else generator
    talk = cycle.text_image_text(captioner, painter, [text], items=[name],
                                 draw={"steps": steps, "batch": 40})
    pictures, read = talk.images[0], talk.captions[0]                     # (10, 3, 32, 32)
    scores = {}
    for key in ("clip", "sbert"):
        scores[key] = judge("text", key).alike(read, [text])
    scores["clipscore"] = judge("image", "clip").score(pictures, [text])
    scores["likelihood"] = talk.likelihood[0].tolist()
    loss = loss_of(pictures, [text], 12, name)                            # (12, 10)
    nothing = loss_of(pictures, [""], 12, name)
    scores["denoised"] = -loss.mean(0)
    scores["denoised less"] = (nothing - loss).mean(0)
    given = captioner.likelihood(pictures, [text] * len(pictures)) / captioner.tokens([text])
    scores["per token"] = given.numpy()
    scores["both"] = losses.both(given, -scores["denoised less"]).numpy()

    pictures = (pictures * 255).round() / 255                             # as a file holds them
    quality = {}
    for key in ("clip", "dino"):
        quality[key.upper()] = judge("image", key).alike(pictures, true[None])
    seen = world.read_back(reader(), pictures)
    quality["facts"] = [truth(text, scene) for scene in seen]
    dino = judge("image", "dino")
    return {"domain": domain, "text": text, "read": read, "scores": scores, "quality": quality,
            "true": dino.embed(true[None]).numpy()[0], "features": dino.embed(pictures).numpy(),
            "pairs": pairs_of(pictures)}


def pairs_of(pictures):
    """log p of the 48 colour-shape pairs, up to a constant, as the reader sees the objects."""
    with torch.no_grad():
        logits = reader()(pictures)
    shape, colour, *_ = logits.split(world.HEADS, 1)                      # (B, classes, 8, 8)
    shape = shape.log_softmax(1)
    colour = colour.log_softmax(1)
    there = 1 - shape[:, :1].exp()                                        # an object is here
    weight = there / there.sum((2, 3), keepdim=True)
    shape = (shape * weight).sum((2, 3))[:, None, 1:]                     # (B, 1, 6)
    colour = (colour * weight).sum((2, 3))[:, 1:, None]                   # (B, 8, 1)
    return (colour + shape).flatten(1).numpy()                            # (B, 48)


# ---------------------------------------------------------------- Finding I: captions
def columns(rows, kind):
    """{name: (items, candidates)} of the rows' scores or qualities."""
    found = {}
    for name in rows[0][kind]:
        found[name] = np.array([row[kind][name] for row in rows])
    return found


def quality_of(rows):
    """{measure: (items, captions)}; CIDEr weighs n-grams by the references of all rows."""
    captions = [row["captions"] for row in rows]
    references = [row["references"] for row in rows]
    return {"CIDEr": 100 * metrics.cider(captions, references)} | columns(rows, "quality")


def worth(quality, scores, rows):
    """{quality: {score: {domain: what choosing by it is worth}}}."""
    found = {}
    for name, values in quality.items():
        found[name] = {}
        for key, score in scores.items():
            found[name][key] = {}
            for domain, at in by_domain(rows):
                found[name][key][domain] = metrics.choices(values[at], score[at])
    return found


def means(values, rows):
    """{domain: mean and interval} of the rows' values."""
    return {domain: mean_of(values[at]) for domain, at in by_domain(rows)}


def findings(lab):
    """Finding I (Figure 3, Table 1): quality by rank, for every score, by domain."""
    rows = lab.measured("captions", of_picture, jobs(lab.count(500)))
    scores = columns(rows, "scores")
    shown = {key: scores[key] for key in SHOWN}
    ten, beam = {}, {}
    for name, values in quality_of(rows).items():
        ten[name] = values[:, :10]
        best = values[:, 10]
        beam[name] = means(best, rows)
        gain = means(best - ten[name].mean(1), rows)
        for domain, x in beam[name].items():
            x["gain"] = gain[domain]
    lab.keep("findings", {"table": worth(ten, shown, rows), "beam": beam})


# ---------------------------------------------------------------- Finding II: pictures
def drawings(lab, part, full, steps):
    """Finding II (Figure 4, Table 2): quality by rank, and of the chosen as a set."""
    rows = lab.measured(part, of_text, jobs(lab.count(full), steps))
    scores = columns(rows, "scores")
    quality = columns(rows, "quality")
    scores["cider"] = cider_of(rows, lab.count(500))
    table = worth(quality, scores, rows)

    dice, everyone = np.random.default_rng(0), np.arange(len(rows))
    sets = {"a random one": at_random(rows, dice)}
    best = {key: score.argmax(1) for key, score in scores.items()}
    for key, place in best.items():
        sets[key] = as_a_set(rows, place)
    ahead = {}
    for a, b in CONTRASTS:
        ahead[f"{a} minus {b}"] = {}
        for name, values in quality.items():
            gain = values[everyone, best[a]] - values[everyone, best[b]]
            ahead[f"{a} minus {b}"][name] = mean_of(gain)
    lab.keep(part, {"steps": steps, "table": table, "differences": ahead, "sets": sets})


def cider_of(rows, count):
    """CIDEr of what was read with the text, weighted by the captions of the domain, as by
    rerank.py of a set: (items, 10)."""
    weights, found = {}, []
    for domain in DOMAINS:
        captions = [world.captions(scene_of(domain, index)) for index in range(count)]
        weights[domain] = metrics.document_frequency(captions)
    for row in rows:
        texts = [[row["text"]]] * len(row["read"])
        found.append(metrics.cider(row["read"], texts, weights[row["domain"]]))
    return np.array(found)


def as_a_set(rows, chosen):
    """Frechet distance of DINO's features to the true pictures, Inception score over the pairs."""
    features = [row["features"][best] for row, best in zip(rows, chosen)]
    pairs = [row["pairs"][best] for row, best in zip(rows, chosen)]
    true = np.array([row["true"] for row in rows])
    score = metrics.inception_score(np.array(pairs))
    return {"FD-DINO": metrics.frechet(np.array(features), true), "IS": score}


def at_random(rows, dice):
    """The same of random choices: mean, and where 95 of 100 lie."""
    tries = [as_a_set(rows, dice.integers(10, size=len(rows))) for _ in range(100)]
    found = {}
    for key in tries[0]:
        values = [x[key] for x in tries]
        low, high = np.quantile(values, (.025, .975))
        found[key] = {"value": np.mean(values), "low": low, "high": high}
    return found


# ---------------------------------------------------------------- wrong words
def planted(kind, domain, index):
    """Is a planted wrong word the one that contributes least to its caption?"""
    scene, generator = scene_of(domain, index), speakers()[1]
    true = world.full_caption(scene)
    said = spoiled(true, scene, kind, index)
    split = "test" if domain == "in" else domain
    timesteps, noise = cycle.noises(generator, 24, item=[split, index])
    found = losses.words(generator, world.picture(scene), said, timesteps, noise)
    lowest = np.argmin([contribution for _, contribution, _ in found])
    word, meant = said.split()[lowest], true.split()[lowest]
    return {"case": f"{kind}, {domain}", "right": word != meant}


def words(lab):
    """losses.words, which rerank.py --words prints, on captions with one planted wrong word."""
    wanted, cases = {}, {"colour or shape": []}
    for kind in ("colour", "shape"):
        for domain in DOMAINS:
            for index in range(20_000, 20_000 + lab.count(50)):
                wanted[f"{kind} {domain} {index}"] = (kind, domain, index)
    for row in lab.measured("words", planted, wanted):
        cases["colour or shape"].append(row["right"])
        cases.setdefault(row["case"], []).append(row["right"])
    planted_in = {case: mean_of(right) for case, right in cases.items()}
    lab.keep("words", {"planted": planted_in})


# ---------------------------------------------------------------- what other scripts measure
def check(lab):
    """Is the miniature good enough to mean something? A bar that is missed is a result too."""
    path = lab.work / "check/check.json"
    path.unlink(missing_ok=True)
    scenes = max(12, lab.count(300))             # its sheet shows twelve
    keep.command("-m", "miniature.check", "--scenes", scenes, "--work", path.parent,
                 "--threads", lab.processes, threads=lab.processes, accepted=(0, 1))
    lab.keep("check", {"figures": records.load_json(path)})


def scores(lab):
    """Tables 3 and 4 of the shipped models."""
    path = lab.work / "evaluate"
    keep.command("evaluate.py", "--ci", "--limit", lab.count(100), "--out", path)
    found = records.load_json(path / "results.json")
    lab.keep("scores", {"captions": found["captions"], "images": found["images"]})


def measure(part, lab):
    if part == "check":
        check(lab)
    elif part == "scores":
        scores(lab)
    elif part == "findings":
        findings(lab)
    elif part == "texts":
        drawings(lab, "texts", 500, 50)
    elif part == "pictures":
        drawings(lab, "pictures", 500, 8)
    elif part == "words":
        words(lab)


if __name__ == "__main__":
    keep.run_script(measure, __doc__, PARTS)
