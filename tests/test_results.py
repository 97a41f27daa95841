"""RESULTS.md and the README say what results/*.json say; the counting behind them on hand-made cases."""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import metrics
import report
import results
import world


def test_no_number_is_typed_by_hand():
    """RESULTS.md and the README's marked tables, made again from the JSON files."""
    text, parts = report.write(ROOT / "results")
    assert text == (ROOT / "RESULTS.md").read_text()
    page = (ROOT / "README.md").read_text()
    assert report.readme(page, parts) == page
    marked = re.findall(r"<!-- (?!end)(\w+) -->\n(.)", page)
    assert len(marked) >= 5 and all(name in parts and first == "|" for name, first in marked)   # and none is empty
    first = json.loads((ROOT / "results/scorers.json").read_text())["scorers"]["clip"]["all"]
    assert f"{first['chosen']:.1f} | {first['gain']:+.1f} [" in page                          # the JSON's own number
    changed = page.replace(f"{first['chosen']:.1f} |", "999.9 |")
    assert changed != page and report.readme(changed, parts) == page


def test_report_of_another_folder(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "some", ignore=shutil.ignore_patterns("quick"))
    before = (ROOT / "README.md").read_text()
    assert report.main(report.flags(["--folder", str(tmp_path / "some")])) == 0
    assert (tmp_path / "RESULTS.md").exists() and (tmp_path / "some/scorers.png").stat().st_size > 10_000
    assert (ROOT / "README.md").read_text() == before
    out = subprocess.run([sys.executable, "report.py", "--folder", str(tmp_path)], cwd=ROOT, capture_output=True,
                         text=True)
    assert out.returncode == 2 and "has no results" in out.stderr and "Traceback" not in out.stderr


@pytest.mark.parametrize("count", results.DRAWS)
def test_fewer_draws_are_stratified_too(count):
    chosen = results.some(64, count)
    assert len(set(chosen)) == count
    assert (np.floor(chosen * count / 64) == np.arange(count)).all()                          # one in each equal part


@pytest.mark.parametrize("kind", ["colour", "shape"])
def test_a_planted_word_is_wrong(kind):
    for i in range(20):
        scene = world.sample(("test", "near", "out")[i % 3], i)
        true = world.full_caption(scene)
        said = results.spoil(true, scene, kind, i, world)
        assert sum(a != b for a, b in zip(true.split(), said.split())) == 1
        assert results.truth(true, scene, world) == 1 > results.truth(said, scene, world)


def test_what_a_row_trains_and_weighs():
    words = results.argv(None, results.TABLE["own words: all four"], (1e-3, 1e-4), 30, 7, 200)
    at = words.index("--weights")
    assert [str(x) for x in words[at:at + 5]] == ["--weights", "1", "30", "1", "1"] and "--own" in words
    assert [k for k, f in results.TABLE.items() if not results.draws(f)] == [
        "tg", "known pairs: tg", "own words: tg + ir"]
    rows = {**results.TABLE, **results.VARIANTS}
    assert all(set(v) <= rows.keys() and not results.draws(rows[v[0]]) or k in results.VARIANTS
               for k, v in results.ALONE.items())


def test_marks_by_hand():
    """CIDEr of examine's rows equals metrics.cider of the same; what was not taken is nan."""
    rows = [{"caption": "a red ring", "references": ["a red ring", "a hoop"], "facts": 1.0, "tg": .5},
            {"caption": "a box", "references": ["a blue box", "a square"], "facts": .5, "tg": .7, "ig": .1, "pairs": 1}]
    found = results.marks(rows, metrics)
    want = metrics.cider(["a red ring", "a box"], [r["references"] for r in rows])
    assert found["CIDEr"] == pytest.approx(100 * want) and np.isnan(found["ig"][0]) and found["pairs"][1] == 1


