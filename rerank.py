"""Best of N: captions for images, images for captions, chosen by what the other model makes of them (paper, Section 3).

    python rerank.py --n 10                                      # a few pictures of the miniature world: seconds
    python rerank.py photo.jpg holiday/ --captioner vitb         # best of ten captions for files and folders
    python rerank.py "a small red star on the grass"             # best of ten images for a sentence
    python rerank.py sentences.txt                               # one a line, or a JSON list
    python rerank.py --data data/nocaps --split out --limit 100  # a set with references: baseline, chosen, oracle too
    python rerank.py --scorer full                               # the paper's cycle: every caption is drawn
    python rerank.py --agree 20                                  # how well the cheap score agrees with the full cycle
    python rerank.py --words                                     # which words of the chosen caption explain the picture
    python rerank.py --pairs trl --margin .02                    # preference pairs for DPO, of the candidates

Writes into --out: candidates.jsonl (a line a candidate: item, caption, picture, log-likelihood, every likeness, ranks),
best.json, sheet.png and index.html. Run again, it goes on where it stopped; another --by ranks again without redoing.
"""
import argparse
import itertools
import json
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).resolve().parent
IMAGE, TEXT = "image-text-image", "text-image-text"
DEFAULTS = {IMAGE: ["clip", "dino", "pixel"], TEXT: ["clip", "sbert", "cider"]}


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("inputs", nargs="*", help="pictures, folders of pictures, sentences, or a .txt or .json of them")
    p.add_argument("-n", "--n", type=int, default=10, help="candidates for each input (the paper's N)")
    p.add_argument("--captioner", default="miniature", help="miniature, vitb, vitl, blip2, folder, hub id, file.py:f")
    p.add_argument("--generator", help="miniature, sd14, directory, hub id or file.py:name; follows --captioner")
    p.add_argument("--ckpt", help="a checkpoint of finetune.py, or its folder: the trained weights go into both")
    p.add_argument("--data", help="a set to take inputs and references from if none are given; default miniature")
    p.add_argument("--split", help="of --data: val, test; in, near, out, nocaps; default nocaps of NoCaps, else test")
    p.add_argument("--turn", choices=["image", "text"], help="which side of --data to start from; default image")
    p.add_argument("--limit", type=int, help="how many items of --data; default 4 of the miniature, else all")
    p.add_argument("--scorer", choices=["full", "denoise", "few"], help="full: draw every caption; few: in 8 steps of "
                   "DPM-Solver++; denoise: draw only the winner. Default denoise of pictures, full of sentences")
    p.add_argument("--decoder", help="of --scorer few: tiny (TAESD), or an AutoencoderTiny's place; default exact")
    p.add_argument("--draws", type=int, default=12, help="noises of each candidate in --scorer denoise")
    p.add_argument("--budget", type=int, help="UNet evaluations an item in --scorer denoise, by halving; a noise "
                   "a round at least")
    p.add_argument("--agree", type=int, default=0, help="score the first K items by the full cycle too (images twice)")
    p.add_argument("--words", action="store_true", help="what each word of the chosen caption adds (denoising loss)")
    p.add_argument("--pairs", choices=["trl", "diffusion"], help="preference pairs: captions for TRL's DPO (JSON "
                   "lines), or pictures for Diffusion-DPO (parquet)")
    p.add_argument("--margin", type=float, default=0.0, help="in --pairs, scores at most this far apart are ties")
    p.add_argument("--way", default="top-p", help="how captions are sampled: top-p, top-k, temperature, typical, beam")
    p.add_argument("--steps", type=int, help="denoising steps a picture; default 50, or 8 of --scorer few; 0 of "
                   "--scorer denoise: its winner is not drawn")
    p.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance")
    p.add_argument("--likeness", nargs="*", help="of images: clip dino pixel inception; of text: clip sbert cider wmd")
    p.add_argument("--by", help="the likeness that ranks; default the first of --likeness that is available")
    p.add_argument("--judges", help="miniature, hub, cache (of the hub's, what was fetched before), or a folder with "
                   "clip, dino, sbert; default the models' own: cache beside local ones")
    p.add_argument("--glove", help="GloVe text file for wmd")
    p.add_argument("--seed", type=int, default=0, help="chance is a function of seed and item")
    p.add_argument("--batch", type=int, help="pictures drawn at once (memory, speed); default 40, or 10 of real models")
    p.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    p.add_argument("--dtype", help="float32, float16 or bfloat16; default by device")
    p.add_argument("--out", type=Path, help="folder for what comes out; default out/rerank, or out/rerank-2 ... where "
                   "that holds a run of other settings")
    args = p.parse_args(argv)
    small = args.captioner == "miniature"
    args.generator = args.generator or ("miniature" if small else "sd14")
    args.judges = args.judges or ("miniature" if small else None)
    args.batch = 40 if args.batch is None and small else 10 if args.batch is None else args.batch
    args.data = args.data or ("miniature" if small else None)
    args.steps = (8 if args.scorer == "few" else 50) if args.steps is None else args.steps
    if min(args.n, args.batch, args.draws, args.budget or 1) < 1 or min(args.steps, args.agree) < 0 or (
            args.budget == 0 or not args.margin >= 0):
        p.error("--n, --batch, --draws and --budget are at least 1, --steps, --agree and --margin at least 0")
    return args


