"""Nothing that is committed reads a pickle, but for what is named here; no loader trusts code."""
import ast

import pytest
from density import sources

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Who may call torch's reader and writer of pickles, and why. judges.py reads --inception and what
# torch-fidelity would download, restricted to tensors; and writes them anew, to a file of its own
# that torch-fidelity may then unpickle. All other weights are safetensors, or read by a library's
# from_pretrained.
MAY = {("judges.py", "inception_weights", "torch.load"),
       ("judges.py", "inception_weights", "torch.hub.load_state_dict_from_url"),
       ("judges.py", "inception_features", "torch.save")}
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
    for path in sources():
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
