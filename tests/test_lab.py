"""RESULTS.md says what the JSON says; the counting behind it, on hand-made cases; a tiny run."""
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT

import metrics
import rerank
from lab import choice, findings, joint, keep, report
from miniature import world

# claims that something is nothing
NOTHING = {"texts, cycle", "texts, both", "texts, both, facts", "all four - tg",
           "all four, drawings", "own words, in", "cycle - beam, out", "cycle facts",
           "both - beam, in", "clipscore - beam", "clipscore - beam, near", "per token - beam, in",
           "per token - beam, near", "per token - beam, out"}


def run(*argv):
    return subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True)


def test_no_number_is_typed_by_hand():
    page = report.page(report.RESULTS)
    assert page == (ROOT / "RESULTS.md").read_text()
    assert page.count("\n") <= 300 and "{{" not in page
    rows = json.loads((report.RESULTS / "choice.json").read_text())["rows"]
    said = f"{rows['both']['all']['CIDEr minus beam']['value']:+.1f} ["
    assert report.claims()["both - beam"].startswith(said) and said in page


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
    for count in choice.DRAWS:
        chosen = np.array([choice.some(64, count, f"item {i}") for i in range(200)])
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


def test_choices_among_known_rows(tmp_path):
    """What knows the truth chooses the best of ten and loses nothing to a beam search that is as
    good; what does not know it does."""
    rows, drawn = [], []
    known, blind = [-i for i in range(13)], [i % 3 for i in range(13)]
    for key, (_, domain, index) in findings.jobs(2).items():
        said = [world.captions(keep.scene_of(domain, index + i))[0] for i in range(16)]
        said[15] = said[0]
        row = {"key": key, "domain": domain, "captions": said, "references": said[:1] * 2}
        scores = dict.fromkeys(("likelihood", "denoise", "clipscore", "error"), known)
        scores |= dict.fromkeys(("per token", "per token, T 0.5", "per token, T 2"), known)
        good = [*range(16, 1, -1), 16]
        seconds = dict.fromkeys(("samples", "beam", "likelihood", "denoise", "clipscore"), 1)
        rows.append(row | {"different": 10, "scores": scores | {"clipscore": blind},
                           "longer": {}, "seconds": seconds,
                           "quality": dict.fromkeys(("facts", "CLIP", "SBERT"), good)})
        scores = {"clip": known[:10], "dino": blind[:10], "few": known[:10]}
        drawn.append(row | {"scores": scores, "seconds": dict.fromkeys(scores, 5)})
    for name, kept in (("choice-test", rows), ("captions", drawn)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    choice.test(keep.Lab(2 / 500, 1, tmp_path, tmp_path))
    found = json.loads((tmp_path / "choice.json").read_text())
    for name in ("denoise", "likelihood", "per token", "both", "clip", "few"):
        assert found["rows"][name]["out"]["facts minus beam"]["value"] == 0, name
    for name in ("clipscore", "dino"):           # the third of ten
        assert found["rows"][name]["in"]["facts minus beam"]["value"] == -2, name
    assert found["rows"]["a random one"]["all"]["facts minus beam"]["value"] == -4.5
    assert found["rows"]["both"]["evaluations"] == 120 and found["rows"]["both"]["seconds"] == 3
    assert found["rows"]["clip"]["evaluations"] == 1000 and found["rows"]["clip"]["seconds"] == 6
    assert found["agreement with clip"]["both"]["tau"]["value"] == 1
    assert found["differences"]["both minus clipscore"]["near"]["facts"]["value"] == 2


def test_the_rules_are_what_they_say():
    dice = np.random.default_rng(0)
    names = ("denoise", "likelihood", "per token", "clipscore", "per token, T 0.5",
             "per token, T 2", "error")
    scores = {name: dice.normal(size=(4, 10)) for name in names}
    found = choice.rules(scores)
    first, second = (scipy.stats.zscore(scores[name], axis=1) for name in ("per token", "denoise"))
    assert found["both"] == pytest.approx(first + second)
    assert found["z(per token) + 2 z(denoise)"] == pytest.approx(first + 2 * second)
    assert found["per token + 30 denoise"][1, 3] == pytest.approx(
        scores["per token"][1, 3] + 30 * scores["denoise"][1, 3])
    without = choice.rules(scores | {"error": 0 * scores["error"]})
    assert without["weighted by error"] == pytest.approx(first + second)


def test_candidates_are_those_of_rerank(tmp_path):
    """Captions and scores of the studies equal rerank.py's, of the cycle and of both losses."""
    rows = {}
    for scorer, steps in (("full", "50"), ("both", "0")):
        argv = "--data miniature --split in --limit 1 --n 10 --device cpu --scorer".split()
        argv += [scorer, "--steps", steps, "--out", str(tmp_path / scorer)]
        assert rerank.main(rerank.flags(argv)) == 0
        lines = (tmp_path / scorer / "candidates.jsonl").read_text().splitlines()
        rows[scorer] = [json.loads(line) for line in lines]
    found = {"full": findings.of_picture("0", "in", 0),
             "both": choice.of_picture("0", "in", 0, 10, 0, [])}
    found["both"]["scores"]["per_token"] = found["both"]["scores"]["per token"]
    compared = {"full": ("clip", "pixel", "clipscore", "likelihood"),
                "both": ("denoise", "per_token", "likelihood", "clipscore")}
    for scorer, names in compared.items():
        assert found[scorer]["captions"][:10] == [row["caption"] for row in rows[scorer]]
        for name in names:
            theirs = [row["scores"][name] for row in rows[scorer]]
            assert found[scorer]["scores"][name][:10] == pytest.approx(theirs, abs=1e-4), name


def test_a_tiny_share_runs_end_to_end(tmp_path):
    out = run("lab.findings", "pictures", "--share", ".002", "--processes", "1",
              "--out", str(tmp_path), "--work", str(tmp_path / "work"))
    assert out.returncode == 0, out.stderr
    assert run("lab.report", "--folder", str(tmp_path)).returncode == 0
    page = (tmp_path / "RESULTS.md").read_text()
    assert "of each of 3 held-out texts" in page
    assert (tmp_path / "pictures.png").stat().st_size > 10_000
