"""Agreement with people: each benchmark's layout, made of the miniature's scenes with invented
judgments, and the numbers by hand."""
import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
import torch
from conftest import ROOT
from pyarrow import parquet
from scipy.io import savemat

import cycle
import data
import losses
import records
from lab import human, keep
from miniature import world

COUNT, STEPS = 12, "4"
SEEN = ("clipscore", "per token", "denoise", "both", "cycle")


@pytest.fixture(scope="module")
def judged():
    """(file name, references, [(caption, rating)]) of each scene: what is true is rated 4, with one
    wrong word 2, the caption of another scene 1."""
    scenes = [keep.scene_of(keep.DOMAINS[0], i) for i in range(COUNT)]
    rows = []
    for i, scene in enumerate(scenes):
        right = world.full_caption(scene)
        spoiled = keep.spoiled(right, scene, ("colour", "shape")[i % 2], i)
        other = world.full_caption(scenes[i - 1])
        rows.append((f"scene-{i}.png", world.captions(scene), [(right, 4), (spoiled, 2), (other, 1)]))
    return rows


@pytest.fixture(scope="module")
def pictures(judged, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, (name, _, _) in enumerate(judged):
        data.save_image(world.picture(keep.scene_of(keep.DOMAINS[0], i)), folder / name)
    return folder


@pytest.fixture(scope="module")
def files(judged, tmp_path_factory):
    """{benchmark: its file}."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "flickr8k.json").write_text(json.dumps(flickr8k(judged)))
    pascal50s(judged, folder)
    thumb(judged, folder)
    columns = {"file_name": [], "refs": [], "mt": [], "human_score": []}
    for name, references, said in judged:
        for caption, rating in said:
            for column, value in zip(columns.values(), (name, references, caption, rating / 4)):
                column.append(value)
    parquet.write_table(pyarrow.table(columns), folder / "nebula.parquet")
    return {"flickr8k": folder / "flickr8k.json", "pascal50s": folder,
            "thumb": folder / "thumb.jsonl", "nebula": folder / "nebula.parquet"}


def flickr8k(judged):
    """Three people rate each caption; one of them is a little kinder."""
    found = {}
    for name, references, said in judged:
        ratings = [{"caption": caption, "rating": min(4, rating + kind)}
                   for caption, rating in said for kind in (0.0, 0.0, 1.0)]
        found[name[:-4]] = {"image_path": f"Flickr8k_Dataset/{name}", "ground_truth": references,
                            "human_judgement": ratings}
    return found


def pascal50s(judged, folder, votes=6):
    """Cells and structs as MATLAB saves them: four kinds of pairs, right against wrong."""
    def cell(text):
        out = np.empty((1, 1), object)
        out[0, 0] = text
        return out
    pairs = np.empty((1, COUNT), [("image", object), ("b", object), ("c", object)])
    triplets = np.empty((1, COUNT * votes), [(x, object) for x in ("a", "b", "c", "winner")])
    for i, (name, references, said) in enumerate(judged):
        a, b = said[0][0] + " ", said[1 + i % 2][0]
        if i % 3 == 0:
            a, b = b, a
        pairs[0, i] = name, a, b
        for j in range(votes):
            # of each pair one vote is for the wrong one, and half of the triplets are turned
            right = (i % 3 == 0) == (j == 0)
            turned = j % 2 == 1
            first, second = (b, a) if turned else (a, b)
            triplets[0, i * votes + j] = (cell(references[j % 5]), cell(first), cell(second),
                                          np.array([[1 if right != turned else -1]]))
    savemat(folder / "pair_pascal.mat", {"new_input": pairs, "category": 1 + np.arange(COUNT)[None] % 4})
    savemat(folder / "consensus_pascal.mat", {"triplets": triplets})


def thumb(judged, folder):
    rows, beside = [], []
    for i, (name, references, said) in enumerate(judged):
        beside.append({"seg_id": str(i), "refs": references[1:]})
        given = zip(("Human", "VinVL-large", "Up-Down"), said)
        for system, (caption, rating) in given:
            rows.append({"SYS": system, "seg_id": str(i), "set_id": i, "hyp": caption, "image": name,
                         "P": float(rating), "R": float(rating) - i % 2, "Fl": -0.0, "Inc": -0.0,
                         "Con": -0.0, "human_score": rating - .5 * (i % 2)})
    records.write_rows(folder / "thumb.jsonl", rows)
    records.write_rows(folder / "mscoco_references.json", beside)


def arguments(name, files, pictures, out):
    return [name, str(files[name]), "--images", str(pictures), "--captioner", "miniature", "--generator",
            "miniature", "--steps", STEPS, "--out", str(out)]


@pytest.fixture(scope="module")
def scored(files, pictures, tmp_path_factory):
    """The JSON of a run on Flickr8k's layout that scores every caption; what it kept is beside it."""
    out = tmp_path_factory.mktemp("scored") / "found.json"
    human.main(human.flags(arguments("flickr8k", files, pictures, out)))
    return out


@pytest.fixture
def begun(scored, tmp_path):
    """A copy of that run whose rows name pictures as the other benchmarks do: where to go on."""
    shutil.copytree(scored.with_suffix(""), tmp_path / "found")
    rows = scored.with_suffix(".jsonl").read_text().replace("Flickr8k_Dataset/", "")
    (tmp_path / "found.jsonl").write_text(rows)
    return tmp_path / "found.json"


def measured(name, files, pictures, out):
    human.main(human.flags(arguments(name, files, pictures, out)))
    return json.loads(out.read_text())["agreement"]


# ---------------------------------------------------------------- the benchmarks
def test_every_score_agrees_with_people_who_know(scored):
    found = json.loads(scored.read_text())
    assert found["judgments"] == 9 * COUNT and found["about"]["steps"] == int(STEPS)
    assert set(found["agreement"]) == {"CIDEr", "BLEU-4", *SEEN}
    assert all(value > 40 for row in found["agreement"].values() for value in row.values())


@pytest.mark.parametrize("name, columns, least", [
    ("pascal50s", ["all", "HC", "HI", "HM", "MM"], 65), ("thumb", ["total", "P", "R", "systems"], 20),
    ("nebula", ["tau-c"], 60)])
def test_the_other_layouts(files, pictures, begun, name, columns, least, monkeypatch):
    monkeypatch.setattr(human, "speakers", None)               # all is kept: nothing is loaded
    found = measured(name, files, pictures, begun)
    assert set(found) == {"CIDEr", "BLEU-4", *SEEN}
    for row in found.values():
        assert list(row) == columns and min(row.values()) > least


def test_votes_are_counted_for_captions_not_for_places(judged, files):
    pairs, references, columns = human.read("pascal50s", files["pascal50s"])
    assert [caption for _, caption in pairs[2:4]] == [judged[1][2][0][0], judged[1][2][2][0]]
    measure, votes, some = columns["HI"]
    assert measure == "pairs" and votes[:6].tolist() == [1, 5, 5, 1, 5, 1]
    assert some.tolist() == [i // 2 % 4 == 1 for i in range(2 * COUNT)]
    assert references[1] == judged[0][1]


def test_captions_by_people_can_be_left_out(files):
    _, references, columns = human.read("thumb", files["thumb"])
    assert columns["systems"][2] == [False, True, True] * COUNT and len(references[0]) == 4
    assert columns["total"][1][:6].tolist() == [4, 2, 1, 3.5, 1.5, .5]


SHAPES = {"flickr8k": '{"a": {"image_path": "a.jpg"}}', "thumb": '{"hyp": "a dog"}', "nebula": "file_name,mt",
          "pascal50s": "MATLAB 5.0"}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("text", ["another", "[]", None])
def test_a_file_of_another_shape_is_one_error(name, text, tmp_path):
    path = tmp_path / "judgments"
    if text:
        path.write_text(SHAPES[name] if text == "another" else text)
    with pytest.raises(ValueError, match=f"judgments can't be read as {name} .*; expected: "):
        human.read(name, path)


def test_a_rating_that_is_none(tmp_path, judged):
    given = flickr8k(judged)
    given["scene-3"]["human_judgement"][1]["rating"] = float("nan")
    (tmp_path / "f.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match="ratings that are no numbers"):
        human.read("flickr8k", tmp_path / "f.json")


# ---------------------------------------------------------------- agreement by hand
def test_kendall_by_counting_pairs():
    dice = np.random.default_rng(0)
    x, y = dice.integers(6, size=40).astype(float), dice.integers(1, 5, size=40).astype(float)
    agree = tied_x = tied_y = 0
    for i, j in itertools.combinations(range(40), 2):
        agree += np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
        tied_x += x[i] == x[j]
        tied_y += y[i] == y[j]
    pairs, m = 40 * 39 / 2, min(len(set(x)), len(set(y)))
    every = np.full(40, True)
    b, c = (human.agreement((kind, y, True), x, every) for kind in "bc")
    assert b == pytest.approx(100 * agree / np.sqrt((pairs - tied_x) * (pairs - tied_y)))
    assert c == pytest.approx(100 * agree / (40 ** 2 * (m - 1) / m / 2))


def test_ties_of_votes_or_scores_count_half():
    scores = np.array([2, 1, 1, 2, 3, 3, 5, 1, 0, 0.])
    votes = np.array([40, 8, 40, 8, 30, 18, 24, 24, 24, 24.])
    rows = np.full(10, True)
    assert human.agreement(("pairs", votes, True), scores, rows) == 100 * (1 + 0 + .5 + .5 + .5) / 5
    first = [True] * 4 + [False] * 6
    assert human.agreement(("pairs", votes, first), scores, rows) == 50
    assert np.isnan(human.agreement(("pairs", votes, True), scores, ~rows))


def test_pearson_of_some_rows():
    x, y = np.random.default_rng(1).normal(size=(2, 9))
    some = [True] * 6 + [False] * 3
    found = human.agreement(("pearson", y, some), x, np.arange(9) > 0)
    assert found == pytest.approx(100 * np.corrcoef(x[1:6], y[1:6])[0, 1])


# ---------------------------------------------------------------- scores that see the pictures
def test_scores_are_what_their_names_say(scored, pictures, captioner, generator):
    rows = records.read_rows(scored.with_suffix(".jsonl"))
    assert len(rows) == 3 * COUNT and not any(row["cut"] for row in rows)
    clip = human.judges.load(["clip"], "image", "miniature")[0]["clip"]
    for row in rows[4:9:4]:
        name, caption = row["picture"], row["caption"]
        image = data.open_image(pictures / name.removeprefix("Flickr8k_Dataset/"))
        with torch.no_grad():
            reading = captioner.read([image], [caption])
        assert row["per token"] == pytest.approx(-losses.caption_loss(reading).item(), rel=1e-5)
        timesteps, noise = cycle.noises(generator, 12, item=name)
        caption_loss, empty = losses.score(generator, image, [caption, ""], timesteps, noise).mean(0)
        assert row["denoise"] == pytest.approx(float(empty - caption_loss), abs=1e-6)
        theirs, _ = clip.clipscore(image[None], caption, [caption])
        assert row["clipscore"] == pytest.approx(theirs, abs=1e-5)
        drawn = generator.draw([caption], [name], steps=int(STEPS))
        assert row["cycle"] == pytest.approx(clip.alike(drawn, image[None])[0], abs=1e-4)


def test_both_is_the_sum_of_standard_scores(scored, files, pictures):
    argv = arguments("flickr8k", files, pictures, scored)
    args = human.flags([*argv, "--judges", "miniature"])
    pairs, _, _ = human.read("flickr8k", files["flickr8k"])
    scores, rows = human.picture_scores(pairs, list(dict(pairs)), args)
    z = [(x - x.mean()) / x.std() for x in (scores["per token"], scores["denoise"])]
    assert rows.all() and scores["both"] == pytest.approx(z[0] + z[1])


def test_a_killed_run_goes_on(files, pictures, scored, tmp_path, captioner, generator, monkeypatch, capsys):
    out, kept = tmp_path / "found.json", tmp_path / "found.jsonl"
    shutil.copytree(scored.with_suffix(""), out.with_suffix(""))
    whole = scored.with_suffix(".jsonl").read_text()
    kept.write_text(whole[:whole.rindex('"cycle"')])           # the last line is cut
    monkeypatch.setattr(human, "speakers", lambda *names: (captioner, generator))
    measured("flickr8k", files, pictures, out)
    assert f"{3 * COUNT - 1} captions are in {kept}: they are not scored again" in capsys.readouterr().err
    first, again = records.read_rows(scored.with_suffix(".jsonl")), records.read_rows(kept)
    assert again[:-1] == first[:-1]
    for name, value in again[-1].items():
        assert value == first[-1][name] or value == pytest.approx(first[-1][name], abs=1e-4)


def test_other_settings_are_refused(files, pictures, begun):
    argv = [*arguments("nebula", files, pictures, begun), "--steps", "3"]
    with pytest.raises(ValueError, match="steps was 4, is 3"):
        human.main(human.flags(argv))


def test_missing_pictures_are_counted(files, pictures, begun, capsys, monkeypatch):
    monkeypatch.setattr(human, "speakers", None)
    whole = measured("nebula", files, pictures, begun)
    some = begun.parent / "some"
    shutil.copytree(pictures, some)
    (some / "scene-4.png").unlink()
    settings = begun.with_suffix("") / "settings.json"
    settings.write_text(settings.read_text().replace(str(pictures), str(some)))
    found = measured("nebula", files, some, begun)
    said = capsys.readouterr()
    assert f"{COUNT - 1} of {COUNT} pictures are there" in said.err
    assert f"{3 * COUNT - 3} of {3 * COUNT} judgments" in said.out
    assert found["CIDEr"] != whole["CIDEr"]                    # of the same judgments as the others
    with pytest.raises(ValueError, match="has none of the pictures, such as scene-0.png"):
        measured("nebula", files, begun.parent / "found", begun)


class Plain:
    """Models that can only do what everyone's can."""
    device = torch.device("cpu")

    def draw(self, captions, items=None, seed=0, **settings):
        return torch.stack([torch.full((3, 32, 32), len(caption) % 10 / 10) for caption in captions])


def test_models_that_lack_a_score(files, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(human, "speakers", lambda *names: (Plain(), Plain()))
    argv = [*arguments("nebula", files, pictures, tmp_path / "x.json"), "--limit", "3"]
    human.main(human.flags(argv))
    assert set(json.loads((tmp_path / "x.json").read_text())["agreement"]) == {
        "CIDEr", "BLEU-4", "clipscore", "cycle"}
    said = capsys.readouterr()
    assert "no per token: " in said.err and "no denoise: " in said.err
    assert f"9 of {3 * COUNT} judgments" in said.out


def test_references_that_are_missing(files, judged, tmp_path, capsys):
    shutil.copy(files["thumb"], tmp_path / "thumb.jsonl")
    human.main(human.flags(["thumb", str(tmp_path / "thumb.jsonl"), "--out", str(tmp_path / "x.json")]))
    assert "no CIDEr, no BLEU-4: there are captions without references" in capsys.readouterr().err


# ---------------------------------------------------------------- the command
def test_the_command_says_in_one_line_what_is_wrong(files):
    argv = ["-m", "lab.human", "thumb", files["flickr8k"]]
    ended = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("human.py: ") and "human_score" in ended.stderr


@pytest.mark.parametrize("more", [["--images", "x"], ["--captioner", "vitb"], ["--steps", "-1"],
                                  ["--limit", "0"], ["--out", "x.jsonl"]])
def test_flags_that_do_not_fit(more):
    with pytest.raises(ValueError, match="--help lists the flags"):
        human.flags(["thumb", "x.jsonl", *more])
