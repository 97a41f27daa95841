"""Joint finetuning of a captioner and a generator: L = L_TG + L_IR + L_IG + L_TR (paper, Section 4, Eq. 1-5).

    python finetune.py --steps 200                                   # the miniature, on pictures drawn as it goes
    python finetune.py --captioner vitb --data data/coco             # the paper's run: SD v1-4, batch 8, 5 epochs
    python finetune.py --captioner vitb --data data/coco --losses tg ir            # a row of Table 5
    python finetune.py --captioner vitb --data data/coco --own photos/             # pictures that nobody described
    torchrun --nproc_per_node=8 finetune.py --captioner vitb --data data/coco      # the same training
    python finetune.py --resume                                      # goes on where it was stopped or killed
    python finetune.py --export out/models                           # stock directories for from_pretrained

Writes into --out: checkpoint.safetensors (trained weights, optimizer; settings and step in its header),
checkpoint.json (the same header to read), log.jsonl (a line a step). Which sample, caption, timestep and noise a step
gets is a function of (seed, step, sample): the number of processes, --micro and a resume change nothing.

--resume and --export take the settings of the checkpoint, which somebody else may have written. So
they take over numbers, switches and built-in names alone: of models miniature, vitb, vitl, blip2,
sd14; of decoders exact and tiny; of data the miniature; of --split and --own a split. Any other
folder, file or hub id is said and not followed until the command line names it, and the line that
says so has the command to type. Code, file.py:function, runs by the command line alone.
"""
import argparse
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOSSES = ("tg", "ir", "ig", "tr")
# what a resumed run must share with the one it continues; all the rest is speed, memory and places
TRAINING = ("captioner", "generator", "data", "split", "losses", "weights", "unfreeze", "bridge",
            "temperature", "batch", "lr", "clip", "steps", "epochs", "tmax", "thin", "decoder", "seed",
            "dtype", "side")
SPLITS = ("train", "all", "restval", "val", "test", "in", "near", "out", "nocaps")
PLACES = ("out", "resume", "export", "device")                 # not taken over by a resumed run


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--captioner", default="miniature", help="miniature, vitb, vitl, blip2, a directory or hub id")
    p.add_argument("--generator", help="miniature, sd14, a directory or hub id; follows --captioner")
    p.add_argument("--data", help="a set's folder: COCO Karpathy, pictures with metadata.jsonl; default miniature")
    p.add_argument("--split", default="train", help="of --data; the miniature also draws `all`: every colour and shape")
    p.add_argument("--own", help="pictures without captions for ir, a folder or a split of --data: the captioner's own "
                   "words stand in for human ones; as many a step as --batch")
    p.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="which of Eq. 1-4; Table 5")
    p.add_argument("--weights", nargs="+", type=float, help="a weight for each of --losses; default 1, as in Eq. 5")
    p.add_argument("--unfreeze", nargs=2, default=["q", "q"], choices=["q", "kv", "qkv", "none"],
                   metavar=("CAPTIONER", "GENERATOR"), help="projections of cross-attention to train: q kv qkv none")
    p.add_argument("--side", type=int, help="pixels a side that BLIP-2 sees; default 384 of blip2 (the paper's)")
    p.add_argument("--bridge", default="anchored", choices=["anchored", "plain", "word"], help="plain is the paper's")
    p.add_argument("--temperature", type=float, default=1.0, help="of the distributions that cross the bridge in ir")
    p.add_argument("--lr", type=float, nargs="+", default=[1e-4], help="of AdamW; a second number is the generator's")
    p.add_argument("--batch", type=int, default=8, help="samples a step, of all processes together")
    p.add_argument("--micro", type=int, help="samples at once: memory, not the result; default all of them, blip2 4")
    p.add_argument("--chunk", type=int, help="images at once in tr, the peak of memory; default 1, the miniature 8")
    p.add_argument("--epochs", type=float, default=5, help="over the data; --steps wins")
    p.add_argument("--steps", type=int, help="optimizer steps; default 1000 of the miniature, else by --epochs")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm over all trained weights; 0 = none")
    p.add_argument("--tmax", type=int, help="tr only where the timestep is below this; default all, as in the paper")
    p.add_argument("--thin", type=int, default=1, help="tr on one sample of K, weighted K: unbiased and cheaper")
    p.add_argument("--decoder", default="exact", help="of tr: exact, tiny (TAESD), or an AutoencoderTiny's place")
    p.add_argument("--cache", type=Path, help="folder that keeps the latents of --data: encodes each image once")
    p.add_argument("--checkpointing", action="store_true", help="recompute UNet and decoder: less than half the memory")
    p.add_argument("--seed", type=int, default=0, help="chance is a function of seed, step and sample")
    p.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    p.add_argument("--dtype", help="of the frozen weights: bfloat16 where a GPU has it, else float32")
    p.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    p.add_argument("--probe", type=int, default=100, help="steps between gradient norms of each loss; 0 = never")
    p.add_argument("--held", type=int, default=64, help="val samples, with human captions, whose losses are taken with "
                   "each checkpoint")
    p.add_argument("--out", type=Path, default=Path("out/finetune"), help="folder for what comes out")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in "
                   "--out, with its settings; its folders and hub ids are to be named again")
    p.add_argument("--export", type=Path, metavar="DIR", help="no training: write --out's models as stock directories")
    first = p.parse_known_args(argv)[0]
    if not (first.resume or first.export):
        return complete(p, p.parse_args(argv))
    settings = header(first.out)["settings"]
    proper(p, settings, first.out)
    unsaid = foreign(settings, ("captioner", "generator") if first.export else None)
    p.set_defaults(**settings | dict.fromkeys(unsaid))
    args = p.parse_args(argv)
    unsaid = {k: v for k, v in unsaid.items() if getattr(args, k) is None}
    if unsaid:
        ask(unsaid, first.out, sys.argv[1:] if argv is None else argv)
    return args if args.export else complete(p, args)


