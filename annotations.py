"""Files of captions in the field's forms: read once, for sets, results, references and candidates.

    for row in rows_in("captions_val2014.json"):
        print(row.name, row.captions)

Forms: COCO's results and annotations, NoCaps, Karpathy's and BLIP's files, {image: caption or
captions}; rows of any of them as JSON lines. Copy this file with records.py.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path

import records
from records import the

NAMES = ("image", "image_id", "file_name")       # the first that a row of captions has
FILES = ("image", "file_name")
CAPTIONS = ("caption", "captions", "text")


@dataclass
class Row:
    """What a file says of an image."""
    name: str                                    # as it is written, perhaps a number
    captions: list = field(default_factory=list)
    where: str = ""                              # it stands, for messages
    file: str | None = None
    split: str | None = None                     # Karpathy's
    domain: str | None = None                    # NoCaps'


def rows_in(path):
    """The Rows of a file, one an image and file, in its order. Raises ValueError for other files,
    with the place of what is wrong."""
    if str(path).endswith(".jsonl"):
        found = records.read_rows(path, whole=True)
    else:
        found = records.load_json(path)
    rows = []
    if isinstance(found, list):
        rows = listed(found, path)
    elif isinstance(found, dict) and "annotations" in found:
        rows = annotated(found, path)
    elif isinstance(found, dict) and "images" in found:
        rows = karpathy(found, path)
    elif isinstance(found, dict):
        for name, said in found.items():
            where = f"{path}, image {ascii(name)[:80]}"
            rows.append(Row(name, captions_of(said, where), where))
    if not rows:
        raise ValueError(f"{path}: expected [{{image_id, caption}}, ...], COCO annotations, "
                         "Karpathy's rows, or {image: captions}")
    return rows


def listed(found, path):
    """Of COCO's results, BLIP's files: [{image_id or image, caption or captions}]."""
    rows = {}
    for number, row in enumerate(found, 1):
        where = f"{path}, row {number}"
        name = str(the(row, NAMES, (int, str), where))
        file = the(row, FILES, (int, str), where, None)
        said = captions_of(the(row, CAPTIONS, (str, list), where), where)
        file = file if isinstance(file, str) else None
        rows.setdefault((name, file), Row(name, [], where, file)).captions.extend(said)
    return list(rows.values())


def annotated(found, path):
    """Of COCO, NoCaps: images[].{id, file_name, domain}, annotations[].{image_id, caption}."""
    rows = {}
    for number, row in enumerate(the(found, "images", list, path, []), 1):
        where = f"{path}, images, row {number}"
        name = str(the(row, "id", (int, str), where))
        file = the(row, "file_name", (str, type(None)), where, None)
        domain = the(row, "domain", (str, type(None)), where, None)
        if name in rows:
            raise ValueError(f"{where}: {name} is listed before: keep one")
        rows[name] = Row(name, [], where, file, None, domain)
    for number, row in enumerate(the(found, "annotations", list, path), 1):
        where = f"{path}, annotation {number}"
        name = str(the(row, "image_id", (int, str), where))
        said = captions_of(the(row, "caption", (str, list), where), where)
        rows.setdefault(name, Row(name, [], where)).captions.extend(said)
    return list(rows.values())


def karpathy(found, path):
    """dataset_coco.json: images[].{filepath, filename, cocoid, split, sentences[].raw}."""
    rows = []
    for number, row in enumerate(the(found, "images", list, path), 1):
        where = f"{path}, row {number}"
        said = [the(x, "raw", str, where) for x in the(row, "sentences", list, where)]
        name = str(the(row, ("cocoid", "imgid"), (int, str), where))
        file = the(row, "filename", str, where, None)
        if file:
            file = Path(the(row, "filepath", str, where, ""), file).as_posix()
        split = the(row, "split", str, where, None)
        rows.append(Row(name, captions_of(said, where), where, file, split))
    return rows


def captions_of(value, where):
    """The captions of a string, a list of strings, or of Karpathy's {raw}, each on one line. Raises
    ValueError, which begins with `where`, for anything else, such as null."""
    said = value if isinstance(value, list) else [value]
    said = [x.get("raw") if isinstance(x, dict) else x for x in said]
    if not all(isinstance(x, str) for x in said):
        raise ValueError(f"{where}: expected a caption or a list of them, not {ascii(value)[:60]}")
    return [records.one_line(x, where) for x in said]


# ---------------------------------------------------------------- which image
def key(image):
    """An image by its number where its name is one, as COCO's files' are
    (val2014/COCO_val2014_000000391895.jpg)."""
    digits = re.fullmatch(r"(?:.*/)?(?:COCO_\w+_|coco_)?(\d+)(?:\.\w+)?", str(image))
    return str(int(digits[1])) if digits else str(image)


def by_key(path):
    """{key: Row} of a file's images that have captions. Raises ValueError where two have one."""
    found = {}
    for row in rows_in(path):
        other = found.setdefault(key(row.name), row)
        if other.name != row.name:
            raise ValueError(f"{path}: {other.name} and {row.name} are one image by their number: "
                             "rename one")
        if other is not row:                     # of several rows, as of a caption each
            other.captions += row.captions
    return {image: row for image, row in found.items() if row.captions}


def results_in(path):
    """{key: Row} of a file of results, which has one caption of each image. Raises ValueError."""
    found = by_key(path)
    several = [row.name for row in found.values() if len(row.captions) > 1]
    if several:
        raise ValueError(f"{path} has several captions of {len(several)} images, such as "
                         f"{several[0]}: keep one of each")
    return found
