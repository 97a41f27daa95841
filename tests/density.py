"""How dense the code is, by a small counter:  python tests/density.py [FOLDER]

A line of the table a file: its lines; expressions of the syntax tree a line that holds code
(docstrings apart); the share of lines over 100 columns; comprehensions within comprehensions;
imports inside functions; the longest function.
"""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LIBRARIES = {"transformers", "diffusers", "tokenizers", "matplotlib", "pyarrow", "torch_fidelity",
             "pycocoevalcap"}                    # loaded where they are needed


def sources(root=ROOT):
    """The files that are counted: all but tests."""
    found = [*root.glob("*.py"), *root.glob("miniature/*.py"), *root.glob("lab/*.py")]
    return sorted(path for path in found if path.read_text(encoding="utf-8").strip())


def docstrings(tree):
    """The nodes of all docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
            continue
        if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
            yield body[0]


def inside(node, kinds):
    """The nodes of these kinds below a node."""
    return [x for x in ast.walk(node) if x is not node and isinstance(x, kinds)]


def count(path):
    """{what: number} of one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    skipped = set()
    for string in docstrings(tree):
        skipped.update(id(node) for node in ast.walk(string))
    nodes = [node for node in ast.walk(tree) if id(node) not in skipped]
    code = {node.lineno for node in nodes if hasattr(node, "lineno")}
    expressions = sum(isinstance(node, ast.expr) for node in nodes)
    functions = [node for node in nodes if isinstance(node, FUNCTION)]
    hidden = []
    for function in functions:
        for node in inside(function, (ast.Import, ast.ImportFrom)):
            name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            hidden.append(name.split(".")[0])
    lengths = [f.end_lineno - f.lineno + 1 for f in functions]
    lines = text.splitlines()
    return {
        "lines": len(lines),
        "expressions": expressions,
        "code": len(code),
        "wide": sum(len(line) > 100 for line in lines),
        "nested": sum(bool(inside(node, COMPREHENSION)) for node in nodes
                      if isinstance(node, COMPREHENSION)),
        "imports": len(hidden),
        "own imports": sum(name not in LIBRARIES for name in hidden),
        "longest": max(lengths, default=0),
    }


def table(root):
    """The lines that are printed."""
    rows = {path.relative_to(root).as_posix(): count(path) for path in sources(root)}
    top = [row for name, row in rows.items() if "/" not in name]
    rows["all of the top level"] = total(top)
    rows["all"] = total([row for name, row in rows.items() if not name.startswith("all")])
    head = f"{'':24}{'lines':>7}{'expr/line':>11}{'> 100':>8}{'nested':>8}{'imports':>9}{'longest':>9}"
    out = [head]
    for name, row in rows.items():
        dense = row["expressions"] / row["code"]
        wide = 100 * row["wide"] / row["lines"]
        out.append(f"{name:24}{row['lines']:7}{dense:11.1f}{wide:7.1f}%{row['nested']:8}"
                   f"{row['imports']:9}{row['longest']:9}")
    return out


def total(rows):
    """Sums of some files' counts; the longest function is the longest of all."""
    out = {key: sum(row[key] for row in rows) for key in rows[0]}
    return out | {"longest": max(row["longest"] for row in rows)}


if __name__ == "__main__":
    print("\n".join(table(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)))
