"""What a person looks at: the contact sheet and the page of a finished folder of candidates.

    sheet(groups, "clip", Path("out/rerank/sheet.png"))
    index(groups, "clip", "image-text-image", "N = 10, seed 0", Path("out/rerank/index.html"))

groups: [(item, input picture or None, input text, rows)], the rows in order of rank, best first:
{"caption", "picture" (a file beside the page, or None), "scores" ({name: number or None})}, perhaps
with "words" ([word, contribution, standard error] each), "why" (the first wins), "behind" (how far
it lies behind the first, and the standard error of that or None), "tie" (it is as good as the
first). Copy this file with pictures.py and records.py: it needs numpy and pillow.
"""
import base64
import io
import textwrap
from html import escape

from PIL import Image, ImageDraw, ImageFont, ImageOps

from pictures import as_picture, pixels
from records import visible, write_text, writing

PARTS = {"both": ("per_token", "denoise")}        # the scores that a score is made of
MEANING = {
    "both": "per_token and denoise, each in standard deviations among an item's candidates, added",
    "per_token": "log-likelihood of the caption, given the picture, by the captioner; nats a token",
    "denoise": "minus the generator's loss in denoising the picture under the caption (of several "
               "pictures, less that under an empty caption)",
    "likelihood": "log-likelihood of the whole caption in nats; favours short ones",
    "clipscore": "CLIP's cosine of picture and caption: one judge, no other model",
    "clip": "CLIP's cosine of what was given and what came back",
    "dino": "DINO's cosine of the given picture and the one that came back",
    "inception": "Inception's cosine of the given picture and the one that came back",
    "pixel": "minus the root mean square difference of their pixels",
    "sbert": "SBERT's cosine of the given text and the one that came back",
    "cider": "CIDEr of the text that came back",
    "wmd": "minus the Word Mover's distance of the given text and the one that came back",
}
WORDS = ("Words: the greener one is, the more it explains the picture (without it the generator "
         "denoises worse); the redder, the more it hurts.")
FRAMES = ("Gold: the winner. ±: the standard error of how far the others lie behind it. Dashed: a "
          "tie, equal or as near as that error.")
LOST = "no picture: it came out as no numbers"
GOLD = "#d9a300"                                  # the winner's frame
BROWN = "#a07800"                                 # and its label
GREY = "#666"                                     # labels of the others
RED = "#b00020"                                   # warnings
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>parley: TITLE</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; max-width: 1320px; margin: 0 auto; padding: 1em;
  background: #faf9f6; color: #222; overflow-wrap: anywhere }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin: 0 } dt { font-weight: bold }
