"""RESULTS.md and its figures from lab/results/*.json: no number is typed by hand.

    python -m lab.report                                 # RESULTS.md, lab/results/*.png
    python -m lab.report --share .1                      # of a smaller run, into its folder

The words stand in lab/RESULTS.in.md. There `{{choice/rows/both/all/CIDEr|.1f}}` is a number, by
its path in the JSON and its format, and `{{table choice}}` a table of this file. `claims()` has
the numbers that README.md says, by lab/claims.json.
"""
import re
from pathlib import Path

import records
import script
from lab import figures, keep
from lab.keep import DOMAINS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ALL = ("all", *DOMAINS)
NAMES = {"clip": "full cycle, CLIP",
         "dino": "full cycle, DINO",
         "pixel": "full cycle, pixels",
         "sbert": "full cycle, SBERT",
         "cider": "full cycle, CIDEr",
         "few": "few steps (8), CLIP",
         "clipscore": "*no cycle:* CLIP(picture, caption)",
         "likelihood": "*no cycle:* log-likelihood",
         "per token": "log-likelihood per token",
         "both": "**both models** (`--by both`)",
         "beam": "*no choice:* beam search (3)",
         "a random one": "*no choice:* a random one (with the range of 95 in 100)",
         "denoise": "denoise, 12 noises (default)",
         "denoised": "denoise, 12 noises",
         "denoised less": "denoise, 12 noises, less the empty caption"}
# Rows of the committed JSON that are not shown: commit e6b6cf2 has their code, closed.json a word.
CLOSED = ("own words, word bridge (straight through)", "own words, temperature 0.5",
          "ig + tr, tr where t < 600")
