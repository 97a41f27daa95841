"""Measures what the README claims, on the miniature, into results/*.json. Run again, it goes on where it stopped.

    make results                  # every part again, with fewer items and steps, into results/short: 2 h 20
    make results QUICK=1          # the parts QUICK, with fewer still, into results/quick: 13 minutes
    make results FULL=1           # as committed, into results: an estimated eight hours
    python results.py scorers     # one part, of --size full
    python report.py              # RESULTS.md, the figures and the README's tables, from results/*.json

Candidates, drawings and training come from rerank.py and finetune.py, run as a user runs them; this file adds what they
do not keep, the denoising loss of every candidate at every draw. Settings are chosen on val, not on test (in), near and
out; RESULTS.md, "Which timesteps?", says where that was not blind.
"""
import argparse
import atexit
import collections
import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from signal import SIGTERM
from signal import signal as on_signal

import numpy as np

HERE = Path(__file__).resolve().parent
DOMAINS = ("in", "near", "out")
DRAWS = (1, 2, 4, 6, 8, 12, 16, 32, 64)
SPANS = ((0, 1), (0, .5), (.1, .6), (.2, .8), (.3, 1), (.5, 1))
SUMS = ("ranks: clip + denoise", "ranks: clipscore + denoise", "ranks: clip + clipscore + denoise")
AHEAD = (("denoise", "clip"), ("denoise", "clipscore"), ("denoise 1", "clip"), ("clipscore", "clip"),      # compared
         ("denoise 16", "few"), ("halved 60", "denoise 6"), ("denoise 64", "denoise 12"))
WEIGHTS = {"even": lambda snr: np.ones_like(snr), "sqrt snr": lambda snr: snr ** .5,
           "min(snr, 5)": lambda snr: np.minimum(snr, 5)}
VAL = 50_000                                     # scenes of each domain from here on are val
QUICK = ("scorers", "pictures", "joint")              # the parts of --size quick: most of what report.claims reads
# items: pictures of a domain; aside: those scored in more ways; texts: drawn in few steps; steps: of other drawings;
# share: of all else that counts; train: steps of a training at most, if not what val chose; seen: scenes of a domain
# it is examined on; varied: seeds of `variants`
SIZES = {"quick": {"items": 30, "aside": 30, "texts": 10, "steps": 15, "share": .1, "draws": DRAWS[:-2], "train": 60,
                   "seen": 50, "seeds": 1, "varied": 1},
         "short": {"items": 500, "aside": 100, "texts": 100, "steps": 20, "share": .3, "draws": DRAWS[:-2], "train": 60,
                   "seen": 100, "seeds": 3, "varied": 1},
         "full": {"items": 500, "aside": 500, "texts": 500, "steps": 50, "share": 1, "draws": DRAWS, "train": None,
                  "seen": 300, "seeds": 3, "varied": 3}}
FROZEN = ("val", "scorers", "words", "findings", "texts", "pictures", "samplers")          # those that --dtype is for
CHILDREN = []                                                                            # of `run`, at work
PARTS = ("check", "scores", "val", "scorers", "findings", "texts", "pictures", "samplers", "words", "signal", "joint",
         "variants", "cost")


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", help=f"of {' '.join(PARTS)}; default all of them")
    p.add_argument("--size", choices=SIZES, default="full", help="of all that is counted; else into results/SIZE")
    p.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    p.add_argument("--dtype", default="float32", help="of the frozen cycles' models; bfloat16 if the CPU has it")
    p.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON files and figures")
    p.add_argument("--work", type=Path, default=HERE / "out/results", help="folder of candidates and checkpoints")
    args = p.parse_args(argv)
    args.parts = args.parts or list(QUICK if args.size == "quick" else PARTS)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        p.error(f"{', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    args.out, args.work = args.out.resolve(), args.work.resolve()
    if args.size != "full":
        args.out, args.work = args.out / args.size, args.work / args.size
    args.parts.sort(key=PARTS.index)
    vars(args).update(SIZES[args.size])
    return args


# ---------------------------------------------------------------- helpers
def run(args, script, *argv, several=True, threads=1, quiet=False):
    """One command of the README, as a user types it, its progress in view unless `quiet`. ValueError where it fails."""
    spread = several and args.processes > 1
    head = ["-m", "torch.distributed.run", f"--nproc_per_node={args.processes}"] if spread else []
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    print(f"results.py: python {' '.join([*head[1:], script, *map(str, argv)])}", flush=True)
    child = subprocess.Popen([sys.executable, *head, script, *map(str, argv)], cwd=HERE, env=env, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE if quiet else None)
    CHILDREN.append(child)
    try:
        said = (child.communicate()[1] or "").splitlines()
    except BaseException:                                                                # Ctrl-C, say
        child.terminate()
        raise
    finally:
        CHILDREN.remove(child)
    if child.returncode:
        own = [x for x in said if x.startswith(f"{script}: ")] or said[-3:] or ["what it said is above"]
        raise ValueError(f"{script} ended with exit code {child.returncode}: {' '.join(own)[-500:]}")


def ended(*signalled):
    """On SIGTERM: what was started ends too."""
    for child in (*CHILDREN, *multiprocessing.active_children()):
        child.terminate()
    os._exit(128 + SIGTERM)


def keep(args, name, found):
    """A part's JSON, with the machine and the settings behind it; written beside and renamed."""
    import platform

    import torch
    cpu = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x),
               platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    about = {"machine": f"{os.cpu_count()} cores, {cpu}", "torch": torch.__version__, "size": args.size,
             "dtype": args.dtype if name in FROZEN else "float32"}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    path.with_suffix(".new").write_text(json.dumps({"about": about} | rounded(found), indent=1) + "\n")
    os.replace(path.with_suffix(".new"), path)


