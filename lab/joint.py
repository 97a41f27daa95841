"""Measures joint training on the miniature: what each loss teaches, into lab/results/*.json.

    python -m lab.joint                          # every part, as committed: hours on two cores
    python -m lab.joint joint --share .1         # a tenth, by the settings that are committed
    python -m lab.report                         # RESULTS.md and its figures

Training is finetune.py's, as a user runs it: each row from the same start, in the same order of
data. Settings are chosen on val scenes, rows are compared on others. Run again, it goes on where
it stopped; remove out/lab to measure anew.
"""
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import cycle
import losses
import metrics
import records
from captioners import Captioner
from generators import Generator, few_steps
from lab import keep
from lab.keep import DOMAINS, ROOT, by_domain, mean_of, scene_of, spoiled, truth
from loading import load_trained
from miniature import world

PARTS = ("signal", "joint", "variants", "cost")
UNSEEN, VAL = 10_000, 50_000                     # first scene of those rows are compared on, of val


class Row(NamedTuple):
    """A row of the tables."""
    flags: str                                   # of finetune.py, but for its settings
    like: str                                    # whose settings: paired, own or known
    alone: str = ""                              # what it has to beat: the same described pictures
    drawn: str = ""                              # without the other model; the same for drawings


# Every picture has a human caption; only described pictures of pairs that the captioner has always
# known; beside these, pictures of all pairs that nobody described.
PAIRED, KNOWN = "--split all --losses", "--split train --losses"
OWN = "--split train --own all --losses"
OWN_ROW = "own words: tg + ir"
TABLE = {"tg": Row(f"{PAIRED} tg", "paired"),
         "ig": Row(f"{PAIRED} ig", "paired"),
         "tg + ir": Row(f"{PAIRED} tg ir", "paired", "tg", "ig"),
         "ig + tr": Row(f"{PAIRED} ig tr", "paired", "tg", "ig"),
         "all four": Row(f"{PAIRED} tg ir ig tr", "paired", "tg", "ig"),
         "ir": Row(f"{PAIRED} ir", "paired", "tg", "ig"),
         "known pairs: tg": Row(f"{KNOWN} tg", "known"),
         "known pairs: ig": Row(f"{KNOWN} ig", "known"),
         "known pairs: tg + ir": Row(f"{KNOWN} tg ir", "own", "known pairs: tg", "known pairs: ig"),
         OWN_ROW: Row(f"{OWN} tg ir", "own", "known pairs: tg", "known pairs: ig"),
         "own words: all four": Row(f"{OWN} tg ir ig tr", "own", "known pairs: tg",
                                    "known pairs: ig")}
KV = ("own words, kv trained", "known pairs: tg, kv trained", "tg, kv trained")   # have their rate
VARIANTS = {"own words, plain bridge": Row(f"{OWN} tg ir --bridge plain", "own", OWN_ROW, OWN_ROW),
            KV[0]: Row(f"{OWN} tg ir --unfreeze kv q", "own", KV[1], KV[1]),
            f"{KV[0]}, the queries' rate": Row(f"{OWN} tg ir --unfreeze kv q", "own", KV[1], KV[1]),
            KV[1]: Row(f"{KNOWN} tg --unfreeze kv q", "known", "known pairs: tg"),
            KV[2]: Row(f"{PAIRED} tg --unfreeze kv q", "paired", "tg"),
            "own words, q, k, v trained": Row(f"{OWN} tg ir --unfreeze qkv q", "own", OWN_ROW,
                                              OWN_ROW),
            "ig + tr, q, k, v trained": Row(f"{PAIRED} ig tr --unfreeze q qkv", "paired",
                                            "ig + tr", "ig + tr")}
ROWS = TABLE | VARIANTS
VARIED = ("tg", "known pairs: tg", OWN_ROW, "ig + tr")      # what the variants vary
SEEDS = 3
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)                # of the captioner


class Settings(NamedTuple):
    """What val chooses for a row."""
    lr: float
    ir: float
    tr: float
    steps: int

    def said(self):
        return f"lr {self.lr:g}, ir {self.ir:g}, tr {self.tr:g}, {self.steps} steps"


# ---------------------------------------------------------------- training
def losses_in(flags):
    return flags.split("--losses ")[1].split(" --")[0].split()


def command(row, settings, generator, seed):
    """finetune.py's command line for a row; generator: its learning rate."""
    weights = {"ir": settings.ir, "tr": settings.tr}
    wanted = [weights.get(name, 1) for name in losses_in(row.flags)]
    return ["finetune.py", *row.flags.split(), "--weights", *wanted, "--lr", settings.lr, generator,
            "--seed", seed, "--steps", settings.steps, "--every", settings.steps, "--probe", 100,
            "--held", 0]


