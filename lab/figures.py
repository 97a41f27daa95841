"""The figures of RESULTS.md and README.md, drawn by lab.report from the same JSON."""
import numpy as np

DOMAINS = ("in", "near", "out")
LABELS = {"clip": "full cycle, CLIP", "dino": "full cycle, DINO", "pixel": "full cycle, pixels",
          "sbert": "full cycle, SBERT", "cider": "full cycle, CIDEr", "few": "few steps (8), CLIP",
          "clipscore": "no cycle: CLIP(picture, caption)", "likelihood": "no cycle: log-likelihood",
          "denoise": "denoise (default)", "denoised": "denoise, 12 noises",
          "denoised less": "denoise, less the empty caption", "per token": "log p per token",
          "both": "both models"}


def draw(folder, found):
    """Writes a picture for each part of `found` ({part: its JSON}) that has one."""
    import matplotlib
    matplotlib.use("Agg")
    for part in ("findings", "pictures", "texts"):
        if part in found:
            save(by_rank(found[part]["table"]), folder / f"{part}.png")
    if "choice" in found:
        save(price(found["choice"]["rows"]), folder / "choice.png")
    if "joint" in found:
        save(trained(found["joint"]["rows"]), folder / "joint.png")


def save(figure, path):
    import matplotlib.pyplot as plt
    figure.savefig(path, dpi=90, metadata={"Software": None})      # no version: equal files
    plt.close(figure)


def panels(rows, columns, size, **options):
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def by_rank(table):
    """Quality of the candidates by their rank under each score (the paper's Figures 3 and 4)."""
    figure, axes = panels(1, len(table), (4 * len(table), 3.6))
    for axis, (quality, scores) in zip(axes, table.items()):
        for key, row in scores.items():
            by_rank = row["all"]["by_rank"]
            axis.plot(range(1, 1 + len(by_rank)), by_rank, marker="o", ms=3, label=LABELS[key])
        axis.axhline(row["all"]["mean"], color="grey", ls=":", lw=1)
        axis.set(title=quality, xlabel="rank")
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, fontsize=7, loc="outside lower center", ncols=4)
    return figure


def price(rows):
    """CIDEr of the choice minus beam search's, over the UNet evaluations it costs, by domain."""
    figure, axes = panels(1, 3, (12, 4.2), sharey=True)
    for axis, domain in zip(axes, DOMAINS):
        for key in ("per token", "clipscore", "denoise", "both", "few", "clip"):
            x = rows[key][domain]["CIDEr minus beam"]
            ends = [[x["value"] - x["low"]], [x["high"] - x["value"]]]
            axis.errorbar(rows[key]["evaluations"], x["value"], ends, marker="o", ms=5,
                          capsize=3, label=LABELS[key])
        axis.axhline(0, color="grey", ls=":", label="the strongest beam search")
        axis.set(title=domain, xlabel="UNet evaluations a picture")
        axis.set_xscale("symlog", linthresh=100)
    axes[0].set_ylabel("CIDEr minus the strongest beam search")
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, fontsize=7, loc="outside lower center", ncols=4)
    return figure


def trained(rows):
    """What each row of joint training does to the captioner, minus none, by domain."""
    names = [key for key in rows if key != "none" and not key.endswith("ig")]
    figure, axes = panels(1, 2, (12, 4.4), sharey=True)
    for axis, measure in zip(axes, ("CIDEr", "facts")):
        for i, domain in enumerate(DOMAINS):
            place = np.arange(len(names)) + .2 * (i - 1)
            found = [rows[key][domain][f"{measure} minus none"] for key in names]
            value = np.array([x["value"] for x in found])
            low = np.array([x["low"] for x in found])
            high = np.array([x["high"] for x in found])
            axis.errorbar(value, place, xerr=[value - low, high - value], fmt="o", ms=4,
                          label=domain)
        axis.axvline(0, color="grey", lw=1)
        axis.set(title=f"{measure}: trained - not trained", yticks=range(len(names)))
    axes[0].set_yticklabels(names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, loc="lower right")
    return figure
