"""Sets of pictures with captions, pictures of any kind, and work that is kept from run to run.

    for item in read("miniature", "test"):              # or of data/coco, data/nocaps, any folder
        image = open_image(item.path)                   # float (3, H, W) in [0, 1]
    append_rows(path, rows), read_rows(path)            # JSON lines that survive a kill

A set is a folder; what lies in it says what it is:
    dataset_coco.json                     Karpathy's schema: splits train (with restval), val, test
    coco_karpathy_{train,val,test}.json   BLIP's schema of the same splits
    nocaps_val_4500_captions.json         NoCaps validation: splits in, near, out; nocaps is all
    metadata.jsonl                        diffusers' imagefolder: file_name, text; a row a caption
    anything else                         every picture below the folder, without captions

    python data.py coco --root data/coco                # checks what is there, and prints the
    python data.py nocaps --root data/nocaps            # commands that fetch what is not

Copy this file alone: it needs torch, numpy and pillow.
"""
import argparse
import hashlib
import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

SETS = {"miniature": Path(__file__).resolve().parent / "miniature/data"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DOMAINS = {"in": "in-domain", "near": "near-domain", "out": "out-domain"}
NOCAPS = "nocaps_val_4500_captions.json"


@dataclass
class Item:
    """A picture of a set: its name, which is unique in the set, and for NoCaps its domain."""
    name: str
    path: Path
    captions: list = field(default_factory=list)
    domain: str | None = None


# ---------------------------------------------------------------- sets
def default_split(root):
    """The split a set is evaluated on where none is named: nocaps of NoCaps, else test."""
    return "nocaps" if (Path(SETS.get(root, root)) / NOCAPS).exists() else "test"


def read(root, split="test"):
    """The items of a split, in the order of the file. Raises ValueError with what is missing."""
    root = Path(SETS.get(root, root))
    if not root.is_dir():
        raise ValueError(f"no data set at {root}: give --data the folder that holds it, or one of "
                         f"{', '.join(SETS)}")
    if split in ("nocaps", *DOMAINS):
        return nocaps(root, split)
    if (root / "dataset_coco.json").exists():
        return karpathy(root, split)
    if (root / f"coco_karpathy_{split}.json").exists():
        return blip(root, split)
    if any(root.glob("coco_karpathy_*.json")):
        raise ValueError(f"{root} has no coco_karpathy_{split}.json: splits are train, val, test")
    return folder(root)


def karpathy(root, split):
    """dataset_coco.json: images[].{filepath, filename, cocoid, split, sentences[].raw}; train
    includes restval."""
    path = root / "dataset_coco.json"
    wanted = ("train", "restval") if split == "train" else (split,)
    items, splits = [], set()
    for row in load_json(path)["images"]:
        splits.add(row["split"])
        if row["split"] in wanted:
            name = str(row["cocoid"] if "cocoid" in row else row["imgid"])
            picture = root / row.get("filepath", "") / row["filename"]
            items.append(Item(name, picture, [one_line(s["raw"]) for s in row["sentences"]]))
    if not items:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(sorted(splits))}")
    return items


def blip(root, split):
    """coco_karpathy_{split}.json: rows {image, caption}; train has a row a caption, val and test a
    list of captions."""
    items = {}
    for row in load_json(root / f"coco_karpathy_{split}.json"):
        number = Path(row["image"]).stem.rsplit("_", 1)[-1].lstrip("0")
        name = str(row.get("image_id", number)).removeprefix("coco_")
        item = items.setdefault(row["image"], Item(name, root / row["image"]))
        captions = row["caption"]
        if isinstance(captions, str):
            captions = [captions]
        item.captions += map(one_line, captions)
    return list(items.values())


