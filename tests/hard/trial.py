"""A bad input, what is expected of the program, and what it did.

    Case("flags", "rerank --limit 0", "rerank --limit 0", refused("--limit"), {})
    verdict, detail = attempt(case, folder, made)

Expected is one of
    refused   exit code 2 and one line, which holds these words (a file, a flag, a value)
    skipped   exit code 0, a line that holds them, and the rest done
    taken     exit code 0
    either    of the first two; `met`: of all three
and always: no traceback, no control character to the terminal, an end within bounds.
"""
import base64
import csv
import io
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser

import fork
import make
from PIL import Image

SMALL = {"rerank": "rerank.py -n 2 --steps 1 --draws 2 --batch 2 --out o",
         "cycle": "rerank.py -n 2 --steps 1 --batch 2 --scorer full --out o",
         "given": "rerank.py --steps 0 --draws 2 --batch 2 --out o",
         "evaluate": "evaluate.py --limit 2 --steps 1 --batch 2 --judges none --out o",
         "score": "evaluate.py --out o",                   # --score, --compare, --labelfree, --findings
         "finetune": "finetune.py --steps 2 --batch 2 --every 1 --probe 0 --held 0 --out o"}
# finished runs, which cases begin with as `o`, by name
DONE = {"done": "rerank a.png b.png", "worded": "rerank a.png b.png --words",
        "turned": "rerank --data set --turn text",
        "scored": "evaluate --data set", "trained": "finetune --data set"}
GIVEN = {"a.png": make.scene(0), "b.png": make.scene(1), "set": make.karpathy}
# C0 but for new line and tab, DEL, C1, and what turns the direction of text
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
TAGS = {"html", "head", "body", "meta", "title", "style", "h1", "h2", "p", "b", "section", "div", "figure", "img",
        "small", "br", "span", "details", "summary", "dl", "dt", "dd", "i"}


@dataclass
class Expected:
    ways: tuple                                  # of "refused", "skipped", "taken"
    words: tuple = ()                            # what the line holds
    done: int = 0                                # items of candidates.jsonl, at least
    then: object = None                          # f(folder) -> what is wrong, or None
    lines: int = 1                               # of stderr, of what is refused


def refused(*words, **more):
    return Expected(("refused",), words, **more)


def skipped(*words, **more):
    return Expected(("skipped",), words, **more)


def taken(**more):
    return Expected(("taken",), **more)


def either(*words, **more):
    return Expected(("refused", "skipped"), words, **more)


def met(*words, **more):
    return Expected(("refused", "skipped", "taken"), words, **more)


@dataclass
class Case:
    kind: str
    name: str
    argv: object                                 # a string as it is typed, or a list
    expected: Expected
    files: dict = field(default_factory=dict)
    first: object = None                         # a run that comes before, which must end well
    change: dict = field(default_factory=dict)   # and what is changed between the two
    hook: object = None                          # called in the process before the script
    options: dict = field(default_factory=dict)  # of fork.start


def command(argv):
    """(script, arguments): `rerank ...` is a small run into the folder o, `rerank.py ...` itself."""
    words = shlex.split(argv) if isinstance(argv, str) else argv
    script, *begin = SMALL.get(words[0], words[0]).split()
    return script, begin + words[1:]


def prepare(folder, names=DONE):
    """Makes finished runs of DONE in a folder; {name: f(path) that copies it}."""
    found = {}
    for name in names:
        argv = DONE[name]
        place = folder / name
        place.mkdir()
        make.build(place, GIVEN)
        ran = fork.run(*command(argv), place)
        if ran.rc:
            raise RuntimeError(f"{argv} ended with {ran.rc}: {ran.err[-2000:]}")
        found[name] = make.copy(place / "o")
    return found


