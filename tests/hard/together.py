"""Two runs on one folder at once; several processes of one run: python tests/hard/suite.py together

Two runs meet at their first, fourth and ninth file operation: each waits there for the other. What
they leave, once those that were refused are started again, must be what they leave one after the
other. The runs of torchrun are processes of their own, one of which is killed in the middle.
"""
import contextlib
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import fork
import kills
import make
import trial

SMALL = "rerank a.png b.png"
PAIRS = {"the same pictures": [SMALL, SMALL],
         "other pictures": ["rerank a.png b.png", "rerank b.png c.png"],
         "other seeds": [SMALL, f"{SMALL} --seed 1"],
         "other seeds and no --out": [f"rerank.py a.png -n 2 --steps 1 --draws 2 --seed {i}" for i in (0, 1)],
         "one evaluation": ["evaluate --data set"] * 2,
         "one training": ["finetune --data set"] * 2,
         "other trainings": ["finetune --data set", "finetune --data set --seed 1"]}
MEETINGS = (1, 4, 9)
TORCHRUN = {"rerank": ("rerank.py", "--data set -n 2 --steps 2 --draws 2 --batch 2 --out o", "candidates.jsonl"),
            "evaluate": ("evaluate.py", "--data set --limit 4 --steps 4 --batch 1 --judges none --out o", "captions-0.jsonl"),
            "finetune": ("finetune.py", "--data set --steps 6 --batch 2 --every 2 --probe 0 --held 1 --out o", "log.jsonl")}
BOUND = 1e-5                                     # of a weight, after six steps, between one process and two


class Meeting(kills.Points):
    """Waits at an operation until the other run is there too, or has ended."""

    def __init__(self, at, mine, other):
        super().__init__(at)
        self.marks = mine, other

    def here(self, what, path, part=None):
        self.count += 1
        if self.count == self.at:
            mine, other = self.marks
            os.close(os.open(mine, os.O_CREAT | os.O_WRONLY))
            wait_for(other, 8)
        return False


def wait_for(mark, seconds):
    end = time.monotonic() + seconds
    while not os.path.exists(mark) and time.monotonic() < end:
        time.sleep(.005)


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    make.build(folder, trial.GIVEN | {"c.png": make.scene(2)})


def one(argv, folder):
    script, words = trial.command(argv)
    return fork.run(script, words, folder, timeout=120, seconds=60)


def after_another(pair, folder):
    """What the two leave one after the other, and how many of them were refused."""
    fresh(folder)
    ran = [fork.run(*trial.command(argv), folder, timeout=120, seconds=60) for argv in pair]
    return kills.state(folder), sum(x.rc != 0 for x in ran)


def at_once(pair, at, folder):
    """("well", "") or what is wrong with two runs that meet at operation `at` of each."""
    states = [after_another(pair, folder), after_another(pair[::-1], folder)]
    refused = min(count for _, count in states)
    fresh(folder)
    marks = [folder.parent / f"mark-{i}" for i in range(2)]
    for mark in marks:
        mark.unlink(missing_ok=True)
    runs = []
    for i, argv in enumerate(pair):
        def hook(i=i):
            Meeting(at, marks[i], marks[1 - i]).install()
        log = folder.parent / f"run-{i}"
        runs.append((fork.start(*trial.command(argv), folder, log, hook, seconds=60), log))
    codes = []
    for (pid, _), mark in zip(runs, marks):
        codes.append(fork.wait(pid, 120)[0])
        mark.touch()
    said = [fork.Ran(code, "", fork.read(log, "err"), 0) for code, (_, log) in zip(codes, runs)]
    detail = "; ".join(f"rc {x.rc} {' | '.join(x.lines[-1:])[-160:]}" for x in said)
    if any("Traceback" in x.err for x in said) or not {*codes} <= {0, 2} or 0 not in codes:
        return "traceback", detail
    if any(x.rc == 2 and len(x.lines) != 1 for x in said):
        return "lines", detail
    if sum(code != 0 for code in codes) < refused:
        return "silent", detail
    for argv, code in zip(pair, codes):
        if code:
            one(argv, folder)
    found = kills.state(folder)
    lost = [kills.difference(whole, found) for whole, _ in states]
    return ("well", "") if [] in lost else ("lost", f"{detail}; {', '.join(min(lost, key=len))}")


def pairs(folder, share=None):
    """Yields (row, verdict, detail) of all pairs, or of the first so many."""
    for name, at in itertools.islice(itertools.product(PAIRS, MEETINGS), share):
        yield f"together: {name}, met at {at}", *at_once(PAIRS[name], at, folder)