def rounded(x):
    """Five digits, and null for what is no number: the files stay readable, and equal on equal runs."""
    if isinstance(x, dict):
        return {str(k): rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [rounded(v) for v in x]
    if isinstance(x, (float, np.floating)):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x.item() if isinstance(x, np.generic) else x


def read(args, kind, domain):
    """{item: its rows by candidate} of work/KIND-DOMAIN, which rerank.py wrote."""
    groups = {}
    for line in (args.work / f"{kind}-{domain}" / "candidates.jsonl").read_text().splitlines():
        row = json.loads(line)
        groups.setdefault(row["item"], []).append(row)
    return {k: sorted(v, key=lambda r: r["candidate"]) for k, v in groups.items()}


def scene_of(path, world):
    """The scene of a picture of the set: its folder and number are its split and index."""
    return world.sample(Path(path).parent.name, int(Path(path).stem))


def truth(caption, scene, world):
    """Share of the facts a caption states that are true."""
    right, stated = world.verify(caption, scene)
    return right / stated if stated else 0.0


def share(args, count):
    """How many of `count` things, of the full size, are counted at this one."""
    return round(args.share * count)


def mean_of(values, metrics):
    values = np.asarray(values, np.float64)
    low, high = metrics.interval(values)
    return {"value": values.mean(), "low": low, "high": high, "n": len(values)}


def world_set(args):
    """The set: pictures drawn for this measurement, in NoCaps' and Karpathy's schemas."""
    if not (args.work / "data" / "nocaps_val_4500_captions.json").exists():
        run(args, "miniature.py", "--parts", "splits", "--out", args.work, "--count", args.items, several=False)
    return args.work / "data"


# ---------------------------------------------------------------- candidates
def candidates(args):
    """Three runs of rerank.py a domain: ten samples by the full cycle and in few steps, three beams in few steps."""
    data = world_set(args)
    for domain in DOMAINS:
        common = ["--data", data, "--split", domain, "--dtype", args.dtype]
        run(args, "rerank.py", "-n", 10, "--scorer", "full", "--agree", args.aside // 5, "--steps", args.steps,
            *common, "--out", args.work / f"full-{domain}")
        run(args, "rerank.py", "-n", 10, "--scorer", "few", "--limit", args.aside, *common,
            "--out", args.work / f"few-{domain}")
        run(args, "rerank.py", "-n", 3, "--scorer", "few", "--way", "beam", *common, "--out",
            args.work / f"beam-{domain}")


def start(dtype):
    """In each process: one thread, the generator."""
    import torch

    import cycle
    torch.set_num_threads(1)
    start.generator = cycle.Generator.load("miniature", "cpu", dtype)


def measure(job):
    """Denoising losses of an item's captions at every draw; span None: scores by halving, `draws` is the budget."""
    import cycle
    import data
    path, item, captions, draws, span = job
    image = data.open_image(path)[None]
    if span is None:
        found = cycle.score(start.generator, image, captions, budget=draws, item=item)
        return {"item": item, "captions": captions, "timesteps": [found.evaluations], "loss": [(-found.score).tolist()]}
    found = cycle.score(start.generator, image, captions, draws, item=item, span=tuple(span))
    return {"item": item, "captions": captions, "timesteps": found.timesteps.tolist(),
            "loss": [[float(f"{v:.6g}") for v in row] for row in found.loss.tolist()]}


def measure_pictures(job):
    """Scores of ten pictures given a text by the denoising loss: as it is, and less that of the empty caption."""
    import cycle
    import data
    paths, item, text = job
    images = [data.open_image(p) for p in paths]
    own, none = (cycle.score(start.generator, images, [c], item=item, empty=False).score for c in (text, ""))
    return {"item": item, "own": own.tolist(), "less": (own - none).tolist()}


@functools.cache
def workers(processes, dtype):
    """Processes of one thread, each with the generator, for all that `measured` has to do."""
    from concurrent.futures import ProcessPoolExecutor
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start, (dtype,))
    atexit.register(pool.shutdown)                                      # before the modules go, which it needs
    return pool


def measured(args, name, f, jobs):
    """{item: f(job)} of jobs (where its pictures are, item, settings ...), by --processes `workers`; a line an item in
    work/NAME.jsonl, where what is done by the same settings is not done again."""
    from tqdm import tqdm
    path, done = args.work / f"{name}.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.endswith("}"):
            row = json.loads(line)
            done[row["item"]] = row
    setting = {job[1]: json.loads(json.dumps([*job[2:], args.dtype])) for job in jobs}
    todo = [job for job in jobs if done.get(job[1], {}).get("setting") != setting[job[1]]]
    if todo:
        with open(path, "a", buffering=1) as out:
            if out.tell():
                out.write("\n")
            rows = workers(args.processes, args.dtype).map(f, todo, chunksize=4)
            for row in tqdm(rows, total=len(todo), desc=name):
                row["setting"] = setting[row["item"]]
                out.write(json.dumps(row) + "\n")
                done[row["item"]] = row
    return {job[1]: done[job[1]] for job in jobs}


def denoised(args, name, jobs):
    """{item: (captions, timesteps (draws,), losses (draws, n))} of `measure`'s jobs."""
    return {k: (row["captions"], np.array(row["timesteps"]), np.array(row["loss"]))
            for k, row in measured(args, name, measure, jobs).items()}


def some(total, count, *key):
    """`count` of `total` stratified draws: one of each of as many parts, by a chance that is a function of the key."""
    dice = np.random.default_rng([zlib.crc32(str(k).encode()) for k in (*key, count)])
    return np.array([dice.choice(part) for part in np.array_split(np.arange(total), count)])


# ---------------------------------------------------------------- scoring without drawing
def val(args):
    """Which timesteps and weights of the denoising loss: CIDEr gain of choosing one of ten captions of a val scene,
    12 draws over the whole schedule."""
    import torch

    import cycle
    import data
    import metrics
    import world
    count, items = share(args, 300), []
    for domain, i in itertools.product(("val", "near", "out"), range(VAL, VAL + count)):
        scene, path = world.sample(domain, i), args.work / "val" / domain / f"{i}.png"
        if not path.exists():
            data.save_image(torch.from_numpy(world.draw(scene).copy()).permute(2, 0, 1) / 255, path)
        items.append(data.Item(f"val {domain} {i}", path, world.captions(scene)))
    captioner, said = cycle.Captioner.load("miniature", "cpu", args.dtype), []
    for i in range(0, len(items), 50):
        part = items[i:i + 50]
        said += captioner.speak([data.open_image(x.path) for x in part], 10, items=[x.name for x in part])[0]
    found = denoised(args, "denoise-val", [(str(x.path), x.name, c, 12, (0, 1)) for x, c in zip(items, said)])
    df = metrics.document_frequency([x.captions for x in items])
    alphas = cycle.Generator.load("miniature", "cpu").scheduler.alphas_cumprod.double().numpy()
    snr = alphas / (1 - alphas)
    quality = np.stack([100 * metrics.cider(c, [x.captions] * 10, df) for x, c in zip(items, said)])
    rows = []

    def chosen(pick, f):
        """Scores by the draws that pick(item, timesteps) tells, weighted by f(SNR), and the quality of the choice."""
        score = []
        for x, c in zip(items, said):
            own, t, loss = found[x.name]
            at = pick(x.name, t)
            w = f(snr[t[at]])
            value = dict(zip(own, -(w[:, None] * loss[at]).sum(0) / w.sum()))
            score.append([value[k] for k in c])
        return score, np.take_along_axis(quality, np.argmax(score, 1)[:, None], 1)[:, 0]
    for span, (weight, f) in itertools.product(SPANS, WEIGHTS.items()):
        def inside(name, t, span=span):
            return np.flatnonzero((t >= span[0] * 1000) & (t < span[1] * 1000))
        score, own = chosen(inside, f)
        draws = {k: len(inside(k, t)) for k, (_, t, _) in found.items()}
        even = chosen(lambda k, t, n=draws: some(len(t), n[k], k), WEIGHTS["even"])[1]          # at the same cost
        best = metrics.choices(quality, score)
        rows.append({"span": span, "weight": weight, "gain": best["gain"], "interval": best["interval"],
                     "draws": np.mean(list(draws.values())), "minus even": mean_of(own - even, metrics)})
    keep(args, "val", {"items": len(items), "mean": quality.mean(), "rows": rows})


