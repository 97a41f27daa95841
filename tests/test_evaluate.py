"""The tables against the metrics by hand and the golden scores; kept work; findings of a planted
ranking."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import annotations
import data
import evaluate
import inputs
import judges
import metrics
import outputs
import records
import rerank
import tables
from captioners import Captioner
from generators import Generator
from miniature import world

HERE = Path(__file__).parent


def run(out, *argv):
    argv = [*map(str, argv), "--out", str(out), "--device", "cpu"]
    assert evaluate.main(evaluate.flags(argv)) == 0
    return json.loads((out / "results.json").read_text())


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, "--limit", 4, "--steps", 2, "--ci")


# ---------------------------------------------------------------- the tables
def test_rows_of_both_tables(whole):
    out, results = whole
    assert list(results["captions"]) == list(results["images"]) == ["in", "near", "out", "all"]
    for kind, names in (("captions", tables.CAPTIONS), ("images", tables.PICTURES)):
        assert [r["n"] for r in results[kind].values()] == [4, 4, 4, 12]
        for r in results[kind].values():
            assert set(r) == {"n", *names}
            for name in set(names) - {"SPICE", "WMD", "FID", "IS"}:
                assert r[name]["low"] <= r[name]["high"] and np.isfinite(r[name]["value"])
    missing = " ".join(results["notes"])
    assert results["captions"]["all"]["WMD"] is None and "--glove" in missing
    assert results["images"]["all"]["FID"] is None and "pip install torch-fidelity" in missing
    text = (out / "table.txt").read_text()
    assert "CIDEr" in text and "near" in text and "FD-DINO" in text


@pytest.mark.parametrize("name, text", [("results.json", "[]"), ("results.json", '{"a": 1}'), ("table.txt", "mine")])
def test_somebodys_own_files_are_left_alone(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / "settings.json").write_text("{}")         # a trainer's
    with pytest.raises(ValueError, match=f"holds {name} of no run"):
        run(tmp_path, "--score", write(tmp_path / "c.json", {"1": "a"}), "--refs", write(tmp_path / "r.json", {"1": ["a"]}))
    assert (tmp_path / name).read_text() == text


def test_an_inception_that_cannot_be_read_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    loaded = []
    monkeypatch.setattr(Generator, "load", lambda *a: loaded.append(a))
    argv = ["--limit", 1, "--only", "images", "--inception", tmp_path / "page.pth"]
    with pytest.raises(ValueError, match="page.pth could not be read as plain.*--inception"):
        run(tmp_path / "out", *argv)
    assert not loaded and [*(tmp_path / "out").glob("[!.]*")] == []


def test_a_domain_is_the_mean_of_its_items(whole):
    """One document frequency over all; BLEU anew for each subset."""
    out, results = whole
    said = {r["item"]: r["caption"] for r in records.read_rows(out / "captions-0.jsonl")}
    items = {x.name: x for x in data.read("miniature", "nocaps")}
    names = list(said)
    each = metrics.cider(list(said.values()), [items[k].captions for k in names])
    for row, domain in (("in", "in-domain"), ("out", "out-domain")):
        found = results["captions"][row]
        some = [i for i, k in enumerate(names) if items[k].domain == domain]
        assert found["CIDEr"]["value"] == pytest.approx(100 * each[some].mean())
        captions = [said[names[i]] for i in some]
        counts = metrics.bleu_counts(captions, [items[names[i]].captions for i in some])
        bleu = metrics.bleu(counts.sum(0))
        assert found["B@4"]["value"] == pytest.approx(100 * bleu[3])
    judge = judges.load(["dino"], "image", "miniature")[0]["dino"]
    alike = []
    for row in records.read_rows(out / "images-0.jsonl"):
        drawn = data.open_image(out / row["picture"])
        real = data.open_image(items[row["item"]].path)
        assert drawn.shape == (3, 32, 32)
        alike.append(judge.alike(drawn[None], real[None])[0])
    assert results["images"]["all"]["DINO"]["value"] == pytest.approx(np.mean(alike))


def test_sets_of_pictures_are_scored_as_sets(tmp_path, monkeypatch, images):
    """By an Inception of our own: FID of all pairs, none of a domain of one picture."""
    features = np.random.default_rng(0).normal(size=(8, 2048 + 1008))

    def see(image):
        row = features[[int(image.mean() * 1e4) % 8]]
        return row[:, :2048], row[:, 2048:]
    monkeypatch.setattr(judges, "inception_features", lambda device, weights: see)
    items, files = [], []
    for i in range(4):
        for side in ("real", "drawn"):
            picture = images[i] if side == "real" else images[i].flip(-1) * .9
            data.save_image(picture, tmp_path / side / f"{i}.png")
        domain = "out-domain" if i == 3 else "in-domain"
        items.append(data.Item(str(i), tmp_path / f"real/{i}.png", ["a ring"], domain))
        files.append(tmp_path / f"drawn/{i}.png")
    rows = tables.of_pictures(items, files, "none", "cpu", [])
    drawn = [see(data.open_image(file)) for file in files]
    real = [see(data.open_image(item.path)) for item in items]
    fid = metrics.frechet(np.concatenate([f for f, _ in drawn]),
                          np.concatenate([f for f, _ in real]))
    score = metrics.inception_score(np.concatenate([logits for _, logits in drawn]))
    assert rows["all"]["FID"] == pytest.approx(fid) and rows["all"]["IS"] == pytest.approx(score)
    assert rows["in"]["FID"] > 0 and rows["out"]["FID"] is rows["out"]["IS"] is None
    assert rows["all"]["CLIP"] is rows["all"]["FD-DINO"] is None


def test_work_is_kept_and_goes_on(whole, tmp_path, monkeypatch):
    out, results = whole
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    lines = (copy / "captions-0.jsonl").read_text().splitlines()
    cut = "\n".join(lines[:-2]) + "\n" + lines[-2][:9]                    # as a kill leaves it
    (copy / "captions-0.jsonl").write_text(cut)
    asked, speak = [], Captioner.speak

    def count(self, images, *args):
        asked.append(len(images))
        return speak(self, images, *args)
    monkeypatch.setattr(Captioner, "speak", count)
    monkeypatch.setattr(Generator, "draw", lambda *a: pytest.fail("drawn again, what is there"))
    again = run(copy, "--limit", 4, "--steps", 2, "--ci")
    assert asked == [2]
    assert again["captions"] == results["captions"] and again["images"] == results["images"]
    with pytest.raises(ValueError, match="steps was 2, is 3.*another --out"):
        run(copy, "--limit", 4, "--steps", 3)


def test_every_process_takes_its_share(tmp_path, monkeypatch, whole, captioner):
    """Two ranks one after the other (without a group): together the items of one, none twice."""
    items, _ = evaluate.items_of("miniature", limit=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        for path in tmp_path.glob("*.jsonl"):        # not yet there when this one looks
            path.rename(path.with_suffix(".hidden"))
        todo = evaluate.share(items, tmp_path, "captions")
        path = tmp_path / f"captions-{rank}.jsonl"
        records.append_rows(path, evaluate.say(captioner, todo, tmp_path, "beam", 0))
    for path in tmp_path.glob("*.hidden"):
        path.rename(path.with_suffix(".jsonl"))
    files = sorted(tmp_path.glob("captions-*.jsonl"))
    assert [len(records.read_rows(path)) for path in files] == [6, 6]
    one = records.read_rows(whole[0] / "captions-0.jsonl")
    assert evaluate.kept(tmp_path, "captions") == {row["item"]: row for row in one}
    assert not evaluate.share(items, tmp_path, "captions")


# ---------------------------------------------------------------- given captions
@pytest.mark.parametrize("form", ["coco", "dict"])
def test_score_needs_no_model(tmp_path, form, monkeypatch):
    monkeypatch.setenv("SPICE_JAVA", "/nowhere/java")
    golden = json.loads((HERE / "synthetic12.json").read_text())
    corpus = golden["corpus"]
    said, heard = {}, {}
    for x in golden["items"]:
        said[f"COCO_val2014_{x['image_id']:012}.jpg"] = x["candidate"]
        heard[str(x["image_id"])] = x["references"]
    if form == "coco":
        said = [{"image_id": x["image_id"], "caption": x["candidate"]} for x in golden["items"]]
        rows = []
        for image, captions in heard.items():
            rows += [{"image_id": int(image), "id": 0, "caption": c} for c in captions]
        heard = {"annotations": rows}
    argv = ["--score", write(tmp_path / "said.json", said),
            "--refs", write(tmp_path / "heard.json", heard)]
    row = run(tmp_path / "out", *argv)["captions"]["all"]
    assert row["CIDEr"] == pytest.approx(100 * corpus["CIDEr"], abs=1e-7) and row["n"] == 12
    for n in range(1, 5):
        assert row[f"B@{n}"] == pytest.approx(100 * corpus[f"Bleu_{n}"], abs=1e-7)
    assert row["SPICE"] is row["CLIP"] is None
    (tmp_path / "said.json").write_text('["a dog"]')
    with pytest.raises(ValueError, match="said.json, row 1: expected"):
        run(tmp_path / "out", *argv)


def test_score_on_real_captions(shared, tmp_path):
    golden = json.loads((shared / "data/golden/coco500_input.json").read_text())
    said = write(tmp_path / "said.json", {x["image_id"]: x["candidate"] for x in golden})
    heard = write(tmp_path / "heard.json", {x["image_id"]: x["references"] for x in golden})
    row = run(tmp_path / "500", "--score", said, "--refs", heard)["captions"]["all"]
    assert row["CIDEr"] == pytest.approx(91.6986, abs=.05)
    assert row["B@4"] == pytest.approx(19.8943, abs=.05)
    write(said, [{"image_id": 391895, "caption": "a man on a red motorcycle"}])
    for name in ("coco_karpathy_test.json", "coco_karpathy_test_gt_500.json"):
        heard = shared / "data/captions" / name
        results = run(tmp_path / name, "--score", said, "--refs", heard)
        row = results["captions"]["all"]
        assert row["n"] == 1 and row["B@1"] > 50 and row["CIDEr"] == 0
        assert "CIDEr of one image alone is 0" in " ".join(results["notes"])


def test_cider_of_one_image_is_told(tmp_path):
    """The number is the field's: n-grams are weighed among images."""
    refs = write(tmp_path / "heard.json", {"1": ["a dog runs"], "2": ["a cat"]})
    for said, told in (({"1": "a dog runs"}, True), ({"1": "a dog runs", "2": "a cat"}, False)):
        path = write(tmp_path / "said.json", said)
        results = run(tmp_path / "out", "--score", path, "--refs", refs)
        assert (results["captions"]["all"]["CIDEr"] == 0) == told
        assert ("CIDEr of one image alone is 0" in " ".join(results["notes"])) == told


