"""Tables, figures and the README's numbers from results/*.json: no number is typed by hand.

    python report.py                        # RESULTS.md, results/*.png, the marked tables of README.md
    python report.py --folder results/quick # of another folder: RESULTS.md beside it, the README is left alone
"""
import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
DOMAINS = ("in", "near", "out")
NAMES = {"clip": "full cycle, CLIP", "dino": "full cycle, DINO", "pixel": "full cycle, pixels",
         "few": "few steps (8), CLIP", "again": "full cycle, CLIP, another seed",
         "clipscore": "*no cycle:* CLIP(picture, caption)",
         "likelihood": "*no cycle:* log-likelihood", "halved 60": "denoise, `--budget 60`",
         "even 12": "denoise, 12 noises, even weights", "upper 12": "denoise, 12 noises, even weights, t > 300"}


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=HERE / "results", help="the folder of the JSON files")
    return p.parse_args(argv)


# ---------------------------------------------------------------- tables
def name_of(key):
    return NAMES.get(key) or (f"denoise, {key.split()[1]} noises" if key.startswith("denoise") else
                              key.replace("ranks: ", "sum of ranks: "))


def with_interval(x, digits=1, sign=True):
    """A mean and its 95 % interval: {value, low, high} of mean_of, or {gain, interval} of metrics.choices."""
    value, (low, high) = x.get("value", x.get("gain")), x.get("interval") or (x["low"], x["high"])
    s = "+" if sign else ""
    return f"{value:{s}.{digits}f} [{low:{s}.{digits}f}, {high:{s}.{digits}f}]"


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in [head, ["---"] * len(head), *rows])


def text_scorers(found):
    """The table of scorers: which to use where every picture costs."""
    first, rows = found["scorers"]["clip"]["all"], []
    for key, r in found["scorers"].items():
        c = r["all"]
        kept = "" if key == "clip" else f"{c['kept']:.2f} [{c['kept_interval'][0]:.2f}, {c['kept_interval'][1]:.2f}]"
        price = "-" if r["evaluations"] is None else f"{r['evaluations']:,.0f}"
        time = found.get("seconds", {}).get(key)
        rows.append([name_of(key), price, "" if time is None else f"{time:.2f}", f"{c['chosen']:.1f}",
                     with_interval(c), " / ".join(f"{r[d]['gain']:+.1f}" for d in DOMAINS), kept,
                     f"{r['same']['value']:.2f}", f"{r['tau']:+.2f}", with_interval(c["over_beam"])])
    lines = [markdown(["chosen by", "UNet evaluations", "s", "CIDEr", "gain [95 %]", "in / near / out",
                       "of the full gain", "same first choice", "tau", "minus beam search"], rows), "",
             f"Ten samples (top-p .9) of {first['items']:,} held-out pictures: CIDEr x 100 of a random one "
             f"{first['mean']:.1f}, of the best {first['oracle']:.1f}; beam search (3) "
             f"{found['beam']['all']['value']:.1f}. Agreement is with the full cycle by CLIP; `another seed` is its "
             f"ceiling, on {found['scorers']['again']['items']} pictures. Equal captions are scored once. s: "
             f"seconds a picture in float32, of {found.get('seconds', {}).get('items')} pictures one after the other."]
    both = [[name_of(k), with_interval(r["all"]["with_beams"], sign=False),
             with_interval(r["all"]["with_beams_over_beam"])]
            for k, r in found["scorers"].items() if "with_beams" in r["all"]]
    lines += ["", "With the three beams added to the ten:", "",
              markdown(["chosen by", "CIDEr", "minus beam search"], both)]
    val = {(tuple(r["span"]), r["weight"], r["draws"]): r for r in found["val"]["rows"]}
    best = sorted((k for k in val if k[2] == 64), key=lambda k: -val[k]["gain"])
    lines += ["", f"Span and weight of the (velocity) denoising loss, by the gain on {found['val']['items']} val "
              "pictures; the default is the first row. A part of the schedule holds fewer than 64 of the draws.", "",
              markdown(
                  ["timesteps", "weight", "up to 64 noises", "12 noises"],
                  [[f"{s[0]:g} to {s[1]:g}", w, with_interval(val[s, w, 64]), with_interval(val[s, w, 12])]
                   for s, w, _ in best])]
    lines += ["", "Subtracting the loss under the empty caption changes no order among the captions of one picture, by "
              "construction; for pictures of one text it does (Finding II above)."]
    return lines


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
    lines = [f"{found['steps']} steps of 8, {found['seeds']} seeds, learning rate {found['lr']:g}, weight of ir "
             f"{found['ir']} (both chosen on val), query projections, all pairs captioned (`--split all`). Scenes "
             "nothing was trained on; means over seeds, 95 % intervals over scenes. `alone`: for captions the row tg, "
             "for drawings the row ig; an interval that holds zero is no gain.", ""]
    for d in ("all", *DOMAINS):
        rows = []
        for name, r in found["rows"].items():
            own = [with_interval(r[d][k], n, False) for k, n in (("CIDEr", 1), ("facts", 3), ("pairs", 3))]
            less = [with_interval(r[d]["minus alone"][k], n) if "+" in name or "all" in name else ""
                    for k, n in (("CIDEr", 1), ("facts", 3), ("pairs", 3))]
            rows.append([name, *own, *less])
        lines += [f"**{d}** ({found['rows']['none'][d]['CIDEr']['n']} scenes)", "", markdown(
            ["losses", "CIDEr, 3 beams", "true facts", "drawings right", "CIDEr - alone", "facts - alone",
             "drawings - alone"], rows), ""]
    tried = ", ".join(f"{k.removeprefix('val-')} {v:.1f}" for k, v in found["val"].items())
    return [*lines, f"CIDEr on val, from which learning rate and weight were chosen: {tried}."]


