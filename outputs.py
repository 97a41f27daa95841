"""What comes out of a run: words, candidates.csv, winners/, preference pairs, best.json, sheet and
page, and what the choice is worth.

    write_table(ordered, "both", Path("out/rerank/candidates.csv"))
    write_winners(ordered, "both", Path("out/rerank"))
    datasets.load_dataset("imagefolder", data_dir="out/rerank/winners")       # image, text

ordered: {item: its rows of candidates.jsonl, best first}. Copy this file with annotations.py,
best_of_n.py, cycle.py, data.py, losses.py, metrics.py, page.py, pictures.py and records.py.
"""
import csv
import io
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cycle
import data
import losses
import metrics
import page
import records
from best_of_n import FEW, IMAGE, TEXT, best_first, rankings, score_names, score_of, with_reason

PRINTED = 6                                      # items whose candidates are printed
# words that datasets takes, in the small letters of a file's name, for the split the file is in
SPLITS = r"(?<![^\W\d_])(train(ing)?|valid(ation)?|val|dev|test(ing)?|eval(uation)?)(?![^\W\d_])"


# ---------------------------------------------------------------- words
def explain(rows, whole, generator, draws, seed, batch, out):
    """Puts `words` into rows: [word, contribution, standard error] of caption and picture, or of a
    sentence and the picture chosen for it; and into candidates.jsonl, which holds the whole."""
    if not getattr(generator, "denoises", False):
        raise ValueError("--words: the generator is no Stable Diffusion 1.x or 2.x, whose loss is "
                         "known here")
    for row in tqdm(rows, desc="words"):
        picture, text = row["input"], row["caption"]
        if row["direction"] == TEXT:
            picture, text = out / row["picture"], row["input"]
        timesteps, noise = cycle.noises(generator, draws, seed, row["item"])
        image = data.open_image(picture)
        words = losses.words(generator, image, text, timesteps, noise, batch)
        row["words"] = [[word, round(value, 6), round(error, 6)] for word, value, error in words]
        group = [other for other in whole if other["item"] == row["item"]]
        records.append_rows(out / "candidates.jsonl", group)         # it survives a kill
    records.write_rows(out / "candidates.jsonl", whole)


# ---------------------------------------------------------------- for a spreadsheet
def write_table(ordered, by, path):
    """candidates.csv: a line a candidate, best first. ordered: the rows of with_reason.

    In UTF-8 with its mark, which spreadsheets need. They take a cell that begins with = + - @ for a
    formula: such a text gets a ' before it; a number does not.
    """
    names = ("item", "input", "caption", "picture")
    columns = ["rank", "tie", *names, *score_names(ordered), f"error of {by}", f"gap of {by}"]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for rows in ordered.values():
        for place, row in enumerate(rows, 1):
            cells = {name: plain(row[name] or "") for name in names} | row["scores"]
            cells["rank"] = place
            cells["tie"] = "tie" if row.get("tie") else ""
            cells[f"error of {by}"] = row.get("errors", {}).get(by)
            cells[f"gap of {by}"] = row.get("gaps", {}).get(by)
            table.writerow(cells)
    records.write_text(path, "\ufeff" + records.visible(text.getvalue()))


def plain(text):
    """A text that no spreadsheet takes for a formula."""
    return "'" + text if text.lstrip().startswith(tuple("=+-@")) else text


# ---------------------------------------------------------------- the winners, by readable names
def write_winners(ordered, by, out):
    """winners/: a picture each item, its caption as a .txt beside it, and metadata.jsonl, which
    `datasets` reads as an imagefolder. A described picture keeps its name, one of a sentence is
    named after it. Returns a line on how many there are, are left out, and replace earlier ones."""
    folder = out / "winners"
    table = folder / "metadata.jsonl"
    before, texts, used, changed = {}, {}, set(), 0
    for row in records.read_rows(table):         # captions as they are by now
        path = folder / Path(records.the(row, "file_name", str, table)).name
        beside = path.with_suffix(".txt")
        before[path.name] = beside.read_bytes() if beside.exists() else None
    with records.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for best, *_ in ordered.values():
        source, text = best["picture"] and out / best["picture"], best["input"]
        if best["direction"] == IMAGE:
            source, text = Path(best["input"]), best["caption"]
        if best["scores"].get(by) is None or not source.exists():
            continue
        stem = free_name(source.stem if best["direction"] == IMAGE else text, used)
        name = stem + source.suffix.lower()
        with records.writing(folder / name):
            shutil.copyfile(source, folder / name)
        said = records.visible(text) + "\n"
        changed += before.get(name) not in (None, said.encode(errors="backslashreplace"))
        records.write_text(folder / f"{stem}.txt", said)
        texts[name] = text
    gone = before.keys() - texts.keys()
    for name in gone:
        (folder / name).unlink(missing_ok=True)
        (folder / name).with_suffix(".txt").unlink(missing_ok=True)
    records.write_rows(table, [{"file_name": name, "text": text} for name, text in texts.items()])
    line = f"{len(texts)} winners are in {folder}"
    if len(texts) < len(ordered):
        line += f"; {len(ordered) - len(texts)} items have none"
    if changed or gone:
        line += (f"; of those that were there, {changed} had another caption, and {len(gone)} are "
                 "removed")
    return line