def gather(args, domain, metrics, world, data):
    """Everything known of a domain, of ten samples and then three beams an item: names, captions, scores (items, 13 or
    10) by name, nan where an item has none, UNet evaluations by name, quality (items, 13) by name."""
    drawn, beam, few = (read(args, kind, domain) for kind in ("full", "beam", "few"))
    items = {x.name: x for x in data.read(world_set(args), domain)}
    names = list(drawn)
    pool = [drawn[k] + beam[k] for k in names]
    said = [[r["caption"] for r in rows] for rows in pool]
    if any(r["caption"] != s["caption"] for k in few for r, s in zip(drawn[k], few[k], strict=True)):
        raise ValueError(f"{args.work}: full-{domain} and few-{domain} hold other captions; remove them")
    jobs = [(str(items[k].path), k, list(dict.fromkeys(c)), 12, (0, 1)) for k, c in zip(names, said)]
    ten = [(p, k, list(dict.fromkeys(c[:10]))) for (p, k, *_), c in zip(jobs, said)][:args.aside]
    own = denoised(args, f"denoise-{domain}", jobs)
    loss = denoised(args, f"draws-{domain}", [(*job, args.draws[-1], (0, 1)) for job in ten])
    halved = denoised(args, f"halved-{domain}", [(*job, 60, None) for job in ten])
    unique = np.array([len(set(c[:10])) for c in said])
    score = {name: np.array([[r["scores"][name] for r in drawn[k]] for k in names])
             for name in ("clip", "dino", "pixel")}
    for name in ("clipscore", "likelihood"):
        score[name] = np.array([[r["scores"][name] for r in rows] for rows in pool])
    score["few"] = np.array([[r["scores"]["clip"] for r in few[k] + beam[k]] if k in few else [math.nan] * 13
                             for k in names])
    score["again"] = np.array([[r["scores"].get("clip again") for r in drawn[k]] for k in names], np.float64)
    full = unique * 2 * args.steps
    cost = {"clip": full, "dino": full, "pixel": full, "again": full, "few": unique * 16, "denoise": unique * 12,
            "clipscore": 0 * unique, "likelihood": 0 * unique}
    score["denoise"] = by_caption({k: (c, -x.mean(0)) for k, (c, _, x) in own.items()}, names, said)
    for draws in args.draws:
        part = {k: (c, -x[some(len(x), draws, k)].mean(0)) for k, (c, _, x) in loss.items()}
        score[f"denoise {draws}"] = by_caption(part, names, [c[:10] for c in said])
        cost[f"denoise {draws}"] = unique * draws
    score["halved 60"] = by_caption({k: (c, -x[0]) for k, (c, _, x) in halved.items()}, names, [c[:10] for c in said])
    cost["halved 60"] = np.array([halved[k][1][0] if k in halved else 0 for k in names])
    scenes = [scene_of(items[k].path, world) for k in names]
    quality = {"facts": np.array([[truth(c, s, world) for c in row] for row, s in zip(said, scenes)])}
    return {"names": names, "said": said, "score": score, "cost": cost, "quality": quality,
            "references": [items[k].captions for k in names], "paths": [items[k].path for k in names],
            "domain": np.array([domain] * len(names))}


def by_caption(values, names, said):
    """(items, n) of {item: (captions, their values)}, nan where an item is not among them."""
    found = [dict(zip(*values[k])) if k in values else dict.fromkeys(c, math.nan) for k, c in zip(names, said)]
    return np.array([[f[c] for c in row] for f, row in zip(found, said)])


def together(args, metrics, world, data):
    """`gather` of the three domains in one; CIDEr with the document frequency of all of them."""
    parts = [gather(args, d, metrics, world, data) for d in DOMAINS]
    whole = {k: {n: np.concatenate([p[k][n] for p in parts]) for n in parts[0][k]}
             for k in ("score", "cost", "quality")}
    whole |= {k: [x for p in parts for x in p[k]] for k in ("names", "said", "references", "paths")}
    whole["domain"] = np.concatenate([p["domain"] for p in parts])
    df = metrics.document_frequency(whole["references"])
    whole["quality"]["CIDEr"] = np.stack([100 * metrics.cider(c, [r] * len(c), df)
                                          for c, r in zip(whole["said"], whole["references"])])
    return whole


def seconds(args, w, data, metrics):
    """Seconds a picture of each way to score ten captions, in float32 on all cores, the fastest of three passes:
    {scorer: seconds, "items": n, "threads": n}. To be run with nothing beside it."""
    import torch

    import cycle
    torch.set_num_threads(args.processes)
    generator, few = cycle.Generator.load("miniature", "cpu"), cycle.few_steps(cycle.Generator.load("miniature", "cpu"))
    judges = metrics.likenesses(["clip", "dino", "pixel"], "image", "miniature")
    at = np.linspace(0, len(w["names"]) - 1, 1 if args.size == "quick" else 4).astype(int)
    work = [(data.open_image(w["paths"][i]), list(dict.fromkeys(w["said"][i][:10]))) for i in at]

    def clock(f):
        f(*work[0])
        passes = []
        for _ in range(1 if args.size == "quick" else 3):
            begun = time.perf_counter()
            for image, captions in work:
                f(image, captions)
            passes.append((time.perf_counter() - begun) / len(work))
        return min(passes)
    judging = {k: clock(lambda x, c, f=f: f(x.expand(len(c), -1, -1, -1), x[None])) for k, f in judges.pairs.items()}
    drawing, eight = (clock(lambda x, c, g=g, n=n: g.draw(c, [0] * len(c), steps=n, batch=40))
                      for g, n in ((generator, args.steps), (few, 8)))
    out = {name: drawing + s for name, s in judging.items()} | {"again": drawing + judging["clip"]}
    out |= {"few": eight + judging["clip"], "clipscore": clock(lambda x, c: judges.clipscore(x[None], c)),
            "denoise": clock(lambda x, c: cycle.score(generator, x[None], c)),
            "halved 60": clock(lambda x, c: cycle.score(generator, x[None], c, budget=60))}
    out |= {f"denoise {k}": clock(lambda x, c, k=k: cycle.score(generator, x[None], c, k)) for k in args.draws}
    return out | {"items": len(work), "threads": args.processes}