def test_an_image_by_its_number(tmp_path):
    same = [391895, "391895", "000000391895.jpg", "val2014/COCO_val2014_000000391895.jpg",
            "coco_391895"]
    assert {annotations.key(x) for x in same} == {"391895"}
    others = ["cat1.jpg", "dog1.jpg", "0013ea2087020f01.jpg", "0013ea2087020f02.jpg", "a/b 7.png"]
    assert [annotations.key(x) for x in others] == others
    said = write(tmp_path / "captions.json", dict.fromkeys(["a/001.jpg", "b/001.jpg"], "a dog"))
    with pytest.raises(ValueError, match="captions.json: a/001.jpg and b/001.jpg"):
        annotations.by_key(said)


@pytest.mark.parametrize("content", [
    {"annotations": [{"image_id": 7, "id": 0, "caption": "a dog"},
                     {"image_id": 7, "id": 1, "caption": "a cat"}],
     "images": [{"id": 7, "domain": "in-domain"}]},
    {"images": [{"imgid": 1, "cocoid": 7, "sentences": [{"raw": "a dog"}, {"raw": "a cat"}]}]},
    [{"image": "val2014/COCO_val2014_000000000007.jpg", "caption": ["a dog", "a cat"]}],
    [{"image": "7.jpg", "image_id": "x", "caption": c} for c in ("a dog", "a cat")],
    [{"image_id": 7, "caption": c} for c in ("a dog", "a cat")],
    [{"image_id": 7, "file_name": "test/0000.png", "caption": c} for c in ("a dog", "a cat")],
    {"7.jpg": ["a dog", "a cat"], "8.jpg": []}])
