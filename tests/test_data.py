"""Readers of sets, pictures of every kind, and what is kept from run to run."""
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
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
        [{"image": "a.jpg", "image_id": "coco_522418", "caption": c} for c in ("one", "two")]))
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
    with pytest.raises(ValueError, match="metadata.jsonl.*file_name and text.*caption"):
        data.read(tmp_path)
    (tmp_path / "x.json").write_text("[1,")
    with pytest.raises(ValueError, match="x.json is no JSON that can be read"):
        data.load_json(str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match="y.json is missing: put it there"):
        data.load_json(tmp_path / "y.json")


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
    with pytest.raises(ValueError, match="without captions"):
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
    assert data.read_rows(path) == []
    rows = [{"item": "a\u2028b\x85c\n", "caption": "ein Fu\u00dfg\u00e4nger"},
            {"n": {"x": None}}, {"y": 1.5}]
    data.append_rows(path, rows[:1])
    data.append_rows(str(path), rows[1:])
    assert data.read_rows(path) == rows and path.read_bytes().count(b"\n") == 3
    data.write_rows(path, rows[1:])
    assert data.read_rows(str(path)) == rows[1:]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\n\n")
    assert data.read_rows(path) == rows[1:]


def test_a_kill_anywhere_costs_one_row(tmp_path):
    """Cut at any byte, within a letter or after an inner brace: what was whole is read, and what is
    appended afterwards too."""
    path = tmp_path / "rows.jsonl"
    rows = [{"item": 1}, {"item": "\u00df", "scores": {"a": {"b": -1.5}}, "more": [True, None, {}]}]
    data.append_rows(path, rows)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        kept = rows if end == len(whole) - 1 else rows[:1]        # only the line's end is missing
        assert data.read_rows(path) == kept
        data.append_rows(path, [{"item": 2}])
        assert data.read_rows(path) == [*kept, {"item": 2}]


@pytest.mark.parametrize("line", [b'{"a": 1,, "b": 2}', b"hello", b"[1]", b"5", b'{"a": 1} }',
                                  b'"a": 1}', b'{"a": "\xdf"}'])