def scorers(args):
    """Scorer x (UNet evaluations, agreement with the full cycle, gain kept, against beam search), by domain."""
    from scipy.stats import kendalltau

    import data
    import metrics
    import world
    candidates(args)
    w = together(args, metrics, world, data)
    quality, said = w["quality"]["CIDEr"], w["said"]
    beam = quality[:, 10]                                             # the first of three beams is beam search's answer
    full, rows, picked = pick(w["score"], "clip", 10), {}, {}
    for name in (*w["score"], *SUMS):
        first, pool = pick(w["score"], name, 10), pick(w["score"], name, 13)
        here = ~np.isnan(first).any(1)
        cost = sum(w["cost"][k] for k in name.removeprefix("ranks: ").split(" + "))
        row = {"evaluations": float(cost[here].mean()), "items": int(here.sum())}
        a, b = first.argmax(1), full.argmax(1)
        same = np.array([said[i][j] == said[i][k] for i, (j, k) in enumerate(zip(a, b))])
        tau = np.array([kendalltau(x, y).statistic for x, y in zip(first, full)])
        chosen, mean = np.take_along_axis(quality, a[:, None], 1)[:, 0], quality[:, :10].mean(1)
        gain, other = chosen - mean, np.take_along_axis(quality, b[:, None], 1)[:, 0] - mean
        picked[name] = np.where(here, chosen, math.nan)
        for domain in ("all", *DOMAINS):
            at = np.flatnonzero(here & ((w["domain"] == domain) | (domain == "all")))
            c = metrics.choices(quality[at, :10], first[at])
            kept = metrics.resampled(lambda r, g=gain[at], f=other[at]: g[r].mean() / f[r].mean(), len(at))
            row[domain] = {k: c[k] for k in ("mean", "chosen", "oracle", "gain", "interval", "items")} | {
                "kept": c["gain"] / other[at].mean(),
                "kept_interval": kept, "same": mean_of(same[at], metrics),
                "tau": mean_of(tau[at][~np.isnan(tau[at])], metrics),
                "over_beam": mean_of(gain[at] + mean[at] - beam[at], metrics)}
            if pool is not None:                                       # the three beams join the ten samples
                d = pool[at].argmax(1)
                row[domain]["with_beams"] = mean_of(quality[at, d], metrics)
                row[domain]["with_beams_over_beam"] = mean_of(quality[at, d] - beam[at], metrics)
        rows[name] = row
    ahead = {f"{a} minus {b}": picked[a] - picked[b] for a, b in AHEAD if a in picked}
    by_domain = {d: (w["domain"] == d) | (d == "all") for d in ("all", *DOMAINS)}
    keep(args, "scorers", {
        "beam": {d: mean_of(beam[at], metrics) for d, at in by_domain.items()}, "scorers": rows,
        "differences": {k: {d: mean_of(x[at & ~np.isnan(x)], metrics) for d, at in by_domain.items()}
                        for k, x in ahead.items()},
        "seconds": seconds(args, w, data, metrics)})


def pick(score, name, width):
    """Scores (items, width) of a name, or of `ranks: A + B` the sum of ranks among these; None if there are fewer."""
    parts = [score[k] for k in name.removeprefix("ranks: ").split(" + ")]
    if min(x.shape[1] for x in parts) < width:
        return None
    parts = [x[:, :width] for x in parts]
    return -sum((x[:, :, None] < x[:, None, :]).sum(2) for x in parts) if name.startswith("ranks: ") else parts[0]


# ---------------------------------------------------------------- joint training
PAIRED, KNOWN, OWN = "--split all --losses ", "--split train --losses ", "--split train --own all --losses "
TABLE = {"tg": PAIRED + "tg", "ig": PAIRED + "ig", "tg + ir": PAIRED + "tg ir", "ig + tr": PAIRED + "ig tr",
         "all four": PAIRED + "tg ir ig tr", "ir": PAIRED + "ir",          # Tables 3 to 5: every picture has captions
         "known pairs: tg": KNOWN + "tg", "known pairs: ig": KNOWN + "ig",
         "known pairs: tg + ir": KNOWN + "tg ir",
         "own words: tg + ir": OWN + "tg ir", "own words: all four": OWN + "tg ir ig tr"}
VARIANTS = {"own words, plain bridge": OWN + "tg ir --bridge plain",
            "own words, word bridge (straight through)": OWN + "tg ir --bridge word",
            "own words, temperature 0.5": OWN + "tg ir --temperature .5",
            "own words, kv trained": OWN + "tg ir --unfreeze kv q",
            "own words, kv trained, the queries' rate": OWN + "tg ir --unfreeze kv q",
            "known pairs: tg, kv trained": KNOWN + "tg --unfreeze kv q",
            "tg, kv trained": PAIRED + "tg --unfreeze kv q",
            "own words, q, k, v trained": OWN + "tg ir --unfreeze qkv q",
            "ig + tr, tr where t < 600": PAIRED + "ig tr --tmax 600",
            "ig + tr, q, k, v trained": PAIRED + "ig tr --unfreeze q qkv"}
KV = "own words, kv trained", "known pairs: tg, kv trained", "tg, kv trained"             # have their own rate from val
RATES = 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2                              # learning rates of the captioner
STEPS = 100, 200, 400
# what each row must beat, (captions, drawings): the same described pictures without the other model
ALONE = {**dict.fromkeys(("tg + ir", "ig + tr", "all four", "ir"), ("tg", "ig")), **dict.fromkeys(
    ("known pairs: tg + ir", "own words: tg + ir", "own words: all four"), ("known pairs: tg", "known pairs: ig")),
    **{k: ("own words: tg + ir" if k.startswith("own") else "ig + tr",) * 2 for k in VARIANTS},
    "known pairs: tg, kv trained": ("known pairs: tg",) * 2, "tg, kv trained": ("tg",) * 2,
    **dict.fromkeys(("own words, kv trained", "own words, kv trained, the queries' rate"),
                    ("known pairs: tg, kv trained",) * 2)}


def begin():
    """In each process: one thread, both models as shipped, and the reader that counts what was drawn right."""
    import torch

    import cycle
    import world
    torch.set_num_threads(1)
    start.captioner, start.generator = cycle.Captioner.load(device="cpu"), cycle.Generator.load(device="cpu")
    start.plain = [p.data.clone() for m in (start.captioner.model, start.generator.unet) for p in m.parameters()]
    start.reader = world.reader(HERE / "miniature/reader/model.safetensors")


def examine(job):
    """A trained pair (None: as shipped) on scenes of a domain: the captions by 3 beams, their share of true facts, the
    caption loss of a human caption; with `drawn`, its denoising loss, and whether its drawing (8 steps of
    DPM-Solver++) has every colour-shape pair right."""
    import torch

    import cycle
    import losses
    import world
    checkpoint, domain, indices, drawn = job
    captioner, generator = start.captioner, start.generator
    own = [p for m in (captioner.model, generator.unet) for p in m.parameters()]
    for p, plain in zip(own, start.plain):
        p.data.copy_(plain)
    if checkpoint:
        cycle.adopt(checkpoint, captioner, generator)
    scenes = [world.sample({"in": "test"}.get(domain, domain), i) for i in indices]
    images = [torch.from_numpy(world.draw(s).copy()).permute(2, 0, 1) / 255 for s in scenes]
    human = [world.full_caption(s) for s in scenes]
    said = [row[0] for row in captioner.speak(images, 1, "beam")[0]]
    with torch.no_grad():
        tg = losses.caption_loss(captioner.read(images, human)).tolist()
    rows = [{"domain": domain, "caption": c, "facts": truth(c, s, world), "tg": l, "references": world.captions(s)}
            for c, s, l in zip(said, scenes, tg)]
    if drawn:
        found = [cycle.score(generator, x[None], [c], 8, item=[domain, i]).score.item()
                 for i, x, c in zip(indices, images, human)]
        pictures = cycle.few_steps(generator).draw(human, [[domain, i] for i in indices], 0, 8, batch=25)
        for row, score, seen, s in zip(rows, found, world.look(start.reader, pictures), scenes):
            row |= {"ig": -score, "pairs": float(world.pairs(seen) == world.pairs(s))}
    return rows