def free_name(text, used):
    """A file's name without its ending, readable and not in `used`, which it then is."""
    name = re.sub(r"[\s/\\:*?\"<>|\x00-\x1f]+", "-", text)[:60].strip("-. ") or "winner"
    name = re.sub(SPLITS, lambda word: word[0].capitalize(), name)
    free, number = name, 1
    while free.casefold() in used:               # also where capitals are no difference
        number += 1
        free = f"{name}-{number}"
    used.add(free.casefold())
    return free


# ---------------------------------------------------------------- pairs of preferences
def write_pairs(groups, by, margin, folder):
    """Writes preference pairs into `folder` and returns the line to say about them. A pair is every
    two different candidates of an item whose scores `by` lie more than `margin` apart; nearer ones
    are ties. The order of candidates changes nothing. groups: {item: rows of candidates.jsonl}.

    Of captions: pairs.jsonl, rows {images, prompt, chosen, rejected} as TRL's DPOTrainer takes them
    for vision-language models. Of pictures: pairs.parquet, columns caption, jpg_0, jpg_1 (encoded
    pictures), label_0, label_1, as Diffusion-DPO reads Pick-a-Pic.
    """
    captions = next(iter(groups.values()))[0]["direction"] == IMAGE
    content = "caption" if captions else "picture"
    rows, ties, equal, without = [], 0, 0, 0
    for candidates in groups.values():
        scored = [row for row in candidates if row["scores"].get(by) is not None]
        without += len(candidates) - len(scored)
        different = {row[content]: row for row in reversed(scored)}
        equal += len(scored) - len(different)
        order = best_first([different[key] for key in sorted(different)], by)
        for better, worse in itertools.combinations(order, 2):
            gap = better["scores"][by] - worse["scores"][by]
            if gap <= margin:
                ties += 1
                continue
            if captions:
                pair = trl_pair(better, worse)
            else:
                one, other = ((folder / row["picture"]).read_bytes() for row in (better, worse))
                pair = {"caption": better["input"], "jpg_0": one, "jpg_1": other, "label_0": 1.0,
                        "label_1": 0.0}
            rows.append(pair | {"margin": gap})
    path = folder / ("pairs.jsonl" if captions else "pairs.parquet")
    if captions:
        records.write_rows(path, rows)
    elif rows:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as e:
            raise ValueError("--pairs diffusion writes parquet: pip install pyarrow") from e
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    line = (f"{len(rows)} preference pairs by {by} in {path}; {ties} ties (at most {margin:g} "
            f"apart) left out, {equal} candidates equal to another one")
    return f"{line}, {without} without a score" if without else line


def trl_pair(better, worse):
    question = [{"type": "image"}, {"type": "text", "text": "Describe this picture."}]
    answers = []
    for row in (better, worse):
        content = [{"type": "text", "text": row["caption"]}]
        answers.append([{"role": "assistant", "content": content}])
    return {"images": [str(Path(better["input"]).resolve())],
            "prompt": [{"role": "user", "content": question}],
            "chosen": answers[0], "rejected": answers[1]}


