"""Sets of pictures with captions, pictures of any kind, and work that is kept from run to run.

    for item in read("miniature", "test"):              # or of data/coco, data/nocaps, any folder
        image = open_image(item.path)                   # float (3, H, W) in [0, 1]
    append_rows(path, rows), read_rows(path)            # JSON lines that survive a kill

A set is a folder; what lies in it says what it is:
    dataset_coco.json                     Karpathy's schema: splits train (with restval), val, test
    coco_karpathy_{train,val,test}.json   BLIP's schema of the same splits
    nocaps_val_4500_captions.json         NoCaps validation: splits in, near, out; nocaps is all
    anything else                         every picture below it; captions and splits by `folder`

    python data.py coco --root data/coco                # checks what is there, and prints the
    python data.py nocaps --root data/nocaps            # commands that fetch what is not

Copy this file with pictures.py: it needs torch.
"""
import argparse
import csv
import functools
import hashlib
import io
import json
import mimetypes
import os
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pictures import SUFFIXES, as_picture, pixels

SETS = {"miniature": Path(__file__).resolve().parent / "miniature/data"}
DOMAINS = {"in": "in-domain", "near": "near-domain", "out": "out-domain"}
NOCAPS = "nocaps_val_4500_captions.json"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
         "dev": "val", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
HELD = 10                                        # of a folder without PARTS, one in so many is held


@dataclass
class Item:
    """A picture of a set: its name, which is unique in the split that was read, and for NoCaps its
    domain. Chance and the names of files hang on the name: the set's own number; of those that
    share one, and in a folder, the path below it."""
    name: str
    path: Path
    captions: list = field(default_factory=list)
    domain: str | None = None


# ---------------------------------------------------------------- sets
def default_split(root):
    """The split a set is evaluated on where none is named: nocaps of NoCaps, else test."""
    return "nocaps" if (Path(SETS.get(root, root)) / NOCAPS).exists() else "test"


def read(root, split=None):
    """The items of a split, in the order of the file. Without one: all pictures of a folder; of a
    public set, the split it is evaluated on. Raises ValueError with what is missing, or wrong."""
    root = Path(SETS.get(root, root))
    if not root.is_dir():
        raise ValueError(f"no data set at {root}: give --data the folder that holds it, or one of "
                         f"{', '.join(SETS)}")
    public = split or default_split(root)
    try:
        if public in ("nocaps", *DOMAINS):
            items = nocaps(root, public)
        elif (root / "dataset_coco.json").exists():
            items = karpathy(root, public)
        elif any(root.glob("coco_karpathy_*.json")):
            items = blip(root, public)
        else:
            items = folder(root, split)
    except (KeyError, TypeError, AttributeError, csv.Error) as e:
        raise ValueError(f"{root}: its captions have an odd row ({type(e).__name__}: {e})") from e
    return named_apart(items, root)


def named_apart(items, root):
    """The items; those that share a name are named by their paths below root."""
    shared = Counter(item.name for item in items)
    for item in items:
        if shared[item.name] > 1:
            item.name = item.path.as_posix().removeprefix(f"{root.as_posix()}/")
    for name, count in Counter(item.name for item in items).items():
        if count > 1:
            raise ValueError(f"{root}: {name} is listed {count} times: keep one")
    return items


def karpathy(root, split):
    """dataset_coco.json: images[].{filepath, filename, cocoid, split, sentences[].raw}; train
    includes restval."""
    path = root / "dataset_coco.json"
    wanted = ("train", "restval") if split == "train" else (split,)
    items, splits = [], set()
    for number, row in enumerate(load_json(path)["images"], 1):
        splits.add(row["split"])
        if row["split"] in wanted:
            name = str(row["cocoid"] if "cocoid" in row else row["imgid"])
            picture = root / row.get("filepath", "") / row["filename"]
            said = captions_of(row["sentences"], f"{path}, row {number}")
            items.append(Item(name, picture, said))
    if not items:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(sorted(splits))}")
    return items


