"""Runs that are disturbed at a file operation, started again, and compared with an undisturbed one.

    python tests/hard/kills.py [WORD ...]        # those whose name holds all words

A run of each kind is killed (SIGKILL), told to stop (SIGTERM, SIGINT, SIGHUP), or finds the disk
full, at each of its file operations in turn: before a file is opened or renamed or a folder made,
in the middle of a write. Then it is started once more, and what lies in its folder must be what an
undisturbed run leaves, to the last bit. Operations of one kind on one file are one row.
"""
import atexit
import builtins
import collections
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import time

import fork
import make
import trial
from safetensors import SafetensorError, safe_open

PICTURES = "rerank a.png b.png"
RUNS = {"rerank": PICTURES, "full": "cycle a.png b.png", "words": f"{PICTURES} --steps 0 --words",
        "given": "given --captions w.json",
        "pairs": f"{PICTURES} --steps 0 --pairs trl",
        "sentences": ["rerank", "a red ring", "a blue ring", "--pairs", "diffusion"],
        "evaluate": "evaluate --data set",
        "finetune": "finetune --data set --steps 4 --every 2 --probe 3 --held 1",
        "own": "finetune --data set --own set --steps 2",
        "cache": "finetune --data set --cache c", "export": "finetune --export e"}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP}
WAYS = (*SIGNALS, "full", "short")               # a disk that is full; one that takes half a write
FULL = "No space left on device"


