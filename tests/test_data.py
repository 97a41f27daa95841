"""Readers of sets, pictures of every kind, and what is kept from run to run."""
import hashlib
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

import data
import pictures
import records
import script
from miniature import world


def test_the_shipped_miniature_is_read_by_the_ordinary_readers():
    counts = {"val": 100, "test": 150, "in": 150, "near": 150, "out": 150, "nocaps": 450}
    for split, count in counts.items():
        items = data.read("miniature", split)
        assert len(items) == count
        assert all(len(x.captions) == 5 and x.path.exists() for x in items)
        assert len({x.name for x in items}) == count
    drawn = world.draw(world.sample("near", 7))         # the files are the world's own pictures
    shipped = data.open_image(data.read("miniature", "near")[7].path).permute(1, 2, 0) * 255
    assert shipped.round().byte().numpy().tolist() == drawn.tolist()


def test_blips_schema(tmp_path):
    row = {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["a man  on\na bike", "b"]}
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps([row]))
    (tmp_path / "coco_karpathy_train.json").write_text(json.dumps(
        [{"image": "train2014/COCO_train2014_000000522418.jpg", "image_id": "coco_522418", "caption": c} for c in ("one", "two")]))
    test, train = data.read(tmp_path, "test"), data.read(tmp_path, "train")
    assert [(x.name, x.captions) for x in test] == [("391895", ["a man on a bike", "b"])]
    assert [(x.name, x.captions) for x in train] == [("522418", ["one", "two"])]
    assert test[0].path == tmp_path / "val2014/COCO_val2014_000000391895.jpg"
    with pytest.raises(ValueError, match="coco_karpathy_val.json"):
        data.read(tmp_path, "val")


def test_real_coco_captions(shared, tmp_path):
    name = "coco_karpathy_test.json"
    (tmp_path / name).symlink_to(shared / "data/captions" / name)
    items = data.read(tmp_path, "test")
    assert len(items) == 5000 and all(5 <= len(x.captions) <= 7 for x in items)


def test_a_folder_with_and_without_captions(tmp_path):
    for name in ("b.png", "a.jpg", "sub/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [x.name for x in data.read(tmp_path)] == ["a.jpg", "b.png", "sub/c.webp"]
    lines = [json.dumps({"file_name": "a.jpg", "text": text}) for text in "xy"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert data.read(tmp_path)[0].captions == ["x", "y"]


def put(root, files, text=None):
    """Small pictures below a folder; text: {path: what else lies there}."""
    for i, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + i, 4)).save(root / name)
    for name, content in (text or {}).items():
        content = content if isinstance(content, bytes) else content.encode()
        (root / name).write_bytes(content)
    return root


def rows(*pairs):
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in pairs]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def imagefolder(tmp_path_factory):
    """A function: what the library `datasets` reads in a folder, {file: [text, ...]}."""
    import datasets
    cache = tmp_path_factory.mktemp("cache")

    def read(folder, split="train"):
        found = datasets.load_dataset("imagefolder", data_dir=str(folder), split=split,
                                      cache_dir=str(cache))
        found = found.cast_column("image", datasets.Image(decode=False))
        out = {}
        for row in found:
            name = os.path.relpath(row["image"]["path"], folder)
            said = row["text"] if isinstance(row["text"], list) else [row["text"]]
            out.setdefault(name, []).extend(map(records.one_line, said))
        return out
    return read


@pytest.mark.parametrize("files, text, split", [
    (["a.png", "sub/b.png"], {"metadata.jsonl": rows(("./a.png", "x"), ("sub\\b.png", "y"))}, None),
    (["a.png"], {"metadata.jsonl": b"\xef\xbb\xbf\n\n" + json.dumps(
        {"file_name": "a.png", "text": "x\u2028y\x85z"}, ensure_ascii=False).encode() + b"\n\n"}, None),
    (["a.png", "b.png"], {"metadata.csv": "file_name,text\na.png,\"one, two\"\nb.png,\"x\ny\"\n"}, None),
    (["a.png", "b.png"], {"metadata.csv": b"\xef\xbb\xbftext,file_name\r\nx,a.png\r\ny,./b.png\r\n"}, None),
    (["a.png", "b.png"], {"metadata.jsonl": rows(("a.png", ["x", "y"]), ("b.png", ["z"]))}, None),
    (["a.png"], {"metadata.jsonl": rows(("a.png", "x"), ("a.png", "y"))}, None),
    (["s/a.png", "t/b.png"], {"s/metadata.jsonl": rows(("a.png", "x")),
                              "t/metadata.jsonl": rows(("b.png", "y"))}, None),
    (["train/a.png", "train/c/d.png", "test/b.png"], {
        "train/metadata.jsonl": rows(("a.png", "x"), ("c/d.png", "z")),
        "test/metadata.jsonl": rows(("b.png", "y"))}, "train"),
    (["train/a.png", "test/b.png"], {"train/metadata.csv": "file_name,text\na.png,x\n",
                                     "test/metadata.csv": "file_name,text\nb.png,y\n"}, "test"),
    (["Training/a.png", "dev/b.png"], {"Training/metadata.jsonl": rows(("a.png", "x")),
                                       "dev/metadata.jsonl": rows(("b.png", "y"))}, "val")])
