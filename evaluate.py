"""Captions and draws a split, scores both, and prints the rows of the paper's tables.

    python evaluate.py                                       # the miniature: in, near, out; Tables 3 and 4
    python evaluate.py --captioner vitb --data data/nocaps   # Table 3 on NoCaps, by domain; --data data/coco: Karpathy
    python evaluate.py --ckpt out/finetune                   # the same of a trained pair
    python evaluate.py --score captions.json --refs refs.json               # scores of given captions, no model
    python evaluate.py --label-free --images DIR --captions captions.json   # a score without references
    python evaluate.py --findings out/full                   # Tables 1, 2 and Figures 3, 4 of a rerank's candidates

Writes into --out: captions.jsonl and pictures (work that is kept: run again, it goes on), results.json and table.txt.
What can't be had here (Java, Inception, word vectors) costs one line, and is null in the results.
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).resolve().parent
CAPTIONS = ("B@1", "B@2", "B@3", "B@4", "CIDEr", "SPICE", "WMD", "CLIP", "SBERT")
PICTURES = ("CLIP", "DINO", "FID", "IS", "FD-DINO")
HUNDRED = {"B@1", "B@2", "B@3", "B@4", "CIDEr", "SPICE"}                 # papers print these x 100
DOMAIN = {"in-domain": "in", "near-domain": "near", "out-domain": "out", None: "all"}


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--captioner", default="miniature", help="miniature, vitb, vitl, blip2, folder, hub id, file.py:f")
    p.add_argument("--generator", help="miniature, sd14, directory, hub id or file.py:name; follows --captioner")
    p.add_argument("--ckpt", help="a checkpoint of finetune.py, or its folder")
    p.add_argument("--data", help="the set: data/coco, data/nocaps; default miniature")
    p.add_argument("--split", help="test, val; in, near, out, nocaps; default nocaps where it is, else test")
    p.add_argument("--limit", type=int, help="items of each domain; default 100 of the miniature, else all")
    p.add_argument("--only", choices=["captions", "images"], help="one of the two tables")
    p.add_argument("--ci", action="store_true", help="95 %% bootstrap intervals of every score")
    p.add_argument("--way", default="beam", help="how captions are said: beam (3 beams), or a way of rerank's")
    p.add_argument("--steps", type=int, default=50, help="denoising steps a picture")
    p.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance")
    p.add_argument("--seed", type=int, default=0, help="chance is a function of seed and item")
    p.add_argument("--batch", type=int, help="items at once; default 40, or 10 of real models")
    p.add_argument("--judges", help="miniature, hub, cache (of the hub's, what was fetched before), none, or a folder "
                   "with clip, dino, sbert; default the models' own: cache beside local ones")
    p.add_argument("--glove", help="GloVe text file for WMD")
    p.add_argument("--inception", help="Inception weights for FID and IS; default torch-fidelity's own")
    p.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    p.add_argument("--dtype", help="float32, float16 or bfloat16; default by device")
    p.add_argument("--score", type=Path, metavar="FILE", help="captions: a COCO result file, or {image: caption}")
    p.add_argument("--refs", type=Path, metavar="FILE", help="references: COCO annotations, Karpathy rows, NoCaps, or "
                   "{image: [captions]}")
    p.add_argument("--labelfree", "--label-free", action="store_true", help="score --captions by the generator's loss")
    p.add_argument("--images", type=Path, metavar="DIR", help="pictures of --label-free")
    p.add_argument("--captions", type=Path, metavar="FILE", help="captions of --label-free, as --score takes them")
    p.add_argument("--draws", type=int, default=12, help="noises of each caption in --label-free")
    p.add_argument("--findings", type=Path, metavar="OUT", help="a rerank's folder; with its --data and --split")
    p.add_argument("--out", type=Path, default=Path("out/evaluate"), help="folder for what comes out")
    args = p.parse_args(argv)
    small = args.captioner == "miniature"
    args.generator = args.generator or ("miniature" if small else "sd14")
    args.judges = args.judges or ("none" if args.score else None)
    args.batch = args.batch or (40 if small else 10)
    args.data = args.data or ("miniature" if small else None)
    if args.score and not args.refs or args.labelfree and not (args.images and args.captions):
        p.error("--score needs --refs; --label-free needs --images and --captions")
    if args.data is None and not (args.score or args.labelfree):
        p.error(f"--captioner {args.captioner} needs --data, such as data/coco or data/nocaps")
    return args


# ---------------------------------------------------------------- Table 3: captions
def caption_scores(candidates, references, domains, args, metrics, need=CAPTIONS):
    """{row: {metric: value or null, "n": items}}, notes. CIDEr's document frequency is that of all items; a domain's
    score is the mean of its items, its BLEU is computed anew."""
    import numpy as np
    notes, each = [], {"CIDEr": metrics.cider(candidates, references)}
    counts = metrics.bleu_counts(candidates, references)
    try:
        each["SPICE"] = metrics.spice(candidates, references) if "SPICE" in need else None
    except metrics.Unavailable as e:
        notes.append(f"no SPICE: {e}")
    judges = metrics.likenesses(["clip", "sbert", "wmd"] if args.judges != "none" else ["wmd"], "text", args.judges,
                                args.device, glove=args.glove, resolve=args.resolve)
    notes += [f"no {name.upper()}: {reason}" for name, reason in judges.absent.items()]
    notes += ["no CLIP, no SBERT: name --judges hub, or a folder"] if args.judges == "none" else []
    for name, f in judges.pairs.items():                       # the mean over references; WMD is a distance
        flat = np.concatenate([f([c] * len(r), r) for c, r in zip(candidates, references)])
        ends = np.cumsum([len(r) for r in references])
        each[name.upper()] = np.array([np.nanmean(x) if np.isfinite(x).any() else math.nan
                                       for x in np.split(-flat if name == "wmd" else flat, ends[:-1])])

    def row(rows):
        values = {f"B@{n + 1}": (lambda r, n=n: metrics.bleu(counts[r].sum(0))[n]) for n in range(4)}
        values |= {k: (lambda r, v=v: np.nanmean(v[r])) for k, v in each.items() if v is not None}
        return table_row(values, rows, CAPTIONS, args.ci, metrics)
    return by_domain(domains, row), notes


def by_domain(domains, row):
    """A row for each domain in its order, and one for all."""
    import numpy as np
    names = list(dict.fromkeys(domains))
    out = {DOMAIN.get(d, d): row(np.array([i for i, x in enumerate(domains) if x == d])) for d in names}
    return out if names == [None] else out | {"all": row(np.arange(len(domains)))}


def table_row(values, rows, names, ci, metrics):
    """{metric: value, or {value, low, high} with ci, or null; n}. values: {metric: f(row numbers) -> float}."""
    out = {"n": len(rows)}
    for name in names:
        if name not in values:
            out[name] = None
            continue
        scale, f = 100 if name in HUNDRED else 1, values[name]
        out[name] = scale * float(f(rows))
        if ci:
            low, high = metrics.resampled(lambda r, f=f: f(rows[r]), len(rows))
            out[name] = {"value": out[name], "low": scale * low, "high": scale * high}
    return out


# ---------------------------------------------------------------- Table 4: pictures
def picture_scores(drawn, real, domains, args, data, metrics):
    """Pictures of captions against the pictures the captions belong to: two lists of files. Returns rows, notes."""
    import numpy as np
    notes, features, cosine = [], {}, {}
    for name in ("clip", "dino"):
        judge = metrics.likenesses([name], "image", args.judges, args.device, resolve=args.resolve)
        if judge.absent:
            notes.append(f"no {name.upper()}: {judge.absent[name]}")
            continue
        encode = judge.pairs[name].func.__self__.images
        features[name] = [np.concatenate([encode(data.open_image(x)[None]).numpy() for x in side])
                          for side in (drawn, real)]
        cosine[name.upper()] = (features[name][0] * features[name][1]).sum(1)
    try:
        see = metrics.fidelity(args.device, args.inception)
        seen = [[np.concatenate(x) for x in zip(*(see(data.open_image(x)[None]) for x in side))]
                for side in (drawn, real)]
    except metrics.Unavailable as e:
        seen = None
        notes.append(f"no FID, no IS: {e}")

    def row(rows):
        values = {k: (lambda r, v=v: v[r].mean()) for k, v in cosine.items()}
        if len(rows) > 1 and "dino" in features:
            values["FD-DINO"] = lambda r: metrics.frechet(features["dino"][0][r], features["dino"][1][r])
        if len(rows) > 1 and seen:
            values |= {"FID": lambda r: metrics.frechet(seen[0][0][r], seen[1][0][r]),
                       "IS": lambda r: metrics.inception_score(seen[0][1][r])[0]}
        return table_row(values, rows, PICTURES, args.ci, metrics)
    return by_domain(domains, row), notes


def readable(inception, metrics):
    """Refuses an --inception that can't be read before anything is drawn, not after."""
    try:
        metrics.inception_weights(inception)
    except metrics.Unavailable as e:
        raise ValueError(f"--inception {e}") from e