def nocaps(root, split="nocaps"):
    """NoCaps' file: images[].{id, file_name, domain}, annotations[].{image_id, caption}."""
    found = load_json(root / NOCAPS)
    if "annotations" not in found:
        raise ValueError(f"{root / NOCAPS} lists files without captions; that of {NOCAPS} has them")
    captions = {}
    for row in found["annotations"]:
        captions.setdefault(row["image_id"], []).append(one_line(row["caption"]))
    items = []
    for row in found["images"]:
        if split == "nocaps" or row["domain"] == DOMAINS[split]:
            said = captions.get(row["id"], [])
            items.append(Item(str(row["id"]), root / row["file_name"], said, row["domain"]))
    return items


def folder(root):
    """Every picture below a folder, sorted; captions from metadata.jsonl where there is one."""
    captions = {}
    for row in read_rows(root / "metadata.jsonl"):
        if not {"file_name", "text"} <= row.keys():
            raise ValueError(f"{root / 'metadata.jsonl'}: expected rows with file_name and text, "
                             f"one has {', '.join(row)}")
        said = [row["text"]] if isinstance(row["text"], str) else row["text"]
        if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
            raise ValueError(f"{root / 'metadata.jsonl'}: text of {row['file_name']} is no string "
                             "and no list of them")
        captions.setdefault(row["file_name"], []).extend(map(one_line, said))
    items = []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            name = path.relative_to(root).as_posix()
            items.append(Item(name, path, captions.get(name, [])))
    if not items:
        raise ValueError(f"no pictures in {root}: expected files ending in "
                         f"{' '.join(sorted(SUFFIXES))}")
    return items


def one_line(caption):
    """Any white space becomes one space: a line break in a caption breaks line-based scorers."""
    return " ".join(caption.split())


# ---------------------------------------------------------------- pictures
def open_image(path):
    """A picture file of any mode and orientation: float32 (3, H, W) in [0, 1].

    EXIF orientation is applied, transparency is laid on white, 16-bit depth is scaled (not cut), of
    an animation the first frame is taken. Raises ValueError naming the file where it is no picture.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):         # 16 bit: PIL's own conversion would cut at 255
                deep = np.asarray(image).astype(np.float32)
                top = 65535 if deep.max() > 255 else 255
                image = Image.fromarray((deep / top * 255).round().astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError as e:
        archive = Path(f"{Path(path).parent}.zip")
        raise ValueError(f"{path} is missing: {command(archive) or 'no such picture'}") from e
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path} is not a picture that can be read ({type(e).__name__})") from e
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def save_image(image, path):
    """Float (3, H, W) in [0, 1] -> a PNG of 8 bit, written beside and then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path.with_suffix(".tmp"), "PNG")
    os.replace(path.with_suffix(".tmp"), path)


def picture_name(name, index=None, prefix=None):
    """The stem of the file of what was drawn for an item, short and unique; prefix: in place of the
    beginning of its name; index: of the candidate."""
    stem = Path(name).stem[:40] if prefix is None else prefix
    stem += "-" + hashlib.sha1(name.encode()).hexdigest()[:8]
    return stem if index is None else f"{stem}-{index}"


# ---------------------------------------------------------------- work that is kept
def load_json(path):
    """A JSON file, or one clear sentence."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} is missing: {command(path) or 'put it there'}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is no JSON that can be read ({type(e).__name__})") from e


def read_rows(path):
    """The rows of a JSON-lines file, [] where there is none. The beginning of a row, which a kill
    leaves, is forgiven; any other line that is no row is a ValueError."""
    path = Path(path)
    rows = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
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
            if not cut:
                raise ValueError(f"{path}, line {number}: {e}") from e
    return rows


def append_rows(path, rows):
    """Rows at the end of a JSON-lines file by one write: several processes may add to it, and a
    kill cuts only the last line."""
    new = as_lines(rows).encode()
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":                   # a line was cut: begin a new one
                new = b"\n" + new
        file.write(new)


def write_rows(path, rows):
    write_text(path, as_lines(rows))


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_text(path, text):
    """A text file (UTF-8), written beside and then renamed: there is the old one, or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
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
