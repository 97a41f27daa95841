"""What goes in: pictures, sentences, a set; or captions and pictures that exist already.

    found = from_arguments(["photo.jpg", "holiday/"])
    found = given_captions("captions.json")
    found.items[0].path, found.given["photo.jpg"]

Copy this file with annotations.py, best_of_n.py, cycle.py, data.py, losses.py, pictures.py and
records.py.
"""
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import annotations
import data
import records
from best_of_n import IMAGE, TEXT
from records import the


@dataclass
class Inputs:
    """items: of data.py, a sentence without a path; given: {item's name: its candidates, captions
    or paths of pictures}; notes: lines on what was left out; whole: the items of the set that they
    are of, whose captions weigh CIDEr's n-grams."""
    direction: str
    items: list
    given: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    whole: list = field(default_factory=list)

    def input(self, item):
        """What rows of candidates.jsonl name as an item's input: its path, or its text."""
        return str(item.path) if item.path else item.captions[0]

    def pictures(self, item):
        """The pictures that exist of an item, as rows name them."""
        given = self.given.get(item.name, ())
        return [str(path.resolve()) for path in given if isinstance(path, Path)]

    def mark(self, item):
        """Another one where its picture, or any of its candidates, is another; None where one of
        them is not there to be looked at."""
        captions = [x for x in self.given.get(item.name, ()) if isinstance(x, str)]
        files = [str(item.path)] if item.path else []
        seen = [records.fingerprint(file) for file in files + self.pictures(item)]
        return records.digest([captions, seen]) if all(seen) else None


# ---------------------------------------------------------------- what is to be described, or drawn
def from_set(root, split, turn, limit):
    """The items of a set."""
    if not root:
        raise ValueError("nothing to rerank: give pictures, folders or sentences, or --data with a "
                         "set's folder")
    whole = data.read(root, split)
    items = whole[:limit or (4 if root == "miniature" else None)]
    if turn != "text":
        return Inputs(IMAGE, items, whole=whole)
    if not all(item.captions for item in items):
        raise ValueError(f"--turn text: {root} has pictures without captions")
    return Inputs(TEXT, [replace(item, path=None) for item in items], whole=whole)


def from_arguments(arguments, limit=None):
    """Pictures, or sentences. Refuses both at once, and what looks like a path and is neither."""
    pictures, sentences = [], []
    for given in arguments:
        path = Path(given)
        kind = path.suffix.lower()
        if os.path.isdir(given):                 # of a long sentence, Path.is_dir raises
            for item in data.read(path):
                pictures.append(data.Item(item.path.as_posix(), item.path, item.captions))
        elif kind in data.SUFFIXES:
            if not os.path.exists(given):
                raise ValueError(f"{given}: no such picture")
            pictures.append(data.Item(path.as_posix(), path))
        elif kind in (".txt", ".json"):
            sentences += sentences_in(given)
        elif looks_like_a_path(given):
            raise ValueError(f"{given}: no picture ({' '.join(sorted(data.SUFFIXES))}), folder, "
                             ".txt or .json that is there; a sentence that looks like a path goes "
                             "into a .txt")
        else:
            sentences.append(given)
    if pictures and sentences:
        raise ValueError(f"pictures and sentences in one run (such as {pictures[0].name!r} and "
                         f"{sentences[0]!r}): give one kind")
    sentences = [records.one_line(sentence) for sentence in sentences]
    if "" in sentences:
        raise ValueError("an empty sentence can't be drawn")
    found = pictures + [data.Item(sentence, None, [sentence]) for sentence in sentences]
    unique = list({item.name: item for item in found}.values())
    out = Inputs(IMAGE if pictures else TEXT, unique[:limit])
    if len(unique) < len(found):
        (name, _), = Counter([item.name for item in found]).most_common(1)
        out.notes.append(f"{len(found) - len(unique)} of {len(found)} inputs repeat another one, "
                         f"such as {name!r}: each is done once")
    return out


def looks_like_a_path(text):
    """Whether it can't be a sentence: it exists, begins or ends as paths do, ends in a dot and some
    letters, or has a slash or a wildcard and no blank."""
    if os.path.exists(text) or text.startswith(("/", "./", "../", "~")):
        return True
    if re.search(r"\.[A-Za-z]\w{1,4}$|[/\\]$", text):
        return True
    return " " not in text and re.search(r"[/\\*?\[]", text) is not None


