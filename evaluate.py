"""Captions and draws a split, scores both, and prints the rows of the paper's tables.

    python evaluate.py                                      # the miniature: in, near, out
    python evaluate.py --captioner vitb --data data/nocaps  # Table 3 on NoCaps, by domain
    python evaluate.py --ckpt out/finetune                  # the same of a trained pair
    python evaluate.py --score captions.json --refs refs.json              # given captions
    python evaluate.py --score captions.json --refs refs.json --images DIR # and their CLIPScore
    python evaluate.py --compare a.json b.json --refs refs.json            # b - a, interval, p
    python evaluate.py --label-free --images DIR --captions captions.json  # without references
    python evaluate.py --findings out/full                  # Tables 1, 2, Figures 3, 4 of a rerank

Writes into --out: captions and pictures (kept: run again, it goes on), results.json, table.txt.
What can't be had here (Java, Inception, word vectors) costs one line, and is null in the results.
"""
import script  # isort: skip
import json
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import cycle
import data
import devices
import inputs
import judges
import loading
import losses
import metrics
import records
import tables
from captioners import CAPTIONERS, Captioner
from generators import GENERATORS, Generator
from miniature import toys
from records import the
from script import real, whole

# what each job reads beside --out and --device; the first is what asks for it
JOBS = {
    "score": ("score", "refs", "images", "judges", "glove", "ci"),
    "compare": ("compare", "refs", "images", "judges", "glove"),
    "labelfree": ("labelfree", "images", "captions", "refs", "generator", "ckpt", "draws", "seed",
                  "batch", "dtype"),
    "findings": ("findings", "data", "split", "judges", "glove"),
    "set": ("captioner", "generator", "ckpt", "data", "split", "limit", "only", "ci", "way",
            "steps", "guidance", "seed", "batch", "judges", "glove", "inception", "dtype")}
SPEAKERS = {"captions": Captioner, "images": Generator}
FREE = {"limit", "only", "ci", "batch", "judges", "glove", "inception"}     # as a folder goes on


def flags(argv=None):
    p = script.Parser(__doc__)
    p.add_argument("--captioner", default="miniature", help="vitb, vitl, blip2, folder, file.py:f")
    p.add_argument("--generator", help="sd14, folder, hub id, file.py:f; follows --captioner")
    p.add_argument("--ckpt", help="a checkpoint of finetune.py, or its folder")
    p.add_argument("--data", help="the set: data/coco, data/nocaps; default miniature")
    p.add_argument("--split", help="test, val; in, near, out, nocaps (the default where it is)")
    p.add_argument("--anywhere", action="store_true", help="pictures that a file names may lie out "
                   "of its folder")
    p.add_argument("--limit", type=whole(1),
                   help="items of each domain; default all, miniature 100")
    p.add_argument("--only", choices=["captions", "images"], help="one of the two tables")
    p.add_argument("--ci", action="store_true", help="95 %% bootstrap intervals of every score")
    p.add_argument("--way", default="beam", help="how captions are said: beam (3), or rerank's")
    p.add_argument("--steps", type=whole(1, 1000), default=50, help="denoising steps a picture")
    p.add_argument("--guidance", type=real(0, 1000), default=7.5, help="classifier-free guidance")
    p.add_argument("--seed", type=int, default=0, help="chance is a function of seed and item")
    p.add_argument("--batch", type=whole(1, 100_000),
                   help="items at once; default 40, or 10 of real models")
    p.add_argument("--judges", help="miniature, hub, cache (what was fetched before), none, or a "
                   "folder with clip, dino, sbert; default the models' own, of --images hub")
    p.add_argument("--glove", help="GloVe text file for WMD")
    p.add_argument("--inception", help="weights for FID and IS; default torch-fidelity's own")
    p.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    p.add_argument("--dtype", help="float32, float16 or bfloat16; default by device")
    p.add_argument("--score", type=Path, help="file of captions: COCO's results, {image: caption}")
    p.add_argument("--compare", nargs=2, help="two such files of the same images")
    p.add_argument("--refs", type=Path, help="references: COCO, Karpathy, {image: [captions]}")
    p.add_argument("--labelfree", "--label-free", action="store_true", help="score --captions of "
                   "--images by the generator's loss; --refs may name the files")
    p.add_argument("--images", type=Path, help="folder of the pictures of --label-free, --score, "
                   "--compare")
    p.add_argument("--captions", type=Path, help="file of captions for --label-free, as of --score")
    p.add_argument("--draws", type=whole(1, 10_000), default=12, help="noises for each of them")
    p.add_argument("--findings", type=Path, help="a rerank's folder; it knows its set and split")
    p.add_argument("--out", type=Path, help="what comes out; default out/evaluate, or a folder "
                   "named after the files of the other jobs")
    args = p.parse_args(argv)
    asked = [job for job in ("score", "compare", "labelfree", "findings") if getattr(args, job)]
    if len(asked) > 1:
        raise ValueError(f"--{asked[0]} and --{asked[1]} are jobs of their own: give one")
    args.job = (asked or ["set"])[0]
    known = {*JOBS[args.job], "out", "device", "job", "anywhere"}
    for name in sorted(script.typed(p, args) - known):
        raise ValueError(f"--{name} does nothing with --{args.job}" if asked else
                         f"--{name} does nothing without --score, --compare or --label-free")
    if args.job in ("score", "compare") and not args.refs:
        raise ValueError(f"--{args.job} needs --refs")
    if args.job == "labelfree" and not (args.images and args.captions):
        raise ValueError("--label-free needs --images and --captions (so does --labelfree)")
    if args.job == "set" and not args.data and args.captioner != "miniature":
        raise ValueError(f"--captioner {args.captioner} needs --data, such as data/coco or "
                         "data/nocaps")
    data.LEAVE = args.anywhere
    return defaults(args)