# ---------------------------------------------------------------- what goes in
def gather(args, data):
    """(direction, items) from the arguments. A mixture of pictures and sentences is refused."""
    if not args.inputs:
        if not args.data:
            raise ValueError("nothing to rerank: give pictures, folders or sentences, or --data with a set's folder")
        items = data.read(args.data, args.split)[:args.limit or (4 if args.data == "miniature" else None)]
        direction = TEXT if args.turn == "text" else IMAGE
        if direction == TEXT and not all(x.captions for x in items):
            raise ValueError(f"--turn text: {args.data} has pictures without captions")
        return direction, items
    pictures, sentences = [], []
    for given in args.inputs:
        path = Path(given)
        if os.path.isdir(given):                                # a long sentence is no file name: Path would raise
            pictures += [data.Item(x.path.as_posix(), x.path, x.captions) for x in data.read(path)]
        elif path.suffix.lower() in data.SUFFIXES:
            if not os.path.exists(given):
                raise ValueError(f"{given}: no such picture")
            pictures.append(data.Item(path.as_posix(), path))
        elif path.suffix.lower() in (".txt", ".json"):
            if not os.path.exists(given):
                raise ValueError(f"{given}: no such file of sentences")
            text = path.read_text()
            lines = text.splitlines() if path.suffix.lower() == ".txt" else data.load(path)
            if not isinstance(lines, list) or not all(isinstance(x, str) for x in lines):
                raise ValueError(f"{given}: expected a JSON list of strings, or a .txt with a sentence a line")
            sentences += [data.fold(x) for x in lines if x.strip()]
        else:
            sentences.append(data.fold(given))
    if pictures and sentences:
        raise ValueError(f"pictures and sentences in one run (such as {pictures[0].name!r} and {sentences[0]!r}): "
                         "give one kind; a picture's name ends in " + " ".join(sorted(data.SUFFIXES)))
    if not pictures and not all(sentences):
        raise ValueError("an empty sentence can't be drawn")
    chosen = {x.name: x for x in pictures} or {x: data.Item(x, None, [x]) for x in sentences}
    return (IMAGE if pictures else TEXT), list(chosen.values())[:args.limit]


def decide(args, direction):
    """The default --scorer; refuses what does not go together."""
    if args.scorer is None:          # by RESULTS.md, "Which caption, at what price?" and "Which picture, in few steps?"
        args.scorer = "full" if direction == TEXT or ".py:" in args.generator else "denoise"
    if not args.steps and (direction == TEXT or args.scorer != "denoise"):
        raise ValueError("--steps 0: only --scorer denoise of pictures needs no drawing")


# ---------------------------------------------------------------- what is kept
def place(args, direction):
    """The default --out: of out/rerank, out/rerank-2 ... one that holds a run of these settings, else the next new."""
    folders = [Path("out/rerank"), *(Path(f"out/rerank-{i}") for i in range(2, 1000))]
    for args.out in sorted(folders, key=lambda x: not (x / "settings.json").exists()):
        try:
            resume(args, direction)
            return args.out
        except ValueError:
            continue
    raise ValueError("out/rerank and 998 more hold runs of other settings: say --out")