def text_findings(found):
    lines = []
    for which, title in (("I", "Finding I: image -> text -> image"), ("II", "Finding II: text -> image -> text")):
        for quality, scores in found[which].items():
            rows, digits = [], 1 if quality == "CIDEr" else 3
            for key, r in scores.items():
                c = r["all"]
                rows.append([name_of(key), f"{c['mean']:.{digits}f}", f"{c['chosen']:.{digits}f}",
                             f"{c['oracle']:.{digits}f}", with_interval(c, digits),
                             *(with_interval(r[d], digits) for d in DOMAINS)])
            n = next(iter(scores.values()))["all"]["items"]
            lines += [f"**{title}, {quality}** ({n:,} items)", "", markdown(
                ["ranked by", "mean", "chosen", "oracle", "gain [95 %]", "in", "near", "out"], rows), ""]
    return lines


def text_cost(found):
    """Cost of a step as a multiple of the two separate ones."""
    apart = found["step"]["tg and ig alone"]
    rows = [[name, *(f"{r[k]:.{n}f} ({r[k] / apart[k]:.2f} x)" for k, n in (("s", 3), ("GFLOP", 1), ("MiB", 0)))]
            for name, r in found["step"].items()]
    return [markdown(["a step of 8 pictures, forward and backward", "seconds", "GFLOP", "MiB"], rows), "",
            "In brackets: as a multiple of tg and ig, which is what training the two models apart costs."]


SECTIONS = {"findings": "Do they understand each other?", "scorers": "Which caption, at what price?",
            "words": "Which word is wrong?", "signal": "What is there to learn from?",
            "joint": "Can they teach each other?", "cost": "What does a joint step cost?"}


def write(folder):
    """(RESULTS.md, {section: its lines}) of a folder of JSON files."""
    out = ["# Results", "", "Written by `python report.py` from `results/*.json`; no number is typed by hand. All "
           "of it is measured on the miniature (README): it says something of the method, nothing of BLIP or Stable "
           "Diffusion."]
    parts = {}
    for name, title in SECTIONS.items():
        if (folder / f"{name}.json").exists():
            found = json.loads((folder / f"{name}.json").read_text())
            about, figure = found["about"], [f"![{title}]({folder.name}/{name}.png)", ""] if name in FIGURES else []
            parts[name] = globals()[f"text_{name}"](found)
            out += ["", f"## {title}", "", f"`python results.py {name}`; {about['machine']}, torch {about['torch']}, "
                    f"{about['dtype']}.", "", *figure, *parts[name]]
    return "\n".join(out) + "\n", parts


