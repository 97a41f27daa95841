"""The tables against the metrics by hand and the golden scores; kept work; findings of a planted ranking."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import evaluate
import metrics
import rerank

HERE = Path(__file__).parent


def run(out, *argv):
    assert evaluate.main(evaluate.flags([*map(str, argv), "--out", str(out), "--device", "cpu"])) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, "--limit", 4, "--steps", 2, "--ci")


# ---------------------------------------------------------------- the tables
def test_rows_of_both_tables(whole):
    out, results = whole
    assert list(results["captions"]) == list(results["images"]) == ["in", "near", "out", "all"]
    for rows, names in ((results["captions"], evaluate.CAPTIONS), (results["images"], evaluate.PICTURES)):
        assert [r["n"] for r in rows.values()] == [4, 4, 4, 12]
        for r in rows.values():
            assert set(r) == {"n", *names}
            for name in set(names) - {"SPICE", "WMD", "FID", "IS"}:
                assert r[name]["low"] <= r[name]["high"] and np.isfinite(r[name]["value"])
    missing = " ".join(results["notes"])
    assert all(results["captions"]["all"][k] is None for k in ("WMD",)) and "--glove" in missing
    assert results["images"]["all"]["FID"] is None and "pip install torch-fidelity" in missing
    text = (out / "table.txt").read_text()
    assert "CIDEr" in text and "near" in text and "FD-DINO" in text


def test_an_inception_that_cannot_be_read_is_told_before_the_work(tmp_path, monkeypatch):
    import cycle
    (tmp_path / "page.pth").write_text("<html>404</html>")
    loaded = []
    monkeypatch.setattr(cycle.Generator, "load", lambda *a: loaded.append(a))
    argv = ["--limit", 1, "--only", "images", "--inception", tmp_path / "page.pth"]
    with pytest.raises(ValueError, match="--inception .*page.pth could not be read as plain tensor"):
        run(tmp_path / "out", *argv)
    assert not loaded and not (tmp_path / "out").exists()


def test_a_domain_is_the_mean_of_its_items(whole):
    """One document frequency over all; BLEU anew for each subset."""
    out, results = whole
    said = {r["item"]: r["caption"] for r in map(json.loads, (out / "captions-0.jsonl").read_text().splitlines())}
    items = {x.name: x for x in data.read("miniature", "nocaps")}
    names = list(said)
    each = metrics.cider(list(said.values()), [items[k].captions for k in names])
    for row, domain in (("in", "in-domain"), ("out", "out-domain")):
        some = [i for i, k in enumerate(names) if items[k].domain == domain]
        assert results["captions"][row]["CIDEr"]["value"] == pytest.approx(100 * each[some].mean())
        counts = metrics.bleu_counts([said[names[i]] for i in some], [items[names[i]].captions for i in some])
        assert results["captions"][row]["B@4"]["value"] == pytest.approx(100 * metrics.bleu(counts.sum(0))[3])
    drawn = {r["item"]: data.open_image(out / r["picture"])
             for r in map(json.loads, (out / "images-0.jsonl").read_text().splitlines())}
    judge = metrics.likenesses(["dino"], "image", "miniature").pairs["dino"]
    alike = [judge(drawn[k][None], data.open_image(items[k].path)[None])[0] for k in names]
    assert drawn[names[0]].shape == (3, 32, 32)
    assert results["images"]["all"]["DINO"]["value"] == pytest.approx(np.mean(alike))


def test_work_is_kept_and_goes_on(whole, tmp_path, monkeypatch):
    import shutil

    import cycle
    out, results = whole
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    lines = (copy / "captions-0.jsonl").read_text().splitlines()
    (copy / "captions-0.jsonl").write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:9])       # as a kill leaves it
    asked, speak = [], cycle.Captioner.speak
    monkeypatch.setattr(cycle.Captioner, "speak", lambda self, images, *a: asked.append(len(images)) or
                        speak(self, images, *a))
    monkeypatch.setattr(cycle.Generator, "draw", lambda *a: pytest.fail("pictures that are there are drawn again"))
    again = run(copy, "--limit", 4, "--steps", 2, "--ci")
    assert asked == [2] and again["captions"] == results["captions"] and again["images"] == results["images"]
    with pytest.raises(ValueError, match="steps was 2, is 3.*another --out"):
        run(copy, "--limit", 4, "--steps", 3)


def test_every_process_takes_its_share(tmp_path, monkeypatch, whole):
    """Two ranks one after the other (without a group): together the items of one, none twice."""
    import cycle
    args = evaluate.flags(["--limit", "4", "--only", "captions", "--out", str(tmp_path), "--device", "cpu"])
    items = evaluate.items_of(args, data)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        before = list(tmp_path.glob("*.jsonl"))
        for path in before:                                     # the other's work, not yet there when this one looks
            path.rename(path.with_suffix(".hidden"))
        evaluate.work(args, items, data, cycle, None)
    for path in tmp_path.glob("*.hidden"):
        path.rename(path.with_suffix(".jsonl"))
    rows = [json.loads(x)["item"] for p in tmp_path.glob("captions-*.jsonl") for x in p.read_text().splitlines()]
    assert sorted(rows) == sorted(x.name for x in items) and len(list(tmp_path.glob("captions-*.jsonl"))) == 2


# ---------------------------------------------------------------- given captions
@pytest.mark.parametrize("form", ["coco", "dict"])
def test_score_needs_no_model(tmp_path, form, monkeypatch):
    monkeypatch.setenv("SPICE_JAVA", "/nowhere/java")
    golden = json.loads((HERE / "synthetic12.json").read_text())
    said = {f"COCO_val2014_{x['image_id']:012}.jpg": x["candidate"] for x in golden["items"]}
    heard = {str(x["image_id"]): x["references"] for x in golden["items"]}
    if form == "coco":
        said = [{"image_id": x["image_id"], "caption": x["candidate"]} for x in golden["items"]]
        heard = {"annotations": [{"image_id": int(k), "id": 0, "caption": c} for k, v in heard.items() for c in v]}
    for name, content in (("said", said), ("heard", heard)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    row = run(tmp_path / "out", "--score", tmp_path / "said.json", "--refs", tmp_path / "heard.json")["captions"]["all"]
    assert row["CIDEr"] == pytest.approx(100 * golden["corpus"]["CIDEr"], abs=1e-7) and row["n"] == 12
    assert [row[f"B@{n}"] for n in range(1, 5)] == pytest.approx(
        [100 * golden["corpus"][f"Bleu_{n}"] for n in range(1, 5)], abs=1e-7)
    assert row["SPICE"] is row["CLIP"] is None
    (tmp_path / "said.json").write_text('["a dog"]')
    with pytest.raises(ValueError, match="said.json: expected"):
        run(tmp_path / "out", "--score", tmp_path / "said.json", "--refs", tmp_path / "heard.json")


def test_score_on_real_captions(shared, tmp_path):
    golden = json.loads((shared / "data/golden/coco500_input.json").read_text())
    (tmp_path / "said.json").write_text(json.dumps({x["image_id"]: x["candidate"] for x in golden}))
    (tmp_path / "heard.json").write_text(json.dumps({x["image_id"]: x["references"] for x in golden}))
    row = run(tmp_path / "out", "--score", tmp_path / "said.json", "--refs", tmp_path / "heard.json")["captions"]["all"]
    assert row["CIDEr"] == pytest.approx(91.6986, abs=.05) and row["B@4"] == pytest.approx(19.8943, abs=.05)
    files = shared / "data/captions"
    (tmp_path / "said.json").write_text(json.dumps([{"image_id": 391895, "caption": "a man on a red motorcycle"}]))
    for name in ("coco_karpathy_test.json", "coco_karpathy_test_gt_500.json"):
        result = run(tmp_path / "out", "--score", tmp_path / "said.json", "--refs", files / name)
        assert result["captions"]["all"]["n"] == 1 and result["captions"]["all"]["B@1"] > 50


def test_an_image_by_its_number():
    same = [391895, "391895", "000000391895.jpg", "val2014/COCO_val2014_000000391895.jpg", "coco_391895"]
    assert {evaluate.key(x) for x in same} == {"391895"}
    others = ["cat1.jpg", "dog1.jpg", "0013ea2087020f01.jpg", "0013ea2087020f02.jpg", "a/b 7.png"]
    assert [evaluate.key(x) for x in others] == others
    assert evaluate.keys([7, 7, "8"], "x") == ["7", "7", "8"]
    with pytest.raises(ValueError, match="a/001.jpg and b/001.jpg"):
        evaluate.keys(["a/001.jpg", "b/001.jpg"], "captions.json")


def test_names_that_look_alike_are_drawn_apart(tmp_path):
    """By a generator that takes its settings by name, as README's example does."""
    names = ["图一.png", "图二.png", "a b.png", "a_b.png"]
    for i, name in enumerate(names):
        data.save_image(torch.full((3, 32, 32), i / 4), tmp_path / "set" / name)
    (tmp_path / "set/metadata.jsonl").write_text("".join(
        json.dumps({"file_name": n, "text": f"number {i}"}) + "\n" for i, n in enumerate(names)))
    (tmp_path / "grey.py").write_text(
        "import torch\nclass Grey:\n    def draw(self, captions, items=None, seed=0, **settings):\n"
        "        return torch.stack([torch.full((3, 32, 32), int(c[-1]) / 4) for c in captions])\n"
        "def load(device, dtype):\n    return Grey()\n")
    found = run(tmp_path / "out", "--data", tmp_path / "set", "--generator", f"{tmp_path / 'grey.py'}:load", "--only",
                "images")
    assert found["images"]["all"]["n"] == 4 and found["images"]["all"]["CLIP"] == pytest.approx(1)


