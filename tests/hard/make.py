"""What bad inputs are made of: small functions that write a file, each called with its path.

    build(folder, {"set": karpathy, "set/dataset_coco.json": edit("images", 0, "split", DROP)})

A file's content is text, bytes, a function of the path, a tuple of these one after another, or else
a value that is written as JSON. Files are made in order: a later one may change an earlier one.
"""
import io
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "miniature/data"
SECRET = (255, 0, 254)                           # the colour of what nobody may see
TEXT = "nobody may read this\n"
DROP = ...                                       # in place of a value: the key is taken out
# what a pickle does that is loaded without care
PAYLOAD = b"cposix\nsystem\n(S'touch owned'\ntR."


def build(folder, files):
    for name, content in files.items():
        path = Path(os.fsdecode(folder), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            for part in content:
                build(folder, {name: part})
        elif callable(content):
            content(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- files of any kind
def changed(function):
    """A file's bytes, changed."""
    def write(path):
        path.write_bytes(function(path.read_bytes()))
    return write


def cut(share):
    return changed(lambda data: data[:int(len(data) * share)])


def gone(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def link(target):
    return lambda path: path.symlink_to(target)


def fifo(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir(parents=True, exist_ok=True)


def copy(source):
    return lambda path: shutil.copytree(ROOT / source, path, dirs_exist_ok=True)


def noise(size=4000, seed=0):
    return np.random.default_rng(seed).bytes(size)


# ---------------------------------------------------------------- JSON
def edit(*keys):
    """The value at these keys of a .json or .jsonl file (whose first key is a row) becomes the last
    argument; DROP: the key is taken out. No keys: the whole document."""
    *keys, value = keys

    def write(path):
        lines = path.suffix == ".jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        found = [json.loads(row) for row in text.splitlines()] if lines else json.loads(text)
        found = put(found, keys, value)
        rows = found if lines and isinstance(found, list) else [found]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return write


def put(found, keys, value):
    """A document with another value at these keys."""
    if not keys:
        return value
    first, *rest = keys
    first = str(first) if isinstance(found, dict) else first
    if value is DROP and not rest:
        del found[first]
    else:
        inner = found[first] if rest else None
        found[first] = put(inner, rest, value)
    return found


# ---------------------------------------------------------------- encodings and shapes of text
TEXTS = {
    "UTF-16": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: text.replace("a", "\xe4").encode("latin-1"),
    "with a BOM": lambda text: text.encode("utf-8-sig"),
    "of noise": lambda text: noise(),
    "of NUL bytes": lambda text: bytes(4096),
    "empty": lambda text: b"",
    "of 100,000 brackets": lambda text: b"[" * 100_000,
    "of a line of 10 MB": lambda text: b"a red ring " * 1_000_000}


# ---------------------------------------------------------------- pictures
def scene(number, split="test"):
    """A picture of the miniature world."""
    return lambda path: shutil.copy2(WORLD / split / f"{number:04d}.png", path)


def picture(kind="PNG", mode="RGB", size=(32, 32), colour=(200, 60, 60), **options):
    """The bytes of a picture of one colour."""
    image = Image.new("RGB", size, colour).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def secret(path):
    path.write_bytes(picture(colour=SECRET))


def flipped(kind, seed, count=8):
    """A picture of noise with some bytes flipped after the beginning."""
    dice = np.random.default_rng(seed)
    mode = {"BLP": "P", "SPIDER": "F", "GIF": "P"}.get(kind, "RGB")
    file = io.BytesIO()
    pixels = dice.integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    data = bytearray(file.getvalue())
    for place in dice.integers(4, len(data), count):
        data[place] = dice.integers(256)
    return bytes(data)


def chunk(kind, data):
    """A chunk of a PNG without a right checksum."""
    return struct.pack(">I", len(data)) + kind + data + bytes(4)


# ---------------------------------------------------------------- sets of four pictures
SAID = [f"a {colour} ring on a wall" for colour in ("red", "blue", "green", "gray")]


def pictures(path):
    for i in range(4):
        build(path, {f"{i}.png": scene(i)})


def karpathy(path):
    """Two pictures of test, one of val, four of train."""
    pictures(path)
    rows = []
    for i, split in enumerate(("test", "test", "val", "train", "train", "train", "train")):
        rows.append({"filename": f"{i % 4}.png", "cocoid": i, "split": split,
                     "sentences": [{"raw": SAID[i % 4]}, {"raw": f"{SAID[i % 4]} there"}]})
    build(path, {"dataset_coco.json": {"images": rows}})


def blip(path):
    pictures(path)
    rows = [{"image": f"{i}.png", "caption": [SAID[i], "a ring"]} for i in range(4)]
    build(path, {"coco_karpathy_test.json": rows})


def nocaps(path):
    pictures(path)
    images, said = [], []
    for i in range(4):
        domain = ("in-domain", "out-domain")[i % 2]
        images.append({"id": i, "file_name": f"{i}.png", "domain": domain})
        said += [{"image_id": i, "caption": SAID[i]}, {"image_id": i, "caption": "a ring"}]
    build(path, {"nocaps_val_4500_captions.json": {"images": images, "annotations": said}})


def imagefolder(path):
    pictures(path)
    rows = [json.dumps({"file_name": f"{i}.png", "text": SAID[i]}) for i in range(4)]
    build(path, {"metadata.jsonl": "\n".join(rows) + "\n"})


# ---------------------------------------------------------------- checkpoints and models
def tensors(function=None, header=None):
    """A safetensors file whose tensors and whose metadata are changed, each by a function."""
    def write(path):
        from safetensors import safe_open
        from safetensors.torch import save_file
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
            about = file.metadata()
        found = function(found) if function else found
        save_file(found, path, header(about) if header else about)
    return write


def head(*keys):
    """`edit` of the header that finetune.py writes."""
    *keys, value = keys
    return tensors(None, lambda about: {"header": json.dumps(put(json.loads(about["header"]), keys, value))})


def all_nan(found):
    return {name: x.clone().fill_(float("nan")) if x.is_floating_point() else x for name, x in found.items()}


def each(change):
    return lambda found: {name: change(x) for name, x in found.items()}


def without(part):
    return lambda found: {name: x for name, x in found.items() if part not in name}


def long_header(path):
    path.write_bytes(struct.pack("<Q", 2 ** 60) + b"{}")


def pickled(path):
    """As torch.save writes it."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", PAYLOAD)
        file.writestr("archive/version", "3\n")


# ---------------------------------------------------------------- models from file.py:function
DRAW = """import sys, torch
class Model:
    def draw(self, captions, items=None, seed=0, **settings):
        n = len(captions)
        {body}
def load(device, dtype):
    return Model()
"""
SPEAK = """import sys, torch
class Model:
    def speak(self, images, n=10, way="top-p", seed=0, items=None, **settings):
        b = len(images)
        {body}
def load(device, dtype):
    return Model()
"""


def draws(body):
    return DRAW.replace("{body}", body)


def speaks(body):
    return SPEAK.replace("{body}", body)
