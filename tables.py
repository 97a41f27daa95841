"""The rows of the paper's tables: scores of captions and of pictures, by domain.

    notes = []                                                     # what can't be had, and why
    items, captions = matched("captions.json", "references.json", notes)
    rows = of_captions(items, captions, "hub", "cuda", notes)      # Table 3
    rows = of_pictures(items, files, "hub", "cuda", notes)         # Table 4
    print(text("captions", rows, CAPTIONS))

Items are data.Items: captions (the references), path (of the picture), domain. rows is {domain: {n:
items, score: value, or {value, low, high} with ci, or None where it can't be had}}. Copy this file
with data.py, judges.py, loading.py and metrics.py.
"""
import math
import re
from itertools import chain

import numpy as np

import data
import judges
import metrics

CAPTIONS = ("B@1", "B@2", "B@3", "B@4", "CIDEr", "SPICE", "WMD", "CLIP", "SBERT")
PICTURES = ("CLIP", "DINO", "FID", "IS", "FD-DINO")
HUNDRED = {"B@1", "B@2", "B@3", "B@4", "CIDEr", "SPICE"}        # papers print these x 100
OF_SETS = {"FID", "IS", "FD-DINO"}                              # of two pictures or more
DOMAIN = {"in-domain": "in", "near-domain": "near", "out-domain": "out", None: "all"}


def of_captions(items, captions, place, device, notes, glove=None, ci=False):
    """Rows of CAPTIONS of a caption of each item. CIDEr's document frequency is that of all items,
    a domain's CIDEr the mean of its items; its BLEU is computed anew."""
    references = [x.captions for x in items]
    scores = dict.fromkeys(CAPTIONS[:4], metrics.bleu_counts(captions, references))
    scores["CIDEr"] = metrics.cider(captions, references)
    try:
        scores["SPICE"] = metrics.spice(captions, references)
    except metrics.Unavailable as e:
        notes.append(f"no SPICE: {e}")
    scores |= likenesses(captions, references, place, device, notes, glove)
    if "WMD" in scores:
        scores["WMD"] = -scores["WMD"]                          # papers print the distance
    return rows_of(items, scores, CAPTIONS, ci)


def of_pictures(items, files, place, device, notes, inception=None, ci=False):
    """Rows of PICTURES of a picture of each item. Items that have a picture which can't be read are
    left out; raises ValueError where none is left."""
    found = load_judges(("clip", "dino"), "image", place, device, notes)
    encoders = {name: judge.embed for name, judge in found.items()}
    try:
        see = judges.inception_features(device, inception)
        encoders["inception"] = lambda image: np.hstack(see(image))     # 2048 features, 1008 logits
    except judges.Unavailable as e:
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
    """{NAME: judge}; what is missing is noted. place: of judges.load, or "none"."""
    found, missing = {}, dict.fromkeys(names, "name --judges hub, or a folder")
    if place != "none":
        found, missing = judges.load(names, kind, place, device)
    notes += [f"no {name.upper()}: {reason}" for name, reason in missing.items()]
    return {name.upper(): judge for name, judge in found.items()}


def likenesses(captions, references, place, device, notes, glove=None):
    """How alike n captions are to their references, on the mean: {"CLIP", "SBERT", "WMD": (n,)},
    higher is more alike, nan where no word of it has a vector."""
    out = {}
    found = load_judges(("clip", "sbert"), "text", place, device, notes)
    for name, judge in found.items():
        each = [judge.alike([c] * len(r), r).mean() for c, r in zip(captions, references)]
        out[name] = np.array(each)
    if not glove:
        notes.append("no WMD: it needs word vectors; give --glove glove.6B.200d.txt")
        return out
    sizes = [len(r) for r in references]                # all at once: the vectors are read once
    repeated = np.repeat(captions, sizes).tolist()
    distances = metrics.movers(glove, repeated, list(chain(*references)))
    each = np.split(distances, np.cumsum(sizes)[:-1])
    out["WMD"] = np.array([score_of("WMD", values) for values in each])
    return out


def picture_likenesses(files, paths, place, device, notes):
    """How alike n pictures are to n others: {"CLIP", "DINO": (n,)}, higher is more alike."""
    found = load_judges(("clip", "dino"), "image", place, device, notes)
    out = {name: [] for name in found}
    for file, path in zip(files, paths):
        drawn = data.open_image(file)[None]
        real = data.open_image(path)[None]
        for name, judge in found.items():
            out[name] += judge.alike(drawn, real).tolist()
    return {name: np.array(values) for name, values in out.items()}


# ---------------------------------------------------------------- rows
def by_domain(items):
    """{domain: numbers of its items}, in the domains' order, and "all"."""
    out = {}
    for i, item in enumerate(items):
        out.setdefault(DOMAIN.get(item.domain, item.domain), []).append(i)
    return out | {"all": list(range(len(items)))}


