"""Captions and draws a split, scores both, and prints the rows of the paper's tables.

    python evaluate.py                                      # the miniature: in, near, out
    python evaluate.py --captioner vitb --data data/nocaps  # Table 3 on NoCaps, by domain
    python evaluate.py --ckpt out/finetune                  # the same of a trained pair
    python evaluate.py --score captions.json --refs refs.json              # given captions
    python evaluate.py --label-free --images DIR --captions captions.json  # without references
    python evaluate.py --findings out/full                  # Tables 1, 2, Figures 3, 4 of a rerank

Writes into --out: captions and pictures (kept: run again, it goes on), results.json, table.txt.
What can't be had here (Java, Inception, word vectors) costs one line, and is null in the results.
The miniature runs on one thread a process (OMP_NUM_THREADS rules).
"""
import argparse
import json
import math
import re
import sys
from collections import Counter
from datetime import timedelta
from itertools import chain
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import cycle
import data
import judges
import loading
import losses
import metrics
import tables
from captioners import Captioner
from generators import Generator

CHOICE = ("mean", "chosen", "oracle", "gain", "percent")
SETTINGS = ("captioner", "generator", "ckpt", "data", "way", "steps", "guidance", "seed", "dtype")


def flags(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--captioner", default="miniature", help="vitb, vitl, blip2, folder, file.py:f")
    p.add_argument("--generator", help="sd14, folder, hub id, file.py:f; follows --captioner")
    p.add_argument("--ckpt", help="a checkpoint of finetune.py, or its folder")
    p.add_argument("--data", help="the set: data/coco, data/nocaps; default miniature")
    p.add_argument("--split", help="test, val; in, near, out, nocaps (the default where it is)")
    p.add_argument("--limit", type=int, help="items of each domain; default all, miniature 100")
    p.add_argument("--only", choices=["captions", "images"], help="one of the two tables")
    p.add_argument("--ci", action="store_true", help="95 %% bootstrap intervals of every score")
    p.add_argument("--way", default="beam", help="how captions are said: beam (3), or rerank's")
    p.add_argument("--steps", type=int, default=50, help="denoising steps a picture")
    p.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance")
    p.add_argument("--seed", type=int, default=0, help="chance is a function of seed and item")
    p.add_argument("--batch", type=int, help="items at once; default 40, or 10 of real models")
    p.add_argument("--judges", help="miniature, hub, cache (what was fetched before), none, or a "
                   "folder with clip, dino, sbert; default the models' own")
    p.add_argument("--glove", help="GloVe text file for WMD")
    p.add_argument("--inception", help="weights for FID and IS; default torch-fidelity's own")
    p.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    p.add_argument("--dtype", help="float32, float16 or bfloat16; default by device")
    p.add_argument("--score", type=Path, help="file of captions: COCO's results, {image: caption}")
    p.add_argument("--refs", type=Path, help="references: COCO, Karpathy, {image: [captions]}")
    p.add_argument("--labelfree", "--label-free", action="store_true", help="score --captions of "
                   "--images by the generator's loss")
    p.add_argument("--images", type=Path, help="folder of pictures for --label-free")
    p.add_argument("--captions", type=Path, help="file of captions for it, as of --score")
    p.add_argument("--draws", type=int, default=12, help="noises for each of them")
    p.add_argument("--findings", type=Path, help="a rerank's folder; with its --data and --split")
    p.add_argument("--out", type=Path, default=Path("out/evaluate"), help="what comes out")
    args = p.parse_args(argv)
    small = args.captioner == "miniature"
    args.generator = args.generator or ("miniature" if small else "sd14")
    args.judges = args.judges or ("none" if args.score else None)
    args.batch = args.batch or (40 if small else 10)
    args.data = args.data or ("miniature" if small else None)
    if args.score and not args.refs:
        p.error("--score needs --refs")
    if args.labelfree and not (args.images and args.captions):
        p.error("--label-free needs --images and --captions")
    if args.data is None and not (args.score or args.labelfree):
        p.error(f"--captioner {args.captioner} needs --data, such as data/coco or data/nocaps")
    return args


# ---------------------------------------------------------------- the work that is kept
def items_of(root, split=None, limit=None):
    """The items of a split that have captions, at most `limit` of each domain."""
    split = split or data.default_split(root)
    seen, out = Counter(), []
    for item in data.read(root, split):
        seen[item.domain] += 1
        if item.captions and (limit is None or seen[item.domain] <= limit):
            out.append(item)
    if not out:
        raise ValueError(f"{root} has no captions in split {split}: there is nothing to compare")
    return out


def kept(out, direction):
    """{item: row} of the work in a folder, of all processes."""
    files = sorted(out.glob(f"{direction}-*.jsonl"))
    return {row["item"]: row for row in chain(*map(data.read_rows, files))}


def share(items, out, direction):
    """This process's share of the items that are not done yet."""
    rank, world = data.rank_and_world()
    done = kept(out, direction)
    return [x for x in items[rank::world] if x.name not in done]


def batches(items, size, what):
    """The items, `size` at a time, with a bar (of the first process)."""
    slices = [items[i:i + size] for i in range(0, len(items), size)]
    return tqdm(slices, what, disable=data.rank_and_world()[0] > 0)


def readable(items):
    """Names and pictures of the items whose pictures can be read; the others are told."""
    names, images = [], []
    for item in items:
        try:
            images.append(data.open_image(item.path))
            names.append(item.name)
        except ValueError as e:
            print(f"evaluate.py: skipped {e}", file=sys.stderr)
    return names, images


def say(items, path, captioner, way, seed, batch):
    """A caption of each picture, appended to path: {item, caption}."""
    for some in batches(items, batch, "captions"):
        names, images = readable(some)
        if names:
            said = captioner.speak(images, 1, way, seed, names)[0]
            data.append_rows(path, [{"item": n, "caption": c[0]} for n, c in zip(names, said)])


def draw(items, path, generator, steps, guidance, seed, batch):
    """A picture of each first caption, appended to path: {item, cut, picture}; cut: the caption is
    longer than the text encoder reads."""
    for some in batches(items, batch, "images"):
        names = [x.name for x in some]
        captions = [x.captions[0] for x in some]
        made = generator.draw(captions, names, seed, steps=steps, guidance=guidance, batch=batch)
        cut = [False] * len(some)
        if hasattr(generator, "too_long"):
            cut = generator.too_long(captions)
        rows = []
        for name, long, image in zip(names, cut, made):
            file = f"pictures/{data.picture_name(name)}.png"
            data.save_image(image, path.parent / file)
            rows.append({"item": name, "cut": long, "picture": file})
        data.append_rows(path, rows)


# ---------------------------------------------------------------- captions without references
def label_free(folder, said, generator, draws, seed, batch, notes):
    """How much each caption, {image: captions}, helps the generator to denoise its picture:
    score, standard error, mean of all. Nothing is drawn; all meet the same timesteps and noise."""
    if not getattr(generator, "denoises", False):
        raise ValueError("--label-free wants a --generator like Stable Diffusion 1.x or 2.x")
    items = [x for x in data.read(folder) if tables.key(x.name) in said]
    tables.keys([x.name for x in items], folder)
    timesteps, noise = cycle.noises(generator, draws, seed)
    rows = []
    for some in batches(items, batch, "scores"):
        names, images = readable(some)
        if names:
            captions = [said[tables.key(name)][-1] for name in names]
            loss = losses.score(generator, images, captions, timesteps, noise, batch, empty=True)
            value, error = losses.mean_and_error(loss)
            rows += zip(names, captions, (-value).tolist(), error.tolist())
    if not rows:
        raise ValueError(f"no picture of {folder} that can be read has a caption")
    names, captions, scores, _ = zip(*rows)
    if len(rows) < len(said):
        notes.append(f"{len(said) - len(rows)} captions have no picture that can be read")
    cut = sum(generator.too_long(captions))
    if cut:
        notes.append(f"{cut} captions are longer than the text encoder reads: scored in part")
    low, high = metrics.interval(scores)
    columns = "item", "caption", "score", "error"
    return {"score": "denoising loss under the empty caption - under the caption", "n": len(rows),
            "draws": draws, "mean": float(np.mean(scores)), "low": low, "high": high,
            "items": [dict(zip(columns, row)) for row in rows]}


# ---------------------------------------------------------------- Tables 1 and 2, Figures 3 and 4
def findings(folder, items, place, device, notes, glove=None):
    """What choosing among a rerank's candidates by each score is worth in each metric, by domain:
    {"metric by score": {domain: row}}, and their direction. items: those of its set and split."""
    path = folder / "candidates.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is missing: run rerank.py --out {folder} first, with --data")
    groups = {x.name: [] for x in items}
    for row in data.read_rows(path):
        if row["item"] in groups:
            groups[row["item"]].append(row)
    chosen = [x for x in items if groups[x.name]]
    if len(chosen) < 2:
        raise ValueError(f"fewer than two items of {folder} are in this set and split: name the "
                         "--data and --split it was made of")
    rows = list(chain(*groups.values()))                       # n of each item, item by item
    shape = len(chosen), len(groups[chosen[0].name])
    if any(len(groups[x.name]) != shape[1] for x in chosen):
        raise ValueError(f"{path} has more candidates of some items: run rerank.py again")
    owners = np.repeat(chosen, shape[1])
    direction = rows[0]["direction"]
    if direction == "image-text-image":
        captions = [row["caption"] for row in rows]
        references = [x.captions for x in owners]
        df = metrics.document_frequency([x.captions for x in items])
        candidates = np.reshape(captions, shape).tolist()
        quality = {"CIDEr": metrics.caption_quality(candidates, references[::shape[1]], df)}
        quality |= tables.likenesses(captions, references, place, device, notes, glove)
    else:
        files = [folder / row["picture"] for row in rows]
        paths = [x.path for x in owners]
        quality = tables.picture_likenesses(files, paths, place, device, notes)
    out = {}
    for by in rows[0]["scores"]:
        ranking = np.array([row["scores"].get(by) for row in rows], float).reshape(shape)
        if np.isnan(ranking).any():
            notes.append(f"no choice by {by}: some candidates have no such score")
            continue
        for metric, values in quality.items():
            out[f"{metric} by {by}"] = choices(values.reshape(shape), ranking, chosen)
    return {"findings": out, "direction": direction}