def resume(args, direction):
    """(settings, finished items {name: rows}) of --out. Other settings on the same folder are refused."""
    keep = ("n", "captioner", "generator", "way", "steps", "guidance", "likeness", "judges", "glove", "seed", "dtype",
            "ckpt", "scorer", "draws", "budget", "agree", "decoder")
    settings = {"direction": direction, "set": "None" if args.inputs else f"{Path(args.data).name} {args.split}"}
    settings |= {k: str(vars(args)[k]) for k in keep}
    path, lines = args.out / "settings.json", args.out / "candidates.jsonl"
    before = json.loads(path.read_text()) if path.exists() else settings
    other = [f"{k} was {before.get(k)}, is {v}" for k, v in settings.items() if before.get(k, "None") != v]
    if other:
        raise ValueError(f"{args.out} holds a run with other settings ({'; '.join(other)}): choose another --out")
    done = {}
    for line in lines.read_text().splitlines() if lines.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue                                            # the line a kill cut off
        done.setdefault(row["item"], {})[row["candidate"]] = row
    return settings, {k: [v[j] for j in range(args.n)] for k, v in done.items() if len(v) == args.n}


def append(path, rows):
    """All candidates of an item by one write: several processes may add to a file, a kill cuts only its last line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with open(path, "ab+", buffering=0) as f:
        if f.seek(0, 2):
            f.seek(-1, 2)
            f.write(b"\n" * (f.read(1) != b"\n"))
        f.write(text.encode())


def finish(path, rows):
    path.with_suffix(".new").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    os.replace(path.with_suffix(".new"), path)


# ---------------------------------------------------------------- what a person looks at
def frame(picture, side):
    """A picture file in a square of `side` pixels; small ones magnified without smoothing."""
    from PIL import Image

    import data
    image = Image.fromarray((data.open_image(picture) * 255).round().byte().permute(1, 2, 0).numpy())
    scale = side / max(image.size)
    size = [max(1, round(s * scale)) for s in image.size]
    image = image.resize(size, Image.NEAREST if scale >= 2 else Image.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def sheet(groups, by, path, side=136, most=6):
    """The contact sheet: a row an item, its input at the left, then the candidates in order, the winner framed.

    groups: [(item, input picture or None, input text, rows in order of rank)].
    """
    import textwrap

    from PIL import Image, ImageDraw, ImageFont
    font, bold = ImageFont.load_default(11), ImageFont.load_default(13)
    gap, text, columns = 12, 78, 1 + max(len(rows) for *_, rows in groups)
    page = Image.new("RGB", (columns * (side + gap) + 2 * gap, len(groups[:most]) * (side + text + gap) + gap), "white")
    pen = ImageDraw.Draw(page)

    def write(x, y, words, font, fill, width=23, lines=4):
        for i, line in enumerate(textwrap.wrap(words, width)[:lines]):
            pen.text((x, y + 13 * i), line, fill, font)

    for r, (_, picture, words, rows) in enumerate(groups[:most]):
        y = gap + r * (side + text + gap)
        if picture:
            page.paste(frame(picture, side), (gap, y))
            write(gap, y + side + 6, "the input", bold, "black")
        else:
            pen.rectangle((gap, y, gap + side, y + side), "#f2f0ea")
            write(gap + 8, y + 10, words, bold, "black", 17, 9)
        for c, row in enumerate(rows):
            x = 2 * gap + (c + 1) * (side + gap)
            if row["picture"]:
                page.paste(frame(path.parent / row["picture"], side), (x, y))
            else:
                pen.rectangle((x, y, x + side, y + side), "#eceae4")
                write(x + 8, y + 10, "not drawn", font, "#999")
            if c == 0:
                pen.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), outline="#d9a300", width=4)
            write(x, y + side + 6, f"{c + 1}.  {by} {value(row, by):.3f}", bold, "#a07800" if c == 0 else "#666")
            write(x, y + side + 22, row["caption"], font, "black")
    page.save(path)


def page(groups, by, direction, note, path, most=200):
    """index.html: self-contained (pictures inside, no script), captions escaped, candidates in order of rank; the first
    `most` items."""
    import base64
    import html
    import io

    def image(picture):
        buffer, small = io.BytesIO(), frame(picture, 192)
        small.save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img alt="" width="192" height="192" src="data:image/png;base64,{data}">'

    style = ("body{font:15px/1.4 system-ui,sans-serif;margin:2em;background:#faf9f6;color:#222}"
             "section{margin:2em 0;padding-top:1em;border-top:1px solid #ddd}.row{display:flex;flex-wrap:wrap;gap:16px}"
             "figure{margin:0;width:192px;padding:8px;background:#fff;border-radius:8px}"
             "figure.best{outline:4px solid #d9a300}img{image-rendering:pixelated;display:block}"
             "small{color:#777;display:block}")
    out = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
           f"<title>parley: {direction}</title><style>{style}</style>"
           f"<h1>parley: {direction}</h1><p>{html.escape(note)}</p>"]
    if len(groups) > most:
        out.append(f"<p>The first {most} of {len(groups)}; all are in candidates.jsonl.</p>")
    for item, picture, words, rows in groups[:most]:
        text = shade(rows[0]["words"]) if direction == TEXT and "words" in rows[0] else html.escape(words)
        head = image(picture) if picture else f"<p><b>{text}</b></p>"
        out.append(f"<section><h2>{html.escape(item)}</h2><div class=row><figure>{head}<small>the input</small>"
                   "</figure>")
        for c, row in enumerate(rows):
            scores = "<br>".join(f"{html.escape(k)} {v:.3f}" for k, v in row["scores"].items() if v is not None)
            drawn = image(path.parent / row["picture"]) if row["picture"] else ""
            said = shade(row["words"]) if direction == IMAGE and "words" in row else html.escape(row["caption"])
            out.append(f"<figure{' class=best' if c == 0 else ''}>{drawn}"
                       f"<b>{c + 1}.</b> {said}<small>{scores}</small></figure>")
        out.append("</div></section>")
    path.write_text("\n".join(out) + "\n<p><small>ranked by " + html.escape(by) + "</small></html>\n")


def shade(words):
    """Words as HTML, greener the more they explain the picture, redder the more they hurt."""
    import html
    most = max((abs(v) for _, v, _ in words), default=0) or 1
    return " ".join(f'<span style="background:rgba({"40,160,60" if v > 0 else "220,50,40"},{abs(v) / most * .7:.2f})" '
                    f'title="{v:+.4f} +- {e:.4f}">{html.escape(w)}</span>' for w, v, e in words)


# ---------------------------------------------------------------- what came of it
def rows_of(item, b, talk, args, direction, scores, cut):
    """The lines of candidates.jsonl of one item; pictures are saved before the lines that name them. cut: which of its
    captions the generator did not read to the end."""
    import hashlib

    import data
    stem = Path(item.name).stem[:40] if direction == IMAGE else "sentence"
    stem += "-" + hashlib.sha1(item.name.encode()).hexdigest()[:8]
    rows, only = [], None
    if args.scorer == "denoise" and direction == IMAGE:                       # only the winner is drawn
        only = int(scores["denoise"][b].argmax()) if args.steps else -1
    for j in range(args.n):
        picture = f"pictures/{stem}-{j}.png" if only in (None, j) else None
        if picture:
            data.save_image(talk.images[b, j], args.out / picture)
        values = {name: float(score[b][j]) for name, score in scores.items()}
        values = {name: None if math.isnan(v) else round(v, 6) for name, v in values.items()}
        error = {k: values.pop(f"denoise {k}") for k in ("error", "gap") if f"denoise {k}" in values}
        rows.append({"item": item.name, "direction": direction, "candidate": j,
                     "input": str(item.path) if direction == IMAGE else item.captions[0],
                     "caption": talk.captions[b][j], "picture": picture,
                     "seed": args.seed, "likelihood": values["likelihood"], **error, "cut": cut[j],
                     "scores": values})
    return rows


def converse(args, direction, cycle, captioner, generator, judges, ready, agree):
    """The Talk of some items under --scorer. Its columns: the likenesses of the full cycle, `denoise`, and for items
    to agree on `NAME again`, the full cycle under another seed. Nan where an item was not scored that way."""
    import torch
    values, names = [v for _, v in ready], [x.name for x, _ in ready]
    said = {"way": args.way} if direction == IMAGE else None
    draw = {"steps": args.steps, "guidance": args.guidance, "batch": args.batch}
    whole = cycle.image_text_image if direction == IMAGE else cycle.text_image_text
    if args.scorer != "denoise":
        talk = whole(captioner, generator, values, args.n, judges.pairs, args.seed, names, said, draw)
    else:
        if direction == IMAGE:
            captions, likelihood = captioner.speak(values, args.n, seed=args.seed, items=names, **said)
            found = [cycle.score(generator, v[None], c, args.draws, args.budget, args.seed, k, batch=args.batch)
                     for v, c, k in zip(values, captions, names)]
            best = [c[int(f.score.argmax())] for c, f in zip(captions, found)]
            pictures = [None] * len(best)
            if args.steps:
                pictures = generator.draw(best, names, args.seed, **draw)[:, None].expand(-1, args.n, -1, -1, -1)
        else:
            pictures = generator.draw([v for v in values for _ in range(args.n)], seed=args.seed,
                                      items=[(k, j) for k in names for j in range(args.n)], **draw)
            pictures = pictures.unflatten(0, (len(values), args.n))
            found = [cycle.score(generator, p, [v], args.draws, args.budget, args.seed, k, batch=args.batch)
                     for v, p, k in zip(values, pictures, names)]
            captions, likelihood = [[v] * args.n for v in values], torch.full((len(values), args.n), torch.nan)
        talk = cycle.Talk(captions, pictures, likelihood, {
            name: torch.stack([getattr(f, of) for f in found])
            for name, of in (("denoise", "score"), ("denoise error", "error"), ("denoise gap", "gap"))})
    nan = torch.full((len(values), args.n), torch.nan, dtype=torch.float64)
    for again in (False, True):
        if not any(agree) or (args.scorer == "full" if not again else direction == TEXT):
            continue                                                    # another seed draws other pictures of a text
        some, seed = [i for i, a in enumerate(agree) if a], args.seed + again * 7919
        steps, pipe = draw if args.scorer == "full" else draw | {"steps": 50}, getattr(generator, "pipe", None)
        if args.scorer == "few":                                        # the checkpoint's own for a while
            kept = pipe.scheduler, pipe.vae
            pipe.scheduler, pipe.vae = generator.scheduler, generator.vae
        if direction == TEXT:
            found = whole(captioner, generator, [values[i] for i in some], args.n, judges.pairs, seed,
                          [names[i] for i in some], said, steps).scores
        else:
            texts = list(dict.fromkeys((i, c) for i in some for c in talk.captions[i]))
            drawn = generator.draw([c for _, c in texts], [names[i] for i, _ in texts], seed, **steps)
            echoes = [drawn[[texts.index((i, c)) for c in talk.captions[i]]] for i in some]
            found = {name: [torch.as_tensor(f(echo, values[i][None])).double() for i, echo in zip(some, echoes)]
                     for name, f in judges.pairs.items()}
        if args.scorer == "few":
            pipe.scheduler, pipe.vae = kept
        for name, rows in found.items():
            column = talk.scores.setdefault(f"{name} {'again' if again else 'full'}", nan.clone())
            for i, row in zip(some, rows):
                column[i] = row
    return talk


def agreement(groups, items, metrics):
    """Lines: how each score agrees with the full cycle's first likeness on the items scored both ways: the same chosen
    caption, or picture of a sentence, Kendall's tau, of captions the CIDEr gain beside its own. `again`, the full cycle
    under another seed, is the ceiling of scores that share no noise with it; --scorer few starts from the same."""
    import numpy as np
    from scipy.stats import kendalltau
    columns = list(dict.fromkeys(k for v in groups.values() for k in v[0]["scores"]))
    other = next((k for k in columns if k.endswith((" again", " full"))), None)
    if other is None:
        return ["--agree: no item was scored by the full cycle, which needs a likeness"
                + " (and of sentences --scorer denoise or few)"]
    chosen = "caption" if next(iter(groups.values()))[0]["direction"] == IMAGE else "candidate"
    full = other.removesuffix(" again")
    full += " full" * (f"{full} full" in columns)
    groups = {k: v for k, v in groups.items() if v[0]["scores"].get(other) is not None}
    references = {x.name: x.captions for x in items if len(x.captions) > 1}
    gain = {}
    if chosen == "caption" and len(references) > 1 and set(groups) <= set(references):
        df = metrics.document_frequency(list(references.values()))
        quality = [100 * metrics.cider([r["caption"] for r in v], [references[k]] * len(v), df)
                   for k, v in groups.items()]
        gain = {c: metrics.choices(quality, [[value(r, c) for r in v] for v in groups.values()])["gain"]
                for c in columns}
    lines = [f"agreement with {full} on {len(groups)} items:"]
    for name in columns:
        if name == full or name.endswith(" full"):
            continue
        a, b = ([[value(r, c) for r in v] for v in groups.values()] for c in (name, full))
        top = np.mean([v[np.argmax(x)][chosen] == v[np.argmax(y)][chosen]
                       for x, y, v in zip(a, b, groups.values())])
        tau = np.nanmean([kendalltau(x, y).statistic for x, y in zip(a, b) if len(set(x)) > 1 < len(set(y))])
        lines.append(f"  {name:16s} same first choice {top:.2f}   Kendall tau {tau:+.2f}"
                     + (f"   CIDEr gain {gain[name]:+.1f} of {gain[full]:+.1f}, {gain[name] / gain[full]:.2f}"
                        if gain and gain[full] > 0 else ""))
    return lines


def value(row, name):
    """A row's score as a number to rank by: a missing one comes last."""
    found = row["scores"].get(name)
    return -math.inf if found is None else found