def rows_of(items, scores, names, ci=False):
    """{domain: {n, name: score}}; scores: {name: values (n, ...) of n items}, as score_of takes."""
    out = {}
    for domain, rows in by_domain(items).items():
        out[domain] = {"n": len(rows)} | dict.fromkeys(names)
        for name, values in scores.items():
            if len(rows) > 1 or name not in OF_SETS:
                out[domain][name] = score_of(name, values[rows])
                if ci:
                    out[domain][name] = with_interval(name, values[rows])
    return out


def score_of(name, values):
    """One number of the values (n, ...) of n items."""
    scale = 100 if name in HUNDRED else 1
    if name.startswith("B@"):
        four = metrics.bleu(values.sum(0))
        return scale * float(four[int(name[2:]) - 1])
    if name in ("FID", "FD-DINO"):
        return metrics.frechet(values[:, 0], values[:, 1])
    if name == "IS":
        return metrics.inception_score(values)[0]
    if not np.isfinite(values).any():
        return math.nan
    return scale * float(np.nanmean(values))


def with_interval(name, values):
    def resample(rows):
        return score_of(name, values[rows])
    low, high = metrics.resampled(resample, len(values))
    return {"value": score_of(name, values), "low": low, "high": high}


def text(title, rows, names):
    """Rows as a table of columns."""
    grid = [[title, "n", *names]]
    for name, row in rows.items():
        cells = [cell(c, row[c]) for c in names]
        grid.append([name, str(row["n"]), *cells])
    widths = [max(map(len, column)) for column in zip(*grid)]
    lines = []
    for name, *cells in grid:
        padded = [x.rjust(width) for x, width in zip(cells, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def cell(name, value):
    if value is None:
        return "-"
    digits = 1 if name in HUNDRED else 3
    if isinstance(value, dict):
        return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*value.values(), d=digits)
    return f"{value:.{digits}f}"


# ---------------------------------------------------------------- files of captions
def key(image):
    """An image by its number where its name is one, as COCO's files' are
    (val2014/COCO_val2014_000000391895.jpg)."""
    digits = re.fullmatch(r"(?:.*/)?(?:COCO_\w+_|coco_)?(\d+)(?:\.\w+)?", str(image))
    return str(int(digits[1])) if digits else str(image)


def keys(images, source):
    """The `key` of each. Raises ValueError where two images have one."""
    first = {}
    for image in images:
        other = first.setdefault(key(image), image)
        if str(other) != str(image):
            raise ValueError(
                f"{source}: {other} and {image} are one image by their number: rename one")
    return [key(image) for image in images]


def captions_in(path):
    """({image: captions}, {image: domain}) of COCO's results or annotations, NoCaps, Karpathy's and
    BLIP's files, {image: caption or captions}. Raises ValueError for others."""
    found = data.load_json(path)
    domains = {}
    out = {}
    try:
        if isinstance(found, list):                                  # COCO's results, BLIP's rows
            images = [x.get("image") or x["image_id"] for x in found]
            captions = [x["caption"] for x in found]
        elif "annotations" in found:                                 # COCO, NoCaps
            images = [x["image_id"] for x in found["annotations"]]
            captions = [x["caption"] for x in found["annotations"]]
            domains = {key(x["id"]): x.get("domain") for x in found.get("images", ())}
        elif "images" in found:                                      # Karpathy's
            images = [x.get("cocoid") or x["imgid"] for x in found["images"]]
            captions = [x["sentences"] for x in found["images"]]
        else:
            images, captions = found.keys(), found.values()
        for image, some in zip(keys(images, path), captions):
            if isinstance(some, str):
                some = [some]
            texts = [c if isinstance(c, str) else c["raw"] for c in some]
            out.setdefault(image, []).extend(texts)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: expected [{{image_id, caption}}, ...], COCO annotations, "
                         "Karpathy's rows, or {image: captions}") from e
    return {image: texts for image, texts in out.items() if texts}, domains


def matched(path, source, notes):
    """Items of the images with a caption in path and references in source, and their captions."""
    said, _ = captions_in(path)
    references, domains = captions_in(source)
    names = [x for x in said if x in references]
    if not names:
        one, other = next(iter(said), None), next(iter(references), None)
        raise ValueError(f"no image of {path} is in {source} (such as {one!r} and {other!r})")
    if not len(names) == len(said) == len(references):
        notes.append(f"{len(said) - len(names)} captions have no references, "
                     f"{len(references) - len(names)} images no caption")
    items = [data.Item(x, None, references[x], domains.get(x)) for x in names]
    return items, [said[x][-1] for x in names]