# ---------------------------------------------------------------- torchrun
def environment():
    return dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")


def spread(kind, folder):
    """A process of torchrun with two processes of a run."""
    script, words, _ = TORCHRUN[kind]
    words = words.split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(fork.ROOT / script), *words]
    err = open(folder.parent / "torchrun.err", "wb")
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=err, start_new_session=True)


def ended(process, seconds=240):
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)   # its own session, begun above
        process.wait()
        return "hung"


def children(pid):
    """Process ids of the two that torchrun started."""
    tasks = [int(x) for x in open(f"/proc/{pid}/task/{pid}/children").read().split()]
    return [x for x in tasks if b"--out" in open(f"/proc/{x}/cmdline", "rb").read()]


def apart(kind, folder, whole):
    """Two processes leave what one does: the rows, whatever their order, and weights within BOUND."""
    found = kills.state(folder)
    names = [name for name in kills.difference(whole, found) if kind != "finetune" or "checkpoint" not in name and "log" not in name]
    return names


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "o/checkpoint.safetensors")


def torchrun(folder):
    """Yields (row, verdict, detail)."""
    for kind, (script, words, mark) in TORCHRUN.items():
        fresh(folder)
        alone = fork.run(script, words.split(), folder, timeout=240, seconds=200)
        whole = kills.state(folder)
        kept = weights(folder) if kind == "finetune" else {}
        fresh(folder)
        rc = ended(spread(kind, folder))
        names = apart(kind, folder, whole) if rc == 0 else ["-"]
        found = weights(folder) if kind == "finetune" and rc == 0 else {}
        gap = max([(kept[name] - found[name]).abs().max().item() for name in found], default=0)
        bad = rc or names or gap > BOUND
        yield f"torchrun: {kind} as by one process", "lost" if bad else "well", f"rc {rc} and {alone.rc}; {', '.join(names)}; weights differ by {gap:.1g}"
        for i in range(2):
            fresh(folder)
            process = spread(kind, folder)
            wait_for(folder / "o" / mark, 90)
            hit = children(process.pid)[i]
            os.kill(hit, signal.SIGKILL)
            first = ended(process)
            again = ended(spread(kind, folder))
            names = apart(kind, folder, whole) if again == 0 else ["-"]
            yield f"torchrun: {kind}, process {i} killed", "well" if not names and first != "hung" else "lost", f"rc {first}, again {again}: {', '.join(names)}"
    yield from of_one_voice(folder)


def of_one_voice(folder):
    fresh(folder)
    TORCHRUN["missing"] = ("rerank.py", "nothing.png --out o", "")
    rc = ended(spread("missing", folder))
    rows = open(folder.parent / "torchrun.err", encoding="utf-8", errors="replace").read().splitlines()
    ours = [row for row in rows if row.startswith("rerank.py:")]
    traces = sum("nothing.png" in row and "Error" in row for row in rows)
    yield "torchrun: a missing picture", "well" if rc and len(ours) == 1 and not traces else "lines", f"rc {rc}: {len(ours)} lines of ours"
    for i in range(3):
        rc = ended(spread("evaluate", folder))
        rc = rc or ended(spread("evaluate", folder))
        yield f"torchrun: evaluate on a finished folder, {i}", "well" if rc == 0 else "stuck", f"rc {rc}"


# ---------------------------------------------------------------- long runs
LONG = {"2,000 steps": "finetune --steps 2000 --batch 1 --losses tg --every 500",
        "1,000 items": "rerank --limit 1000 --steps 0"}


def long(folder):
    """Yields (row, verdict, detail): memory in the last tenth of a run against the second, and the
    median of open files."""
    for name, argv in LONG.items():
        fresh(folder)
        pid = fork.start(*trial.command(argv), folder, folder.parent / "long", seconds=3000)
        samples = []
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            with contextlib.suppress(OSError, ValueError):
                pages = int(open(f"/proc/{pid}/statm").read().split()[1])
                samples.append((pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, len(os.listdir(f"/proc/{pid}/fd"))))
            time.sleep(.05)
        rc, _ = fork.wait(pid)
        tenth = max(len(samples) // 10, 1)
        early, late = samples[tenth:2 * tenth], samples[-tenth:]
        (a, files), (b, more) = [[statistics.median(x) for x in zip(*some)] for some in (early, late)]
        good = rc == 0 and b < 1.05 * a and more <= files
        yield f"long: {name}", "well" if good else "grows", f"rc {rc}: {a:.0f} MiB, then {b:.0f}; {files:.0f} open files, then {more:.0f}"
