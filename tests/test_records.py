"""What is read may be of any shape, what is written is whole, a folder is one run's, and what others'
code says is looked at."""
import io
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import data
import foreign
import loading
import records
import script

ESC = "\x1b[2Ja\x9b\u202e\x7f"
HOLD = """import records, sys, time
records.claim(sys.argv[1])
print("held", flush=True)
time.sleep(60)"""


def test_control_characters_are_seen_and_come_back():
    assert records.visible(ESC) == r"\x1b[2Ja\x9b\u202e\x7f"
    text = records.dump({"caption": ESC})
    assert json.loads(text) == {"caption": ESC} and not records.CONTROL.search(text)
    stream = io.StringIO()
    plain = script.Plain(stream)
    plain.write(f"\r50%{ESC}\n")
    plain.write(script.UP)                       # of bars below each other
    assert stream.getvalue() == "\r50%" + r"\x1b[2Ja\x9b\u202e\x7f" + "\n" + script.UP


@pytest.mark.parametrize("row,key,kinds", [
    ({}, "a", str), ({"a": None}, "a", str), ({"a": True}, "a", int), ({"a": []}, "a", (int, str)),
    (None, "a", str), ([], ("a", "b"), str), ({"c": "x"}, ("a", "b"), str)])
def test_another_shape_is_named(row, key, kinds):
    with pytest.raises(ValueError, match="^f.json, row 7: expected '[ab]' to be "):
        records.the(row, key, kinds, "f.json, row 7")


def test_the_shape_that_is_expected():
    row = {"a": 1, "b": "x"}
    assert records.the(row, "a", int, "") == 1
    assert records.the(row, ("c", "b"), str, "") == "x"
    assert records.the(row, "c", str, "", "default") == "default"


def test_a_folder_is_one_runs(tmp_path):
    """Whose it is is told; with the process that holds it goes the lock."""
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"out is in use by process {holder.pid} of "):
            records.claim(out)
    finally:
        holder.kill()
        holder.wait()
    records.claim(out)
    records.claim(out)                           # its own again


def test_a_system_without_locks_has_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "fcntl", None)
    records.claim(tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_a_fingerprint_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100_000))
    (tmp_path / "b").write_bytes(bytes(100_000))
    assert records.fingerprint(tmp_path / "a") == records.fingerprint(tmp_path / "b") != ""
    (tmp_path / "b").write_bytes(bytes(70_000) + b"x" + bytes(29_999))
    assert records.fingerprint(tmp_path / "a") != records.fingerprint(tmp_path / "b")
    assert records.fingerprint(tmp_path / "nothing") == ""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.safetensors").write_bytes(b"x")
    before = records.fingerprint(tmp_path / "run")
    (tmp_path / "run/log.jsonl").write_text("{}")            # a run's log is not its weights
    assert records.fingerprint(tmp_path / "run") == before
    assert records.marks({"captioner": "vitb", "ckpt": None, "judges": str(tmp_path)}, {"vitb"}).keys() == {"judges files"}


def test_pictures_stay_in_their_folder(tmp_path, monkeypatch):
    """Also by a link, and by a folder that is one."""
    home, away = tmp_path / "set", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (away / "x.png").touch()
    (home / "link.png").symlink_to(away / "x.png")
    (home / "more").symlink_to(away)
    assert data.inside(home / "x.png", home, "f") == home / "x.png"
    for name in ("../away/x.png", "link.png", "more/x.png", "more/../set2/x.png", ".."):
        monkeypatch.setattr(data, "LEAVE", False)
        with pytest.raises(ValueError, match="^f, row 1: .* leads out of .*--anywhere"):
            data.inside(home / name, home, "f, row 1")
        monkeypatch.setattr(data, "LEAVE", True)
        data.inside(home / name, home, "f, row 1")
        with pytest.raises(ValueError, match="leads out of"):
            data.inside(home / name, home, "o/candidates.jsonl", ours=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_no_number_is_named(value, dtype):
    layer = torch.nn.Linear(300, 300).to(dtype)
    loading.check_finite(layer)
    with torch.no_grad():
        layer.weight[7, 9] = value
        layer.weight[8, 9] = -value
    with pytest.raises(ValueError, match="its weight has weights that are no numbers"):
        loading.check_finite(layer)


CODE = """import torch
class Model:
    def speak(self, images, n=10, **more): return {speak}
    def draw(self, captions, **more): return {draw}
def load(device, dtype): return Model()
"""


def own(tmp_path, speak="[['a'] * n] * len(images), torch.zeros(len(images), n)",
        draw="torch.zeros(len(captions), 3, 8, 8)"):
    (tmp_path / "m.py").write_text(CODE.format(speak=speak, draw=draw))
    return foreign.load(f"{tmp_path / 'm.py'}:load", "cpu", None)


def test_a_model_from_a_file_speaks_and_draws(tmp_path):
    model = own(tmp_path, draw="torch.full((len(captions), 3, 8, 8), float('nan'))")
    captions, likelihood = model.speak([None, None], 3)
    assert captions == [["a"] * 3] * 2 and likelihood.tolist() == [[0.0] * 3] * 2
    assert model.draw(["a"]).isnan().all()                   # counted where it is kept


@pytest.mark.parametrize("said", [
    "None", "[['a'] * n]", "([['a'] * n], torch.zeros(1, n))", "([['a'] * (n - 1)] * 2, torch.zeros(2, n))",
    "([[7] * n] * 2, torch.zeros(2, n))", "([['a'] * n] * 2, None)", "([['a'] * n] * 2, torch.zeros(2))",
    "([['a'] * n] * 2, torch.full((2, n), float('nan')))", "1 / 0", "exit(3)"])
def test_what_it_says_is_looked_at(tmp_path, said):
    with pytest.raises(ValueError, match="m.py:load, speak"):
        own(tmp_path, speak=said).speak([None, None], 3)


@pytest.mark.parametrize("drawn", [
    "None", "[0]", "torch.zeros(2, 3, 8, 8)", "torch.zeros(1, 1, 8, 8)", "torch.zeros(1, 3, 0, 0)",
    "torch.zeros(1, 3, 8, 8).byte()", "torch.full((1, 3, 8, 8), 255.)", "captions[9]"])
def test_what_it_draws_is_looked_at(tmp_path, drawn):
    with pytest.raises(ValueError, match="m.py:load, draw"):
        own(tmp_path, draw=drawn).draw(["a"])
