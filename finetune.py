"""Joint finetuning of captioner and generator: L = L_TG + L_IR + L_IG + L_TR (Section 4, Eq. 1-5).

    python finetune.py --steps 200                       # the miniature, drawn as it goes
    python finetune.py --captioner vitb --data data/coco          # the paper's: SD v1-4, 5 epochs
    python finetune.py --captioner vitb --data data/coco --losses tg ir        # a row of Table 5
    python finetune.py --captioner vitb --data data/coco --own photos/         # without captions
    torchrun --nproc_per_node=8 finetune.py --captioner vitb --data data/coco  # the same training
    python finetune.py --export out/models               # stock directories for from_pretrained

Writes into --out: checkpoint.safetensors (trained weights, optimizer; settings and step in its
header), checkpoint.json (the same to read), log.jsonl (a line a step), log.png. Which sample,
caption, timestep and noise a step gets is a function of (seed, step, sample): the number of
processes, --micro and a stop change nothing. Run again, the same command goes on where it was
stopped or killed. The miniature: one thread (OMP_NUM_THREADS rules).
"""
import script  # isort: skip
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import bridge
import checkpoints
import data
import devices
import loading
import losses
import records
from batches import Samples, collate, digest, held_out, open_samples
from captioners import CAPTIONERS, Captioner
from cycle import chance
from generators import GENERATORS, Generator, tiny_vae
from miniature import toys
from script import real, whole

LOSSES = losses.NAMES
SPLITS = ("train", "all", "restval", "val", "test", "in", "near", "out", "nocaps")
SIDES = checkpoints.SIDES
# what a run is made of; all else is speed, memory and places
TRAINING = ("captioner", "generator", "split", "losses", "weights", "unfreeze", "bridge", "batch",
            "lr", "clip", "thin", "decoder", "seed", "dtype", "side")


def flags(argv=None):
    cli = script.Parser(__doc__)
    cli.add_argument("--captioner", default="miniature", help="vitb, vitl, blip2, folder or hub id")
    cli.add_argument("--generator", help="miniature, sd14, folder or hub id; follows --captioner")
    cli.add_argument("--data", help="folder: COCO, or pictures with metadata.jsonl, .csv or .txt")
    cli.add_argument("--anywhere", action="store_true", help="pictures may lie out of --data")
    cli.add_argument("--split", default="train", help="of --data; all: nothing is held out")
    cli.add_argument("--own", help="pictures without captions for ir: a folder, a split of --data")
    cli.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="Table 5")
    cli.add_argument("--weights", nargs="+", type=real(0), help="one each of --losses; default 1")
    cli.add_argument("--unfreeze", nargs=2, default=["q", "q"], choices=["q", "kv", "qkv", "none"],
                     metavar=("CAPTIONER", "GENERATOR"), help="projections of cross-attention")
    cli.add_argument("--side", type=whole(1, 4096), help="pixels a side, of BLIP-2; default 384")
    cli.add_argument("--bridge", default="anchored", choices=list(bridge.KINDS), help="or plain")
    cli.add_argument("--lr", type=real(0), nargs="+", default=[1e-4],
                     help="learning rate, default 1e-4 (the paper's); a second: the generator's")
    cli.add_argument("--batch", type=whole(1), default=8, help="samples a step, of all processes")
    cli.add_argument("--micro", type=whole(1),
                     help="samples at once: memory, not the result; blip2 4")
    cli.add_argument("--chunk", type=whole(1), help="images at once in tr, the peak of memory; 1")
    cli.add_argument("--epochs", type=real(1e-9), default=5, help="over the data; --steps wins")
    cli.add_argument("--steps", type=whole(1),
                     help="default 1000 of the miniature, else by --epochs")
    cli.add_argument("--clip", type=real(0), default=1.0, help="largest gradient norm; 0 = any")
    cli.add_argument("--thin", type=whole(1), default=1, help="tr on one sample of K, weighted K")
    cli.add_argument("--decoder", default="exact", help="of tr: exact, tiny (TAESD), or its place")
    cli.add_argument("--cache", help="folder for latents: each image is encoded once")
    cli.add_argument("--checkpointing", action="store_true", help="less than half the memory")
    cli.add_argument("--seed", type=int, default=0, help="of all chance")
    cli.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    cli.add_argument("--dtype", help="of the frozen weights: default bfloat16 on a GPU that has it")
    cli.add_argument("--every", type=whole(1), default=100, help="steps between checkpoints")
    cli.add_argument("--probe", type=whole(0), default=100, help="steps between norms of each loss")
    cli.add_argument("--held", type=whole(0), default=64,
                     help="pictures of val seen with a checkpoint")
    cli.add_argument("--out", type=Path, default=Path("out/finetune"), help="where it writes")
    cli.add_argument("--export", type=Path, metavar="DIR", help="write --out's models, no training")
    args = cli.parse_args(argv)
    small = args.captioner == "miniature"
    args.generator = args.generator or ("miniature" if small else "sd14")
    return args if args.export else complete(args, small)


