"""What is trained, and the file that keeps it: weights, moments, settings.

    trained = unfreeze(captioner, generator, ("q", "q"))      # {name: parameter}
    save("out/finetune", step, trained, adam, settings, content)
    step = restore("out/finetune", trained, adam, settings, content)

checkpoint.safetensors holds tensors alone, its header the settings, as JSON. It may come from
somebody else: `check_settings` and `foreign` say what of it is taken over, which is numbers,
switches and names that are built in. No folder, hub id or code that a file names is followed.
"""
import importlib.metadata
import json
import os
import shlex
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import loading
import records
from captioners import CAPTIONERS, Captioner
from generators import GENERATORS, Generator

HERE = Path(__file__).resolve().parent
SIDES = ("captioner", "generator")
PROJECTIONS = {"captioner": {"q": ".crossattention.self.query", "k": ".crossattention.self.key",
                             "v": ".crossattention.self.value"},
               "generator": {"q": ".attn2.to_q", "k": ".attn2.to_k", "v": ".attn2.to_v"}}
SPLITS = ("train", "all", "restval", "val", "test", "in", "near", "out", "nocaps")
BUILT_IN = {"captioner": CAPTIONERS, "generator": GENERATORS, "data": ("miniature",),
            "split": SPLITS, "own": SPLITS, "decoder": ("exact", "tiny"), "cache": ()}
# what a resumed run shares with the one it continues; all the rest is speed, memory and places
TRAINING = ("captioner", "generator", "split", "losses", "weights", "unfreeze", "bridge", "batch",
            "lr", "clip", "thin", "decoder", "seed", "dtype", "side")
RETIRED = {"temperature": 1.0, "tmax": None}     # of older versions, at what they mean today


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
        endings = tuple(PROJECTIONS[side][x] for x in letters[side].replace("none", ""))
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
def save(out, step, trained, adam, settings, content):
    """Written beside and renamed: a kill or a full disk leaves the older checkpoint whole."""
    libraries = ("torch", "transformers", "diffusers")
    about = {"step": step, "data": content, "settings": settings,
             "versions": {name: importlib.metadata.version(name) for name in libraries},
             "commit": commit()}
    tensors = {}
    for name, parameter in trained.items():
        tensors[name] = parameter.detach().contiguous()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"adam.{key}.{name}"] = adam.state[parameter][key].contiguous()
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
        said = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout
    except OSError:                              # there is no git on this machine
        return None
    return said.strip() or None


def header(out):
    """{step, data, settings, versions, commit} of the checkpoint in a folder, or one sentence."""
    path = out / "checkpoint.safetensors"
    try:
        about = loading.header(path)
        kinds = [type(about[k]) for k in ("step", "data", "settings")]
        if kinds != [int, str, dict] or about["step"] < 1:
            raise ValueError("its header is not of a run")
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: no checkpoint to go on from ({e})") from e
    for key, neutral in RETIRED.items():
        if about["settings"].get(key, ...) == neutral:
            del about["settings"][key]
    return about


def check_out(out, resume):
    """Refuses a folder that holds another run, or is in use; a log.jsonl of somebody else's."""
    records.check_free(out)
    log_rows(out / "log.jsonl")
    if (out / "checkpoint.safetensors").exists() and not resume:
        raise ValueError(f"{out} holds a training run: --resume goes on with it, another --out "
                         "begins anew")


