"""script.py: outside of the environment, and stopped from outside, a script ends with one line."""
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

WAITS = """import script  # isort: skip
import pathlib
import time
print("kept")
pathlib.Path("ready").touch()
try:
    time.sleep(60)
except BaseException:
    time.sleep(60)                               # as who catches all
"""


@pytest.mark.parametrize("name", ["rerank", "evaluate", "finetune"])
def test_outside_of_the_environment(name, tmp_path):
    """A Python without what is installed, from another folder."""
    out = subprocess.run([sys.executable, "-S", str(ROOT / f"{name}.py")], cwd=tmp_path,
                         capture_output=True, text=True)
    assert out.returncode == 2 and out.stdout == "" and out.stderr.count("\n") == 1
    assert out.stderr.startswith(f"{name}.py: torch is missing in ")
    assert f"in {ROOT}, `source .venv/bin/activate`" in out.stderr


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("world", [{}, {"RANK": "0", "LOCAL_WORLD_SIZE": "2"}, {"RANK": "1"}])
def test_a_stop_is_one_line(tmp_path, number, code, world):
    for name in ("script.py", "records.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "waits.py").write_text(WAITS)
    command = [sys.executable, "waits.py", "a b.png", "--n", "3"]
    job = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, env={"PATH": ""} | world)
    while not (tmp_path / "ready").exists() and job.poll() is None:
        time.sleep(.02)
    job.send_signal(number)
    out, err = job.communicate(timeout=20)
    assert job.returncode == code and out == "kept\n"
    start = "torchrun --nproc_per_node=2" if world else "python"
    said = (f"\nwaits.py: stopped; this goes on: {start} waits.py 'a b.png' "
            "--n 3\n")
    assert err == ("" if world.get("RANK") == "1" else said)


@pytest.mark.parametrize("name", ["rerank", "finetune"])
def test_a_bad_flag_is_one_line(name):
    out = subprocess.run([sys.executable, f"{name}.py", "--sped"], cwd=ROOT, capture_output=True,
                         text=True)
    assert out.returncode == 2
    assert out.stderr == f"{name}.py: unrecognized arguments: --sped (--help lists the flags)\n"


def test_who_imports_it_is_left_alone():
    look = "import script, signal; print(signal.getsignal(signal.SIGTERM) is script.stop)"
    out = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout == "False\n"