def ranked(rows):
    """Rows with their rank (0 = best) under each likeness; equal scores keep the candidates' order."""
    for name in rows[0]["scores"]:
        for place, row in enumerate(sorted(rows, key=lambda r: -value(r, name))):
            row.setdefault("rank", {})[name] = place
    return rows


def worth(groups, items, names, metrics):
    """With references: CIDEr x 100 of a random candidate, of the one each score chooses, of the best; intervals."""
    references = {x.name: x.captions for x in items if len(x.captions) > 1}
    groups = {k: v for k, v in groups.items() if k in references}
    if len(groups) < 2:
        return []
    df = metrics.document_frequency(list(references.values()))
    quality = [100 * metrics.cider([r["caption"] for r in rows], [references[k]] * len(rows), df)
               for k, rows in groups.items()]
    lines = []
    for name in names:
        if any(value(rows[0], name) == -math.inf for rows in groups.values()):
            continue                                            # scored on some items only: see `agreement`
        c = metrics.choices(quality, [[value(r, name) for r in rows] for rows in groups.values()])
        low, high = c["interval"]
        lines.append(f"CIDEr of {c['items']} items by {name:11s} mean {c['mean']:6.1f}   chosen {c['chosen']:6.1f}   "
                     f"oracle {c['oracle']:6.1f}   gain {c['gain']:+6.1f} [{low:+.1f}, {high:+.1f}]")
    return lines


