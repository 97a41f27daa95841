"""Which score chooses the best caption? Settled on val, then read once on the test scenes.

    python -m lab.choice                         # both parts, as committed: two hours on two cores
    python -m lab.choice val --share .1          # a tenth of one, into lab/results/share-0.1

val: what both models' verdicts are worth together, by weight, number of candidates and of noises,
and the strongest beam search. test: the table that the default comes from. Seconds are of one
thread's own time. Run again, it goes on where it stopped; remove out/lab to measure anew.
"""
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau, rankdata

import losses
import records
from lab import findings, keep
from lab.findings import columns, jobs, judge, loss_of, qualities, quality_of, speakers
from lab.keep import DOMAINS, HERE, by_domain, mean_of, scene_of, timed
from miniature import world

PARTS = ("val", "test")
VAL_SCENES = 150                                 # of each domain
CYCLES = 500                                     # scenes of each domain whose captions are drawn
VAL = 50_000                                     # first val scene of each domain, as in lab.joint
WIDTHS = (3, 5, 10)                              # of beam search
PENALTIES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)       # of its length; 1 is the library's own, 0 is none
DRAWS = (1, 2, 4, 6, 8, 12, 16, 32, 64)          # numbers of noises of the denoising loss
TEMPERATURES = (0.5, 2.0)                        # of the likelihood
SHARES = (0.5, 2.0)                              # of denoise beside the likelihood, standardised
WEIGHTS = (10, 30, 100, 300)                     # of denoise beside nats per token
BOTH = ["likelihood", "denoise"]
# what a score takes once captions are sampled
TAKES = {
    "likelihood": ["likelihood"],
    "per token": ["likelihood"],
    "clipscore": ["clipscore"],
    "denoise": ["denoise"],
    "both": BOTH,
}
CYCLE = {"clip": 100, "dino": 100, "few": 16}    # UNet evaluations of a caption that is drawn
COMPARED = [
    ("both", "denoise"),
    ("both", "per token"),
    ("both", "clipscore"),
]


# ---------------------------------------------------------------- one picture
def of_picture(name, domain, index, n, draws, beams):
    """n samples of a picture and three beams, scored; the first captions of other beam searches.

    draws: noises of a longer denoising loss of the first ten, or 0; beams: [(width, penalty)].
    """
    captioner, generator, _ = speakers()
    scene = scene_of(domain, index)
    image, references = world.picture(scene), world.captions(scene)
    seconds = {}
    (samples,), _ = timed(seconds, "samples", captioner.speak, [image], n, items=[name])
    (three,), _ = timed(seconds, "beam", captioner.speak, [image], 3, "beam")
    searches = [searched(captioner, image, *beam) for beam in beams]

    candidates = samples + three
    different = list(dict.fromkeys(candidates))
    place = [different.index(caption) for caption in candidates]
    found = timed(seconds, "likelihood", likelihoods, captioner, image, different)
    loss = timed(seconds, "denoise", loss_of, image, different, 12, name)         # (12, k)
    found["denoise"] = -loss.mean(0)
    apart = torch.from_numpy(loss - loss.mean(1, keepdims=True))
    found["error"] = losses.mean_and_error(apart)[1].numpy()
    clip = judge("image", "clip")
    found["clipscore"] = timed(seconds, "clipscore", clip.score, image[None], different)
    scores = {key: np.asarray(values)[place] for key, values in found.items()}    # (n + 3,) each

    longer = {}
    if draws:
        ten = list(dict.fromkeys(samples[:10]))
        place = [ten.index(caption) for caption in samples[:10]]
        loss = loss_of(image, ten, draws, name)                                   # (64, k)
        for count in DRAWS:
            rows = some(len(loss), count, name)
            longer[count] = -loss[rows].mean(0)[place]                            # (10,)

    captions = candidates + searches
    return {
        "domain": domain,
        "captions": captions,
        "references": references,
        "seconds": seconds,
        "different": len(set(samples)),
        "scores": scores,
        "longer": longer,
        "quality": qualities(captions, references, scene),
    }


def some(total, count, item):
    """`count` of `total` draws, one of each of as many equal parts, by a chance of the item."""
    key = [zlib.crc32(word.encode()) for word in (item, str(count))]
    dice = np.random.default_rng(key)
    parts = np.array_split(np.arange(total), count)
    return np.array([dice.choice(part) for part in parts])


def searched(captioner, image, width, penalty):
    """The first caption of a beam search of another width and length penalty."""
    captioner.beams, captioner.length_penalty = width, penalty
    (captions,), _ = captioner.speak([image], 1, "beam")
    del captioner.beams, captioner.length_penalty
    return captions[0]


