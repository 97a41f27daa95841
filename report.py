"""Tables, figures and the README's numbers from results/*.json: no number is typed by hand.

    python report.py                        # RESULTS.md, results/*.png, the marked tables of README.md
    python report.py --folder results/short # of another folder: RESULTS.md in it, the README is left alone
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
DOMAINS = ("in", "near", "out")
# The paper's own numbers, in columns of their own: NoCaps; captions by BLIP ViT-B, pictures by Stable Diffusion v1-4
PAPER = {"Finding I": {"CIDEr": {"clip": "Table 1: 74.1 -> 80.3, +6.2 (in +2.2, near +5.9, out +10.1)"}},
         "Finding II": {"CLIP": {"clip": "Table 2: distance 40.54 -> 33.47"}},
         "sets": {"a random one": "Table 2: FID 32.37, IS 41.19", "clip": "Table 2: FID 29.59, IS 45.64"},
         "captions": {"none": "Table 3: 109.7 (in 111.8, near 108.6, out 111.5)", "tg": "Table 5, w/o IR: 109.7",
                      "ir": "Table 5, w/o TG: 102.3",
                      "all four": "Table 3: 111.8 (in 114.9, near 110.8, out 112.9)"},
         "drawings": {"none": "Table 4: .4039", "ig": "Table 4: .4077", "all four": "Table 4: .3978"}}
NAMES = {"clip": "full cycle, CLIP", "dino": "full cycle, DINO", "pixel": "full cycle, pixels",
         "sbert": "full cycle, SBERT", "cider": "full cycle, CIDEr", "few": "few steps (8), CLIP",
         "again": "full cycle, CLIP, another seed", "clipscore": "*no cycle:* CLIP(picture, caption)",
         "likelihood": "*no cycle:* log-likelihood", "denoise": "denoise, 12 noises (default)",
         "halved 60": "denoise, `--budget 60`", "denoised": "denoise, 12 noises",
         "denoised less": "denoise, 12 noises, less the empty caption"}


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=HERE / "results", help="the folder of the JSON files")
    return p.parse_args(argv)


# ---------------------------------------------------------------- tables
def name_of(key):
    key = re.sub(r"^denoise (\d+)$", r"denoise, \1 noises of a set", NAMES.get(key, key))
    return key.replace(" 1 noises", " 1 noise").replace("ranks: ", "sum of ranks: ")


def with_interval(x, digits=1, sign=True):
    """A mean and its 95 % interval: {value, low, high} of mean_of, or {gain, interval} of metrics.choices."""
    low, high = interval(x)
    s = "+" if sign else ""
    return f"{value(x):{s}.{digits}f} [{low:{s}.{digits}f}, {high:{s}.{digits}f}]"


def value(x):
    return x.get("value", x.get("gain"))


def interval(x):
    return x.get("interval") or (x["low"], x["high"])


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in [head, ["---"] * len(head), *rows])


def text_scorers(found):
    """The tables of scorers: which to use where every picture costs."""
    first, time, equal = found["scorers"]["clip"]["all"], found["seconds"], found["differences"]

    def row(key, r, domain):
        c = r[domain]
        return [with_interval(c), "" if key == "clip" else with_interval({"value": c["kept"], "interval": c[
            "kept_interval"]}, 2, False), with_interval(c["same"], 2, False), with_interval(c["tau"], 2),
            with_interval(c["over_beam"])]

    def table(wanted):
        """The rows whose key `wanted` is true of."""
        return markdown(["chosen by", "pictures", "UNet evaluations", "s", *head, *(f"{k}, in / near / out" for k in (
            "gain", "minus beam search"))], [[
                name_of(k), f"{r['items']:,}", f"{r['evaluations']:,.0f}",
                f"{time[k]:.2f}" if k in time else "", *row(k, r, "all"),
                " / ".join(f"{r[d]['gain']:+.1f}" for d in DOMAINS),
                " / ".join(f"{r[d]['over_beam']['value']:+.1f}" for d in DOMAINS)]
            for k, r in found["scorers"].items() if wanted(k)])
    head = ["gain [95 %]", "of the full gain", "same first choice", "tau", "minus beam search"]
    lines = [table(lambda k: k in NAMES), "",
             f"Ten samples (top-p .9) of {first['items']:,} held-out pictures: CIDEr x 100 of a random one "
             f"{first['mean']:.1f}, of the best {first['oracle']:.1f}; beam search (3) "
             f"{found['beam']['all']['value']:.1f}. Rows of fewer pictures have the first of each domain, and the full "
             "gain of the same. Agreement is with the full cycle by CLIP. `another seed` is the ceiling of scores that "
             "share no noise with it: few steps start from the same noise; DINO, pixels and sums of ranks see the "
             "same drawings. Equal captions are scored once. s: seconds a picture in float32 on "
             f"{time['threads']} cores, the fastest of three passes over {time['items']} pictures, one by one.", "",
             "Differences of gain (16 noises and few steps cost the same, so do 60 evaluations and 6 noises):", "",
             markdown(["difference", "all", *DOMAINS], [
                 [" - ".join(map(name_of, k.split(" minus "))), *(with_interval(x[d]) for d in ("all", *DOMAINS))]
                 for k, x in equal.items()]), "",
             "By the number of noises (of one larger set, not the 12 of the default), and by sums of ranks:", "",
             table(lambda k: k not in NAMES)]
    for d in DOMAINS:
        lines += ["", f"**{d}**: a random caption {found['scorers']['clip'][d]['mean']:.1f}, beam search "
                  f"{with_interval(found['beam'][d], sign=False)}", "", markdown(
                      ["chosen by", *head], [[name_of(k), *row(k, r, d)] for k, r in found["scorers"].items()])]
    both = [[name_of(k), with_interval(r["all"]["with_beams"], sign=False),
             *(with_interval(r[d]["with_beams_over_beam"]) for d in ("all", *DOMAINS))]
            for k, r in found["scorers"].items() if "with_beams" in r["all"]]
    lines += ["", "With the three beams added to the ten (which were not drawn for the full cycle):", "",
              markdown(["chosen by", "CIDEr", "minus beam search", *DOMAINS], both)]
    lines += ["", "Subtracting the loss under the empty caption changes no order among the captions of one picture, by "
              "construction; for pictures of one text it does (Finding II above)."]
    return lines


def text_check(found):
    figures, rows = found["figures"], []
    for name, said in (("captioner facts", "stated facts of a 3-beam caption that are true"),
                       ("generator pairs", "drawings with every colour-shape pair right, by an independent reader"),
                       ("vae pairs", "the VAE's reconstructions, likewise"),
                       ("real pairs", "the world's own pictures, likewise (the reader's ceiling)"),
                       ("captions distinct of 10", "different captions among ten samples")):
        bars = [f"{k.removeprefix(name).strip(', ') or 'all'} >= {x['bar']:g}: "
                + ("met" if x["value"] >= x["bar"] else "missed")
                for k, x in figures.items() if k.startswith(name) and x["bar"] is not None]
        rows.append([said, figures[f"{name}, in"]["n"],
                     *(with_interval(figures[f"{name}, {d}"], 3, False) for d in DOMAINS), "; ".join(bars)])
    return [markdown(["on scenes nothing was trained on", "n", *DOMAINS, "bars"], rows)]


def text_scores(found):
    rows = [[d, found["captions"][d]["n"], *(plain(found["captions"][d][k]) for k in ("CIDEr", "B@4")),
             with_interval(found["captions"][d]["SBERT"], 3, False),
             *(with_interval(found["images"][d][k], 3, False) for k in ("CLIP", "DINO"))]
            for d in DOMAINS if d in found["captions"]]
    return [markdown(["captions by 3 beams", "n", "CIDEr", "BLEU-4", "SBERT", "pictures: CLIP", "DINO"], rows)]


def plain(x):
    """A score out of a hundred with its interval."""
    return with_interval(x, 1, False)


def text_val(found):
    rows = [[f"{r['span'][0]:g} to {r['span'][1]:g}", r["weight"], f"{r['draws']:.1f}", with_interval(r),
             with_interval(r["minus even"])] for r in sorted(found["rows"], key=lambda r: -r["gain"])]
    return [f"The gain of choosing one of ten captions of {found['items']} val scenes (mean CIDEr {found['mean']:.1f}) "
            "by 12 draws over the whole schedule, or by those of them that lie in a part of it. Weights multiply the "
            "velocity loss, the miniature's own. In the full run no part is better than as many draws over the whole "
            "by more than its interval, and no weight better than none: the score has neither. (An earlier val of 300 "
            "scenes preferred min(SNR, 5); the test sets, measured with that score, already had even weights ahead "
            "when the 900 scenes of the full run were drawn to settle it.)", "",
            markdown(["timesteps", "weight", "draws", "gain [95 %]", "minus as many draws over 0 to 1, even"], rows)]


def text_words(found):
    rows = [[k, f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]", v["n"]] for k, v in found["planted"].items()]
    return [markdown(["planted wrong word", "is the lowest of its caption", "cases"], rows)]


def text_signal(found):
    rows = [[f"{r['timesteps'][0]} to {r['timesteps'][1]}", with_interval(r["gap"], 4), f"{r['found_out']:.2f}",
             with_interval(r["tr"], 3, False)] for r in found["rows"]]
    return [markdown(["timestep", "denoising loss, wrong caption - right", "share of noises that tell",
                      "caption loss of the one-step estimate"], rows), "",
            f"{found['items']} val scenes; one colour or shape word exchanged. The caption loss of the picture itself "
            f"is {found['tg']:.3f}, of another picture {found['tg_of_another_picture']:.3f}."]


def text_joint(found):
    paired, own, known = (found["chosen"][k] for k in ("paired", "own", "known"))
    settings = [f"- {k}: {x['steps']} steps, learning rate {x['lr']:g}" + f", ir weighs {x['ir']:g}" * (x is not known)
                for k, x in (("every picture has a human caption", paired), ("own words", own),
                             ("known pairs without ir", known))]
    lines = [f"Batches of 8, {counted(found)}, query projections. Rows that are compared with each other have "
             "equal steps, and learning rates of their own, chosen on val (of 100, 200 and 400 steps; known pairs take "
             "those of own words)" + ("" if found["val"] else ", by the full run; the steps are fewer here") + ":", "",
             *settings, "",
             f"tr weighs {found['chosen']['tr']:g}; the generator's learning rate is "
             f"{found['chosen']['generator']:g}. `known pairs: tg + ir` is own words without the own words, at their "
             "settings. Means over seeds; 95 % intervals resample scenes nothing was trained on, and the "
             f"{counted(found)}.", "",
             "Unmarked rows: every picture has a human caption, of all colour-shape pairs. `known pairs`: only "
             "pictures and captions of pairs that the captioner has always known. `own words`: the same, and beside it "
             "pictures of all pairs that nobody described (`--own all`), for ir alone. `alone`, what a row has to "
             "beat, is the same described pictures without the other model. The val scenes, by which settings were "
             "chosen, are of all domains.", "", *captioner_tables(found), *generator_table(found)]
    if found["val"]:                                                                 # of smaller sizes there is none
        lines += searched(found)
    if "norms" in found:
        norms = [[name, k.removeprefix("norm_"), *(f"{v[side]:.3f}" for side in ("captioner", "generator"))]
                 for name, row in found["norms"].items() for k, v in row.items()]
        lines += ["**Gradient norms** at the first step, weights included", "",
                  markdown(["run", "loss", "captioner", "generator"], norms), "",
                  "**Before and after** (the figure): the first scenes of out whose beam caption changed in `own "
                  "words: all four`, seed 0; each drawing is of the first human caption, from the same noise, in 50 "
                  "steps.", ""]
    return [*lines, "**Commands**", "", *commands(found)]


def searched(found):
    """What val chose from, and what the search says of the rows that gain nothing."""
    tried = [[k, *(f"{v[m]:.{n}f}" if m in v else "" for m, n in (("CIDEr", 1), ("facts", 3), ("ig", 4)))]
             for k, v in found["val"].items()]
    first, change = found["norms"]["all four"], found["rows"]["ig"]["all"]["ig minus none"]
    rates = ", ".join(f"{k[4:]} {v['ig']:.5f}" for k, v in found["val"].items() if k.startswith("ig, "))
    return ["**Tried on val** (means of two seeds; by CIDEr, the generator's rate by the denoising loss)", "",
            markdown(["run", "CIDEr", "true facts", "denoising loss"], tried), "",
            "**Where nothing is gained, what there is to see.** With a human caption for every picture, a larger "
            "weight of ir is no better on val (above), so it is not that ir is too weak, though its gradient on the "
            f"captioner is {first['norm_ir']['captioner'] / first['norm_tg']['captioner']:.2f} of tg's at the first "
            "step: the human caption already says it. tr reads a picture from which, at most timesteps, the caption "
            "is read as well as from the original (\"What is there to learn from?\"): it is tg again on a near copy. "
            f"The generator's own loss does not fall: ig alone changes it by {with_interval(change, 6)}, and on val "
            f"(untrained {found['val']['none']['ig']:.5f}) with every learning rate tried ({rates}): trained long "
            "before on the same world, its query projections have little left to gain from more of it.", ""]


def counted(found):
    return f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}"


def commands(found):
    return [f"- {k}: `python {v}`" for k, v in found["commands"].items()]


def text_variants(found):
    rates = ", ".join(f"`{k}` {v:g}" for k, v in found["chosen"]["kv"].items())
    tried = ", ".join(f"{k.split('lr ')[1].split(',')[0]} {v['CIDEr']:.1f}" for k, v in found["val"].items()
                      if k.startswith("own words"))
    more = [[k, *(with_interval(r[d][f"{q} minus queries"], n) for q, n in (("CIDEr", 1), ("facts", 3))
                  for d in ("all", *DOMAINS))] for k, r in found["rows"].items() if "CIDEr minus queries" in r["all"]]
    return [f"As in the section before, {counted(found)} and the settings of the row that is varied, but for "
            f"three rows with keys and values, whose learning rate val chose ({rates}). CIDEr on val of `own words, kv "
            f"trained` by rate: {tried or 'not taken'}. The row at the queries' rate stands beside it; val did not "
            "choose it. `other` is the row that a row is compared with.", "",
            "**Keys and values minus queries** (`own words: tg + ir`)", "",
            markdown(["trained", *(f"{q}, {d}" for q in ("CIDEr", "facts") for d in ("all", *DOMAINS))], more), "",
            *captioner_tables(found, "other"), *generator_table(found, "other"), "**Commands**", "", *commands(found)]


def captioner_tables(found, beside="alone"):
    rows, alone = found["rows"], found["alone"]
    here = {k: r for k, r in rows.items() if k not in ("ig", "known pairs: ig")}      # these train the generator alone
    table = [[name, plain(r["all"]["CIDEr"]), " / ".join(f"{x:.1f}" for x in r["all"]["CIDEr"]["seeds"]),
              with_interval(r["all"]["facts"], 3, False),
              *(with_interval(r["all"][f"{k} minus none"], n) if name != "none" else "" for k, n in
                (("CIDEr", 1), ("facts", 3))),
              *(with_interval(r["all"][f"{k} minus alone"], n) if name in alone else "" for k, n in
                (("CIDEr", 1), ("facts", 3))), alone[name][0] if name in alone else "",
              PAPER["captions"].get(name, "")] for name, r in here.items()]
    head = ["trained", "CIDEr, 3 beams", "by seed", "true facts", "CIDEr - none", "facts - none",
            f"CIDEr - {beside}", f"facts - {beside}", f"{beside}:", "the paper's CIDEr"]
    domains = [[name, *(with_interval(r[d][f"{k} minus none"], n) for k, n in (("CIDEr", 1), ("facts", 3))
                        for d in DOMAINS)] for name, r in here.items() if name != "none"]
    return ["**What it does to the captioner**", "", markdown(head, table), "",
            f"{rows['none']['all']['CIDEr']['n']:,} scenes. By domain, minus none:", "",
            markdown(["trained", *(f"{k}, {d}" for k in ("CIDEr", "facts") for d in DOMAINS)], domains), ""]


def generator_table(found, beside="alone"):
    rows = found["rows"]
    both = {k for k, r in rows.items() if k in found["alone"] and "pairs minus alone" in r["all"]}
    table = [[name, with_interval(r["all"]["pairs"], 3, False), with_interval(r["all"]["ig"], 4, False),
              *(with_interval(r["all"][f"{k} minus none"], n) if name != "none" else "" for k, n in
                (("pairs", 3), ("ig", 4))),
              *([with_interval(r["all"]["pairs minus alone"], 3), found["alone"][name][1]]
                if name in both else ("", "")),
              PAPER["drawings"].get(name, "")] for name, r in rows.items() if "pairs" in r["all"]]
    return ["**What it does to the generator**", "",
            markdown(["trained", "drawings right", "denoising loss", "drawings - none", "loss - none",
                      f"drawings - {beside}", f"{beside}:", "the paper's CLIP distance"], table), "",
            f"{rows['none']['all']['pairs']['n']} scenes, drawn in 8 steps of DPM-Solver++; right: every "
            "colour-shape pair, by the independent reader. Most of the wrong ones are the few steps' doing: in 50 "
            "steps far more are right (README, the miniature).", ""]


def text_findings(found, finding="Finding I: image -> text -> image"):
    lines = []
    for quality, scores in found["table"].items():
        paper, beam = PAPER[finding.split(":")[0]].get(quality), found.get("beam", {}).get(quality)
        lines += [f"**{finding}, {quality}** ({scores['clip']['all']['items']:,} items)", "",
                  choice_table(scores, 1 if quality == "CIDEr" else 3, paper, beam), ""]
    return lines


def text_texts(found):
    return [f"Ten drawings of each of {drawn(found)} texts in {found['steps']} steps: {20 * found['steps']:,} "
            "evaluations of the UNet a text, so fewer texts than elsewhere.", "", *text_drawings(found)]


def text_pictures(found):
    return [f"Ten drawings of each of {drawn(found):,} texts in {found['steps']} steps of DPM-Solver++.", "",
            *text_drawings(found)]


def drawn(found):
    return found["table"]["CLIP"]["clip"]["all"]["items"]


def text_drawings(found):
    lines = text_findings(found, "Finding II: text -> image -> text")
    ahead = [f"{' - '.join(map(name_of, k.split(' minus ')))} {with_interval(x, 3)}"
             for k, x in found["differences"].items()]
    random = found["sets"]["a random one"]
    rows = [[name_of(k), *(with_interval(v[m], n, False) if v is random else f"{v[m]:.{n}f}"
                           for m, n in (("FD-DINO", 4), ("IS", 2))), PAPER["sets"].get(k, "")]
            for k, v in found["sets"].items()]
    return [*lines, f"Differences in CLIP's likeness: {'; '.join(ahead)}.", "",
            "Of the chosen drawings as a set: Frechet distance of DINO's features to the true pictures, and "
            "the Inception score over the 48 colour-shape pairs that the independent reader sees. In brackets where 95 "
            "of 100 random choices lie: what lies within is no better than chance.", "",
            markdown(["ranked by", "FD-DINO", "IS", "the paper's (Inception)"], rows)]


def choice_table(scores, digits=3, paper=None, beam=None):
    rows = []
    for key, r in scores.items():
        c = r["all"]
        rows.append([name_of(key), f"{c['mean']:.{digits}f}", f"{c['chosen']:.{digits}f}", f"{c['oracle']:.{digits}f}",
                     with_interval(c, digits), *(with_interval(r[d], digits) for d in DOMAINS),
                     *([paper.get(key, "")] if paper else [])])
    if beam:
        rows.append(["*no choice:* beam search (3)", rows[0][1], f"{value(beam['all']):.{digits}f}", "",
                     *(with_interval(beam[d]["gain"], digits) for d in ("all", *DOMAINS)), *[""] * bool(paper)])
    return markdown(["ranked by", "mean", "chosen", "oracle", "gain [95 %]", "in", "near", "out",
                     *(["the paper's"] if paper else [])], rows)


def text_samplers(found):
    def row(name, r):
        return [name, f"{r['clip']['mean']:.1f}", f"{r['clip']['oracle']:.1f}",
                *(with_interval(r[k]) for k in ("clip", "dino", "pixel", "denoise", "clipscore", "likelihood"))]
    head = ["mean", "oracle", "CLIP", "DINO", "pixels", "denoise", "*no cycle:* CLIP(picture, caption)",
            "*no cycle:* likelihood"]
    ways = [row(f"{k} ({r['different']:.1f} different of ten)", r) for k, r in found["ways"].items()]
    items = found["ways"]["top-p"]["clip"]["items"]
    return [f"Drawn in 8 steps of DPM-Solver++; CIDEr gained on {items} pictures, where beam search (3) has "
            f"{plain(found['beam'])}.", "",
            markdown(["ten captions by", *head], ways), "",
            markdown(["N (top-p)", *head], [row(k, r) for k, r in found["N"].items()]), "",
            "Differences of what was chosen, of the same pictures:", "",
            markdown(["CIDEr", *head[2:]], [
                [k, *(with_interval(x[q]) for q in ("clip", "dino", "pixel", "denoise", "clipscore", "likelihood"))]
                for k, x in found["differences"].items()])]


def text_cost(found):
    """Cost of a step as a multiple of the two separate ones."""
    apart = found["step"]["tg and ig, apart"]
    rows = [[name, *(f"{r[k]:.{n}f} ({r[k] / apart[k]:.2f} x)" for k, n in (("s", 3), ("GFLOP", 1), ("MiB", 0)))]
            for name, r in found["step"].items()]
    return [markdown(["a step of 8 pictures, forward and backward", "seconds", "GFLOP", "MiB"], rows), "",
            "In brackets: as a multiple of tg and ig, which is what training the two models apart costs. The paper "
            "says \"approximately 1.4 times the original cost\" (Section 5), and not what is counted."]


def text_real(found):
    """What full-size models cost on a GPU; rows that did not fit it are not there."""
    steps = found["real"]
    apart = steps["vitb --losses tg"]["s"] + steps["vitb --losses ig"]["s"]
    rows = [[f"`{name}`", *(f"{r[k]:.{n}f}" for k, n in (("s", 2), ("GiB", 1), ("GiB reserved", 1))),
             f"{r['s'] / apart:.1f}"] for name, r in steps.items()]
    hours = 5 * (113_287 // 8) * steps["vitb"]["s"] / 3600 if "vitb" in steps else math.nan
    return [markdown(["`finetune.py --captioner`", "seconds a step", "GiB", "GiB reserved", "x (tg + ig)"], rows), "",
            "Stable Diffusion v1-4 at 512 px with BLIP ViT-B, ViT-L and BLIP-2 (OPT 2.7b, 384 px): random weights in "
            "the hub's layout, the miniature's pictures (enlarged), captions and tokenizers, batches of 8, the fastest "
            "of six steps. GiB: the most that tensors took; reserved: with what the allocator held as well; x (tg + "
            "ig): time as a multiple of `vitb --losses tg` and `vitb --losses ig`. Five epochs of COCO (113,287 "
            f"pictures) would take `vitb` {hours:.0f} hours.", "",
            markdown(["a picture's ten captions", "seconds"], [
                [k.removeprefix("ten captions: "), f"{v['s']:.2f}"] for k, v in found["frozen"].items()])]


COMMANDS = {"real": "python bench.py real --json results/real.json"}                     # of sections not of results.py
SECTIONS = {"check": "Is the miniature good enough to mean something?", "scores": "What the miniature says and draws",
            "findings": "Do they understand each other? Captions",
            "texts": "Do they understand each other? Pictures", "pictures": "Which picture, in few steps?",
            "samplers": "Does it hang on how captions are sampled?",
            "scorers": "Which caption, at what price?", "val": "Which timesteps?", "words": "Which word is wrong?",
            "signal": "What is there to learn from?", "joint": "Can they teach each other?",
            "variants": "What does the teaching hang on?", "cost": "What does a joint step cost?",
            "real": "What do the real models cost?"}


def claims(found):
    """{what the README claims: its mean and 95 % interval} of {section: JSON}; none of these intervals has a zero."""
    out = {}
    if "scorers" in found:
        rows, ahead = found["scorers"]["scorers"], found["scorers"]["differences"]
        out |= {f"{name_of(k)}: CIDEr gained by the choice": rows[k]["all"]
                for k in ("clip", "dino", "pixel", "few", "denoise", "denoise 1", "halved 60", "clipscore")}
        out |= {f"{name_of(k)} - beam search, out": rows[k]["out"]["over_beam"] for k in ("clip", "denoise")}
        out |= {" - ".join(map(name_of, k.split(" minus "))): ahead[k]["all"]
                for k in ("denoise minus clip", "denoise minus clipscore", "clipscore minus clip") if k in ahead}
    if "pictures" in found:
        table = found["pictures"]["table"]
        out |= {f"{name_of(k)}, of drawings in 8 steps: {q} gained by the choice": table[q][k]["all"]
                for q in table for k in ("clip", "clipscore")}
        out["CLIP(picture, caption) - full cycle, CLIP, of drawings in 8 steps"] = found["pictures"]["differences"][
            "clipscore minus clip"]
    if "texts" in found:
        table = found["texts"]["table"]
        out |= {f"{name_of(k)}, of drawings in full: {q} gained by the choice": table[q][k]["all"]
                for q, k in (("CLIP", "clipscore"), ("facts", "denoised"), ("facts", "denoised less"))}
        out["CLIP(picture, caption) - full cycle, CLIP, of drawings in full"] = found["texts"]["differences"][
            "clipscore minus clip"]
    if "joint" in found:
        rows = found["joint"]["rows"]
        out |= {f"{k}, CIDEr minus none": rows[k]["all"]["CIDEr minus none"] for k in ("tg", "all four", "ir")
                if k in rows}
        rows = rows["own words: tg + ir"]
        out |= {f"own words: tg + ir, {k} {other}, {d}": rows[d][f"{k} {other}"] for d in ("all", "out")
                for k in ("CIDEr", "facts") for other in ("minus none", "minus alone")}
    if "variants" in found:
        rows = found["variants"]["rows"]["own words, kv trained"]
        out |= {f"own words, kv trained, CIDEr minus known pairs: tg, kv trained, {d}": rows[d]["CIDEr minus alone"]
                for d in ("all", "out")}
        out |= {f"own words, kv trained, {k} minus own words: tg + ir, out": rows["out"][f"{k} minus queries"]
                for k in ("CIDEr", "facts")}
    return out


def signs(folder):
    """The claims of the full run beside those of a smaller one in `folder`."""
    full, small = (claims({k: json.loads((f / f"{k}.json").read_text()) for k in SECTIONS
                           if (f / f"{k}.json").exists()}) for f in (HERE / "results", folder))
    rows = [[k, *(with_interval(x[k], 3 if "facts" in k or "drawings" in k else 1) for x in (full, small)),
             "yes" if value(full[k]) * value(small[k]) > 0 else "**no**" if min(interval(small[k])) * max(
                 interval(small[k])) > 0 else "no: too few to tell"] for k in full if k in small]
    same = sum(r[-1] == "yes" for r in rows)
    return ["", "## Has it the signs of the full run?", "", f"{same} of {len(rows)} of what the README claims"
            + f"; {len(full) - len(rows)} more were not measured here" * (len(full) > len(rows))
            + ". `SIZES` in results.py says what is counted, and in how many steps.", "",
            markdown(["claim", "full run", "this run", "same sign"], rows)]


def write(folder):
    """(RESULTS.md, {section: its lines}) of a folder of JSON files."""
    own = folder.resolve() == HERE / "results"
    folded, files = ("", "results/") if own else (f" --folder {folder}", "")
    out = ["# Results", "", f"Written by `python report.py{folded}` from `{files}*.json`; no number is typed by hand. "
           "All of it but \"What do the real models cost?\" is measured on the miniature (README): it says something "
           "of the method, nothing of BLIP or Stable Diffusion."]
    out += [] if own else signs(folder)
    parts = {}
    for name, title in SECTIONS.items():
        if (folder / f"{name}.json").exists():
            found = json.loads((folder / f"{name}.json").read_text())
            about, figure = found["about"], [
                x for file, (section, f) in FIGURES.items()
                if section == name and (file != "taught" or found.get("shown")) for x in (
                    f"![{(f.__doc__ or title).strip()}]({files}{file}.png)", "")]
            parts[name] = globals()[f"text_{name}"](found)
            size = about.get("size", "full")
            command = f"python results.py {name}" + f" --size {size}" * (size != "full")
            command += f" --dtype {about['dtype']}" if about["dtype"] != "float32" else ""
            command = COMMANDS.get(name, command)
            out += ["", f"## {title}", "", f"`{command}`; {about['machine']}, torch {about['torch']}, "
                    f"{about['dtype']}.", "", *figure, *parts[name]]
            out += ["", found["note"] + "."] if "note" in found else []
    return "\n".join(out) + "\n", parts


def readme(text, parts):
    """The README with each table between <!-- NAME --> and <!-- end --> replaced by the first of that section."""
    for name, lines in parts.items():
        table = next(x for x in lines if x.startswith("|"))
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: m[1] + t + "\n" + m[2], text,
                      flags=re.S)
    return text


def figure_scorers(found, plt):
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True, layout="constrained")
    for axis, domain in zip(axes, DOMAINS):
        family = [r for k, r in found["scorers"].items() if k.startswith("denoise ")]
        x, y = [r["evaluations"] for r in family], [r[domain]["gain"] for r in family]
        low, high = zip(*(r[domain]["interval"] for r in family))
        axis.fill_between(x, low, high, alpha=.2)
        axis.errorbar(x, y, [np.subtract(y, low), np.subtract(high, y)], marker="o", ms=3,
                      label=f"denoise, 1 to {family[-1]['evaluations'] / family[0]['evaluations']:.0f} noises")
        for k in ("clip", "dino", "few", "denoise", "halved 60"):
            r = found["scorers"][k]
            axis.errorbar(r["evaluations"], r[domain]["gain"], [[r[domain]["gain"] - r[domain]["interval"][0]],
                          [r[domain]["interval"][1] - r[domain]["gain"]]], marker="s", ms=4,
                          label=name_of(k).replace("`", ""))
        base = found["beam"][domain]["value"] - found["scorers"]["clip"][domain]["mean"]
        axis.axhline(base, color="grey", ls=":", label="beam search")
        axis.axhline(found["scorers"]["clipscore"][domain]["gain"], color="tan", ls="--",
                     label="CLIP(picture, caption)")
        few, all_of = family[0][domain]["items"], found["scorers"]["clip"][domain]["items"]
        axis.set(title=f"{domain}, {all_of} pictures" + f"; of the first {few}: few steps, budget, noises by number" * (
            few < all_of), xscale="log",
                 xlabel="UNet evaluations a picture")
    axes[0].set_ylabel("CIDEr gained by the choice")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=4)
    return figure


def figure_choice(found, plt):
    """Quality of the candidates by their rank under each score"""
    table = found["table"]
    figure, axes = plt.subplots(1, len(table), figsize=(4 * len(table), 3.6), layout="constrained")
    for axis, (quality, scores) in zip(axes, table.items()):
        for key, r in scores.items():
            axis.plot(range(1, 1 + len(r["all"]["by_rank"])), r["all"]["by_rank"], marker="o", ms=3,
                      label=name_of(key).replace("*", ""))
        axis.axhline(r["all"]["mean"], color="grey", ls=":", lw=1)
        axis.set(title=quality, xlabel="rank")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=4)
    return figure


def figure_joint(found, plt):
    names = [k for k in found["rows"] if k not in ("none", "ig", "known pairs: ig")]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    for axis, key in zip(axes, ("CIDEr", "facts")):
        for i, d in enumerate(DOMAINS):
            rows = [found["rows"][k][d][f"{key} minus none"] for k in names]
            axis.errorbar([r["value"] for r in rows], np.arange(len(rows)) + (i - 1) * .2,
                          xerr=[[r["value"] - r["low"] for r in rows], [r["high"] - r["value"] for r in rows]], fmt="o",
                          ms=4, label=d)
        axis.axvline(0, color="grey", lw=1)
        axis.set(title=f"{key}: trained - not trained", yticks=range(len(names)))
    axes[0].set_yticklabels(names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, loc="lower right")
    return figure


def figure_taught(found, plt):
    """Before and after joint training: the first out scenes whose caption it changed."""
    import base64
    import io

    import world
    shown = found["shown"]
    figure, axes = plt.subplots(max(1, len(shown)), 4, figsize=(11, 1.9 * max(1, len(shown))), squeeze=False,
                                width_ratios=(1, 2.6, 1, 1))
    for row, x in zip(axes, shown):
        drawings = [plt.imread(io.BytesIO(base64.b64decode(d))) for d in x["drawings"]]
        for axis, picture in zip((row[0], *row[2:]), (world.draw(world.sample(*x["scene"])), *drawings)):
            axis.imshow(picture)
        said = [f"{when}: {c}" for when, c in zip(("before", "after"), x["captions"])]
        lines = [*(f"{line}\n   {f:.0%} true" for line, f in zip(said, x["facts"])), f"human: {x['human']}"]
        row[1].text(0, .5, "\n".join(lines), va="center", fontsize=8, wrap=True)
        for axis in row:
            axis.axis("off")
    for axis, title in zip(axes[0], ("the picture", "its caption", "human caption drawn: before", "after")):
        axis.set_title(title, fontsize=8)
    return figure


# {file: (section, drawing)}
FIGURES = {"scorers": ("scorers", figure_scorers), "findings": ("findings", figure_choice),
           "texts": ("texts", figure_choice), "pictures": ("pictures", figure_choice),
           "joint": ("joint", figure_joint), "taught": ("joint", figure_taught)}


def draw(folder):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for name, (section, f) in FIGURES.items():
        found = json.loads((folder / f"{section}.json").read_text()) if (folder / f"{section}.json").exists() else None
        if found and (name != "taught" or found.get("shown")):
            figure = f(found, plt)
            if figure.get_layout_engine() is None:
                figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
            plt.close(figure)


def main(args):
    text, parts = write(args.folder)
    if not parts:
        raise ValueError(f"{args.folder} has no results: run python results.py, or make results")
    draw(args.folder)
    own = args.folder.resolve() == HERE / "results"
    page = HERE / "RESULTS.md" if own else args.folder / "RESULTS.md"
    page.write_text(text)
    if own:
        (HERE / "README.md").write_text(readme((HERE / "README.md").read_text(), parts))
    print(f"report.py: {page}, and figures in {args.folder}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        print(f"report.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