# ---------------------------------------------------------------- words and pairs
def explain(args, best, cycle, data):
    """Puts `words` into the best row of each item: [word, contribution, standard error] of its caption and its picture
    (of a sentence: the picture chosen for it). Kept in words.jsonl, so that a restart goes on."""
    from tqdm import tqdm
    path, known = args.out / "words.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.endswith("}"):
            row = json.loads(line)
            known[row["item"], row["caption"], row["picture"]] = row["words"]
    todo = [r for r in best if (r["item"], r["caption"], r["picture"]) not in known]
    generator = cycle.Generator.load(args.generator, args.device, args.dtype) if todo else None
    if args.ckpt and todo:
        cycle.adopt(args.ckpt, None, generator)
    if todo and not getattr(generator, "denoises", False):
        raise ValueError(f"--words: {args.generator} is no Stable Diffusion 1.x or 2.x, whose loss is known here")
    for r in tqdm(todo, desc="words", disable=not todo):
        image = r["direction"] == IMAGE
        said = r["caption"] if image else r["input"]
        found = cycle.words(generator, data.open_image(r["input"] if image else args.out / r["picture"]), said,
                            2 * args.draws, args.seed, r["item"], batch=args.batch)
        known[r["item"], r["caption"], r["picture"]] = [[w, round(v, 6), round(e, 6)] for w, v, e in found]
        append(path, [{"item": r["item"], "caption": r["caption"], "picture": r["picture"],
                       "words": known[r["item"], r["caption"], r["picture"]]}])
    for r in best:
        r["words"] = known[r["item"], r["caption"], r["picture"]]