def test_a_folder_is_read_as_datasets_reads_it(tmp_path, imagefolder, files, text, split):
    put(tmp_path, files, text)
    ours = {x.name: x.captions for x in data.read(tmp_path, split)}
    if split is None:
        assert ours == imagefolder(tmp_path) and len(ours) == len(files)
    elif "Training/a.png" in files:              # there a name is a split in small letters alone
        assert ours == {"dev/b.png": ["y"]} == imagefolder(tmp_path, "validation")
    else:
        assert ours == imagefolder(tmp_path, split) and len(ours) < len(files)


@pytest.mark.parametrize("name, content, fault", [
    ("metadata.jsonl", rows(("a.png", "x"), ("b.png", "y")), "metadata.jsonl, row 2: there is no file b.png"),
    ("metadata.csv", "file_name,text\na.png,x\nA.png,y\n", "metadata.csv, row 2: there is no file A.png"),
    ("metadata.jsonl", rows(("a.png", "x"), ("../a.png", "y")), "row 2: there is no file ../a.png"),
    ("metadata.jsonl", rows(("/etc/hostname", "x")), "row 1: there is no file /etc/hostname"),
    ("metadata.jsonl", rows((None, "x")), "row 1: there is no file None"),
    ("metadata.jsonl", rows(("a.png", None)), "metadata.jsonl, row 1: expected a caption"),
    ("metadata.jsonl", "\n" + rows(("a.png", "x"), ("a.png", ["x", None])), "row 2: expected a caption"),
    ("metadata.jsonl", rows(("a.png", "")), "row 1: expected a caption"),
    ("metadata.jsonl", rows(("a.png", {"en": "x"})), "row 1: expected a caption"),
    ("metadata.csv", "file_name,text\na.png,\n", "metadata.csv, row 1: expected a caption"),
    ("metadata.csv", "file_name,text\na.png\n", "metadata.csv, row 1: expected a caption"),
    ("metadata.csv", "file_name;text\na.png;x\n", "row 1: expected file_name and text"),
    ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", "metadata.csv is no text in UTF-8"),
    ("metadata.csv", "file_name,text\na.png," + "x" * 200_000, "metadata.csv: field larger"),
    ("metadata.jsonl", rows(("a.png", "x")) + '{"file_name": "a.png", "te', "metadata.jsonl, line 2"),
    ("metadata.jsonl", '[{"file_name": "a.png"}]', "metadata.jsonl, line 1"),
    ("metadata.parquet", b"PAR1", "metadata.parquet is not read here: write it as metadata.jsonl"),
    ("a.txt", b"caf\xe9", "a.txt is no text in UTF-8")])
def test_a_fault_in_a_folder_is_one_line(tmp_path, name, content, fault):
    put(tmp_path, ["a.png"], {name: content})
    with pytest.raises(ValueError, match=fault) as e:
        data.read(tmp_path)
    assert "\n" not in str(e.value)


def test_captions_beside_pictures(tmp_path):
    """A line a caption; where a row names the picture, the row's."""
    put(tmp_path, ["a.png", "b.jpg", "c.png", "d.png"], {
        "a.txt": b"\xef\xbb\xbfa  red ring\r\n\na\xe2\x80\xa8ball\r\n", "b.txt": "one", "c.txt": "no",
        "metadata.jsonl": rows(("c.png", "yes")), "notes.txt": "of no picture"})
    found = {x.name: x.captions for x in data.read(tmp_path)}
    assert found == {"a.png": ["a red ring", "a ball"], "b.jpg": ["one"], "c.png": ["yes"], "d.png": []}


@pytest.mark.parametrize("name", [".", "../.hidden", "sub/.."])
def test_a_folder_may_be_named_in_any_way(tmp_path, monkeypatch, name):
    """Hidden is what begins with a dot below it."""
    root = tmp_path / ".hidden"
    put(root, ["a.png", ".b.png", "sub/c.png", ".d/e.png"],
        {"metadata.jsonl": rows(("./sub/../a.png", "x"), ("sub//c.png", "y"))})
    monkeypatch.chdir(root)
    assert {x.name: x.captions for x in data.read(name)} == {"a.png": ["x"], "sub/c.png": ["y"]}
    assert [data.open_image(x.path).shape[0] for x in data.read(name)] == [3, 3]


