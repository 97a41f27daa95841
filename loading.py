"""From a model's name to its weights on a device: the hub, files, failures, trained weights.

    place, options = resolve("vitb", {"vitb": "Salesforce/blip-image-captioning-base"}, "captioner")
    with readable_errors("vitb", "captioner"):
        model = BlipForConditionalGeneration.from_pretrained(place, **options)

The hub is asked in `fetch` and nowhere else. What comes back is a folder on this machine, and all
that is loaded is read from such a folder: safetensors, or .bin by torch's restricted loader where
there is nothing else. Nothing that is loaded runs code, but for a `file.py:function` that the
command line names. Whatever fails is a ValueError of one line, with its cause and the remedy.
Copy this file with records.py: it needs torch, transformers, safetensors and huggingface_hub.
"""
import contextlib
import difflib
import importlib
import os
import re
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub import (
    HfApi,
    constants,
    errors,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import records

# weights as the libraries name them: no half-precision copies, no single files of other programs
WEIGHTS = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-(\d+))?\.(safetensors|bin)")
TEXTS = (".json", ".txt", ".model", ".jinja")    # configurations, vocabularies, chat templates
INDEX = "model_index.json"                       # of a pipeline: its parts
WEIGHTLESS = re.compile("Tokenizer|Processor|Extractor|Scheduler")
REVISIONS = {}                                   # hub id -> commit, of all this process has opened


# ---------------------------------------------------------------- names
def resolve(name, table, kind, cached=False):
    """(folder, keyword arguments of from_pretrained) of a model's name.

    name: one of `table`, a directory, a .safetensors file, or a hub id where it can be nothing
    else. kind: what it is, for messages. cached: only what the hub's cache already holds.
    """
    what = f"{kind} {str(name)!r}"
    repo = str(table.get(name, name))            # as a path it would lose its ./
    place = Path(repo)
    try:
        if place.suffix == ".py":
            raise ValueError("a model from a file is file.py:function")
        if not place.exists():
            if repo.count("/") != 1 or repo.startswith((".", "/")):
                known = f"none of {', '.join(table)}, " if table else ""
                near = difflib.get_close_matches(repo.lower(), table, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"it is {known}no directory and no hub id (owner/name){meant}")
            place = fetch(repo, what, cached)
        old = check_weights(place) if place.is_dir() else check_file(place)
    except (OSError, ValueError) as e:
        raise ValueError(f"{what}: {' '.join(str(e).split())}") from e
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    if old:
        options["use_safetensors"] = None        # .bin of those parts that have nothing else
        print(f"{what}: no safetensors in {', '.join(old)}; its .bin is read through torch's "
              "restricted loader", file=sys.stderr)
    return str(place), options


def is_local(name):
    """Whether opening it needs no hub."""
    return name == "miniature" or Path(name).exists() or ".py:" in str(name)


# ---------------------------------------------------------------- the hub
def fetch(repo, what, cached=False):
    """The folder of a hub repository in the hub's own cache, with all that `needed` tells of it.

    What is missing is fetched, after a line that says how much. Where the hub can't be had, what
    the cache holds will do if it is whole. Raises OSError with the cause.
    """
    try:
        if cached:
            raise FileNotFoundError(f"{repo} is not in the hub's cache; nothing is fetched unasked")
        # 1) one look at the repository: its commit and its files
        commit = HfApi().model_info(repo, timeout=10).sha
        tree = HfApi().list_repo_tree(repo, revision=commit, recursive=True)
        sizes = {x.path: getattr(x, "size", 0) for x in tree}
        parts = {}
        if INDEX in sizes:
            parts = parts_of(hf_hub_download(repo, INDEX, revision=commit))
        wanted = needed(sizes, parts)
        # 2) what of it is not here yet
        known = [try_to_load_from_cache(repo, n, revision=commit) for n in wanted]
        missing = [n for n, path in zip(wanted, known) if not isinstance(path, str)]
        if missing:
            size = sum(sizes[n] for n in missing) / 1e6
            print(f"{what}: fetching {size:,.1f} MB of {repo} into {constants.HF_HUB_CACHE}",
                  file=sys.stderr)
        folder = Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as e:                       # the hub's clients have no common class of errors
        folder = from_cache(repo, e)
        if not cached and not constants.HF_HUB_OFFLINE:
            print(f"{what}: as the hub's cache has it; {cause(e, repo)}", file=sys.stderr)
    REVISIONS[repo] = folder.name
    return folder


