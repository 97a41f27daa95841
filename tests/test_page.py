"""page.py: what sheet and page show of rows as rerank.py writes them, and of any picture."""
import shutil
import subprocess
from html.parser import HTMLParser

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


class Checker(HTMLParser):
    """Raises AssertionError where tags do not close in order, or an attribute comes twice."""
    EMPTY = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        assert len(dict(attributes)) == len(attributes)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_captions_are_escaped(tmp_path):
    rows = [row("<script>alert('x')</script> & co"), row(), row()]
    text = written(tmp_path, [("<b>", None, "<s>", rows)], warning="<q>")
    assert "<script" not in text and "<b>1.</b> &lt;script&gt;" in text
    assert not {"s", "u", "q", "script"} & set(Checker(text).seen) and "<h2><b>" not in text


def test_the_page_is_well_formed(tmp_path, ring):
    """With everything on it at once."""
    words = [["a", -.1, .02], ["ring", .2, .01]]
    rows = [row(picture="ring.png", words=words, why="a & b"), row("&", tie=True, behind=(.1, .2)),
            row("c", None, nan=True)]
    text = written(tmp_path, [("item", ring, "", rows), ("other", None, "a <ring>", rows)],
                   warning="toys & co", undrawn="<not> drawn")
    tags = Checker(text).seen
    assert tags.count("figure") == 8 and tags.count("img") == 3 and tags.count("section") == 2
    assert text.count('<p class="warning">toys &amp; co</p>') == 1


def test_the_page_holds_its_pictures_and_asks_nobody(tmp_path, ring):
    rows = [row(picture="ring.png"), row("a hoop", None)]
    text = written(tmp_path, [("item", ring, "", rows)])
    assert text.count('<figure class="best">') == 1 and text.count("data:image/png;base64,") == 2
    assert "http" not in text and "None" not in text and "<small>ring.png</small>" in text