def test_what_pillow_reads_is_read_in_a_folder(tmp_path, capsys):
    """What people have as pictures of it; the others are told, once, hidden ones are none."""
    records.say.cache_clear()
    names = [f"x.{end}" for end in ("avif", "jfif", "jp2", "ppm", "PNG", "webp", "tif", "gif", "bmp")]
    put(tmp_path, [*names, "sub/.thumb.png", ".cache/x.png"])
    for name in ("x.heic", "y.HEIC", "movie.mp4", "x.pdf", "x.svg"):
        (tmp_path / name).touch()
    for _ in range(2):
        found = data.read(tmp_path)
        assert sorted(x.name for x in found) == sorted(names)
    for item in found:
        assert data.open_image(item.path).shape[0] == 3
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.split()[2] for line in said) == [".HEIC", ".heic", ".svg"]
    assert {".png", ".jpg", ".jpeg", ".mpo", ".tiff", ".qoi"} < data.SUFFIXES
    assert not {".pdf", ".eps", ".mpg", ".h5", ".psd", ".ico"} & data.SUFFIXES


# ---------------------------------------------------------------- splits of a folder
def test_a_share_is_held_out_and_stays(tmp_path, capsys):
    """By the name alone: what is trained on is never evaluated, also when pictures were added."""
    records.say.cache_clear()
    put(tmp_path, [f"{i}.png" for i in range(60)])
    (tmp_path / "metadata.jsonl").write_text(rows(*((f"{i}.png", "x") for i in range(50))))
    before = {split: {x.name for x in data.read(tmp_path, split)} for split in ("train", "val", "test")}
    assert before["val"] == before["test"] and not before["val"] & before["train"]
    whole = {x.name for x in data.read(tmp_path, "all")}
    assert whole == before["val"] | before["train"] == {x.name for x in data.read(tmp_path)}
    want = {x for x in whole if int(hashlib.sha1(x.encode()).hexdigest()[:8], 16) % 10 == 0}
    assert before["val"] == want - {f"{i}.png" for i in range(50, 60)} != set()
    line = f"{tmp_path}: {len(before['val'])} of its 50 described pictures"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and line in said and "--split all" in said
    put(tmp_path, [f"new/{i}.png" for i in range(200)])
    more = rows(*((f"new/{i}.png", "x") for i in range(200)))
    (tmp_path / "metadata.jsonl").write_text(rows(*((f"{i}.png", "x") for i in range(50))) + more)
    after = {split: {x.name for x in data.read(tmp_path, split)} for split in ("train", "val")}
    assert before["val"] < after["val"] and before["train"] < after["train"]
    assert 10 < len(after["val"]) < 40
    with pytest.raises(ValueError, match="no pictures in its split 'tset', of .'train', 'val', 'test', 'all'"):
        data.read(tmp_path, "tset")


def test_folders_are_splits(tmp_path):
    """Nothing is held out of them; pictures without captions have splits, too."""
    put(tmp_path, [*(f"train/{i}.png" for i in range(30)), "test/a.png"])
    assert len(data.read(tmp_path, "train")) == 30 and len(data.read(tmp_path)) == 31
    assert [x.name for x in data.read(tmp_path, "test")] == ["test/a.png"]
    with pytest.raises(ValueError, match="no pictures in its split 'val', of .'test', 'train', 'all'"):
        data.read(tmp_path, "val")
    assert len(data.read(tmp_path / "train", "test")) == 30     # nothing to learn, nothing held out


# ---------------------------------------------------------------- names
@pytest.mark.parametrize("files, names", [
    (["cats/img_001.jpg", "dogs/img_001.jpg", "x/img_2.jpg"], ["cats/img_001.jpg", "dogs/img_001.jpg", "x/img_2.jpg"]),
    (["000.jpg", "0000.jpg"], ["000.jpg", "0000.jpg"]),
    (["photo_1.jpg", "drawing_1.jpg", "photo_2.jpg"], ["photo_1.jpg", "drawing_1.jpg", "photo_2.jpg"]),
    (["000.jpg", "val2014/COCO_val2014_000000000042.jpg", "a.b_07.jpg"], ["0", "42", "a.b_07.jpg"])])
def test_names_are_unique(tmp_path, files, names):
    """Those of one number are named by their paths; the others stay what they are."""
    blip = [{"image": name, "caption": ["x"]} for name in files]
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(blip))
    assert [x.name for x in data.read(tmp_path, "test")] == names
    assert [x.path for x in data.read(tmp_path, "test")] == [tmp_path / name for name in files]


def test_names_of_the_other_schemas(tmp_path):
    images = [{"cocoid": 7, "filepath": folder, "filename": "7.jpg", "split": "test",
               "sentences": [{"raw": folder}]} for folder in "ab"]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    found = data.read(tmp_path, "test")
    assert [(x.name, x.captions) for x in found] == [("a/7.jpg", ["a"]), ("b/7.jpg", ["b"])]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images + images[:1]}))
    with pytest.raises(ValueError, match="a/7.jpg is listed 2 times"):
        data.read(tmp_path, "test")