def likelihoods(captioner, image, captions):
    """Log-likelihoods (k,) of captions: of the whole, and per token at several temperatures."""
    with torch.no_grad():
        states = captioner.see([image]).expand(len(captions), -1, -1)
        reading = captioner.read(None, captions, states)
        logits = F.linear(reading.hidden, reading.weight, reading.bias).float()   # (k, L, V)
    tokens = captioner.tokens(captions)
    total = log_p(logits, reading.targets)
    found = {"likelihood": total, "per token": total / tokens}
    for heat in TEMPERATURES:
        found[f"per token, T {heat:g}"] = log_p(logits / heat, reading.targets) / tokens
    return {key: values.numpy() for key, values in found.items()}


def log_p(logits, targets):
    """Log-likelihood (k,) of captions, from logits (k, L, V)."""
    loss = F.cross_entropy(logits.mT, targets, ignore_index=-100, reduction="none")
    return -loss.double().sum(1)


# ---------------------------------------------------------------- what a choice is worth
def only(values, at):
    """{name: values of the captions numbered `at`}: (items,) of one, (items, k) of a list."""
    return {name: x[:, at] for name, x in values.items()}


def of_items(values, at):
    """{name: values of the items `at`}."""
    return {name: x[at] for name, x in values.items()}


def chosen(quality, score):
    """{measure: (items,)} of the candidate that a score (items, n) puts first."""
    best = np.asarray(score).argmax(1)[:, None]
    return {name: np.take_along_axis(x, best, 1)[:, 0] for name, x in quality.items()}


def against(found, beam, rows):
    """{domain: {measure: mean, measure minus beam: mean}}, each with its interval."""
    table = {}
    for domain, at in by_domain(rows):
        table[domain] = {}
        for name, values in found.items():
            table[domain][name] = mean_of(values[at])
            table[domain][f"{name} minus beam"] = mean_of((values - beam[name])[at])
    return table


def rules(scores):
    """{name: (items, n)}: either verdict alone, and the ways to put the two together."""
    said = scores["per token"]
    drawn = scores["denoise"]
    found = {}
    for name in ("denoise", "likelihood", "per token", "clipscore"):
        found[name] = scores[name]
    found["both"] = losses.both(said, -drawn).numpy()
    for heat in TEMPERATURES:
        other = scores[f"per token, T {heat:g}"]
        found[f"per token, T {heat:g}"] = other
        found[f"both, T {heat:g}"] = losses.both(other, -drawn).numpy()
    z_said = losses.standardised(said).numpy()
    z_drawn = losses.standardised(drawn).numpy()
    for share in SHARES:
        found[f"z(per token) + {share:g} z(denoise)"] = z_said + share * z_drawn
    for weight in WEIGHTS:
        found[f"per token + {weight:g} denoise"] = said + weight * drawn
    found["ranks"] = rankdata(said, axis=1) + rankdata(drawn, axis=1)
    # the share of denoise's spread among the candidates that is not the error of its mean
    spread = drawn.var(1, keepdims=True) + 1e-12
    noise = np.square(scores["error"]).mean(1, keepdims=True)
    found["weighted by error"] = z_said + np.clip(1 - noise / spread, 0, 1) * z_drawn
    return found


def val(lab):
    """Everything that is to be chosen, on val scenes."""
    beams = [(width, penalty) for width in WIDTHS for penalty in PENALTIES]
    work = {}
    for domain in DOMAINS:
        for index in range(lab.count(VAL_SCENES)):
            name = f"val {domain} {index}"
            work[name] = (name, domain, VAL + index, 50, DRAWS[-1], beams)
    rows = lab.measured("choice-val", of_picture, work)
    quality = quality_of(rows)
    scores = columns(rows, "scores")

    searches = {}                                # they come after 50 samples and three beams
    for place, (width, penalty) in enumerate(beams, 53):
        searches[f"{width} beams, length penalty {penalty:g}"] = only(quality, place)
    strongest = max(searches, key=lambda name: searches[name]["CIDEr"].mean())
    beam = searches[strongest]
    found = {"beams": {}, "rules": {}, "candidates": {}, "draws": {}}
    for name, values in searches.items():
        found["beams"][name] = against(values, beam, rows)
    for name, score in rules(only(scores, slice(10))).items():
        found["rules"][name] = against(chosen(quality, score), beam, rows)
    for n in (2, 5, 10, 20, 50):
        for name, score in rules(only(scores, slice(n))).items():
            if name in ("denoise", "both"):
                values = chosen(quality, score)
                found["candidates"][f"{name}, {n}"] = against(values, beam, rows)
    wider = [*range(10), 50, 51, 52]
    values = chosen(only(quality, wider), rules(only(scores, wider))["both"])
    found["candidates"]["both, 10 and 3 beams"] = against(values, beam, rows)
    said = scores["per token"][:, :10]
    longer = columns(rows, "longer")
    for count in DRAWS:
        drawn = longer[str(count)]
        by_drawn = chosen(quality, drawn)
        by_both = chosen(quality, losses.both(said, -drawn))
        found["draws"][f"denoise, {count}"] = against(by_drawn, beam, rows)
        found["draws"][f"both, {count}"] = against(by_both, beam, rows)
    best = max(found["rules"], key=lambda name: found["rules"][name]["all"]["CIDEr"]["value"])
    lab.keep("choice_val", {"strongest": strongest, "best rule": best} | found)


