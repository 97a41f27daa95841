"""RESULTS.md and the README say what results/*.json say; the counting behind them on hand-made cases."""
import json
import re
import shutil
import subprocess
import sys
import time

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
    joint = json.loads((ROOT / "results/joint.json").read_text())
    typed = page.split("    python finetune.py --split train --own")[1].split("\n")[0].split()    # the recipe
    chosen = joint["commands"]["own words: tg + ir"].split()
    for flag, count in (("--weights", 2), ("--lr", 2), ("--steps", 1)):
        x, y = (list(map(float, c[c.index(flag) + 1:][:count])) for c in (typed, chosen))
        assert x == y, flag
    marked = re.findall(r"<!-- (?!end)(\w+) -->\n(.)", page)
    assert len(marked) >= 5 and all(name in parts and first == "|" for name, first in marked)   # and none is empty
    first = json.loads((ROOT / "results/scorers.json").read_text())["scorers"]["clip"]["all"]
    assert f"| {first['gain']:+.1f} [" in page                                                # the JSON's own number
    changed = page.replace(f"| {first['gain']:+.1f} [", "| 999.9 [")
    assert changed != page and report.readme(changed, parts) == page


def test_what_the_text_claims_is_beyond_chance():
    found = {k: json.loads((ROOT / f"results/{k}.json").read_text()) for k in (
        "scorers", "pictures", "texts", "joint", "variants", "val")}
    claimed = report.claims(found)
    assert len(claimed) >= 39 and not [k for k, x in claimed.items() if report.interval(x)[0] <= 0]
    assert not [r for r in found["val"]["rows"] if report.interval(r["minus even"])[0] > 0]      # as text_val says


def test_a_wrong_sign_is_shown(tmp_path):
    found = json.loads((ROOT / "results/joint.json").read_text())
    (tmp_path / "joint.json").write_text(json.dumps(found))
    assert "11 of 11" in "\n".join(report.signs(tmp_path))
    for end in ("value", "low", "high"):
        found["rows"]["own words: tg + ir"]["out"]["CIDEr minus none"][end] *= -1
    (tmp_path / "joint.json").write_text(json.dumps(found))
    table = "\n".join(report.signs(tmp_path))
    assert "10 of 11" in table and re.search(r"CIDEr minus none, out \|.*\*\*no\*\*", table)


def test_report_of_another_folder(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "some", ignore=shutil.ignore_patterns("quick", "short"))
    before = (ROOT / "README.md").read_text()
    assert report.main(report.flags(["--folder", str(tmp_path / "some")])) == 0
    assert (tmp_path / "some/RESULTS.md").exists() and (tmp_path / "some/scorers.png").stat().st_size > 10_000
    assert (ROOT / "README.md").read_text() == before
    out = subprocess.run([sys.executable, "report.py", "--folder", str(tmp_path)], cwd=ROOT, capture_output=True,
                         text=True)
    assert out.returncode == 2 and "has no results" in out.stderr and "Traceback" not in out.stderr


def test_fewer_draws_are_stratified_too():
    for count in results.DRAWS:
        chosen = np.array([results.some(64, count, f"item {i}") for i in range(200)])
        for column, part in zip(chosen.T, np.array_split(np.arange(64), count)):              # one in each equal part
            assert set(column) <= set(part) and (len(part) > 8 or set(column) == set(part))
    assert (results.some(64, 8, "a") == results.some(64, 8, "a")).all()


@pytest.mark.parametrize("kind", ["colour", "shape"])
def test_a_planted_word_is_wrong(kind):
    for i in range(20):
        scene = world.sample(("test", "near", "out")[i % 3], i)
        true = world.full_caption(scene)
        said = results.spoil(true, scene, kind, i, world)
        assert sum(a != b for a, b in zip(true.split(), said.split())) == 1
        assert results.truth(true, scene, world) == 1 > results.truth(said, scene, world)


