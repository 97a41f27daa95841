"""Measures what the README claims, on the miniature, into results/*.json. Run again, it goes on where it stopped.

    make results                  # everything: about three hours on two cores
    make results QUICK=1          # the same with fewer items and steps: under 15 minutes, into results/quick
    python results.py scorers     # one part
    python report.py              # RESULTS.md, the figures and the README's tables, from results/*.json

Candidates, drawings and training come from rerank.py and finetune.py, run as a user runs them; this file adds what they
do not keep, the denoising loss of every candidate at every draw. Settings are chosen on val; test (in), near and out
are read once.
"""
import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
DOMAINS = ("in", "near", "out")
DRAWS = (1, 2, 4, 8, 12, 16, 32, 64)
SPANS = ((0, 1), (0, .5), (.1, .6), (.2, .8), (.3, 1), (.5, 1))
WEIGHTS = {"even": lambda snr: np.ones_like(snr), "sqrt snr": lambda snr: snr ** .5,
           "min(snr, 5)": lambda snr: np.minimum(snr, 5)}
VAL = 50_000                                     # scenes of each domain from here on are val
PARTS = ("scorers", "words", "signal", "joint", "findings", "cost")


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", help=f"of {' '.join(PARTS)}; default all of them")
    p.add_argument("--quick", action="store_true", help="few items, few steps, into results/quick")
    p.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    p.add_argument("--dtype", default="bfloat16", help="of the models in the frozen cycles; float32 takes longer")
    p.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON files and figures")
    p.add_argument("--work", type=Path, default=HERE / "out/results", help="folder of candidates and checkpoints")
    args = p.parse_args(argv)
    args.parts = args.parts or list(PARTS)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        p.error(f"{', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    if args.quick:
        args.out, args.work = args.out / "quick", args.work / "quick"
    args.items = 40 if args.quick else 500
    return args


# ---------------------------------------------------------------- helpers
def run(args, script, *argv, several=True, threads=1):
    """One command of the README, as a user types it; its output. Raises ValueError where it fails."""
    spread = several and args.processes > 1
    head = ["-m", "torch.distributed.run", f"--nproc_per_node={args.processes}"] if spread else []
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    print(f"results.py: python {' '.join([*head[1:], script, *map(str, argv)])}", flush=True)
    done = subprocess.run([sys.executable, *head, script, *map(str, argv)], cwd=HERE, env=env, capture_output=True,
                          text=True)
    if done.returncode:
        own = [x for x in done.stderr.splitlines() if x.startswith(f"{script}: ")] or done.stderr.splitlines()[-3:]
        raise ValueError(f"{script} ended with exit code {done.returncode}: {' '.join(own)[-500:]}")
    return done.stdout


def keep(args, name, found):
    """A part's JSON, with the machine and the settings behind it; written beside and renamed."""
    import platform

    import torch
    cpu = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x),
               platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    about = {"machine": f"{os.cpu_count()} cores, {cpu}", "torch": torch.__version__, "dtype": args.dtype,
             "quick": args.quick}
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
    """Three runs of rerank.py a domain: ten samples by the full cycle, three beams, ten samples in few steps."""
    data = world_set(args)
    for domain in DOMAINS:
        common = ["--data", data, "--split", domain, "--dtype", args.dtype]
        run(args, "rerank.py", "-n", 10, "--scorer", "full", "--agree", args.items // 5, *common, "--out",
            args.work / f"full-{domain}")
        run(args, "rerank.py", "-n", 3, "--scorer", "full", "--way", "beam", *common, "--out",
            args.work / f"beam-{domain}")
        run(args, "rerank.py", "-n", 10, "--scorer", "few", *common, "--out", args.work / f"few-{domain}")


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
    found = cycle.score(start.generator, image, captions, draws, item=item, span=tuple(span), gamma=None)
    return {"item": item, "captions": captions, "timesteps": found.timesteps.tolist(),
            "loss": [[float(f"{v:.6g}") for v in row] for row in found.loss.tolist()]}


def measure_pictures(job):
    """Scores of ten pictures given a text by the denoising loss: as it is, and less that of the empty caption."""
    import cycle
    import data
    paths, item, text = job
    images = [data.open_image(p) for p in paths]
    return [cycle.score(start.generator, images, [text], item=item, empty=e).score.tolist() for e in (False, True)]