# ---------------------------------------------------------------- what a person sees
def show(found, ordered, by, note, warning, undrawn, out):
    """Writes all files of the ranked groups, {item: rows, best first}; prints the first items'
    candidates, and how many winners there are. found: of inputs.py; the others: of page.py."""
    picture = found.direction == IMAGE
    ordered = {name: with_reason(rows, by) for name, rows in ordered.items()}
    shown, best = [], {}
    for item in found.items:
        if item.name in ordered:
            rows = ordered[item.name]
            shown.append((item.name, item.path, "" if picture else item.captions[0], rows))
            first = rows[0]
            if first["scores"].get(by) is not None:
                best[item.name] = {
                    "caption": first["caption"],
                    "picture": first["picture"],
                    "by": by,
                    "score": first["scores"][by],
                    "why": first["why"],
                }
    records.write_json(out / "best.json", best)
    write_table(ordered, by, out / "candidates.csv")
    more = {"warning": warning, "undrawn": undrawn}
    page.sheet(shown, by, out / "sheet.png", **more)
    page.index(shown, by, found.direction, note, out / "index.html", **more)
    for name, _, text, rows in shown[:PRINTED]:
        print(f"\n{text or name}: {rows[0]['why']}")
        for place, row in enumerate(rows, 1):
            names = (by, *page.PARTS.get(by, ()))
            scores = [f"{name} {score_of(row, name):8.4f}" for name in names]
            file = "" if picture else f"{row['picture'] or 'not drawn'}  "
            print(f"  {place:2d}  {'  '.join(scores)}  {file}{row['caption']}")
            for word, value, error in row.get("words", ()):
                print(f"        {word:12s} {value:+.4f} +- {error:.4f}")
    if len(shown) > PRINTED:
        print(f"\n... and {len(shown) - PRINTED} more")
    print(f"\n{write_winners(ordered, by, out)}")
    if picture:
        show_worth(ordered, found.items, by, found.whole)
    if warning:
        print(warning)


def show_worth(groups, items, by, whole=()):
    """Of captions with references, prints 100 x CIDEr of a random one, of the one that each score
    chooses, of the best; and whether what `by` gains is more than chance. whole: the items of the
    set, whose captions weigh n-grams, as in evaluate.py; default those of `items`."""
    some = [x for x in items if len(x.captions) > 1 and x.name in groups]
    if len(some) < 2:                            # CIDEr of one is 0 by its definition
        return
    groups = {x.name: groups[x.name] for x in some}
    captions, references = [], []
    for item in some:
        captions += [row["caption"] for row in groups[item.name]]
        references += [item.captions] * len(groups[item.name])
    df = metrics.document_frequency([x.captions for x in whole or items if x.captions])
    ends = np.cumsum([len(rows) for rows in groups.values()])
    quality = np.split(100 * metrics.cider(captions, references, df), ends[:-1])
    notes = []
    for name, ranking in rankings(groups, notes).items():
        found = metrics.choices(quality, ranking)
        low, high = found["interval"]
        print(f"CIDEr of {len(groups)} items by {name:11s} mean {found['mean']:6.1f}   chosen "
              f"{found['chosen']:6.1f}   oracle {found['oracle']:6.1f}   gain "
              f"{found['gain']:+6.1f} [{low:+.1f}, {high:+.1f}]")
        if name == by:
            verdict = "the choice helps" if low > 0 else "the choice harms"
            if low <= 0 <= high or len(groups) < FEW:
                verdict = f"{len(groups)} items do not tell whether the choice helps"
            notes.append(f"By {by}: {verdict} (95 % interval of the gain over a random candidate)")
    for note in notes:
        print(note)


def odd(groups, given, by, generator, absent):
    """Lines on what of the ranked rows is not as it should be. absent: what is said of a winner
    that could have been drawn, and is not."""
    rows = list(itertools.chain(*groups.values()))
    if by == "both" and min(map(len, groups.values())) == 2:
        yield "of two candidates `both` is a vote: it takes three to say how far they lie apart"
    cut = sum(row.get("cut", False) for row in rows)
    if cut:
        yield (f"{cut} of {len(rows)} captions are longer than the text encoder of {generator} "
               "reads: they were drawn and scored without their ends (`cut` in candidates.jsonl)")
    lost = sum("nan" in row for row in rows)
    if lost:
        yield (f"{lost} pictures came out as no numbers and are neither kept nor scored (`nan` in "
               "candidates.jsonl); --dtype float32 may help")
    without = sum(row["scores"].get(by) is None and "nan" not in row for row in rows)
    if without:
        yield f"{without} candidates have no score by {by} and can't win; generator {generator!r}"
    unread = sum(len(given.get(name, rows)) - len(rows) for name, rows in groups.items())
    if unread:
        yield f"{unread} of the given pictures could not be read: they are not ranked"
    undrawn = sum(not (best["picture"] or best.get("nan")) for best, *_ in groups.values())
    if absent and undrawn:
        yield f"{undrawn} winners are {absent}"
