"""The house rules: who imports whom, budgets of length and density, flags that torchrun leaves alone."""
import ast
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from density import LIBRARIES, count, sources

SCRIPTS = ("rerank", "finetune", "evaluate")
# what a room may import of its siblings: nothing, so that each can be copied alone; what opens models shares one door
ROOMS = {"cycle": (), "bridge": ("script",), "losses": (), "metrics": (), "page": ("pictures", "records"), "loading": ("records",), "script": ("records",),
         "records": (), "foreign": (), "devices": (),
         "pictures": (), "data": ("annotations", "pictures", "records", "script"),
         "captioners": ("cycle", "devices", "foreign", "loading"), "generators": ("cycle", "devices", "foreign", "loading"),
         "judges": ("loading", "metrics", "records"),
         "tables": ("best_of_n", "data", "judges", "metrics", "records"), "annotations": ("records",),
         "batches": ("cycle", "data", "losses", "miniature", "records"),
         "checkpoints": ("captioners", "generators", "loading", "records"),
         "best_of_n": ("cycle", "data", "losses", "records"),
         "inputs": ("annotations", "best_of_n", "data", "records"),
         "outputs": ("best_of_n", "cycle", "data", "losses", "metrics", "page", "records")}
PROGRAMS = {"rerank": "rerank.py", "finetune": "finetune.py", "evaluate": "evaluate.py",
            "bridge": "bridge.py", "data": "data.py"}
LINES, FUNCTION, MAIN, DENSITY = 430, 60, 90, 7.0


def imports(path):
    """Names of the modules a file imports, anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_every_file_of_the_top_level_is_a_room_or_a_script():
    assert sorted(p.stem for p in ROOT.glob("*.py")) == sorted([*ROOMS, *SCRIPTS])


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_sibling(room):
    assert imports(ROOT / f"{room}.py") & {*ROOMS, *SCRIPTS, "miniature", "lab"} <= set(ROOMS[room])


@pytest.mark.parametrize("room", sorted(set(ROOMS) - {"script", "batches", "checkpoints"}))
def test_what_a_room_is_copied_with_is_said(room):
    """Its docstring names all that it imports, and what these import (`script` is the command line's)."""
    found, left = set(), [room]
    while left:
        new = set(ROOMS[left.pop()]) - {"miniature", "script", room} - found
        found |= new
        left += new
    said = re.search(r"Copy this\s+file\s+(.*)", ast.get_docstring(ast.parse((ROOT / f"{room}.py").read_text())), re.S)[1]
    named = set(re.findall(r"(\w+)\.py", said.partition("\n\n")[0].partition(": it needs")[0]))
    assert named == found or ("alone" in said and not found)


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nobody_imports_a_script_or_the_lab(path):
    inside_lab = path.parent.name == "lab"
    assert not imports(path) & set(SCRIPTS) or inside_lab
    assert inside_lab or "lab" not in imports(path)


def test_importing_a_room_loads_no_model_library():
    """All of them, one after the other: the first that does is named."""
    code = (f"import importlib, sys\nfor room in {[*ROOMS]}:\n    importlib.import_module(room)\n"
            f"    found = sorted(set(sys.modules) & {LIBRARIES})\n    if found:\n        sys.exit(f'{{room}}: {{found}}')")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_is_quick(script):
    start = time.process_time(), time.time()
    out = subprocess.run([sys.executable, PROGRAMS[script], "--help"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and "python " + script in out.stdout, out.stderr
    assert time.time() - start[1] < 10           # 3 s on a quiet machine


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_survive_torchrun(script):
    """torchrun takes abbreviations of its own options anywhere on the line: no flag of ours may be one."""
    from torch.distributed.run import get_args_parser
    known = [o for a in get_args_parser()._actions for o in a.option_strings]
    source = (ROOT / f"{script}.py").read_text()
    calls = re.findall(r"add_argument\(((?:\"-[\w-]+\",? ?)+)", source)
    assert calls
    for call in calls:
        names = re.findall(r'"(-[\w-]+)"', call)
        usable = [n for n in names if n not in known and not any(o.startswith(n) for o in known if n.startswith("--"))]
        assert usable, f"{script}.py: {names} is taken by torchrun"
        assert any("-" not in n.lstrip("-") for n in names), f"{names}: flags are single words, or have such a name too"


# ---------------------------------------------------------------- budgets
@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_budgets(path):
    found = count(path)
    assert found["lines"] <= LINES
    assert found["wide"] == 0
    assert found["nested"] == 0
    assert found["own imports"] == 0
    assert found["expressions"] / found["code"] <= DENSITY
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (MAIN if node.name == "main" else FUNCTION), f"{node.name}: {lines} lines"


def thoughts(text):
    """Lines that do more than one thing, or do it in a way that nobody greps."""
    modules = {*ROOMS, "torch", "np", "world"} - {"bridge", "data", "inputs", "pictures"}   # those are things as well
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.IfExp) and any(isinstance(x, ast.IfExp) for x in (node.body, node.orelse, node.test)):
            yield node.lineno, "a chained conditional expression"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = {type(node.left), type(node.right)}
            if sides & {ast.List, ast.JoinedStr} and sides & {ast.Compare, ast.BoolOp}:
                yield node.lineno, "a list or string times a condition"
            if any(isinstance(x, ast.Call) and ast.unparse(x.func) == "bool" for x in (node.left, node.right)):
                yield node.lineno, "times bool"
        if isinstance(node, ast.FunctionDef) and modules & {a.arg for a in node.args.args}:
            yield node.lineno, "a module as an argument"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("globals", "runpy.run_path"):
            yield node.lineno, "dispatch by name"
        if isinstance(node, ast.Attribute) and node.attr == "__self__":
            yield node.lineno, "__self__"
        if isinstance(node, ast.For) and isinstance(node.target, ast.Attribute):
            yield node.lineno, "a loop over an attribute"
        if isinstance(node, ast.Return) and isinstance(node.value, ast.BoolOp) and "print(" in ast.unparse(node):
            yield node.lineno, "return print(...) or"


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_one_thought_a_line(path):
    assert not list(thoughts(path.read_text()))


@pytest.mark.parametrize("line", [
    "x = 1 if a else 2 if b else 3", "x = [note] * (a > 1)", "x = ['a'] * bool(b)", "def f(x, torch): pass",
    "globals()[part](x)", "judge.alike.__self__", "for args.out in folders: pass", "def f():\n return print(1) or 2"])
def test_the_rule_sees(line):
    assert list(thoughts(line))


def default_encoded(text):
    """Lines that read or write text in whatever encoding the system has."""
    for node in ast.walk(ast.parse(text)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        own = name.startswith("records.")        # records.write_text names it
        if name == "open" or (name.endswith((".read_text", ".write_text")) and not own):
            options = {option.arg for option in node.keywords}
            binary = name == "open" and len(node.args) > 1 and "b" in ast.unparse(node.args[1])
            if not binary and "encoding" not in options:
                yield node.lineno


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_text_is_utf_8(path):
    assert not list(default_encoded(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("line", ["open(p)", "open(p, 'w')", "p.read_text()", "p.write_text(x)",
                                  "Path(p).read_text(errors='replace')"])
def test_the_encoding_rule_sees(line):
    assert list(default_encoded(line))


def test_the_whole_is_small():
    """What it is today: what is added replaces something."""
    lines = {path: count(path)["lines"] for path in sources()}
    assert sum(n for path, n in lines.items() if path.parent == ROOT) <= 6682
    assert sum(lines.values()) <= 10325