def spread(args, f, jobs):
    """[f(job)] by --processes processes of one thread, each with the generator."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), start, (args.dtype,)) as pool:
        return list(pool.map(f, jobs, chunksize=4))


def denoised(args, name, jobs):
    """{item: (captions, timesteps (draws,), losses (draws, n))} of jobs [(path, item, captions, draws, span)]; a line
    an item in work/NAME.jsonl, where what is done is not done again."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from tqdm import tqdm
    path, done = args.work / f"{name}.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.endswith("}"):
            row = json.loads(line)
            done[row["item"]] = row
    todo = [job for job in jobs if job[1] not in done]
    if todo:
        with open(path, "a", buffering=1) as f, ProcessPoolExecutor(
                args.processes, multiprocessing.get_context("spawn"), start, (args.dtype,)) as pool:
            if f.tell():
                f.write("\n")
            for row in tqdm(pool.map(measure, todo, chunksize=4), total=len(todo), desc=name):
                f.write(json.dumps(row) + "\n")
                done[row["item"]] = row
    return {job[1]: (done[job[1]]["captions"], np.array(done[job[1]]["timesteps"]), np.array(done[job[1]]["loss"]))
            for job in jobs}


def signal_to_noise():
    """SNR of each timestep of the miniature's schedule."""
    import cycle
    alphas = cycle.Generator.load("miniature", "cpu").scheduler.alphas_cumprod.double().numpy()
    return alphas / (1 - alphas)


def some(total, count):
    """`count` of `total` stratified draws, spread evenly."""
    return ((np.arange(count) + .5) * total / count).astype(int)


# ---------------------------------------------------------------- scoring without drawing
def val_items(args):
    """Val of each domain as data.Items: the set's val split, and pictures of near and out scenes from VAL on."""
    import torch

    import data
    import world
    count = 20 if args.quick else 150
    items = [data.Item("val " + x.name, x.path, x.captions) for x in data.read(world_set(args), "val")[:count]]
    for domain, i in itertools.product(("near", "out"), range(VAL, VAL + count)):
        scene, path = world.sample(domain, i), args.work / "val" / domain / f"{i}.png"
        if not path.exists():
            data.save_image(torch.from_numpy(world.draw(scene).copy()).permute(2, 0, 1) / 255, path)
        items.append(data.Item(f"val {domain} {i}", path, world.captions(scene)))
    return items


def span_on_val(args):
    """Which timesteps and weights, chosen on val: CIDEr gain of choosing one of ten. -> the table."""
    import torch

    import cycle
    import data
    import metrics
    items = val_items(args)
    torch.set_num_threads(args.processes)
    captioner = cycle.Captioner.load("miniature", "cpu", args.dtype)
    said = []
    for i in range(0, len(items), 50):
        part = items[i:i + 50]
        said += captioner.speak([data.open_image(x.path) for x in part], 10, items=[x.name for x in part])[0]
    snr = signal_to_noise()
    found = denoised(args, "denoise-val", [(str(x.path), x.name, c, 64, (0, 1)) for x, c in zip(items, said)])
    df = metrics.document_frequency([x.captions for x in items])
    quality = np.stack([100 * metrics.cider(c, [x.captions] * 10, df) for x, c in zip(items, said)])
    rows = []
    for span, (weight, f), draws in itertools.product(SPANS, WEIGHTS.items(), (12, 64)):
            score = []
            for x in items:
                _, t, loss = found[x.name]
                inside = np.flatnonzero((t >= span[0] * 1000) & (t < span[1] * 1000))
                inside = inside[some(len(inside), min(draws, len(inside)))]
                w = f(snr[t[inside]])
                score.append(-(w[:, None] * loss[inside]).sum(0) / w.sum())
            c = metrics.choices(quality, score)
            rows.append({"span": span, "weight": weight, "gain": c["gain"], "interval": c["interval"],
                         "draws": draws, "used": len(inside)})
    return {"items": len(items), "mean": quality.mean(), "rows": rows}