def test_pairs_as_the_reader_sees_them():
    """The likeliest of the 48 pairs is the true one, of drawn scenes of one object."""
    eye = world.reader(ROOT / "miniature/reader/model.safetensors")
    scenes = [s for s in (world.sample("all", i) for i in range(60)) if len(s["objects"]) == 1]
    images = torch.from_numpy(np.stack([world.draw(s) for s in scenes])).permute(0, 3, 1, 2) / 255
    best = results.pair_of(eye, images, world).argmax(1)
    seen = [(list(world.COLOURS)[k // len(world.SHAPES)], list(world.SHAPES)[k % len(world.SHAPES)]) for k in best]
    assert np.mean([[p] == world.pairs(s) for p, s in zip(seen, scenes)]) > .9


def test_caches_know_their_settings(tmp_path, monkeypatch):
    """A run of other settings is trained anew, one that was killed goes on, a finished one is left alone."""
    calls = []

    def fake(args, script, *argv, **options):
        out, argv = argv[argv.index("--out") + 1], [str(x) for x in argv]
        calls.append("--resume" in argv)
        (out / "checkpoint.safetensors").write_bytes(b"")
        (out / "checkpoint.json").write_text(json.dumps({"step": 1 if len(calls) == 1 else 3}))
    monkeypatch.setattr(results, "run", fake)
    args = results.flags(["joint", "--work", str(tmp_path), "--processes", "1"])
    for lr, want in ((1, [False]), (1, [False, True]), (1, [False, True]), (2, [False, True, False])):
        results.train(args, {"a": ["--lr", lr, "--steps", 3]})
        assert calls == want


def told(tmp_path, monkeypatch, items=4):
    """results.py's arguments, with rerank.py's place taken by candidates made here: the first of an item is its own
    human caption and picture, the others are its neighbours'; `clip` knows, the other scores do not."""
    def fake(args, script, *argv, **options):
        flag = dict(zip(argv, argv[1:]))
        found, rows = data.read(ROOT / "miniature/data", flag["--split"])[:items], []
        for i, item in enumerate(found):
            for j in range(flag["-n"]):
                other = found[(i + j) % items]
                picture = flag["--out"] / f"{i}-{j}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(other.path, picture)
                scores = dict.fromkeys(("clip", "dino", "pixel", "clipscore", "likelihood", "sbert", "cider"), 0.0)
                rows.append({"item": item.name, "candidate": j, "caption": other.captions[0], "picture": picture.name,
                             "scores": scores | {"clip": -float(j), "dino": float(j % items)}})
        (flag["--out"] / "candidates.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(results, "run", fake)
    monkeypatch.setattr(results, "world_set", lambda args: ROOT / "miniature/data")
    return results.flags(["samplers", "pictures", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])


def test_samplers(tmp_path, monkeypatch):
    results.samplers(told(tmp_path, monkeypatch))
    found = json.loads((tmp_path / "out/samplers.json").read_text())
    assert list(found["ways"]) == ["top-p", "top-k", "temperature", "typical"]
    assert list(found["N"]) == ["2", "5", "10", "20"]
    for r in (*found["ways"].values(), *found["N"].values()):                    # its own caption is the oracle
        assert r["clip"]["chosen"] == r["clip"]["oracle"] > r["dino"]["chosen"] and r["clip"]["items"] == 12
    assert report.text_samplers(found)[2].count("\n") == 5


def test_pictures(tmp_path, monkeypatch):
    results.pictures(told(tmp_path, monkeypatch))
    found = json.loads((tmp_path / "out/pictures.json").read_text())
    for quality in ("CLIP", "DINO"):
        r = found["II"][quality]["clip"]["all"]
        assert r["chosen"] == pytest.approx(1) == r["oracle"] and found["II"][quality]["dino"]["all"]["chosen"] < .95
    assert found["II"]["facts"]["clip"]["all"]["chosen"] > .95                    # the reader reads the true pictures
    assert found["sets"]["clip"]["FD-DINO"] == pytest.approx(0, abs=1e-6) and 1 < found["sets"]["clip"]["IS"] < 48
    assert any("FD-DINO" in line for line in report.text_pictures(found))


def test_kept_numbers_are_plain(tmp_path):
    args = results.flags(["scorers", "--out", str(tmp_path)])
    results.keep(args, "x", {"a": np.float64(1 / 3), "b": [np.nan, np.int64(2)], (0, 1): True})
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["a"] == .33333 and found["b"] == [None, 2] and found["(0, 1)"] is True and "machine" in found["about"]
    with pytest.raises(SystemExit):
        results.flags(["nothing"])
