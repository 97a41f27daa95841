"""A share of the hard use: all of it is `make test-hard`."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def share(part, folder):
    """A share of a part, in a process of its own: it forks, and this one has threads."""
    command = [sys.executable, str(HERE / "suite.py"), part, "--share", "--json", str(folder / "found.json")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (folder / "found.json").exists(), ran.stderr[-2000:]
    assert ran.returncode == 0, ran.stdout[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("part,least", [("inputs", 25), ("kills,together", 3)])
def test_nothing_lost_nothing_silently_wrong_nobody_let_in(part, least, tmp_path):
    found = share(part, tmp_path)
    assert sum(tried for tried, *_ in found.values()) >= least