def gather(args, domain, metrics, world, data):
    """Everything known of a domain, of ten samples and then three beams an item: names, captions, scores (items, 13 or
    10) by name, UNet evaluations by name, quality (items, 13) by name."""
    full, beam, few = (read(args, kind, domain) for kind in ("full", "beam", "few"))
    items = {x.name: x for x in data.read(world_set(args), domain)}
    names = list(full)
    pool = [full[k] + beam[k] for k in names]
    said = [[r["caption"] for r in rows] for rows in pool]
    jobs = [(str(items[k].path), k, list(dict.fromkeys(c)), 64, (0, 1)) for k, c in zip(names, said)]
    loss, halved = denoised(args, f"denoise-{domain}", jobs), denoised(
        args, f"halved-{domain}", [(p, k, list(dict.fromkeys(c[:10])), 60, None) for (p, k, *_), c in zip(jobs, said)])
    upper = denoised(args, f"upper-{domain}", [(p, k, c, 64, (.3, 1)) for p, k, c, *_ in jobs])
    score, unique = {}, np.array([len(set(c[:10])) for c in said])
    for name in ("clip", "dino", "pixel", "clipscore", "likelihood"):
        score[name] = np.array([[r["scores"][name] for r in rows] for rows in pool])
    score["few"] = np.array([[r["scores"]["clip"] for r in few[k]] for k in names])
    score["again"] = np.array([[r["scores"].get("clip again") or math.nan for r in full[k]] for k in names])
    cost = {"clip": unique * 100, "dino": unique * 100, "pixel": unique * 100, "few": unique * 16,
            "clipscore": 0 * unique, "likelihood": 0 * unique}
    snr = signal_to_noise()

    def without_drawing(found, draws, weight):
        rows = []
        for k, row in zip(names, said):
            captions, t, values = found[k]
            at, w = some(64, draws), WEIGHTS[weight](snr[t[some(64, draws)]])
            value = dict(zip(captions, -(w[:, None] * values[at]).sum(0) / w.sum()))
            rows.append([value[c] for c in row])
        return np.array(rows)
    for draws in DRAWS:
        score[f"denoise {draws}"] = without_drawing(loss, draws, "min(snr, 5)")
        cost[f"denoise {draws}"] = unique * draws
    for name, found in (("even 12", loss), ("upper 12", upper)):
        score[name], cost[name] = without_drawing(found, 12, "even"), unique * 12
    score["halved 60"] = np.array([[-halved[k][2][0][halved[k][0].index(c)] for c in row[:10]]
                                   for k, row in zip(names, said)])
    cost["halved 60"] = np.array([halved[k][1][0] for k in names])
    for name, parts in {"ranks: clip + denoise 12": ("clip", "denoise 12"),
                        "ranks: clipscore + denoise 12": ("clipscore", "denoise 12"),
                        "ranks: clip + clipscore + denoise 12": ("clip", "clipscore", "denoise 12")}.items():
        score[name] = -sum((score[k][:, :, None] < score[k][:, None, :]).sum(2) for k in parts)
        cost[name] = sum(cost[k] for k in parts)
    scenes = [scene_of(items[k].path, world) for k in names]
    quality = {"facts": np.array([[truth(c, s, world) for c in row] for row, s in zip(said, scenes)])}
    return {"names": names, "said": said, "score": score, "cost": cost, "quality": quality,
            "references": [items[k].captions for k in names], "paths": [items[k].path for k in names],
            "domain": np.array([domain] * len(names))}


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
    """Seconds a picture of each way to score ten captions, in float32 on all cores: {scorer: seconds, "items": n}."""
    import time

    import torch

    import cycle
    torch.set_num_threads(args.processes)
    generator, few = cycle.Generator.load("miniature", "cpu"), cycle.few_steps(cycle.Generator.load("miniature", "cpu"))
    judges = metrics.likenesses(["clip", "dino", "pixel"], "image", "miniature")
    some = np.linspace(0, len(w["names"]) - 1, 3 if args.quick else 12).astype(int)
    work = [(data.open_image(w["paths"][i]), list(dict.fromkeys(w["said"][i][:10]))) for i in some]

    def clock(f):
        f(*work[0])
        start = time.perf_counter()
        for image, captions in work:
            f(image, captions)
        return (time.perf_counter() - start) / len(work)

    def drawn(speaker, steps, name):
        return lambda x, c: judges.pairs[name](speaker.draw(c, [0] * len(c), steps=steps, batch=40), x[None])
    out = {name: clock(drawn(generator, 50, name)) for name in ("clip", "dino", "pixel")}
    out |= {"few": clock(drawn(few, 8, "clip")), "clipscore": clock(lambda x, c: judges.clipscore(x[None], c)),
            "halved 60": clock(lambda x, c: cycle.score(generator, x[None], c, budget=60))}
    out |= {f"denoise {k}": clock(lambda x, c, k=k: cycle.score(generator, x[None], c, k)) for k in DRAWS}
    return out | {"items": len(work)}


