"""The real models at full size, hub layout, random weights, through the project's own loading.

    python tests/full.py --photo photo.jpg           # vitb, vitl, sd14 on a CPU; 7 GB of disk
    python tests/full.py vitb vitl blip2 sd14        # on a GPU, in bfloat16; 8 GB more

Files, configurations (hub.json) and names of tensors are the hub's; vocabularies have the hub's
sizes, with made-up words. blip2 alone is as `lab.bench real` builds it. Nothing is downloaded.
Each model is loaded in a fresh process, which prints a line of JSON; $OUT/full.jsonl has them, too.
MiB are beyond the imports; weights are mapped from their file, whose pages are `file`, not `anon`.
"""
import argparse
import contextlib
import json
import math
import os
import random
import string
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
HUB = json.loads((ROOT / "tests/hub.json").read_text())
PARAMETERS = {"vitb": 223_971_644, "vitl": 446_290_492, "sd14": 1_066_235_307}


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("names", nargs="*", default=list(PARAMETERS), help="vitb, vitl, blip2, sd14")
    p.add_argument("--work", type=Path, default=ROOT / "out/full", help="where they are built")
    p.add_argument("--photo", type=Path, help="a picture; default one of the miniature's world")
    p.add_argument("--steps", type=int, default=0, help="sd14 also draws, in so many steps")
    p.add_argument("--one", action="store_true", help="load the named model in this process")
    return p.parse_args()


# ---------------------------------------------------------------- building
def vocabulary(name, folder):
    """As many entries as the hub's, special tokens in their places, made-up words."""
    from transformers import AutoTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    if name == "sd14":
        letters = list(bytes_to_unicode().values())
        pairs = [(a, b + end) for end in ("</w>", "") for a in letters for b in letters][:48894]
        words = [*letters, *[c + "</w>" for c in letters], *[a + b for a, b in pairs]]
        words += ["<|startoftext|>", "<|endoftext|>"]
        merges = ["#version: 0.2", *[f"{a} {b}" for a, b in pairs]]
        ids = {w: i for i, w in enumerate(words)}
        (folder / "tokenizer/vocab.json").write_text(json.dumps(ids))
        (folder / "tokenizer/merges.txt").write_text("\n".join(merges) + "\n")
        return
    words = ["[PAD]", *[f"[unused{i}]" for i in range(99)], "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["picture", "of", *string.ascii_lowercase]
    dice = random.Random(0)
    words = dict.fromkeys(words)
    while len(words) < 30522:
        words["".join(dice.choices(string.ascii_lowercase, k=6))] = None
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


def as_hub(part, state):
    """The state under the names of then: the VAE's, old buffers, BLIP's own copy of its head."""
    import torch
    if part == "vae":
        old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
        for new in old:
            state = {k.replace(new, old[new] if ".attentions." in k else new): v
                     for k, v in state.items()}
    if part == "text_encoder":
        state = {"text_model." + k.removeprefix("text_model."): v for k, v in state.items()}
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if part == "blip":
        bert, head = "text_decoder.bert.embeddings.", "text_decoder.cls.predictions."
        state[bert + "position_ids"] = torch.arange(512)[None]
        state[head + "decoder.weight"] = state[bert + "word_embeddings.weight"].clone()
        state[head + "decoder.bias"] = state[head + "bias"].clone()
    return state


def built(name, work):
    """The folder of a model in float32, blip2 in bfloat16; `ready` holds the sum of |weight|."""
    import torch
    from safetensors.torch import save_file

    from lab import bench
    if name == "blip2":
        return bench.built(name, work)
    folder = work / name
    if (folder / "ready").exists():
        return folder
    for file, config in HUB[name].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(config, indent=2) + "\n")
    vocabulary(name, folder)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = bench.whole(name, None)
    parts = {"blip": model}
    if name == "sd14":
        parts = {part: getattr(model, part) for part in ("unet", "vae", "text_encoder")}
    for part, model in parts.items():
        state = as_hub(part, {k: v.cpu().contiguous() for k, v in model.state_dict().items()})
        place = folder if part == "blip" else folder / part
        stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        if name == "vitb":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            save_file(state, place / f"{stem}.safetensors", {"format": "pt"})
    (folder / "ready").write_text(str(total(parts.values())))
    return folder