def preferences(args, groups, by):
    """Writes --pairs and returns what there is to say. Of each item, every two different candidates whose scores lie
    more than --margin apart; nearer ones are ties, counted and left out, as are candidates without a score. The order
    of candidates changes nothing.

    trl: rows {images, prompt, chosen, rejected} as TRL's DPOTrainer takes them for vision-language models.
    diffusion: columns caption, jpg_0, jpg_1 (encoded pictures), label_0, label_1, as Diffusion-DPO reads Pick-a-Pic.
    """
    trl = args.pairs == "trl"
    if trl != (next(iter(groups.values()))[0]["direction"] == IMAGE):
        raise ValueError(f"--pairs {args.pairs}: trl compares captions of a picture, diffusion pictures of a sentence")
    rows, ties, equal, without = [], 0, 0, 0
    for candidates in groups.values():
        scored = [r for r in candidates if value(r, by) > -math.inf]
        without, candidates = without + len(candidates) - len(scored), scored
        different = {r["caption"] if trl else r["picture"]: r for r in reversed(candidates)}
        equal += len(candidates) - len(different)
        for a, b in itertools.combinations(sorted(different, key=lambda k: (-value(different[k], by), k)), 2):
            a, b = different[a], different[b]
            gap = value(a, by) - value(b, by)
            if gap <= args.margin:
                ties += 1
                continue
            if trl:
                say = [[{"role": "assistant", "content": [{"type": "text", "text": r["caption"]}]}] for r in (a, b)]
                ask = [{"type": "image"}, {"type": "text", "text": "Describe this picture."}]
                rows.append({"images": [str(Path(a["input"]).resolve())], "prompt": [{"role": "user", "content": ask}],
                             "chosen": say[0], "rejected": say[1], "margin": gap})
            else:
                first, second = ((args.out / r["picture"]).read_bytes() for r in (a, b))
                rows.append({"caption": a["input"], "jpg_0": first, "jpg_1": second, "label_0": 1.0, "label_1": 0.0,
                             "margin": gap})
    path = args.out / ("pairs.jsonl" if trl else "pairs.parquet")
    if trl:
        finish(path, rows)
    elif rows:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as e:
            raise ValueError("--pairs diffusion writes parquet: pip install pyarrow") from e
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return (f"{len(rows)} preference pairs by {by} in {path}; {ties} ties (at most {args.margin:g} apart) left out, "
            f"{equal} candidates equal to another one" + f", {without} without a score" * (without > 0))