def scorers(args):
    """Scorer x (UNet evaluations, agreement with the full cycle, gain kept, against beam search), by domain."""
    from scipy.stats import kendalltau

    import data
    import metrics
    import world
    candidates(args)
    on_val, w = span_on_val(args), together(args, metrics, world, data)
    quality, said = w["quality"]["CIDEr"], w["said"]
    beam = quality[:, 10]                                             # the first of three beams is beam search's answer
    rows = {}
    for name, score in w["score"].items():
        first = score[:, :10]
        here = ~np.isnan(first).any(1)
        row = {"evaluations": float(w["cost"][name].mean()) if name in w["cost"] else None, "items": int(here.sum())}
        both = here & ~np.isnan(w["score"]["again"]).any(1) if name == "again" else here
        a, b = first.argmax(1), w["score"]["clip"][:, :10].argmax(1)
        row["same"] = mean_of([said[i][a[i]] == said[i][b[i]] for i in np.flatnonzero(both)], metrics)
        row["tau"] = float(np.nanmean([kendalltau(first[i], w["score"]["clip"][i, :10]).statistic
                                       for i in np.flatnonzero(both) if len(set(first[i])) > 1]))
        for domain in ("all", *DOMAINS):
            at = np.flatnonzero(here & ((w["domain"] == domain) | (domain == "all")))
            c = metrics.choices(quality[at, :10], first[at])
            chosen, mean = quality[at, a[at]], quality[at, :10].mean(1)
            gain, full = chosen - mean, quality[at, b[at]] - mean
            kept = metrics.resampled(lambda r, g=gain, f=full: g[r].mean() / f[r].mean(), len(at))
            row[domain] = {k: c[k] for k in ("mean", "chosen", "oracle", "gain", "interval", "items")} | {
                "facts": float(w["quality"]["facts"][at, a[at]].mean()), "kept": c["gain"] / full.mean(),
                "kept_interval": kept, "over_beam": mean_of(chosen - beam[at], metrics)}
            if score.shape[1] == 13:                                   # the three beams join the ten samples
                d = score[at].argmax(1)
                row[domain]["with_beams"] = mean_of(quality[at, d], metrics)
                row[domain]["with_beams_over_beam"] = mean_of(quality[at, d] - beam[at], metrics)
        rows[name] = row
    beams = {d: mean_of(beam[(w["domain"] == d) | (d == "all")], metrics) for d in ("all", *DOMAINS)}
    keep(args, "scorers", {"val": on_val, "beam": beams, "seconds": seconds(args, w, data, metrics), "scorers": rows})


# ---------------------------------------------------------------- joint training
SUBSETS = {"none": "", "tg": "tg", "ig": "ig", "tg + ir": "tg ir", "ig + tr": "ig tr", "all four": "tg ir ig tr"}
ALONE = {"CIDEr": "tg", "facts": "tg", "tg": "tg", "pairs": "ig", "ig": "ig"}       # what a joint row must beat


def begin():
    """In each process: one thread, both models as shipped, and the reader that counts what was drawn right."""
    import torch

    import cycle
    import world
    torch.set_num_threads(1)
    start.captioner = cycle.Captioner.load("miniature", "cpu")
    start.generator = cycle.Generator.load("miniature", "cpu")
    start.plain = {k: v.clone() for m in (start.captioner.model, start.generator.unet)
                   for k, v in [(f"{id(m)}.{n}", p.data) for n, p in m.named_parameters()]}
    start.reader = world.reader(HERE / "miniature/reader/model.safetensors")