def proper(p, settings, out):
    """Refuses settings of a checkpoint that no run of ours could have had."""
    known = {a.dest: a for a in p._actions if a.dest not in (*PLACES, "help")}
    kinds = {None: (str,), Path: (str,), int: (int,), float: (int, float)}
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{out}: its settings have {key[:80]!r}, which is none of ours")
        action, values = known[key], value if isinstance(value, list) else [value]
        if value is None and action.default is None:
            continue
        kind = (bool,) if action.nargs == 0 else kinds[action.type]
        fits = isinstance(value, list) == (action.nargs in ("+", 2)) and len(values) > 0
        fits = fits and (action.nargs != 2 or len(values) == 2)
        fits = fits and all(type(x) in kind and x in (action.choices or [x]) for x in values)
        if not fits or any(isinstance(x, str) and not x.isprintable() for x in values):
            raise ValueError(f"{out}: its settings have --{key} {repr(value)[:80]}, "
                             "which cannot be")
    lacking = [k for k in ("captioner", "generator", "data") if settings.get(k) is None]
    if lacking:
        raise ValueError(f"{out}: its settings have no {', '.join(lacking)}")


def foreign(settings, keys=None):
    """{flag: value} of the settings that lead out of this program: folder, file, hub id, code."""
    import cycle
    own = {"captioner": cycle.CAPTIONERS, "generator": cycle.GENERATORS, "data": ("miniature",),
           "split": SPLITS, "own": SPLITS, "decoder": ("exact", "tiny"), "cache": ()}
    return {k: settings[k] for k in keys or own
            if settings.get(k) is not None and settings[k] not in own[k]}


def spelled(some):
    return " ".join(f"--{k} {shlex.quote(v)}" for k, v in some.items())


def ask(unsaid, out, argv):
    """Says what a checkpoint names and the command line does not. Code has to be typed by hand."""
    said = spelled(unsaid)
    code = [v for k, v in unsaid.items() if k in ("captioner", "generator") and ".py:" in v]
    if code:
        raise ValueError(f"{out} was trained with {said}: {code[0]} is code. It runs only where "
                         "the command line names it; do so if you know what it does")
    raise ValueError(f"{out} was trained with {said}: what a file names is not followed unasked. "
                     "Say the same, or where it lies now: "
                     f"python finetune.py {shlex.join(argv)} {said}")