def test_files_of_captions(tmp_path, content):
    (image, row), = annotations.by_key(write(tmp_path / "a.json", content)).items()
    assert (image, row.captions) == ("7", ["a dog", "a cat"]) and row.domain in (None, "in-domain")
    with pytest.raises(ValueError, match="a.json has several captions of 1 images, such as .*7"):
        annotations.results_in(tmp_path / "a.json")                   # which one is meant?


@pytest.mark.parametrize("content", [
    3, None, "a dog", ["a dog"], {"7": 3}, {"7": [3]}, [{"image_id": 7}], [{"caption": "a dog"}],
    {"annotations": [{"image_id": 7}]}, {"annotations": 3}, {"images": [{"id": 7}]},
    {"7": None}, {"7": ["a dog", None]}])
def test_files_of_something_else_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match="a.json(, .*[17]'?)?: expected"):
        annotations.by_key(write(tmp_path / "a.json", content))


def test_names_that_look_alike_are_drawn_apart(tmp_path):
    """By a generator that takes its settings by name, as README's example does."""
    names = ["图一.png", "图二.png", "a b.png", "a_b.png"]
    rows = []
    for i, name in enumerate(names):
        data.save_image(torch.full((3, 32, 32), i / 4), tmp_path / "set" / name)
        rows.append({"file_name": name, "text": f"number {i}"})
    records.write_rows(tmp_path / "set/metadata.jsonl", rows)
    (tmp_path / "grey.py").write_text(
        "import torch\nclass Grey:\n"
        "    def draw(self, captions, items=None, seed=0, **settings):\n"
        "        return torch.stack([torch.full((3, 32, 32), int(c[-1]) / 4) for c in captions])\n"
        "def load(device, dtype):\n    return Grey()\n")
    argv = ["--data", tmp_path / "set", "--split", "all", "--generator", f"{tmp_path / 'grey.py'}:load"]
    found = run(tmp_path / "out", *argv, "--only", "images")["images"]["all"]
    assert found["n"] == 4 and found["CLIP"] == pytest.approx(1)