def examine(job):
    """A trained pair (None: as shipped) on scenes of a domain: the captions by 3 beams, their log-likelihood a token
    under the first human caption, which drawings have every pair right, the denoising loss of the human caption."""
    import torch

    import cycle
    import losses
    import world
    checkpoint, domain, indices, steps = job
    captioner, generator = start.captioner, start.generator
    for m in (captioner.model, generator.unet):
        for n, p in m.named_parameters():
            p.data.copy_(start.plain[f"{id(m)}.{n}"])
    if checkpoint:
        cycle.adopt(checkpoint, captioner, generator)
    scenes = [world.sample({"in": "test"}.get(domain, domain), i) for i in indices]
    images = [torch.from_numpy(world.draw(s).copy()).permute(2, 0, 1) / 255 for s in scenes]
    human = [world.full_caption(s) for s in scenes]
    said = [row[0] for row in captioner.speak(images, 1, "beam")[0]]
    with torch.no_grad():
        tg = losses.caption_loss(captioner.read(images, human)).tolist()
        latents, states, ig = generator.encode(images)[0], generator.states(human), []
        for i, x in zip(indices, latents):
            t, noise = cycle.pairs(generator, x[None], 8, 0, 0, [domain, i], (0, 1))
            ig.append(cycle.denoising(generator, x[None], states[len(ig)][None], t, noise, 8).mean().item())
    drawn = generator.draw(human, [[domain, i] for i in indices], 0, steps) if steps else None
    seen = world.look(start.reader, drawn) if steps else scenes
    return [{"domain": domain, "caption": c, "facts": truth(c, s, world), "tg": a, "ig": b,
             "pairs": float(world.pairs(k) == world.pairs(s)), "references": world.captions(s)}
            for c, s, a, b, k in zip(said, scenes, tg, ig, seen)]


def train(args, jobs):
    """Runs of finetune.py, one thread each, --processes at a time: {name: flags}. What is trained is kept."""
    from concurrent.futures import ThreadPoolExecutor

    def one(job):
        name, argv = job
        out = args.work / "joint" / name
        if json.loads((out / "checkpoint.json").read_text())["step"] == int(argv[argv.index("--steps") + 1]) if (
                out / "checkpoint.json").exists() else False:
            return
        resume = ["--resume"] if (out / "checkpoint.safetensors").exists() else []
        run(args, "finetune.py", *argv, "--out", out, *resume, several=False)
    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(one, jobs.items()))


def examined(args, jobs):
    """{name: rows of `examine`} for jobs {name: (checkpoint, domains, first index, count, steps)}; kept by name."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from tqdm import tqdm
    folder, found, parts = args.work / "examined", {}, []
    folder.mkdir(parents=True, exist_ok=True)
    for name, (checkpoint, domains, first, count, steps) in jobs.items():
        if (folder / f"{name}.json").exists():
            found[name] = json.loads((folder / f"{name}.json").read_text())
            continue
        parts += [(name, (checkpoint, d, list(range(i, min(i + 25, first + count))), steps))
                  for d in domains for i in range(first, first + count, 25)]
    if parts:
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), begin) as pool:
            for (name, _), rows in zip(parts, tqdm(pool.map(examine, [job for _, job in parts]), total=len(parts),
                                                   desc="examine")):
                found.setdefault(name, []).extend(rows)
        for name in dict.fromkeys(name for name, _ in parts):
            (folder / f"{name}.json").write_text(json.dumps(found[name]))
    return found


def marks(rows, metrics):
    """{measure: (items,)} of `examine`'s rows; CIDEr x 100 with their own document frequency."""
    out = {k: np.array([r[k] for r in rows]) for k in ("facts", "pairs", "tg", "ig")}
    return out | {"CIDEr": 100 * metrics.cider([r["caption"] for r in rows], [r["references"] for r in rows])}