def test_what_a_row_trains_and_weighs():
    words = results.argv(results.TABLE["own words: all four"], (1e-3, 1e-4), {"ir": 30}, 200, 7)
    at = words.index("--weights")
    assert [str(x) for x in words[at:at + 5]] == ["--weights", "1", "30", "1", "1"] and "--own" in words
    assert [k for k, f in results.TABLE.items() if not results.draws(f)] == [
        "tg", "known pairs: tg", "own words: tg + ir"]
    rows = {**results.TABLE, **results.VARIANTS}
    assert all({k, *v} <= rows.keys() for k, v in results.ALONE.items())
    assert results.VARIANTS.keys() < results.ALONE.keys()
    quick = json.loads((ROOT / "results/variants.json").read_text())["chosen"]            # smaller sizes: from here
    assert quick["kv"].keys() == set(results.KV) and quick.keys() >= {"paired", "own", "known", "tr", "generator"}
    assert not any(results.draws(rows[v[0]]) for k, v in results.ALONE.items() if k in results.TABLE)


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


def test_what_was_started_ends_with_it(tmp_path):
    """kill PID of results.py ends the command it runs and its workers: here, as many processes as two jobs."""
    (tmp_path / "long.py").write_text("import os, pathlib, time\n\n\ndef stay(where):\n"
                                      "    pathlib.Path(where).write_text(str(os.getpid()))\n    time.sleep(60)\n\n\n"
                                      f"if __name__ == '__main__':\n    stay({str(tmp_path / 'command')!r})\n")
    (tmp_path / "begin.py").write_text(
        "import concurrent.futures, multiprocessing, sys\n\nimport long\n\nif __name__ == '__main__':\n"
        f"    sys.path.insert(0, {str(ROOT)!r})\n    import results\n"
        "    pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))\n"
        f"    pool.submit(long.stay, {str(tmp_path / 'worker')!r})\n"
        f"    results.words = lambda args: results.run(args, {str(tmp_path / 'long.py')!r}, several=False)\n"
        f"    results.main(results.flags(['words', '--work', {str(tmp_path / 'work')!r}]))\n")
    own, pids = subprocess.Popen([sys.executable, tmp_path / "begin.py"]), [tmp_path / k for k in ("command", "worker")]
    assert soon(lambda: all(x.exists() and x.read_text() for x in pids))
    assert all(there(x.read_text()) for x in pids)
    own.terminate()
    assert own.wait(20) == 143 and soon(lambda: not any(there(x.read_text()) for x in pids))


def soon(true, seconds=20):
    return any(true() or time.sleep(.1) for _ in range(10 * seconds))


