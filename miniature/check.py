"""Is the miniature good enough to mean something?

    python -m miniature.check --threads 2         # the shipped models: six minutes on two cores

Scenes nothing was trained on are described, reconstructed and drawn (50 steps, guidance 7.5); a
convnet that judged nothing reads the pictures back. Each figure is printed with its 95 % interval
beside the bar it has to clear, and written into WORK/check.json; check_*.png are pictures to look
at before believing a number. Exits 1 if a bar was missed.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import script
from captioners import Captioner
from generators import Generator
from miniature import world

HERE = Path(__file__).resolve().parent
DOMAINS = {"in": "test", "near": "near", "out": "out"}
BARS = {
    "captioner facts, in": .90, "captioner facts, in - out": .05, "generator pairs, in": .85,
    "generator pairs, near": .85, "generator pairs, out": .85, "vae pairs": .97,
    "captions distinct of 10": 3.0,
}


def flags(argv=None):
    p = script.Parser(__doc__)
    p.add_argument("--models", type=Path, default=HERE, help="the folder that train.py made")
    p.add_argument("--work", type=Path, default=HERE.parent / "runs/miniature", help="what is made")
    p.add_argument("--scenes", type=int, default=300, help="held-out scenes a domain")
    p.add_argument("--threads", type=int, default=1, help="processor threads")
    return p.parse_args(argv)


def right(eye, pictures, scenes):
    """For each picture, whether the colour-shape pairs read back are those of its scene."""
    seen = map(world.colour_shapes, world.read_back(eye, pictures))
    true = map(world.colour_shapes, scenes)
    return np.array([a == b for a, b in zip(seen, true)])


def measure(scenes, captioner, generator, eye):
    """{figure: a value for each scene}, and the pictures to look at."""
    images = torch.stack([world.picture(s) for s in scenes])                # (n, 3, 32, 32)
    said, _ = captioner.speak(images, 1, "beam")
    facts = np.array([world.verify(c[0], s) for c, s in zip(said, scenes)])     # (n, 2)
    ten, _ = captioner.speak(images[:100], 10)
    with torch.no_grad():
        redrawn = [generator.decode(generator.encode(x)[0]) for x in images.split(100)]
    redrawn = torch.cat(redrawn).clamp(0, 1)
    prompts = [world.full_caption(s) for s in scenes]
    drawn = generator.draw(prompts, seed=1, batch=50)
    found = {
        "captioner facts": facts[:, 0] / np.maximum(1, facts[:, 1]),
        "captions distinct of 10": np.array([len(set(row)) for row in ten]),
        "real pairs": right(eye, images, scenes),
        "vae pairs": right(eye, redrawn, scenes),
        "generator pairs": right(eye, drawn, scenes),
    }
    return found, torch.cat([images[:12], redrawn[:12], drawn[:60]])


def sheet(images, path):
    """Pictures (N, 3, 32, 32) in rows of twelve, three times larger."""
    images = images[:len(images) // 12 * 12].clamp(0, 1).mul(255).round().byte()
    tiles = F.pad(images, (1, 1, 1, 1), value=255).unflatten(0, (-1, 12))   # (rows, 12, 3, 34, 34)
    pixels = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()
    Image.fromarray(pixels.repeat(3, 0).repeat(3, 1)).save(path)


def intervals(found):
    """{figure: (mean, low, high, n)} with 95 % bootstrap intervals."""
    rng = np.random.default_rng(0)
    figures = {}
    for name, values in found.items():
        n = len(values)
        rows = rng.integers(n, size=(1000, n))
        means = values[rows].mean(1)
        low, high = np.quantile(means, (.025, .975))
        figures[name] = (float(values.mean()), low, high, n)
    within, a, b, n = figures["captioner facts, in"]
    outside, c, d, _ = figures["captioner facts, out"]
    gap = within - outside
    wide = math.hypot(b - a, d - c) / 2
    figures["captioner facts, in - out"] = (gap, gap - wide, gap + wide, n)
    return figures


def main(args):
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    captioner = Captioner.load(args.models / "blip", "cpu")
    generator = Generator.load(args.models / "sd", "cpu")
    eye = world.reader(args.models / "reader/model.safetensors")
    found = {}
    for domain, split in DOMAINS.items():
        scenes = [world.sample(split, 10_000 + i) for i in range(args.scenes)]  # not those shipped
        values, pictures = measure(scenes, captioner, generator, eye)
        sheet(pictures, args.work / f"check_{domain}.png")
        for name, row in values.items():
            found[f"{name}, {domain}"] = row
    for name in ("captions distinct of 10", "real pairs", "vae pairs"):
        parts = [found[f"{name}, {domain}"] for domain in DOMAINS]
        found[name] = np.concatenate(parts)
    rows = {}
    missed = False
    for name, (value, low, high, n) in intervals(found).items():
        bar = BARS.get(name)
        rows[name] = dict(value=value, low=low, high=high, n=n, bar=bar)
        line = f"{name:30s} {value:6.3f} [{low:.3f}, {high:.3f}] n={n}"
        if name in BARS:
            line += f"   bar {bar}"
        if value < BARS.get(name, 0):
            line += "  MISSED"
            missed = True
        print(line)
    (args.work / "check.json").write_text(json.dumps(rows))
    return int(missed)


if __name__ == "__main__":
    script.run(main, flags)
