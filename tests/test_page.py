"""page.py: what sheet and page show of rows as rerank.py writes them, and of any picture."""
import numpy as np
import pytest
from PIL import Image

import page


def row(caption="a ring", score=.5, picture=None, **more):
    return {"caption": caption, "picture": picture, "scores": {"clip": score}} | more


@pytest.fixture
def ring(tmp_path):
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "ring.png")
    return tmp_path / "ring.png"


def written(tmp_path, groups, **more):
    page.index(groups, "clip", "image-text-image", "<u>", tmp_path / "x.html", **more)
    return (tmp_path / "x.html").read_text()


def test_captions_are_escaped(tmp_path):
    rows = [row("<script>alert('x')</script> & co"), row(), row()]
    text = written(tmp_path, [("<b>", None, "<i>", rows)])
    assert "<script" not in text and "<b>1.</b> &lt;script&gt;" in text
    assert "<i>" not in text and "<u>" not in text and "<h2><b>" not in text


def test_the_page_holds_its_pictures_and_asks_nobody(tmp_path, ring):
    rows = [row(picture="ring.png"), row("a hoop", None)]
    text = written(tmp_path, [("item", ring, "", rows)])
    assert text.count("<figure class=best>") == 1 and text.count("data:image/png;base64,") == 2
    assert "http" not in text and "None" not in text


def test_only_the_first_items_are_on_the_page(tmp_path):
    groups = [(f"item {i}", None, "a ring", [row()]) for i in range(4)]
    text = written(tmp_path, groups, most=3)
    assert "The first 3 of 4" in text and "item 2" in text and "item 3" not in text
    assert "The first" not in written(tmp_path, groups)


def test_words_are_shaded_where_they_belong(tmp_path, ring):
    words = [["a", -.1, .02], ["<ring>", .2, .01]]
    spans = page.shade(words)
    assert 'rgba(220,50,40,0.35)" title="-0.1000 +- 0.0200">a<' in spans
    assert 'rgba(40,160,60,0.70)" title="+0.2000 +- 0.0100">&lt;ring&gt;<' in spans
    rows = [row("a <ring>", words=words), row("a hoop")]
    of_picture = written(tmp_path, [("item", ring, "", rows)])
    of_text = written(tmp_path, [("item", None, "a <ring>", rows)])
    assert f"<b>1.</b> {spans}" in of_picture and of_picture.count("<span") == 2
    assert f"<p><b>{spans}</b></p>" in of_text and of_text.count("<span") == 2


def test_a_phone_s_picture_stands_upright(tmp_path):
    exif = (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "x.jpg", exif=exif)
    square = page.frame(tmp_path / "x.jpg", 80)
    assert square.getpixel((5, 40)) == (255, 255, 255) and square.getpixel((40, 5))[1] < 40


@pytest.mark.parametrize("mode,pixel,seen", [
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)), ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
    ("LA", (9, 0), (255, 255, 255)), ("L", 100, (100, 100, 100)), ("1", 1, (255, 255, 255)),
    ("P", 0, (0, 0, 0)), ("RGB", (1, 2, 3), (1, 2, 3))])
def test_pictures_of_any_mode(tmp_path, mode, pixel, seen):
    Image.new(mode, (30, 30), pixel).save(tmp_path / "x.png")
    assert page.frame(tmp_path / "x.png", 60).getpixel((30, 30)) == seen


def test_deep_pictures_are_scaled_not_cut(tmp_path):
    Image.fromarray(np.full((30, 30), 100 * 257, np.uint16)).save(tmp_path / "x.png")
    assert page.frame(tmp_path / "x.png", 60).getpixel((30, 30)) == (100, 100, 100)


def test_the_frame_is_that_of_the_pictures_the_models_see(tmp_path):
    """page opens pictures by itself: no other pixels than data.open_image."""
    import data
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 4), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    seen = np.asarray(page.frame(tmp_path / "x.png", 40))[::2, ::2]
    given = (data.open_image(tmp_path / "x.png") * 255).round().permute(1, 2, 0).numpy()
    assert abs(seen - given).max() <= 1


def test_the_sheet_frames_the_winner_and_says_what_was_not_drawn(tmp_path, ring):
    rows = [row(picture="ring.png"), row("a hoop", None), row("a box")]
    page.sheet([("item", ring, "", rows)] * 8, "clip", tmp_path / "sheet.png", side=100, most=6)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (4 * 112 + 24, 6 * 190 + 12)                 # six rows, four columns
    gold = np.all(np.asarray(sheet) == (0xd9, 0xa3, 0), axis=-1)
    columns = np.flatnonzero(gold.any(0))
    assert 130 < columns.min() and columns.max() < 240                # around the first alone
    assert sheet.getpixel((60, 60)) == (0, 0, 255) == sheet.getpixel((180, 60))
    assert sheet.getpixel((290, 60)) == (0xf0, 0xee, 0xe8) == sheet.getpixel((400, 60))