def test_the_page_explains_its_scores(tmp_path):
    """Every score that rerank.py writes has a meaning; what ranks is marked; no grey boxes."""
    import rerank
    known = {"both", "denoise", "likelihood", "per_token", "clipscore", "wmd", "inception"}
    for names in rerank.LIKENESSES.values():
        known |= set(names)
    assert known == set(page.MEANING)
    scores = {"both": 1.0, "denoise": -.2, "per_token": None, "clipscore": .3, "own": 2}
    rows = [row(scores=scores, why="+0.013, within its error of 0.017: a tie with 2"),
            row(scores=scores, tie=True, behind=(.013, .017)), row(scores=scores, behind=(.5, None))]
    page.index([("x", None, "a ring", rows)], "both", "text-image-text", "", tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    for name in scores:
        ranks = " (ranks here)" if name == "both" else ""
        assert f"<dt>{name}{ranks}</dt><dd>{page.MEANING.get(name, '')}</dd>" in text
    assert "higher is better" in text and "clip</dt>" not in text and page.WORDS not in text
    assert "By both: +0.013, within its error of 0.017: a tie with 2.</p>" in text
    assert text.count('class="tie"') == text.count("<i>a tie</i>") == 1
    assert "<b>both 1.000 (0.013 ± 0.017 behind)</b><br>per_token -<br>denoise -0.200<br>" in text
    assert text.count("<b>both 1.000</b>") == 2 and "<img" not in text and "not drawn" not in text


def test_what_has_no_picture_says_why(tmp_path, ring):
    rows = [row("a hoop"), row("a box", nan=True), row("a ring", picture="ring.png"), row("a cat")]
    text = written(tmp_path, [("x", ring, "", rows)], undrawn="not drawn: --draw does it")
    assert text.count("not drawn: --draw does it") == text.count(page.LOST) == 1
    assert text.count("<img") == 2
    assert "<small></small><b>1.</b>" in written(tmp_path, [("x", ring, "", rows)])


def test_a_narrow_page_fits(tmp_path, ring):
    """The rules that a phone needs: the width of the device, cards that wrap, words that break."""
    text = written(tmp_path, [("x" * 300, ring, "", [row("y" * 300)])])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    style = text[text.index("<style>"):text.index("</style>")]
    assert "overflow-wrap: anywhere" in style and "auto-fill, minmax(150px, 1fr)" in style
    assert "max-width: 1320px" in style and "width: 100%; max-width: 192px; height: auto" in style


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_overflows_in_a_browser(tmp_path, ring, width):
    """The outermost columns of a picture of the page are its background."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    name = "a/very-long-path/" * 40
    rows = [row("w" * 200, picture="ring.png", why="z" * 300), *(row() for _ in range(12))]
    written(tmp_path, [(name, ring, "", rows)], warning="v" * 400)
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1500",
               f"--screenshot={tmp_path / 'shot.png'}", (tmp_path / "x.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert shot.shape[1] == width
    assert (shot[:, :8] == (0xfa, 0xf9, 0xf6)).all() and (shot[:, -8:] == (0xfa, 0xf9, 0xf6)).all()


def test_only_the_first_items_are_on_the_page(tmp_path):
    groups = [(f"item {i}", None, "a ring", [row()]) for i in range(4)]
    text = written(tmp_path, groups, most=3)
    assert "The first 3 of 4" in text and "item 2" in text and "item 3" not in text
    assert "The first" not in written(tmp_path, groups)


def test_words_are_shaded_where_they_belong(tmp_path, ring):
    words = [["a", -.1, .02], ["<ring>", .2, .01]]
    spans = page.shade(words)
    assert 'rgba(220,50,40,0.35)" title="-0.1000 ± 0.0200">a<' in spans
    assert 'rgba(40,160,60,0.70)" title="+0.2000 ± 0.0100">&lt;ring&gt;<' in spans
    rows = [row("a <ring>", words=words), row("a hoop")]
    of_picture = written(tmp_path, [("item", ring, "", rows)])
    of_text = written(tmp_path, [("item", None, "a <ring>", rows)])
    assert f"<b>1.</b> {spans}" in of_picture and of_picture.count("<span") == 2
    assert f"<figure><b>{spans}</b></figure>" in of_text and page.WORDS in of_text and of_text.count("<span") == 2


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


def test_the_sheet_frames_the_winner_and_has_no_empty_boxes(tmp_path, ring):
    """Six of eight items, and it says so; candidates without a picture are words."""
    rows = [row(picture="ring.png", why="+0.1 before 2"), row("a hoop"), row("a box", picture="ring.png")]
    page.sheet([("item", ring, "", rows)] * 8, "clip", tmp_path / "sheet.png", side=100, most=6)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (36 + 7 * 112, 36 + 6 * 240)                 # six rows; input, two, words
    gold = np.all(np.asarray(sheet) == (0xd9, 0xa3, 0), axis=-1)
    columns = np.flatnonzero(gold.any(0))
    assert columns.min() == 132 and columns.max() == 239              # around the first alone
    blue = np.all(np.asarray(sheet) == (0, 0, 255), axis=-1)
    assert blue[60:160, 12:112].all() and blue[60:160, 136:236].all() and blue[60:160, 248:348].all()
    assert blue.sum() == 6 * 3 * 100 * 100
    page.sheet([("item", ring, "", rows)] * 6, "clip", tmp_path / "all.png", side=100, most=6)
    heads = [np.asarray(Image.open(tmp_path / name))[:30] for name in ("sheet.png", "all.png")]
    assert (heads[0] < 128).sum() > (heads[1] < 128).sum() > 0        # "The first 6 of 8"


def test_the_sheet_warns_in_red(tmp_path, ring):
    rows = [row("a hoop")]
    for warning in ("", "toys " * 40):
        page.sheet([("item", None, "a ring", rows)], "clip", tmp_path / "x.png", warning=warning)
        pixels = np.asarray(Image.open(tmp_path / "x.png"))
        red = np.all(pixels == (0xb0, 0, 0x20), axis=-1)
        assert red.any() == bool(warning) and pixels.shape[1] == 640
        assert pixels.shape[0] == 36 + 276 + 48 * bool(warning)
