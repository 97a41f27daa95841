"""The house rules: rooms import no sibling and are free to import, scripts are imported by nobody, flags survive."""
import ast
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if "__main__" in p.read_text() and "flags(" in p.read_text())
ROOMS = sorted(p.stem for p in ROOT.glob("*.py") if p.stem not in SCRIPTS)
HEAVY = {"transformers", "diffusers", "tokenizers"}


def imports(path, top=False):
    """Names of the modules a file imports; only those at the top level with top=True."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_both_kinds_of_file_are_there():
    assert {"rerank", "miniature"} <= set(SCRIPTS) and {"cycle", "data", "world"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_sibling(room):
    assert not imports(ROOT / f"{room}.py") & (set(ROOMS) | set(SCRIPTS))


def test_a_script_is_imported_by_nobody():
    for path in ROOT.glob("*.py"):
        assert not imports(path) & set(SCRIPTS), path.name


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_is_free(room):
    code = f"import sys, {room}; print(sorted(set(sys.modules) & {HEAVY}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_loads_no_model_library(script):
    assert not imports(ROOT / f"{script}.py", top=True) & (HEAVY | {"torch"})
    start = time.process_time(), time.time()
    out = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and "python " + script in out.stdout
    assert time.time() - start[1] < 4


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


def test_budgets():
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= (110 if node.name == "main" else 60), f"{path.name}: {node.name} has {lines} lines"


PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Who may call torch's reader and writer of pickles, and why. metrics.py reads --inception and what
# torch-fidelity would download, restricted to tensors; and writes them anew, to a file of its own
# that torch-fidelity may then unpickle. All other weights are safetensors, or read by a library's
# from_pretrained.
MAY = {("metrics.py", "inception_weights", "torch.load"),
       ("metrics.py", "inception_weights", "torch.hub.load_state_dict_from_url"),
       ("metrics.py", "fidelity", "torch.save")}
ALLOWED = {"weights_only": "True", "allow_pickle": "False", "trust_remote_code": "False"}
RESTRICTED = ("torch.load", "torch.hub.load_state_dict_from_url")
FORBIDDEN = ("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
             "torch.serialization.load", "torch.serialization.add_safe_globals")


def unpickling(name, text):
    """({(file, function, call)} that read or write pickles in a file, what is wrong in it)."""
    found, wrong = set(), []
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wrong += [a.name for a in node.names if a.name.split(".")[0] in PICKLES]
            wrong += [f"torch as {a.asname}" for a in node.names if a.name == "torch" and a.asname]
        elif isinstance(node, ast.ImportFrom):
            root = node.module.split(".")[0]
            wrong += [node.module] if root in PICKLES else []
            wrong += [f"from {node.module} import {a.name}" for a in node.names
                      if root == "torch" and a.name.startswith(("load", "save"))]
        elif isinstance(node, ast.Attribute):
            name_of = ast.unparse(node)
            wrong += [name_of] * (name_of in FORBIDDEN or node.attr == "read_pickle")
        elif isinstance(node, ast.keyword):
            value = ast.unparse(node.value)
            if value != ALLOWED.get(node.arg, value):
                wrong.append(f"{node.arg}={value}")
        elif isinstance(node, ast.Dict):
            wrong += ["trust_remote_code" for k, v in zip(node.keys, node.values) if k is not None
                      and ast.unparse(k) == "'trust_remote_code'" and ast.unparse(v) != "False"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in RESTRICTED:
            said = {k.arg: ast.unparse(k.value) for k in node.keywords}
            wrong += [ast.unparse(node)] * (said.get("weights_only") != "True")
    inside = {}
    for function in [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]:
        inside |= dict.fromkeys(ast.walk(function), function.name)   # the inner one comes last
    for node in ast.walk(tree):
        call = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if call in {c for *_, c in MAY}:
            found.add((name, inside.get(node), call))
    return found, wrong


def test_nothing_committed_unpickles():
    found = set()
    for path in ROOT.glob("*.py"):
        calls, wrong = unpickling(path.name, path.read_text())
        assert not wrong, path.name
        found |= calls
    assert found == MAY


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "torch.load(p)",
    "torch.load(p, weights_only=False)", "torch.load(p, weights_only=flag)",
    "from torch import load", "import torch as t",
    "torch.hub.load('a/b', 'c')", "numpy.load(p, allow_pickle=True)",
    "torch.hub.load_state_dict_from_url(u)", "f(p, trust_remote_code=True)",
    "options = {'trust_remote_code': True}", "read = torch.jit.load"])
def test_the_house_rule_sees(line):
    assert unpickling("x.py", line)[1]