# ---------------------------------------------------------------- what it did
def attempt(case, folder, finished):
    """("well", "") or what is wrong and where it can be seen."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = {name: finished.get(content, content) if isinstance(content, str) else content
             for name, content in case.files.items()}
    make.build(folder, GIVEN | files)
    if case.first:
        ran = fork.run(*command(case.first), folder)
        if ran.rc:
            return "first", " | ".join(ran.lines[-2:])
        make.build(folder, case.change)
    bounds = case.options
    if "taken" not in case.expected.ways:        # what is refused at the door is refused soon
        bounds = {"seconds": 4} | bounds
    ran = fork.run(*command(case.argv), folder, case.hook, **bounds)
    wrong = judge(case, ran, folder)
    detail = " | ".join(ran.lines[-3:] or ran.out.splitlines()[-2:])
    return (wrong, f"rc {ran.rc}, {ran.seconds:.1f} s: {detail[-400:]}") if wrong else ("well", "")


def judge(case, ran, folder):
    """What is wrong with a run: a word, or None."""
    expected = case.expected
    if (folder / "owned").exists() or leaks(folder / "o"):
        return "way in"
    if ran.stopped:
        silent = ran.worked and "taken" not in expected.ways and ran.stopped == "processor"
        return "silent" if silent else ran.stopped
    if "Traceback (most recent call last)" in ran.err or ran.rc not in (0, 2):
        return "traceback"
    shown = ran.out + "\n".join(ran.lines)
    if CONTROL.search(shown):
        return "control"
    named = [row for row in ran.lines if says(row, expected.words)]
    named += [row for row in ran.out.splitlines() if ran.rc == 0 and says(row, expected.words)]
    told = {"refused": ran.rc == 2, "skipped": ran.rc == 0 and named, "taken": ran.rc == 0}
    if not any(told[way] for way in expected.ways):
        return "refused" if ran.rc == 2 else "silent"
    if ran.rc == 2 and not named:
        return "unnamed"
    if ran.rc == 2 and not 1 <= len(ran.lines) <= expected.lines:
        return "lines"
    if ran.rc == 0 and "refused" not in expected.ways and items(folder) < expected.done:
        return "lost"
    return expected.then(folder) if expected.then else None


def says(row, words):
    """Whether a line has each word, or one of it|another."""
    return all(any(one in row for one in word.split("|")) for word in words)


def items(folder):
    """How many items candidates.jsonl has."""
    path = folder / "o/candidates.jsonl"
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return len({json.loads(row)["item"] for row in rows})


def leaks(out):
    """Whether what a run wrote shows the colour, or says the words, that nobody may see."""
    found = []
    for path in [p for p in out.rglob("*") if p.is_file() and not p.is_symlink()]:
        if path.suffix in (".png", ".jpg"):
            found.append(path)
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if make.TEXT in text:
            return True
        parts = re.findall(r"data:image/\w+;base64,([^\"]+)", text)
        found += [io.BytesIO(base64.b64decode(part)) for part in parts]
    return any(shows(file) for file in found)


def shows(file):
    try:
        with Image.open(file) as image:
            return make.SECRET in {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    except OSError:
        return False


# ---------------------------------------------------------------- what a case may ask besides
class Tags(HTMLParser):
    """Collects what a page has that the program did not mean."""

    def __init__(self):
        super().__init__()
        self.odd = []

    def handle_starttag(self, tag, attributes):
        names = {name for name, _ in attributes if name.startswith("on") or name == "href"}
        if tag not in TAGS or names:
            self.odd.append((tag, sorted(names)))


def plain_page(folder):
    """The page has the tags of the program alone, and no text file a control character."""
    tags = Tags()
    tags.feed((folder / "o/index.html").read_text(encoding="utf-8"))
    if tags.odd:
        return "way in"
    return plain_files(folder)


def plain_files(folder):
    for path in sorted((folder / "o").rglob("*")):
        if path.suffix in (".json", ".jsonl", ".txt", ".html", ".csv"):
            if CONTROL.search(path.read_text(encoding="utf-8", errors="surrogateescape")):
                return "control"
    return None


def no_formula(folder):
    """No cell of a table begins as a spreadsheet's formula does."""
    text = (folder / "o/candidates.csv").read_text(encoding="utf-8-sig")
    for row in csv.DictReader(io.StringIO(text)):
        for name in ("item", "input", "caption"):
            if row[name].strip().startswith(tuple("=+-@")):
                return "formula"
    return None


def unchanged(name, text):
    """A file still says what it said."""
    def look(folder):
        same = (folder / name).read_text(encoding="utf-8") == text
        return None if same else "overwritten"
    return look


def no_work(folder):
    """Nothing was done before it was refused."""
    return "late" if (folder / "o/candidates.jsonl").exists() else None


def exactly(count):
    def look(folder):
        return None if items(folder) == count else "own pictures"
    return look


def same_steps(count):
    """So many steps are in the log, and in the checkpoint."""
    def look(folder):
        if not (folder / "o/log.jsonl").exists():
            return "lost"
        log = (folder / "o/log.jsonl").read_text(encoding="utf-8").splitlines()
        whole = len(log) == count and (folder / "o/checkpoint.safetensors").exists()
        return None if whole else "lost"
    return look


# ---------------------------------------------------------------- machines that lack something
def closed(number):
    """stdout or stderr is a pipe that nobody reads any more, as of `| head`."""
    def hook():
        ours, theirs = os.pipe()
        os.close(ours)
        os.dup2(theirs, number)
    return hook


def exhausted(kind):
    """The UNet finds no memory, as CUDA or the processor say it."""
    def hook():
        import diffusers
        import torch
        error = {"CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                 "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")}

        def forward(self, *inputs, **more):
            raise error[kind]
        diffusers.UNet2DConditionModel.forward = forward
    return hook


def no_programs():
    os.environ["PATH"] = "/nonexistent"