def joint(args):
    """Which losses teach what: each subset from the same start, in the same order of data, three seeds or more."""
    import metrics
    steps, seeds = (40, 2) if args.quick else (300, 3)
    common = ["--split", "all", "--steps", steps, "--every", steps, "--probe", 0, "--held", 0]
    weight = {"tg": 1, "ig": 1, "tr": 1}

    def argv(losses, lr, ir, seed):
        return [*common, "--losses", *losses.split(), "--weights",
                *[ir if k == "ir" else weight[k] for k in losses.split()], "--lr", lr, "--seed", seed]

    # the learning rate, then the weight of ir: on val, by the mean CIDEr of the three domains
    rates, irs = ((1e-3,), (10,)) if args.quick else ((3e-4, 1e-3, 3e-3), (1, 10, 30))
    count = 50 if args.quick else 150
    tried = {f"val-lr{lr:g}": argv("tg", lr, 1, 99) for lr in rates}
    train(args, tried)
    found = examined(args, {k: (str(args.work / "joint" / k), DOMAINS, VAL, count, 0) for k in ["val-none", *tried]
                            if k != "val-none"} | {"val-none": (None, DOMAINS, VAL, count, 0)})
    value = {k: marks(v, metrics)["CIDEr"].mean() for k, v in found.items()}
    lr = max(rates, key=lambda x: value[f"val-lr{x:g}"])
    tried = {f"val-ir{ir}": argv("tg ir", lr, ir, 99) for ir in irs}
    train(args, tried)
    found = examined(args, {k: (str(args.work / "joint" / k), DOMAINS, VAL, count, 0) for k in tried})
    value |= {k: marks(v, metrics)["CIDEr"].mean() for k, v in found.items()}
    ir = max(irs, key=lambda x: value[f"val-ir{x}"])

    # the rows of Tables 3 to 5, read once on test, near and out
    runs = {f"{name.replace(' ', '')}-{seed}": argv(losses, lr, ir, seed) for name, losses in SUBSETS.items() if losses
            for seed in range(seeds)}
    train(args, runs)
    count, drawn = (50, 20) if args.quick else (200, 25)
    found = examined(args, {k: (str(args.work / "joint" / k), DOMAINS, 10_000, count, drawn) for k in runs}
                     | {"none": (None, DOMAINS, 10_000, count, drawn)})
    domain = np.array([r["domain"] for r in found["none"]])
    each = {"none": marks(found["none"], metrics)}
    for name, losses in SUBSETS.items():
        if losses:
            per = [marks(found[f"{name.replace(' ', '')}-{seed}"], metrics) for seed in range(seeds)]
            each[name] = {k: np.stack([p[k] for p in per]) for k in per[0]}                  # (seeds, items)
    out = {}
    for name, values in each.items():
        out[name] = {}
        for d in ("all", *DOMAINS):
            at = (domain == d) | (d == "all")
            out[name][d] = {k: mean_of(np.atleast_2d(v)[:, at].mean(0), metrics) | {
                "seeds": np.atleast_2d(v)[:, at].mean(1)} for k, v in values.items()}
            for minus, others in (("none", dict.fromkeys(ALONE, "none")), ("alone", ALONE)):
                out[name][d][f"minus {minus}"] = {k: mean_of(
                    np.atleast_2d(v)[:, at].mean(0) - np.atleast_2d(each[others[k]][k])[:, at].mean(0), metrics)
                    for k, v in values.items()}
    keep(args, "joint", {"steps": steps, "seeds": seeds, "lr": lr, "ir": ir, "val": value, "rows": out})


def signal(args):
    """What there is to learn from, on val: by timestep, how much worse the denoising loss is under a wrong caption, and
    how well the captioner reads the one-step estimate; in how many of 100 noises a wrong word is found out."""
    import torch

    import cycle
    import losses
    import metrics
    import world
    torch.set_num_threads(args.processes)
    captioner, generator = cycle.Captioner.load("miniature", "cpu"), cycle.Generator.load("miniature", "cpu")
    count, rows = 20 if args.quick else 120, []
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
    kind, split, i = job
    scene = world.sample(split, i)
    true = world.full_caption(scene)
    said = spoil(true, scene, kind, i, world)
    image = torch.from_numpy(world.draw(scene).copy()).permute(2, 0, 1) / 255
    found = [c for _, c, _ in cycle.words(start.generator, image, said, item=[split, i])]
    return said.split()[np.argmin(found)] != true.split()[np.argmin(found)]