def test_label_free_prefers_the_true_caption(tmp_path, scenes, images):
    from miniature import world
    said = {}
    for i in range(3):
        data.save_image(images[i], tmp_path / f"set/{i}.png")
        said[f"{i}.png"] = world.full_caption(scenes[i])
    scores = []
    for name, captions in (("true", said), ("false", {k: said[f"{(i + 1) % 3}.png"] for i, k in enumerate(said)})):
        (tmp_path / f"{name}.json").write_text(json.dumps(captions))
        r = run(tmp_path / name, "--label-free", "--images", tmp_path / "set", "--captions", tmp_path / f"{name}.json",
                "--draws", 6)["label_free"]
        assert r["n"] == 3 and all(x["error"] >= 0 for x in r["items"]) and r["low"] <= r["mean"] <= r["high"]
        assert r["mean"] == pytest.approx(np.mean([x["score"] for x in r["items"]]))
        scores.append(r["mean"])
    assert scores[0] > scores[1] + .1


# ---------------------------------------------------------------- findings
def test_findings_of_a_planted_ranking(tmp_path):
    """Candidates are references and nonsense; `good` ranks the reference first, `bad` last."""
    items = data.read("miniature", "nocaps")[:6] + data.read("miniature", "out")[:6]
    with open(tmp_path / "candidates.jsonl", "w") as f:
        for i, item in enumerate(items):
            for j, caption in enumerate(("nothing at all", item.captions[0], "a ring")):
                f.write(json.dumps({"item": item.name, "direction": "image-text-image", "candidate": j, "picture": "",
                                    "caption": caption, "scores": {"good": [0, 2, 1][j], "bad": [2, 0, 1][j],
                                                                   "some": None if i % 2 else j}}) + "\n")
    results = run(tmp_path / "out", "--findings", tmp_path)
    found = results["findings"]
    good, bad = found["CIDEr by good"], found["CIDEr by bad"]
    assert list(good) == ["in", "out", "all"] and [r["items"] for r in good.values()] == [6, 6, 12]
    assert good["all"]["chosen"] == good["all"]["by_rank"][0] > 100 > bad["all"]["chosen"]
    assert good["all"]["chosen"] == pytest.approx(good["all"]["oracle"])
    assert good["all"]["by_rank"] == bad["all"]["by_rank"][::-1] and good["all"]["mean"] == bad["all"]["mean"]
    assert good["all"]["percent"] == pytest.approx(100 * good["all"]["gain"] / good["all"]["mean"])
    assert "SBERT by some" not in found and any("no choice by some" in x for x in results["notes"])
    from PIL import Image
    assert Image.open(tmp_path / "out/figure.png").width > 600