# ---------------------------------------------------------------- the road
def speakers(args, cycle):
    """Captioner and generator, with the trained weights of --ckpt, fit for --scorer."""
    captioner = cycle.Captioner.load(args.captioner, args.device, args.dtype)
    generator = cycle.Generator.load(args.generator, args.device, args.dtype)
    if args.ckpt:
        cycle.adopt(args.ckpt, captioner, generator)
    if args.scorer == "denoise" and not getattr(generator, "denoises", False):
        raise ValueError(f"--scorer denoise: {args.generator} is no Stable Diffusion 1.x or 2.x: say --scorer full")
    if args.scorer == "few" and not hasattr(generator, "pipe"):
        raise ValueError(f"--scorer few: {args.generator} is no pipeline of diffusers: say --scorer full")
    if args.scorer == "few":
        cycle.few_steps(generator, args.decoder)
    return captioner, generator


def judges_for(args, direction, wanted, cycle, data, metrics, rank):
    """The likenesses that are to be had. What is missing of the default ones costs a line, what was asked for by name
    is refused."""
    references = [x.captions for x in data.read(args.data, args.split)] if args.data else []
    judges = metrics.likenesses(wanted, "image" if direction == IMAGE else "text", args.judges,
                                cycle.settle(args.device)[0], references, args.glove, cycle.resolve)
    for name, reason in judges.absent.items():
        if name in (args.likeness or ()) or name == args.by:
            raise ValueError(f"--{'by' if name == args.by else 'likeness'} {name}: {reason}")
        if rank == 0:
            print(f"rerank.py: no likeness {name}: {reason}", file=sys.stderr)
    if not judges.pairs and args.scorer != "denoise":
        raise ValueError("no likeness is left to rank by; of images, --likeness pixel needs nothing")
    known = [*judges.pairs, "likelihood"] + ["clipscore"] * bool(judges.clipscore) + ["denoise"] * (
        args.scorer == "denoise")
    if args.by and args.by not in known:
        raise ValueError(f"--by {args.by}: this run has {', '.join(known)}")
    return judges