def defaults(args):
    """The flags with what follows from others."""
    small = args.captioner == "miniature"
    args.generator = args.generator or ("miniature" if small else "sd14")
    args.batch = args.batch or (40 if small and args.generator == "miniature" else 10)
    if args.job in ("score", "compare"):
        args.judges = args.judges or ("hub" if args.images else "none")
    if args.job == "set":
        args.judges = args.judges or judges.default_place(args.captioner, args.generator)
        args.data = args.data or "miniature"
        args.split = args.split or data.default_split(args.data)
        if args.data == "miniature":
            args.limit = args.limit or 100
    folder = {"set": "evaluate", "labelfree": "label-free"}.get(args.job, args.job)
    files = args.compare or [args.score or args.captions or ""]
    out = Path("out", folder, "-".join(Path(file).stem for file in files))
    if args.job == "findings":
        out = args.findings / "findings"
    args.out = args.out or out
    return args


# ---------------------------------------------------------------- the work that is kept
def items_of(root, split=None, limit=None):
    """(a split's items with captions, at most `limit` of each domain; a short name of it whole)."""
    seen, out = Counter(), []
    whole = data.read(root, split)
    for item in whole:
        seen[item.domain] += 1
        if item.captions and (limit is None or seen[item.domain] <= limit):
            out.append(item)
    if not out:
        raise ValueError(f"{root} has no captions in split {split}: there is nothing to compare")
    return out, data.content_of(whole)


def kept(out, direction):
    """{item: row} of the work in a folder, of all processes."""
    found = {}
    for path in sorted(out.glob(f"{direction}-*.jsonl")):
        for number, row in enumerate(records.read_rows(path), 1):
            where = f"{path}, line {number}"
            if direction == "captions":
                the(row, "caption", str, where)
            elif the(row, "picture", (str, type(None)), where):
                data.inside(out / row["picture"], out, where, ours=True)
            found[the(row, "item", str, where)] = row
    return found


def share(items, out, direction):
    """This process's share of the items that are not done yet."""
    rank, world = records.rank_and_world()
    done = kept(out, direction)
    if done and rank == 0:
        print(f"{sum(x.name in done for x in items)} of {len(items)} {direction} already done")
    return [x for x in items[rank::world] if x.name not in done]


def batches(items, size, what):
    """The items, `size` at a time, with a bar (of the first process)."""
    slices = [items[i:i + size] for i in range(0, len(items), size)]
    return tqdm(slices, what, disable=records.rank_and_world()[0] > 0)


def readable(items):
    """Items and pictures of those whose pictures can be read; the others are told."""
    found, images = [], []
    for item in items:
        try:
            images.append(data.open_image(item.path))
            found.append(item)
        except ValueError as e:
            script.say(f"skipped {e}")
    return found, images


def say(captioner, items, out, way, seed):
    """{item, caption} of each picture that can be read."""
    found, images = readable(items)
    if not found:
        return []
    names = [x.name for x in found]
    said, _ = captioner.speak(images, 1, way, seed, names)
    return [{"item": name, "caption": caption} for name, (caption,) in zip(names, said)]


