"""Readers of image-caption sets: COCO Karpathy, NoCaps, a plain folder, the miniature; and pictures of any kind.

    for item in read("miniature", "test"):               # or read("data/coco", "test"), read("data/nocaps", "out"), ...
        image = open_image(item.path)                    # float (3, H, W) in [0, 1], whatever the file's mode

A set is a folder; what lies in it says what it is:
    dataset_coco.json                        Karpathy's own schema: splits train (with restval), val, test
    coco_karpathy_{train,val,test}.json      BLIP's schema of the same splits
    nocaps_val_4500_captions.json            NoCaps validation: splits in, near, out, or nocaps for all three
    metadata.jsonl                           diffusers' imagefolder: file_name, text (one or several lines a picture)
    anything else                            every picture below the folder, without captions
Copy this file alone: it needs torch, numpy and pillow.

    python data.py coco --root data/coco                 # fetches the public files: 20 GB of pictures, 0.1 GB of text
    python data.py nocaps --root data/nocaps             # 4,500 pictures and their captions, 2 GB
"""
import argparse
import base64
import hashlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
SETS = {"miniature": HERE / "miniature/data"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SFR = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
COCO = "http://images.cocodataset.org/zips/"
SOURCES = {                                      # set -> {file: (address, MD5 where it is published)}
    "coco": {f"coco_karpathy_{x}.json": (f"{SFR}coco_karpathy_{x}.json", None)
             for x in ("train", "val", "test", "val_gt", "test_gt")}
    | {"train2014.zip": (COCO + "train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88"),
       "val2014.zip": (COCO + "val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3")},
    "nocaps": {"nocaps_val_4500_captions.json": (
        "https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json", None)}}
DOMAINS = {"in": "in-domain", "near": "near-domain", "out": "out-domain"}


@dataclass
class Item:
    """A picture of a set: its name (unique in the set), its file, its captions, and for NoCaps its domain."""
    name: str
    path: Path
    captions: list = field(default_factory=list)
    domain: str | None = None


# ---------------------------------------------------------------- sets
def evaluated(root):
    """The split a set is evaluated on where none is named: nocaps of NoCaps, else test."""
    return "nocaps" if (Path(SETS.get(root, root)) / "nocaps_val_4500_captions.json").exists() else "test"


def read(root, split="test"):
    """The items of a split, in the order of the file. Raises ValueError with what is missing and where to put it."""
    root = Path(SETS.get(root, root))
    if not root.is_dir():
        raise ValueError(f"no data set at {root}: give --data the folder that holds it, or one of {', '.join(SETS)}")
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
    """dataset_coco.json: images[].{filepath, filename, cocoid, split, sentences[].raw}; train includes restval."""
    wanted = ("train", "restval") if split == "train" else (split,)
    images = load(root / "dataset_coco.json")["images"]
    items = [Item(str(x.get("cocoid", x["imgid"])), root / x.get("filepath", "") / x["filename"],
                  [fold(s["raw"]) for s in x["sentences"]]) for x in images if x["split"] in wanted]
    if not items:
        raise ValueError(f"{root / 'dataset_coco.json'} has no split {split!r}; it has "
                         f"{', '.join(sorted({x['split'] for x in images}))}")
    return items


def blip(root, split):
    """coco_karpathy_{split}.json: rows {image, caption}; train has a row a caption, val and test a list of captions."""
    items = {}
    for row in load(root / f"coco_karpathy_{split}.json"):
        name = row.get("image_id", Path(row["image"]).stem.rsplit("_", 1)[-1].lstrip("0"))
        item = items.setdefault(row["image"], Item(str(name).removeprefix("coco_"), root / row["image"]))
        said = row["caption"]
        item.captions += [fold(c) for c in ([said] if isinstance(said, str) else said)]
    return list(items.values())


def nocaps(root, split="nocaps"):
    """nocaps_val_4500_captions.json: images[].{id, file_name, domain}, annotations[].{image_id, caption}."""
    path = root / "nocaps_val_4500_captions.json"
    data = load(path)
    if "annotations" not in data:
        raise ValueError(f"{path} lists files without captions; nocaps_val_4500_captions.json has them")
    said = {}
    for a in data["annotations"]:
        said.setdefault(a["image_id"], []).append(fold(a["caption"]))
    return [Item(str(x["id"]), root / x["file_name"], said.get(x["id"], []), x["domain"]) for x in data["images"]
            if split == "nocaps" or x["domain"] == DOMAINS[split]]


def folder(root):
    """Every picture below a folder, sorted; captions from metadata.jsonl where there is one."""
    said = {}
    if (root / "metadata.jsonl").exists():
        for line in (root / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            if not {"file_name", "text"} <= row.keys():
                raise ValueError(f"{root / 'metadata.jsonl'}: expected rows with file_name and text, one has "
                                 f"{', '.join(row)}")
            said.setdefault(row["file_name"], []).append(fold(row["text"]))
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"no pictures in {root}: expected files ending in {' '.join(sorted(SUFFIXES))}")
    names = [p.relative_to(root).as_posix() for p in paths]
    return [Item(name, path, said.get(name, [])) for name, path in zip(names, paths)]


def load(path):
    """A JSON file, or one clear sentence."""
    if not path.exists():
        known = next((f" from {files[path.name][0]} (python data.py {name} --root {path.parent} fetches it)"
                      for name, files in SOURCES.items() if path.name in files), "")
        raise ValueError(f"{path} is missing: put it there{known}")
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}): fetch it again") from e


