"""What the measurements share: how large they are, what is done once, and where results lie."""
import functools
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import metrics
import records
import script
from miniature import world

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DOMAINS = ("in", "near", "out")


def flags(doc, parts, argv=None):
    p = script.Parser(doc)
    p.add_argument("parts", nargs="*", help=f"of {' '.join(parts)}; default all of them")
    p.add_argument("--share", type=float, default=1.0, help="of all counts; 1: as committed")
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each")
    p.add_argument("--out", type=Path, help="folder of the JSON files; default lab/results, of "
                   "another share than 1 lab/results/share-SHARE")
    p.add_argument("--work", type=Path, help="folder of what is kept on the way; default "
                   "out/lab/share-SHARE")
    args = p.parse_args(argv)
    unknown = sorted(set(args.parts) - set(parts))
    if unknown:
        p.error(f"{', '.join(unknown)}: parts are {', '.join(parts)}")
    if args.share <= 0 or args.processes < 1:
        p.error("--share is above 0, --processes at least 1")
    args.parts = args.parts or list(parts)
    args.out = args.out or results_of(args.share)
    args.work = args.work or ROOT / f"out/lab/share-{args.share:g}"
    return args


def results_of(share):
    """The folder of a run's JSON files."""
    if share == 1:
        return HERE / "results"
    return HERE / f"results/share-{share:g}"


@dataclass
class Lab:
    """A run of measurements."""
    share: float                                 # of all that is counted
    processes: int
    out: Path                                    # the JSON files
    work: Path                                   # what is kept on the way

    def count(self, full):
        """How many of what the committed run counts `full` of."""
        return max(1, round(self.share * full))

    def measured(self, name, work, jobs):
        """Rows of work(*job), a dict each, for jobs {key: job}: by processes of one thread each.

        A row is a line of work/NAME.jsonl; what is there is not done again.
        """
        path = self.work / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {row["key"]: row for row in records.read_rows(path)}
        left = [(work, key, job) for key, job in jobs.items() if key not in rows]
        if left:
            with multiprocessing.get_context("spawn").Pool(self.processes, alone) as pool:
                for row in tqdm(pool.imap(do, left), total=len(left), desc=name):
                    records.append_rows(path, [row])
                    rows[row["key"]] = row
                pool.close()
                pool.join()
        return [rows[key] for key in jobs]

    def keep(self, part, found):
        """Writes a part's JSON, with the machine behind it."""
        about = {"machine": f"{os.cpu_count()} cores, {processor()}", "torch": torch.__version__,
                 "share": self.share, "dtype": "float32"}
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"about": about} | rounded(found), indent=1)
        records.write_text(self.out / f"{part}.json", text + "\n")


def command(*argv, threads=1, accepted=(0,)):
    """Runs `python ARGV` in the repository, as a user types it. ValueError where it fails: of
    another exit code than those accepted."""
    argv = [str(x) for x in argv]
    print(f"lab: python {' '.join(argv)}", flush=True)
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode not in accepted:
        said = done.stderr.strip().splitlines()[-1:]
        raise ValueError(f"{' '.join(argv)} ended with exit code {done.returncode}: {said}")


def alone():
    """In a process of `measured`: one thread; on SIGTERM what it started ends with it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C is for the first process


def stop(number, frame):
    sys.exit(128 + number)


def do(task):
    work, key, job = task
    return {"key": key} | rounded(work(*job), 8)


def timed(seconds, name, work, *given, **more):
    """work(*given, **more), and in seconds[name] what it took of this process's own time: a busy
    neighbour hardly changes that."""
    start = time.process_time()
    found = work(*given, **more)
    seconds[name] = time.process_time() - start
    return found


def processor():
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def rounded(x, digits=5):
    """Python's own types of a few digits, None for what is no number: equal files of equal runs."""
    if isinstance(x, dict):
        return {str(key): rounded(value, digits) for key, value in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [rounded(value, digits) for value in x]
    if isinstance(x, (float, np.floating)):
        return float(f"{x:.{digits}g}") if math.isfinite(x) else None
    return x.item() if isinstance(x, np.generic) else x


def mean_of(values):
    """{value, low, high, n}: a mean with its 95 % interval over items."""
    values = np.asarray(values, np.float64)
    low, high = metrics.interval(values)
    return {"value": values.mean(), "low": low, "high": high, "n": len(values)}


def by_domain(rows):
    """[(all or a domain, which of the rows)]."""
    domains = np.array([row["domain"] for row in rows])
    return [("all", domains != ""), *((domain, domains == domain) for domain in DOMAINS)]


def scene_of(domain, index):
    """Scene `index` of a domain; `in` is the split test."""
    return world.sample("test" if domain == "in" else domain, index)


def truth(caption, scene):
    """Share of the facts a caption states that are true."""
    right, stated = world.verify(caption, scene)
    return right / stated if stated else 0.0


def spoiled(caption, scene, kind, seed):
    """The caption with one colour or shape word exchanged for one that the scene has not."""
    table = {word: name for word, (what, name) in world.WORDS.items() if what == kind}
    dice, words = np.random.default_rng([seed, 5]), caption.split()
    at = dice.choice([i for i, word in enumerate(words) if word in table])
    there = {o[kind] for o in scene["objects"]}
    words[at] = str(dice.choice(sorted(word for word, name in table.items() if name not in there)))
    return " ".join(words)


def run(parts, args):
    """Does the parts one after another: {name: function of a Lab}."""
    signal.signal(signal.SIGTERM, stop)                    # by an exception: workers end with it
    signal.signal(signal.SIGINT, stop)
    lab = Lab(args.share, args.processes, args.out.resolve(), args.work.resolve())
    for name in args.parts:
        parts(name, lab)
    print(f"lab: {', '.join(args.parts)} in {lab.out}; python -m lab.report makes a page of it")
    return 0


def run_script(parts, doc, names):
    """A script's own end: its parts, by the flags of the command line."""
    script.run(functools.partial(run, parts), functools.partial(flags, doc, names))