def complete(p, args):
    """Defaults that follow from other flags, and what cannot be."""
    args.generator = args.generator or ("miniature" if args.captioner == "miniature" else "sd14")
    args.data = args.data or ("miniature" if args.captioner == "miniature" else None)
    args.steps = args.steps or (1000 if args.data == "miniature" else None)
    args.side = args.side or (384 if args.captioner == "blip2" else None)
    args.chunk = args.chunk or (8 if args.captioner == "miniature" else 1)
    args.weights = args.weights or [1.0] * len(args.losses)
    if len(args.lr) > 2:
        p.error("--lr takes one number, or the captioner's and the generator's")
    if len(args.weights) != len(args.losses):
        p.error(f"--weights: {len(args.weights)} numbers for {len(args.losses)} losses ({' '.join(args.losses)})")
    weights = dict(zip(args.losses, args.weights))
    args.losses = [name for name in LOSSES if name in weights]
    args.weights = [weights[name] for name in args.losses]
    if args.own and "ir" not in args.losses:
        p.error("--own gives pictures to ir, which is not among --losses")
    if args.own and not os.path.isdir(args.own) and args.own not in SPLITS:
        raise ValueError(f"--own {args.own}: no such folder, and no split of --data ({', '.join(SPLITS)})")
    if args.data is None:
        p.error(f"--captioner {args.captioner} needs --data: the folder with dataset_coco.json and its pictures")
    if min(args.batch, args.chunk, args.thin, args.every, args.micro or 1) < 1 or not args.temperature > 0:
        p.error("--batch, --micro, --chunk, --thin and --every are at least 1, --temperature is above 0")
    return args


# ---------------------------------------------------------------- samples
class Samples:
    """Pictures with captions, by index; those of the miniature are drawn."""

    def __init__(self, place, split, data, world, silent=False):
        self.data, self.world, self.split, self.bad = data, world, split, {}
        self.drawn = place == "miniature" and split in ("train", "all")
        self.items = None if self.drawn else [x for x in data.read(place, split) if x.captions or silent]
        if self.items == []:
            raise ValueError(f"{place} has no captions in its {split} split: there is nothing to learn from")
        self.count, self.beside = 20_000 if self.drawn else len(self.items), ""
        self.name = f"{place}/{split}: {self.count} pictures"
        if not self.drawn:
            names = json.dumps([[x.name, x.captions] for x in self.items]).encode()
            self.name += f", {hashlib.blake2b(names, digest_size=8).hexdigest()}"

    def __getitem__(self, index):
        """(image (3, H, W) in [0, 1], captions); an unreadable picture is named once and the next one stands in."""
        import torch
        if self.drawn:
            scene = self.world.sample(self.split, index)
            return torch.from_numpy(self.world.draw(scene).copy()).permute(2, 0, 1) / 255, self.world.captions(scene)
        for i in range(index, index + self.count):
            item = self.items[i % self.count]
            try:
                return self.data.open_image(item.path), item.captions
            except ValueError as e:
                if item.path not in self.bad:
                    print(f"finetune.py: {e}; the next picture stands in for it", file=sys.stderr)
                self.bad[item.path] = str(e)
        raise ValueError(f"{self.name}: none of them can be read")


