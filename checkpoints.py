"""What is trained, and the file that keeps it: weights, moments, settings.

    trained = unfreeze(captioner, generator, ("q", "q"))      # {name: parameter}
    save("out/finetune", step, trained, adam, settings)
    step = begun("out/finetune", settings)
    restore("out/finetune", step, trained, adam)

checkpoint.safetensors holds tensors alone, its header the settings, as JSON. It may come from
somebody else: settings are compared with those that were typed, and nothing else is done with them.
"""
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import loading
import records
from captioners import Captioner
from generators import Generator

SIDES = ("captioner", "generator")
PROJECTIONS = {"captioner": {"q": ".crossattention.self.query", "k": ".crossattention.self.key",
                             "v": ".crossattention.self.value"},
               "generator": {"q": ".attn2.to_q", "k": ".attn2.to_k", "v": ".attn2.to_v"}}


# ---------------------------------------------------------------- what is trained
class Wide(torch.nn.Module):
    """A linear layer with weights wider than the model around it, cast where they are used."""

    def __init__(self, linear):
        super().__init__()
        linear.float()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def unfreeze(captioner, generator, which, names, own=None):
    """{name: parameter} of what is trained, in float32 at least.

    which: of the captioner and of the generator q, kv, qkv or none: projections of cross-attention.
    Of BLIP-2 the query tokens are trained (q). names: of the losses; a side that none of them
    reaches stays frozen. own: whether ir teaches the captioner alone. ValueError: nothing is left.
    """
    found = {}
    letters = dict(zip(SIDES, which))
    if not {"tg", "ir", "tr"} & set(names):
        letters["captioner"] = "none"
    if not {"ig", "tr"} & set(names) and ("ir" not in names or own):
        letters["generator"] = "none"
    models = {"captioner": captioner.model, "generator": generator.unet}
    if captioner.learns_queries and letters["captioner"] != "none":
        if letters["captioner"] != "q":
            raise ValueError(f"--unfreeze {which[0]}: of BLIP-2 the query tokens are trained: q or "
                             "none")
        tokens = models.pop("captioner").query_tokens
        tokens.data = tokens.data.to(torch.promote_types(tokens.dtype, torch.float32))
        found["captioner.query_tokens"] = tokens.requires_grad_()
    for side, model in models.items():
        endings = tuple(PROJECTIONS[side][x] for x in letters[side] if x in "qkv")
        for name, module in list(model.named_modules()):
            if not name.endswith(endings):
                continue
            if module.weight.dtype.itemsize < 4:
                module = Wide(module)
                model.set_submodule(name, module)
            for key, parameter in module.named_parameters():
                found[f"{side}.{name}.{key}"] = parameter.requires_grad_()
    if not found:
        raise ValueError(f"--unfreeze {' '.join(which)}, --losses {' '.join(names)}: there is "
                         "nothing to train")
    return found


# ---------------------------------------------------------------- the file
def save(out, step, trained, adam, settings):
    """Written beside and renamed: a kill or a full disk leaves the older checkpoint whole."""
    libraries = ("torch", "transformers", "diffusers")
    about = {"step": step, "data": settings["data"], "settings": settings,
             "versions": {name: importlib.metadata.version(name) for name in libraries},
             "commit": commit()}
    tensors = {}
    for name, parameter in trained.items():
        tensors[name] = parameter.data
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"adam.{key}.{name}"] = adam.state[parameter][key]
    new = out / "checkpoint.new"
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, new, {"header": json.dumps(about)})
        with open(new, "rb+") as f:              # Windows syncs only what may be written
            os.fsync(f.fileno())
        os.replace(new, out / "checkpoint.safetensors")
        records.write_json(out / "checkpoint.json", about)
    except Exception as e:
        new.unlink(missing_ok=True)
        raise ValueError(f"step {step} could not be saved in {out} ({e}); what was saved before is "
                         "whole") from e