def main(args):
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    import cycle
    import data
    import metrics
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))          # the others wait for the slowest
    args.split = args.split or (data.evaluated(args.data) if args.data not in (None, "miniature") else "test")
    direction, items = gather(args, data)
    decide(args, direction)
    cycle.one_thread(args.captioner)
    args.judges = args.judges or cycle.judges_of(args.captioner, args.generator)
    if args.out is None and place(args, direction).name != "rerank" and rank == 0:
        print(f"rerank.py: out/rerank holds a run of other settings; this one is in {args.out}", file=sys.stderr)
    if world > 1:
        dist.barrier()                                          # nothing is written before all know where
    settings, done = resume(args, direction)
    path, mine = args.out / "candidates.jsonl", [x for x in items[rank::world] if x.name not in done]
    wanted = args.likeness or DEFAULTS[direction]
    if mine:                                                    # models before judges: the real cause comes first
        captioner, generator = speakers(args, cycle)
        judges = judges_for(args, direction, wanted, cycle, data, metrics, rank)
        cycle.record(args.out)

    # the conversations, some items at a time; what is finished is on disk
    skipped, chunk, both = [], max(1, args.batch // args.n), {x.name for x in items[:args.agree]}
    bar = tqdm(total=len(mine), desc=f"{direction}, N = {args.n}", disable=not mine or rank > 0)
    for start in range(0, len(mine), chunk):
        ready = []
        for item in mine[start:start + chunk]:
            try:
                ready.append((item, data.open_image(item.path) if direction == IMAGE else item.captions[0]))
            except ValueError as e:
                skipped.append(str(e))
        if ready:
            agree = [x.name in both for x, _ in ready]
            talk = converse(args, direction, cycle, captioner, generator, judges, ready, agree)
            scores = dict(talk.scores)
            if judges.clipscore:                                # the baseline without a cycle: candidate against input
                scores["clipscore"] = torch.stack([torch.as_tensor(
                    judges.clipscore(v[None], row) if direction == IMAGE else judges.clipscore(pictures, [v]))
                    for (_, v), row, pictures in zip(ready, talk.captions, talk.images)])
            scores["likelihood"] = talk.likelihood
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
            long = getattr(generator, "too_long", lambda captions: [False] * len(captions))
            for b, (item, v) in enumerate(ready):
                cut = long(talk.captions[b] if direction == IMAGE else [v] * args.n)
                append(path, rows_of(item, b, talk, args, direction, scores, cut))
        bar.update(len(mine[start:start + chunk]))
    bar.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    for reason in skipped:
        print(f"rerank.py: skipped {reason}", file=sys.stderr)
    if rank > 0:
        return 0

    # all of it once more, ranked and in the order of the inputs
    done = resume(args, direction)[1]
    groups = {x.name: ranked(done[x.name]) for x in items if x.name in done}
    if not groups:
        raise ValueError(f"none of the {len(items)} pictures could be read")
    names = list(dict.fromkeys(k for rows in groups.values() for k in rows[0]["scores"]))
    by = args.by or ("denoise" if args.scorer == "denoise" else next(k for k in wanted if k in names))
    if by not in names:
        raise ValueError(f"--by {by}: this run has {', '.join(names)}")
    finish(path, [r for k in dict.fromkeys([*groups, *done]) for r in ranked(done[k])])
    ordered = {k: sorted(rows, key=lambda r: -value(r, by)) for k, rows in groups.items()}
    if args.words:
        explain(args, [rows[0] for rows in ordered.values()], cycle, data)
    best = {k: {"caption": v[0]["caption"], "picture": v[0]["picture"], "by": by, "score": v[0]["scores"].get(by)}
            for k, v in ordered.items()}
    (args.out / "best.json").write_text(json.dumps(best, indent=2, ensure_ascii=False) + "\n")
    shown = [(x.name, x.path if direction == IMAGE else None, x.captions[0] if x.captions else "", ordered[x.name])
             for x in items if x.name in ordered]
    note = f"{args.captioner} and {args.generator}, N = {args.n}, {args.steps} steps, seed {args.seed}, ranked by {by}"
    sheet(shown, by, args.out / "sheet.png")
    page(shown, by, direction, note, args.out / "index.html")
    for item, _, words, rows in shown[:20]:
        print(f"\n{item if direction == IMAGE else words}")
        for at, r in enumerate(rows, 1):
            print(f"  {at:2d}  {by} {value(r, by):7.3f}  log p {value(r, 'likelihood'):7.2f}  "
                  + r["caption"] + "".join(f"\n        {w:12s} {v:+.4f} +- {e:.4f}" for w, v, e in r.get("words", ())))
    print()
    for line in worth(groups, items, names, metrics) if direction == IMAGE else ():
        print(line)
    for line in agreement(groups, items, metrics) if args.agree else ():
        print(line)
    if args.pairs:
        print(preferences(args, groups, by))
    cut = sum(r.get("cut", False) for rows in groups.values() for r in rows)
    if cut:
        print(f"{cut} of {len(groups) * args.n} captions are longer than the text encoder of {args.generator} reads: "
              "they were drawn and scored without their ends (`cut` in candidates.jsonl)")
    print(f"{len(groups)} of {len(items)} inputs done, {len(skipped)} skipped; look at {args.out / 'index.html'} "
          f"and {args.out / 'sheet.png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        sys.exit(print(f"rerank.py: {' '.join(str(e).split())}", file=sys.stderr) or 2)