class Latents:
    """Mean and standard deviation of each sample's latents: computed, or kept in shards of a folder."""
    SHARD = 256

    def __init__(self, folder, samples, generator, name, rank=0, world=1):
        self.folder, self.samples, self.generator = folder, samples, generator
        self.stamp = json.dumps({"data": samples.name, "generator": name, "side": generator.side,
                                 "dtype": str(generator.dtype)})
        if folder:
            self.fill(rank, world)

    def fill(self, rank, world):
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file
        from tqdm import tqdm
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = range(rank, -(-self.samples.count // self.SHARD), world)
        for shard in tqdm(shards, desc="latents", disable=rank > 0):
            path = self.folder / f"{shard:05}.safetensors"
            if path.exists():
                with safe_open(path, "pt") as f:
                    was = f.metadata()["stamp"]
                if was != self.stamp:
                    raise ValueError(f"--cache {self.folder} was made of {was}, this run is {self.stamp}: choose "
                                     "another folder")
                continue
            rows = range(shard * self.SHARD, min((shard + 1) * self.SHARD, self.samples.count))
            kept = torch.cat([self.encode([self.samples[i][0]]) for i in rows], 1)                 # (2, n, C, h, w)
            save_file({"latents": kept.contiguous()}, path.with_suffix(f".{rank}"), {"stamp": self.stamp})
            os.replace(path.with_suffix(f".{rank}"), path)

    def encode(self, images):
        import torch
        with torch.no_grad():
            return torch.stack(self.generator.encode(images)).cpu()                               # (2, B, C, h, w)

    def __call__(self, indices, images):
        """(2, B, C, h, w) in float32, or float64 of a double-precision model."""
        import torch
        if self.folder:
            from safetensors import safe_open
            kept = []
            for i in indices:
                with safe_open(self.folder / f"{i // self.SHARD:05}.safetensors", "pt") as f:
                    kept.append(f.get_slice("latents")[:, i % self.SHARD:i % self.SHARD + 1])
            both = torch.cat(kept, 1)
        else:
            both = torch.cat([self.encode([x]) for x in images], 1)           # one by one: no neighbour changes a bit
        return both.to(torch.promote_types(both.dtype, torch.float32)).to(self.generator.device)


def collate(indices, step, args, wanted, samples, latents, way, captioner, generator, chance, own=False):
    """The Batch of these samples at this step, for the wanted losses: a function of (seed, step, sample) and the data;
    own: with what the captioner says of the pictures at this step, sampled as in rerank.py, for captions."""
    import torch

    import losses
    rows, images, captions = [], [], []
    for i in indices:
        image, said = samples[i]
        g = chance("own" if own else "finetune", args.seed, step, i)
        captions.append(None if own else said[torch.randint(len(said), (), generator=g)])
        images.append(image)
        rows.append((g, torch.randint(generator.scheduler.config.num_train_timesteps, (), generator=g),
                     torch.rand((), generator=g)))
    if own:
        captions = [row[0] for row in captioner.speak(images, 1, seed=args.seed, items=[[step, i] for i in indices])[0]]
    batch = losses.Batch(captions, images)
    if set(wanted) - {"tg"}:
        mean, std = latents(indices, images)
        noise = torch.stack([torch.randn(2, *mean.shape[1:], generator=g) for g, *_ in rows], 1).to(mean)
        batch.latents, batch.noise = mean + std * noise[0], noise[1]
        batch.timesteps = torch.stack([t for _, t, _ in rows]).to(mean.device)
        kept = [(u * args.thin < 1) & (t < (args.tmax or math.inf)) for _, t, u in rows]
        batch.heard = torch.stack(kept).to(mean) * args.thin
    if "ir" in wanted:
        start = len(captioner.prompt)
        batch.layout = way.layout([captioner.space + c for c in captions], start - 1, captioner.limit - start - 1)
        batch.layout = batch.layout.to(captioner.device)
    return batch


# ---------------------------------------------------------------- what is trained
def unfreeze(captioner, generator, args):
    """{name: parameter}, in float32 at least, of cross-attention's projections (BLIP-2: its query tokens); only of the
    sides that the wanted losses reach."""
    import torch

    class Wide(torch.nn.Linear):
        def forward(self, x):                   # the master weights are wider than the frozen model around them
            return torch.nn.functional.linear(x, self.weight.to(x.dtype),
                                              None if self.bias is None else self.bias.to(x.dtype))
    found, which = {}, list(args.unfreeze)
    if args.losses == ["ig"]:
        which[0] = "none"                       # ir and tr reach both sides, tg and ig their own
    if args.losses == ["tg"] or args.own and not {"ig", "tr"} & set(args.losses):
        which[1] = "none"
    query = getattr(captioner.model, "query_tokens", None)
    if query is not None and which[0] != "none":
        if which[0] != "q":
            raise ValueError(f"--unfreeze {which[0]}: of BLIP-2 the query tokens are trained: q or none")
        query.data = query.data.float() if query.dtype.itemsize < 4 else query.data
        found["captioner.query_tokens"] = query.requires_grad_()
    names = {"q": ("query",), "kv": ("key", "value"), "qkv": ("query", "key", "value"), "none": ()}
    short = {"query": "to_q", "key": "to_k", "value": "to_v"}
    ends = tuple(f".crossattention.self.{n}" for n in names[which[0]]) if query is None else ()
    for side, model, wanted in (("captioner", captioner.model, ends),
                                ("generator", generator.unet, tuple(f".attn2.{short[n]}" for n in names[which[1]]))):
        for name, module in model.named_modules():
            if wanted and name.endswith(wanted):
                if module.weight.dtype.itemsize < 4:
                    module.__class__ = Wide
                    module.float()
                found |= {f"{side}.{name}.{k}": p.requires_grad_() for k, p in module.named_parameters()}
    if not found:
        raise ValueError(f"--unfreeze {' '.join(args.unfreeze)}, --losses {' '.join(args.losses)}: there is nothing to "
                         "train")
    return found


# ---------------------------------------------------------------- what is kept
def header(out):
    """{step, settings, versions, ...} of the checkpoint in a folder, or one clear sentence."""
    from safetensors import SafetensorError, safe_open
    path = out / "checkpoint.safetensors"
    try:
        with safe_open(path, "pt") as f:
            about = json.loads(f.metadata()["header"])
        kinds = [type(about[k]) for k in ("step", "data", "settings")]
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as e:
        raise ValueError(f"{path}: no checkpoint to go on from ({type(e).__name__}); give --out its folder") from e
    if kinds != [int, str, dict] or about["step"] < 0:
        raise ValueError(f"{path}: no checkpoint to go on from (its header is not ours); give "
                         "--out its folder")
    return about


def plain(args):
    """The settings of a run that its checkpoint keeps."""
    return {k: str(v) if isinstance(v, Path) else v
            for k, v in vars(args).items() if k not in PLACES}


def save(args, samples, step, trained, adam):
    """Written beside and renamed: a kill or a full disk leaves the older checkpoint whole."""
    import diffusers
    import torch
    import transformers
    from safetensors.torch import save_file
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    about = {"step": step, "data": samples.name + samples.beside,
             "settings": plain(args),
             "versions": {m.__name__: m.__version__ for m in (torch, transformers, diffusers)},
             "commit": git.stdout.strip() or None}
    tensors = dict(trained)
    for name, p in trained.items():
        tensors |= {f"adam.{k}.{name}": v for k, v in adam.state[p].items() if k != "step"}
    args.out.mkdir(parents=True, exist_ok=True)
    path, new = args.out / "checkpoint.safetensors", args.out / "checkpoint.new"
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, new, {"header": json.dumps(about)})
        with open(new, "rb") as f:
            os.fsync(f.fileno())
        os.replace(new, path)
        path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    except Exception as e:
        new.unlink(missing_ok=True)
        raise ValueError(f"step {step} could not be saved in {args.out} ({e}); what was saved before is whole") from e


def restore(args, samples, trained, adam):
    """Puts the checkpoint's weights and moments back; the step it was saved at. Refuses other settings."""
    import torch
    from safetensors.torch import load_file
    about = header(args.out)
    was = about["settings"] | {"data": about["data"]}
    now = {k: getattr(args, k) for k in TRAINING} | {"data": samples.name + samples.beside}
    alike = {k: was.get(k) == v for k, v in now.items()}
    alike |= {"steps": True, "epochs": True, "data": sets(was["data"]) == sets(now["data"])}
    other = [f"{k} was {was.get(k)}, is {v}" for k, v in now.items() if not alike[k]]
    if other:
        raise ValueError(f"--resume: {args.out} was trained otherwise ({'; '.join(other)}): choose another --out")
    saved = load_file(args.out / "checkpoint.safetensors")
    kinds = ("", "adam.exp_avg.", "adam.exp_avg_sq.") if about["step"] else ("",)
    for name, p in trained.items():
        for key in (kind + name for kind in kinds):
            if key not in saved or saved[key].shape != p.shape:
                raise ValueError(f"--resume: {args.out} has no {key} {tuple(p.shape)}: it is not a "
                                 "checkpoint of these models")
    for name, p in trained.items():
        p.data.copy_(saved[name])
        if about["step"]:
            adam.state[p] = {"step": torch.tensor(float(about["step"]))} | {
                k: saved[f"adam.{k}.{name}"].to(p) for k in ("exp_avg", "exp_avg_sq")}
    return about["step"]


def sets(name):
    """What Samples.name says of each set but its place: the same pictures may lie elsewhere."""
    return re.findall(r"/([^/]+: \d+ pictures(?:, [0-9a-f]{16})?)(?=; own words of |$)", name)


def export(args, cycle):
    captioner, generator = cycle.Captioner.load(args.captioner, "cpu"), cycle.Generator.load(args.generator, "cpu")
    count = cycle.adopt(args.out, captioner, generator)
    captioner.save(args.export / "captioner")
    generator.pipe.save_pretrained(args.export / "generator")
    print(f"finetune.py: {count} trained tensors; {args.export}/captioner and {args.export}/generator are stock "
          "directories")
    return 0


# ---------------------------------------------------------------- the run
def main(args):
    import torch
    import torch.distributed as dist

    import cycle
    import data
    import losses
    from miniature import world as drawn
    if args.export:
        return export(args, cycle)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cycle.one_thread(args.captioner)
    device, dtype = cycle.settle(args.device, args.dtype)
    if dtype == torch.float16 and args.dtype is None:
        dtype = torch.float32                                                 # float16 would want its losses scaled
    if (args.out / "checkpoint.safetensors").exists() and not args.resume:
        raise ValueError(f"{args.out} holds a training run: --resume goes on with it, another --out begins anew")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # the two sides, what is trained of them, and what lies between
    samples = Samples(args.data, args.split, data, drawn)
    own = None
    if args.own:
        own = Samples(*((args.own, "train") if os.path.isdir(args.own) else (args.data, args.own)), data, drawn, True)
        samples.beside = f"; own words of {own.name}"
    for x in (samples, own):
        if x and x.count < args.batch:
            raise ValueError(f"{x.name}: less than one --batch of {args.batch}; say --batch {x.count}")
    captioner = cycle.Captioner.load(args.captioner, device, dtype)
    generator = cycle.Generator.load(args.generator, device, dtype)
    if isinstance(captioner, cycle.Captioner2):
        args.micro = args.micro or 4                                           # eight at once take more than 24 GB
    if args.side:
        if not isinstance(captioner, cycle.Captioner2):
            raise ValueError("--side is for BLIP-2: BLIP was trained on one size of picture")
        captioner.side = args.side
    trained = unfreeze(captioner, generator, args)
    adam = torch.optim.AdamW([{"params": [p for k, p in trained.items() if k.startswith(side)], "lr": lr}
                              for side, lr in (("captioner", args.lr[0]), ("generator", args.lr[-1]))])
    if args.checkpointing:
        generator.unet.enable_gradient_checkpointing()
        generator.vae.enable_gradient_checkpointing()
    way, cross = crossing(args, captioner, generator) if "ir" in args.losses else (None, None)
    decode = None
    if args.decoder != "exact" and "tr" in args.losses:
        decode = cycle.tiny_decoder(args.decoder, generator)
    cycle.record(args.out)
    latents = Latents(args.cache, samples, generator, args.generator, rank, world)
    held, weights = held_out(args, samples, data, drawn), dict(zip(args.losses, args.weights))
    if world > 1:
        dist.barrier()
    start = restore(args, samples, trained, adam) if args.resume else 0
    total = args.steps or int(args.epochs * (samples.count // args.batch))
    if rank == 0:
        whole = sum(p.numel() for m in (captioner.model, *generator.pipe.components.values())
                    if isinstance(m, torch.nn.Module) for p in m.parameters())
        print(f"finetune.py: training {sum(p.numel() for p in trained.values()):,} of {whole:,} weights; "
              f"{samples.name}{samples.beside}; steps {start} to {total} of {args.batch} samples")

    def part(step, weights, samples, latents, own=False):
        """Adds this process's part of a step's gradients of some losses; (losses, 2): sum and count of each."""
        epoch, place = divmod(step, samples.count // args.batch)
        order = torch.randperm(samples.count, generator=cycle.chance("own" if own else "order", args.seed, epoch))
        mine = order[place * args.batch:][:args.batch].tolist()[rank::world]
        sums, micro = torch.zeros(len(LOSSES), 2, dtype=torch.float64), args.micro or args.batch
        for i in range(0, len(mine), micro):
            batch = collate(mine[i:i + micro], step, args, weights, samples, latents, way, captioner, generator,
                            cycle.chance, own)
            objective, each = losses.joint(captioner, generator, cross, batch,
                                           {k: w / args.batch for k, w in weights.items()}, args.chunk, True, decode)
            if objective.requires_grad:
                objective.backward()
            for name, value in each.items():
                value = value[batch.heard > 0] if name == "tr" else value
                sums[LOSSES.index(name)] += torch.tensor([value.cpu().double().sum().item(), len(value)])
        return sums

    def gradients(step, weights):
        """`part` of the captioned samples; with --own, ir of pictures nobody described, which teaches the captioner
        alone: a generator would learn its mistakes from it."""
        paired = {k: w for k, w in weights.items() if k != "ir" or not own}
        sums = part(step, paired, samples, latents) if paired else 0
        if own and "ir" in weights:
            theirs = [p for k, p in trained.items() if k.startswith("generator.")]
            for p in theirs:
                p.requires_grad_(False)
            sums = sums + part(step, {"ir": weights["ir"]}, own, Latents(None, own, generator, args.generator), True)
            for p in theirs:
                p.requires_grad_()
        return sums

    def measure():
        """Mean losses of the held-out samples, under chance that is the same at every step."""
        sums, kept = dict.fromkeys(args.losses, 0.0), Latents(None, held, generator, args.generator)
        count = min(args.held, held.count)
        for i in range(0, count, args.micro or args.batch):
            rows = range(i, min(i + (args.micro or args.batch), count))
            batch = collate(rows, -1, args, args.losses, held, kept, way, captioner, generator, cycle.chance)
            batch.heard = None
            with torch.no_grad():
                each = losses.joint(captioner, generator, cross, batch, weights, args.chunk, True, decode)[1]
            sums = {name: s + each[name].sum().item() / count for name, s in sums.items()}
        return sums

    try:
        return train(args, samples, trained, adam, gradients, measure if held and args.held else None, start, total)
    finally:
        if world > 1:
            dist.destroy_process_group()


def crossing(args, captioner, generator):
    """The bridge, and what losses.joint wants of it: (reading, layout) -> (text states, token losses)."""
    import bridge
    import losses
    encoder = generator.text_encoder
    way = bridge.Bridge(captioner.tokenizer, generator.tokenizer, encoder.get_input_embeddings().weight,
                        len(captioner.head.weight), args.bridge, captioner.prompt[0], captioner.end)

    def cross(reading, layout):
        hidden, bias = reading.hidden / args.temperature, reading.bias
        bias = bias if bias is None else bias / args.temperature
        embeddings, ce, _ = way(hidden, reading.weight, bias, layout)
        if args.temperature != 1:                                            # tg stays what it is
            ce = losses.token_loss(reading)
        return bridge.soft_states(encoder, embeddings, layout.target), ce
    return way, cross


def held_out(args, samples, data, drawn):
    """The val split of --data; None where it has none apart from what is trained on."""
    try:
        held = Samples(args.data, "val", data, drawn)
    except ValueError:
        return None
    return None if held.items and samples.items and held.items[0].path == samples.items[0].path else held


def train(args, samples, trained, adam, gradients, measure, start, total):
    """The loop: gradients of all processes, one norm, one step of AdamW, a line, now and then a checkpoint."""
    import resource

    import torch
    from tqdm import tqdm
    rank, weights, asked = int(os.environ.get("RANK", 0)), dict(zip(args.losses, args.weights)), []
    before = {s: signal.signal(s, lambda *_: asked.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    path, bar, done = args.out / "log.jsonl", tqdm(total=total, initial=start, desc="steps", disable=rank > 0), start
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = path.read_text().splitlines() if args.resume and path.exists() else []
        path.write_text("".join(r + "\n" for r in rows if r.endswith("}") and json.loads(r)["step"] <= start))
    first = last = measure() if measure and rank == 0 else {}
    try:
        for step in range(start, total):
            row, began = {"step": step + 1}, time.perf_counter()
            if args.probe and step % args.probe == 0:
                for name, weight in weights.items():
                    together(trained, gradients(step, {name: weight}), ())
                    row[f"norm_{name}"] = {side: length(trained, side) for side in ("captioner", "generator")}
                    adam.zero_grad()
            sums, halt = together(trained, gradients(step, weights), asked)
            row |= {name: s / n if n else None for name, (s, n) in zip(LOSSES, sums.tolist()) if name in weights}
            row["norm"] = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip or math.inf).item()
            bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
            if bad:
                raise ValueError(f"step {step + 1}: {', '.join(bad)} is not finite; no weight was changed by it. "
                                 f"{args.out} keeps step {done}; a lower --lr, --tmax or --dtype float32 may help")
            adam.step()
            adam.zero_grad()
            row["images_per_s"] = round(args.batch / (time.perf_counter() - began), 3)
            row["peak_gib"] = round((torch.cuda.max_memory_allocated() / 2 ** 30) if torch.cuda.is_available() else
                                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2)
            keep = halt or step + 1 == total or (step + 1) % args.every == 0
            if rank == 0:
                if keep and measure:
                    row["held"] = last = measure()
                with open(path, "a") as f:
                    f.write(json.dumps(row) + "\n")
                bar.update()
                bar.set_postfix({k: f"{row[k]:.3f}" for k in weights if row[k] is not None}, refresh=False)
                if keep:
                    save(args, samples, step + 1, trained, adam)
                    done = step + 1
            if halt:
                break
    finally:
        bar.close()
        for s, f in before.items():
            signal.signal(s, f)
    if rank == 0:
        again = " ".join(["--resume", spelled(foreign(plain(args)))]).strip()
        print(f"finetune.py: step {done} is in {args.out}/checkpoint.safetensors, every step in {path}"
              + (f"; stopped before {total}: {again} goes on" if done < total else ""))
        if first:
            print(f"finetune.py: {args.held} held-out samples, step {start} -> {done}: "
                  + ", ".join(f"{k} {first[k]:.4f} -> {last[k]:.4f}" for k in first))
    return 130 if done < total and rank == 0 else 0


def together(trained, sums, asked):
    """One all_reduce of the flattened gradients, the losses and the wish to stop: (summed losses, stop?)."""
    import torch
    import torch.distributed as dist
    for p in trained.values():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if not (dist.is_available() and dist.is_initialized()):
        return sums, bool(asked)
    some = next(iter(trained.values()))
    few = torch.cat([sums.flatten(), torch.tensor([float(bool(asked))])]).to(some.device, torch.float32)
    flat = torch.cat([p.grad.flatten() for p in trained.values()] + [few.to(some.dtype)])
    dist.all_reduce(flat)
    for p, part in zip(trained.values(), flat.split([p.numel() for p in trained.values()] + [len(few)])):
        p.grad.copy_(part.view_as(p))
    few = flat[-len(few):].cpu()
    return few[:-1].view_as(sums).double(), few[-1].item() > 0


def length(trained, side):
    import torch
    wide = {"mps": torch.float32}                                                            # which has no float64
    return sum(p.grad.to(wide.get(p.device.type, torch.float64)).square().sum().item() for k, p in trained.items()
               if k.startswith(side)) ** .5


if __name__ == "__main__":
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        print(f"finetune.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