def restore(out, trained, adam, settings, content):
    """Puts weights and moments back; the step they are of. Refuses other settings or models."""
    about = header(out)
    before = about["settings"] | {"data": about["data"]}
    now = {key: settings[key] for key in TRAINING} | {"data": content}
    moved = foreign(about["settings"])           # models of a folder may lie elsewhere now
    other = [f"{k} was {before.get(k)}, is {v}" for k, v in now.items()
             if before.get(k) != v and (k not in moved or k == "data")]
    if other:
        raise ValueError(f"--resume: {out} was trained otherwise ({'; '.join(other)}): choose "
                         "another --out")
    tensors = load_file(out / "checkpoint.safetensors")
    loading.check_numbers(tensors, f"--resume: {out}")
    for name, parameter in trained.items():
        keys = name, f"adam.exp_avg.{name}", f"adam.exp_avg_sq.{name}"
        for key in keys:
            if key not in tensors or tensors[key].shape != parameter.shape:
                raise ValueError(f"--resume: {out} has no {key} {tuple(parameter.shape)}: it is "
                                 "not a checkpoint of these models")
        weight, mean, square = [tensors[key].to(parameter) for key in keys]
        parameter.data.copy_(weight)
        step = torch.tensor(float(about["step"]))
        adam.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    known = {key: settings[key] for key in ("captioner", "generator", "losses", "lr", "batch")}
    if records.rank_and_world()[0] == 0:
        print(f"finetune.py: {out} goes on after step {about['step']}: "
              f"{typed(known)}")
    return about["step"]


def export(out, captioner, generator, folder):
    """Writes both models, with their trained weights, as stock directories."""
    captioner = Captioner.load(captioner, "cpu")
    generator = Generator.load(generator, "cpu")
    count = loading.load_trained(out, captioner, generator)
    captioner.save(folder / "captioner")
    generator.pipe.save_pretrained(folder / "generator")
    print(f"finetune.py: {count} trained tensors; {folder}/captioner and {folder}/generator are "
          "stock directories")
    return 0


# ---------------------------------------------------------------- what others may have written
def check_settings(settings, cli, kept, out):
    """Refuses settings that no command line could have made: they are typed again, and compared.

    cli: a parser whose errors are ValueErrors. kept: from its arguments to settings.
    """
    known = kept(cli.parse_args([]))
    words = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        strings = [x for x in values if isinstance(x, str)]
        odd = [x for x in strings if x.startswith("-") or not x.isprintable()]
        if key not in known or odd:
            raise ValueError(f"{out}: its settings have {ascii(key)[:80]}: {ascii(value)[:80]}")
        if value is True:
            words.append(f"--{key}")
        elif value is not None and value is not False:
            words += [f"--{key}", *map(str, values)]
    try:
        made = kept(cli.parse_args(words))
    except ValueError as e:
        raise ValueError(f"{out}: its settings have a fault: {ascii(str(e))[:200]}") from e
    wrong = [key for key, value in settings.items() if made[key] != value]
    if wrong:
        raise ValueError(f"{out}: its settings have what cannot be: {', '.join(wrong)}")


def foreign(settings):
    """{flag: value} of what leads out of this program: a folder, a file, a hub id, code."""
    found = {}
    for key, names in BUILT_IN.items():
        if settings.get(key) is not None and settings[key] not in names:
            found[key] = settings[key]
    return found


def typed(settings):
    """Settings as they are typed."""
    words = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *map(str, values)]
    return shlex.join(words)


def again(out, settings, device, processes):
    """The command that goes on with a run, as it is typed."""
    launch = "python" if processes == 1 else f"torchrun --nproc_per_node={processes}"
    places = {"out": str(out)} | ({"device": device} if device else {}) | foreign(settings)
    return f"{launch} finetune.py --resume {typed(places)}"


def refuse(unsaid, out, argv):
    """Says what a checkpoint names and the command line does not. Code has to be typed by hand."""
    code = [v for k, v in unsaid.items() if k in SIDES and ".py:" in v]
    if code:
        raise ValueError(f"{out} was trained with {typed(unsaid)}: {code[0]} is code. It runs only "
                         "where the command line names it; do so if you know what it does")
    raise ValueError(f"{out} was trained with {typed(unsaid)}: what a file names is not followed "
                     "unasked. Say the same, or where it lies now: "
                     f"python finetune.py {shlex.join(argv)} {typed(unsaid)}")


# ---------------------------------------------------------------- what a person looks at
def log_rows(path):
    """The rows of log.jsonl, of a step each. ValueError for what is none."""
    rows = records.read_rows(path)
    for number, row in enumerate(rows, 1):
        records.the(row, "step", int, f"{path}, line {number}")
    return rows


def plot(out, names):
    """log.png: each loss of log.jsonl by step, and of the held-out samples. Without matplotlib, a
    line in its place."""
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