def draw(generator, items, out, **settings):
    """{item, cut, picture} of each first caption, the pictures saved in `out`; cut: the caption is
    longer than the text encoder reads; a picture that is no numbers is None."""
    names = [x.name for x in items]
    captions = [x.captions[0] for x in items]
    made = generator.draw(captions, names, **settings)
    cut = [False] * len(items)
    if hasattr(generator, "too_long"):
        cut = generator.too_long(captions)
    rows = []
    for name, long, image in zip(names, cut, made):
        file = None
        if image.isfinite().all():
            file = f"pictures/{data.picture_name(name)}.png"
            data.save_image(image, out / file)
        rows.append({"item": name, "cut": long, "picture": file})
    return rows


def work(items, out, speakers, ckpt, device, dtype, settings, batch, how):
    """Says and draws what is not done yet, each process its share. speakers: {"captions": name of
    the captioner, "images": of the generator}, those that are asked for; how: {the same: more
    arguments of `say` and `draw`}."""
    rank, world = records.rank_and_world()
    todo, models = {}, {}
    for kind, name in speakers.items():                        # all are there before the work
        todo[kind] = share(items, out, kind)
        if todo[kind]:
            models[kind] = SPEAKERS[kind].load(name, device, dtype)
    if ckpt:
        loading.load_trained(ckpt, models.get("captions"), models.get("images"))
    loading.record_revisions(out)
    if rank == 0:
        records.same_settings(out, settings)
    for kind, model in models.items():
        rows_of = say if kind == "captions" else draw
        for some in batches(todo[kind], batch, kind):
            rows = rows_of(model, some, out, **how[kind])
            records.append_rows(out / f"{kind}-{rank}.jsonl", rows)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------- Tables 3 and 4
def tell_lost(found, items, notes, could="could be read", could_not="could not be read"):
    """Notes of how many items nothing was found; ValueError where it is all."""
    n = len(items)
    if not found:
        raise ValueError(f"none of the {n} pictures {could}: nothing was evaluated")
    if len(found) < n:
        notes.append(f"{n - len(found)} of {n} pictures {could_not}")


def table_3(items, out, place, device, notes, glove, ci):
    """Rows of what was said of the items."""
    rows = kept(out, "captions")
    some = [x for x in items if x.name in rows]
    tell_lost(some, items, notes)
    captions = [rows[x.name]["caption"] for x in some]
    return tables.of_captions(some, captions, place, device, notes, glove, ci)


def table_4(items, out, place, device, notes, inception, ci):
    """Rows of what was drawn for the items."""
    rows = kept(out, "images")
    lost = [x.name for x in items if not rows.get(x.name, {}).get("picture")]
    some = [x for x in items if x.name not in lost]
    tell_lost(some, items, notes, "came out as numbers (try --dtype float32)",
              "came out as no numbers and are left out (try --dtype float32): " + ", ".join(lost))
    cut = sum(rows[x.name].get("cut", False) for x in some)
    if cut:
        notes.append(f"{cut} captions are longer than the text encoder reads: drawn without their "
                     "ends")
    files = [out / rows[x.name]["picture"] for x in some]
    return tables.of_pictures(some, files, place, device, notes, inception, ci)


# ---------------------------------------------------------------- without references
def label_free(items, captions, generator, draws, seed, batch, notes):
    """How much captions help the generator to denoise their pictures, those of items: score,
    standard error, mean of all. Nothing is drawn; all meet the same timesteps and noise."""
    if not getattr(generator, "denoises", False):
        raise ValueError("--label-free wants a --generator like Stable Diffusion 1.x or 2.x")
    said = dict(zip([x.name for x in items], captions))
    timesteps, noise = cycle.noises(generator, draws, seed)
    rows = []
    for some in batches(items, batch, "scores"):
        found, images = readable(some)
        if found:
            texts = [said[x.name] for x in found]
            loss = losses.score(generator, images, texts, timesteps, noise, batch, empty=True)
            value, error = losses.mean_and_error(loss)
            files = [x.path.name for x in found]
            rows += zip(files, texts, (-value).tolist(), error.tolist())
    tell_lost(rows, items, notes)
    _, texts, scores, _ = zip(*rows)
    cut = sum(generator.too_long(texts))
    if cut:
        notes.append(f"{cut} captions are longer than the text encoder reads: scored in part")
    low, high = metrics.interval(scores)
    columns = "item", "caption", "score", "error"
    return {"score": "denoising loss under the empty caption - under the caption",
            "n": len(rows), "draws": draws, "mean": float(np.mean(scores)), "low": low,
            "high": high, "items": [dict(zip(columns, row)) for row in rows]}


