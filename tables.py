"""The rows of the paper's tables: scores of captions and of pictures, by domain.

    notes = []                                                     # what can't be had, and why
    rows = of_captions(items, a, "hub", "cuda", notes)             # Table 3
    rows = compared(items, a, b, "hub", "cuda", notes)             # b - a, by metric and domain
    rows = of_pictures(items, files, "hub", "cuda", notes)         # Table 4
    print(text("captions", rows, CAPTIONS))

Items are data.Items: captions (the references), path (of the picture), domain. rows is {domain: {n:
items, score: value, or {value, low, high} with ci, or None where it can't be had}}. Copy this file
with annotations.py, best_of_n.py, cycle.py, data.py, judges.py, loading.py, losses.py, metrics.py,
pictures.py and records.py.
"""
import functools
import math
import re
from itertools import chain

import numpy as np

import data
import judges
import metrics
import records
from best_of_n import FEW, IMAGE, groups_in, rankings

CAPTIONS = ("B@1", "B@2", "B@3", "B@4", "CIDEr", "SPICE", "WMD", "CLIP", "SBERT")
WITH_PICTURES = ("CLIPScore", "RefCLIPScore")
CHOICE = ("mean", "chosen", "oracle", "gain", "percent")
GAINS = {"b - a", "gain"}                                       # printed with their sign
PICTURES = ("CLIP", "DINO", "FID", "IS", "FD-DINO")
HUNDRED = {"B@1", "B@2", "B@3", "B@4", "CIDEr", "SPICE"}        # papers print these x 100
OF_SETS = {"FID", "IS", "FD-DINO"}                              # of two pictures or more
DOMAIN = {"in-domain": "in", "near-domain": "near", "out-domain": "out", None: "all"}


def of_captions(items, captions, place, device, notes, glove=None, ci=False, pictures=False):
    """Rows of CAPTIONS of a caption of each item; pictures: and of WITH_PICTURES. CIDEr's document
    frequency is of all items, a domain's CIDEr the mean of its items, its BLEU computed anew."""
    scores = caption_scores(items, captions, place, device, notes, glove, pictures)
    names = CAPTIONS + WITH_PICTURES if pictures else CAPTIONS
    return rows_of(items, scores, names, ci)


def compared(items, a, b, place, device, notes, glove=None, pictures=False):
    """Two systems' captions of each item: {"metric, domain": metrics.paired of them}."""
    both = [*a, *b]                                             # one after the other: (2 N,)
    scores = caption_scores(items, both, place, device, notes, glove, pictures)
    out = {}
    for name, values in scores.items():
        one, other = np.split(values, 2)
        statistic = functools.partial(score_of, name)
        for domain, rows in by_domain(items).items():
            row = metrics.paired(one[rows], other[rows], statistic)
            if row:
                out[f"{name}, {domain}"] = row
    return out