STEPS = 5 * (113_287 // 8)                       # of COCO in five epochs, batches of 8
# how much slower than an H200 an A10 is, by their maker: bfloat16 TFLOP/s, TB/s of memory
A10 = {"multiply": 989 / 125, "move": 4.8 / 0.6}
# The paper's own numbers, beside ours, never blended: NoCaps; BLIP ViT-B, Stable Diffusion v1-4.
PAPER = {"Finding I": "Table 1: 74.1 -> 80.3, +6.2 (in +2.2, near +5.9, out +10.1)",
         "Finding II": "Table 2: CLIP distance 40.54 -> 33.47, FID 32.37 -> 29.59",
         "CIDEr": {"none": "Table 3: 109.7 (in 111.8, near 108.6, out 111.5)",
                   "tg": "Table 5, w/o IR: 109.7", "ir": "Table 5, w/o TG: 102.3",
                   "all four": "Table 3: 111.8 (in 114.9, near 110.8, out 112.9)"},
         "CLIP": {"none": "Table 4: .4039", "ig": "Table 4: .4077", "all four": "Table 4: .3978"}}


def flags(argv=None):
    p = script.Parser(__doc__)
    p.add_argument("--share", type=float, default=1.0, help="of the run; 1: as committed")
    p.add_argument("--folder", type=Path, help="of the JSON files; default the run's")
    args = p.parse_args(argv)
    args.folder = args.folder or keep.results_of(args.share)
    return args


# ---------------------------------------------------------------- numbers as text
def read(folder):
    """{part: its JSON} of a folder; beside them the few numbers that come of two others."""
    found = {path.stem: records.load_json(path) for path in sorted(Path(folder).glob("*.json"))}
    if "cost" in found:
        steps = found["cost"]["step"]
        apart = steps["tg and ig, apart"]
        for row in steps.values():
            row["times"] = {k: row[k] / apart[k] for k in ("s", "GFLOP", "MiB")}
    if "real" in found:
        steps = found["real"]["real"]
        apart = steps["vitb --losses tg"]["s"] + steps["vitb --losses ig"]["s"]
        for row in steps.values():
            row["times"] = row["s"] / apart
        found["real"]["hours"] = STEPS * steps["vitb"]["s"] / 3600
    if "kernels" in found:
        measured = found["kernels"]["kernels"]["vitb"]
        seconds = sum(measured[kind] * slower for kind, slower in A10.items())
        found["kernels"] |= {"A10": seconds, "A10 days": STEPS * seconds / 86_400}
    if "val" in found:                                     # the best that was tried
        found["val"]["best"] = max(found["val"]["rows"], key=lambda row: row["minus even"]["value"])
    if "norms" in found.get("joint", ()):
        first = found["joint"]["norms"]["all four"]
        ratio = first["norm_ir"]["captioner"] / first["norm_tg"]["captioner"]
        found["joint"]["ir by tg"] = ratio
    return found


def at(x, path):
    """What lies at a path of nested JSON; None where there is nothing."""
    for key in filter(None, path.split("/")):
        x = x.get(key) if isinstance(x, dict) else None
    return x


def text(x, form):
    """A number, a list of numbers, or a mean with its 95 % interval, as text; "" of None."""
    if x is None or isinstance(x, str):
        return x or ""
    if isinstance(x, list):
        return " / ".join(format(v, form) for v in x)
    if not isinstance(x, dict):
        return format(x, form)
    if "interval" in x:
        middle, (low, high) = x["gain"], x["interval"]
    else:
        middle, low, high = x["value"], x["low"], x["high"]
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def filled(mark, found):
    """What `{{mark}}` stands for."""
    if mark.startswith("table "):
        return "\n".join(table_of(mark.removeprefix("table "), found))
    path, _, form = mark.partition("|")
    x = at(found, path)
    if x is None and not path.endswith("/note"):
        raise ValueError(f"there is no {path} in the JSON files")
    return text(x, form)


def claims():
    """{name: text} of what README.md says of the committed results, by lab/claims.json."""
    found = read(RESULTS)
    marks = records.load_json(HERE / "claims.json")
    return {name: filled(mark, found) for name, mark in marks.items()}


def title(key):
    """A row's name as it is printed."""
    return " - ".join(NAMES.get(part, part) for part in key.split(" minus "))


def table(corner, rows, columns):
    """Lines of {name: JSON}: a column for each {title: (path, form)}, empty where nothing is."""
    lines = [[corner, *columns], ["---"] * (1 + len(columns))]
    for name, row in rows.items():
        if not name.startswith(CLOSED):
            cells = [text(at(row, path), form) for path, form in columns.values()]
            lines.append([title(name), *cells])
    return ["| " + " | ".join(line) + " |" for line in lines]


# ---------------------------------------------------------------- tables
def table_of(name, found):
    """The lines of `{{table NAME}}`."""
    if name == "check":
        return check(found["check"]["figures"])
    if name == "scores":
        return scores(found["scores"])
    if name == "findings":
        return findings(found["findings"])
    if name == "choice":
        return choice(found["choice"]["rows"])
    if name == "choice differences":
        columns = {f"{key}, {domain}": (f"{domain}/{key}", form) for key, form in
                   (("CIDEr", "+.1f"), ("facts", "+.3f")) for domain in ALL}
        return table("difference", found["choice"]["differences"], columns)
    if name.startswith("val "):
        return tried(found["choice_val"][name.removeprefix("val ")])
    if name in ("pictures", "texts"):
        return drawings(found[name])
    if name == "words":
        planted = found["words"]["planted"]
        return table("planted", {"is the lowest": planted}, {k: (k, ".3f") for k in planted})
    if name == "signal":
        return signal(found["signal"]["rows"])
    if name in ("captioner joint", "captioner variants"):
        return captioner(found[name.removeprefix("captioner ")])
    if name in ("generator joint", "generator variants"):
        return generator(found[name.removeprefix("generator ")])
    if name == "cost":
        return table("a step of 8 pictures, forward and backward", found["cost"]["step"], {
            "seconds": ("s", ".3f"), "seconds, x apart": ("times/s", ".2f"),
            "GFLOP": ("GFLOP", ".1f"), "GFLOP, x apart": ("times/GFLOP", ".2f"),
            "MiB": ("MiB", ".0f"), "MiB, x apart": ("times/MiB", ".2f")})
    if name == "real":
        return table("`finetune.py --captioner`", found["real"]["real"], {
            "seconds a step": ("s", ".2f"), "GiB": ("GiB", ".1f"),
            "GiB reserved": ("GiB reserved", ".1f"), "x (tg + ig)": ("times", ".1f")})
    if name == "frozen":
        frozen = found["real"]["frozen"]
        columns = {k.removeprefix("ten captions: "): (f"{k}/s", ".2f") for k in frozen}
        return table("ten captions of a picture", {"seconds": frozen}, columns)
    raise ValueError(f"RESULTS.in.md: there is no table {name}")


def check(figures):
    bars = {name: x for name, x in figures.items() if x["bar"] is not None}
    return table("on scenes nothing was trained on", bars, {
        "measured": ("", ".3f"), "n": ("n", "d"), "the bar: at least": ("bar", "g")})


def scores(found):
    rows = {d: {"captions": found["captions"][d], "images": found["images"][d]} for d in DOMAINS}
    return table("captions by 3 beams", rows, {
        "n": ("captions/n", "d"), "CIDEr": ("captions/CIDEr", ".1f"),
        "BLEU-4": ("captions/B@4", ".1f"), "SBERT": ("captions/SBERT", ".3f"),
        "pictures: CLIP": ("images/CLIP", ".3f"), "DINO": ("images/DINO", ".3f")})


def by_score(qualities):
    """{score: {quality: what choosing by it is worth}} of {quality: {score: ...}}."""
    rows = {}
    for quality, scores in qualities.items():
        for name, x in scores.items():
            rows.setdefault(name, {})[quality] = x
    return rows


def findings(found):
    rows = by_score(found["table"])
    rows["clip"]["paper"] = PAPER["Finding I"]
    rows["beam"] = {}
    for quality, x in found["beam"].items():
        rows["beam"][quality] = {domain: x[domain]["gain"] for domain in ALL}
    rows["beam"]["CIDEr"]["all"]["chosen"] = found["beam"]["CIDEr"]["all"]["value"]
    return table("ranked by", rows, {
        "CIDEr": ("CIDEr/all/chosen", ".1f"), "gain": ("CIDEr/all", "+.1f"),
        "gain, in": ("CIDEr/in", "+.1f"), "near": ("CIDEr/near", "+.1f"),
        "out": ("CIDEr/out", "+.1f"), "gain in facts": ("facts/all", "+.3f"),
        "in CLIP": ("CLIP/all", "+.3f"), "in SBERT": ("SBERT/all", "+.3f"),
        "the paper's CIDEr": ("paper", "")})


def drawings(found):
    rows = by_score(found["table"])
    rows["clip"]["paper"] = PAPER["Finding II"]
    for name, x in found["sets"].items():
        rows[name] = rows.get(name, {}) | x
    return table("ranked by", rows, {
        "CLIP": ("CLIP/all/chosen", ".3f"), "gain": ("CLIP/all", "+.3f"),
        "gain, in": ("CLIP/in", "+.3f"), "near": ("CLIP/near", "+.3f"),
        "out": ("CLIP/out", "+.3f"), "gain in DINO": ("DINO/all", "+.3f"),
        "in facts": ("facts/all", "+.3f"), "FD-DINO": ("FD-DINO", ".4f"), "IS": ("IS", ".2f"),
        "the paper's": ("paper", "")})


def choice(rows):
    """Scores by what they take, and what they choose minus beam search."""
    return table("chosen by", rows, {
        "UNet evaluations": ("evaluations", ",.0f"), "seconds": ("seconds", ".2f"),
        "n": ("all/CIDEr/n", "d"), "CIDEr": ("all/CIDEr", ".1f"),
        "CIDEr - beam": ("all/CIDEr minus beam", "+.1f"), "in": ("in/CIDEr minus beam", "+.1f"),
        "near": ("near/CIDEr minus beam", "+.1f"), "out": ("out/CIDEr minus beam", "+.1f"),
        "facts - beam": ("all/facts minus beam", "+.3f"),
        "CLIP - beam": ("all/CLIP minus beam", "+.3f"),
        "SBERT - beam": ("all/SBERT minus beam", "+.3f")})


def tried(rows):
    """What was tried on val: quality, and minus the strongest beam search."""
    for row in rows.values():
        row["by domain"] = [row[domain]["CIDEr minus beam"]["value"] for domain in DOMAINS]
    return table("on val", rows, {
        "CIDEr": ("all/CIDEr/value", ".1f"), "CIDEr - beam": ("all/CIDEr minus beam", "+.1f"),
        "in / near / out": ("by domain", "+.1f"), "true facts": ("all/facts/value", ".3f")})


def signal(rows):
    bins = {f"{row['timesteps'][0]} to {row['timesteps'][1]}": row for row in rows}
    return table("timestep", bins, {
        "denoising loss, wrong caption - right": ("gap", "+.4f"),
        "share of noises that tell": ("found_out", ".2f"),
        "caption loss of the one-step estimate": ("tr", ".3f")})


def compared(row, name, alone):
    """A row's measures without differences that say nothing: to itself, to no other row."""
    if name == "none":
        row = {measure: x for measure, x in row.items() if " minus " not in measure}
    elif not alone:
        row = {measure: x for measure, x in row.items() if "minus alone" not in measure}
    return row | {"alone": alone}


def captioner(found):
    rows = {}
    for name, row in found["rows"].items():
        if not name.endswith("ig"):                        # ig trains the generator alone
            alone = found["alone"].get(name, [""])[0]
            rows[name] = compared(row["all"], name, alone) | {"paper": PAPER["CIDEr"].get(name)}
            for measure in ("CIDEr", "facts"):
                each = [row[domain][f"{measure} minus none"]["value"] for domain in DOMAINS]
                rows[name][f"{measure} by domain"] = each if name != "none" else None
    return table("the captioner, trained by", rows, {
        "CIDEr": ("CIDEr", ".1f"), "by seed": ("CIDEr/seeds", ".1f"),
        "CIDEr - none": ("CIDEr minus none", "+.1f"),
        "CIDEr - none, in / near / out": ("CIDEr by domain", "+.1f"),
        "true facts": ("facts", ".3f"), "facts - none": ("facts minus none", "+.3f"),
        "facts - none, in / near / out": ("facts by domain", "+.3f"),
        "CIDEr - alone": ("CIDEr minus alone", "+.1f"),
        "facts - alone": ("facts minus alone", "+.3f"), "alone:": ("alone", ""),
        "the paper's CIDEr": ("paper", "")})


def generator(found):
    rows = {}
    for name, row in found["rows"].items():
        if "pairs" in row["all"]:
            alone = found["alone"].get(name, ["", ""])[1]
            rows[name] = compared(row["all"], name, alone) | {"paper": PAPER["CLIP"].get(name)}
    return table("the generator, trained by", rows, {
        "drawings right": ("pairs", ".3f"), "drawings - none": ("pairs minus none", "+.3f"),
        "denoising loss": ("ig", ".4f"), "loss - none": ("ig minus none", "+.4f"),
        "drawings - alone": ("pairs minus alone", "+.3f"), "alone:": ("alone", ""),
        "the paper's CLIP distance": ("paper", "")})


# ---------------------------------------------------------------- the page
def page(folder):
    """RESULTS.md of a folder: the sections of lab/RESULTS.in.md whose parts are there."""
    found, sections = read(folder), []
    for section in (HERE / "RESULTS.in.md").read_text(encoding="utf-8").split("\n## "):
        parts = set(re.findall(r"{{(\w+)/", section))
        if parts <= found.keys():
            sections.append(re.sub(r"{{(.+?)}}", lambda mark: filled(mark[1], found), section))
    place = "](lab/results/" if folder.resolve() == RESULTS else "]("
    return "\n## ".join(sections).replace("](results/", place)


def main(args):
    found = read(args.folder)
    if not found:
        raise ValueError(f"{args.folder} has no results: run python -m lab.findings")
    own = args.folder.resolve() == RESULTS
    path = HERE.parent / "RESULTS.md" if own else args.folder / "RESULTS.md"
    records.write_text(path, page(args.folder))
    figures.draw(args.folder, found)
    print(f"report.py: {path}, and figures in {args.folder}")
    return 0


if __name__ == "__main__":
    script.run(main, flags)