def blip(root, split):
    """coco_karpathy_{split}.json: rows {image, caption}; train has a row a caption, val and test a
    list of captions."""
    path = root / f"coco_karpathy_{split}.json"
    items = {}
    for number, row in enumerate(load_json(path), 1):
        digits = Path(row["image"]).stem.rsplit("_", 1)[-1]
        name = str(row.get("image_id", digits.lstrip("0") or "0")).removeprefix("coco_")
        item = items.setdefault(row["image"], Item(name, root / row["image"]))
        item.captions += captions_of(row["caption"], f"{path}, row {number}")
    return list(items.values())


def nocaps(root, split="nocaps"):
    """NoCaps' file: images[].{id, file_name, domain}, annotations[].{image_id, caption}."""
    path = root / NOCAPS
    found = load_json(path)
    if "annotations" not in found:
        raise ValueError(f"{path} lists files without captions; that of {NOCAPS} has them")
    captions = {}
    for number, row in enumerate(found["annotations"], 1):
        said = captions_of(row["caption"], f"{path}, annotation {number}")
        captions.setdefault(row["image_id"], []).extend(said)
    items = []
    for row in found["images"]:
        domain = row.get("domain")
        if split == "nocaps" or domain == DOMAINS[split]:
            said = captions.get(row["id"], [])
            items.append(Item(str(row["id"]), root / row["file_name"], said, domain))
    return items


def captions_of(value, where):
    """The captions of a row, each on one line: of a string, a list of strings, or of Karpathy's
    {raw}. Raises ValueError, which begins with `where`, for anything else, such as null."""
    said = value if isinstance(value, list) else [value]
    said = [x.get("raw") if isinstance(x, dict) else x for x in said]
    if not all(isinstance(x, str) for x in said):
        raise ValueError(f"{where}: expected a caption or a list of them, not {ascii(value)[:60]}")
    return [one_line(x) for x in said]


def one_line(caption):
    """Any white space becomes one space: a line break in a caption breaks line-based scorers."""
    return " ".join(caption.split())


# ---------------------------------------------------------------- anybody's folder
def folder(root, split=None):
    """Every picture below a folder, sorted, with captions and splits as `datasets` reads them.

    Captions: rows of file_name and text (a string, or a list) in metadata.jsonl or metadata.csv,
    which may lie in any folder; of a picture that no row names, the lines of the .txt beside it.
    Splits: folders train, val, test. Without them val and test are one in HELD of the described
    pictures, by a hash of its name: it stays there when others come. None, all: every picture.
    """
    files = [path for path in sorted(root.rglob("*"))
             if path.is_file() and "/." not in f"/{path.relative_to(root).as_posix()}"]
    known = dict.fromkeys(files)
    for path in files:
        if path.name in METADATA:
            described(path, known)
    items = []
    for path in files:
        if known[path] or path.suffix.lower() in SUFFIXES:
            beside = path.with_suffix(".txt")
            said = known[path] or (read_lines(beside) if beside in known else [])
            items.append(Item(path.relative_to(root).as_posix(), path, said))
        elif str(mimetypes.guess_type(path.name)[0]).startswith("image/"):
            say(f"{root}: its {path.suffix} pictures are left out; Pillow does not read them")
    if not items:
        raise ValueError(f"no pictures in {root}, such as .jpg or .png")
    return items if split in (None, "all") else of_split(items, split, root)


def described(path, known):
    """Puts the captions of a file of METADATA into known, {path: captions or None}."""
    if path.suffix == ".parquet":
        raise ValueError(f"{path} is not read here: write it as metadata.jsonl")
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(read_text(path)))
    else:
        rows = read_rows(path, whole=True)
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if not {"file_name", "text"} <= row.keys():
            raise ValueError(f"{where}: expected file_name and text, it has {[*row]}")
        name = str(row["file_name"]).replace("\\", "/")
        picture = path.parent / os.path.normpath(name)
        if picture not in known:
            raise ValueError(f"{where}: there is no file {name} in {path.parent}")
        said = captions_of(row["text"] or None, where)
        known[picture] = (known[picture] or []) + said