def train(argv, out):
    """One run, gone on with where it was killed."""
    keep.command(*argv, "--out", out)
    return {"argv": argv}


def folder(lab, run):
    return str(lab.work / "joint" / run)


def train_all(lab, runs):
    """Trains {run: command line}."""
    jobs = {run: (argv, folder(lab, run)) for run, argv in runs.items()}
    lab.measured("trained", train, jobs)


# ---------------------------------------------------------------- what it did
@functools.lru_cache(maxsize=1)
def speakers(checkpoint):
    """Captioner and generator as shipped, with the weights of a checkpoint if there is one."""
    torch.set_num_threads(1)
    captioner, generator = Captioner.load("miniature", "cpu"), Generator.load("miniature", "cpu")
    if checkpoint:
        load_trained(checkpoint, captioner, generator)
    return captioner, generator


@functools.cache
def reader():
    return world.reader(ROOT / "miniature/reader/model.safetensors")


def examine(checkpoint, domain, first, count, drawn):
    """A pair on scenes of a domain: what the captioner says by 3 beams and how true it is; with
    `drawn` the generator's denoising loss and whether its drawing (8 steps) has all pairs right."""
    captioner, generator = speakers(checkpoint)
    indices = range(first, first + count)
    scenes = [scene_of(domain, index) for index in indices]
    images = torch.stack([world.picture(scene) for scene in scenes])
    human = [world.full_caption(scene) for scene in scenes]
    said, _ = captioner.speak(images, 1, "beam")
    rows = []
    for (caption,), scene in zip(said, scenes):
        rows.append({"domain": domain, "caption": caption, "facts": truth(caption, scene),
                     "references": world.captions(scene)})
    if not drawn:
        return {"scenes": rows}

    scheduler = generator.pipe.scheduler
    few_steps(generator)
    names = [[domain, index] for index in indices]
    seen = world.read_back(reader(), generator.draw(human, names, steps=8, batch=25))
    generator.pipe.scheduler = scheduler
    for row, name, image, caption, there, scene in zip(rows, names, images, human, seen, scenes):
        timesteps, noise = cycle.noises(generator, 8, item=name)
        row["ig"] = losses.score(generator, image, [caption], timesteps, noise).mean().item()
        row["pairs"] = float(world.colour_shapes(there) == world.colour_shapes(scene))
    return {"scenes": rows}


def examined(lab, wanted):
    """{name: rows of `examine`} for {name: (checkpoint, first, scenes a domain, of them drawn)}."""
    jobs, found = {}, {name: [] for name in wanted}
    for name, (checkpoint, first, count, drawn) in wanted.items():
        for domain in DOMAINS:
            for start in range(0, count, 25):
                size = min(25, count - start)
                jobs[f"{name} | {domain} {first + start}"] = (
                    checkpoint, domain, first + start, size, start < drawn)
    for row in lab.measured("examined", examine, jobs):
        found[row["key"].split(" | ")[0]] += row["scenes"]
    return found


def measures(rows):
    """{measure: (items,)}, nan where it was not taken; CIDEr x 100 by the rows' own captions."""
    captions = [[row["caption"]] for row in rows]
    references = [row["references"] for row in rows]
    found = {"CIDEr": 100 * metrics.cider(captions, references)[:, 0]}
    for measure in ("facts", "ig", "pairs"):
        found[measure] = np.array([row.get(measure, np.nan) for row in rows])
    return found


# ---------------------------------------------------------------- settings
def best(lab, tried, generator, name, start, **values):
    """The best Settings of a row among all combinations of `values` in place of those of `start`.

    By CIDEr, of ig by the denoising loss, means of two seeds on val; `tried` gets what was seen.
    generator: its learning rate, None for the captioner's.
    """
    options, runs, wanted = {}, {}, {}
    drawn = lab.count(50) if name == "ig" else 0
    for some in itertools.product(*values.values()):
        settings = start._replace(**dict(zip(values, some)))
        options[f"{name}, {settings.said()}"] = settings
    for option, settings in options.items():
        for seed in (98, 99):
            run = f"val {option}, seed {seed}"
            runs[run] = command(ROWS[name], settings, generator or settings.lr, seed)
            wanted[run] = (folder(lab, run), VAL, lab.count(150), drawn)
    train_all(lab, runs)
    found = examined(lab, wanted)
    for option in options:
        two = [measures(found[f"val {option}, seed {seed}"]) for seed in (98, 99)]
        tried[option] = {}
        for key in ("CIDEr", "facts", "ig")[:3 if drawn else 2]:
            tried[option][key] = np.nanmean([x[key] for x in two])
    if drawn:
        return options[min(options, key=lambda option: tried[option]["ig"])]
    return options[max(options, key=lambda option: tried[option]["CIDEr"])]