def caption_scores(items, captions, place, device, notes, glove, pictures):
    """{metric: values (n, ...)}, for score_of, of a caption of each item, or of two systems'."""
    df = metrics.document_frequency([x.captions for x in items])
    if len(items) == 1:
        notes.append("CIDEr of one image alone is 0, whatever is said: no word is rarer there")
    items = [*items] * (len(captions) // len(items))
    references = [x.captions for x in items]
    scores = dict.fromkeys(CAPTIONS[:4], metrics.bleu_counts(captions, references))
    scores["CIDEr"] = metrics.cider(captions, references, df)
    try:
        scores["SPICE"] = metrics.spice(captions, references)
    except metrics.Unavailable as e:
        notes.append(f"no SPICE: {e}")
    found = load_judges(("clip", "sbert"), "text", place, device, notes)
    scores |= likenesses(captions, references, found, notes, glove)
    if "WMD" in scores:
        scores["WMD"] = -scores["WMD"]                          # papers print the distance
    if pictures and "CLIP" in found:
        scores |= clipscores(items, captions, found["CLIP"], notes)
    for name in ("SPICE", "WMD", *WITH_PICTURES):
        without = np.isnan(scores.get(name, 0)).sum()
        if without:
            notes.append(f"{name} is the mean of {len(captions) - without} of {len(captions)} "
                         "captions: the others have none")
    return scores


def clipscores(items, captions, judge, notes):
    """{CLIPScore, RefCLIPScore: (n,)} of n captions of items; nan where a picture can't be read."""
    found = np.full((len(items), 2), np.nan)
    for i, (item, caption) in enumerate(zip(items, captions)):
        try:
            image = data.open_image(item.path)[None]
        except ValueError as e:
            notes.append(f"skipped {e}")
            continue
        found[i] = judge.clipscore(image, caption, item.captions)
    return dict(zip(WITH_PICTURES, found.T))


def of_pictures(items, files, place, device, notes, inception=None, ci=False):
    """Rows of PICTURES of a picture of each item. Items that have a picture which can't be read are
    left out; raises ValueError where none is left."""
    found = load_judges(("clip", "dino"), "image", place, device, notes)
    encoders = {name: judge.embed for name, judge in found.items()}
    try:
        see = judges.inception_features(device, inception)
        encoders["inception"] = lambda image: np.hstack(see(image))     # 2048 features, 1008 logits
    except ValueError as e:
        notes.append(f"no FID, no IS: {e}")
    vectors = {name: [] for name in encoders}
    read = []
    for item, file in zip(items, files):
        try:
            drawn = data.open_image(file)[None]                         # (1, 3, H, W)
            real = data.open_image(item.path)[None]
        except ValueError as e:
            notes.append(f"skipped {e}")
            continue
        read.append(item)
        for name, encode in encoders.items():
            vectors[name].append(np.concatenate([encode(drawn), encode(real)]))
    if not read:
        raise ValueError(f"none of the {len(items)} pictures can be read")
    pairs = {name: np.stack(rows) for name, rows in vectors.items()}    # (n, 2, D)
    scores = {name: pairs[name].prod(1).sum(1) for name in found}       # (n,) cosines
    if "DINO" in found:
        scores["FD-DINO"] = pairs["DINO"]
    if "inception" in pairs:
        scores["FID"] = pairs["inception"][:, :, :2048]
        scores["IS"] = pairs["inception"][:, 0, 2048:]                  # of what was drawn
    if ci:
        notes.append("the intervals of FID and FD-DINO are of resampled pictures, whose repeats "
                     "raise both: read their width, not their place")
    return rows_of(read, scores, PICTURES, ci)


# ---------------------------------------------------------------- likeness
def load_judges(names, kind, place, device, notes):
    """{NAME: judge}; what is missing is noted. place: of judges.load."""
    found, missing = judges.load(names, kind, place, device)
    notes += [f"no {name.upper()}: {reason}" for name, reason in missing.items()]
    return {name.upper(): judge for name, judge in found.items()}


def likenesses(captions, references, found, notes, glove=None):
    """How alike n captions are to their references, on the mean: {"CLIP", "SBERT", "WMD": (n,)},
    higher is more alike, nan where no word of it has a vector. found: of load_judges."""
    out = {}
    for name, judge in found.items():
        each = [judge.alike([c] * len(r), r).mean() for c, r in zip(captions, references)]
        out[name] = np.array(each)
    if not glove:
        notes.append("no WMD: it needs word vectors; give --glove glove.6B.200d.txt")
        return out
    sizes = [len(r) for r in references]                # all at once: the vectors are read once
    repeated = np.repeat(captions, sizes)
    distances = metrics.movers(glove, repeated, list(chain(*references)))
    each = np.split(distances, np.cumsum(sizes)[:-1])
    out["WMD"] = np.array([score_of("WMD", values) for values in each])
    return out


def picture_likenesses(files, items, place, device, notes):
    """How alike n pictures are to those of n items: {"CLIP", "DINO": (n,)}, higher: more alike."""
    found = load_judges(("clip", "dino"), "image", place, device, notes)
    out = {name: [] for name in found}
    for file, item in zip(files, items):
        drawn = data.open_image(file)[None]
        real = data.open_image(item.path)[None]
        for name, judge in found.items():
            out[name] += judge.alike(drawn, real).tolist()
    return {name: np.array(values) for name, values in out.items()}


# ---------------------------------------------------------------- Tables 1 and 2, Figures 3 and 4
def made_of(folder, root, split, place):
    """(set, split, judges, items) of a rerank's folder, by its settings.json, or as given;
    ValueError where it was made of no set, or of another one than the given."""
    if not (folder / "candidates.jsonl").exists():
        raise ValueError(f"{folder} has no candidates.jsonl: run rerank.py --out {folder} first, "
                         "with --data")
    path = folder / "settings.json"
    settings = records.load_json(path)
    name = records.the(settings, "data", str, path, "None")
    part = settings.get("split")
    if name == "None":
        raise ValueError(f"{folder} holds a rerank of pictures or sentences by themselves: they "
                         "have no references")
    root, split = root or name, split or (None if part == "None" else part)
    items = data.read(root, split)
    if settings.get("content") != data.content_of(items):
        raise ValueError(f"{folder} was made of {name}, split {part}; {root}, split {split}, has "
                         "other names or captions: give --data and --split of that set")
    return root, split, place or settings.get("judges", "none"), items


def findings(folder, items, place, device, notes, glove=None):
    """What choosing among a rerank's candidates by each score is worth in each metric, by domain:
    {"metric by score": {domain: row}}, and their direction. items: of the set it was made of."""
    found = groups_in(folder)
    chosen = [x for x in items if x.captions and complete(found.get(x.name))]
    lost = len(found) - len(chosen)
    if lost:
        notes.append(f"{lost} of {len(found)} items are left out: they have no references, too few "
                     "candidates, or pictures that are no numbers")
    if len(chosen) < 2:
        raise ValueError(f"fewer than two items of {folder} have references: nothing to average")
    groups = {x.name: found[x.name] for x in chosen}
    rows = list(chain(*groups.values()))
    owners = [x for x in chosen for _ in groups[x.name]]       # whose each row is
    direction = rows[0]["direction"]
    if direction == IMAGE:
        captions = [row["caption"] for row in rows]
        references = [x.captions for x in owners]
        # of the whole split, as in rerank.py: numbers of fewer of its items then compare
        df = metrics.document_frequency([x.captions for x in items if x.captions])
        quality = {"CIDEr": 100 * metrics.cider(captions, references, df)}
        judges_of_text = load_judges(("clip", "sbert"), "text", place, device, notes)
        quality |= likenesses(captions, references, judges_of_text, notes, glove)
    else:
        files = [folder / row["picture"] for row in rows]
        quality = picture_likenesses(files, owners, place, device, notes)
    ends = np.cumsum([len(group) for group in groups.values()])[:-1]
    domains = by_domain(chosen)
    out = {}
    for by, ranking in rankings(groups, notes).items():
        for metric, values in quality.items():
            each = np.split(values, ends)                      # of each item (n,)
            rows = out[f"{metric} by {by}"] = {}
            for domain, some in domains.items():
                row = metrics.choices([each[i] for i in some], [ranking[i] for i in some])
                rows[domain] = row | {"percent": 100 * row["gain"] / (abs(row["mean"]) or math.nan)}
    for domain, some in domains.items():
        if len(some) < FEW:
            notes.append(f"{domain}: {len(some)} items do not tell whether the choice helps")
    return {"findings": out, "direction": direction}


def complete(rows):
    """Whether an item has all its candidates, and, of a text, all their pictures."""
    if not rows or len(rows) != rows[0].get("of", len(rows)):
        return False
    return rows[0]["direction"] == IMAGE or all(row["picture"] for row in rows)


def plot(found, path):
    """Figures 3 and 4: mean quality by rank, a panel for each metric, a line for each score."""
    from matplotlib.figure import Figure
    names = list(dict.fromkeys(name.split(" by ")[0] for name in found))
    figure = Figure(figsize=(4 * len(names), 3.4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for name, rows in found.items():
        metric, by = name.split(" by ")
        axis = axes[names.index(metric)]
        axis.plot(rows["all"]["by_rank"], marker="o", ms=3, label=by)
        axis.set(title=f"{metric}, n = {rows['all']['items']}", xlabel="rank by the score named")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- rows
def by_domain(items):
    """{domain: numbers of its items}, in the domains' order, and "all"."""
    out = {}
    for i, item in enumerate(items):
        out.setdefault(DOMAIN.get(item.domain, item.domain), []).append(i)
    return out | {"all": range(len(items))}


def rows_of(items, scores, names, ci=False):
    """{domain: {n, name: score}}; scores: {name: values (n, ...) of n items}, as score_of takes."""
    out = {}
    for domain, rows in by_domain(items).items():
        out[domain] = {"n": len(rows)} | dict.fromkeys(names)
        for name, values in scores.items():
            if len(rows) > 1 or name not in OF_SETS:
                of_some = with_interval if ci else score_of
                out[domain][name] = of_some(name, values[rows])
    return out


def score_of(name, values):
    """One number of the values (n, ...) of n items."""
    scale = 100 if name in HUNDRED else 1
    if name.startswith("B@"):
        four = metrics.bleu(values.sum(0))
        return scale * four[int(name[2:]) - 1]
    if name in ("FID", "FD-DINO"):
        return metrics.frechet(values[:, 0], values[:, 1])
    if name == "IS":
        return metrics.inception_score(values)
    if not np.isfinite(values).any():
        return math.nan
    return scale * np.nanmean(values)


def with_interval(name, values):
    low, high = metrics.resampled(lambda rows: score_of(name, values[rows]), len(values))
    return {"value": score_of(name, values), "low": low, "high": high}


def text(title, rows, names):
    """Rows as a table of columns. The metric of a number, and so its digits, is the column's name,
    or what its row's name begins with."""
    grid = [[title, "n", *names]]
    for name, row in rows.items():
        metric = re.split(",| by ", name)[0]
        cells = []
        for column in names:
            cells.append(cell(row[column], {metric, column}))
        grid.append([name, str(row["n"]), *cells])
    widths = [max(map(len, column)) for column in zip(*grid)]
    lines = []
    for name, *cells in grid:
        padded = [x.rjust(width) for x, width in zip(cells, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def cell(value, names):
    """A number, or one with its interval, by the names of its metric and column."""
    if value is None or isinstance(value, str):
        return value or "-"
    digits = 1 if HUNDRED & names else 3
    sign = "+" if GAINS & names else ""
    numbers = value.values() if isinstance(value, dict) else [value]
    one, *ends = [f"{x:{sign}.{digits}f}" for x in numbers]
    return f"{one} [{', '.join(ends)}]" if ends else one


def with_gain(row, column, gain):
    """A row of metrics.paired or choices, as `text` takes it."""
    low, high = row["interval"]
    return row | {"n": row["items"], column: {"value": gain, "low": low, "high": high}}


def report(results):
    """All of an evaluation's results as text."""
    texts = []
    for key, title in (("captions", "captions"), ("images", "pictures")):
        if key in results:
            names = [name for name in results[key]["all"] if name != "n"]
            texts.append(text(title, results[key], names))
    if "compare" in results:
        rows = {}
        for name, row in results["compare"].items():
            rows[name] = with_gain(row, "b - a", row["difference"]) | {"p": f"{row['p']:.3f}"}
        texts.append(text("captions", rows, ("a", "b", "b - a", "p")))
    if "label_free" in results:
        found = results["label_free"]
        for x in found["items"]:
            texts.append(f"{x['score']:+.4f} +- {x['error']:.4f}  {x['item']}: {x['caption']}")
        texts.append("mean of {n} images, {draws} draws each ({score}): {mean:+.4f} "
                     "[{low:+.4f}, {high:+.4f}]".format(**found))
    if results.get("findings"):
        rows = {}
        for name, domains in results["findings"].items():
            for domain, row in domains.items():
                rows[f"{name}, {domain}"] = with_gain(row, "gain", row["gain"])
        texts.append(text("choice", rows, CHOICE))
    return "\n".join(texts)