def of_split(items, split, root):
    """Those of a folder's items that are in a split, by `folder`'s rule."""
    parts = {}
    for item in items:
        part = PARTS.get(item.name.partition("/")[0].lower(), "train")
        parts.setdefault(part, []).append(item)
    told = [item for item in items if item.captions]
    if parts.keys() == {"train"}:
        if not told:
            return items                         # there is nothing to learn, or to compare
        held = [item for item in told if int(picture_name(item.name)[-8:], 16) % HELD == 0]
        say(f"{root}: {len(held)} of its {len(told)} described pictures, by a hash of their names, "
            "are held out as val and test; --split all is every one")
        names = {item.name for item in held}
        rest = [item for item in items if item.name not in names]
        parts = {"train": rest, "val": held, "test": held}
    if not parts.get(split):
        raise ValueError(f"{root} has no pictures in its split {split!r}, of {[*parts, 'all']}")
    return parts[split]


# ---------------------------------------------------------------- pictures
def open_image(path):
    """`pictures.pixels` of a file as float32 (3, H, W) in [0, 1]. ValueError where it is none."""
    try:
        return torch.from_numpy(pixels(path)).permute(2, 0, 1).contiguous()
    except FileNotFoundError as e:
        archive = Path(f"{Path(path).parent}.zip")
        raise ValueError(f"{path} is missing: {command(archive) or 'no such picture'}") from e


def save_image(image, path):
    """Float (3, H, W) in [0, 1] -> a PNG of 8 bit, written beside and then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    as_picture(image.permute(1, 2, 0).cpu().numpy()).save(path.with_suffix(".tmp"), "PNG")
    os.replace(path.with_suffix(".tmp"), path)


def picture_name(name, index=None, prefix=None):
    """The stem of the file of what was drawn for an item, short and unique; prefix: in place of the
    beginning of its name; index: of the candidate."""
    stem = Path(name).stem[:40] if prefix is None else prefix
    stem += "-" + hashlib.sha1(name.encode(errors="surrogateescape")).hexdigest()[:8]
    return stem if index is None else f"{stem}-{index}"


# ---------------------------------------------------------------- work that is kept
def load_json(path):
    """A JSON file, or one clear sentence."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} is missing: {command(path) or 'put it there'}")
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is no JSON that can be read ({type(e).__name__})") from e


def read_text(path):
    """A text file of UTF-8, with or without its mark (BOM). Raises ValueError where it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is no text in UTF-8 (byte {e.start})") from e


def read_lines(path):
    """The lines of a text file that say something, as `one_line`. Only a line break ends a line."""
    return [one_line(line) for line in read_text(path).split("\n") if line.strip()]


def read_rows(path, whole=False):
    """The rows of a JSON-lines file, [] where there is none. The beginning of a row, which a kill
    leaves, is forgiven, unless it is to be whole; any other line that is no row is a ValueError."""
    path = Path(path)
    rows = []
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if path.exists() else []
    for number, line in enumerate(map(bytes.strip, lines), 1):
        if not line.strip(b"\0"):                # blank, or what a loss of power left
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("expected {name: value}")
            rows.append(row)
        except ValueError as e:
            inner = isinstance(e, json.JSONDecodeError) and e.pos == len(e.doc)     # an inner }
            cut = line.startswith(b"{") and (inner or not line.endswith(b"}"))
            if whole or not cut:
                raise ValueError(f"{path}, line {number}: {e}") from e
    return rows


def append_rows(path, rows):
    """Rows at the end of a JSON-lines file by one write: several processes may add to it, and a
    kill cuts only the last line."""
    new = as_lines(rows).encode(errors="backslashreplace")
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":                   # a line was cut: begin a new one
                new = b"\n" + new
        file.write(new)


def write_rows(path, rows):
    write_text(path, as_lines(rows))


def as_lines(rows):
    # where they are encoded, what UTF-8 can't hold of a file's name becomes an escape of JSON
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_text(path, text):
    """A text file (UTF-8), written beside and then renamed: there is the old one, or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(text.encode(errors="backslashreplace"))
    os.replace(beside, path)