# ---------------------------------------------------------------- what happens at an operation
class Points:
    """Numbers the file operations below the current folder, and does something at one of them.

    at: its number, None to count alone; way: of WAYS.
    """

    def __init__(self, at=None, way=None):
        self.at, self.way, self.count = at, way, 0
        self.kept = []                           # (what, file) of each
        self.folder = os.getcwd() + os.sep
        self.open, self.real = io.open, {}

    def mine(self, path):
        try:
            return os.path.abspath(os.fsdecode(path)).startswith(self.folder)
        except TypeError:
            return False

    def here(self, what, path, part=None):
        """Called before an operation; part: writes half of what is to be written."""
        self.count += 1
        self.kept.append((what, os.path.relpath(os.fsdecode(path), self.folder)))
        full = self.way == "full" and self.at and self.count >= self.at
        full = full and what in ("open", "write", "mkdir")
        if self.count != self.at and not full:
            return False
        half = part and self.way in ("SIGKILL", "full", "short")
        if half:
            part()
        if self.way in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.way])
            if self.way == "SIGKILL":
                time.sleep(60)
        if full:
            raise OSError(errno.ENOSPC, FULL, os.fsdecode(path))
        return self.way == "short" and bool(half)

    def install(self):
        builtins.open = io.open = self.opened
        for name in ("replace", "rename", "mkdir", "unlink", "remove", "rmdir"):
            self.real[name] = getattr(os, name)
            setattr(os, name, self.wrapped(name))
        import safetensors.torch as library
        self.real["serialize"] = library.serialize_file
        library.serialize_file = self.serialize

    def tell(self, log):
        with self.open(log, "w") as file:
            json.dump(self.kept, file)

    def wrapped(self, name):
        def operation(path, *rest, **more):
            if self.mine(path):
                self.here(name, rest[0] if name in ("replace", "rename") else path)
            return self.real[name](path, *rest, **more)
        return operation

    def opened(self, file, mode="r", *rest, **more):
        if isinstance(file, int) or not self.mine(file) or not set(mode) & set("wax+"):
            return self.open(file, mode, *rest, **more)
        self.here("open", file)
        return File(self.open(file, mode, *rest, **more), self, file)

    def serialize(self, tensors, filename, metadata=None):
        """What safetensors writes without Python's files."""
        def part():
            self.real["serialize"](tensors, filename, metadata=metadata)
            os.truncate(filename, os.path.getsize(filename) // 2)
        if self.mine(filename):
            try:
                self.here("write", filename, part)
            except OSError as e:
                raise SafetensorError(f"I/O error: {FULL} (os error 28)") from e
        self.real["serialize"](tensors, filename, metadata=metadata)


class File:
    """A file whose writes are operations."""

    def __init__(self, file, points, path):
        self.file, self.points, self.path = file, points, path

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __iter__(self):
        return iter(self.file)

    def write(self, data):
        def part():
            self.file.write(data[:len(data) // 2])
            self.file.flush()
        raw = isinstance(self.file, io.FileIO)   # only these say how much was taken
        if self.points.way == "short" and not raw:
            self.points.here("write", self.path)
        elif self.points.here("write", self.path, part):
            return len(data) // 2
        return self.file.write(data)


# ---------------------------------------------------------------- what is left
def state(folder):
    """{file: what of it must be equal} of what a run wrote."""
    found = {}
    for path in sorted(p for top in "oce" for p in (folder / top).rglob("*") if p.is_file() and p.name != ".lock"):
        name = path.relative_to(folder).as_posix()
        if path.name == "log.jsonl":
            found[name] = [row_of(row, "images_per_s", "peak_gib") for row in lines(path)]
        elif re.fullmatch(r"(captions|images)-\d+\.jsonl", path.name):
            kept = found.setdefault("o/" + path.name.split("-")[0], [])
            kept += [row_of(row) for row in lines(path)]
            kept.sort()
        elif path.name == "results.json":
            found[name] = row_of(json.loads(path.read_text(encoding="utf-8")), "settings")
        else:
            found[name] = hashlib.sha1(path.read_bytes()).hexdigest()
    return found


def lines(path):
    """The rows of a file of JSON lines; the half of one that a kill left is none."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            rows += [json.loads(line)]
        except ValueError:
            continue
    return rows


def saved(folder):
    """The step of the checkpoint, 0 where there is none."""
    path = folder / "o/checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["header"])["step"]


def row_of(row, *without):
    return json.dumps({k: v for k, v in row.items() if k not in without}, sort_keys=True)


def difference(whole, found):
    """Files that differ or are missing (what lies there besides is no loss)."""
    return [name for name in whole if whole[name] != found.get(name)]


# ---------------------------------------------------------------- a trial
def fresh(kind, folder, finished):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    make.build(folder, trial.GIVEN | {"w.json": {"a.png": ["a ring", "a wall"], "b.png": ["a ring"]}})
    if kind == "export":
        finished["trained"](folder / "o")


def once(kind, folder, hook=None):
    """A run of a kind, which goes on with what is there."""
    script, argv = trial.command(RUNS[kind])
    return fork.run(script, argv, folder, hook, seconds=60, timeout=150)


def undisturbed(kind, folder, finished):
    """(state, [(what, file)] of its operations); a second run must leave the same."""
    states = []
    for _ in range(2):
        fresh(kind, folder, finished)
        log = folder.parent / "points.json"

        def hook(log=log):
            points = Points()
            points.install()
            atexit.register(points.tell, log)
        ran = once(kind, folder, hook)
        if ran.rc:
            raise RuntimeError(f"{kind} ended with {ran.rc}: {ran.err[-2000:]}")
        states.append(state(folder))
    if states[0] != states[1]:
        raise RuntimeError(f"two undisturbed runs differ: {kind}: {difference(*states)}")
    return states[0], json.loads(log.read_text())


def row_name(kind, way, what, file):
    """A name of operations that are alike: process ids, numbers and hashes apart."""
    file = re.sub(r"\.\d+$", ".new", file)
    file = re.sub(r"pictures/.*", "pictures/*", file)
    file = re.sub(r"/[0-9a-f]{16}.*", "/*", file)
    return f"kills: {kind} {way} {what} {file}"


def attempt(kind, way, at, folder, finished, whole):
    """("well", "") or what is wrong and where it can be seen."""
    fresh(kind, folder, finished)
    ran = once(kind, folder, lambda: Points(at, way).install())
    said = f"first rc {ran.rc}: {' | '.join(ran.lines[-2:])[-200:]}"
    stepped = max([row["step"] for row in lines(folder / "o/log.jsonl")], default=0)
    kept = saved(folder)
    again = once(kind, folder)
    if again.rc:
        return "stuck", f"{said}; again rc {again.rc}: {' | '.join(again.lines[-2:])[-200:]}"
    lost = difference(whole, state(folder))
    if lost:
        return "lost", f"{said}; {', '.join(lost)}"
    if "Traceback" in ran.err + again.err:
        return "traceback", said
    if way in ("full", "short") and ran.rc and not (ran.rc == 2 and len(ran.lines) <= 2 and FULL in ran.lines[-1]):
        return "unnamed", said
    if way in ("SIGTERM", "SIGINT", "SIGHUP") and kept < stepped:
        return "unsaved", said
    return "well", ""


# ---------------------------------------------------------------- all of them, or a share
def plan(kind, names, most=1):
    """[(way, number, row's name)]: every operation, of those alike the first; the signals
    that a process may answer at every third."""
    found, seen = [], collections.Counter()
    for way in WAYS:
        for at, (what, file) in enumerate(names, 1):
            name = row_name(kind, way, what, file)
            seen[name] += 1
            asks = way in ("SIGTERM", "SIGINT", "SIGHUP")
            if seen[name] > most or asks and at % 3 or way == "short" and what != "write":
                continue
            found.append((way, at, name))
    return found


def trials(place, kinds=RUNS, share=None, seed=0):
    """Yields (row's name, verdict, detail), working in an empty folder; share: so many of each
    kind, chosen by the seed."""
    finished = trial.prepare(place, ("trained",) if "export" in kinds else ())
    for kind in kinds:
        whole, names = undisturbed(kind, place / "case", finished)
        chosen = plan(kind, names)
        if share:
            chosen = random.Random(seed).sample(chosen, share)
        for way, at, name in chosen:
            yield name, *attempt(kind, way, at, place / "case", finished, whole)