def total(models):
    return sum(p.detach().double().abs().sum().item() for m in models for p in m.parameters())


# ---------------------------------------------------------------- loading, a process each
def memory():
    """MiB of this process: now, at most, and what of it is its own or pages of files (Linux)."""
    lines = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    names = {"rss": "VmRSS", "peak": "VmHWM", "anon": "RssAnon", "file": "RssFile"}
    return {k: round(int(lines[v].split()[0]) / 1024) for k, v in names.items() if v in lines}


def one(args):
    import torch

    import cycle
    import data
    import losses
    from captioners import Captioner
    from generators import Generator
    from miniature import world
    name, draws = args.names[0], args.names[0] == "sd14"
    kind = Generator if draws else Captioner
    kind.load("miniature", "cpu")                                # the imports, which do not count
    image = torch.from_numpy(world.draw(world.sample("test", 0)).copy()).permute(2, 0, 1) / 255
    image = data.open_image(args.photo) if args.photo else image
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")            # the peak begins anew
    before, text = memory(), "two cats on a sofa"

    def since():
        return {k: v - before["rss" if k == "peak" else k] for k, v in memory().items()}
    start = time.perf_counter()
    speaker = kind.load(str(args.work / name))
    row = {"model": name, "device": str(speaker.device), "dtype": str(speaker.dtype).split(".")[1],
           "load s": time.perf_counter() - start, "load MiB": since()}
    start = time.perf_counter()
    if draws:
        loss = losses.score(speaker, image, [text], *cycle.noises(speaker, draws=2))
        row["score"] = -loss.mean().item()
    else:
        row["caption"] = speaker.speak(image[None], 1)[0][0][0]
    row |= {"use s": time.perf_counter() - start, "use MiB": since()}
    if draws and args.steps:
        start = time.perf_counter()
        row["drawn"] = list(speaker.draw([text], steps=args.steps).shape)
        row["draw s"] = time.perf_counter() - start
    if speaker.device.type == "cuda":
        row["GPU GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
    models = [speaker.unet, speaker.vae, speaker.text_encoder] if draws else [speaker.model]
    row["parameters"] = sum(p.numel() for m in models for p in m.parameters())
    row["weights MiB"] = sum(p.nbytes for m in models for p in m.parameters()) / 2 ** 20
    row["wrong"] = wrong(name, row, total(models), args.work / name / "ready")
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}))
    return bool(row["wrong"])


def wrong(name, row, weights, ready):
    """What is not as it should be."""
    whole = row["dtype"] == "float32"
    found = []
    if row["parameters"] != PARAMETERS.get(name, row["parameters"]):
        found += [f"{PARAMETERS[name]} parameters expected"]
    if name in PARAMETERS:
        written = float(ready.read_text())
        if not math.isclose(weights, written, rel_tol=1e-9 if whole else 1e-3):
            found += [f"sum of |weight| {weights}, {written} was written"]
    if not math.isfinite(row.get("score", 0)) or row.get("caption") == "":
        found += ["nothing was said"]
    if whole and row["use MiB"].get("peak", 0) > 1.5 * row["weights MiB"]:
        found += ["more than half as much memory again as the weights"]
    return found


def main(args):
    if args.one:
        return one(args)
    rows, failed = [], 0
    for name in args.names:
        start = time.perf_counter()
        built(name, args.work)
        print(f"{name}: built in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        command = [sys.executable, __file__, name, "--one", "--work", args.work]
        command += (["--photo", args.photo] if args.photo else []) + ["--steps", str(args.steps)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(out.stdout, end="", flush=True)
        rows += [out.stdout]
        failed += out.returncode != 0
        if "OUT" in os.environ:
            Path(os.environ["OUT"], "full.jsonl").write_text("".join(rows))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(flags()))
