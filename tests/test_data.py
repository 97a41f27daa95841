"""Readers of sets, and pictures of every kind."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data


def test_the_shipped_miniature_is_read_by_the_ordinary_readers():
    from miniature import world
    for split, count in (("val", 100), ("test", 150), ("in", 150), ("near", 150), ("out", 150), ("nocaps", 450)):
        items = data.read("miniature", split)
        assert len(items) == count and all(len(x.captions) == 5 and x.path.exists() for x in items)
        assert len({x.name for x in items}) == count
    drawn = world.draw(world.sample("near", 7))                 # the files are the world's own pictures
    shipped = data.open_image(data.read("miniature", "near")[7].path).permute(1, 2, 0) * 255
    assert shipped.round().byte().numpy().tolist() == drawn.tolist()


def test_blips_schema(tmp_path):
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(
        [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["a man  on\na bike", "b"]}]))
    (tmp_path / "coco_karpathy_train.json").write_text(json.dumps(
        [{"image": "a.jpg", "image_id": "coco_522418", "caption": c} for c in ("one", "two")]))
    test, train = data.read(tmp_path, "test"), data.read(tmp_path, "train")
    assert [(x.name, x.captions) for x in test] == [("391895", ["a man on a bike", "b"])]
    assert [(x.name, x.captions) for x in train] == [("522418", ["one", "two"])]
    with pytest.raises(ValueError, match="coco_karpathy_val.json"):
        data.read(tmp_path, "val")


def test_real_coco_captions(shared, tmp_path):
    (tmp_path / "coco_karpathy_test.json").symlink_to(shared / "data/captions/coco_karpathy_test.json")
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
    with pytest.raises(ValueError, match="no split 'tset'"):
        data.read("miniature", "tset")


@pytest.mark.parametrize("mode,colour,expected", [
    ("RGB", (255, 0, 51), (1, 0, .2)), ("L", 51, (.2, .2, .2)), ("1", 1, (1, 1, 1)), ("RGBA", (0, 0, 0, 0), (1, 1, 1)),
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
    exif[0x0112] = 6                                            # the camera was turned: show it rotated by 90 degrees
    wide.save(tmp_path / "turned.png", exif=exif)
    turned = (data.open_image(tmp_path / "turned.png") * 255).round().byte().permute(1, 2, 0).numpy()
    assert (turned == np.rot90(np.asarray(wide), -1)).all()
    p = Image.new("P", (2, 2), 1)
    p.putpalette([9, 9, 9, 200, 0, 0])
    p.save(tmp_path / "clear.gif", transparency=1)
    assert data.open_image(tmp_path / "clear.gif").min() == 1   # transparent: white
    black = Image.new("RGB", (2, 2))
    Image.new("RGB", (2, 2), "red").save(tmp_path / "moving.gif", save_all=True, append_images=[black])
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


# ---------------------------------------------------------------- fetching, from a server that misbehaves
@pytest.fixture()
def server():
    """Serves /name of .files; .cut closes after that many bytes (once a request), .hashes sends ETags."""
    import hashlib
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body, start = self.server.files.get(self.path[1:]), 0
            self.server.asked.append((self.path[1:], self.headers.get("Range")))
            if body is None:
                return self.send_error(404)
            if self.headers.get("Range") and self.server.ranges:
                start = int(self.headers["Range"][6:-1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.send_header("ETag", f'"{hashlib.md5(self.server.true.get(self.path[1:], body)).hexdigest()}"')
            self.end_headers()
            self.wfile.write(body[start:start + self.server.cut])

        def log_message(self, *args):
            pass
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.files, http.true, http.asked, http.cut, http.ranges = {}, {}, [], 10 ** 9, True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    http.url = f"http://127.0.0.1:{http.server_port}/"
    yield http
    http.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on(server, tmp_path, ranges):
    server.files["a.bin"], server.cut, server.ranges = bytes(range(256)) * 40, 4000, ranges
    if not ranges:
        server.cut = 10 ** 9
        (tmp_path / "a.bin.part").write_bytes(b"what an earlier server gave")
    data.fetch(server.url + "a.bin", tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin").read_bytes() == server.files["a.bin"] and not list(tmp_path.glob("*.part"))
    assert [r for _, r in server.asked] == ([None, "bytes=4000-", "bytes=8000-"] if ranges else ["bytes=27-"])
    data.fetch(server.url + "a.bin", tmp_path / "a.bin")
    assert len(server.asked) == (3 if ranges else 1)                         # nothing is fetched twice


def test_a_download_that_stays_cut_is_kept(server, tmp_path):
    server.files["a.bin"], server.cut = b"x" * 1000, 100
    with pytest.raises(ValueError, match="3 tries failed .300 of 1000 bytes.*run this again"):
        data.fetch(server.url + "a.bin", tmp_path / "a.bin", tries=3, wait=0)
    server.cut = 10 ** 9
    assert data.fetch(server.url + "a.bin", tmp_path / "a.bin").stat().st_size == 1000


def test_wrong_bytes_are_deleted(server, tmp_path):
    server.files["a.bin"], server.true["a.bin"] = b"wrong", b"right"
    for md5 in (None, "0" * 32):
        with pytest.raises(ValueError, match="wrong bytes.*deleted"):
            data.fetch(server.url + "a.bin", tmp_path / "a.bin", md5, wait=0)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="404.*put it at"):
        data.fetch(server.url + "none.bin", tmp_path / "none.bin", wait=0)


def test_sets_are_fetched_unpacked_and_read(server, tmp_path, monkeypatch, capsys, images):
    import io
    import zipfile
    data.save_image(images[0], tmp_path / "0.png")
    picture, packed = (tmp_path / "0.png").read_bytes(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        z.writestr("val2014/COCO_val2014_000000000042.png", picture)
    server.files |= {"v.zip": packed.getvalue(), "t.json": json.dumps(
        [{"image": "val2014/COCO_val2014_000000000042.png", "caption": ["a ring"]}]).encode()}
    rows = [{"id": i, "file_name": f"{i}.png", "domain": "out-domain", "coco_url": f"{server.url}{i}.png"}
            for i in (1, 2)]
    server.files |= {"1.png": picture, "n.json": json.dumps(
        {"images": rows, "annotations": [{"image_id": 1, "id": 0, "caption": "a ring"}]}).encode()}
    monkeypatch.setattr(data, "SOURCES", {
        "coco": {"coco_karpathy_test.json": (server.url + "t.json", None), "val2014.zip": (server.url + "v.zip", None)},
        "nocaps": {"nocaps_val_4500_captions.json": (server.url + "n.json", None)}})
    assert data.doorbell(["coco", "--root", str(tmp_path / "coco")]) == 0
    assert data.doorbell(["nocaps", "--root", str(tmp_path / "nocaps")]) == 0
    out = capsys.readouterr()
    assert "has 1 items of its evaluation split, 1 of their pictures" in out.out and "404" in out.err
    assert "has 2 items of its evaluation split, 1 of their pictures; 1 pictures could not be fetched" in out.out
    assert data.open_image(data.read(tmp_path / "coco", "test")[0].path).shape == (3, 32, 32)
    (tmp_path / "nocaps/nocaps_val_4500_captions.json").unlink()
    with pytest.raises(ValueError, match="is missing: put it there from http.*python data.py nocaps"):
        data.read(tmp_path / "nocaps", "out")
