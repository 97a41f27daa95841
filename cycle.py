"""Two speakers, a captioner and a generator, and their two conversations with frozen weights (paper, Section 3).

    captioner, generator = Captioner.load("miniature"), Generator.load("miniature")      # or "vitb" and "sd14"
    talk = image_text_image(captioner, generator, images, n=10, likeness={"clip": likeness})
    talk.captions[0][talk.order["clip"][0, 0]]                # the caption whose picture is most like the first image

An image is float (B, 3, H, W) in [0, 1], a caption is a str; pixels of other ranges, tokens and latents stay inside.
Chance is a function of (seed, item): the ten captions of a picture, and the noise its candidates are all drawn from,
do not depend on what else is in the batch. Copy this file alone: it needs torch, transformers and diffusers.

Letters: B images, n candidates, L tokens, P states of the captioner's vision, D their width, V vocabulary.
"""
import contextlib
import copy
import ctypes
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
CAPTIONERS = {"miniature": HERE / "miniature/blip", "vitb": "Salesforce/blip-image-captioning-base",
              "vitl": "Salesforce/blip-image-captioning-large", "blip2": "Salesforce/blip2-opt-2.7b"}
GENERATORS = {"miniature": HERE / "miniature/sd", "sd14": "CompVis/stable-diffusion-v1-4"}
WAYS = ("top-p", "top-k", "temperature", "typical", "beam")


# ---------------------------------------------------------------- the two conversations
@dataclass
class Talk:
    """What came of a conversation over B items with n candidates each; order[name][b] are candidates, best first.

    image -> text -> image: captions[b] are candidates, images (B, n, 3, H, W) their echoes.
    text -> image -> text: images (B, n, 3, H, W) are candidates, captions[b] their echoes.
    """
    captions: list
    images: torch.Tensor
    likelihood: torch.Tensor                     # (B, n) log p(caption | the image it was read from), in nats
    scores: dict = field(default_factory=dict)   # likeness name -> (B, n) float64, higher = more alike

    @property
    def order(self):
        return {name: score.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
                for name, score in self.scores.items()}


def few_steps(generator, decoder=None):
    """Gives a generator the solver that needs few steps, DPM-Solver++ (Lu et al. 2022), on its own noise schedule; a
    checkpoint distilled to few steps (LCM, TCD, Turbo: trailing timesteps), and one of flow matching, keeps its own.
    decoder: as in tiny_vae."""
    from diffusers import DPMSolverMultistepScheduler
    own = generator.pipe.scheduler
    if type(own).__name__[:3] not in ("LCM", "TCD", "Flo") and own.config.get("timestep_spacing") != "trailing":
        generator.pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
    if decoder:
        generator.pipe.vae = tiny_vae(decoder, generator)
    return generator


def image_text_image(captioner, generator, images, n=10, likeness=None, seed=0, items=None, speak=None, draw=None):
    """Image -> n captions -> a picture of each -> how alike picture and image are (paper, Section 3.1, Fig. 2 left).

    images: list of B (3, H, W) or one (B, 3, H, W); items: B names or numbers that chance hangs on (default 0, 1, ...);
    likeness: {name: f(pictures (n, 3, h, w), image (1, 3, H, W)) -> (n,)}; speak, draw: more arguments of the speakers.
    All candidates of an item are drawn from the same noise; equal captions are drawn once.
    """
    items = list(range(len(images))) if items is None else items
    captions, likelihood = captioner.speak(images, n, seed=seed, items=items, **speak or {})
    wanted = list(dict.fromkeys((item, c) for item, row in zip(items, captions) for c in row))
    drawn = generator.draw([c for _, c in wanted], items=[item for item, _ in wanted], seed=seed, **draw or {})
    place = {key: i for i, key in enumerate(wanted)}
    echoes = drawn[[place[item, c] for item, row in zip(items, captions) for c in row]].unflatten(0, (len(images), n))
    scores = {name: torch.stack([torch.as_tensor(f(echo, image[None])).double() for echo, image in zip(echoes, images)])
              for name, f in (likeness or {}).items()}
    return Talk(captions, echoes, likelihood, scores)


def text_image_text(captioner, generator, captions, n=10, likeness=None, seed=0, items=None, speak=None, draw=None):
    """Text -> n pictures -> the caption of each, by beam search -> how alike caption and text are (Fig. 2 right).

    likeness: {name: f(echoes: n strings, texts: n strings) -> (n,)}; candidate j of an item has noise (seed, item, j).
    """
    items = list(range(len(captions))) if items is None else items
    drawn = generator.draw([c for c in captions for _ in range(n)], seed=seed,
                           items=[(item, j) for item in items for j in range(n)], **draw or {})
    echoes, likelihood = captioner.speak(drawn, 1, **{"way": "beam"} | (speak or {}))
    rows = [[e[0] for e in echoes[i * n:i * n + n]] for i in range(len(captions))]
    scores = {name: torch.stack([torch.as_tensor(f(row, [text] * n)).double() for row, text in zip(rows, captions)])
              for name, f in (likeness or {}).items()}
    return Talk(rows, drawn.unflatten(0, (len(captions), n)), likelihood.view(-1, n), scores)