def test_findings_of_a_rerank_of_texts(tmp_path):
    assert rerank.main(rerank.flags(["--turn", "text", "--limit", "2", "--n", "2", "--steps", "2", "--device", "cpu",
                                     "--split", "near", "--out", str(tmp_path)])) == 0
    found = run(tmp_path / "out", "--findings", tmp_path, "--split", "near")["findings"]
    assert {k.split(" by ")[0] for k in found} == {"CLIP", "DINO"} and list(found["DINO by clip"]) == ["near", "all"]
    rows = [json.loads(x) for x in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    first = data.read("miniature", "near")[0]
    assert {r["input"] for r in rows if r["item"] == first.name} == {first.captions[0]}      # the text, not the picture
    with pytest.raises(ValueError, match="run rerank.py"):
        run(tmp_path / "out", "--findings", tmp_path / "none")
    with pytest.raises(ValueError, match="fewer than two items"):
        run(tmp_path / "out", "--findings", tmp_path, "--split", "val")


def test_what_is_missing_is_told(capsys):
    for argv in (["--score", "x.json"], ["--label-free"], ["--captioner", "vitb"], ["--captioner", "vitb", "--findings",
                                                                                     "x"]):
        with pytest.raises(SystemExit):
            evaluate.flags(argv)
    assert ROOT and "needs --data" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no data set at nowhere"):
        evaluate.items_of(evaluate.flags(["--data", "nowhere"]), data)


def test_a_broken_picture_is_named_and_skipped(tmp_path, images, capsys):
    for i in range(4):
        data.save_image(images[i], tmp_path / f"set/{i}.png")
    (tmp_path / "set/2.png").write_text("no picture")
    (tmp_path / "set/metadata.jsonl").write_text("".join(
        json.dumps({"file_name": f"{i}.png", "text": f"a {c} ring"}) + "\n" for i in range(4) for c in ("red", "blue")))
    results = run(tmp_path / "out", "--data", tmp_path / "set", "--steps", 2)
    assert results["captions"]["all"]["n"] == results["images"]["all"]["n"] == 3
    assert "2.png is not a picture" in " ".join(results["notes"]) and "2.png" in capsys.readouterr().err