def train(args, jobs):
    """Runs of finetune.py, one thread each, --processes at a time: {name: flags}. What is trained is kept."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    def one(job):
        name, argv = job
        out = args.work / "joint" / name
        command, argv = out / "command.json", [str(x) for x in argv]
        if command.exists() and json.loads(command.read_text()) != argv:                   # of other settings
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        command.write_text(json.dumps(argv))
        begun, about = (out / "checkpoint.safetensors").exists(), out / "checkpoint.json"
        if about.exists() and json.loads(about.read_text())["step"] == int(argv[argv.index("--steps") + 1]):
            return
        run(args, "finetune.py", *argv, "--out", out, *["--resume"] * begun, several=False, quiet=True)
    with ThreadPoolExecutor(args.processes) as pool:
        list(tqdm(pool.map(one, jobs.items()), total=len(jobs), desc="train"))


def examined(args, jobs):
    """{name: rows of `examine`} for jobs {name: (checkpoint, first index, count, how many of a domain are drawn)};
    kept by name."""
    from concurrent.futures import ProcessPoolExecutor

    from tqdm import tqdm
    folder, found, parts = args.work / "examined", {}, []
    folder.mkdir(parents=True, exist_ok=True)
    for name, (checkpoint, first, count, drawn) in jobs.items():
        path = folder / f"{name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {"job": None}
        if kept["job"] == [first, count, drawn, stamp(checkpoint)]:
            found[name] = kept["rows"]
            continue
        parts += [(name, (checkpoint, d, list(range(first + i, first + min(i + 25, count))), i < drawn))
                  for d in DOMAINS for i in range(0, count, 25)]
    left = collections.Counter(name for name, _ in parts)
    if parts:
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), begin) as pool:
            for (name, _), rows in zip(parts, tqdm(pool.map(examine, [job for _, job in parts]), total=len(parts),
                                                   desc="examine")):
                found.setdefault(name, []).extend(rows)
                left[name] -= 1
                if not left[name]:
                    checkpoint, *job = jobs[name]
                    path = folder / f"{name}.json"
                    path.with_suffix(".new").write_text(json.dumps({"job": [*job, stamp(checkpoint)],
                                                                    "rows": found[name]}))
                    os.replace(path.with_suffix(".new"), path)
    return found


def stamp(checkpoint):
    """What a run was trained with: its command line."""
    return json.loads((Path(checkpoint) / "command.json").read_text()) if checkpoint else None


def marks(rows, metrics):
    """{measure: (items,)} of `examine`'s rows, nan where it was not taken; CIDEr x 100 with their own document
    frequency."""
    out = {k: np.array([r.get(k, math.nan) for r in rows]) for k in ("facts", "tg", "ig", "pairs")}
    return {"CIDEr": 100 * metrics.cider([r["caption"] for r in rows], [r["references"] for r in rows])} | out


def tuned(args, metrics, keys=False):
    """What val chooses, by the mean CIDEr of the three domains and of two seeds: ({"paired", "own", "known": {"lr",
    "ir", "steps"}, "tr": its weight in all four, "generator": its lr, by its denoising loss, "kv": {row: lr} with
    `keys`}, what was tried). Rows that are compared have equal steps: `known`, those of `own`."""
    tried, generator = {}, None
    none = marks(examined(args, {"val none": (None, VAL, 150, 50)})["val none"], metrics)
    tried["none"] = {k: float(np.nanmean(v)) for k, v in none.items()}

    def best(row, rates, weights=({},), steps=(200,), score=lambda x: x["CIDEr"]):
        """(lr, {loss: weight}, steps): the best of all combinations for a row of TABLE."""
        options = {f"{row}, lr {lr:g}" + "".join(f", {k} {v:g}" for k, v in w.items()) + f", {n} steps" * (n != 200):
                   (lr, w, n) for lr, w, n in itertools.product(rates, weights, steps)}
        runs = {(name, seed): f"val {name}, seed {seed}" for name in options for seed in (98, 99)}
        words = (TABLE | VARIANTS)[row]
        train(args, {run: argv(words, (options[name][0], generator or options[name][0]), *options[name][1:], seed)
                     for (name, seed), run in runs.items()})
        found = examined(args, {run: (str(args.work / "joint" / run), VAL, 150, 50 * (row == "ig"))
                                for run in runs.values()})
        for name in options:
            per = [marks(found[runs[name, seed]], metrics) for seed in (98, 99)]
            tried[name] = {k: float(np.mean([x[k][~np.isnan(x[k])].mean() for x in per])) for k in per[0]
                           if not np.isnan(per[0][k]).all()}
        return options[max(options, key=lambda name: score(tried[name]))]
    generator = best("ig", (3e-5, 1e-4, 1e-3), score=lambda x: -x["ig"])[0]
    rate = best("tg", RATES)[0]
    ir = best("tg + ir", [rate], [{"ir": w} for w in (.3, 1, 10, 30)])[1]
    paired = best("tg + ir", [rate], [ir], STEPS)
    own = best("own words: tg + ir", RATES[1:4], [{"ir": w} for w in (3, 10, 30, 100)])
    own = best("own words: tg + ir", [own[0]], [own[1]], STEPS)
    known = best("known pairs: tg", RATES)[0], *own[1:]
    tr = best("all four", [rate], [ir | {"tr": w} for w in (.3, 1, 3)])[1]["tr"]
    kv = {row: best(row, RATES[:5], *([x] for x in like[1:]))[0]
          for row, like in zip(KV if keys else (), (own, (known[0], {}, known[2]), (paired[0], {}, paired[2])))}
    return {k: {"lr": lr, "ir": w["ir"], "steps": n} for k, (lr, w, n) in (
        ("paired", paired), ("own", own), ("known", known))} | {"tr": tr, "generator": generator, "kv": kv}, tried


def argv(flags, lrs, weights, steps, seed):
    """The command line of a run: {loss: weight}, 1 of those that are not named."""
    losses = flags.split("--losses ")[1].split(" --")[0].split()
    return [*flags.split(), "--weights", *[weights.get(k, 1) for k in losses], "--lr", *lrs, "--seed", seed,
            "--steps", steps, "--every", steps, "--probe", 100, "--held", 0]


def joint(args):
    """Which losses teach what (Tables 3 to 5): each row from the same start, in the same order of data."""
    if args.size == "quick":
        rows = {k: TABLE[k] for k in ("known pairs: tg", "own words: tg + ir")}
        keep(args, "joint", taught(args, rows, args.seeds)[0])
        return
    found = taught(args, TABLE, args.seeds)
    norms = {k: json.loads((args.work / "joint" / f"{k} 0" / "log.jsonl").read_text().split("\n")[0])
             for k in ("all four", "own words: all four")}
    keep(args, "joint", found[0] | {
        "shown": before_and_after(args, found[1]),
        "norms": {k: {n: v for n, v in x.items() if n.startswith("norm_")} for k, x in norms.items()}})


def variants(args):
    """Bridges, temperature, what is unfrozen, tr's noise range (appendix I), beside the row each one varies."""
    varied = "tg", "known pairs: tg", "own words: tg + ir", "ig + tr"
    found = taught(args, {k: TABLE[k] for k in varied} | VARIANTS, args.varied)[0]
    keep(args, "variants", found | {"val": {k: v for k, v in found["val"].items() if "kv trained" in k}})