def fold(caption):
    """White space of any kind becomes one space: a line break inside a caption breaks line-based scorers."""
    return " ".join(caption.split())


# ---------------------------------------------------------------- pictures
def open_image(path):
    """A picture file of any mode and orientation: float32 (3, H, W) in [0, 1].

    EXIF orientation is applied, transparency is laid on white, 16-bit depth is scaled (not cut), of an animation the
    first frame is taken. Raises ValueError naming the file where it is no picture.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):                     # 16 bit: PIL's own conversion would cut at 255
                deep = np.asarray(image).astype(np.float32)
                image = Image.fromarray((deep / (65535 if deep.max() > 255 else 255) * 255).round().astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path} is not a picture that can be read ({type(e).__name__})") from e
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def save_image(image, path):
    """Float (3, H, W) in [0, 1] -> a PNG of 8 bit; written beside and renamed, so that a kill leaves no half file."""
    from PIL import Image
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path.with_suffix(".tmp"), "PNG")
    os.replace(path.with_suffix(".tmp"), path)


# ---------------------------------------------------------------- fetching
def fetch(url, path, md5=None, tries=5, wait=1.0):
    """A file from the web: resumed where it was cut, checked, then renamed into place; nothing if it is there.

    Checked against `md5`, or what the server says of it (x-goog-hash, or an ETag that is an MD5), and its length.
    Raises ValueError with the remedy: a wrong file is deleted, a cut one is kept for the next try.
    """
    import urllib.error
    import urllib.request

    from tqdm import tqdm
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as answer:
                have = have if answer.status == 206 else 0                       # no Range: from the beginning
                whole = have + int(answer.headers.get("Content-Length") or 0)
                goog = re.search(r"md5=([\w+/=]+)", ",".join(answer.headers.get_all("x-goog-hash") or ()))
                tag = re.fullmatch(r'"([0-9a-f]{32})"', answer.headers.get("ETag") or "")
                said = md5 or (base64.b64decode(goog[1]).hex() if goog else tag and tag[1])
                with open(part, "ab" if have else "wb") as f, tqdm(
                        total=whole or None, initial=have, unit="B", unit_scale=True, desc=path.name) as bar:
                    while block := answer.read(1 << 20):
                        f.write(block)
                        bar.update(len(block))
            if part.stat().st_size >= whole:
                break
            reason = f"{part.stat().st_size} of {whole} bytes came"
        except urllib.error.HTTPError as e:
            if e.code == 416:                                                    # all of it is here already
                said = md5
                break
            raise ValueError(f"{url}: the server says {e.code} {e.reason}; get {path.name} elsewhere and put it at "
                             f"{path}") from e
        except (OSError, ValueError) as e:
            reason = str(e) or type(e).__name__
        time.sleep(wait * attempt)
    else:
        raise ValueError(f"{url}: {tries} tries failed ({reason}); what came is kept, run this again")
    if said:
        with open(part, "rb") as f:
            found = hashlib.file_digest(f, "md5").hexdigest()
        if found != said:
            part.unlink()
            raise ValueError(f"{url}: wrong bytes (MD5 {found}, should be {said}); they are deleted, run this again")
    os.replace(part, path)
    return path


def fetch_set(name, root):
    """All files of a public set; archives are unpacked, and NoCaps's pictures fetched one by one. Missing pictures are
    counted, not fatal."""
    import zipfile
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm
    for file, (url, md5) in SOURCES[name].items():
        path = root / file
        if (root / path.stem / ".whole").exists():                                # unpacked before
            continue
        fetch(url, path, md5)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for member in tqdm(archive.namelist(), desc=f"unpacking {file}"):
                    archive.extract(member, root)
            (root / path.stem / ".whole").touch()
    if name != "nocaps":
        return 0

    def picture(row):
        try:
            return None if fetch(row["coco_url"], root / row["file_name"]) else None
        except ValueError as e:
            return str(e)
    rows = load(root / "nocaps_val_4500_captions.json")["images"]
    with ThreadPoolExecutor(8) as pool:
        wrong = [x for x in tqdm(pool.map(picture, rows), total=len(rows), desc="pictures") if x]
    for reason in wrong[:5]:
        print(f"data.py: {reason}", file=sys.stderr)
    return len(wrong)


def doorbell(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("set", choices=list(SOURCES), help="which public set to fetch")
    cli.add_argument("--root", type=Path, help="where to put it; default data/ and its name")
    args = cli.parse_args(argv)
    root = args.root or Path("data") / args.set
    try:
        wrong = fetch_set(args.set, root)
        items = read(root, "test" if args.set == "coco" else "nocaps")
    except (ValueError, OSError) as e:
        return print(f"data.py: {e}", file=sys.stderr) or 2
    there = sum(x.path.exists() for x in items)
    print(f"data.py: {root} has {len(items)} items of its evaluation split, {there} of their pictures"
          + (f"; {wrong} pictures could not be fetched: run this again" if wrong else ""))
    return 0


if __name__ == "__main__":
    sys.exit(doorbell())