def test_the_names_of_the_public_sets_are_their_own_numbers(shared, tmp_path):
    """What chance and files of finished runs hang on."""
    name = "coco_karpathy_test.json"
    (tmp_path / name).symlink_to(shared / "data/captions" / name)
    files = [row["image"] for row in json.loads((tmp_path / name).read_text())]
    assert [x.name for x in data.read(tmp_path)] == [str(int(f[-16:-4])) for f in files]


def test_the_names_of_the_miniature_are_its_own_numbers():
    known = json.loads((data.SETS["miniature"] / "dataset_coco.json").read_text())["images"]
    for split in ("val", "test"):
        ids = [str(row["cocoid"]) for row in known if row["split"] == split]
        assert [x.name for x in data.read("miniature", split)] == ids
    known = json.loads((data.SETS["miniature"] / data.NOCAPS).read_text())["images"]
    assert [x.name for x in data.read("miniature", "nocaps")] == [str(row["id"]) for row in known]


@pytest.mark.parametrize("caption, fault", [
    (None, "row 1: expected a caption"), ([None], "row 1: expected a caption"),
    ([["x"]], "row 1: expected a caption"), (3, "row 1: expected a caption")])
def test_what_is_no_caption_is_named(tmp_path, caption, fault):
    """In every schema: the file, and the row."""
    files = {
        "coco_karpathy_test.json": [{"image": "1.jpg", "caption": caption}],
        "dataset_coco.json": {"images": [{"imgid": 1, "filename": "1.jpg", "split": "test",
                                          "sentences": [{"raw": caption}]}]},
        data.NOCAPS: {"images": [{"id": 1, "file_name": "1.jpg"}],
                      "annotations": [{"image_id": 1, "caption": caption}]}}
    for name, content in files.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"{name}, .*{fault.removeprefix('row ').removesuffix('a caption')}"):
            data.read(folder)


def test_rows_of_another_shape_are_one_line(tmp_path):
    for name, content in {"coco_karpathy_test.json": [{"caption": "x"}], "dataset_coco.json": ["x"],
                          data.NOCAPS: {"images": 3, "annotations": []}}.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"{folder / name}.*: expected "):
            data.read(folder)


def test_nocaps_without_domains_and_with_a_mark(tmp_path):
    """Lists of captions are several."""
    rows = {"images": [{"id": 1, "file_name": "1.jpg"}],
            "annotations": [{"image_id": 1, "caption": ["a", "b"]}, {"image_id": 1, "caption": "c"}]}
    (tmp_path / data.NOCAPS).write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    found = data.read(tmp_path)
    assert [(x.name, x.captions, x.domain) for x in found] == [("1", ["a", "b", "c"], None)]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        data.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no pictures"):
        data.read(tmp_path)
    with pytest.raises(ValueError, match="nocaps_val_4500_captions.json is missing"):
        data.read(tmp_path, "near")
    with pytest.raises(ValueError, match="no split 'tset'.* test, val"):
        data.read("miniature", "tset")
    (tmp_path / "x.png").touch()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "caption": "x"}')
    with pytest.raises(ValueError, match="metadata.jsonl, row 1.*file_name and text.*caption"):
        data.read(tmp_path)
    (tmp_path / "x.json").write_text("[1,")
    with pytest.raises(ValueError, match="x.json is no JSON that can be read"):
        records.load_json(str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match="y.json is missing: put it there"):
        records.load_json(tmp_path / "y.json")


def test_the_split_a_set_is_evaluated_on(tmp_path):
    assert data.default_split(tmp_path) == "test"
    (tmp_path / "nocaps_val_4500_captions.json").touch()
    assert data.default_split(str(tmp_path)) == "nocaps" == data.default_split("miniature")


def test_nocaps(tmp_path):
    rows = [{"id": i, "file_name": f"{i}.jpg", "domain": domain}
            for i, domain in enumerate(("out-domain", "in-domain", "out-domain"))]
    said = [{"image_id": 2, "caption": "a\u2028ring"}, {"image_id": 2, "caption": "b"}]
    path = tmp_path / "nocaps_val_4500_captions.json"
    path.write_text(json.dumps({"images": rows, "annotations": said}))
    out = [(x.name, x.captions) for x in data.read(tmp_path, "out")]
    assert out == [("0", []), ("2", ["a ring", "b"])]
    assert [x.domain for x in data.read(tmp_path, "nocaps")] == [x["domain"] for x in rows]
    path.write_text(json.dumps({"images": rows}))
    with pytest.raises(ValueError, match="row 1: expected 'sentences'"):
        data.read(tmp_path, "in")


@pytest.mark.parametrize("mode,colour,expected", [
    ("RGB", (255, 0, 51), (1, 0, .2)), ("L", 51, (.2, .2, .2)), ("1", 1, (1, 1, 1)),
    ("RGBA", (0, 0, 0, 0), (1, 1, 1)),
    ("RGBA", (255, 0, 0, 255), (1, 0, 0)), ("LA", (0, 0), (1, 1, 1)), ("P", 3, None),
    ("CMYK", (0, 255, 255, 0), (1, 0, 0)), ("I;16", 32768, (.5, .5, .5))])