# ---------------------------------------------------------------- scoring without drawing
@dataclass
class Denoised:
    """What the generator's denoising loss says of n candidates: score (n,) float64, higher = better; error (n,), the
    standard error of each score; gap (n,), that of its difference to the best, both nan where a round had one draw;
    evaluations of the UNet; and what all this comes from, loss (draws, n) float64 (nan after a candidate dropped out)
    at timesteps (draws,)."""
    score: torch.Tensor
    error: torch.Tensor
    gap: torch.Tensor
    evaluations: int
    loss: torch.Tensor
    timesteps: torch.Tensor


def score(generator, images, captions, draws=12, budget=None, seed=0, item=0, batch=64, empty=None, span=(0.0, 1.0)):
    """How well the generator denoises image under caption (Eq. 3 as a score): Denoised, of n candidates.

    One image and n captions; n images and one caption; or n images, each with its own caption. All candidates meet the
    same `draws` pairs of timestep and noise: stratified over `span` of the schedule, a function of (seed, item); the
    loss is the one the model was trained with, unweighted (weights by the signal-to-noise ratio lost on the
    miniature's val). empty: subtract the loss under the empty caption, so that scores of different images compare;
    default where there are several images.
    budget: UNet evaluations, spent by successive halving among the captions of one image: rounds of as equal numbers of
    draws as it allows, at least one; after each the worse half drops out, and is ranked by its difference to the winner
    on the draws they share.
    Equal captions of an image are scored once. Nothing is drawn or decoded, there is no guidance. Captions longer than
    the text encoder reads are scored without their ends: Generator.too_long tells which. Raises ValueError for other
    counts.
    """
    n = max(len(images), len(captions))
    if not {len(images), len(captions)} <= {1, n}:
        raise ValueError(f"{len(images)} images and {len(captions)} captions: as many of both, or one of one kind")
    several = len(images) > 1
    empty = several if empty is None else empty
    wanted = list(captions) if several else list(dict.fromkeys(captions))
    place = list(range(n)) if several else [wanted.index(c) for c in captions]
    with torch.no_grad():
        states, nothing = generator.states(wanted), generator.states([""])                # (k or 1, T, D)
        latents = generator.encode(images)[0].float()                                     # (1 or n, C, h, w)
        width, parts, times = max(place) + 1, [], []
        alive, spent, fields = list(range(width)), 0, [width]
        while budget and not several and fields[-1] > 2:
            fields.append((fields[-1] + 1) // 2)
        prices = [k + empty * len(latents) for k in fields]                               # of one draw
        for r, price in enumerate(prices):
            more = max(1, (budget - spent) // sum(prices[r:])) if budget else draws
            t, noise = pairs(generator, latents, more, r, seed, item, span)
            some = states if several else states[alive]
            loss = denoising(generator, latents, some, t, noise, batch)                   # (draws, alive)
            if empty:
                loss = loss - denoising(generator, latents, nothing, t, noise, batch)
            spent += more * price
            parts.append(loss.new_full((more, width), torch.nan))
            parts[-1][:, alive] = loss
            times.append(t)
            if r + 1 < len(fields):
                sums = torch.cat(parts)[:, alive].mean(0)
                alive = sorted(alive[i] for i in sums.argsort()[:fields[r + 1]].tolist())
    loss, times = torch.cat(parts), torch.cat(times)
    best = min(alive, key=lambda j: loss[:, j].mean().item())
    value = loss[:, best].mean() + (loss - loss[:, [best]]).nanmean(0)
    own, gap = standard_error(parts), standard_error([x - x[:, [best]] for x in parts])
    error = torch.where(loss[-1].isnan(), torch.hypot(own[best], gap), own)               # of who dropped out
    return Denoised(*(x[place].cpu() for x in (-value, error, gap)), spent, loss[:, place].cpu(), times.cpu())


def standard_error(parts):
    """Of the means (n,) of draws in parts [(draws, n)], each stratified and in order of time, nan where one took no
    part: from second differences, as a loss that moves with the timestep hardly moves a stratified mean. Nan where a
    part is of one draw."""
    total, count = 0, 0
    for x in parts:
        k, here = len(x), ~x[0].isnan()
        order = min(2, k - 1)                                                             # of two draws, the first
        variance = x.diff(n=order, dim=0).square().mean(0) / math.comb(2 * order, order) if order else x[0] * math.nan
        total, count = total + torch.where(here, k * variance, 0), count + k * here
    return total.sqrt() / count


def words(generator, image, caption, draws=24, seed=0, item=0, batch=64):
    """What each word adds: [(word, contribution, standard error)], in order, of one image (3, H, W) and its caption.

    The contribution is how much the denoising loss grows when the word is dropped, under the same timesteps and noise.
    Positive: the word explains the picture; negative: the picture is better explained without it.
    """
    said = caption.split()
    without = [" ".join(said[:i] + said[i + 1:]) for i in range(len(said))]
    found = score(generator, image[None], [caption, *without], draws, None, seed, item, batch)
    change = found.loss[:, 1:] - found.loss[:, :1]                                         # (draws, words)
    return list(zip(said, change.mean(0).tolist(), standard_error([change]).tolist()))


def pairs(generator, latents, draws, part, seed, item, span):
    """Timesteps (draws,), one in each of as many equal parts of the span, and noise (draws, C, h, w)."""
    g = chance("denoise", seed, item, part)
    steps = generator.scheduler.config.num_train_timesteps
    u = (torch.arange(draws) + torch.rand(draws, generator=g)) / draws
    t = ((span[0] + (span[1] - span[0]) * u) * steps).long().clamp(max=steps - 1)
    return t.to(latents.device), torch.randn(draws, *latents.shape[1:], generator=g).to(latents)


def denoising(generator, latents, states, t, noise, batch):
    """Mean squared errors of k candidates at each draw, (draws, k) float64, of k latents or one and k states or one.
    Where the candidates share their image, the UNet's `stem`, which sees no text, is computed once a draw.
    """
    scheduler, k = generator.scheduler, max(len(latents), len(states))
    a = scheduler.alphas_cumprod.to(latents.device)[t].view(-1, 1, 1, 1).float()
    out, step = [], max(1, batch // k)
    shared, latents = len(latents) == 1, latents.expand(k, -1, -1, -1)
    for i in range(0, len(t), step):
        s, e = a[i:i + step, None], noise[i:i + step, None]                                # (d, 1, C, h, w)
        x = s.sqrt() * latents[None] + (1 - s).sqrt() * e
        goal = {"epsilon": e.expand_as(x), "sample": latents[None].expand_as(x),
                "v_prediction": s.sqrt() * e - (1 - s).sqrt() * latents[None]}[scheduler.config.prediction_type]
        with stem(generator.unet, k if shared else 1):
            made = generator.predict(x.flatten(0, 1).to(generator.dtype), t[i:i + step].repeat_interleave(k),
                                     states.repeat(len(x) * k // len(states), 1, 1))
        out.append((made.float().view_as(x) - goal).cpu().double().square().mean((2, 3, 4)))    # mps has no float64
    return torch.cat(out)


@contextlib.contextmanager
def stem(unet, k):
    """While it lasts, rows come in groups of k with equal image and timestep: the first convolution and the first
    residual block, before any text, run once a group."""
    parts = [unet.conv_in, unet.down_blocks[0].resnets[0]] if k > 1 else []
    for part in parts:
        part.forward = (lambda *args, own=part.forward: own(*(x[::k] for x in args)).repeat_interleave(k, 0))
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def chance(*key):
    """A CPU generator that is a function of its key alone: (seed, item, ...), of numbers, strings and tuples."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# ---------------------------------------------------------------- loading
# What the hub's clients call weights: no half-precision copies, single-file checkpoints or other frameworks.
WEIGHTS = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
TEXTS = (".json", ".txt", ".model", ".jinja")
REVISIONS = {}                                   # hub id -> commit, of all that this process has opened


def resolve(name, table, kind, cached=False):
    """(folder, keyword arguments of from_pretrained) of a name; a hub id only where it can be nothing else.

    The hub is asked here and nowhere else; what comes back is a folder on this machine. Weights are safetensors, or
    where there are none .bin, which torch's restricted loader reads (said in a line). cached: only what the hub's cache
    already holds. Raises ValueError, one line with cause and remedy.
    """
    place = Path(table.get(name, name))
    try:
        if not place.exists():
            if name == "miniature" or str(place).count("/") != 1 or place.is_absolute() or str(place)[0] == ".":
                raise ValueError(f"it is none of {', '.join(table)}, no directory and no hub id (owner/name)")
            place = fetch(place.as_posix(), f"{kind} {str(name)!r}", cached)
        old = [] if place.is_file() else check_weights(place)
    except (OSError, ValueError) as e:
        raise ValueError(f"{kind} {str(name)!r}: {e}") from e
    options = {"local_files_only": True, "use_safetensors": True}
    if old:
        # a pipeline may have both kinds: None takes safetensors where a part has them
        options["use_safetensors"] = None if (place / "model_index.json").exists() else False
        print(f"{kind} {str(name)!r}: no safetensors in {', '.join(map(str, old))}; its .bin is read through torch's "
              "restricted loader", file=sys.stderr)
    return str(place), options | ({} if place.is_file() else {"trust_remote_code": False})


def needed(names):
    """Of a repository's file names those a model is loaded from: configurations, vocabularies, and each folder's
    weights, its .bin only where it has no safetensors. No code, no safety checker."""
    names = [n for n in names if not n.startswith("safety_checker/")]
    weights = [n for n in names if WEIGHTS.fullmatch(Path(n).name)]
    safe = {Path(n).parent for n in weights if n.endswith(".safetensors")}
    weights = [n for n in weights if n.endswith(".safetensors") or Path(n).parent not in safe]
    return [n for n in names if n.endswith(TEXTS)] + weights


def fetch(repo, what, cached=False):
    """The folder of a hub repository in the hub's own cache, after fetching what is missing; how much is said before.
    Where the hub can't be had, what the cache holds will do, if it is whole. Raises OSError with the cause."""
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
    failure = None
    try:
        if cached:
            raise FileNotFoundError(f"{repo} is not in the hub's cache, and nothing is fetched unasked")
        commit = HfApi().model_info(repo, timeout=10).sha
        sizes = {x.path: getattr(x, "size", 0) for x in HfApi().list_repo_tree(repo, revision=commit, recursive=True)}
        wanted = needed(list(sizes))
        size = sum(sizes[n] for n in wanted if not isinstance(try_to_load_from_cache(repo, n, revision=commit), str))
        if size:
            print(f"{what}: fetching {size / 1e6:,.1f} MB of {repo} into {constants.HF_HUB_CACHE}", file=sys.stderr)
        folder = Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as e:                                   # the clients below have no common class of errors
        failure = e
    if failure is not None:
        try:
            folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
            check_weights(folder)
        except (OSError, ValueError):
            raise OSError(cause(failure, repo)) from failure
        if not (cached or constants.HF_HUB_OFFLINE):
            print(f"{what}: as the cache has it; {cause(failure, repo)}", file=sys.stderr)
    REVISIONS[repo] = folder.name
    return folder


def cause(error, repo):
    """Why the hub gave nothing, and the remedy, in a sentence."""
    from huggingface_hub import constants, errors
    at, status = f"{constants.ENDPOINT}/{repo}", getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask for access at {at}, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no {at}, or it is private: look at its name, or `hf auth login`"
    if constants.HF_HUB_OFFLINE:
        return (f"{repo} is not whole in the hub's cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set: unset "
                "it to fetch, or give a folder")
    if status == 429:
        return "the hub takes no more requests for a while (429): wait some minutes, or `hf auth login`"
    text = " ".join(str(error).split())[:200]
    if isinstance(error, FileNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return text
    return f"{at} could not be fetched ({type(error).__name__}: {text}); what came is kept: run this again"


def check_weights(folder):
    """Which parts of a model's folder have their weights as .bin alone. Raises OSError where a part has none, or a file
    is cut or only a pointer to one: the libraries' own words for these name no file."""
    index, parts, old = folder / "model_index.json", [folder], []
    if index.exists():
        parts = [folder / k for k, v in json.loads(index.read_text()).items() if isinstance(v, list) and v[0]]
        parts = [p for p in parts if (p / "config.json").exists() and p.name != "safety_checker"]
    for part in parts:
        files = [part / n for n in needed(sorted(os.listdir(part))) if WEIGHTS.fullmatch(n)]
        if not files:
            raise FileNotFoundError(f"{part} has no weights (model.safetensors, or pytorch_model.bin)")
        for shards in part.glob(f"*{files[0].suffix}.index.json"):
            for name in sorted(set(json.loads(shards.read_text())["weight_map"].values())):
                if not (part / name).exists() and WEIGHTS.fullmatch(name):
                    raise FileNotFoundError(f"{part / name} is missing, which {shards.name} names")
        for file in files:
            check_file(file)
        if files[0].suffix == ".bin":
            old.append(part)
    return old


def check_file(path):
    """Raises OSError where a weight file is a pointer of git-lfs, or a safetensors file is not whole."""
    from safetensors import SafetensorError, safe_open
    with open(path, "rb") as f:
        if f.read(24) == b"version https://git-lfs.":
            raise OSError(f"{path} is a git-lfs pointer, not the weights: `git lfs pull`, or `hf download`")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as e:
            raise OSError(f"{path} is not a whole safetensors file ({e}): delete it and fetch it again") from e


def record(folder):
    """Writes beside a run's settings the commit of each hub repository in it. Raises ValueError where the run was begun
    with another commit, whose results would be mixed with these."""
    path = Path(folder) / "revisions.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    for repo, commit in REVISIONS.items():
        if before.get(repo, commit) != commit:
            raise ValueError(f"{folder} was begun with {repo} at {before[repo]}, and the hub now has {commit}: choose "
                             "another --out, or give the folder of the older snapshot in the hub's cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    if before | REVISIONS != before:
        path.with_suffix(".new").write_text(json.dumps(before | REVISIONS, indent=2) + "\n")
        os.replace(path.with_suffix(".new"), path)


def judges_of(*names):
    """The default --judges beside these captioners and generators: the miniature's beside its captioner; the hub's
    where one comes from the hub; else, as two local models never reach for the network, what the cache holds."""
    if names[0] == "miniature":
        return "miniature"
    local = [Path({**CAPTIONERS, **GENERATORS}.get(name, name)).exists() or ".py:" in name for name in names]
    return "cache" if all(local) else "hub"


def one_thread(name):
    """The miniature runs on one thread a process: its tensors are too small to share, and on a busy machine threads
    that wait for each other take ten times as long. OMP_NUM_THREADS rules; other models keep torch's own choice."""
    if name == "miniature" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def settle(device=None, dtype=None):
    """Device (cuda, mps, cpu: the first that is there; under torchrun each process its own GPU) and dtype (bfloat16;
    float16 on mps, old GPUs; CPU float32)."""
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if str(device).partition(":")[0] not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {device}: it is cuda, mps or cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if dtype is None:
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16 if half else torch.float16
    if device.type == "cpu":
        keep_memory()
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype}: it is float32, float16 or bfloat16")
    return device, getattr(torch, dtype) if isinstance(dtype, str) else dtype


@functools.cache
def keep_memory():
    """Tells glibc, for this whole process, to keep freed memory: else it goes back to the system after each layer and
    comes anew, page by page, 10 to 28 % of the miniature's UNet (one AVX2 thread). Nothing happens elsewhere, nor where
    the environment already tells it (MALLOC_TRIM_THRESHOLD_=131072 is glibc's own way)."""
    told = os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
    if not told and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(-1, 2 ** 31 - 1)                        # M_TRIM_THRESHOLD: never
        libc.mallopt(-3, 2 ** 25)                            # M_MMAP_THRESHOLD: the largest there is


def brought(name, *args):
    """What `file.py:function` returns: the way in for a model outside these libraries. Runs that file, as named."""
    file, function = str(name).rsplit(":", 1)
    if not Path(file).is_file():
        raise ValueError(f"{name}: there is no file {file}; expected file.py:function")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"{name}: {file} defines no {function}")
    return getattr(module, function)(*args)


@contextlib.contextmanager
def loading(name, kind):
    """Turns the libraries' many ways to fail into one line that names the model."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as e:                                   # of no common class
        reason = " ".join(str(e).split())[:300]
        if "torchvision" in reason:
            reason = f"torchvision does not fit this torch: uninstall it, nothing here needs it ({reason[-160:]})"
        raise ValueError(f"{kind} {str(name)!r} could not be loaded: {reason}") from e


def adopt(checkpoint, captioner=None, generator=None):
    """Puts the trained weights of a checkpoint of finetune.py (a .safetensors file, or its folder) into the models.

    Its tensors are named captioner.* and generator.*, as in the models' own state; those of a side
    that is not given are left out. Raises ValueError where they do not fit, or where there are none
    of either side, and changes nothing then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    path = Path(checkpoint)
    path = path / "checkpoint.safetensors" if path.is_dir() else path
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"--ckpt {path}: no checkpoint that can be read ({e}); give the --out of finetune.py") from e
    if not any(k.startswith(("captioner.", "generator.")) for k in tensors):
        raise ValueError(f"--ckpt {path}: none of its {len(tensors)} tensors is named captioner.* "
                         "or generator.*; give the --out of finetune.py")
    moves = []
    sides = ("captioner", captioner, "model"), ("generator", generator, "unet")
    for side, speaker, part in sides:
        model = getattr(speaker, part, None)
        own = dict(model.named_parameters()) if model is not None else {}
        for key in [k for k in tensors if speaker is not None and k.startswith(side + ".")]:
            name = key.partition(".")[2]
            if name not in own or own[name].shape != tensors[key].shape:
                raise ValueError(f"--ckpt {path}: {key} {tuple(tensors[key].shape)} is not of this {side}: name the "
                                 "models it was trained from")
            moves.append((own[name], tensors[key]))
    side = trained_side(path)
    for parameter, value in moves:
        parameter.data.copy_(value)
    if side and captioner is not None:
        captioner.side = side                                # it goes on seeing what it was trained to see
    return len(moves)


def trained_side(path):
    """The --side of a checkpoint's header, None where it has none."""
    from safetensors import safe_open
    with safe_open(path, "pt") as f:
        text = (f.metadata() or {}).get("header", "{}")
    try:
        side = json.loads(text).get("settings", {}).get("side")
    except (ValueError, AttributeError) as e:
        raise ValueError(f"--ckpt {path}: its header is not one of finetune.py") from e
    if side is not None and type(side) is not int:
        raise ValueError(f"--ckpt {path}: its header says --side {side!r}: it is a number")
    return side


def tiny_vae(name, generator):
    """A distilled autoencoder for a generator's latents: an AutoencoderTiny's place, or `tiny` for Stable
    Diffusion's or SDXL's (TAESD, madebyollin/taesd, taesdxl). 1/18 of the work of the exact decoder."""
    tiny = "madebyollin/taesd" if generator.denoises else "madebyollin/taesdxl"
    place, options = resolve(name, {"tiny": tiny}, "decoder")
    with loading(name, "decoder"):
        from diffusers import AutoencoderTiny
        vae = AutoencoderTiny.from_pretrained(place, dtype=generator.dtype, **options)
    if vae.config.latent_channels != generator.vae.config.latent_channels:
        raise ValueError(f"decoder {str(name)!r} reads {vae.config.latent_channels} latent channels, the generator has "
                         f"{generator.vae.config.latent_channels}")
    return vae.to(generator.device).eval().requires_grad_(False)


def tiny_decoder(name, generator):
    """Latents (B, C, h, w) -> images about [0, 1] by a tiny_vae, for the loss tr."""
    vae = tiny_vae(name, generator)
    return lambda latents: vae.decode(latents.to(vae.dtype)).sample / 2 + .5


# ---------------------------------------------------------------- the captioner
@dataclass
class Reading:
    """Teacher forcing: hidden[b, i] predicts targets[b, i] through `head`; targets are -100 on prompt and padding."""
    hidden: torch.Tensor                         # (B, L, D), before the vocabulary head
    targets: torch.Tensor                        # (B, L) int64
    weight: torch.Tensor                         # (V, D), the head's
    bias: torch.Tensor | None                    # (V,)


class Captioner:
    """A BLIP or BLIP-2 (decoder-only) checkpoint that describes images. Weights frozen, in eval mode."""
    space = ""                                   # between prompt and caption, where a tokenizer keeps spaces

    @classmethod
    def load(cls, name="miniature", device=None, dtype=None):
        """A name of CAPTIONERS, a directory, a hub id, or file.py:function. Raises ValueError with the remedy."""
        device, dtype = settle(device, dtype)
        if ".py:" in str(name):
            return brought(name, device, dtype)
        place, options = resolve(name, CAPTIONERS, "captioner")
        with loading(name, "captioner"):
            import transformers as hf
            local = {"local_files_only": True, "trust_remote_code": False}
            kind = hf.AutoConfig.from_pretrained(place, **local).model_type
        kinds = {"blip": ("BlipForConditionalGeneration", cls), "blip-2": ("Blip2ForConditionalGeneration", Captioner2)}
        if kind not in kinds:
            raise ValueError(f"captioner {str(name)!r} is a {kind} model: BLIP and BLIP-2 are known here, "
                             "another comes in as file.py:name")
        with loading(name, "captioner"):
            model = getattr(hf, kinds[kind][0]).from_pretrained(place, dtype=dtype, **options)
            tokenizer = hf.AutoTokenizer.from_pretrained(place, **local)
            processor = hf.AutoImageProcessor.from_pretrained(place, **local)
        return kinds[kind][1](model.to(device), tokenizer, processor)

    def __init__(self, model, tokenizer, processor):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.device, self.dtype, self.processor = model.device, model.dtype, processor
        self.side = None                                     # pixels a side, where other than the processor says
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
        self.begin()
        # ids that are no words, such as [DEC], [ENC] and <image>: never sampled, never in a beam
        image = [i for word, i in self.tokenizer.get_added_vocab().items() if word == "<image>"]
        self.unsaid = [*range(len(self.tokenizer), len(self.head.weight)), *image]

    def begin(self):
        """The ids of begin, prompt, end and padding. BLIP's tokenizer lacks [DEC], which begins its captions."""
        text = self.model.config.text_config
        self.prompt = [text.bos_token_id, *self.tokenizer("a picture of ", add_special_tokens=False).input_ids]
        self.end, self.pad = text.sep_token_id, text.pad_token_id
        self.decoder, self.limit = self.model.text_decoder, text.max_position_embeddings
        self.head = self.decoder.get_output_embeddings()

    def save(self, folder):
        """As a stock directory: from_pretrained of the model and of AutoProcessor read it."""
        processor = copy.deepcopy(self.processor)
        if self.side:
            processor.size = {"height": self.side, "width": self.side}
        processor.save_pretrained(folder)
        self.stock_processor(processor).save_pretrained(folder)
        self.model.save_pretrained(folder)

    def stock_processor(self, processor):
        from transformers import BlipProcessor
        return BlipProcessor(processor, self.tokenizer)

    # pixels and tokens in
    def pixels(self, images):
        """Images as the model sees them: (B, 3, S, S), resized, cut and normalised as the library's processor does, but
        differentiable: values are clamped to [0, 1], gradients pass (a clamp stops them where a picture saturates)."""
        wide = torch.promote_types(self.dtype, torch.float32)
        x = torch.stack([self.resized(x.to(self.device, wide)) for x in images])                  # (B, 3, S, S)
        x = x + (x.clamp(0, 1) - x).detach()
        return ((x - self.mean.to(x)) / self.std.to(x)).to(self.dtype)

    def resized(self, image):
        """One image (3, H, W) in the size that the processor's `size` and `crop_size` say, or in self.side."""
        view, (h, w) = self.processor, image.shape[-2:]
        size = view.size
        if self.side:
            goal = self.side, self.side
        elif size.height and size.width:
            goal = size.height, size.width
        elif size.shortest_edge and not size.longest_edge:
            goal = tuple(int(size.shortest_edge * s / min(h, w)) for s in (h, w))
        else:
            raise ValueError(f"a captioner's size {size} is not known: height and width, or shortest_edge")
        mode = {2: "bilinear", 3: "bicubic"}.get(int(view.resample), "bicubic")
        if getattr(view, "do_resize", True):
            image = F.interpolate(image[None], goal, mode=mode, antialias=True)[0]
        if getattr(view, "do_center_crop", False) and not self.side:
            top, left = ((s - c) // 2 for s, c in zip(goal, (view.crop_size.height, view.crop_size.width)))
            image = image[:, top:top + view.crop_size.height, left:left + view.crop_size.width]
        return image

    def look(self, images):
        """Vision, once per image: (B, P, D), what the decoder attends to."""
        return self.model.vision_model(self.pixels(images)).last_hidden_state

    def decode(self, states, ids, cache=None):
        """Decoder over ids (B, L), after those in cache: hidden (B, L, D) before the head, and the longer cache."""
        out = self.decoder.bert(ids, encoder_hidden_states=states, past_key_values=cache, use_cache=cache is not None,
                                is_decoder=True)
        return self.decoder.cls.predictions.transform(out.last_hidden_state), out.past_key_values

    def memory(self):
        """An empty cache of the decoder's keys and values, of its own words and of vision."""
        from transformers import DynamicCache, EncoderDecoderCache
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def read(self, images, captions, states=None):
        """One teacher-forced pass for the caption losses (Eq. 1, 4): B images (or their states), captions -> Reading.
        Captions are cut at the decoder's length. Differentiable with respect to images and weights."""
        states = self.look(images) if states is None else states
        room = self.limit - len(self.prompt) - 1
        rows = [self.prompt + self.tokenizer(self.space + c, add_special_tokens=False).input_ids[:room] + [self.end]
                for c in captions]
        length, start = max(map(len, rows)), len(self.prompt)
        ids = torch.tensor([r + [self.pad] * (length - len(r)) for r in rows], device=self.device)
        targets = torch.tensor([[-100] * start + r[start:] + [-100] * (length - len(r)) for r in rows]).to(self.device)
        hidden, _ = self.decode(states, ids[:, :-1])          # padding is on the right: a causal decoder never sees it
        return Reading(hidden, targets[:, 1:], self.head.weight, self.head.bias)

    @torch.no_grad()
    def likelihood(self, images, captions, states=None):
        """log p(caption | image) in nats, its end included: (B,) float64 on the CPU."""
        r = self.read(images, captions, states)
        logp = F.linear(r.hidden, r.weight, r.bias).float().log_softmax(-1)                               # (B, L, V)
        said = logp.gather(2, r.targets.clamp(min=0)[..., None])[..., 0]
        return said.masked_fill(r.targets < 0, 0).sum(1).cpu().double()

    # captions out
    @torch.no_grad()
    def speak(self, images, n=10, way="top-p", seed=0, items=None, length=(5, 20)):
        """n captions of each image: (list of B lists of n str, log-likelihoods (B, n)).

        way: top-p .9 (the paper's), top-k 50, temperature .7, typical .9, beam (3, or n if more); sampling has the
        repetition penalty 1.1; length: fewest and most tokens, the prompt's included, as BLIP counts them.
        """
        if way not in WAYS:
            raise ValueError(f"unknown way of speaking {way!r}: choose one of {', '.join(WAYS)}")
        items = range(len(images)) if items is None else items
        states = self.look(images)
        ids = self.beam(states, n, length) if way == "beam" else self.sample(states, n, way, seed, items, length)
        ids = [row[:row.index(self.end)] if self.end in row else row for row in ids.tolist()]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=True) for row in ids]
        texts = [" ".join(text.split()) for text in texts]
        likelihood = self.likelihood(None, texts, states.repeat_interleave(n, 0)).view(-1, n)
        return [texts[i:i + n] for i in range(0, len(texts), n)], likelihood

    def sample(self, states, n, way, seed, items, length):
        """n samples for each of B states -> ids after the prompt (B n, L). The prompt is read, and keys and values of
        vision are computed, once per image; then the cache is repeated n times."""
        from transformers.generation import logits_process as warp
        warpers = [warp.RepetitionPenaltyLogitsProcessor(1.1),
                   {"top-p": lambda: warp.TopPLogitsWarper(.9), "top-k": lambda: warp.TopKLogitsWarper(50),
                    "temperature": lambda: warp.TemperatureLogitsWarper(.7),
                    "typical": lambda: warp.TypicalLogitsWarper(.9)}[way]()]
        ids = torch.tensor([self.prompt] * len(states), device=self.device)
        hidden, cache = self.decode(states, ids, self.memory())
        cache.batch_repeat_interleave(n)
        hidden, ids, states = (x.repeat_interleave(n, 0) for x in (hidden, ids, states))
        dice = torch.stack([torch.rand(n, length[1], generator=chance("speak", seed, i)) for i in items]).flatten(0, 1)
        live = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        for step in range(length[1] - len(self.prompt)):
            logits = self.head(hidden[:, -1]).float()                                                     # (B n, V)
            logits[:, self.unsaid] = -torch.inf
            if ids.shape[1] < length[0]:
                logits[:, self.end] = -torch.inf
            for w in warpers:
                logits = w(ids, logits)
            total = logits.softmax(-1).cpu().double().cumsum(-1)
            token = torch.searchsorted(total, dice[:, step, None].double() * total[:, -1:], right=True)[:, 0]
            token = torch.where(live, token.to(self.device), self.pad)
            ids, live = torch.cat([ids, token[:, None]], 1), live & (token != self.end)
            if not live.any():
                break
            hidden, cache = self.decode(states, token[:, None], cache)
        return ids[:, len(self.prompt):]

    def beam(self, states, n, length):
        """Beam search by the library: the n best of max(3, n) beams -> ids after the prompt (B n, L)."""
        ids = torch.tensor([self.prompt] * len(states), device=self.device)
        out = self.decoder.generate(ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=states,
                                    **self.searching(n, length))
        return out[:, len(self.prompt):]

    def searching(self, n, length):
        return {"num_beams": max(3, n), "num_return_sequences": n, "do_sample": False, "eos_token_id": self.end,
                "pad_token_id": self.pad, "suppress_tokens": self.unsaid or None,
                "min_new_tokens": max(0, length[0] - len(self.prompt)),
                "max_new_tokens": length[1] - len(self.prompt)}


class Captioner2(Captioner):
    """BLIP-2 with a decoder-only language model: the query tokens' embeddings stand before the prompt."""
    space = " "

    def begin(self):
        if self.model.config.text_config.is_encoder_decoder:
            raise ValueError("a BLIP-2 with an encoder-decoder language model is not supported: use blip2-opt-2.7b")
        # Differs: the paper's prompt is BLIP's; BLIP-2 was trained with this one (Li et al. 2023)
        self.prompt = [self.tokenizer.bos_token_id, *self.tokenizer("a photo of", add_special_tokens=False).input_ids]
        text = self.model.config.text_config
        self.end, self.pad = text.eos_token_id, text.pad_token_id
        self.decoder = self.model.language_model
        self.limit = text.max_position_embeddings - self.model.config.num_query_tokens
        self.head = self.decoder.get_output_embeddings()

    def stock_processor(self, processor):
        """The stock model puts the picture where the prompt has num_query_tokens times <image>: without that number it
        answers without having looked. Older clones have no such token yet: it gets one."""
        from transformers import Blip2Processor
        config = self.model.config
        stock = Blip2Processor(processor, copy.deepcopy(self.tokenizer), num_query_tokens=config.num_query_tokens)
        config.image_token_index = stock.tokenizer.convert_tokens_to_ids("<image>")
        return stock

    def look(self, images):
        pixels, own = self.pixels(images), self.model.config.vision_config.image_size
        return self.model.get_image_features(pixels, interpolate_pos_encoding=pixels.shape[-1] != own).pooler_output

    def memory(self):
        from transformers import DynamicCache
        return DynamicCache()

    def decode(self, states, ids, cache=None):
        words = self.decoder.get_input_embeddings()(ids)
        fresh = cache is None or cache.get_seq_length() == 0
        out = self.decoder.model(inputs_embeds=torch.cat([states.to(words), words], 1) if fresh else words,
                                 past_key_values=cache, use_cache=cache is not None)
        return out.last_hidden_state[:, -ids.shape[1]:], out.past_key_values

    def beam(self, states, n, length):
        words = self.decoder.get_input_embeddings()(torch.tensor([self.prompt] * len(states), device=self.device))
        words = torch.cat([states.to(words), words], 1)
        mask = torch.ones(words.shape[:2], dtype=torch.long, device=self.device)
        return self.decoder.generate(inputs_embeds=words, attention_mask=mask, **self.searching(n, length))


# ---------------------------------------------------------------- the generator
class Generator:
    """A Stable Diffusion 1.x or 2.x checkpoint that draws captions; any other text-to-image pipeline can only draw."""

    @classmethod
    def load(cls, name="miniature", device=None, dtype=None):
        """A name of GENERATORS, a pipeline directory, hub id or .safetensors file, or file.py:function."""
        device, dtype = settle(device, dtype)
        if ".py:" in str(name):
            return brought(name, device, dtype)
        place, options = resolve(name, GENERATORS, "generator")
        with loading(name, "generator"):
            from diffusers import DiffusionPipeline, StableDiffusionPipeline
            from diffusers.utils import logging
            logging.disable_progress_bar()
            logging.set_verbosity_error()
            if place.endswith(".safetensors"):
                pipe = StableDiffusionPipeline.from_single_file(place, dtype=dtype, local_files_only=True)
            else:
                pipe = DiffusionPipeline.from_pretrained(place, dtype=dtype, **options, safety_checker=None,
                                                         requires_safety_checker=False)
        return cls(pipe.to(device))

    def __init__(self, pipe):
        pipe.set_progress_bar_config(disable=True)
        if hasattr(pipe, "safety_checker"):
            pipe.safety_checker = None                       # a picture it blackened could not be compared
        if getattr(pipe, "vae", None) is not None:
            pipe.vae.enable_slicing()                        # picture by picture: the decoder is the peak of memory
        self.pipe, self.device = pipe, pipe.device
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            setattr(self, name, getattr(pipe, name, None))
        self.dtype = getattr(pipe, "dtype", torch.float32)

    @torch.no_grad()
    def draw(self, captions, items=None, seed=0, steps=50, guidance=7.5, batch=16):
        """One picture per caption: (B, 3, H, W) float32 in [0, 1], on the CPU, by the checkpoint's own scheduler.

        The noise is a function of (seed, item): captions of equal items start from equal noise. Both guidance halves
        of a batch go through the UNet in one call.
        """
        items = list(range(len(captions))) if items is None else items
        done = []
        for i in range(0, len(captions), batch):
            noise = [chance("draw", seed, item) for item in items[i:i + batch]]
            done.append(self.pipe(captions[i:i + batch], generator=noise, num_inference_steps=steps,
                                  guidance_scale=guidance, output_type="pt").images.float().cpu())
        return torch.cat(done)

    def too_long(self, captions):
        """Which captions have more tokens than the text encoder reads, and are drawn without the rest: [bool]."""
        if self.tokenizer is None or not captions:
            return [False] * len(captions)
        most = self.tokenizer.model_max_length
        return [len(ids) > most for ids in self.tokenizer(list(captions), verbose=False).input_ids]

    # the parts, for training and for scoring without drawing (Stable Diffusion only)
    @property
    def denoises(self):
        """Whether its parts are those of Stable Diffusion 1.x or 2.x; an SDXL wants more than a caption's states."""
        return None not in (self.unet, self.vae, self.text_encoder) and not self.unet.config.addition_embed_type

    @property
    def side(self):
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode(self, images):
        """Images -> mean and standard deviation of their latents, each (B, C, h, w), scaled as the UNet expects.
        An image is resized so that its shorter side fits and cut in the middle, as the generator was trained."""
        views = []
        for x in images:
            scale = self.side / min(x.shape[-2:])
            if scale != 1:
                size = [max(self.side, round(s * scale)) for s in x.shape[-2:]]
                x = F.interpolate(x[None].float(), size, mode="bicubic", antialias=True)[0].clamp(0, 1)
            top, left = ((s - self.side) // 2 for s in x.shape[-2:])
            views.append(x[:, top:top + self.side, left:left + self.side])
        q = self.vae.encode((torch.stack(views) * 2 - 1).to(self.device, self.dtype)).latent_dist
        return q.mean * self.vae.config.scaling_factor, q.std * self.vae.config.scaling_factor

    def decode(self, latents):
        """Latents (B, C, h, w) -> images (B, 3, H, W); about [0, 1], not clamped, so that gradients pass."""
        return self.vae.decode(latents.to(self.dtype) / self.vae.config.scaling_factor).sample / 2 + .5

    def states(self, captions):
        """Captions -> text states (B, 77, D); begin, end and padding as the generator was trained."""
        ids = self.tokenizer(list(captions), padding="max_length", max_length=self.tokenizer.model_max_length,
                             truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state

    def predict(self, noised, timesteps, states):
        """The UNet's output (B, C, h, w) for x_t, t (B,) and text states: noise or velocity, as the scheduler's
        prediction_type says."""
        return self.unet(noised, timesteps, states).sample