def test(lab):
    """Scores x (UNet evaluations, seconds, quality minus the strongest beam search's)."""
    # val's choice, as committed: a smaller share has too few scenes to choose
    chosen_on_val = records.load_json(HERE / "results/choice_val.json")
    strongest = chosen_on_val["strongest"]
    rule = chosen_on_val["best rule"]
    takes = TAKES | {rule: BOTH}
    width, penalty = re.fullmatch(r"(\d+) beams, length penalty (.+)", strongest).groups()
    beams = [(5, 1.0), (10, 1.0), (int(width), float(penalty))]
    rows = lab.measured("choice-test", of_picture, jobs(lab.count(500), 10, 0, beams))
    quality = quality_of(rows)
    scores = only(columns(rows, "scores"), slice(10))
    beam = only(quality, 15)                     # after ten samples, three beams, two searches
    different = np.mean([row["different"] for row in rows])
    seconds = {}
    for name in rows[0]["seconds"]:
        seconds[name] = np.mean([row["seconds"][name] for row in rows])

    found = {}
    places = {
        "3 beams": 10,
        "5 beams": 13,
        "10 beams": 14,
        strongest: 15,
    }
    for name, place in places.items():
        found[name] = against(only(quality, place), beam, rows)
    found["3 beams"]["seconds"] = seconds["beam"]
    at_random = {name: values[:, :10].mean(1) for name, values in quality.items()}
    found["a random one"] = against(at_random, beam, rows) | {"seconds": seconds["samples"]}
    best = {}
    for name, score in rules(scores).items():
        if name in takes:
            best[name] = chosen(quality, score)
            took = sum(seconds[part] for part in takes[name])
            evaluations = 12 * different if "denoise" in takes[name] else 0
            found[name] = against(best[name], beam, rows)
            found[name] |= {
                "seconds": seconds["samples"] + took,
                "evaluations": evaluations,
            }
    ahead = {}
    for a, b in [*COMPARED, (rule, "denoise")]:
        ahead[f"{a} minus {b}"] = {}
        for domain, x in against(best[a], best[b], rows).items():
            ahead[f"{a} minus {b}"][domain] = {
                "CIDEr": x["CIDEr minus beam"],
                "facts": x["facts minus beam"],
            }

    cycles, agree = drawing(lab, rows, quality, beam, scores)
    for row in cycles.values():
        row["seconds"] += seconds["samples"]
        row["evaluations"] *= different
    lab.keep("choice", {
        "strongest": strongest,
        "rows": found | cycles,
        "differences": ahead,
        "agreement with clip": agree,
    })


def drawing(lab, rows, quality, beam, scores):
    """Rows of `test` of the scores that draw, of the same captions of fewer scenes; and how far
    the others agree with the full cycle."""
    work = jobs(lab.count(CYCLES))
    drawn = lab.measured("captions", findings.of_picture, work)
    at = [row["key"] in work for row in rows]
    rows = [row for row in rows if row["key"] in work]
    quality = of_items(quality, at)
    beam = of_items(beam, at)
    others = rules(of_items(scores, at))
    cycle = columns(drawn, "scores")
    found = {}
    for name, evaluations in CYCLE.items():
        found[name] = against(chosen(quality, cycle[name]), beam, rows)
        found[name]["seconds"] = np.mean([row["seconds"][name] for row in drawn])
        found[name]["evaluations"] = evaluations
    agree = {}
    for name in ("denoise", "both"):
        agree[name] = agreement(others[name], cycle["clip"], drawn)
    return found, agree


def agreement(ours, theirs, rows):
    """How often two scores (items, n) choose the same caption, and their Kendall's tau."""
    same, tau = [], []
    for row, a, b in zip(rows, ours, theirs):
        captions = row["captions"]
        same.append(captions[a.argmax()] == captions[b.argmax()])
        tau.append(kendalltau(a, b).statistic)
    known = np.array(tau)[~np.isnan(tau)]                # nan where all are equal
    return {"same": mean_of(same), "tau": mean_of(known)}


def measure(part, lab):
    if part == "val":
        val(lab)
    elif part == "test":
        test(lab)


if __name__ == "__main__":
    keep.run_script(measure, __doc__, PARTS)
