"""Readers of sets, and pictures of every kind."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data


def test_the_shipped_miniature_is_read_by_the_ordinary_readers():
    import world
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
