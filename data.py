"""Sets of pictures with captions, and pictures of any kind.

    for item in read("miniature", "test"):              # or of data/coco, data/nocaps, any folder
        image = open_image(item.path)                   # float (3, H, W) in [0, 1]

A set is a folder; what lies in it says what it is:
    dataset_coco.json                     Karpathy's schema: splits train (with restval), val, test
    coco_karpathy_{train,val,test}.json   BLIP's schema of the same splits
    nocaps_val_4500_captions.json         NoCaps validation: splits in, near, out; nocaps is all
    anything else                         every picture below it; captions and splits by `folder`

    python data.py coco --root data/coco                # checks what is there, and prints the
    python data.py nocaps --root data/nocaps            # commands that fetch what is not

Copy this file with annotations.py, pictures.py and records.py: it needs torch.
"""
import csv
import functools
import hashlib
import io
import mimetypes
import os
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

import annotations
from pictures import SUFFIXES, as_picture, pixels
from records import digest, read_lines, read_rows, read_text, say, writing

SETS = {"miniature": Path(__file__).resolve().parent / "miniature/data"}
DOMAINS = {"in": "in-domain", "near": "near-domain", "out": "out-domain"}
NOCAPS = "nocaps_val_4500_captions.json"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
         "dev": "val", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
HELD = 10                                        # of a folder without PARTS, one in so many is held
RUNS = ("candidates.jsonl", "results.json")      # what a folder of our own work holds
real_folder = functools.cache(os.path.realpath)
LEAVE = False                                    # whether pictures may lie out of their set


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
    part = split or default_split(root)
    coco = (root / "dataset_coco.json").exists() or any(root.glob("coco_karpathy_*.json"))
    if coco or part in ("nocaps", *DOMAINS):
        items = public(root, part)
    elif (root / NOCAPS).exists():
        raise ValueError(f"{root / NOCAPS} has no split {split!r}; it has nocaps, "
                         f"{', '.join(DOMAINS)}")
    else:
        items = folder(root, split)
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


def content_of(items):
    """A short name of what items are: of their names, captions and files' names."""
    return digest([[item.name, item.path and item.path.name, item.captions] for item in items])


def inside(path, root, where, ours=False):
    """The path, if it stays in a folder when links are followed; else ValueError, which begins with
    `where`, unless LEAVE allows it. ours: of a folder that our scripts write, it never does."""
    here = os.getcwd()
    try:
        real = os.path.join(real_folder(os.path.join(here, path.parent)), path.name)
        if os.path.islink(path) or path.name == "..":
            real = os.path.realpath(path)
    except ValueError as e:                      # half of a pair, or NUL
        raise ValueError(f"{where}: {ascii(str(path))[:200]} is no path") from e
    allowed = LEAVE and not ours
    if not allowed and not Path(real).is_relative_to(real_folder(os.path.join(here, root))):
        remedy = "" if ours else ": --anywhere allows that, if you trust the file"
        raise ValueError(f"{where}: {path} leads out of {root}{remedy}")
    return path


def public(root, split):
    """The items of a split of a public set; train of Karpathy's includes restval."""
    path = root / f"coco_karpathy_{split}.json"
    wanted = ("train", "restval") if split == "train" else (split,)
    if split in ("nocaps", *DOMAINS):
        path = root / NOCAPS
        wanted = (DOMAINS.get(split),)
    elif (root / "dataset_coco.json").exists():
        path = root / "dataset_coco.json"
    if not path.exists():
        raise ValueError(f"{path} is missing: {command(path) or 'put it there'}")
    items, parts = [], set()
    for row in annotations.rows_in(path):
        part = row.domain if path.name == NOCAPS else row.split
        part = split if path.name.startswith("coco_karpathy_") else part
        parts.add(str(part))
        if not row.file or (part is None and split != "nocaps"):
            raise ValueError(f"{row.where}: it names no file, or is of no split")
        if split == "nocaps" or part in wanted:
            picture = inside(root / row.file, root, row.where)
            items.append(Item(annotations.key(row.name), picture, row.captions, row.domain))
    if not items:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(sorted(parts))}")
    return items


# ---------------------------------------------------------------- anybody's folder
def folder(root, split=None):
    """Every picture below a folder, sorted, with captions and splits as `datasets` reads them.

    Captions: rows of file_name and text (a string, or a list) in metadata.jsonl or metadata.csv,
    which may lie in any folder; of a picture that no row names, the lines of the .txt beside it.
    Splits: folders train, val, test. Without them val and test are one in HELD of the described
    pictures, by a hash of its name: it stays there when others come. None, all: every picture.
    What a run of these scripts wrote is left out.
    """
    files = [path for path in sorted(root.rglob("*"))
             if path.is_file() and "/." not in f"/{path.relative_to(root).as_posix()}"]
    own = set()
    for run in {path.parent for path in files if path.name in RUNS}:
        if run / "settings.json" in files:
            own |= {run / "pictures", run / "winners", run / "sheet.png"}
            say(f"{root}: the pictures of the run in {run} are left out")
    files = [path for path in files if not own.intersection((path, *path.parents))]
    known = dict.fromkeys(files)
    for path in files:
        if path.name in METADATA:
            described(path, known)
    items = []
    for path in files:
        if known[path] or path.suffix.lower() in SUFFIXES:
            beside = path.with_suffix(".txt")
            said = known[path] or (read_lines(beside) if beside in known else [])
            name = path.relative_to(root).as_posix()
            items.append(Item(name, inside(path, root, root), said))
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
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(path)), strict=True))
        except csv.Error as e:
            raise ValueError(f"{path}: {e}") from e
    else:
        rows = read_rows(path, whole=True)
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if None in row:                          # of a .csv
            raise ValueError(f"{where}: it has more cells than there are columns")
        if not {"file_name", "text"} <= row.keys():
            raise ValueError(f"{where}: expected file_name and text, it has {[*row]}")
        name = str(row["file_name"]).replace("\\", "/")
        picture = path.parent / os.path.normpath(name)
        if picture not in known:
            raise ValueError(f"{where}: there is no file {name} in {path.parent}")
        said = annotations.captions_of(row["text"] or None, where)
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
        known = [part for part in parts if parts[part]]
        raise ValueError(f"{root} has no pictures in its split {split!r}, of {[*known, 'all']}")
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
    beside = path.with_suffix(".tmp")
    with writing(path, beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        as_picture(image.permute(1, 2, 0).cpu().numpy()).save(beside, "PNG")
        os.replace(beside, path)


def picture_name(name, index=None, prefix=None):
    """The stem of the file of what was drawn for an item, short and unique; prefix: in place of the
    beginning of its name; index: of the candidate."""
    stem = Path(name).stem[:40] if prefix is None else prefix
    stem += "-" + hashlib.sha1(name.encode(errors="surrogateescape")).hexdigest()[:8]
    return stem if index is None else f"{stem}-{index}"


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
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if md5 in (None, found):
        return "here"
    return f"wrong or cut, its MD5 is {found}: if this does not mend it, delete it first"


def flags(parser, argv=None):
    parser.add_argument("set", choices=FILES, help="which public set to look for")
    parser.add_argument("--root", type=Path, help="where it is; default data/ and its name")
    return parser.parse_args(argv)


def main(args):
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
    import script
    script.run(main, lambda: flags(script.Parser(__doc__)))