def words(args):
    """cycle.words, which rerank.py --words prints, on 300 captions with one planted wrong colour or shape."""
    import metrics
    jobs = [(kind, split, 20_000 + i) for kind in ("colour", "shape") for split in ("test", "near", "out")
            for i in range(10 if args.quick else 50)]
    right = spread(args, planted, jobs)
    cases = {"colour or shape": right}
    for (kind, split, _), r in zip(jobs, right):
        cases.setdefault(f"{kind}, {'in' if split == 'test' else split}", []).append(r)
    keep(args, "words", {"planted": {k: mean_of(v, metrics) for k, v in cases.items()}})


# ---------------------------------------------------------------- both findings
def findings(args):
    """Finding I (Figure 3, Table 1) and II (Figure 4, Table 2): quality by rank, for every score, by domain."""
    import data
    import metrics
    import world
    w, out = together(args, metrics, world, data), {}
    judges = metrics.likenesses(["clip", "sbert"], "text", "miniature").pairs
    quality = {"CIDEr": w["quality"]["CIDEr"][:, :10], "facts": w["quality"]["facts"][:, :10]}
    for name, f in judges.items():
        quality[name.upper()] = np.stack([
            f([c for c in row[:10] for _ in r], r * 10).reshape(10, -1).mean(1)
            for row, r in zip(w["said"], w["references"])])
    scores = {k: w["score"][k][:, :10] for k in ("clip", "dino", "pixel", "denoise 12", "clipscore", "likelihood")}
    out["I"] = table_of(quality, scores, w["domain"], metrics)
    out["I by n"] = {n: {k: metrics.choices(quality["CIDEr"][:, :n], v[:, :n]) for k, v in scores.items()}
                     for n in (2, 5, 10)}
    limit, rows, items = (10 if args.quick else 100), [], []
    for domain in DOMAINS:
        run(args, "rerank.py", "-n", 10, "--scorer", "full", "--turn", "text", "--limit", limit, "--data",
            world_set(args), "--split", domain, "--dtype", args.dtype, "--out", args.work / f"text-{domain}")
        named = {x.captions[0] if x.path is None else x.name: x for x in data.read(world_set(args), domain)}
        rows += (found := list(read(args, "text", domain).items()))
        items += [(named[k], domain) for k, _ in found]
    seen = metrics.likenesses(["clip", "dino"], "image", "miniature").pairs
    model, quality = world.reader(HERE / "miniature/reader/model.safetensors"), {"CLIP": [], "DINO": [], "facts": []}
    for (_, group), (item, domain) in zip(rows, items):
        import torch
        pictures = torch.stack([data.open_image(args.work / f"text-{domain}" / r["picture"]) for r in group])
        for name, f in seen.items():
            quality[name.upper()].append(f(pictures, data.open_image(item.path)[None]))
        quality["facts"].append([truth(item.captions[0], s, world) for s in world.look(model, pictures)])
    scores = {k: np.array([[r["scores"][k] for r in group] for _, group in rows]) for k in rows[0][1][0]["scores"]}
    jobs = [([str(args.work / f"text-{d}" / r["picture"]) for r in group], x.name, x.captions[0])
            for (_, group), (x, d) in zip(rows, items)]
    for name, found in zip(("denoise 12", "denoise 12, less the empty caption"),
                           zip(*spread(args, measure_pictures, jobs))):
        scores[name] = np.array(found)
    out["II"] = table_of({k: np.array(v) for k, v in quality.items()}, scores, np.array([d for _, d in items]), metrics)
    keep(args, "findings", out)


def table_of(quality, scores, domain, metrics):
    """{quality: {score: {domain: what metrics.choices says}}}."""
    rows = {d: (domain == d) | (d == "all") for d in ("all", *DOMAINS)}
    return {q: {s: {d: metrics.choices(x[at], y[at]) for d, at in rows.items()} for s, y in scores.items()}
            for q, x in quality.items()}


# ---------------------------------------------------------------- cost
def cost(args):
    """Seconds, counted FLOPs and memory of a joint step and of its parts: bench.py, alone on the machine."""
    path = args.work / "bench.json"
    run(args, "bench.py", "step", "--threads", args.processes, "--json", path, several=False, threads=args.processes)
    keep(args, "cost", json.loads(path.read_text()))


def main(args):
    args.work.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        globals()[part](args)
    print(f"results.py: {', '.join(args.parts)} are in {args.out}; report.py makes tables and figures of them")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        print(f"results.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