def test_label_free_prefers_the_true_caption(tmp_path, scenes, images):
    true, false = {}, {}
    for i in range(3):
        data.save_image(images[i], tmp_path / f"set/{i}.png")
        true[f"{i}.png"] = world.full_caption(scenes[i])
        false[f"{(i + 1) % 3}.png"] = true[f"{i}.png"]
    means = []
    for name, captions in (("true", true), ("false", false)):
        path = write(tmp_path / f"{name}.json", captions)
        argv = ["--label-free", "--images", tmp_path / "set", "--captions", path, "--draws", 6]
        r = run(tmp_path / name, *argv)["label_free"]
        assert r["n"] == 3 and r["low"] <= r["mean"] <= r["high"]
        assert all(x["error"] >= 0 for x in r["items"])
        assert r["mean"] == pytest.approx(np.mean([x["score"] for x in r["items"]]))
        means.append(r["mean"])
    assert means[0] > means[1] + .1


def pictured(folder, images):
    """Five pictures, whose numbers are not the ids of their images; COCO's `images` knows them."""
    rows = []
    for i in range(5):
        data.save_image(images[i], folder / f"{100 + i:04}.png")
        rows.append({"id": 104 - i, "file_name": f"{100 + i:04}.png"})
    return rows


@pytest.mark.parametrize("job", ["score", "label-free"])
def test_pictures_are_found_by_the_references(tmp_path, images, job):
    """Number 100 is image 104: by `images` each meets its own picture, else its number's, told."""
    rows = pictured(tmp_path / "set", images)
    said = {f"{x['id']}": f"a ring {x['id']}" for x in rows}
    heard = {"annotations": [{"image_id": x["id"], "caption": "a red ring"} for x in rows]}
    bare = write(tmp_path / "bare.json", heard)
    full = write(tmp_path / "full.json", heard | {"images": rows})
    captions = write(tmp_path / "said.json", said)
    notes, found = [], {}
    for refs in (full, bare):
        if job == "score":
            items, _ = inputs.matched([captions], refs, notes, tmp_path / "set")
        else:
            items, _ = inputs.pictured(captions, refs, tmp_path / "set", notes)
        found[refs] = {x.name: x.path.name for x in items}
    assert found[full] == {str(x["id"]): x["file_name"] for x in rows}
    assert found[bare] == {str(x["id"]): f"{x['id']:04}.png" for x in rows}
    assert "5 by `images`" in notes[0] and "5 by number" in notes[1]
    rows[0]["file_name"] = "0099.png"                # what is named is not guessed
    write(full, heard | {"images": rows})
    with pytest.raises(ValueError, match=r"1 of 5 images have no picture .*0099.png \(0\)"):
        inputs.pictured(captions, full, tmp_path / "set", [])


def test_pictures_are_found_by_name(tmp_path, images):
    for name in ("cats/img_1.png", "dogs/img_1.png", "7.png", "x/8.png"):
        data.save_image(images[0], tmp_path / "set" / name)
    names = ["cats/img_1.png", "7.png", "8", "dogs/img_1.png"]
    said = write(tmp_path / "said.json", dict.fromkeys(names, "a ring"))
    notes = []
    items, _ = inputs.pictured(said, None, tmp_path / "set", notes)
    assert [x.path.relative_to(tmp_path / "set").as_posix() for x in items] == [
        "cats/img_1.png", "7.png", "x/8.png", "dogs/img_1.png"]
    assert "3 by name, 1 by number" in notes[0]
    write(said, {"img_1.png": "a ring", "9.png": "a ring"})
    with pytest.raises(ValueError, match=r"2 of 2 images .* such as img_1.png \(2\)"):
        inputs.pictured(said, None, tmp_path / "set", notes)


