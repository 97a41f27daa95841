"""What a person looks at: the contact sheet and the page of a finished folder of candidates.

    sheet(groups, "clip", Path("out/rerank/sheet.png"))
    index(groups, "clip", "image-text-image", "N = 10, seed 0", Path("out/rerank/index.html"))

groups: [(item, input picture or None, input text, rows)], the rows in order of rank, best first:
{"caption", "picture" (a file beside the page, or None), "scores" ({name: number or None})}, perhaps
with "words" ([word, contribution, standard error] each). Copy this file alone: it needs pillow.
"""
import base64
import io
import textwrap
from html import escape

from PIL import Image, ImageDraw, ImageFont, ImageOps

PARTS = {"both": ("per_token", "denoise")}        # the scores that a score is made of
GOLD = "#d9a300"                                  # the winner's frame
BROWN = "#a07800"                                 # and its label
GREY = "#666"                                     # labels of the others
PALE = "#f0eee8"                                  # in place of a picture
HEAD = """<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content='width=device-width'>
<title>parley: TITLE</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; background: #faf9f6; color: #222 }
section { margin: 2em 0; padding-top: 1em; border-top: 1px solid #ddd }
.row { display: flex; flex-wrap: wrap; gap: 16px }
figure { margin: 0; width: 192px; padding: 8px; background: #fff; border-radius: 8px }
figure.best { outline: 4px solid #d9a300 }
img { image-rendering: pixelated; display: block } small { color: #777; display: block }
</style>
<h1>parley: TITLE</h1>"""


# ---------------------------------------------------------------- pictures
def frame(path, side):
    """A picture file in a white square of `side` pixels, upright by its EXIF orientation; small
    ones are magnified without smoothing. Without a path, an empty square."""
    if path is None:
        return Image.new("RGB", (side, side), PALE)
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):            # 16 bit: convert would cut at 255
            scale = 257 if image.getextrema()[1] > 255 else 1
            image = image.convert("I").point(lambda value: value / scale).convert("L")
        image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    small = 2 * max(image.size) <= side
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.pad(image, (side, side), method, "white")


def drawn(row, path):
    """The picture of a candidate, which lies beside `path`, or None."""
    return path.parent / row["picture"] if row["picture"] else None


# ---------------------------------------------------------------- the contact sheet
def sheet(groups, by, path, side=136, most=6):
    """sheet.png: a row an item, the first `most`; its input at the left, then the candidates in
    order of `by`, the winner framed."""
    gap, text = 12, 92                            # pixels: between pictures; of words below each
    across, down = side + gap, side + text + gap
    columns = 1 + max(len(rows) for *_, rows in groups)
    size = columns * across + 2 * gap, len(groups[:most]) * down + gap
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for r, (_, picture, words, rows) in enumerate(groups[:most]):
        y = gap + r * down
        below = y + side + 6
        canvas.paste(frame(picture, side), (gap, y))
        if picture:
            write(pen, gap, below, "the input", size=13)
        else:
            write(pen, gap + 8, y + 10, words, size=13, width=17, lines=9)
        for c, row in enumerate(rows):
            x = 2 * gap + (c + 1) * across
            candidate = drawn(row, path)
            canvas.paste(frame(candidate, side), (x, y))
            if candidate is None:
                write(pen, x + 8, y + 10, "not drawn", GREY)
            colour = GREY
            if c == 0:
                colour = BROWN
                corners = x - 4, y - 4, x + side + 3, y + side + 3
                pen.rectangle(corners, outline=GOLD, width=4)
            write(pen, x, below, f"{c + 1}.  {said(row, by)}", colour, 13)
            for part in PARTS.get(by, ()):
                write(pen, x, below + 16, said(row, part), GREY)
                below += 12
            write(pen, x, below + 16, row["caption"])
    canvas.save(path)


def said(row, name):
    """A score as it is printed."""
    score = row["scores"].get(name)
    return f"{name} -" if score is None else f"{name} {score:.3f}"


def write(pen, x, y, words, colour="black", size=11, width=23, lines=4):
    """Words from (x, y) on, wrapped after `width` letters, the first `lines` of them."""
    font = ImageFont.load_default(size)
    for line in textwrap.wrap(words, width)[:lines]:
        pen.text((x, y), line, colour, font)
        y += 13


# ---------------------------------------------------------------- the page
def index(groups, by, direction, note, path, most=200):
    """index.html of the first `most` items: pictures inside, no script, all text escaped."""
    out = [HEAD.replace("TITLE", direction), f"<p>{escape(note)}</p>"]
    if len(groups) > most:
        out.append(f"<p>The first {most} of {len(groups)}; all are in candidates.jsonl.</p>")
    for item, picture, text, rows in groups[:most]:
        explained = rows[0].get("words")          # of the caption, or of the text that was given
        text = shade(explained) if explained else escape(text)
        given = embedded(picture) or f"<p><b>{text}</b></p>"
        out.append(f"<section><h2>{escape(item)}</h2><div class=row>")
        out.append(f"<figure>{given}<small>the input</small></figure>")
        for place, row in enumerate(rows, 1):
            best = " class=best" if place == 1 else ""
            caption = escape(row["caption"])
            if picture and "words" in row:
                caption = shade(row["words"])
            out.append(f"<figure{best}>{embedded(drawn(row, path))}")
            out.append(f"<b>{place}.</b> {caption}<small>")
            for name, score in row["scores"].items():
                if score is not None:
                    out.append(f"{escape(name)} {score:.3f}<br>")
            out.append("</small></figure>")
        out.append("</div></section>")
    out.append(f"<p><small>ranked by {escape(by)}</small></html>\n")
    path.write_text("\n".join(out), encoding="utf-8")


def embedded(picture, side=192):
    """A picture file as an <img> that holds its bytes; nothing where there is none."""
    if picture is None:
        return ""
    buffer = io.BytesIO()
    frame(picture, side).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{side}" height="{side}" src="data:image/png;base64,{data}">'


def shade(words):
    """Words as HTML, greener the more they explain the picture, redder the more they hurt."""
    most = max((abs(value) for _, value, _ in words), default=0) or 1
    spans = []
    for word, value, error in words:
        colour = "40,160,60" if value > 0 else "220,50,40"
        strength = abs(value) / most * .7
        style = f"background:rgba({colour},{strength:.2f})"
        title = f"{value:+.4f} +- {error:.4f}"
        spans.append(f'<span style="{style}" title="{title}">{escape(word)}</span>')
    return " ".join(spans)