def commit():
    """The commit of this code, or None."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:                              # there is no git on this machine
        return None
    return said.stdout.strip() or None


def header(out):
    """{step, data, settings, versions, commit} of the checkpoint in a folder, or one sentence."""
    path = out / "checkpoint.safetensors"
    try:
        about = {"data": None, "settings": {}} | loading.header(path)
        if type(about.get("step")) is not int or not 1 <= about["step"] < 1e9:
            raise ValueError("its header is not of a run")
    except ValueError as e:
        raise ValueError(f"{path}: no checkpoint of a run ({e})") from e
    return about


def begun(out, settings):
    """Claims a folder; the step that its checkpoint is of, 0 where there is none. ValueError where
    it is of another run, or log.jsonl of none."""
    ours = (out / "checkpoint.safetensors").exists() or (out / "log.jsonl").exists()
    records.claim(out, () if ours else ("checkpoint.json", "log.png"))
    log_rows(out / "log.jsonl")
    if not (out / "checkpoint.safetensors").exists():
        return 0
    about = header(out)
    check_same(out, about["settings"] | {"data": about["data"]}, settings)
    return about["step"]


def check_same(out, before, now):
    """ValueError where what a checkpoint is made of is not what was typed. Nothing of it is
    followed: somebody else may have written it."""
    same = {key for key, value in now.items() if before.get(key) == value}
    same |= {key.removesuffix(" files") for key in same}             # a folder may have moved
    other = [f"{key} was {ascii(before.get(key))[:200]}, is {value!r}"
             for key, value in now.items() if key not in same]
    if other:
        raise ValueError(f"{out} was trained otherwise ({'; '.join(other)}): type the same, or "
                         "choose another --out")


def restore(out, step, trained, adam):
    """Puts weights and moments back. Refuses those of other models."""
    tensors = load_file(out / "checkpoint.safetensors")
    loading.check_numbers(tensors, str(out))
    for name, parameter in trained.items():
        keys = name, f"adam.exp_avg.{name}", f"adam.exp_avg_sq.{name}"
        for key in keys:
            if key not in tensors or tensors[key].shape != parameter.shape:
                raise ValueError(f"{out} has no {key} {tuple(parameter.shape)}: it is not a "
                                 "checkpoint of these models")
        weight, mean, square = [tensors[key].to(parameter) for key in keys]
        parameter.data.copy_(weight)
        count = torch.tensor(float(step))
        adam.state[parameter] = {"step": count, "exp_avg": mean, "exp_avg_sq": square}


def export(out, settings, folder):
    """Writes both models, with their trained weights, as stock directories."""
    models = {key: value for key, value in settings.items() if key.startswith(SIDES)}
    check_same(out, header(out)["settings"], models)
    captioner = Captioner.load(settings["captioner"], "cpu")
    generator = Generator.load(settings["generator"], "cpu")
    count = loading.load_trained(out, captioner, generator)
    captioner.save(folder / "captioner")
    generator.pipe.save_pretrained(folder / "generator")
    print(f"finetune.py: {count} trained tensors; {folder}/captioner and {folder}/generator are "
          "stock directories")
    return 0


# ---------------------------------------------------------------- what a person looks at
def log_rows(path):
    """The rows of log.jsonl, of a step each. ValueError for what is none."""
    rows = records.read_rows(path)
    for number, row in enumerate(rows, 1):
        records.the(row, "step", int, f"{path}, line {number}")
    return rows


def plot(out, names):
    """log.png: each loss of log.jsonl by step, trained and held out; without matplotlib a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("finetune.py: no log.png: pip install matplotlib")
        return
    rows = log_rows(out / "log.jsonl")
    held = [row["held"] | {"step": row["step"]} for row in rows if "held" in row]
    lines = ("trained on", rows, "-"), ("held out", held, "o-")
    figure = Figure(figsize=(3.4 * len(names), 3), layout="constrained")
    for name, axis in zip(names, figure.subplots(1, len(names), squeeze=False)[0]):
        for label, some, style in lines:
            points = [(row["step"], row[name]) for row in some if row.get(name) is not None]
            axis.plot(*zip(*points), style, label=label)
        axis.set(title=name, xlabel="step")
    axis.legend()
    with records.writing(out / "log.png"):
        figure.savefig(out / "log.png", dpi=110)