def test_every_mode(tmp_path, mode, colour, expected):
    path = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    image = Image.new(mode, (5, 3), colour)
    if mode == "P":
        image.putpalette([0, 0, 0] * 3 + [0, 255, 102])
        expected = (0, 1, .4)
    image.save(path)
    x = data.open_image(path)
    assert x.shape == (3, 3, 5) and x.dtype == torch.float32
    assert torch.allclose(x[:, 1, 1], torch.tensor(expected, dtype=torch.float32), atol=2 / 255)


def test_orientation_palette_transparency_and_animation(tmp_path):
    wide = Image.fromarray(np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6                        # the camera was turned: show it rotated by 90 degrees
    wide.save(tmp_path / "turned.png", exif=exif)
    turned = data.open_image(tmp_path / "turned.png") * 255
    turned = turned.round().byte().permute(1, 2, 0).numpy()
    assert (turned == np.rot90(np.asarray(wide), -1)).all()
    p = Image.new("P", (2, 2), 1)
    p.putpalette([9, 9, 9, 200, 0, 0])
    p.save(tmp_path / "clear.gif", transparency=1)
    assert data.open_image(tmp_path / "clear.gif").min() == 1   # transparent: white
    black = Image.new("RGB", (2, 2))
    red = Image.new("RGB", (2, 2), "red")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[black])
    assert data.open_image(tmp_path / "moving.gif")[0].min() > .99


def tiff(values, bits, meaning=1, kind=1, order="<"):
    """A TIFF of one strip, by its specification: kind 1 unsigned, 2 signed, 3 float."""
    height, width = values.shape
    body = values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: meaning, 273: 0, 277: 1, 278: height,
            279: len(body), 339: kind}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    out = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    for tag, value in tags.items():
        out += struct.pack(f"{order}HHII", tag, 4, 1, value)
    return out + bytes(4) + body


@pytest.mark.parametrize("type, value, options, expected", [
    ("<u2", 200, {}, 200 / 65535), ("<u2", 300, {}, 300 / 65535), (">u2", 300, {"order": ">"}, 300 / 65535),
    ("<u2", 300, {"meaning": 0}, 1 - 300 / 65535), ("<i2", 300, {"kind": 2}, 300 / 32767),
    ("<u4", 3_000_000_000, {}, 3e9 / (2 ** 32 - 1)), ("<i4", 10 ** 9, {"kind": 2}, 1e9 / (2 ** 31 - 1)),
    ("<f4", .25, {"kind": 3}, .25), ("<f4", 1.0, {"kind": 3}, 1), (">f4", .25, {"kind": 3, "order": ">"}, .25)])
def test_depths_of_tiff(tmp_path, type, value, options, expected):
    """White is the most that the bits can say; floats are as they are."""
    bits = 8 * np.dtype(type).itemsize
    (tmp_path / "x.tif").write_bytes(tiff(np.full((2, 3), value, type), bits, **options))
    x = data.open_image(tmp_path / "x.tif")
    assert x.shape == (3, 2, 3) and x.dtype == torch.float32
    assert torch.allclose(x, torch.tensor(expected, dtype=torch.float32), rtol=1e-6)


def test_depths_of_png_and_pgm(tmp_path):
    """All 200 of 65535 is darker than all 300."""
    for value in (200, 300, 65535):
        Image.fromarray(np.full((2, 3), value, np.uint16)).save(tmp_path / "x.png")
        assert data.open_image(tmp_path / "x.png").numpy() == pytest.approx(value / 65535)
    for most, value in ((255, 51), (1000, 200), (65535, 13107)):
        body = np.full((2, 3), value, ">u2" if most > 255 else "u1").tobytes()
        (tmp_path / "x.pgm").write_bytes(b"P5 3 2 %d\n" % most + body)
        assert data.open_image(tmp_path / "x.pgm").numpy() == pytest.approx(.2, abs=1e-5)


@pytest.mark.parametrize("value", [255, -.1, np.nan])
def test_floats_without_a_meaning_are_refused(tmp_path, value):
    (tmp_path / "x.tif").write_bytes(tiff(np.full((2, 3), value, "<f4"), 32, kind=3))
    with pytest.raises(ValueError, match="x.tif is not a picture .*its numbers are .*expected are 0 to 1"):
        data.open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("turn", range(1, 10))
