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
"""
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
SETS = {"miniature": HERE / "miniature/data"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DOMAINS = {"in": "in-domain", "near": "near-domain", "out": "out-domain"}


@dataclass
class Item:
    """A picture of a set: its name (unique in the set), its file, its captions, and for NoCaps its domain."""
    name: str
    path: Path
    captions: list = field(default_factory=list)
    domain: str | None = None


# ---------------------------------------------------------------- sets
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
            said.setdefault(row["file_name"], []).append(fold(row["text"]))
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"no pictures in {root}: expected files ending in {' '.join(sorted(SUFFIXES))}")
    names = [p.relative_to(root).as_posix() for p in paths]
    return [Item(name, path, said.get(name, [])) for name, path in zip(names, paths)]


def load(path):
    """A JSON file, or one clear sentence."""
    if not path.exists():
        raise ValueError(f"{path} is missing: put it there")
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
