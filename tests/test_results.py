"""RESULTS.md and the README say what results/*.json say; the counting behind them on hand-made cases."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import report
import results
import world


def test_no_number_is_typed_by_hand():
    """RESULTS.md and the README's marked tables, made again from the JSON files."""
    text, parts = report.write(ROOT / "results")
    assert text == (ROOT / "RESULTS.md").read_text()
    page = (ROOT / "README.md").read_text()
    assert report.readme(page, parts) == page and page.count("<!-- end -->") >= 3
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


def test_kept_numbers_are_plain(tmp_path):
    args = results.flags(["scorers", "--out", str(tmp_path)])
    results.keep(args, "x", {"a": np.float64(1 / 3), "b": [np.nan, np.int64(2)], (0, 1): True})
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["a"] == .33333 and found["b"] == [None, 2] and found["(0, 1)"] is True and "machine" in found["about"]
    with pytest.raises(SystemExit):
        results.flags(["nothing"])