def there(pid):
    """A process that has not ended: neither gone nor a zombie that nobody has asked for."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout
    return bool(state.strip()) and state.strip()[0] != "Z"


def told(tmp_path, monkeypatch, items=4):
    """results.py's arguments, with rerank.py's place taken by candidates made here: the first of an item is its own
    human caption and picture, the others are its neighbours'; `clip` knows, the other scores do not."""
    def fake(args, script, *argv, **options):
        flag = dict(zip(argv, argv[1:]))
        found, rows = data.read(ROOT / "miniature/data", flag["--split"])[:items], []
        for i, item in enumerate(found[:flag.get("--limit")]):
            for j in range(flag["-n"]):
                other = found[(i + j) % items]
                picture = flag["--out"] / f"{i}-{j}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(other.path, picture)
                others = ("pixel", "clipscore", "likelihood", "sbert", "cider")
                scores = {k: float((j + len(k)) % items) for k in others} | {
                    "clip": -float(j % items), "dino": float(j % items)}
                if "--agree" in flag:
                    scores["clip again"] = scores["clip"] if i < 2 else None
                rows.append({"item": item.name, "candidate": j, "caption": other.captions[0], "picture": picture.name,
                             "scores": scores})
        (flag["--out"] / "candidates.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(results, "run", fake)
    monkeypatch.setattr(results, "world_set", lambda args: ROOT / "miniature/data")
    return results.flags(["samplers", "pictures", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])


def losses(args, name, jobs):
    """In the place of `denoised`: the loss of a caption is its place, so the first is the best."""
    return {item: (captions, np.arange(draws) * 1000 // draws, np.tile(np.arange(len(captions)), (draws, 1)) + .5)
            if span else (captions, np.array([60]), np.arange(len(captions))[None] + .5)
            for _, item, captions, draws, span in jobs}


def test_scorers(tmp_path, monkeypatch):
    """Scores that know the truth keep all of the gain and agree with each other, on the items that have them."""
    args = told(tmp_path, monkeypatch)
    monkeypatch.setattr(results, "denoised", losses)
    monkeypatch.setattr(results, "seconds", lambda *args: {"clip": 1.0, "items": 1, "threads": 1})
    results.scorers(args)
    found = json.loads((tmp_path / "out/scorers.json").read_text())
    for name, r in found["scorers"].items():
        c, some = r["all"], name == "again"
        assert r["items"] == c["items"] == 3 * r["in"]["items"] == (6 if some else 12)
        if not re.search("dino|pixel|clipscore|likelihood", name):
            assert c["chosen"] == c["oracle"] and c["kept"] == 1 == c["same"]["value"] == c["tau"]["value"], name
    assert found["scorers"]["dino"]["all"]["kept"] < .5 > found["scorers"]["dino"]["all"]["same"]["value"]
    assert found["scorers"]["denoise 16"]["evaluations"] == found["scorers"]["few"]["evaluations"] == 4 * 16
    assert found["scorers"]["clip"]["evaluations"] == 4 * 100 == found["scorers"]["again"]["evaluations"]
    for k, x in found["differences"].items():
        assert (x["all"]["value"] == 0) == ("clipscore" not in k), k                # clipscore alone does not know
    assert len(found["differences"]) == 7
    assert found["scorers"]["denoise"]["all"]["with_beams_over_beam"]["value"] == 0 and "with_beams" not in found[
        "scorers"]["clip"]["all"]
    assert sum(x.startswith("| chosen by") for x in report.text_scorers(found)) == 6


def test_scorers_of_fewer_pictures(tmp_path, monkeypatch):
    """What was measured on the first pictures only is compared on these, and nothing else changes."""
    monkeypatch.setattr(results, "denoised", losses)
    monkeypatch.setattr(results, "seconds", lambda *args: {"items": 1, "threads": 1})
    found = []
    for aside in (4, 2):
        args = told(tmp_path, monkeypatch)
        args.aside = aside
        results.scorers(args)
        found.append(json.loads((tmp_path / "out/scorers.json").read_text())["scorers"])
    whole, first = found
    fewer = {k for k, r in first.items() if r["items"] == 6}
    assert fewer == {"few", "halved 60", "again", *(f"denoise {n}" for n in results.DRAWS)}
    assert all(first[k] == whole[k] for k in whole.keys() - fewer)
    assert first["few"]["all"]["chosen"] == first["few"]["all"]["oracle"] and first["few"]["all"]["kept"] == 1


def test_sizes():
    """A smaller run counts no more of anything than the full one, and lies beside it."""
    full, short, quick = (results.flags(["--size", k]) for k in ("full", "short", "quick"))
    assert full.out / "short" == short.out and full.out / "quick" == quick.out and full.parts == short.parts
    for a, b in ((quick, short), (short, full)):
        for k in results.SIZES["full"]:
            assert vars(b)[k] is None or vars(a)[k] <= vars(b)[k], k
    assert short.items >= 500 <= full.items and results.share(short, 50) == 15


def test_a_sum_of_ranks():
    score = {"a": np.array([[1., 2, 3, 0]]), "b": np.array([[5., 9, 7, 6]])}
    assert results.pick(score, "ranks: a + b", 3).tolist() == [[-1 - 2 - 1, -1 - 0, -0 - 1]]
    assert results.pick(score, "a", 3).tolist() == [[1, 2, 3]] and results.pick(score, "ranks: a + b", 5) is None


def test_denoised_does_nothing_twice(tmp_path, monkeypatch):
    """Rows of the same settings are read; of others they are measured again."""
    args, calls = results.flags(["--work", str(tmp_path)]), []

    class Pool:
        def map(self, f, jobs, chunksize):
            calls.append(len(jobs))
            return [{"item": j[1], "captions": j[2], "timesteps": [0] * j[3], "loss": [[0.0]] * j[3]} for j in jobs]
    monkeypatch.setattr(results, "workers", lambda processes, dtype: Pool())
    jobs = [("x.png", f"item {i}", ["a ring"], 2, (0, 1)) for i in range(3)]
    for change, want in (((), [3]), ((), [3]), ((2, ["a box"]), [3, 1]), ((3, 4), [3, 1, 1]), ((), [3, 1, 1, 1])):
        job = list(jobs[0])
        if change:
            job[change[0]] = change[1]
        found = results.denoised(args, "x", [tuple(job), *jobs[1:]])
        assert calls == want and found["item 0"][0] == job[2] and found["item 0"][2].shape == (job[3], 1)


def test_samplers(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "denoised", losses)
    results.samplers(told(tmp_path, monkeypatch))
    found = json.loads((tmp_path / "out/samplers.json").read_text())
    assert list(found["ways"]) == ["top-p", "top-k", "temperature", "typical"]
    assert list(found["N"]) == ["2", "5", "10", "20"]
    for r in (*found["ways"].values(), *found["N"].values()):                    # its own caption is the oracle
        assert r["clip"]["chosen"] == r["clip"]["oracle"] > r["dino"]["chosen"] and r["clip"]["items"] == 12
    assert report.text_samplers(found)[2].count("\n") == 5


def test_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "measured", lambda args, name, f, jobs: {
        item: {"own": [0.0] * 10, "less": [-1.0] * 10} for _, item, _ in jobs})
    results.pictures(told(tmp_path, monkeypatch))
    found = json.loads((tmp_path / "out/pictures.json").read_text())
    for quality in ("CLIP", "DINO"):
        r = found["table"][quality]
        assert r["clip"]["all"]["chosen"] == pytest.approx(1) == r["clip"]["all"]["oracle"]
        assert r["dino"]["all"]["chosen"] < .95
    assert found["table"]["facts"]["clip"]["all"]["chosen"] > .95                 # the reader reads the true pictures
    assert found["sets"]["clip"]["FD-DINO"] == pytest.approx(0, abs=1e-6) and 1 < found["sets"]["clip"]["IS"] < 48
    assert any("FD-DINO" in line for line in report.text_pictures(found))


def test_check_says_which_bars_were_missed():
    names = ("captioner facts", "generator pairs", "vae pairs", "real pairs", "captions distinct of 10")
    figures = {f"{n}, {d}": {"value": .5, "low": .4, "high": .6, "n": 9, "bar": None} for n in names
               for d in ("in", "near", "out")}
    figures["generator pairs, in"] |= {"bar": .4}
    figures["vae pairs"] = figures["vae pairs, in"] | {"bar": .9}
    rows = report.text_check({"figures": figures})[0].splitlines()
    assert rows[3].endswith("| in >= 0.4: met |") and rows[4].endswith("| all >= 0.9: missed |") and len(rows) == 7


def test_kept_numbers_are_plain(tmp_path):
    args = results.flags(["scorers", "--out", str(tmp_path)])
    results.keep(args, "x", {"a": np.float64(1 / 3), "b": [np.nan, np.int64(2)], (0, 1): True})
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["a"] == .33333 and found["b"] == [None, 2] and found["(0, 1)"] is True and "machine" in found["about"]
    with pytest.raises(SystemExit):
        results.flags(["nothing"])
