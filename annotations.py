"""Files of captions: results and references in the field's forms, and whose picture is which.

    notes = []                                # what was left out, and how pictures were found
    items, (a, b) = matched(["a.json", "b.json"], "references.json", notes)
    items, (a,) = matched(["a.json"], "references.json", notes, "val2014/")       # with pictures

Forms: COCO's results and annotations, NoCaps, Karpathy's and BLIP's files, {image: caption or
captions}. Items are data.Items: captions (the references), path (of the picture), domain. Copy this
file with data.py, pictures.py and records.py.
"""
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import data
import records
from records import the


# ---------------------------------------------------------------- which image
def key(image):
    """An image by its number where its name is one, as COCO's files' are
    (val2014/COCO_val2014_000000391895.jpg)."""
    digits = re.fullmatch(r"(?:.*/)?(?:COCO_\w+_|coco_)?(\d+)(?:\.\w+)?", str(image))
    return str(int(digits[1])) if digits else str(image)


def keys(images, source):
    """The `key` of each. Raises ValueError where two images have one."""
    first = {}
    for image in images:
        other = first.setdefault(key(image), image)
        if str(other) != str(image):
            raise ValueError(
                f"{source}: {other} and {image} are one image by their number: rename one")
    return [key(image) for image in images]


# ---------------------------------------------------------------- a file
@dataclass
class Captions:
    """A file of captions, by image (its `key`)."""
    texts: dict = field(default_factory=dict)                   # {image: captions}
    domains: dict = field(default_factory=dict)                 # {image: domain}
    names: dict = field(default_factory=dict)                   # {image: as it is written}
    files: dict = field(default_factory=dict)                   # {image: its file, by `images`}


def captions_in(path):
    """The Captions of COCO's results or annotations, NoCaps, Karpathy's and BLIP's files, {image:
    caption or captions}. Raises ValueError for others."""
    found = records.load_json(path)
    out = Captions()
    rows, listed = rows_of(found, path)
    images = keys([name for name, _, _ in rows], path)
    for image, (name, said, where) in zip(images, rows):
        out.texts.setdefault(image, []).extend(data.captions_of(said, where))
        out.names[image] = str(name)
    for number, row in enumerate(listed, 1):
        where = f"{path}, images, row {number}"
        image = key(the(row, "id", (int, str), where))
        domain = the(row, "domain", (str, type(None)), where, None)
        file = the(row, "file_name", (str, type(None)), where, None)
        if domain:
            out.domains[image] = domain
        if file:
            out.files[image] = file
    out.texts = {image: texts for image, texts in out.texts.items() if texts}
    return out


def rows_of(found, path):
    """([(image, its caption or captions, where that stands)], COCO's `images`) of a document."""
    rows, listed = [], []
    if isinstance(found, list):                                      # COCO's results, BLIP's rows
        for number, row in enumerate(found, 1):
            where = f"{path}, row {number}"
            name = the(row, ("image", "image_id"), (int, str), where)
            rows.append((name, the(row, "caption", (str, list), where), where))
    elif isinstance(found, dict) and "annotations" in found:         # COCO, NoCaps
        for number, row in enumerate(the(found, "annotations", list, path), 1):
            where = f"{path}, annotation {number}"
            name = the(row, "image_id", (int, str), where)
            rows.append((name, the(row, "caption", str, where), where))
        listed = the(found, "images", list, path, [])
    elif isinstance(found, dict) and "images" in found:              # Karpathy's
        for number, row in enumerate(the(found, "images", list, path), 1):
            where = f"{path}, images, row {number}"
            name = the(row, ("cocoid", "imgid"), (int, str), where)
            said = [the(x, "raw", str, where) for x in the(row, "sentences", list, where)]
            rows.append((name, said, where))
            listed.append({"id": name, "file_name": row.get("filename")})
    elif isinstance(found, dict):
        for name, said in found.items():
            rows.append((name, said, f"{path}, image {name}"))
    if not rows:
        raise ValueError(f"{path}: expected [{{image_id, caption}}, ...], COCO annotations, "
                         "Karpathy's rows, or {image: captions}")
    return rows, listed


def results_in(path):
    """The Captions of a file of results, which has one of each image. Raises ValueError."""
    found = captions_in(path)
    several = [found.names[image] for image, texts in found.texts.items() if len(texts) > 1]
    if several:
        raise ValueError(f"{path} has several captions of {len(several)} images, such as "
                         f"{several[0]}: keep one of each")
    return found


# ---------------------------------------------------------------- several files, and pictures
def matched(results, source, notes, folder=None):
    """(items, [captions of each of the files `results`]) of the images that are in all of them
    and have references in source. folder: of their pictures."""
    said = [results_in(path) for path in results]
    references = captions_in(source)
    shared = set(references.texts).intersection(*(x.texts for x in said))
    names = [x for x in said[0].texts if x in shared]
    if not names:
        one, other = next(iter(said[0].texts), None), next(iter(references.texts), None)
        raise ValueError(f"no image of {' and '.join(map(str, results))} is in {source} (such as "
                         f"{one!r} and {other!r})")
    for path, file in zip([*results, source], [*said, references]):
        if len(file.texts) > len(names):
            notes.append(f"{len(file.texts) - len(names)} of the {len(file.texts)} images of "
                         f"{path} are left out: not every file has captions of them")
    items = [data.Item(x, None, references.texts[x], references.domains.get(x)) for x in names]
    if folder:
        paths = pictures(folder, names, said[0].names, said[0].files | references.files, notes)
        for item in items:
            item.path = paths[item.name]
    captions = []
    for file in said:
        captions.append([file.texts[x][0] for x in names])
    return items, captions


def pictured(path, source, folder, notes):
    """(items, captions) of a file of results whose pictures lie in a folder; source: None, or
    references, which may list their files."""
    said = results_in(path)
    files = captions_in(source).files if source else {}
    paths = pictures(folder, said.texts, said.names, said.files | files, notes)
    items = [data.Item(x, paths[x]) for x in said.texts]
    return items, [texts[0] for texts in said.texts.values()]


def pictures(folder, images, names, files, notes):
    """{image: path} of images, found in a folder by `files` {image: file name} where it lists them,
    else by `names` {image: as written}, else by number; how many by which is noted. Raises
    ValueError where an image has no picture, or several."""
    by_path, by_name, by_number = {}, {}, {}
    for item in data.folder(Path(folder)):
        by_path[item.name] = [item.path]
        by_name.setdefault(item.path.name, []).append(item.path)
        by_number.setdefault(key(item.name), []).append(item.path)
    out, ways, lost = {}, Counter(), []
    for image in images:
        name = files.get(image, names[image])
        way = "`images`" if image in files else "name"
        found = by_path.get(name) or by_name.get(Path(name).name, [])
        if not found and image not in files:                    # a guess: 100 may be 0000.png
            way, found = "number", by_number.get(image, [])
        if len(found) == 1:
            out[image] = found[0]
            ways[way] += 1
        else:
            lost.append(f"{name} ({len(found)})")
    if lost:
        raise ValueError(f"{len(lost)} of {len(images)} images have no picture of their own in "
                         f"{folder}, such as {lost[0]}: name its files in the references' images")
    told = ", ".join(f"{count} by {way}" for way, count in ways.items())
    guess = "; numbers are a guess, --refs with `images` is none" if ways["number"] else ""
    notes.append(f"pictures of {folder} found: {told}{guess}")
    return out