# ---------------------------------------------------------------- what comes of it
def write(results, out):
    """results.json and table.txt, and the table to the terminal."""
    path = out / "results.json"
    # what is no number becomes null, as JSON has none
    plain = json.loads(json.dumps(results, default=str), parse_constant=lambda constant: None)
    before = path.read_bytes() if path.exists() else None
    records.write_json(path, plain)
    text = tables.report(results)
    records.write_text(out / "table.txt", records.visible(text) + "\n")
    print(text)
    for note in dict.fromkeys(plain["notes"]):
        script.say(note)
    if before not in (None, path.read_bytes()):
        script.say(f"{path} held other results: replaced")
    print(f"evaluate.py: the same numbers with their settings are in {path}")


def main(args):
    toys.tune_process(args.captioner, args.generator)
    device, _ = devices.device_and_dtype(args.device)
    if args.job == "findings":
        args.data, args.split, args.judges, items = tables.made_of(
            args.findings, args.data, args.split, args.judges)
    binds = {name: str(getattr(args, name)) for name in JOBS[args.job] if name not in FREE}
    if args.job == "set":
        items, binds["content"] = items_of(args.data, args.split, args.limit)
        models = {name: getattr(args, name) for name in ("captioner", "generator", "ckpt")}
        binds |= records.marks(models, {*CAPTIONERS, *GENERATORS})
    process, processes = records.rank_and_world()
    if process == 0:
        if args.job == "set":
            records.same_settings(args.out, binds, write=False)
        path = args.out / "results.json"
        before = records.load_json(path) if path.exists() else None
        ours = isinstance(before, dict) and {"notes", "settings"} <= before.keys()
        records.claim(args.out, () if ours else ("results.json", "table.txt"))
    if processes > 1 and args.job == "set":
        dist.init_process_group("gloo", timeout=timedelta(days=7))   # all wait for the slowest
        dist.barrier()
    notes, results = [], {}
    with_notes = args.judges, device, notes
    if args.job in ("score", "compare"):
        files = args.compare or [args.score]
        items, said = inputs.matched(files, args.refs, notes, args.images)
        how = {"glove": args.glove, "pictures": args.images is not None}
    if args.job == "score":
        results["captions"] = tables.of_captions(items, *said, *with_notes, ci=args.ci, **how)
    elif args.job == "compare":
        results["compare"] = tables.compared(items, *said, *with_notes, **how)
    elif args.job == "labelfree":
        items, captions = inputs.pictured(args.captions, args.refs, args.images, notes)
        generator = Generator.load(args.generator, args.device, args.dtype)
        if args.ckpt:
            loading.load_trained(args.ckpt, None, generator)
        if args.generator == "miniature":
            notes.append("the miniature's generator knows no photographs: say --generator sd14")
        results["label_free"] = label_free(items, captions, generator, args.draws, args.seed,
                                           args.batch, notes)
    elif args.job == "findings":
        results = tables.findings(args.findings, items, *with_notes, args.glove)
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            tables.plot(results["findings"], args.out / "figure.png")
        except ImportError:
            notes.append("no figure.png: pip install matplotlib")
    else:
        if args.inception and args.only != "captions":
            judges.inception_weights(args.inception)           # now, not after the work
        speakers = {"captions": args.captioner, "images": args.generator}
        if args.only:
            speakers = {args.only: speakers[args.only]}
        how = {"captions": {"way": args.way, "seed": args.seed},
               "images": {"steps": args.steps, "guidance": args.guidance, "seed": args.seed,
                          "batch": args.batch}}
        work(items, args.out, speakers, args.ckpt, args.device, args.dtype, binds, args.batch, how)
        if process > 0:
            return 0
        if "captions" in speakers:
            results["captions"] = table_3(items, args.out, *with_notes, args.glove, args.ci)
        if "images" in speakers:
            results["images"] = table_4(items, args.out, *with_notes, args.inception, args.ci)
    settings = {name: getattr(args, name) for name in JOBS[args.job]}
    results |= {"notes": notes, "settings": settings, "revisions": loading.REVISIONS}
    write(results, args.out)
    return 0


if __name__ == "__main__":
    script.run(main, flags)