def test_clipscore_of_given_captions(tmp_path, scenes, images):
    rows = pictured(tmp_path / "set", images)
    (tmp_path / "set/0104.png").write_text("no picture")
    said, heard = {}, {"images": rows, "annotations": []}
    for row, scene in zip(rows, scenes):
        said[f"{row['id']}.jpg"] = world.full_caption(scene)
        for caption in world.captions(scene):
            heard["annotations"].append({"image_id": row["id"], "caption": caption})
    argv = ["--score", write(tmp_path / "said.json", said), "--images", tmp_path / "set",
            "--refs", write(tmp_path / "heard.json", heard), "--judges", "miniature"]
    results = run(tmp_path / "out", *argv)
    judge = judges.load(["clip"], "image", "miniature")[0]["clip"]
    each = []
    for i, scene in enumerate(scenes[:4]):
        caption = world.full_caption(scene)
        image = data.open_image(tmp_path / f"set/{100 + i:04}.png")[None]
        each.append(judge.clipscore(image, caption, world.captions(scene)))
    row = results["captions"]["all"]
    assert (row["CLIPScore"], row["RefCLIPScore"]) == pytest.approx(tuple(np.mean(each, 0)))
    assert row["n"] == 5 and row["CIDEr"] > 0
    notes = " ".join(results["notes"])
    assert "CLIPScore is the mean of 4 of 5 captions" in notes and "0104.png is not a pic" in notes
    assert "RefCLIPScore" in (tmp_path / "out/table.txt").read_text()


# ---------------------------------------------------------------- two systems
def test_two_systems_are_compared(tmp_path):
    """Each value is that of --score; interval and p those of the items' CIDEr, by domain."""
    items = data.read("miniature", "nocaps")[:8] + data.read("miniature", "out")[:8]
    heard = {"annotations": [], "images": []}
    a, b = {}, {"77777": "a ring"}
    for i, item in enumerate(items):
        heard["images"].append({"id": int(item.name), "domain": item.domain})
        heard["annotations"] += [{"image_id": int(item.name), "caption": c} for c in item.captions]
        a[item.name] = "a small red ring on the left"
        b[item.name] = item.captions[0] if i % 4 else "nothing"
    paths = [write(tmp_path / "a.json", a), write(tmp_path / "b.json", b)]
    refs = ["--refs", write(tmp_path / "heard.json", heard)]
    results = run(tmp_path / "out", "--compare", *paths, *refs)
    found = results["compare"]
    for side, path in zip("ab", paths):
        alone = run(tmp_path / side, "--score", path, *refs)["captions"]
        for domain, row in alone.items():
            for name in ("B@1", "B@4", "CIDEr"):
                compared = found[f"{name}, {domain}"]
                assert compared[side] == pytest.approx(row[name], abs=1e-9)
                assert compared["items"] == row["n"]
    df = metrics.document_frequency([x.captions for x in items])
    each = [metrics.cider([x[i.name] for i in items], [i.captions for i in items], df)
            for x in (a, b)]
    want = metrics.paired(100 * each[0][8:], 100 * each[1][8:])
    got = found["CIDEr, out"]
    assert got["p"] == want["p"] < .1 and got["interval"] == pytest.approx(want["interval"])
    assert got["difference"] == pytest.approx(got["b"] - got["a"])
    assert any("1 of the 17 images of" in note and "b.json" in note for note in results["notes"])
    assert "CIDEr, out" in (tmp_path / "out/table.txt").read_text()
    same = run(tmp_path / "same", "--compare", paths[0], paths[0], *refs)["compare"]
    assert {row["p"] for row in same.values()} == {1} and "WMD, all" not in same