def test_what_no_kill_leaves_is_refused(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 2"):
        data.read_rows(path)


def test_rows_of_an_item_are_one_write(tmp_path):
    """Several processes append: their rows are whole, whoever comes first."""
    path = tmp_path / "rows.jsonl"
    code = ("import data, sys\nfor i in range(60):\n"
            "    rows = [{'by': sys.argv[2], 'i': i, 'j': j} for j in range(20)]\n"
            "    data.append_rows(sys.argv[1], rows)")
    command = [sys.executable, "-c", code, str(path)]
    root = Path(data.__file__).parent
    workers = [subprocess.Popen([*command, name], cwd=root) for name in "ab"]
    assert [worker.wait() for worker in workers] == [0, 0]
    rows = data.read_rows(path)
    for start in range(0, len(rows), 20):
        assert len({(row["by"], row["i"]) for row in rows[start:start + 20]}) == 1
    assert len(rows) == 2 * 60 * 20


def test_text_is_old_or_new(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.txt"
    data.write_text(path, "old \u00df")
    assert path.read_bytes() == "old \u00df".encode()

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        data.write_text(str(path), "new")
    assert path.read_text(encoding="utf-8") == "old \u00df"
    monkeypatch.undo()
    data.write_text(path, "new")
    assert path.read_text() == "new"


def test_a_run_goes_on_only_as_it_began(tmp_path):
    out = tmp_path / "out"
    assert data.same_settings(out, {"n": "10", "ckpt": "None"}) is False
    assert json.loads((out / "settings.json").read_text()) == {"n": "10", "ckpt": "None"}
    before = (out / "settings.json").read_bytes()
    assert data.same_settings(out, {"n": "10", "ckpt": "None"}) is True
    assert data.same_settings(str(out), {"n": "10", "ckpt": "None", "new": "None"}) is True
    with pytest.raises(ValueError) as e:
        data.same_settings(out, {"n": "11", "ckpt": "x", "new": "1"})
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
    assert data.rank_and_world() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert data.rank_and_world() == (3, 8)


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


def test_the_commands_fetch_check_and_unpack(tmp_path, monkeypatch, capsys, images):
    """Run by a shell they make a set that is read; wrong bytes are named and never unpacked."""
    known = small_coco(tmp_path / "web", images)
    monkeypatch.setattr(data, "FILES", {"coco": known, "nocaps": {}})
    env = stand_in(tmp_path / "bin")
    root = tmp_path / "here and there"                  # a space in its name

    assert data.main(["coco", "--root", str(root)]) == 1
    out = capsys.readouterr().out
    assert out.count(": missing\n") == 2 and not root.exists()
    for command in commands_of(out):
        assert shell(command, env).returncode == 0
    assert data.main(["coco", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert out.count("here, its MD5 is right") == 2 and not commands_of(out)
    assert "0 of the 1 pictures of its evaluation are missing" in out
    assert data.open_image(data.read(root, "test")[0].path).shape == (3, 32, 32)

    (root / "val2014.zip").unlink()                     # the archive is needed no more
    assert data.main(["coco", "--root", str(root)]) == 0
    assert "val2014.zip: unpacked" in capsys.readouterr().out
    (root / "val2014/COCO_val2014_000000000042.png").unlink()
    assert data.main(["coco", "--root", str(root)]) == 1
    assert "1 of the 1 pictures of its evaluation are missing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="000042.png is missing: wget -c .*val2014.zip .*unzip"):
        data.open_image(data.read(root, "test")[0].path)

    (root / "val2014.zip").write_bytes(b"wrong" * 1000)
    assert data.main(["coco", "--root", str(root)]) == 1
    out = capsys.readouterr().out
    assert "val2014.zip: wrong or cut" in out and len(commands_of(out)) == 1
    failed = shell(commands_of(out)[0], env)
    assert failed.returncode and "FAILED" in failed.stdout
    assert not any((root / "val2014").iterdir())
    whole = (tmp_path / "web/val2014.zip").read_bytes()
    (root / "val2014.zip").write_bytes(whole[:50])      # a cut one goes on
    assert shell(commands_of(out)[0], env).returncode == 0
    assert data.main(["coco", "--root", str(root)]) == 0


def test_the_pictures_of_nocaps(tmp_path, capsys):
    """Fetched one by one, by the addresses in its file; who has them all is told so."""
    assert data.main(["nocaps", "--root", str(tmp_path)]) == 1
    first, second = commands_of(capsys.readouterr().out)
    assert re.match(r"wget -c -P \S+ https://nocaps.*nocaps_val_4500_captions.json$", first)
    rows = [{"id": i, "file_name": f"{i}.jpg", "domain": "in-domain",
             "coco_url": f"https://x.org/{i}.jpg"} for i in range(3)]
    path = tmp_path / "nocaps_val_4500_captions.json"
    path.write_text(json.dumps({"images": rows, "annotations": []}))
    assert data.main(["nocaps", "--root", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "3 of the 3 pictures" in out and commands_of(out) == [second]
    assert shlex.split(second)[-1] == str(tmp_path)
    said = shell(second.replace("wget", "echo wget")).stdout.split()
    assert said[-3:] == [row["coco_url"] for row in rows]
    for row in rows:
        (tmp_path / row["file_name"]).touch()
    assert data.main(["nocaps", "--root", str(tmp_path)]) == 0
    assert not commands_of(capsys.readouterr().out)


def test_a_missing_file_is_named_with_its_command(tmp_path):
    with pytest.raises(ValueError, match="is missing: wget -c .*nocaps_val_4500_captions.json$"):
        data.read(tmp_path, "out")
    with pytest.raises(ValueError, match="is missing: wget -c .*md5sum -c$"):
        data.load_json(tmp_path / "coco_karpathy_val.json")
    with pytest.raises(ValueError, match="x.png is missing: no such picture"):
        data.open_image(tmp_path / "x.png")


def test_the_published_checksum_is_the_true_files(shared):
    """Of the one file of the set that is at hand."""
    path = shared / "data/captions/coco_karpathy_test.json"
    known = {address.rpartition("/")[2]: md5 for address, md5 in data.FILES["coco"].items()}
    assert data.state(path, known[path.name]) == "here, its MD5 is right"