def readme(text, parts):
    """The README with each table between <!-- NAME --> and <!-- end --> replaced by the first of that section."""
    for name, lines in parts.items():
        table = next(x for x in lines if x.startswith("|"))
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: m[1] + t + "\n" + m[2], text,
                      flags=re.S)
    return text


def figure_scorers(found, plt):
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axis, domain in zip(axes, DOMAINS):
        denoise = {k: r for k, r in found["scorers"].items() if k.startswith("denoise")}
        x, y = [r["evaluations"] for r in denoise.values()], [r[domain]["gain"] for r in denoise.values()]
        low, high = zip(*(r[domain]["interval"] for r in denoise.values()))
        axis.fill_between(x, low, high, alpha=.2)
        axis.plot(x, y, marker="o", ms=3, label="denoise, 1 to 64 noises")
        for k in ("clip", "dino", "few", "halved 60"):
            r = found["scorers"][k]
            axis.errorbar(r["evaluations"], r[domain]["gain"], [[r[domain]["gain"] - r[domain]["interval"][0]],
                          [r[domain]["interval"][1] - r[domain]["gain"]]], marker="s", ms=4, label=name_of(k))
        base = found["beam"][domain]["value"] - found["scorers"]["clip"][domain]["mean"]
        axis.axhline(base, color="grey", ls=":", label="beam search")
        axis.axhline(found["scorers"]["clipscore"][domain]["gain"], color="tan", ls="--",
                     label="CLIP(picture, caption)")
        axis.set(title=f"{domain}, n = {found['beam'][domain]['n']}", xscale="log", xlabel="UNet evaluations a picture")
    axes[0].set_ylabel("CIDEr gained by the choice")
    axes[0].legend(fontsize=7)
    return figure


def figure_findings(found, plt):
    panels = [(w, q) for w in ("I", "II") for q in found[w]]
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.4))
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (which, quality) in zip(axes.flat, panels):
        for key, r in found[which][quality].items():
            axis.plot(range(1, 1 + len(r["all"]["by_rank"])), r["all"]["by_rank"], marker="o", ms=3,
                      label=name_of(key).replace("*", ""))
        axis.axhline(r["all"]["mean"], color="grey", ls=":", lw=1)
        axis.set(title=f"{which}: {quality}", xlabel="rank")
    axes.flat[0].legend(fontsize=6)
    axes.flat[len(found["I"])].legend(fontsize=6)
    return figure


def figure_joint(found, plt):
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for axis, (key, title) in zip(axes, (("CIDEr", "CIDEr, 3 beams"), ("facts", "true facts"),
                                         ("pairs", "drawings right"))):
        for i, d in enumerate(DOMAINS):
            rows = [r[d][key] for r in found["rows"].values()]
            axis.errorbar(np.arange(len(rows)) + (i - 1) * .15, [r["value"] for r in rows],
                          [[r["value"] - r["low"] for r in rows], [r["high"] - r["value"] for r in rows]], fmt="o",
                          ms=3, label=d)
        axis.set(title=title, xticks=range(len(rows)))
        axis.set_xticklabels(list(found["rows"]), rotation=40, fontsize=7)
    axes[0].legend(fontsize=7)
    return figure


FIGURES = {"scorers": figure_scorers, "findings": figure_findings, "joint": figure_joint}


def draw(folder):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for name, f in FIGURES.items():
        if (folder / f"{name}.json").exists():
            figure = f(json.loads((folder / f"{name}.json").read_text()), plt)
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
            plt.close(figure)


def main(args):
    text, parts = write(args.folder)
    if not parts:
        raise ValueError(f"{args.folder} has no results: run python results.py, or make results")
    draw(args.folder)
    (args.folder.parent / "RESULTS.md").write_text(text)
    if args.folder.resolve() == HERE / "results":
        (HERE / "README.md").write_text(readme((HERE / "README.md").read_text(), parts))
    print(f"report.py: {args.folder.parent / 'RESULTS.md'}, and figures in {args.folder}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        print(f"report.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