# ---------------------------------------------------------------- findings
def plant(folder, items, made="miniature nocaps"):
    """Candidates are references and nonsense; `good` ranks the reference first, `bad` last."""
    rows = []
    for i, item in enumerate(items):
        for j, caption in enumerate(("nothing at all", item.captions[0], "a ring")):
            scores = {"good": [0, 2, 1][j], "bad": [2, 0, 1][j], "some": None if i % 2 else j,
                      "most": [None, 2, 1][j]}
            rows.append({"item": item.name, "direction": "image-text-image", "candidate": j,
                         "input": str(item.path), "picture": "", "caption": caption,
                         "scores": scores})
    records.write_rows(folder / "candidates.jsonl", rows)
    name, _, split = made.rpartition(" ")
    settings = {"data": name or "None", "split": split, "judges": "miniature"}
    if name == "miniature":
        settings["content"] = data.content_of(data.read(name, split))
    write(folder / "settings.json", settings)


def test_findings_of_a_planted_ranking(tmp_path):
    everything = data.read("miniature", "nocaps")
    items = everything[:6] + data.read("miniature", "out")[:6]
    plant(tmp_path, items)
    results = run(tmp_path / "out", "--findings", tmp_path)
    found = results["findings"]
    good, bad = found["CIDEr by good"], found["CIDEr by bad"]
    assert list(good) == ["in", "out", "all"]
    assert [r["items"] for r in good.values()] == [6, 6, 12]
    good, bad = good["all"], bad["all"]
    assert good["chosen"] == pytest.approx(good["by_rank"][0], rel=1e-12)
    assert good["chosen"] > 100 > bad["chosen"]
    assert good["chosen"] == pytest.approx(good["oracle"])
    assert good["by_rank"] == bad["by_rank"][::-1] and good["mean"] == bad["mean"]
    assert good["percent"] == pytest.approx(100 * good["gain"] / good["mean"])
    df = metrics.document_frequency([x.captions for x in everything])    # not of the twelve
    said, heard = [x.captions[0] for x in items], [x.captions for x in items]
    assert good["chosen"] == pytest.approx(100 * metrics.cider(said, heard, df).mean())
    assert "SBERT by some" not in found and found["CIDEr by most"] == found["CIDEr by good"]
    assert any("no choice by some" in x for x in results["notes"])
    assert "12 candidates without most come last by it" in results["notes"]
    assert Image.open(tmp_path / "out/figure.png").width > 600


def test_findings_where_items_have_different_numbers(tmp_path):
    """Against CIDEr by hand; an item that a kill has cut is left out, and few items are told."""
    items = data.read("miniature", "test")
    plant(tmp_path, items[:4], "miniature test")
    rows = records.read_rows(tmp_path / "candidates.jsonl")
    rows = [row | {"of": 3} for row in rows[:4]] + [row | {"of": 3} for row in rows[6:]]
    rows += [row | {"item": items[4].name, "of": 1} for row in rows[-3:-2]]
    records.write_rows(tmp_path / "candidates.jsonl", rows)
    results = run(tmp_path / "out", "--findings", tmp_path)
    assert "1 of 5 items are left out" in " ".join(results["notes"])
    assert "all: 4 items do not tell whether the choice helps" in results["notes"]
    found = results["findings"]["CIDEr by good"]["all"]
    df = metrics.document_frequency([x.captions for x in items])
    mean, chosen = [], []
    for item, said in zip(items[:5], (rows[:3], [], rows[4:7], rows[7:10], rows[10:])):
        scores = [float(metrics.cider([r["caption"]], [item.captions], df)[0]) for r in said]
        mean += [sum(scores) / len(scores)] if said else []
        chosen += [scores[min(1, len(said) - 1)]] if said else []    # `good` prefers the second
    assert found["mean"] == pytest.approx(100 * sum(mean) / 4)
    assert found["chosen"] == pytest.approx(100 * sum(chosen) / 4) and found["items"] == 4
    assert "[" in (tmp_path / "out/table.txt").read_text()


def test_rerank_prints_the_findings(tmp_path, capsys):
    """Both weigh n-grams by all of the split, of which four items were reranked."""
    found = inputs.from_set("miniature", "test", "image", 4)
    plant(tmp_path, found.items, "miniature test")
    groups = {item.name: [] for item in found.items}
    for row in data.read_rows(tmp_path / "candidates.jsonl"):
        groups[row["item"]].append(row)
    said = []
    for whole in (found.whole, found.items):
        outputs.show_worth(groups, found.items, "good", whole)
        said.append(capsys.readouterr().out)
    rows = tables.findings(tmp_path, found.whole, "none", "cpu", [])["findings"]
    assert {"CIDEr by good", "CIDEr by bad"} <= set(rows)
    for domains in rows.values():
        row = "mean {mean:6.1f}   chosen {chosen:6.1f}   oracle {oracle:6.1f}".format(**domains["all"])
        assert row in said[0] and row not in said[1]