def draws(flags):
    """Whether a row trains the generator."""
    losses = set(flags.split("--losses ")[1].split(" --")[0].split())
    return losses != {"tg"} and ("--own" not in flags or bool(losses & {"ig", "tr"}))


def taught(args, rows, seeds):
    """({what was trained, and {row: {domain: {measure: mean, and its difference to none and to ALONE}}}}, what
    `examine` saw) of rows {name: flags}."""
    import metrics
    if args.train:                                                        # what an earlier full run chose, fewer steps
        chosen, tried = json.loads((HERE / "results/variants.json").read_text())["chosen"], {}
        for kind in ("paired", "own", "known"):
            chosen[kind]["steps"] = args.train
    else:
        chosen, tried = tuned(args, metrics, any(k in KV for k in rows))
    setting = {k: chosen["paired" if f.startswith(PAIRED) else "own" if "ir" in f.split() else "known"]
               for k, f in rows.items()}
    setting = {k: v | {"lr": chosen["kv"][k]} if k in KV else v for k, v in setting.items()}
    runs = {f"{name} {seed}": argv(f, (setting[name]["lr"], chosen["generator"]), {
        "ir": setting[name]["ir"], "tr": chosen["tr"]}, setting[name]["steps"], seed)
            for seed in range(seeds) for name, f in rows.items()}
    train(args, runs)
    count, drawn = args.seen, args.seen // 75 * 25 or 25                                # a third, by the 25 of a job
    found = examined(args, {"none": (None, 10_000, count, drawn)} | {
        k: (str(args.work / "joint" / k), 10_000, count, drawn * draws(rows[k.rsplit(" ", 1)[0]])) for k in runs})
    domain = np.array([r["domain"] for r in found["none"]])
    each = {"none": {k: v[None] for k, v in marks(found["none"], metrics).items()}}
    for name in rows:
        per = [marks(found[f"{name} {seed}"], metrics) for seed in range(seeds)]
        each[name] = {k: np.stack([p[k] for p in per]) for k in per[0]}                      # (seeds, items)
    out = {name: {d: {} for d in ("all", *DOMAINS)} for name in each}
    for name, d in itertools.product(each, ("all", *DOMAINS)):
        for k, v in each[name].items():
            at = ((domain == d) | (d == "all")) & ~np.isnan(v[0])
            if not at.any():
                continue
            alone = ALONE.get(name, ("none", "none"))[k in ("ig", "pairs")]
            out[name][d][k] = over_seeds(v[:, at], metrics)
            for key, other in (("minus none", "none"), ("minus alone", alone),
                               *[("minus queries", "own words: tg + ir")] * name.startswith("own words, kv trained")):
                if other in each and not np.isnan(each[other][k][:, at]).any():
                    out[name][d][f"{k} {key}"] = over_seeds(v[:, at] - each[other][k][:, at], metrics)
    return {"seeds": seeds, "chosen": chosen, "val": tried, "rows": out,
            "commands": {k: " ".join(map(str, ["finetune.py", *runs[f"{k} 0"]])) for k in rows},
            "alone": {k: v for k, v in ALONE.items() if k in rows and v[0] in rows}}, found


def over_seeds(values, metrics):
    """Mean of (seeds, items), its 95 % interval with both resampled, and the mean of each seed."""
    dice, n = np.random.default_rng(0), len(values)
    low, high = metrics.resampled(lambda r: values[dice.integers(n, size=n)].mean(0)[r].mean(), values.shape[1])
    return {"value": values.mean(), "low": low, "high": high, "n": values.shape[1], "seeds": values.mean(1)}