section { margin: 1.5em 0; padding-top: 1em; border-top: 1px solid #ddd }
.warning { border: 3px solid #b00020; color: #b00020; padding: .6em; font-weight: bold }
dd { margin: 0 0 .3em 1.2em }
.row { display: grid; gap: 10px; align-items: start; margin-top: .6em;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) }
figure { margin: 0; padding: 8px; background: #fff; border-radius: 8px }
.best { outline: 4px solid #d9a300 } .tie { outline: 2px dashed #d9a300 } small b { color: #222 }
img { image-rendering: pixelated; display: block; width: 100%; max-width: 192px; height: auto }
small { color: #666; display: block }
</style></head><body>
<h1>parley: TITLE</h1>"""


# ---------------------------------------------------------------- pictures
def frame(path, side):
    """A picture file in a white square of `side` pixels; small ones are magnified unsmoothed."""
    try:
        image = as_picture(pixels(path))
    except (OSError, ValueError):                # it was deleted or damaged since
        image = Image.new("RGB", (side, side), "white")
        write(ImageDraw.Draw(image), 8, 8, f"{path.name} can't be read any more", RED, 11, 16)
    small = 2 * max(image.size) <= side
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.pad(image, (side, side), method, "white")


def said(row, name):
    """A score as it is printed."""
    score = row["scores"].get(name)
    return f"{name} -" if score is None else f"{name} {score:.3f}"


def ranking(row, by):
    """The score that ranks, and how far it lies behind the first."""
    apart, error = row.get("behind", (None, None))
    if error is None:
        return said(row, by)
    return f"{said(row, by)} ({apart:.3f} ± {error:.3f} behind)"


# ---------------------------------------------------------------- the contact sheet
def sheet(groups, by, path, side=136, most=6, warning="", undrawn=""):
    """sheet.png: a row an item, the first `most`: its input, the winner, framed, and the others in
    order of `by`, those without a picture as lines of text. warning: in red on top; undrawn: what
    is said of a winner without a picture."""
    across, down = side + 12, side + 140          # pixels from picture to picture
    shown = groups[:most]
    columns = []
    for *_, rows in shown:
        pictures = 1 + sum(bool(row["picture"]) for row in rows[1:])
        texts = 0 if pictures == len(rows) else 4
        columns.append(1 + pictures + texts)
    width = max(640, 36 + max(columns) * across)
    letters = width // 8                          # of a line from side to side
    head = f"Ranked by {by}, higher is better; the winner in gold."
    if len(groups) > most:
        head += f" The first {most} of {len(groups)}: all are in index.html."
    top = 36 + 16 * len(textwrap.wrap(warning, letters))
    canvas = Image.new("RGB", (width, top + len(shown) * down), "white")
    pen = ImageDraw.Draw(canvas)
    write(pen, 12, 8, warning, RED, 13, letters, 99)
    write(pen, 12, top - 26, head, "black", 13, letters)
    for r, (_, picture, words, rows) in enumerate(shown):
        y = top + r * down
        name = f"{picture.name}: " if picture else ""
        write(pen, 12, y, name + rows[0].get("why", ""), "black", 13, letters, 1)
        if picture:
            canvas.paste(frame(picture, side), (12, y + 24))
        else:
            write(pen, 20, y + 34, words, "black", 13, 17, 9)
        x = 24 + across
        lines = []
        for place, row in enumerate(rows, 1):
            if place == 1 or row["picture"]:
                post(canvas, pen, x, y + 24, place, row, by, path, side, undrawn)
                x += across
            else:
                lines.append(f"{place}.  {ranking(row, by)}  {row['caption']}")
        if len(lines) > 14:
            lines[13:] = [f"... and {len(lines) - 13} more"]
        for i, line in enumerate(lines):
            write(pen, x, y + 24 + 17 * i, line, "black", 11, 100, 1)
    with writing(path):
        canvas.save(path)


def post(canvas, pen, x, y, place, row, by, path, side, undrawn):
    """A candidate with its picture and scores, at (x, y) of the sheet."""
    if row["picture"]:
        canvas.paste(frame(path.parent / row["picture"], side), (x, y))
    else:
        write(pen, x + 8, y + 10, LOST if row.get("nan") else undrawn, GREY, 11, 19)
    colour = GREY
    if place == 1:
        colour = BROWN
        pen.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), outline=GOLD, width=4)
    below = y + side + 6
    for name in (by, *PARTS.get(by, ())):
        number = f"{place}.  " if name == by else ""
        write(pen, x, below, number + said(row, name), colour)
        below += 14
    write(pen, x, below + 2, row["caption"])


def write(pen, x, y, words, colour="black", size=11, width=23, lines=4):
    """Words from (x, y) on, wrapped after `width` letters, the first `lines` of them."""
    text = textwrap.fill(visible(words), width, max_lines=lines, placeholder=" ...")
    font = ImageFont.load_default(size)
    pen.text((x, y), text, colour, font, spacing=3)


# ---------------------------------------------------------------- the page
def index(groups, by, direction, note, path, most=200, warning="", undrawn=""):
    """index.html of the first `most` items: pictures inside, no script, all text escaped."""
    out = [HEAD.replace("TITLE", direction)]
    if warning:
        out.append(f'<p class="warning">{escape(warning)}</p>')
    out.append(f"<p>{escape(note)}</p>")
    out += legend(groups, by)
    if len(groups) > most:
        out.append(f"<p>The first {most} of {len(groups)}; all are in candidates.csv.</p>")
    for item, picture, text, rows in groups[:most]:
        text = shade(rows[0]["words"]) if rows[0].get("words") else escape(text)
        given = f"<b>{text}</b>"                  # of the text that was given, or of the caption
        if picture:
            given = f"{embedded(picture)}<small>{escape(picture.name)}</small>"
        out.append(f"<section><h2>{escape(item)}</h2>")
        out.append(f"<p>By {escape(by)}: {escape(rows[0].get('why', ''))}.</p>")
        out.append(f'<div class="row"><figure>{given}</figure>')
        for place, row in enumerate(rows, 1):
            out.append(card(place, row, by, path, picture, undrawn))
        out.append("</div></section>")
    write_text(path, visible("\n".join([*out, "</body></html>\n"])))


def legend(groups, by):
    """What the scores and colours are, as HTML."""
    names = {}
    for *_, rows in groups:
        names |= dict.fromkeys(rows[0]["scores"])
    out = ["<details open><summary>What the numbers are: of each, higher is better</summary><dl>"]
    for name in names:
        ranks = " (ranks here)" if name == by else ""
        out.append(f"<dt>{escape(name)}{ranks}</dt><dd>{MEANING.get(name, '')}</dd>")
    out.append(f"</dl><p>{FRAMES}</p>")
    if any(row.get("words") for *_, rows in groups for row in rows):
        out.append(f"<p>{WORDS}</p>")
    return [*out, "</details>"]


def card(place, row, by, path, picture, undrawn):
    """A candidate, as HTML."""
    kind, label = "", ""
    if place == 1:
        kind = ' class="best"'
    elif row.get("tie"):
        kind, label = ' class="tie"', " <i>a tie</i>"
    caption = escape(row["caption"])
    if picture and row.get("words"):
        caption = shade(row["words"])
    parts = PARTS.get(by, ())
    names = [*parts, *(name for name in row["scores"] if name not in (by, *parts))]
    scores = [f"<b>{escape(ranking(row, by))}</b>", *(escape(said(row, name)) for name in names)]
    image = ""
    if row["picture"]:
        image = embedded(path.parent / row["picture"])
    elif place == 1 or row.get("nan"):
        image = f"<small>{LOST if row.get('nan') else escape(undrawn)}</small>"
    return (f"<figure{kind}>{image}<b>{place}.</b> {caption}{label}"
            f"<small>{'<br>'.join(scores)}</small></figure>")


def embedded(picture, side=192):
    """A picture file as an <img> that holds its bytes."""
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
        title = f"{value:+.4f} ± {error:.4f}"
        spans.append(f'<span style="{style}" title="{title}">{escape(word)}</span>')
    return " ".join(spans)