def complete(args, small):
    """Defaults that follow from other flags, and what cannot be."""
    args.data = args.data or ("miniature" if small else None)
    args.steps = args.steps or (1000 if args.data == "miniature" else None)
    args.side = args.side or (384 if args.captioner == "blip2" else None)
    args.chunk = args.chunk or (8 if small else 1)
    args.weights = args.weights or [1.0] * len(args.losses)
    if args.data is None:
        raise ValueError(f"--captioner {args.captioner} needs --data: the folder of a set")
    if len(args.lr) > 2:
        raise ValueError("--lr takes one number, or the captioner's and the generator's")
    if len(args.weights) != len(args.losses):
        raise ValueError(f"--weights: {len(args.weights)} of them for {len(args.losses)} losses")
    weights = dict(zip(args.losses, args.weights))
    args.losses = [name for name in LOSSES if name in weights]
    args.weights = [weights[name] for name in args.losses]
    if args.own and "ir" not in args.losses:
        raise ValueError("--own gives pictures to ir, which is not among --losses")
    if args.own and not os.path.isdir(args.own) and args.own not in SPLITS:
        raise ValueError(f"--own {args.own}: no such folder, and no split of --data")
    for name, used in (("decoder", args.decoder != "exact"), ("thin", args.thin > 1)):
        if used and "tr" not in args.losses:
            raise ValueError(f"--{name} is of tr, which is not among --losses")
    return args


def settings_of(args):
    """What a checkpoint keeps of the command line, and of models that are files."""
    settings = {name: getattr(args, name) for name in TRAINING}
    models = {name: settings[name] for name in (*SIDES, "decoder")}
    return settings | records.marks(models, {*CAPTIONERS, *GENERATORS, "exact", "tiny"})


# ---------------------------------------------------------------- a step
@dataclass
class Run:
    """All that a step needs."""
    captioner: Captioner
    generator: Generator
    bridge: bridge.Bridge | None                 # of ir
    samples: Samples                             # pictures with captions
    own: Samples | None                          # pictures without, for ir
    held: Samples | None                         # pictures that are not trained on
    trained: dict                                # {name: parameter}
    adam: torch.optim.Optimizer
    weights: dict                                # {loss: weight}
    batch: int                                   # samples a step, of all processes
    micro: int                                   # samples at once
    chunk: int                                   # images at once in tr
    thin: int                                    # tr on one of so many samples
    seed: int
    clip: float                                  # largest gradient norm, 0 = any
    rank: int                                    # which process
    processes: int                               # of how many
    out: Path                                    # folder of checkpoint and log
    every: int                                   # steps between checkpoints
    probe: int                                   # steps between norms of each loss, 0 = never
    total: int                                   # steps in all
    settings: dict                               # what the checkpoint keeps of the command line

    def joint(self, batch, weights):
        """losses.joint of a Batch: what to call backward on, and {loss: (B,)}."""
        return losses.joint(self.captioner, self.generator, self.cross, batch, weights, self.chunk)

    def cross(self, reading, layout):
        """Over the bridge: text states (B, T, D), and the captions' cross-entropies (B, L)."""
        soft, ce, _ = self.bridge(reading.hidden, reading.weight, reading.bias, layout)
        return bridge.soft_states(self.generator.text_encoder, soft, layout.target), ce


def gradients(run, step, weights):
    """Adds this process's share of a step's gradients; (losses, 2): sum and count of each loss.

    ir of pictures that nobody described teaches the captioner alone: a generator would learn its
    mistakes from it.
    """
    sums = torch.zeros(len(LOSSES), 2, dtype=torch.float64)
    own = {"ir": weights["ir"]} if run.own and "ir" in weights else {}
    others = {name: weight for name, weight in weights.items() if name not in own}
    for samples, some in ((run.samples, others), (run.own, own)):
        if some:
            for parameter in run.adam.param_groups[1]["params"]:       # the generator's
                parameter.requires_grad_(samples is run.samples)
            sums += share(run, samples, step, some)
    return sums