@pytest.mark.parametrize("more", [(), (0x128, 2, 4, b"abc\0"), (0x11A, 2, 4, b"abc\0")])
def test_only_the_orientation_of_exif_is_needed(tmp_path, turn, more):
    """Beside entries of types that cannot be written again; Pillow's own turning is the reference."""
    entries = [(0x112, 3, 1, struct.pack("<HH", turn, 0)), *([more] if more else [])]
    entries.sort()
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    plain = Image.Exif()
    plain[0x112] = turn
    for tag, kind, count, value in entries:
        exif += struct.pack("<HHI", tag, kind, count) + value
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8))
    for end in ("jpg", "png", "webp"):
        image.save(tmp_path / f"x.{end}", exif=exif + bytes(4))
        image.save(tmp_path / f"plain.{end}", exif=plain)
        right = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"plain.{end}")).convert("RGB"))
        x = data.open_image(tmp_path / f"x.{end}")
        assert x.shape == ((3, 40, 20) if 5 <= turn <= 8 else (3, 20, 40))
        assert (x.permute(1, 2, 0) * 255).round().byte().numpy().tolist() == right.tolist()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"Exif\0\0II*\0", b""])
def test_a_fault_in_exif_makes_no_picture_less(tmp_path, exif):
    for end in ("jpg", "png", "webp"):
        Image.new("RGB", (40, 20)).save(tmp_path / f"x.{end}", exif=exif)
        assert data.open_image(tmp_path / f"x.{end}").shape == (3, 20, 40)