def test_findings_know_what_they_are_of(tmp_path):
    """Splits share their ids: another one than the rerank's would give other numbers, silently."""
    test = data.read("miniature", "test")[:4]
    assert {x.name for x in data.read("miniature", "nocaps")} > {x.name for x in test}
    plant(tmp_path, test, "miniature test")
    found = run(tmp_path / "out", "--findings", tmp_path)
    assert found["settings"]["split"] == "test"
    assert found["findings"]["CIDEr by good"]["all"]["chosen"] > 100
    for argv, reason in ((["--split", "nocaps"], "made of miniature, split test; miniature, split nocaps"),
                         (["--data", "data/coco"], "no data set at data/coco"),
                         (["--limit", 3], "--limit does nothing with --findings")):
        with pytest.raises(ValueError, match=reason):
            run(tmp_path / "out", "--findings", tmp_path, *argv)
    moved = tmp_path / "elsewhere"               # the same set by another name
    shutil.copytree(data.SETS["miniature"], moved)
    assert run(tmp_path / "out", "--findings", tmp_path, "--data", moved)["findings"] == found["findings"]
    settings = json.loads((tmp_path / "settings.json").read_text())
    write(tmp_path / "settings.json", settings | {"content": "another"})
    with pytest.raises(ValueError, match="has other names or captions"):
        run(tmp_path / "out", "--findings", tmp_path)
    plant(tmp_path, test, "None")
    with pytest.raises(ValueError, match="pictures or sentences by themselves"):
        run(tmp_path / "out", "--findings", tmp_path)
    plant(tmp_path, test, "coco test")
    with pytest.raises(ValueError, match="no data set at coco: give --data"):
        run(tmp_path / "other", "--findings", tmp_path)
    plant(tmp_path, test[:1], "miniature test")
    with pytest.raises(ValueError, match="fewer than two items"):
        run(tmp_path / "out", "--findings", tmp_path)


def test_findings_of_a_rerank_of_texts(tmp_path):
    argv = ["--turn", "text", "--limit", "2", "--n", "2", "--steps", "2", "--device", "cpu",
            "--scorer", "full", "--split", "near", "--out", str(tmp_path)]
    assert rerank.main(rerank.flags(argv)) == 0
    found = run(tmp_path / "out", "--findings", tmp_path)["findings"]
    assert {k.split(" by ")[0] for k in found} == {"CLIP", "DINO"}
    assert list(found["DINO by clip"]) == ["near", "all"]
    first = data.read("miniature", "near")[0]
    rows = records.read_rows(tmp_path / "candidates.jsonl")
    inputs = {r["input"] for r in rows if r["item"] == first.name}
    assert inputs == {first.captions[0]}                              # the text, not the picture
    second = data.read("miniature", "near")[1]
    records.write_rows(tmp_path / "candidates.jsonl", [
        row | {"picture": None, "scores": {"clip": None}} if row["item"] == second.name else row
        for row in rows])
    with pytest.raises(ValueError, match="fewer than two items"):     # a picture was no numbers
        run(tmp_path / "out", "--findings", tmp_path)
    with pytest.raises(ValueError, match="run rerank.py"):
        run(tmp_path / "out", "--findings", tmp_path / "none")


# ---------------------------------------------------------------- what is missing or broken
def test_what_is_missing_or_idle_is_told():
    for argv, reason in (
            (["--score", "x.json"], "--score needs --refs"),
            (["--compare", "x.json", "y.json"], "--compare needs --refs"),
            (["--label-free"], "--label-free needs --images and --captions"),
            (["--captioner", "vitb"], "--captioner vitb needs --data"),
            (["--captioner", "vitb", "--findings", "x"], "--captioner does nothing with --findin"),
            (["--score", "x.json", "--findings", "x"], "--score and --findings are jobs of their own"),
            (["--compare", "x", "y", "--refs", "z", "--ci"], "--ci does nothing with --compare"),
            (["--images", "x"], "--images does nothing without --score, --compare or --label-fr"),
            (["--refs", "x.json"], "--refs does nothing without")):
        with pytest.raises(ValueError, match=reason):
            evaluate.flags(argv)
    with pytest.raises(ValueError, match="no data set at nowhere"):
        evaluate.items_of("nowhere")