def from_cache(repo, error):
    """The cached folder of a repository, if it is whole; else OSError with the cause of `error`."""
    try:
        # of its texts the hub's client knows whether they are whole, of weights check_weights
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
        parts = parts_of(folder / INDEX) if (folder / INDEX).exists() else {}
        places = [f"{part}/*" for part in parts] or ["*"]
        texts = [place + end for place in places for end in TEXTS]
        other = [place + "/*" for place in places]
        snapshot_download(repo, local_files_only=True, allow_patterns=texts, ignore_patterns=other)
        check_weights(folder)
    except (OSError, ValueError):
        raise OSError(cause(error, repo)) from error
    return folder


def parts_of(index):
    """{folder: class} of the parts that a pipeline's model_index.json names. No safety checker: a
    picture that it blackens could not be compared."""
    named = records.load_json(index)
    if not isinstance(named, dict):
        raise ValueError(f"{index}: expected {{part: [library, class]}}")
    parts = {}
    for name, kind in named.items():
        if isinstance(kind, list) and len(kind) == 2 and kind[1]:
            if not isinstance(kind[1], str) or "/" in name:
                raise ValueError(f"{index}: {name!r} is no part of a pipeline")
            parts[name] = kind[1]
    parts.pop("safety_checker", None)
    return parts


def needed(names, parts=()):
    """Of a repository's file names those that a model, or the parts of a pipeline, are loaded from.

    Configurations, vocabularies, and each folder's weights: safetensors, or .bin where there are
    none. No code, and nothing of other folders.
    """
    folders = set(parts) or {""}
    names = [n for n in names if n == INDEX or os.path.dirname(n) in folders]
    weights = [n for n in names if WEIGHTS.fullmatch(Path(n).name)]
    safe = [n for n in weights if n.endswith(".safetensors")]
    folders = {Path(n).parent for n in safe}
    rest = [n for n in weights if Path(n).parent not in folders]
    return [n for n in names if n.endswith(TEXTS)] + safe + rest


def cause(error, repo):
    """Why the hub gave nothing, and the remedy, in one sentence."""
    page = f"{constants.ENDPOINT}/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(error).split())[:200]
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask for access at {page}, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no {page}, or it is private: look at its name, or `hf auth login`"
    if type(error) is FileNotFoundError:         # our own words
        return text
    if constants.HF_HUB_OFFLINE:
        return (f"{repo} is not whole in the hub's cache ({constants.HF_HUB_CACHE}), and "
                "HF_HUB_OFFLINE is set: unset it to fetch, or give a folder")
    if status == 429:
        return "the hub takes no more requests (429): wait some minutes, or `hf auth login`"
    return (f"{page} could not be fetched ({type(error).__name__}: {text}); what came whole is "
            "kept: run this again")


# ---------------------------------------------------------------- files
def check_weights(folder):
    """Which parts of a model's folder have their weights as .bin alone.

    Raises OSError where a part has none, or where a file is cut, or a pointer to what it should be:
    the libraries' own words for these name no file.
    """
    parts = [folder]
    if (folder / INDEX).exists():                # a pipeline: what of it has weights
        named = parts_of(folder / INDEX).items()
        parts = [folder / name for name, kind in named if not WEIGHTLESS.search(kind)]
        parts = [part for part in parts if (part / "config.json").exists()]
    old = []
    for part in parts:
        files = [part / n for n in needed(sorted(os.listdir(part))) if WEIGHTS.fullmatch(n)]
        if not files:
            raise FileNotFoundError(
                f"{part} has no weights (model.safetensors, or pytorch_model.bin)")
        count = WEIGHTS.fullmatch(files[-1].name)[3]
        if count and len(files) < int(count):
            raise FileNotFoundError(f"{part} has {len(files)} of the {count} files of its weights")
        for file in files:
            check_file(file)
        if files[0].suffix == ".bin":
            old.append(str(part))
    return old


def check_file(path):
    """Raises OSError where weights are a pointer of git-lfs, or a safetensors file is not whole."""
    with open(path, "rb") as f:
        pointer = f.read(24) == b"version https://git-lfs."
    if pointer:
        raise OSError(f"{path} is a git-lfs pointer: `git lfs pull`, or `hf download`")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as f:
                kinds = {f.get_slice(name).get_dtype() for name in f.keys()}
        except SafetensorError as e:
            raise OSError(f"{path} is not a whole safetensors file ({e}): fetch it again") from e
        if not any("F" in kind for kind in kinds):         # F32, BF16
            raise OSError(f"{path} holds no floats: these are no weights")