def before_and_after(args, found, most=6):
    """By rule: the first scenes of out whose beam caption was changed by own words and all four losses (seed 0).
    Captions before and after, and drawings of a human caption from equal noise (50 steps), as PNGs in base64."""
    import base64
    import io

    import torch
    from PIL import Image

    import cycle
    name = "own words: all four 0"
    rows = [(a, b) for a, b in zip(found["none"], found[name]) if a["domain"] == "out"]
    picked = [(i, a, b) for i, (a, b) in enumerate(rows) if a["caption"] != b["caption"]][:most]
    if not picked:
        return []
    human, drawn = [a["references"][0] for _, a, _ in picked], []
    for checkpoint in (None, args.work / "joint" / name):
        generator = cycle.Generator.load("miniature", "cpu")
        if checkpoint:
            cycle.adopt(checkpoint, cycle.Captioner.load("miniature", "cpu"), generator)
        drawn.append([])
        for x in generator.draw(human, [["out", i] for i, *_ in picked]):
            buffer = io.BytesIO()
            Image.fromarray((x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(buffer, "PNG")
            drawn[-1].append(base64.b64encode(buffer.getvalue()).decode())
    return [{"scene": ["out", 10_000 + i], "human": h, "captions": [a["caption"], b["caption"]],
             "facts": [a["facts"], b["facts"]], "drawings": list(d)}
            for (i, a, b), h, d in zip(picked, human, zip(*drawn))]


def signal(args):
    """What there is to learn from, on val: by timestep, how much worse the denoising loss is under a wrong caption, and
    how well the captioner reads the one-step estimate; how often one noise tells the wrong word from the right one."""
    import torch

    import cycle
    import losses
    import metrics
    import world
    torch.set_num_threads(args.processes)
    captioner, generator = cycle.Captioner.load("miniature", "cpu"), cycle.Generator.load("miniature", "cpu")
    count, rows = share(args, 120), []
    scenes = [world.sample({"in": "test"}.get(d, d), VAL + i) for d in DOMAINS for i in range(count // 3)]
    images = torch.stack([torch.from_numpy(world.draw(s).copy()).permute(2, 0, 1) / 255 for s in scenes])
    human = [world.full_caption(s) for s in scenes]
    wrong = [spoil(c, s, ("colour", "shape")[i % 2], i, world) for i, (c, s) in enumerate(zip(human, scenes))]
    g, scheduler = cycle.chance("signal"), generator.scheduler
    with torch.no_grad():
        clean = losses.caption_loss(captioner.read(images, human)).mean().item()
        other = losses.caption_loss(captioner.read(images.roll(1, 0), human)).mean().item()
        x = generator.encode(images)[0].float()
        for low in range(0, 1000, 100):
            gaps, ce = [], []
            for _ in range(4):
                t = torch.randint(low, low + 100, (len(x),), generator=g)
                noise = torch.randn(x.shape, generator=g)
                noised = losses.add_noise(scheduler, x, noise, t)
                out = [generator.predict(noised, t, generator.states(c)) for c in (human, wrong)]
                loss = [(o - losses.target(scheduler, x, noise, t)).square().mean((1, 2, 3)) for o in out]
                gaps.append((loss[1] - loss[0]).numpy())
                ce.append(losses.caption_loss(captioner.read(generator.decode(
                    losses.one_step(scheduler, noised, out[0], t)), human)).numpy())
            rows.append({"timesteps": [low, low + 100], "gap": mean_of(np.mean(gaps, 0), metrics),
                         "found_out": float((np.stack(gaps) > 0).mean()), "tr": mean_of(np.mean(ce, 0), metrics)})
    keep(args, "signal", {"items": len(scenes), "tg": clean, "tg_of_another_picture": other, "rows": rows})


def spoil(caption, scene, kind, seed, world):
    """The caption with one colour or shape word exchanged for one that is nowhere in the scene."""
    table = {w: name for w, (k, name) in world.WORDS.items() if k == kind}
    dice, words = np.random.default_rng([seed, 5]), caption.split()
    at = dice.choice([i for i, w in enumerate(words) if w in table])
    words[at] = str(dice.choice(sorted(w for w, n in table.items() if n not in [o[kind] for o in scene["objects"]])))
    return " ".join(words)


def planted(job):
    """Is a planted wrong colour or shape the word that contributes least to its caption?"""
    import torch

    import cycle
    import world
    _, item, kind, split, i = job
    scene = world.sample(split, i)
    true = world.full_caption(scene)
    said = spoil(true, scene, kind, i, world)
    image = torch.from_numpy(world.draw(scene).copy()).permute(2, 0, 1) / 255
    found = [c for _, c, _ in cycle.words(start.generator, image, said, item=[split, i])]
    return {"item": item, "right": said.split()[np.argmin(found)] != true.split()[np.argmin(found)]}


def words(args):
    """cycle.words, which rerank.py --words prints, on 300 captions with one planted wrong colour or shape."""
    import metrics
    jobs = [(None, f"{kind} {split} {i}", kind, split, i) for kind in ("colour", "shape")
            for split in ("test", "near", "out") for i in range(20_000, 20_000 + share(args, 50))]
    found, cases = measured(args, "words", planted, jobs), {"colour or shape": []}
    for _, item, kind, split, _ in jobs:
        for case in ("colour or shape", f"{kind}, {'in' if split == 'test' else split}"):
            cases.setdefault(case, []).append(found[item]["right"])
    keep(args, "words", {"planted": {k: mean_of(v, metrics) for k, v in cases.items()}})


# ---------------------------------------------------------------- both findings
def findings(args):
    """Finding I (Figure 3, Table 1), of the candidates of `scorers`: quality by rank, for every score, by domain."""
    import data
    import metrics
    import world
    if "scorers" not in args.parts:                                    # which has just made them
        candidates(args)
    w = together(args, metrics, world, data)
    judges = metrics.likenesses(["clip", "sbert"], "text", "miniature").pairs
    quality = {"CIDEr": w["quality"]["CIDEr"][:, :11], "facts": w["quality"]["facts"][:, :11]}      # 10: beam search's
    for name, f in judges.items():
        quality[name.upper()] = np.stack([
            f([c for c in row[:11] for _ in r], r * 11).reshape(11, -1).mean(1)
            for row, r in zip(w["said"], w["references"])])
    rows = {d: (w["domain"] == d) | (d == "all") for d in ("all", *DOMAINS)}
    beam = {k: {d: mean_of(v[at, 10], metrics) | {"gain": mean_of(v[at, 10] - v[at, :10].mean(1), metrics)}
                for d, at in rows.items()} for k, v in quality.items()}
    quality = {k: v[:, :10] for k, v in quality.items()}
    scores = {k: w["score"][k][:, :10] for k in ("clip", "dino", "pixel", "denoise", "clipscore", "likelihood")}
    keep(args, "findings", {"table": table_of(quality, scores, w["domain"], metrics), "beam": beam})


def texts(args):
    """Finding II (Figure 4, Table 2), drawn in as many steps as the captions of Finding I."""
    keep(args, "texts", from_texts(args, "text", share(args, 100), "full", args.steps))


def pictures(args):
    """Finding II on more texts, drawn in 8 steps."""
    keep(args, "pictures", from_texts(args, "fewtext", args.texts, "few", 8))


def from_texts(args, kind, limit, scorer, steps):
    """Text -> image -> text on the first `limit` texts of each domain: {table: {quality: {score: {domain: choices}}},
    differences of CLIP's likeness; sets: {score: Frechet distance of DINO's features to the true pictures, Inception
    score over the 48 colour-shape pairs that the independent reader sees}} of the chosen drawings; of random ones mean
    and range of 95 in 100."""
    import torch

    import data
    import metrics
    import world
    rows, items = [], []
    for domain in DOMAINS:
        run(args, "rerank.py", "-n", 10, "--scorer", scorer, "--steps", steps, "--turn", "text", "--limit", limit,
            "--data", world_set(args), "--split", domain, "--dtype", args.dtype,
            "--out", args.work / f"{kind}-{domain}")
        named = {x.name: x for x in data.read(world_set(args), domain)}
        rows += (found := list(read(args, kind, domain).items()))
        items += [(named[k], domain) for k, _ in found]
    seen = metrics.likenesses(["clip", "dino"], "image", "miniature")
    dino = metrics.Encoder("dino", str(HERE / "miniature/dino"), ("image",)).images
    model, quality = world.reader(HERE / "miniature/reader/model.safetensors"), {"CLIP": [], "DINO": [], "facts": []}
    features, truths = {"DINO": [], "pair": []}, []
    for (_, group), (item, domain) in zip(rows, items):
        drawn = torch.stack([data.open_image(args.work / f"{kind}-{domain}" / r["picture"]) for r in group])
        true = data.open_image(item.path)[None]
        for name, f in seen.pairs.items():
            quality[name.upper()].append(f(drawn, true))
        quality["facts"].append([truth(item.captions[0], s, world) for s in world.look(model, drawn)])
        features["DINO"].append(np.asarray(dino(drawn)))
        truths.append(np.asarray(dino(true))[0])
        features["pair"].append(pair_of(model, drawn, world))
    scores = {k: np.array([[r["scores"][k] for r in group] for _, group in rows]) for k in rows[0][1][0]["scores"]}
    jobs = [([str(args.work / f"{kind}-{d}" / r["picture"]) for r in group], x.name, x.captions[0])
            for (_, group), (x, d) in zip(rows, items)]
    found = measured(args, f"denoise-{kind}", measure_pictures, jobs)
    for name, of in (("denoised", "own"), ("denoised less", "less")):
        scores[name] = np.array([found[job[1]][of] for job in jobs])
    table = table_of({k: np.array(v) for k, v in quality.items()}, scores, np.array([d for _, d in items]), metrics)
    features, truths, dice = {k: np.stack(v) for k, v in features.items()}, np.stack(truths), np.random.default_rng(0)

    def as_a_set(chosen):
        seen, pair = (x[np.arange(len(items)), chosen] for x in features.values())
        return {"FD-DINO": metrics.frechet(seen, truths), "IS": metrics.inception_score(pair)[0]}
    random = [as_a_set(dice.integers(10, size=len(items))) for _ in range(100)]
    sets = {"a random one": {k: {"value": np.mean(v := [x[k] for x in random]), "low": np.quantile(v, .025),
                                 "high": np.quantile(v, .975)} for k in random[0]}}
    best = {k: v.argmax(1) for k, v in scores.items()}
    clip = {k: np.array(quality["CLIP"])[np.arange(len(items)), v] for k, v in best.items()}
    ahead = {f"{a} minus {b}": mean_of(clip[a] - clip[b], metrics) for a, b in (
        ("clipscore", "clip"), ("denoised less", "clip"), ("denoised less", "denoised"))}
    sets |= {k: as_a_set(v) for k, v in best.items()}
    return {"steps": steps, "table": table, "differences": ahead, "sets": sets}


def pair_of(model, pictures, world):
    """log p of each colour-shape pair, up to a constant, as the independent reader sees the objects: (B, 48)."""
    import torch
    with torch.no_grad():
        shape, colour, *_ = (x.log_softmax(1) for x in model(pictures).split(world.HEADS, 1))     # (B, classes, 8, 8)
    there = 1 - shape[:, :1].exp()                                                                # an object is here
    shape, colour = ((x[:, 1:] * there).sum((2, 3)) / there.sum((2, 3)) for x in (shape, colour))
    return (colour[:, :, None] + shape[:, None]).flatten(1).numpy()


def samplers(args):
    """Ways of speaking and N (appendices B to D): what a choice is worth; drawn in 8 steps."""
    import data
    import metrics
    limit, out, chosen = share(args, 50), {"ways": {}, "N": {}}, {}
    for way, n in (("beam", 3), ("top-p", 20), ("top-k", 10), ("temperature", 10), ("typical", 10)):
        groups, references, jobs = [], [], []
        for domain in DOMAINS:
            run(args, "rerank.py", "-n", n, "--scorer", "few", "--way", way, "--limit", limit, "--split", domain,
                "--data", world_set(args), "--dtype", args.dtype, "--out", args.work / f"{way}-{domain}")
            found, named = read(args, way, domain), {x.name: x for x in data.read(world_set(args), domain)}
            for k, group in list(found.items())[:limit]:
                groups.append(group)
                references.append(named[k].captions)
                jobs.append((str(named[k].path), k, list(dict.fromkeys(r["caption"] for r in group)), 12, (0, 1)))
        df = metrics.document_frequency(references)
        quality = np.stack([100 * metrics.cider([r["caption"] for r in g], [x] * n, df)
                            for g, x in zip(groups, references)])
        if way == "beam":
            out["beam"] = mean_of(quality[:, 0], metrics)
            continue
        score = {k: np.array([[r["scores"][k] for r in g] for g in groups])
                 for k in ("clip", "dino", "pixel", "clipscore", "likelihood")}
        loss = {k: (c, -x.mean(0)) for k, (c, _, x) in denoised(args, f"denoise-{way}", jobs).items()}
        score["denoise"] = by_caption(loss, [job[1] for job in jobs], [[r["caption"] for r in g] for g in groups])
        unique = [len({r["caption"] for r in g[:10]}) for g in groups]
        out["ways"][way] = {k: metrics.choices(quality[:, :10], v[:, :10]) for k, v in score.items()} | {
            "different": float(np.mean(unique))}
        if n == 20:
            out["N"] = {m: {k: metrics.choices(quality[:, :m], v[:, :m]) for k, v in score.items()}
                        for m in (2, 5, 10, 20)}
        for m in (2, 5, 10, 20) if n == 20 else (10,):
            chosen[way, m] = {k: quality[np.arange(len(v)), v[:, :m].argmax(1)] for k, v in score.items()}
    pairs = {f"{way} - top-p": ((way, 10), ("top-p", 10)) for way in out["ways"] if way != "top-p"} | {
        f"{m} - {k}": (("top-p", m), ("top-p", k)) for m, k in ((5, 2), (10, 5), (20, 5), (20, 10))}
    out["differences"] = {name: {k: mean_of(chosen[a][k] - chosen[b][k], metrics) for k in chosen[a]}
                          for name, (a, b) in pairs.items()}
    keep(args, "samplers", out)


def table_of(quality, scores, domain, metrics):
    """{quality: {score: {domain: what metrics.choices says}}}."""
    rows = {d: (domain == d) | (d == "all") for d in ("all", *DOMAINS)}
    return {q: {s: {d: metrics.choices(x[at], y[at]) for d, at in rows.items()} for s, y in scores.items()}
            for q, x in quality.items()}


# ---------------------------------------------------------------- one caption, one drawing
def check(args):
    """Is the miniature good enough to mean something: what miniature.py --check prints."""
    path = args.work / "check/check.json"
    path.unlink(missing_ok=True)
    try:
        run(args, "miniature.py", "--check", "--scenes", share(args, 300), "--work", path.parent,
            "--threads", args.processes, several=False, threads=args.processes)
    except ValueError:
        if not path.exists():                                         # a bar that was missed is a result too
            raise
    keep(args, "check", {"figures": json.loads(path.read_text())})


def scores(args):
    """Tables 3 and 4 of the shipped models: what evaluate.py prints."""
    folder = args.work / "evaluate"
    run(args, "evaluate.py", "--ci", "--limit", share(args, 100), "--out", folder)
    found = json.loads((folder / "results.json").read_text())
    keep(args, "scores", {k: found[k] for k in ("captions", "images")})


# ---------------------------------------------------------------- cost
def cost(args):
    """Seconds, counted FLOPs and memory of a joint step and of its parts: bench.py, alone on the machine."""
    path = args.work / "bench.json"
    run(args, "bench.py", "step", "--threads", args.processes, "--json", path, several=False, threads=args.processes)
    keep(args, "cost", {"step": json.loads(path.read_text())["step"]})


def main(args):
    args.work.mkdir(parents=True, exist_ok=True)
    on_signal(SIGTERM, ended)
    for part in args.parts:
        begun = time.monotonic()
        globals()[part](args)
        print(f"results.py: {part} took {(time.monotonic() - begun) / 60:.1f} minutes", flush=True)
    print(f"results.py: {', '.join(args.parts)} are in {args.out}; report.py makes tables and figures of them")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        print(f"results.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