def same_settings(folder, settings):
    """Whether settings.json in a folder holds these settings, {name: str}; where there is none it
    is written. Raises ValueError where they differ: a run goes on only as it began."""
    path = Path(folder) / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return False
    before = load_json(path)
    other = [f"{name} was {before.get(name, 'None')}, is {value}"
             for name, value in settings.items() if before.get(name, "None") != value]
    if other:
        raise ValueError(f"{folder} holds a run with other settings ({'; '.join(other)}): choose "
                         "another --out")
    return True


def rank_and_world():
    """(this process's number, how many there are), as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@functools.cache
def say(line):
    """A line to stderr: once, and by one process of torchrun's."""
    if rank_and_world()[0] == 0:
        print(line, file=sys.stderr)


# ---------------------------------------------------------------- the public sets
SFR = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
COCO = "http://images.cocodataset.org/zips/"
FILES = {                                               # address: MD5, as LAVIS publishes it
    "coco": {
        SFR + "coco_karpathy_train.json": "aa31ac474cf6250ebb81d18348a07ed8",
        SFR + "coco_karpathy_val.json": "b273847456ef5580e33713b1f7de52a0",
        SFR + "coco_karpathy_test.json": "3ff34b0ef2db02d01c37399f6a2a6cd1",
        COCO + "train2014.zip": "0da8c0bd3d6becc4dcb32757491aca88",
        COCO + "val2014.zip": "a3d79f5ed8d289b7a7554ce06a5782b3"},
    "nocaps": {"https://nocaps.s3.amazonaws.com/" + NOCAPS: None}}


def command(path):
    """What fetches a file of a public set, checks it and, if it is right, unpacks it; else ""."""
    for address, md5 in (FILES["coco"] | FILES["nocaps"]).items():
        if address.endswith("/" + path.name):
            steps = [shlex.join(["wget", "-c", "-P", str(path.parent), address])]
            if md5:
                steps.append(f"echo {shlex.quote(f'{md5}  {path}')} | md5sum -c")
            if path.suffix == ".zip":
                steps.append(shlex.join(["unzip", "-qo", str(path), "-d", str(path.parent)]))
            return " && ".join(steps)
    return ""


def state(path, md5):
    """Whether a file of a public set is there, and the right one."""
    if not path.exists():
        return "unpacked" if path.with_suffix("").is_dir() else "missing"
    if md5 is None:
        return "here"
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found == md5:
        return "here, its MD5 is right"
    return f"wrong or cut, its MD5 is {found}: if this does not mend it, delete it first"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=FILES, help="which public set to look for")
    parser.add_argument("--root", type=Path, help="where it is; default data/ and its name")
    args = parser.parse_args(argv)
    root = args.root or Path("data", args.set)
    todo = 0
    for address, md5 in FILES[args.set].items():
        path = root / address.rpartition("/")[2]
        found = state(path, md5)
        print(f"# {path}: {found}")
        if found.startswith(("missing", "wrong")):
            todo += 1
            print(command(path))
    items = [] if todo else read(root, default_split(root))
    absent = sum(not item.path.exists() for item in items)
    if items:
        print(f"# {root}: {absent} of the {len(items)} pictures of its evaluation are missing")
    if args.set == "nocaps" and (todo or absent):           # its pictures are in no archive
        print(f"cat {shlex.quote(str(root / NOCAPS))} | grep -o '\"coco_url\": *\"[^\"]*' | "
              f"cut -d '\"' -f 4 | xargs -n 50 -P 8 wget -c -nv -P {shlex.quote(str(root))}")
    return int(todo + absent > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        print(f"data.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
