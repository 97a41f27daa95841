"""RESULTS.md says what the JSON says; the counting behind it, on hand-made cases; a tiny run."""
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import metrics
from lab import findings, joint, keep, report
from miniature import world

# claims that something is nothing
NOTHING = {"texts, cycle", "all four - tg", "all four, drawings", "own words, in", "cycle - beam",
           "clipscore - beam"}


def run(*argv):
    return subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True)


def test_no_number_is_typed_by_hand():
    page = report.page(report.RESULTS)
    assert page == (ROOT / "RESULTS.md").read_text()
    assert page.count("\n") <= 300 and "{{" not in page
    gain = json.loads((report.RESULTS / "scorers.json").read_text())["scorers"]["denoise"]["all"]
    said = f"{gain['gain']:+.1f} ["
    assert report.claims()["default gain"].startswith(said) and said in page


def test_what_is_claimed_is_beyond_chance():
    for name, text in report.claims().items():
        ends = re.findall(r"\[([-+.\d]+), ([-+.\d]+)\]", text)
        if ends:
            low, high = map(float, ends[0])
            assert (low <= 0 <= high) == (name in NOTHING), f"{name}: {text}"


def test_a_folder_without_results_is_one_line(tmp_path):
    out = run("lab.report", "--folder", str(tmp_path))
    assert out.returncode == 2 and "has no results" in out.stderr and "Traceback" not in out.stderr


def test_fewer_draws_are_stratified_too():
    for count in findings.DRAWS:
        chosen = np.array([findings.some(64, count, f"item {i}") for i in range(200)])
        for column, part in zip(chosen.T, np.array_split(np.arange(64), count)):
            assert set(column) <= set(part) and (len(part) > 8 or set(column) == set(part))


@pytest.mark.parametrize("kind", ["colour", "shape"])
def test_a_planted_word_is_wrong(kind):
    for i in range(20):
        scene = keep.scene_of(keep.DOMAINS[i % 3], i)
        true = world.full_caption(scene)
        said = keep.spoiled(true, scene, kind, i)
        assert sum(a != b for a, b in zip(true.split(), said.split())) == 1
        assert keep.truth(true, scene) == 1 > keep.truth(said, scene)