def test_no_job_writes_over_another(tmp_path, capsys):
    """Folders by default apart; by --out refused, or, of the same job, told."""
    def out(*argv):
        return evaluate.flags([*argv]).out.as_posix()
    assert out() == out("--captioner", "vitb", "--data", "d") == "out/evaluate"
    assert out("--score", "a/x.json", "--refs", "r.json") == "out/score/x"
    assert out("--compare", "x.json", "y.json", "--refs", "r.json") == "out/compare/x-y"
    assert out("--findings", "out/full") == "out/full/findings"
    assert out("--label-free", "--images", "d", "--captions", "x.json") == "out/label-free/x"
    refs = write(tmp_path / "r.json", {"1": ["a dog"], "2": ["a cat"]})
    for name in ("x", "y"):
        write(tmp_path / f"{name}.json", {"1": "a dog", "2": f"a {name}"})
    how = ["--score", tmp_path / "x.json", "--refs", refs]
    for again in (False, False, True):           # anew, the same, other captions
        if again:
            write(tmp_path / "x.json", {"1": "a dog", "2": "a cat"})
        capsys.readouterr()
        run(tmp_path / "out", *how)
        said = capsys.readouterr().err
        assert ("results.json held other results: replaced" in said) == again


def test_pictures_that_are_no_numbers_are_named_and_left_out(tmp_path, images, capsys):
    """As a VAE in half precision may make them; none is saved as black."""
    rows = []
    for i in range(4):
        data.save_image(images[i], tmp_path / f"set/{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "a ring" if i % 2 else "a star"})
    records.write_rows(tmp_path / "set/metadata.jsonl", rows)
    (tmp_path / "half.py").write_text(
        "import torch\nclass Half:\n"
        "    def draw(self, captions, items=None, seed=0, **settings):\n"
        "        bad = [float('nan') if 'star' in c else .5 for c in captions]\n"
        "        return torch.tensor(bad).view(-1, 1, 1, 1).repeat(1, 3, 32, 32)\n"
        "def load(device, dtype):\n    return Half()\n")
    argv = ["--data", tmp_path / "set", "--split", "all", "--only", "images", "--judges",
            "miniature", "--generator", f"{tmp_path / 'half.py'}:load"]
    results = run(tmp_path / "out", *argv)
    assert results["images"]["all"]["n"] == 2
    assert "2 of 4 pictures came out as no numbers" in " ".join(results["notes"])
    assert "0.png, 2.png" in capsys.readouterr().err
    assert len(list((tmp_path / "out/pictures").iterdir())) == 2
    records.write_rows(tmp_path / "set/metadata.jsonl", [row | {"text": "a star"} for row in rows])
    with pytest.raises(ValueError, match="none of the 4 pictures came out as numbers"):
        run(tmp_path / "none", *argv)


def test_nothing_evaluated_is_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    rows = [{"file_name": f"{i}.png", "text": "a ring"} for i in range(3)]
    for row in rows:
        (tmp_path / "set" / row["file_name"]).write_text("no picture")
    records.write_rows(tmp_path / "set/metadata.jsonl", rows)
    for only, reason in (("captions", "none of the 3 pictures could be read"),
                         ("images", "none of the 3 pictures can be read")):
        with pytest.raises(ValueError, match=reason):
            run(tmp_path / only, "--data", tmp_path / "set", "--split", "all", "--only", only,
                "--steps", 2)
        assert not (tmp_path / only / "results.json").exists()


def test_a_broken_picture_is_named_and_skipped(tmp_path, images, capsys):
    rows = []
    for i in range(4):
        data.save_image(images[i], tmp_path / f"set/{i}.png")
        rows += [{"file_name": f"{i}.png", "text": f"a {c} ring"} for c in ("red", "blue")]
    records.write_rows(tmp_path / "set/metadata.jsonl", rows)
    (tmp_path / "set/2.png").write_text("no picture")
    results = run(tmp_path / "out", "--data", tmp_path / "set", "--split", "all", "--steps", 2)
    assert results["captions"]["all"]["n"] == results["images"]["all"]["n"] == 3
    assert "2.png is not a picture" in " ".join(results["notes"])
    assert "2.png" in capsys.readouterr().err


def test_only_numbers_that_are_none_become_null(tmp_path, capsys):
    notes = ["NaN", 'a "NaN"\nNaN', "a plate of NaN bread", ": NaN,\n"]
    results = {"captions": {"all": dict.fromkeys(tables.CAPTIONS) | {"n": 1, "WMD": float("nan")}},
               "notes": notes, "settings": {}}
    evaluate.write(results, tmp_path)
    text = (tmp_path / "results.json").read_text()
    back = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert back["captions"]["all"]["WMD"] is None and back["notes"] == notes
