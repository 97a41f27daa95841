"""inputs.py: what is a path, what a sentence; captions and pictures that exist; what a toy knows."""
import json
import shutil

import pytest
from conftest import ROOT
from PIL import Image

import best_of_n
import data
import inputs
import records
from miniature import toys, world


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (8, 8)).save(name)
    return tmp_path


# ---------------------------------------------------------------- paths and sentences
@pytest.mark.parametrize("text", [
    "holidays/", "holiday/img", "my photos/", "prompts.csv", "IMG_1.HEIC", "my photo.heic", "*", "pics*",
    "photos/*", "IMG_[12]", "img?", "../my pictures", "./x y", "/root/my pictures", "~/x", "C:\\photos",
    "there"])
def test_a_path_is_no_sentence(here, text):
    (here / "there").write_text("a file of another kind")
    with pytest.raises(ValueError) as e:
        inputs.from_arguments([text])
    assert str(e.value).startswith(f"{text}: no picture")


@pytest.mark.parametrize("text", [
    "a red ball", "ring", "a black/white cat", "is this a cat?", "3.5 inches of snow", "at 5 p.m.",
    "[a cat] and a dog", "cats, dogs; rings...", "ein Bär", "x" * 5000, "a cat\nand a dog"])
def test_a_sentence_is_no_path(here, text):
    found = inputs.from_arguments([text])
    assert found.direction == inputs.TEXT and found.items[0].captions == [" ".join(text.split())]


def test_what_repeats_is_counted(here):
    found = inputs.from_arguments(["a.png", "b.jpg", "./a.png", "b.jpg"])
    assert [x.name for x in found.items] == ["a.png", "b.jpg"]
    assert found.notes[0].startswith("2 of 4 inputs repeat another one, such as 'a.png'")
    (here / "lines.txt").write_text("\ufeffa red ball\n\na red\u2028ball\n a  red ball \nno/path.x\n", "utf-8")
    found = inputs.from_arguments(["lines.txt"])
    assert [x.name for x in found.items] == ["a red ball", "no/path.x"] and len(found.notes) == 1
    assert inputs.from_arguments(["one", "two"]).notes == []
    (here / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="bad.txt is no text in UTF-8"):
        inputs.from_arguments(["bad.txt"])


# ---------------------------------------------------------------- what exists
@pytest.mark.parametrize("name,text", [
    ("x.json", {"in/a.png": ["one", "two "], "in/b.png": "three"}),
    ("x.json", [{"image": "in/a.png", "captions": ["one", "two"]}, {"file_name": "in/b.png", "text": "three"}]),
    ("x.jsonl", [{"image": "in/a.png", "caption": "one"}, {"file_name": "in/b.png", "captions": ["three"]},
                 {"image": "in/a.png", "caption": "two", "more": 1}]),
    ("in", {"a.txt": "one\n\ntwo\n", "b.txt": "three"})])
def test_given_captions(tmp_path, name, text):
    (tmp_path / "in").mkdir()
    for stem in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"in/{stem}.png")
    if name == "in":
        for file, lines in text.items():
            (tmp_path / "in" / file).write_text(lines)
    elif name == "x.json":
        (tmp_path / name).write_text(json.dumps(text))
    else:
        records.write_rows(tmp_path / name, text)
    found = inputs.given_captions(str(tmp_path / name))
    assert list(found.given.values()) == [["one", "two"], ["three"]] and found.notes == []
    assert [x.path for x in found.items] == [tmp_path / "in/a.png", tmp_path / "in/b.png"]
    assert [x.name.split("/")[-1] for x in found.items] == ["a.png", "b.png"] == [
        x.split("/")[-1] for x in found.given]
    assert len(inputs.given_captions(str(tmp_path / name), 1).items) == 1


def test_what_is_left_out_is_counted(here):
    items = [data.Item("7", here / "a.png"), data.Item("8", here / "b.jpg")]
    (here / "x.json").write_text(json.dumps([
        {"image_id": 7, "caption": "one"}, {"image_id": 9, "caption": "two"},
        {"image_id": "a.png", "caption": " "}, {"image_id": 8, "captions": []}]))
    found = inputs.given_captions(here / "x.json", items=items)
    assert found.given == {"7": ["one"]} and found.items == items[:1]
    assert [note.split(": ")[1] for note in found.notes] == [
        "1 pictures are not in the set; they are left out", "1 captions are empty; they are left out",
        "1 pictures have no captions; they are left out"]
    with pytest.raises(ValueError, match="no captions of any picture of the set"):
        inputs.given_captions(here / "x.json", items=[data.Item("1", here / "c.png")])


