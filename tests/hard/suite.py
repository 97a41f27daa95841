"""All of it, or a share:  python tests/hard/suite.py [--share] [PART] [WORD ...]

PART is of PARTS, or some with commas; without one, all. WORDs: inputs whose names hold them all, kinds
of kills. --share: a seeded part of each, as `make test` runs it. All of it without words writes
tests/hard/README.md. Exit code 1 where anything is not well.
"""
import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import fork

HERE = Path(__file__).resolve().parent
PARTS = ("inputs", "kills", "together", "torchrun", "long", "properties")
SHARE = {"inputs": 25, "kills": 1, "together": 1}          # as `rows` says
SEED = 20
EXAMPLES = 400                                   # of a property, by conftest.py


def rows(part, place, share, words):
    """Yields (name, how many were tried, "well" or what is wrong, detail) of a part."""
    import bad_inputs
    import kills
    import together
    import trial
    some = SHARE.get(part) if share else None
    case = place / "case"
    if part == "inputs":
        names = {x.name for x in bad_inputs.CASES}
        if not len(bad_inputs.CASES) == len(names) >= 200:
            raise ValueError("bad_inputs.py: two cases have one name, or there are fewer than 200")
        cases = [x for x in bad_inputs.CASES if all(word in x.name for word in words)]
        if some:
            cases = random.Random(SEED).sample(cases, some)
        finished = trial.prepare(place)
        for x in cases:
            yield x.name, 1, *trial.attempt(x, case, finished)
    elif part == "kills":
        kinds = ("rerank", "finetune") if some else [k for k in kills.RUNS if not words or k in words]
        for name, verdict, detail in kills.trials(place, kinds, some, SEED):
            yield name, 1, verdict, detail
    elif part == "together":
        for name, verdict, detail in together.pairs(case, some):
            yield name, 1, verdict, detail
    elif part in ("torchrun", "long") and not share:
        for name, verdict, detail in getattr(together, part)(case):
            yield name, 1, verdict, detail
    elif part == "properties":
        yield from properties(place / "found.xml")


def properties(path):
    """The tests of test_properties.py, those of hypothesis with up to EXAMPLES each."""
    import test_properties
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / "test_properties.py"), "--hypothesis-profile=hard", f"--junitxml={path}"]
    subprocess.run(command, cwd=HERE.parent.parent, stdout=subprocess.DEVNULL)
    for test in ElementTree.parse(path).iter("testcase"):
        wrong = [x.get("message") for x in test if x.tag in ("failure", "error")]
        drawn = hasattr(getattr(test_properties, test.get("name").partition("[")[0]), "hypothesis")
        yield f"property: {test.get('name')}", EXAMPLES if drawn else 1, "broken" if wrong else "well", "; ".join(wrong)


def run(parts, share=False, words=(), log=print):
    """{name: [tried, verdict, detail]}: of rows of one name the worst."""
    found = {}
    for part in parts:
        place = Path(tempfile.mkdtemp(prefix="parley-hard-"))
        try:
            for name, tried, verdict, detail in rows(part, place, share, words):
                row = found.setdefault(name, [0, "well", ""])
                row[0] += tried
                if verdict != "well":
                    row[1:] = verdict, detail
                    log(f"{verdict:10} {name}: {detail[:300]}")
        finally:
            shutil.rmtree(place, ignore_errors=True)
    return found


# ---------------------------------------------------------------- what is written of it
def table(found):
    """Lines of a Markdown table: a row a kind."""
    kinds = collections.defaultdict(collections.Counter)
    for name, (tried, verdict, _) in found.items():
        kind = name.partition(":")[0]
        kinds[kind]["tried"] += tried
        kinds[kind]["rows"] += 1
        kinds[kind][verdict] += 1
    columns = ("tried", "rows", "well", "traceback", "silent", "unnamed", "lines", "way in", "control", "lost", "other")
    lines = ["| kind | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    total = collections.Counter()
    for kind, counts in kinds.items():
        counts["other"] = counts["rows"] - sum(counts[c] for c in columns[2:-1])
        total += counts
        lines.append(f"| {kind} | " + " | ".join(str(counts[c]) for c in columns) + " |")
    lines.append("| all | " + " | ".join(str(total[c]) for c in columns) + " |")
    return lines


def write(found, seconds, how="in one go"):
    text = [
        "# Hard use", "",
        f"Written by suite.py, which `make test-hard` runs ({seconds / 60:.0f} minutes on {os.cpu_count()} hyperthreads, {how}).",
        "What is tried: bad inputs (bad_inputs.py), runs that are killed, stopped or out of disk at each of their",
        "file operations, of those that are alike at the first (kills.py), two runs at once and torchrun",
        "(together.py), and what must hold of any input (test_properties.py). `make test` runs a share.", "",
        *table(found), "",
        "tried: runs; rows: cases that differ, of each the worst. well: refused in one line that names the file,",
        "flag or value; or named, and the rest done; or taken, rightly; after a kill the same files to the last",
        "bit. silent: accepted, and not said. way in: a file out of the set read and shown, code run, or markup in",
        "a page. control: a control character printed or written. What is not well:", "",
        *([f"- {name}: {verdict}" for name, (_, verdict, _) in sorted(found.items()) if verdict != "well"]
          or ["nothing."]), ""]
    (HERE / "README.md").write_text("\n".join(text), encoding="utf-8")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", nargs="?", help=f"some of {','.join(PARTS)}, with commas")
    p.add_argument("words", nargs="*")
    p.add_argument("--share", action="store_true")
    p.add_argument("--json", type=Path, help="file for {name: [tried, verdict, detail]}")
    args = p.parse_args()
    began = time.monotonic()
    fork.warm()
    parts = args.part.split(",") if args.part else PARTS
    found = run(parts, args.share, args.words)
    seconds = time.monotonic() - began
    print("\n".join(table(found)))
    print(f"{sum(x[0] for x in found.values())} tried in {seconds:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if not args.part and not args.share:
        write(found, seconds)
    return int(any(verdict != "well" for _, verdict, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