def tuned(lab):
    """({"paired", "own", "known": Settings, "generator": its rate, "kv": {row: rate}}, what was
    tried), by val. Rows that are compared have equal steps: known pairs those of own words."""
    tried = {}
    steps = [lab.count(number) for number in (100, 200, 400)]
    usual = Settings(lr=1e-3, ir=1, tr=1, steps=steps[1])
    rate = best(lab, tried, None, "ig", usual, lr=(3e-5, 1e-4, 1e-3)).lr
    paired = best(lab, tried, rate, "tg", usual, lr=RATES)
    paired = best(lab, tried, rate, "tg + ir", paired, ir=(.3, 1, 10, 30))
    own = best(lab, tried, rate, OWN_ROW, usual, lr=RATES[1:4], ir=(3, 10, 30, 100))
    own = best(lab, tried, rate, OWN_ROW, own, steps=steps)
    tr = best(lab, tried, rate, "all four", paired, tr=(.3, 1, 3)).tr
    paired = best(lab, tried, rate, "tg + ir", paired, steps=steps)._replace(tr=tr)
    own = own._replace(tr=tr)
    known = own._replace(lr=best(lab, tried, rate, "known pairs: tg", usual, lr=RATES).lr)
    kv = {}
    for name, like in zip(KV, (own, known, paired)):
        kv[name] = best(lab, tried, rate, name, like, lr=RATES[:5]).lr
    return {"paired": paired, "own": own, "known": known, "generator": rate, "kv": kv}, tried


def committed(lab):
    """What the committed run chose, in as many steps as this share has."""
    found = records.load_json(keep.HERE / "results/variants.json")["chosen"]
    for like in ("paired", "own", "known"):
        steps = lab.count(found[like].pop("steps"))
        found[like] = Settings(tr=found["tr"], steps=steps, **found[like])
    return found, {}


# ---------------------------------------------------------------- the tables
def taught(lab, names):
    """What is kept of rows of TABLE and VARIANTS: each measure by domain, and its difference to
    the untrained and to the row that it has to beat, over seeds."""
    chosen, tried = tuned(lab) if lab.share == 1 else committed(lab)
    count, drawn = lab.count(300), lab.count(100)
    runs, wanted = {}, {"none": ("", UNSEEN, count, drawn)}
    for name in names:
        row = ROWS[name]
        settings = chosen[row.like]
        if name in chosen["kv"]:
            settings = settings._replace(lr=chosen["kv"][name])
        few = drawn if trains_generator(row) else 0
        for seed in range(SEEDS):
            run = f"{name} {seed}"
            runs[run] = command(row, settings, chosen["generator"], seed)
            wanted[run] = (folder(lab, run), UNSEEN, count, few)
    train_all(lab, runs)
    scenes = examined(lab, wanted)
    found = {"none": stacked([scenes["none"]])}
    for name in names:
        found[name] = stacked([scenes[f"{name} {seed}"] for seed in range(SEEDS)])
    rows, alone = {}, {}
    for name in found:
        rows[name] = {}
        for domain, at in by_domain(scenes["none"]):
            rows[name][domain] = compared(name, found, at)
        if name in names and ROWS[name].alone in names:
            alone[name] = [ROWS[name].alone, ROWS[name].drawn]
    for like in ("paired", "own", "known"):
        chosen[like] = chosen[like]._asdict()
    commands = {name: " ".join(map(str, runs[f"{name} 0"])) for name in names}
    return {"seeds": SEEDS, "chosen": chosen | {"tr": chosen["paired"]["tr"]}, "val": tried,
            "rows": rows, "commands": commands, "alone": alone}


def trains_generator(row):
    """Pictures of nobody's words, and tg, leave it alone."""
    wanted = set(losses_in(row.flags))
    if "--own" in row.flags:
        wanted.discard("ir")
    return bool(wanted - {"tg"})


def stacked(seeds):
    """{measure: (seeds, items)} of each seed's scenes."""
    each = [measures(rows) for rows in seeds]
    found = {}
    for measure in each[0]:
        found[measure] = np.stack([x[measure] for x in each])
    return found