# ---------------------------------------------------------------- the work
def items_of(args, data):
    """The items of --data and --split, at most --limit of each domain."""
    split = args.split or data.evaluated(args.data)
    limit, seen, out = args.limit or (100 if args.data == "miniature" else None), {}, []
    for item in data.read(args.data, split):
        seen[item.domain] = seen.get(item.domain, 0) + 1
        if item.captions and (limit is None or seen[item.domain] <= limit):
            out.append(item)
    if not out:
        raise ValueError(f"{args.data} has no captions in split {split}: there is nothing to compare with")
    return out


def kept(args, direction):
    """{item: row} of earlier work in --out; other settings on the same folder are refused."""
    keep = ("captioner", "generator", "ckpt", "data", "way", "steps", "guidance", "seed", "dtype")
    now, path = {k: str(getattr(args, k)) for k in keep}, args.out / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else now
    other = [f"{k} was {before.get(k)}, is {v}" for k, v in now.items() if before.get(k) != v]
    if other:
        raise ValueError(f"{args.out} holds work of other settings ({'; '.join(other)}): choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=2) + "\n")
    rows = {}
    for file in sorted(args.out.glob(f"{direction}*.jsonl")):
        for line in file.read_text().splitlines():
            if line.endswith("}"):                               # a kill may have cut the last line
                row = json.loads(line)
                rows[row["item"]] = row
    return rows


def work(args, items, data, cycle, torch):
    """Captions of the pictures, pictures of the first captions: whatever is not on disk. Every process its share."""
    from tqdm import tqdm
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    todo = [d for d in ("captions", "images") if args.only in (None, d)]
    done = {d: kept(args, d) for d in todo}
    if not any(x.name not in done[d] for d in todo for x in items):
        return 0
    captioner = cycle.Captioner.load(args.captioner, args.device, args.dtype) if "captions" in todo else None
    generator = cycle.Generator.load(args.generator, args.device, args.dtype) if "images" in todo else None
    if args.ckpt:
        cycle.adopt(args.ckpt, captioner, generator)
    cycle.record(args.out)
    bad = 0
    for direction in todo:
        mine = [x for x in items[rank::world] if x.name not in done[direction]]
        with open(args.out / f"{direction}-{rank}.jsonl", "a", buffering=1) as f, \
                tqdm(total=len(mine), desc=direction, disable=rank > 0) as bar:
            if f.tell():
                f.write("\n")                                    # after a line that a kill cut
            for i in range(0, len(mine), args.batch):
                some = mine[i:i + args.batch]
                if direction == "captions":
                    ready = []
                    for x in some:
                        try:
                            ready.append((x, data.open_image(x.path)))
                        except ValueError as e:
                            bad += 1
                            print(f"evaluate.py: skipped {e}", file=sys.stderr)
                    said = captioner.speak([v for _, v in ready], 1, args.way, args.seed,
                                           [x.name for x, _ in ready])[0] if ready else []
                    lines = [{"item": x.name, "caption": row[0]} for (x, _), row in zip(ready, said)]
                else:
                    long = getattr(generator, "too_long", lambda captions: [False] * len(captions))
                    cut = long([x.captions[0] for x in some])
                    drawn = generator.draw([x.captions[0] for x in some], [x.name for x in some], args.seed,
                                           steps=args.steps, guidance=args.guidance, batch=args.batch)
                    lines = [{"item": x.name, "cut": c, "picture": f"pictures/{Path(x.name).stem[:40]}-"
                              f"{hashlib.sha1(x.name.encode()).hexdigest()[:8]}.png"} for x, c in zip(some, cut)]
                    for line, picture in zip(lines, drawn):
                        data.save_image(picture, args.out / line["picture"])
                f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                bar.update(len(some))
    return bad


# ---------------------------------------------------------------- given captions
def captions_in(path):
    """{image: caption} of a COCO result file [{image_id, caption}] or of a {image: caption} dict."""
    found = load(path)
    if isinstance(found, list) and all(isinstance(x, dict) and {"image_id", "caption"} <= x.keys() for x in found):
        found = {x["image_id"]: x["caption"] for x in found}
    if isinstance(found, dict) and all(isinstance(x, str) for x in found.values()):
        return dict(zip(keys(found, path), found.values()))
    raise ValueError(f"{path}: expected [{{image_id, caption}}, ...] or {{image: caption}}")


def references_in(path):
    """({image: captions}, {image: domain}) of COCO annotations, NoCaps, Karpathy's files, or {image: [captions]}."""
    found, out, domains = load(path), {}, {}
    if isinstance(found, dict) and "annotations" in found:
        domains = {key(x["id"]): x["domain"] for x in found.get("images", ()) if "domain" in x}
        pairs = [(x["image_id"], x["caption"]) for x in found["annotations"]]
    elif isinstance(found, dict) and "images" in found:
        pairs = [(x.get("cocoid", x["imgid"]), s["raw"]) for x in found["images"] for s in x["sentences"]]
    elif isinstance(found, dict):
        pairs = [(k, c) for k, v in found.items() for c in ([v] if isinstance(v, str) else v)]
    elif found and all(isinstance(x, dict) and {"image", "caption"} <= x.keys() for x in found):
        pairs = [(x["image"], c) for x in found for c in ([x["caption"]] if isinstance(x["caption"], str) else
                                                          x["caption"])]
    else:
        raise ValueError(f"{path}: expected COCO annotations, Karpathy's rows, or {{image: [captions]}}")
    for image, (_, caption) in zip(keys([k for k, _ in pairs], path), pairs):
        out.setdefault(image, []).append(caption)
    return out, domains


def key(image):
    """An image by its number where its name is one, as COCO's files' are (val2014/COCO_val2014_000000391895.jpg)."""
    digits = re.fullmatch(r"(?:.*/)?(?:COCO_\w+_|coco_)?(\d+)(?:\.\w+)?", str(image))
    return str(int(digits[1])) if digits else str(image)


def keys(images, source):
    """The `key` of each. Raises ValueError where two images have one."""
    first = {}
    for image in images:
        if str(first.setdefault(key(image), image)) != str(image):
            raise ValueError(f"{source}: {first[key(image)]} and {image} are one image by their number: rename one")
    return [key(image) for image in images]


def load(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is no JSON file that can be read ({type(e).__name__})") from e


def score(args, metrics):
    said, (heard, domains) = captions_in(args.score), references_in(args.refs)
    names = [k for k in said if k in heard]
    if not names:
        raise ValueError(f"no image of {args.score} is in {args.refs} (such as {next(iter(said), None)!r} and "
                         f"{next(iter(heard), None)!r})")
    notes = [f"{len(said) - len(names)} captions have no references, {len(heard) - len(names)} images no caption"]
    table, more = caption_scores([said[k] for k in names], [heard[k] for k in names], [domains.get(k) for k in names],
                                 args, metrics)
    return {"captions": table}, notes[:len(names) != len(said) or len(names) != len(heard)] + more


def label_free(args, data, cycle, metrics):
    """How much each given caption helps the generator to denoise its picture (cycle.score): value and standard error,
    and the mean of all. No reference, nothing is drawn; every picture meets the same timesteps and noise."""
    import numpy as np
    from tqdm import tqdm
    said = captions_in(args.captions)
    items = [x for x in data.read(args.images) if key(x.name) in said]
    keys([x.name for x in items], args.images)
    if not items:
        raise ValueError(f"no picture of {args.images} is named in {args.captions}")
    generator = cycle.Generator.load(args.generator, args.device, args.dtype)
    if not getattr(generator, "denoises", False):
        raise ValueError(f"--label-free: {args.generator} is no Stable Diffusion 1.x or 2.x, whose loss is known here")
    if args.ckpt:
        cycle.adopt(args.ckpt, None, generator)
    rows, cut, notes = [], 0, [f"{len(said) - len(items)} captions have no picture"] * (len(said) > len(items))
    for i in tqdm(range(0, len(items), args.batch), desc="scores"):
        ready = []
        for x in items[i:i + args.batch]:
            try:
                ready.append((x.name, data.open_image(x.path), said[key(x.name)]))
            except ValueError as e:
                notes.append(f"skipped {e}")
        if ready:
            names, images, captions = zip(*ready)
            cut += sum(generator.too_long(captions))
            found = cycle.score(generator, images, captions, args.draws, seed=args.seed, batch=args.batch, empty=True)
            rows += [{"item": n, "caption": c, "score": s, "error": e if math.isfinite(e) else None}
                     for n, c, s, e in zip(names, captions, found.score.tolist(), found.error.tolist())]
    if not rows:
        raise ValueError(f"none of the {len(items)} pictures can be read")
    low, high = metrics.interval([r["score"] for r in rows])
    notes += [f"{cut} captions are longer than the text encoder reads: scored without their ends"] * bool(cut)
    return {"label_free": {"score": "denoising loss under the empty caption - under the caption", "n": len(rows),
                           "draws": args.draws, "mean": float(np.mean([r["score"] for r in rows])), "low": low,
                           "high": high, "items": rows}}, notes


# ---------------------------------------------------------------- Tables 1 and 2, Figures 3 and 4
def findings(args, data, metrics):
    """Of a rerank's candidates: what choosing by each score is worth in each metric, by domain, and by rank."""
    import numpy as np
    path = args.findings / "candidates.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is missing: run rerank.py --out {args.findings} first, with --data")
    groups = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        groups.setdefault(row["item"], []).append(row)
    split = args.split or data.evaluated(args.data)
    items = {x.name: x for x in data.read(args.data, split) if x.captions}
    groups = {k: v for k, v in groups.items() if k in items}
    if len(groups) < 2:
        raise ValueError(f"fewer than two items of {args.findings} are in {args.data} {split}: name the --data and "
                         "--split it was made of")
    rows, names = list(groups.values()), list(groups)
    direction = rows[0][0]["direction"]
    notes, quality = [], {}
    if direction == "image-text-image":
        df = metrics.document_frequency([x.captions for x in items.values()])
        judges = metrics.likenesses(["clip", "sbert", "wmd"], "text", args.judges, args.device, glove=args.glove,
                                    resolve=args.resolve)
        quality["CIDEr"] = np.stack([100 * metrics.cider([r["caption"] for r in g], [items[k].captions] * len(g), df)
                                     for k, g in groups.items()])
        for name, f in judges.pairs.items():
            quality[name.upper()] = np.stack([[f([r["caption"]] * len(items[k].captions), items[k].captions).mean()
                                               for r in g] for k, g in groups.items()])
    else:
        judges = metrics.likenesses(["clip", "dino"], "image", args.judges, args.device, resolve=args.resolve)
        for name, f in judges.pairs.items():
            quality[name.upper()] = np.stack([[f(data.open_image(args.findings / r["picture"])[None], data.open_image(
                items[k].path)[None])[0] for r in g] for k, g in groups.items()])
    notes += [f"no {k.upper()}: {v}" for k, v in judges.absent.items()]
    domains, out = [items[k].domain for k in names], {}
    for by in rows[0][0]["scores"]:
        if any(r["scores"].get(by) is None for g in rows for r in g):
            notes.append(f"no choice by {by}: some candidates have no such score")
            continue
        ranking = np.array([[r["scores"][by] for r in g] for g in rows])
        for metric, q in quality.items():
            def row(some, q=q, ranking=ranking):
                c = metrics.choices(q[some], ranking[some])
                return c | {"percent": 100 * c["gain"] / abs(c["mean"]) if c["mean"] else math.nan}
            out[f"{metric} by {by}"] = by_domain(domains, row)
    return {"findings": out, "direction": direction}, notes


def plot(found, path):
    """Figures 3 and 4: mean quality by rank, a panel for each metric, a line for each likeness."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    keys = [k.split(" by ") for k in found]
    panels, lines = (list(dict.fromkeys(k[i] for k in keys)) for i in (0, 1))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), squeeze=False)
    for axis, metric in zip(axes[0], panels):
        for by in lines:
            row = found[f"{metric} by {by}"]["all"]
            axis.plot(row["by_rank"], marker="o", ms=3, label=by)
        axis.axhline(row["mean"], color="grey", ls=":", lw=1, label="mean of all")
        axis.set(title=f"{metric}, n = {row['items']}", xlabel="rank by the score named")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- what a person reads
def table(title, rows, columns):
    """Rows of {column: value | {value, low, high} | null} as text."""
    def cell(v, name):
        digits = 1 if name in HUNDRED else 3
        if v is None:
            return "-"
        if isinstance(v, dict):
            return f"{v['value']:.{digits}f} [{v['low']:.{digits}f}, {v['high']:.{digits}f}]"
        return str(v) if isinstance(v, int) else f"{v:.{digits}f}"
    grid = [[title, "n", *columns]] + [[k, *(cell(r[c], c) for c in ("n", *columns))] for k, r in rows.items()]
    widths = [max(map(len, column)) for column in zip(*grid)]
    return "\n".join("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
                     for line in grid)


def report(results):
    lines = []
    if "captions" in results:
        lines.append(table("captions", results["captions"], CAPTIONS))
    if "images" in results:
        lines.append(table("pictures", results["images"], PICTURES))
    if "label_free" in results:
        r = results["label_free"]
        for x in r["items"]:
            error = math.nan if x["error"] is None else x["error"]
            lines.append(f"{x['score']:+.4f} +- {error:.4f}  {x['item']}: {x['caption']}")
        lines.append(f"mean of {r['n']} images, {r['draws']} draws each ({r['score']}): {r['mean']:+.4f} "
                     f"[{r['low']:+.4f}, {r['high']:+.4f}]")
    for name, rows in results.get("findings", {}).items():
        for domain, c in rows.items():
            low, high = c["interval"]
            lines.append(f"{name:20} {domain:5} n {c['items']:5}   mean {c['mean']:8.3f}   chosen {c['chosen']:8.3f}   "
                         f"oracle {c['oracle']:8.3f}   gain {c['gain']:+7.3f} [{low:+.3f}, {high:+.3f}] "
                         f"{c['percent']:+6.1f} %")
    return "\n".join(lines)


def main(args):
    import torch
    import torch.distributed as dist

    import cycle
    import data
    import metrics
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cycle.one_thread(args.captioner)
    args.judges = args.judges or cycle.judges_of(args.captioner, args.generator)
    args.resolve = cycle.resolve
    if args.score:
        results, notes = score(args, metrics)
    elif args.labelfree:
        results, notes = label_free(args, data, cycle, metrics)
    elif args.findings:
        results, notes = findings(args, data, metrics)
        args.out.mkdir(parents=True, exist_ok=True)
        plot(results["findings"], args.out / "figure.png")
    else:
        if world > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=7))      # the others wait for the slowest
        items = items_of(args, data)
        if args.inception and args.only != "captions":
            readable(args.inception, metrics)
        bad = work(args, items, data, cycle, torch)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        if rank > 0:
            return 0
        results, notes = {}, [f"{bad} pictures could not be read"] * bool(bad)
        said = kept(args, "captions") if args.only != "images" else {}
        drawn = kept(args, "images") if args.only != "captions" else {}
        if said:
            here = [x for x in items if x.name in said]
            results["captions"], more = caption_scores(
                [said[x.name]["caption"] for x in here], [x.captions for x in here], [x.domain for x in here], args,
                metrics)
            notes += more
        if drawn:
            here = []
            for x in (x for x in items if x.name in drawn):
                try:
                    pair = args.out / drawn[x.name]["picture"], x.path
                    for path in pair:
                        data.open_image(path)
                    here.append((*pair, x.domain))
                except ValueError as e:
                    notes.append(f"skipped {e}")
            if not here:
                raise ValueError(f"none of the {len(items)} pictures can be read")
            cut = sum(row.get("cut", False) for row in drawn.values())
            notes += [f"{cut} captions are longer than the text encoder reads: drawn without their ends"] * bool(cut)
            results["images"], more = picture_scores(*zip(*here), args, data, metrics)
            notes += more
            if args.ci:
                notes.append("the intervals of FID and FD-DINO are of resampled pictures, whose repeats raise both: "
                             "read their width, not their place")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
                if v is not None and k != "resolve"}
    text = report(results)
    args.out.mkdir(parents=True, exist_ok=True)
    whole = results | {"notes": notes, "settings": settings, "revisions": cycle.REVISIONS}
    (args.out / "results.json").write_text(json.dumps(whole, indent=1).replace("NaN", "null") + "\n")
    (args.out / "table.txt").write_text(text + "\n")
    print(text)
    for note in dict.fromkeys(notes):
        print(f"evaluate.py: {note}", file=sys.stderr)
    print(f"evaluate.py: the same numbers with their settings are in {args.out}/results.json")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        print(f"evaluate.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