@contextlib.contextmanager
def readable_errors(name, kind):
    """Turns the libraries' many ways to fail into one line that names the model."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as e:                       # of no common class
        reason = torchvision_fault() or " ".join(str(e).split())[:300]
        raise ValueError(f"{kind} {str(name)!r} could not be loaded: {reason}") from e


def check_finite(model):
    """Raises ValueError where a weight of a model is no number."""
    for name, parameter in model.named_parameters():
        # any that is no number makes the sum none; of float32 it takes a thirtieth of the time
        if not parameter.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"its {name} has weights that are no numbers")


def torchvision_fault():
    """The libraries import torchvision where it is installed, and hide that it was what failed."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:                  # it is not installed
        pass
    except Exception as e:
        return f"torchvision does not fit this torch ({e}): uninstall it, nothing here needs it"


# ---------------------------------------------------------------- what a run is made of
def record_revisions(folder):
    """Adds to revisions.jsonl, beside a run's settings, the commit of each hub repository in it,
    {repo, commit}. Where the run was begun with another one, that is said."""
    path = Path(folder) / "revisions.jsonl"
    known = records.read_rows(path)
    for repo, commit in REVISIONS.items():
        before = [row.get("commit") for row in known if row.get("repo") == repo]
        if commit in before or records.rank_and_world()[0] > 0:
            continue
        if before:
            records.say(f"{folder}: begun with {repo} at {before[-1]}, goes on with {commit}")
        records.append_rows(path, [{"repo": repo, "commit": commit}])


def load_trained(checkpoint, captioner=None, generator=None):
    """Puts the weights of a checkpoint of finetune.py (a file, or its folder) into the models.

    Its tensors are named captioner.* and generator.*, as in the models' own state; those of a side
    that is not given are left out. Returns how many were put. Raises ValueError where they do not
    fit, or where there are none of either side, and changes nothing then.
    """
    path = Path(checkpoint)
    path = path / "checkpoint.safetensors" if path.is_dir() else path
    trained_side = header(path).get("settings", {}).get("side")
    tensors = load_file(path)
    check_numbers(tensors, f"--ckpt {path}")
    if trained_side is not None and type(trained_side) is not int:
        raise ValueError(f"--ckpt {path}: its header says --side {trained_side!r}: not a number")
    if not any(k.startswith(("captioner.", "generator.")) for k in tensors):
        raise ValueError(f"--ckpt {path}: none of its {len(tensors)} tensors is named captioner.* "
                         "or generator.*; give the --out of finetune.py")
    moves = []
    sides = ("captioner", captioner, "model"), ("generator", generator, "unet")
    for side, speaker, part in sides:
        if speaker is None:
            continue
        model = getattr(speaker, part, None)
        own = {} if model is None else dict(model.named_parameters())
        for key in [k for k in tensors if k.startswith(side + ".")]:
            name = key.partition(".")[2]
            if name not in own or own[name].shape != tensors[key].shape:
                raise ValueError(f"--ckpt {path}: {key} {tuple(tensors[key].shape)} is not of this "
                                 f"{side}: name the models it was trained from")
            moves.append((own[name], tensors[key]))
    for parameter, value in moves:
        parameter.data.copy_(value)
    if trained_side and captioner is not None:
        captioner.side = trained_side            # it goes on seeing what it was trained to see
    return len(moves)


def check_numbers(tensors, what):
    """Raises ValueError where a weight of {name: tensor} is not finite, or a whole number."""
    for name, value in tensors.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{what}: {name} holds no finite floats: it is not a checkpoint of "
                             "finetune.py, or was cut")


def header(path):
    """{step, data, settings, versions, commit} that finetune.py writes into a checkpoint's file; {}
    where there is none. Raises ValueError where the file can't be read, or says something else."""
    try:
        check_file(path)
        with safe_open(path, "pt") as f:
            text = (f.metadata() or {}).get("header", "{}")
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path}: no checkpoint that can be read ({e}); --ckpt takes the --out of "
                         "finetune.py") from e
    with contextlib.suppress(ValueError):        # no JSON
        about = records.parse(text)
        if isinstance(about, dict) and isinstance(about.get("settings", {}), dict):
            return about
    raise ValueError(f"{path}: its header is not one of finetune.py")