def compared(name, found, at):
    """{measure: mean, and of its differences} of a row's items `at`, of those that were taken."""
    row = ROWS.get(name, Row("", ""))
    out = {}
    for measure, values in found[name].items():
        taken = at & ~np.isnan(values[0])
        if not taken.any():
            continue
        out[measure] = over_seeds(values[:, taken])
        others = {"none": "none", "alone": row.alone}
        if measure in ("ig", "pairs"):
            others["alone"] = row.drawn
        if name.startswith(KV[0]):
            others["queries"] = OWN_ROW
        for key, other in others.items():
            if other not in found or np.isnan(found[other][measure][0, taken]).any():
                continue
            gap = values - found[other][measure]                          # (seeds, items)
            out[f"{measure} minus {key}"] = over_seeds(gap[:, taken])
    return out


def over_seeds(values):
    """Mean of (seeds, items), its 95 % interval with both resampled, and the mean of each seed."""
    seeds, items = values.shape
    dice = np.random.default_rng(0)

    def mean(rows):
        return values[dice.integers(seeds, size=seeds)].mean(0)[rows].mean()

    low, high = metrics.resampled(mean, items)
    return {"value": values.mean(), "low": low, "high": high, "n": items, "seeds": values.mean(1)}


def joint(lab):
    """Which losses teach what (Tables 3 to 5), and the gradient norms of the first step."""
    found = taught(lab, list(TABLE))
    norms = {}
    for name in ("all four", "own words: all four"):
        first = records.read_rows(Path(folder(lab, f"{name} 0")) / "log.jsonl")[0]
        norms[name] = {key: value for key, value in first.items() if key.startswith("norm_")}
    lab.keep("joint", found | {"norms": norms})


def variants(lab):
    """Bridges and what is unfrozen (appendix I), beside the rows they vary."""
    lab.keep("variants", taught(lab, [*VARIED, *VARIANTS]))


# ---------------------------------------------------------------- what there is to learn, its cost
def signal(lab):
    """By timestep: how much worse the denoising loss is under a wrong caption, how often one noise
    tells, how well the captioner reads the one-step estimate."""
    captioner, generator = speakers("")
    torch.set_num_threads(lab.processes)
    scheduler, dice, rows = generator.scheduler, cycle.chance("signal"), []
    scenes, wrong = [], []
    for domain in DOMAINS:
        scenes += [scene_of(domain, VAL + index) for index in range(lab.count(40))]
    images = torch.stack([world.picture(scene) for scene in scenes])
    human = [world.full_caption(scene) for scene in scenes]
    for i, scene in enumerate(scenes):
        wrong.append(spoiled(human[i], scene, ("colour", "shape")[i % 2], i))

    with torch.no_grad():
        own = losses.caption_loss(captioner.read(images, human)).mean()
        other = losses.caption_loss(captioner.read(images.roll(1, 0), human)).mean()
        x, _ = generator.encode(images)                                   # (B, C, h, w)
        states = generator.states(human)                                  # (B, 77, D)
        wrong_states = generator.states(wrong)
        for low in range(0, 1000, 100):
            gaps, reading = [], []
            for _ in range(4):
                t = torch.randint(low, low + 100, (len(x),), generator=dice)
                noise = torch.randn(x.shape, generator=dice)
                noised = losses.add_noise(scheduler, x, noise, t)
                goal = losses.target(scheduler, x, noise, t)
                right = generator.predict(noised, t, states)
                error = (right - goal).square()
                worse = (generator.predict(noised, t, wrong_states) - goal).square()
                gaps.append((worse - error).mean((1, 2, 3)).numpy())
                estimate = generator.decode(losses.one_step(scheduler, noised, right, t))
                reading.append(losses.caption_loss(captioner.read(estimate, human)).numpy())
            rows.append({"timesteps": [low, low + 100], "gap": mean_of(np.mean(gaps, 0)),
                         "found_out": np.mean(np.array(gaps) > 0),
                         "tr": mean_of(np.mean(reading, 0))})
    lab.keep("signal", {"items": len(scenes), "tg": own.item(),
                        "tg_of_another_picture": other.item(), "rows": rows})


def cost(lab):
    """Seconds, FLOPs and memory of a joint step and its parts; to be run alone on the machine."""
    path = lab.work / "bench.json"
    keep.command("-m", "lab.bench", "step", "--threads", lab.processes, "--json", path,
                 threads=lab.processes)
    lab.keep("cost", {"step": records.load_json(path)["step"]})


def measure(part, lab):
    if part == "signal":
        signal(lab)
    elif part == "joint":
        joint(lab)
    elif part == "variants":
        variants(lab)
    elif part == "cost":
        cost(lab)


if __name__ == "__main__":
    keep.run_script(measure, __doc__, PARTS)