def test_pairs_as_the_reader_sees_them():
    """The likeliest of the 48 pairs is the true one, of drawn scenes of one object."""
    scenes = [s for s in (world.sample("all", i) for i in range(60)) if len(s["objects"]) == 1]
    best = findings.pairs_of(torch.stack([world.picture(s) for s in scenes])).argmax(1)
    colours, shapes = list(world.COLOURS), list(world.SHAPES)
    seen = [(colours[k // len(shapes)], shapes[k % len(shapes)]) for k in best]
    assert np.mean([[p] == world.colour_shapes(s) for p, s in zip(seen, scenes)]) > .9


def test_rows_of_joint_training():
    settings = joint.Settings(1e-3, 30, 1, 200)
    words = joint.command(joint.ROWS["own words: all four"], settings, 1e-4, 7)
    at = words.index("--weights")
    assert words[at:at + 8] == ["--weights", 1, 30, 1, 1, "--lr", 1e-3, 1e-4] and "--own" in words
    assert [name for name, row in joint.TABLE.items() if not joint.trains_generator(row)] == [
        "tg", "known pairs: tg", "own words: tg + ir"]
    assert all(row.alone in joint.ROWS for row in joint.ROWS.values() if row.alone)
    chosen, _ = joint.committed(keep.Lab(.5, 1, None, None))
    assert chosen["paired"].steps == 200 and set(chosen["kv"]) == set(joint.KV)


def test_measures_and_differences_by_hand():
    rows = [{"caption": "a red ring", "references": ["a red ring", "a hoop"], "facts": 1.0},
            {"caption": "a box", "references": ["a blue box", "a square"], "facts": .5, "ig": .1}]
    found = joint.measures(rows)
    want = metrics.cider(["a red ring", "a box"], [r["references"] for r in rows])
    assert found["CIDEr"] == pytest.approx(100 * want) and np.isnan(found["ig"][0])
    both = {"none": joint.stacked([rows]), "tg": {k: v[None] + 1 for k, v in found.items()}}
    out = joint.compared("tg", both, np.array([True, True]))
    assert out["facts minus none"]["value"] == out["facts minus none"]["low"] == 1
    assert out["ig"]["n"] == 1 and "facts minus alone" not in out


def square(x):
    return {"square": x * x}


def test_what_is_measured_is_not_measured_again(tmp_path):
    lab = keep.Lab(1, 1, tmp_path, tmp_path)
    cut = '{"key": "a", "square": 7}\n{"key": "b", "squ'                 # by a kill
    (tmp_path / "some.jsonl").write_text(cut)
    for _ in range(2):
        rows = lab.measured("some", square, {"b": (3,), "a": (2,)})
        assert [row["square"] for row in rows] == [9, 7]


LONG = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from lab import keep

def stay(here):
    Path(here, "worker").write_text(str(os.getpid()))
    write = f"open('{here}/command', 'w').write(str(os.getpid()))"
    keep.command("-c", f"import os, time; print({write}, flush=True); time.sleep(60)")

def measure(part, lab):
    lab.measured("x", stay, {"a": (str(Path.cwd()),)})

if __name__ == "__main__":
    keep.run(measure, keep.flags("", ["x"], ["--processes", "1", "--work", ".", "--out", "."]))
"""


def test_what_was_started_ends_with_it(tmp_path):
    """kill PID ends the workers and the command that one of them runs."""
    (tmp_path / "long.py").write_text(LONG)
    own = subprocess.Popen([sys.executable, "long.py", str(ROOT)], cwd=tmp_path)
    pids = [tmp_path / "command", tmp_path / "worker"]
    assert soon(lambda: all(path.exists() and path.read_text() for path in pids))
    own.terminate()
    assert own.wait(20) == 143 and soon(lambda: not any(there(path.read_text()) for path in pids))


def soon(true, seconds=30):
    return any(true() or time.sleep(.1) for _ in range(10 * seconds))


def there(pid):
    """A process that has not ended: neither gone nor a zombie that nobody has asked for."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout
    return bool(state.strip()) and state.strip()[0] != "Z"


def test_scorers_of_known_rows(tmp_path):
    """What knows the truth gains all there is and agrees with its like; what does not, does not."""
    rows, names = [], ["clip", "dino", "pixel", "few", "clipscore", "likelihood", "denoise"]
    names += [f"denoise {draws}" for draws in findings.DRAWS]
    for key, (_, domain, index) in findings.jobs(2).items():
        said = [world.captions(keep.scene_of(domain, index + i))[0] for i in range(11)]
        known, blind = [-i for i in range(10)], [i % 3 for i in range(10)]
        rows.append({"key": key, "domain": domain, "captions": said, "references": said[:1] * 2,
                     "different": 10, "scores": dict.fromkeys(names, known) | {"dino": blind},
                     "quality": dict.fromkeys(("facts", "CLIP", "SBERT"), list(range(11, 0, -1)))})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lab = keep.Lab(2 / 500, 1, tmp_path, tmp_path)
    findings.scorers(lab)
    findings.findings(lab)
    found = json.loads((tmp_path / "scorers.json").read_text())
    for name, row in found["scorers"].items():
        x = row["all"]
        right = x["chosen"] == x["oracle"] and x["same"]["value"] == x["tau"]["value"] == 1
        assert right == (name != "dino"), name
    assert found["scorers"]["clip"]["evaluations"] == 1000
    assert found["scorers"]["denoise 16"]["evaluations"] == 160
    assert all(x["all"]["value"] == 0 for x in found["differences"].values())
    first = json.loads((tmp_path / "findings.json").read_text())
    assert first["table"]["facts"]["clip"]["out"]["by_rank"] == list(range(11, 1, -1))
    beam = first["beam"]["facts"]["in"]
    assert beam["value"] == 1 and beam["gain"]["value"] == -5.5


def test_candidates_are_those_of_rerank(tmp_path):
    argv = "rerank.py --data miniature --split in --limit 1 --n 10 --scorer full --out".split()
    subprocess.run([sys.executable, *argv, tmp_path], cwd=ROOT, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    found = findings.of_picture("0", "in", 0)
    assert found["captions"][:10] == [row["caption"] for row in rows]
    for name in ("clip", "pixel", "clipscore", "likelihood"):
        theirs = [row["scores"][name] for row in rows]
        assert found["scores"][name] == pytest.approx(theirs, abs=1e-4)


def test_a_tiny_share_runs_end_to_end(tmp_path):
    out = run("lab.findings", "pictures", "--share", ".002", "--processes", "1",
              "--out", str(tmp_path), "--work", str(tmp_path / "work"))
    assert out.returncode == 0, out.stderr
    assert run("lab.report", "--folder", str(tmp_path)).returncode == 0
    page = (tmp_path / "RESULTS.md").read_text()
    assert "of each of 3 held-out texts" in page
    assert (tmp_path / "pictures.png").stat().st_size > 10_000