def test_a_picture_lies_beside_the_file_or_here(here):
    (here / "sub").mkdir()
    Image.new("RGB", (9, 9)).save(here / "sub/a.png")
    (here / "sub/x.json").write_text(json.dumps({"a.png": "one", "b.jpg": "two", "c.png": "three"}))
    found = inputs.given_captions("sub/x.json")
    assert [x.path.as_posix() for x in found.items] == ["sub/a.png", "b.jpg", "sub/c.png"]


@pytest.mark.parametrize("text", ["[]", "{}", "3", '[{"image": "a.png"}]', '{"a.png": [1]}', '[["a.png", "x"]]',
                                  '{"a.png": null}', '[{"image": null, "caption": "x"}]'])
def test_other_files_are_one_line(here, text):
    (here / "x.json").write_text(text)
    for read in (inputs.given_captions, inputs.given_pictures):
        with pytest.raises(ValueError, match="x.json"):
            read("x.json")


def test_given_pictures(here):
    (here / "x.json").write_text(json.dumps({"a ring": ["a.png", "b.jpg"], "a  ring": ["a.png"], "box": ["b.jpg"]}))
    found = inputs.given_pictures("x.json")
    assert found.direction == inputs.TEXT and [x.name for x in found.items] == ["a ring", "box"]
    assert [p.name for p in found.given["a ring"]] == ["a.png", "b.jpg", "a.png"]
    for name in ("in/a-ring", "in/a box", "in/.hidden"):
        (here / name).mkdir(parents=True)
    (here / "in/a-ring/prompt.txt").write_text("a ring\n")
    (here / "a.png").rename("in/a-ring/a.png")
    (here / "b.jpg").rename("in/a box/b.jpg")
    found = inputs.given_pictures("in")
    assert {k: [p.name for p in v] for k, v in found.given.items()} == {"a box": ["b.jpg"], "a ring": ["a.png"]}
    (here / "in/empty").mkdir()
    with pytest.raises(ValueError, match="no pictures in in/empty"):
        inputs.given_pictures("in")


def test_a_mark_is_of_what_it_marks(here):
    def mark(*given):
        item = data.Item("a", here / "a.png")
        found = inputs.Inputs(best_of_n.IMAGE, [item], {"a": list(given)})
        return found.mark(item)
    assert mark("a", "b") == mark("a", "b") != mark("b", "a")
    before = mark()
    assert before == mark()
    shutil.copy2(here / "a.png", here / "c.png")          # of another time
    assert mark(here / "a.png") == mark(here / "c.png") != before
    Image.new("RGB", (9, 9)).save(here / "a.png")
    assert before != mark()


# ---------------------------------------------------------------- toys
def test_the_miniature_knows_its_own():
    for split in ("train", "all"):
        for i in range(60):
            scene = world.sample(split, i)
            for caption in [*world.captions(scene), world.full_caption(scene)]:
                assert set(caption.split()) <= toys.VOCABULARY
    for turn in ("image", "text"):
        found = inputs.from_set("miniature", "test", turn, 20)
        note, warning = toys.told("miniature", "miniature", found)
        assert "Toy models" in note and warning == ""
        assert toys.told("vitb", "sd14", found) == ("", "")


def test_of_others_it_says_so(here):
    photo = inputs.from_arguments(["a.png", str(ROOT / "miniature/data/test/0000.png")])
    assert toys.strange(photo) == "1 of 2 pictures, not of their set (a.png)"
    assert toys.strange(inputs.from_arguments(["A red ring, on the sand!"])) == ""
    assert toys.strange(inputs.from_arguments(["a red cat"])) == "1 words (cat)"
    note, warning = toys.told("vitb", "miniature", photo)
    assert warning.startswith("TOY MODELS: the generator of the miniature") and "captioner" not in note
    assert warning.endswith("the same command with --captioner vitb --generator sd14, and another --out")


def test_cocos_results_are_candidates_of_a_set(tmp_path):
    """By the set's own number, as COCO writes it; without a set a number is no picture."""
    items = data.read("miniature", "near")[:2]
    rows = [{"image_id": int(item.name), "caption": said} for item in items for said in ("a ring", "a wall")]
    path = tmp_path / "captions_results.json"
    path.write_text(json.dumps(rows))
    found = inputs.given_captions(path, items=items)
    assert found.given == {item.name: ["a ring", "a wall"] for item in items}
    with pytest.raises(ValueError, match=f"row 1: {items[0].name} is no picture's file: --data names its set"):
        inputs.given_captions(path)
    other = {"/nowhere/of/mine/0003.png": ["a ring"], items[0].name: ["a wall"]}        # no picture of the set
    path.write_text(json.dumps(other))
    assert inputs.given_captions(path, items=data.read("miniature", "near")).given == {items[0].name: ["a wall"]}