def share(run, samples, step, weights):
    """`gradients` of one set of samples."""
    # the samples of this step, the same ones however many processes share them
    epoch, place = divmod(step, len(samples) // run.batch)
    kind = "order" if samples.described else "own"
    order = torch.randperm(len(samples), generator=chance(kind, run.seed, epoch))
    mine = order[place * run.batch:][:run.batch].tolist()[run.rank::run.processes]

    sums = torch.zeros(len(LOSSES), 2, dtype=torch.float64)
    scaled = {name: weight / run.batch for name, weight in weights.items()}
    for i in range(0, len(mine), run.micro):
        batch = collate(run, samples, mine[i:i + run.micro], step, weights)
        total, each = run.joint(batch, scaled)
        if total.requires_grad:
            total.backward()
        for name, value in each.items():
            if name == "tr":
                value = value[batch.tr_weight > 0]
            row = LOSSES.index(name)
            sums[row, 0] += value.cpu().double().sum()
            sums[row, 1] += len(value)
    return sums


@torch.no_grad()
def held_out_losses(run):
    """{loss: mean over the held-out samples}, under chance that is the same at every step."""
    means = dict.fromkeys(run.weights, 0.0)
    count = len(run.held)
    for i in range(0, count, run.micro):
        batch = collate(run, run.held, range(count)[i:i + run.micro], -1, run.weights)
        batch.tr_weight = None                               # nothing is thinned
        _, each = run.joint(batch, run.weights)
        for name in means:
            means[name] += each[name].sum().item() / count
    return means


def train_step(run, step, stops):
    """One step of AdamW on the gradients of all processes: its line of the log, whether to stop."""
    row = {"step": step + 1}
    began = time.perf_counter()
    if run.probe and step % run.probe == 0:                  # the gradient of each loss alone
        for name, weight in run.weights.items():
            all_reduce(run, gradients(run, step, {name: weight}), stops)
            row[f"norm_{name}"] = {side: gradient_norm(run.trained, side) for side in SIDES}
            run.adam.zero_grad()
    sums = gradients(run, step, run.weights)
    halt = all_reduce(run, sums, stops)
    for name in run.weights:
        total, count = sums[LOSSES.index(name)].tolist()
        row[name] = total / count if count else None             # --thin may leave none for tr
    norm = torch.nn.utils.clip_grad_norm_(run.trained.values(), run.clip or math.inf)
    row["norm"] = norm.item()
    bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    if bad:
        raise FloatingPointError(f"step {step + 1}: {', '.join(bad)} is not finite; no weight was "
                                 "changed by it; a lower --lr or --dtype float32 may help")
    run.adam.step()
    run.adam.zero_grad()
    row["images_per_s"] = round(run.batch / (time.perf_counter() - began), 3)
    row["peak_gib"] = devices.peak_gib()
    return row, halt


def all_reduce(run, sums, stops):
    """Adds up gradients and sums of all processes, in place; whether one of them is to stop."""
    halt = torch.tensor(len(stops))
    for parameter in run.trained.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if run.processes > 1:
            dist.all_reduce(parameter.grad)
    if run.processes > 1:
        dist.all_reduce(sums)
        dist.all_reduce(halt)
    return bool(halt)


def gradient_norm(trained, side):
    grads = [p.grad.cpu().double() for name, p in trained.items() if name.startswith(side)]
    return math.sqrt(sum(grad.square().sum().item() for grad in grads))


# ---------------------------------------------------------------- the run
def main(args):
    data.LEAVE = args.anywhere
    if args.export:
        return checkpoints.export(args.out, settings_of(args), args.export)
    rank, processes = records.rank_and_world()
    toys.tune_process(args.captioner, args.generator)
    device, dtype = devices.device_and_dtype(args.device, args.dtype)
    if dtype == torch.float16 and args.dtype is None:
        dtype = torch.float32                                # float16 would want its losses scaled

    # the pictures
    samples, own, content = open_samples(args.data, args.split, args.own, args.batch)
    total = args.steps or int(args.epochs * (len(samples) // args.batch))
    settings = settings_of(args) | {"data": content}
    start = checkpoints.begun(args.out, settings)
    if start >= total:
        if rank == 0:
            checkpoints.plot(args.out, args.losses)      # a kill may have left none
            print(f"finetune.py: {args.out} has all {total} steps; a larger --steps goes on, "
                  "another --out begins anew")
        return 0
    if processes > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    held = held_out(args.data, args.held, [samples, own] if own else [samples])

    # the two sides, what is trained of them, and what lies between
    captioner = Captioner.load(args.captioner, device, dtype)
    generator = Generator.load(args.generator, device, dtype)
    if not getattr(generator, "denoises", False) or not hasattr(captioner, "head"):
        raise ValueError(f"--captioner {args.captioner} --generator {args.generator}: BLIP, BLIP-2 "
                         "and Stable Diffusion 1.x or 2.x can be trained")
    nothing = torch.zeros(1, 1, 1, 1)        # a prediction_type without a formula is told now
    losses.target(generator.scheduler, nothing, nothing, torch.tensor([0]))
    args.micro = args.micro or captioner.micro
    if args.side and not captioner.learns_queries:
        raise ValueError("--side is for BLIP-2: BLIP was trained on one size of picture")
    captioner.side = args.side
    if args.checkpointing:
        generator.unet.enable_gradient_checkpointing()
        generator.vae.enable_gradient_checkpointing()
    trained = checkpoints.unfreeze(captioner, generator, args.unfreeze, args.losses, own)
    groups = []
    for side, lr in zip(SIDES, (args.lr[0], args.lr[-1])):
        parameters = [p for name, p in trained.items() if name.startswith(side)]
        groups.append({"params": parameters, "lr": lr})
    adam = torch.optim.AdamW(groups)
    between = None
    if "ir" in args.losses:
        between = bridge.Bridge(captioner.tokenizer, generator.tokenizer,
                                generator.text_encoder.get_input_embeddings().weight,
                                len(captioner.head.weight), args.bridge, captioner.prompt[0],
                                captioner.end)
    if args.decoder != "exact":
        generator.decoder = tiny_vae(args.decoder, generator)
    if args.cache:                           # other pictures or another generator: other latents
        of = digest([samples.name, args.generator, str(generator.dtype)])
        samples.cache = Path(args.cache) / of
    run = Run(captioner=captioner, generator=generator, bridge=between, samples=samples, own=own,
              held=held, trained=trained, adam=adam, weights=dict(zip(args.losses, args.weights)),
              batch=args.batch, micro=args.micro or args.batch, chunk=args.chunk, thin=args.thin,
              seed=args.seed, clip=args.clip, rank=rank, processes=processes, out=args.out,
              every=args.every, probe=args.probe, total=total, settings=settings)
    loading.record_revisions(args.out)
    if start:
        checkpoints.restore(args.out, start, trained, adam)
    try:
        return train(run, start)
    finally:
        if processes > 1:
            dist.destroy_process_group()


def train(run, start):
    """The loop: a step, a line, now and then a checkpoint. Returns the exit code: 0, or 128 and the
    number of the signal that stopped it."""
    speaks = run.rank == 0                                   # one of the processes writes
    stops, handlers = [], {}
    for number in script.stops():
        handlers[number] = signal.signal(number, lambda caught, _: stops.append(caught))
    log = run.out / "log.jsonl"
    first = last = {}
    if speaks:
        weights = sum(p.numel() for p in run.trained.values())
        begins = f"goes on after step {start}" if start else "begins"
        print(f"finetune.py: {run.out} {begins}, {run.total} steps of {run.batch} samples in all; "
              f"{weights:,} weights are trained; {run.settings['data']}")
        rows = checkpoints.log_rows(log)
        records.write_rows(log, [row for row in rows if row["step"] <= start])
        if run.held:
            first = last = held_out_losses(run)
    bar = tqdm(total=run.total, initial=start, desc="steps", disable=not speaks)
    saved = start
    try:
        for step in range(start, run.total):
            row, halt = train_step(run, step, stops)
            planned = step + 1 == run.total or (step + 1) % run.every == 0
            if speaks and planned and run.held:              # a stop changes no line of the log
                row["held"] = last = held_out_losses(run)
            if speaks:
                records.append_rows(log, [row])
                bar.update()
                bar.set_postfix({name: row[name] for name in run.weights}, refresh=False)
            if speaks and (planned or halt):
                saved = step + 1
                checkpoints.save(run.out, saved, run.trained, run.adam, run.settings)
            if halt:
                break
    except FloatingPointError as e:
        raise ValueError(f"{e}. {run.out} keeps step {saved}") from e
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not speaks:
        return 0
    print(f"finetune.py: step {saved} is in {run.out}/checkpoint.safetensors, every step in {log}")
    if first and saved == run.total:
        changes = [f"{name} {first[name]:.4f} -> {last[name]:.4f}" for name in first]
        print(f"finetune.py: {len(run.held)} held-out samples, step {start} -> {saved}: "
              f"{', '.join(changes)}")
    checkpoints.plot(run.out, list(run.weights))
    if saved < run.total:
        print(f"finetune.py: stopped after step {saved} of {run.total}; this goes on: "
              f"{script.again()}")
        return 128 + (stops or [signal.SIGINT])[0]
    return 0


if __name__ == "__main__":
    script.run(main, flags)