def choices(quality, ranking, items):
    """{domain: metrics.choices, and its gain in per cent of the mean}."""
    out = {}
    for domain, some in tables.by_domain(items).items():
        row = metrics.choices(quality[some], ranking[some])
        row["percent"] = 100 * row["gain"] / (abs(row["mean"]) or math.nan)
        out[domain] = row
    return out


def plot(found, path):
    """Figures 3 and 4: mean quality by rank, a panel for each metric, a line for each score."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = list(dict.fromkeys(name.split(" by ")[0] for name in found))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), squeeze=False)
    for name, rows in found.items():
        metric, by = name.split(" by ")
        axis = axes[0][names.index(metric)]
        axis.plot(rows["all"]["by_rank"], marker="o", ms=3, label=by)
        axis.set(title=f"{metric}, n = {rows['all']['items']}", xlabel="rank by the score named")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- what a person reads
def report(results):
    """All of results as text."""
    texts = []
    if "captions" in results:
        texts.append(tables.text("captions", results["captions"], tables.CAPTIONS))
    if "images" in results:
        texts.append(tables.text("pictures", results["images"], tables.PICTURES))
    if "label_free" in results:
        found = results["label_free"]
        for x in found["items"]:
            texts.append(f"{x['score']:+.4f} +- {x['error']:.4f}  {x['item']}: {x['caption']}")
        texts.append("mean of {n} images, {draws} draws each ({score}): {mean:+.4f} "
                     "[{low:+.4f}, {high:+.4f}]".format(**found))
    choice = {}
    for name, domains in results.get("findings", {}).items():
        for domain, row in domains.items():
            low, high = row["interval"]
            gain = {"value": row["gain"], "low": low, "high": high}
            choice[f"{name}, {domain}"] = row | {"n": row["items"], "gain": gain}
    if choice:
        texts.append(tables.text("choice", choice, CHOICE))
    return "\n".join(texts)


def write(results, out):
    """results.json and table.txt, and the table to the terminal."""
    # indented, a value ends its line: no caption is changed
    text = re.sub(r"\bNaN(,?)$", r"null\1", json.dumps(results, indent=1), flags=re.M)
    data.write_text(out / "results.json", text + "\n")
    data.write_text(out / "table.txt", report(results) + "\n")
    print(report(results))
    for note in dict.fromkeys(results["notes"]):
        print(f"evaluate.py: {note}", file=sys.stderr)
    print(f"evaluate.py: the same numbers with their settings are in {out}/results.json")


def main(args):
    loading.tune_process(args.captioner, args.generator)
    device, _ = loading.device_and_dtype(args.device)
    rank, world = data.rank_and_world()
    args.judges = args.judges or judges.default_place(args.captioner, args.generator)
    results, notes = {}, []
    if args.score:
        items, captions = tables.matched(args.score, args.refs, notes)
        results["captions"] = tables.of_captions(
            items, captions, args.judges, device, notes, args.glove, args.ci)
    elif args.labelfree:
        captions, _ = tables.captions_in(args.captions)
        generator = Generator.load(args.generator, args.device, args.dtype)
        if args.ckpt:
            loading.load_trained(args.ckpt, None, generator)
        results["label_free"] = label_free(
            args.images, captions, generator, args.draws, args.seed, args.batch, notes)
    elif args.findings:
        items = items_of(args.data, args.split)
        results = findings(args.findings, items, args.judges, device, notes, args.glove)
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            plot(results["findings"], args.out / "figure.png")
        except ImportError:
            notes.append("no figure.png: pip install matplotlib")
    else:
        limit = args.limit or (100 if args.data == "miniature" else None)
        items = items_of(args.data, args.split, limit)
        if args.inception and args.only != "captions":
            try:
                judges.inception_weights(args.inception)       # now, not after the work
            except judges.Unavailable as e:
                raise ValueError(f"--inception {e}") from e
        settings = {name: str(getattr(args, name)) for name in SETTINGS}
        if (args.out / "settings.json").exists():
            data.same_settings(args.out, settings)
        if world > 1:                                          # the others wait for the slowest
            dist.init_process_group("gloo", timeout=timedelta(days=7))

        # 1) what is not done yet; both models are there before the work begins
        unsaid = share(items, args.out, "captions") if args.only != "images" else []
        undrawn = share(items, args.out, "images") if args.only != "captions" else []
        captioner = generator = None
        if unsaid:
            captioner = Captioner.load(args.captioner, args.device, args.dtype)
        if undrawn:
            generator = Generator.load(args.generator, args.device, args.dtype)
        if args.ckpt:
            loading.load_trained(args.ckpt, captioner, generator)
        loading.record_revisions(args.out)
        data.same_settings(args.out, settings)
        if unsaid:
            path = args.out / f"captions-{rank}.jsonl"
            say(unsaid, path, captioner, args.way, args.seed, args.batch)
        if undrawn:
            path = args.out / f"images-{rank}.jsonl"
            draw(undrawn, path, generator, args.steps, args.guidance, args.seed, args.batch)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        if rank > 0:
            return 0

        # 2) all of it is scored
        rows = kept(args.out, "captions")
        some = [x for x in items if x.name in rows]
        if some and args.only != "images":
            if len(some) < len(items):
                notes.append(f"{len(items) - len(some)} pictures could not be read")
            captions = [rows[x.name]["caption"] for x in some]
            results["captions"] = tables.of_captions(
                some, captions, args.judges, device, notes, args.glove, args.ci)
        rows = kept(args.out, "images")
        some = [x for x in items if x.name in rows]
        if some and args.only != "captions":
            files = [args.out / rows[x.name]["picture"] for x in some]
            results["images"] = tables.of_pictures(
                some, files, args.judges, device, notes, args.inception, args.ci)
            cut = sum(rows[x.name].get("cut", False) for x in some)
            if cut:
                notes.append(f"{cut} captions are longer than the text encoder reads: drawn "
                             "without their ends")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
                if v is not None}
    results |= {"notes": notes, "settings": settings, "revisions": loading.REVISIONS}
    write(results, args.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        print(f"evaluate.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