def test_a_png_with_a_long_note_is_a_picture(tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.new("RGB", (5, 3), "red").save(tmp_path / "x.png", pnginfo=note)
    assert data.open_image(tmp_path / "x.png")[0].min() == 1


def test_pixels_as_pictures(tmp_path, images):
    """pictures.py alone, without torch: the same numbers, and back."""
    data.save_image(images[0], tmp_path / "x.png")
    x = pictures.pixels(tmp_path / "x.png")
    assert x.dtype == np.float32 and x.shape == (32, 32, 3)
    assert np.array_equal(x.transpose(2, 0, 1), data.open_image(tmp_path / "x.png").numpy())
    assert np.array_equal(np.asarray(pictures.as_picture(x)), np.asarray(Image.open(tmp_path / "x.png")))
    with pytest.raises(FileNotFoundError):
        pictures.pixels(tmp_path / "y.png")


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    for name in ("a.png", "b.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            data.open_image(tmp_path / name)


def test_save_and_open_agree(tmp_path):
    x = torch.rand(3, 7, 9)
    data.save_image(x, tmp_path / "deep" / "x.png")
    assert (data.open_image(tmp_path / "deep" / "x.png") - x).abs().max() <= .5 / 255 + 1e-6
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.png"]


# ---------------------------------------------------------------- what is kept
def test_rows_come_back(tmp_path):
    """Every character, also those at which other readers break a line."""
    path = tmp_path / "rows.jsonl"
    assert records.read_rows(path) == []
    rows = [{"item": "a\u2028b\x85c\n", "caption": "ein Fu\u00dfg\u00e4nger"},
            {"n": {"x": None}}, {"y": 1.5}]
    records.append_rows(path, rows[:1])
    records.append_rows(str(path), rows[1:])
    assert records.read_rows(path) == rows and path.read_bytes().count(b"\n") == 3
    records.write_rows(path, rows[1:])
    assert records.read_rows(str(path)) == rows[1:]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\n\n")
    assert records.read_rows(path) == rows[1:]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_utf_8_loses_nothing(tmp_path):
    """As a disk of another time has them: kept as what JSON can write, and the same again."""
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    item, = data.read(tmp_path)
    assert os.fsencode(item.path).endswith(b"/caf\xe9.png") and data.open_image(item.path).shape == (3, 4, 4)
    out = tmp_path / "out"
    out.mkdir()
    records.append_rows(out / "rows.jsonl", [{"item": item.name, "input": str(item.path)}])
    records.write_rows(out / "again.jsonl", records.read_rows(out / "rows.jsonl"))
    records.write_text(out / "best.json", json.dumps({item.name: "\u00df"}, ensure_ascii=False))
    row, = records.read_rows(out / "again.jsonl")
    assert row == {"item": item.name, "input": str(item.path)}
    assert records.load_json(out / "best.json") == {item.name: "\u00df"}
    (out / "best.json").read_bytes().decode()                  # UTF-8 itself
    name = data.picture_name(item.name, 1)
    assert name.endswith(f"{hashlib.sha1(os.fsencode(item.name)).hexdigest()[:8]}-1")
    data.save_image(torch.zeros(3, 2, 2), out / f"{name}.png")


def test_a_mark_before_a_text_is_no_part_of_it(tmp_path):
    """Windows' UTF-8 begins with one (BOM)."""
    path = tmp_path / "x"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert records.read_rows(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert records.load_json(path) == [1]
    path.write_bytes("\ufeffa red ball\r\n\r\n a  b \u2028c\nd".encode())
    assert records.read_lines(path) == ["a red ball", "a b c", "d"]


def test_a_kill_anywhere_costs_one_row(tmp_path):
    """Cut at any byte, within a letter or after an inner brace: what was whole is read, and what is
    appended afterwards too."""
    path = tmp_path / "rows.jsonl"
    rows = [{"item": 1}, {"item": "\u00df", "scores": {"a": {"b": -1.5}}, "more": [True, None, {}]}]
    records.append_rows(path, rows)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        kept = rows if end == len(whole) - 1 else rows[:1]        # only the line's end is missing
        assert records.read_rows(path) == kept
        records.append_rows(path, [{"item": 2}])
        assert records.read_rows(path) == [*kept, {"item": 2}]


@pytest.mark.parametrize("line", [b'{"a": 1,, "b": 2}', b"hello", b"[1]", b"5", b'{"a": 1} }',
                                  b'"a": 1}', b'{"a": "\xdf"}'])
def test_what_no_kill_leaves_is_refused(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 2"):
        records.read_rows(path)


def test_rows_of_an_item_are_one_write(tmp_path):
    """Several processes append: their rows are whole, whoever comes first."""
    path = tmp_path / "rows.jsonl"
    code = ("import records, sys\nfor i in range(60):\n"
            "    rows = [{'by': sys.argv[2], 'i': i, 'j': j} for j in range(20)]\n"
            "    records.append_rows(sys.argv[1], rows)")
    command = [sys.executable, "-c", code, str(path)]
    root = Path(data.__file__).parent
    workers = [subprocess.Popen([*command, name], cwd=root) for name in "ab"]
    assert [worker.wait() for worker in workers] == [0, 0]
    rows = records.read_rows(path)
    for start in range(0, len(rows), 20):
        assert len({(row["by"], row["i"]) for row in rows[start:start + 20]}) == 1
    assert len(rows) == 2 * 60 * 20


def test_text_is_old_or_new(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.txt"
    records.write_text(path, "old \u00df")
    assert path.read_bytes() == "old \u00df".encode()

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        records.write_text(str(path), "new")
    assert path.read_text(encoding="utf-8") == "old \u00df"
    monkeypatch.undo()
    records.write_text(path, "new")
    assert path.read_text() == "new"


def test_a_run_goes_on_only_as_it_began(tmp_path):
    out = tmp_path / "out"
    assert records.same_settings(out, {"n": "10", "ckpt": "None"}) is False
    assert json.loads((out / "settings.json").read_text()) == {"n": "10", "ckpt": "None"}
    before = (out / "settings.json").read_bytes()
    assert records.same_settings(out, {"n": "10", "ckpt": "None"}) is True
    assert records.same_settings(str(out), {"n": "10", "ckpt": "None", "new": "None"}) is True
    with pytest.raises(ValueError) as e:
        records.same_settings(out, {"n": "11", "ckpt": "x", "new": "1"})
    assert str(e.value) == (f"{out} holds a run with other settings (n was 10, is 11; ckpt was "
                            "None, is x; new was None, is 1): choose another --out")
    assert (out / "settings.json").read_bytes() == before
    assert [x.name for x in out.iterdir()] == ["settings.json"]


def test_pictures_have_short_names_of_their_own():
    name = "a/b" * 30 + "/dog.and cat.jpg"
    tail = hashlib.sha1(name.encode()).hexdigest()[:8]
    assert data.picture_name(name) == f"dog.and cat-{tail}"
    assert data.picture_name(name, 0) == f"dog.and cat-{tail}-0"
    assert data.picture_name(name, 3, "sentence") == f"sentence-{tail}-3"
    assert len(data.picture_name("x" * 300)) == 49
    assert data.picture_name("1/x.png") != data.picture_name("2/x.png")


def test_rank_and_world(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert records.rank_and_world() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert records.rank_and_world() == (3, 8)


# ---------------------------------------------------------------- the public sets
def small_coco(folder, images):
    """What the addresses hold: a karpathy file of one picture, and an archive with it."""
    folder.mkdir()
    data.save_image(images[0], folder / "0.png")
    with zipfile.ZipFile(folder / "val2014.zip", "w") as archive:
        archive.write(folder / "0.png", "val2014/COCO_val2014_000000000042.png")
    rows = [{"image": "val2014/COCO_val2014_000000000042.png", "caption": ["a ring"]}]
    (folder / "coco_karpathy_test.json").write_text(json.dumps(rows))
    known = {}
    for name in ("coco_karpathy_test.json", "val2014.zip"):
        known[f"file://{folder}/{name}"] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return known


def commands_of(text):
    return [line for line in text.splitlines() if not line.startswith("#")]


def shell(command, env=None):
    return subprocess.run(command, shell=True, env=env, capture_output=True, text=True)


def stand_in(folder):
    """wget, md5sum and unzip as far as they are used: a cut file goes on, what is whole stays."""
    folder.mkdir()
    wget = """#!PYTHON
import os, sys
assert sys.argv[1:3] == ["-c", "-P"]
root, address = sys.argv[3:]
source, path = address.removeprefix("file://"), os.path.join(root, address.rpartition("/")[2])
os.makedirs(root, exist_ok=True)
with open(path, "ab") as f:
    f.write(open(source, "rb").read()[f.tell():])
"""
    unzip = """#!PYTHON
import sys, zipfile
assert sys.argv[1] == "-qo" and sys.argv[3] == "-d"
zipfile.ZipFile(sys.argv[2]).extractall(sys.argv[4])
"""
    for name, text in (("wget", wget), ("unzip", unzip)):
        (folder / name).write_text(text.replace("PYTHON", sys.executable))
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def fetched(name, root):
    """The exit code of `python data.py NAME --root ROOT`."""
    return data.main(data.flags(script.Parser(""), [name, "--root", str(root)]))


def test_the_commands_fetch_check_and_unpack(tmp_path, monkeypatch, capsys, images):
    """Run by a shell they make a set that is read; wrong bytes are named and never unpacked."""
    known = small_coco(tmp_path / "web", images)
    monkeypatch.setattr(data, "FILES", {"coco": known, "nocaps": {}})
    env = stand_in(tmp_path / "bin")
    root = tmp_path / "here and there"                  # a space in its name

    assert fetched("coco", root) == 1
    out = capsys.readouterr().out
    assert out.count(": missing\n") == 2 and not root.exists()
    for command in commands_of(out):
        assert shell(command, env).returncode == 0
    assert fetched("coco", root) == 0
    out = capsys.readouterr().out
    assert out.count(": here\n") == 2 and not commands_of(out)
    assert "0 of the 1 pictures of its evaluation are missing" in out
    assert data.open_image(data.read(root, "test")[0].path).shape == (3, 32, 32)

    (root / "val2014.zip").unlink()                     # the archive is needed no more
    assert fetched("coco", root) == 0
    assert "val2014.zip: unpacked" in capsys.readouterr().out
    (root / "val2014/COCO_val2014_000000000042.png").unlink()
    assert fetched("coco", root) == 1
    assert "1 of the 1 pictures of its evaluation are missing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="000042.png is missing: wget -c .*val2014.zip .*unzip"):
        data.open_image(data.read(root, "test")[0].path)

    (root / "val2014.zip").write_bytes(b"wrong" * 1000)
    assert fetched("coco", root) == 1
    out = capsys.readouterr().out
    assert "val2014.zip: wrong or cut" in out and len(commands_of(out)) == 1
    failed = shell(commands_of(out)[0], env)
    assert failed.returncode and "FAILED" in failed.stdout
    assert not any((root / "val2014").iterdir())
    whole = (tmp_path / "web/val2014.zip").read_bytes()
    (root / "val2014.zip").write_bytes(whole[:50])      # a cut one goes on
    assert shell(commands_of(out)[0], env).returncode == 0
    assert fetched("coco", root) == 0


def test_the_pictures_of_nocaps(tmp_path, capsys):
    """Fetched one by one, by the addresses in its file; who has them all is told so."""
    assert fetched("nocaps", tmp_path) == 1
    first, second = commands_of(capsys.readouterr().out)
    assert re.match(r"wget -c -P \S+ https://nocaps.*nocaps_val_4500_captions.json$", first)
    rows = [{"id": i, "file_name": f"{i}.jpg", "domain": "in-domain",
             "coco_url": f"https://x.org/{i}.jpg"} for i in range(3)]
    path = tmp_path / "nocaps_val_4500_captions.json"
    path.write_text(json.dumps({"images": rows, "annotations": []}))
    assert fetched("nocaps", tmp_path) == 1
    out = capsys.readouterr().out
    assert "3 of the 3 pictures" in out and commands_of(out) == [second]
    assert shlex.split(second)[-1] == str(tmp_path)
    said = shell(second.replace("wget", "echo wget")).stdout.split()
    assert said[-3:] == [row["coco_url"] for row in rows]
    for row in rows:
        (tmp_path / row["file_name"]).touch()
    assert fetched("nocaps", tmp_path) == 0
    assert not commands_of(capsys.readouterr().out)


def test_a_missing_file_is_named_with_its_command(tmp_path):
    with pytest.raises(ValueError, match="is missing: wget -c .*nocaps_val_4500_captions.json$"):
        data.read(tmp_path, "out")
    with pytest.raises(ValueError, match="is missing: wget -c .*md5sum -c$"):
        data.public(tmp_path, "val")
    with pytest.raises(ValueError, match="x.png is missing: no such picture"):
        data.open_image(tmp_path / "x.png")


def test_the_published_checksum_is_the_true_files(shared):
    """Of the one file of the set that is at hand."""
    path = shared / "data/captions/coco_karpathy_test.json"
    known = {address.rpartition("/")[2]: md5 for address, md5 in data.FILES["coco"].items()}
    assert data.state(path, known[path.name]) == "here"