def sentences_in(path):
    """Of a .txt, one a line; of a .json, a list."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file of sentences")
    lines = records.read_lines(path) if path.lower().endswith(".txt") else records.load_json(path)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{path}: expected a JSON list of strings, or a .txt, one a line")
    return [records.one_line(line, path) for line in lines if line.strip()]


# ---------------------------------------------------------------- what exists already
def given_captions(path, limit=None, items=()):
    """Pictures with captions that exist: of any form of annotations.py, or of a folder of pictures
    with .txt files beside them, one caption a line.

    A picture is one of `items`, by its name or path, if there are any; else a file, beside `path`
    or from here. Raises ValueError for other files.
    """
    out = Inputs(IMAGE, [], whole=list(items))
    if os.path.isdir(path):
        rows = [(replace(item, captions=[]), item.captions) for item in data.read(path)]
    else:
        if not os.path.exists(path):
            raise ValueError(f"{path}: no such file or folder")
        known = {item.name: item for item in items}
        known |= {item.path.as_posix(): item for item in items}
        rows = [(item_of(row, path, known), row.captions) for row in annotations.rows_in(path)]
    found, captions, empty, absent = {}, {}, 0, 0
    for item, said in rows:
        if item is None:
            absent += 1
            continue
        some = [caption for caption in said if caption]
        empty += len(said) - len(some)
        found[item.name] = item
        captions.setdefault(item.name, []).extend(some)
    bare = sum(not said for said in captions.values())
    for count, what in ((absent, "pictures are not in the set"), (empty, "captions are empty"),
                        (bare, "pictures have no captions")):
        if count:
            out.notes.append(f"{path}: {count} {what}; they are left out")
    out.items = [item for item in found.values() if captions[item.name]][:limit]
    out.given = {item.name: captions[item.name] for item in out.items}
    if not out.items:
        of = f" of the set, such as {items[0].name!r}" if items else ""
        raise ValueError(f"{path}: no captions of any picture{of}; in a folder they are a .txt "
                         "beside each picture, one a line")
    return out


def given_pictures(path, limit=None):
    """Prompts with pictures that exist: of JSON {prompt: [pictures]}, or of a folder with a folder
    of pictures for each prompt, which is its name, or in its prompt.txt. ValueError for others."""
    table = {}
    if os.path.isdir(path):
        for folder in sorted(Path(path).iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                says = folder / "prompt.txt"
                prompt = " ".join(records.read_lines(says)) if says.exists() else folder.name
                table.setdefault(prompt, []).extend(item.path for item in data.read(folder))
    else:
        found = records.load_json(path)
        for prompt in found if isinstance(found, dict) else ():
            files = table.setdefault(records.one_line(prompt, path), [])
            for name in the(found, prompt, list, path):
                files.append(picture_file(name, path))
    if not table or "" in table or not all(table.values()):
        raise ValueError(f"{path}: expected a folder of pictures for each prompt, or JSON "
                         "{prompt: [pictures]}, and no empty prompt")
    out = Inputs(TEXT, [data.Item(prompt, None, [prompt]) for prompt in table][:limit])
    out.given = {item.name: table[item.name] for item in out.items}
    return out


def item_of(row, path, known):
    """The item of a picture that a row of a file names: one of those known; None if it isn't."""
    name = row.file or row.name
    if not known and row.name.isdigit() and not row.file:
        raise ValueError(f"{row.where}: {row.name} is no picture's file: --data names its set")
    if not known:
        return data.Item(name, picture_file(name, path))
    beside = Path(path).parent / name
    names = (row.name, name, Path(name).as_posix(), beside.as_posix())
    return next((known[x] for x in names if x in known), None)


def picture_file(name, path):
    """The picture that a file at `path` names: beside it, or from here."""
    if not isinstance(name, str):
        raise ValueError(f"{path}: expected names of pictures, not {ascii(name)[:60]}")
    beside = Path(path).parent / name
    if os.path.exists(name) and not beside.exists():
        return data.inside(Path(name), Path(), path)
    return data.inside(beside, Path(path).parent, path)


# ---------------------------------------------------------------- results, references, pictures
def matched(results, source, notes, folder=None):
    """(items, [captions of each of the files `results`]) of the images that are in all of them
    and have references in source. folder: of their pictures."""
    said = [annotations.results_in(path) for path in results]
    references = annotations.by_key(source)
    shared = set(references).intersection(*said)
    names = [x for x in said[0] if x in shared]
    if not names:
        one, other = next(iter(said[0]), None), next(iter(references), None)
        raise ValueError(f"no image of {' and '.join(map(str, results))} is in {source} (such as "
                         f"{one!r} and {other!r})")
    for path, file in zip([*results, source], [*said, references]):
        if len(file) > len(names):
            notes.append(f"{len(file) - len(names)} of the {len(file)} images of {path} are left "
                         "out: not every file has captions of them")
    items = [data.Item(x, None, references[x].captions, references[x].domain) for x in names]
    if folder:
        paths = pictures(folder, {x: said[0][x] for x in names}, references, notes)
        for item in items:
            item.path = paths[item.name]
    captions = []
    for file in said:
        captions.append([file[x].captions[0] for x in names])
    return items, captions


def pictured(path, source, folder, notes):
    """(items, captions) of a file of results whose pictures lie in a folder; source: None, or
    references, which may list their files."""
    said = annotations.results_in(path)
    references = annotations.by_key(source) if source else {}
    paths = pictures(folder, said, references, notes)
    return [data.Item(x, paths[x]) for x in said], [row.captions[0] for row in said.values()]


def pictures(folder, rows, references, notes):
    """{image: path} of the images of rows {image: Row}, found in a folder by the file that the row
    or the references name, else by the image's name, else by number; how many by which is noted.
    Raises ValueError where an image has no picture, or several."""
    by_path, by_name, by_number = {}, {}, {}
    for item in data.folder(Path(folder)):
        by_path[item.name] = [item.path]
        by_name.setdefault(item.path.name, []).append(item.path)
        by_number.setdefault(annotations.key(item.name), []).append(item.path)
    out, ways, lost = {}, Counter(), []
    for image, row in rows.items():
        file = row.file or (references[image].file if image in references else None)
        name = file or row.name
        way = "`images`" if file else "name"
        found = by_path.get(name) or by_name.get(Path(name).name, [])
        if not found and not file:                              # a guess: 100 may be 0000.png
            way, found = "number", by_number.get(image, [])
        if len(found) == 1:
            out[image] = found[0]
            ways[way] += 1
        else:
            lost.append(f"{name} ({len(found)})")
    if lost:
        raise ValueError(f"{len(lost)} of {len(rows)} images have no picture of their own in "
                         f"{folder}, such as {lost[0]}: name its files in the references' images")
    told = ", ".join(f"{count} by {way}" for way, count in ways.items())
    guess = "; numbers are a guess, --refs with `images` is none" if ways["number"] else ""
    notes.append(f"pictures of {folder} found: {told}{guess}")
    return out
