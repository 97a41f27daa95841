"""Speed and memory, ours beside the obvious way, as ratios of one run on this machine.

    python -m lab.bench                  # all but real, about three minutes on two cores
    python -m lab.bench bridge scores    # some: bridge, scores, step, captions
    python -m lab.bench real             # on a GPU, at full size: four minutes (H100)

What is compared is the same work with the same result; the tests hold the results against each
other, not this file.
"""
import contextlib
import gc
import itertools
import json
import os
import platform
import re
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import bridge
import cycle
import finetune
import losses
import metrics
import records
import script
from captioners import Captioner
from generators import Generator, few_steps
from lab.keep import rounded
from miniature import world

HERE = Path(__file__).resolve().parent.parent
load_once = cache(Captioner.load)
MODELS = ("sd14", "vitb", "vitl", "blip2")
# kernels that multiply, by their names in CUDA's libraries; all others move memory
MULTIPLY = re.compile("gemm|cutlass|xmma|nvjet|wgrad|dgrad|fprop|convolve|cudnn|flash|fmha")
# rows of `real`: a captioner and flags of finetune.py; the others are measured by the first
REAL = (
    "vitb", "vitb --losses tg", "vitb --losses ig", "vitb --losses tg ir",
    "vitb --losses tg ir --own all", "vitb --micro 4", "vitb --micro 2", "vitb --micro 1",
    "vitb --checkpointing", "vitb --chunk 2", "vitb --chunk 8", "vitl", "vitl --micro 4",
    "blip2", "blip2 --micro 8", "blip2 --micro 1",
)


def flags(argv=None):
    p = script.Parser(__doc__)
    p.add_argument("what", nargs="*", choices=[*ON_CPU, "real", "all"], default="all",
                   help="all, the default: all but real")
    p.add_argument("--times", type=int, default=3, help="runs of each; the fastest counts")
    p.add_argument("--threads", type=int, default=2, help="processor threads")
    p.add_argument("--json", type=Path, metavar="FILE", help="the rows as JSON, too")
    p.add_argument("--work", type=Path, default=HERE / "out/real", help="of `real`: 11 GB")
    return p.parse_args(argv)


# ---------------------------------------------------------------- the instruments
def clock(work, times):
    """Seconds of the fastest of some runs."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def peak(work):
    """What work() allocates at most beyond what it found, in bytes, on the CPU."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0))


def show(name, rows):
    """rows: {way: {unit: value}}; the first way is what the others are measured by."""
    first = next(iter(rows.values()))
    for way, values in rows.items():
        line = f"{name:10}{way:44}"
        for unit, value in values.items():
            line += f"{value:9.3f} {unit} ({value / first[unit]:5.2f} x)  "
        print(line, flush=True)


# ---------------------------------------------------------------- on a processor
def bench_bridge(times, shape=(8, 40), words=30524, width=768):
    """Soft embeddings and caption loss at BLIP's vocabulary, forward and backward."""
    torch.manual_seed(0)
    weight = torch.randn(words, width) / width ** .5                        # (V, H)
    bias = torch.randn(words)
    table = torch.randn(words, width)                                       # (V, D)
    states = torch.randn(*shape, width)                                     # (B, L, H)
    towards = torch.randn(*shape, width)
    targets = torch.randint(words, shape)                                   # (B, L)

    def run(product):
        hidden = states.clone().requires_grad_()
        soft, ce, p = product(hidden, weight, bias, table, targets)
        loss = (soft * towards).sum() + ce.mean() + p.sum()
        loss.backward()

    ways = {"softmax, then the table": partial(run, bridge.soft_embed_plain),
            "fused": partial(run, bridge.soft_embed)}
    return {name: {"s": clock(work, times), "MiB": peak(work) / 2 ** 20}
            for name, work in ways.items()}


def bench_scores(times):
    """CIDEr and BLEU of 5,000 captions with 5 references each, tokenizing included."""
    rows = [world.captions(world.sample("all", i), 6) for i in range(5000)]
    captions = [row[0] for row in rows]
    references = [row[1:6] for row in rows]

    def ours():
        metrics.tokenize.cache_clear()                         # nothing kept from the run before
        counts = metrics.bleu_counts(captions, references)
        return metrics.cider(captions, references).mean(), metrics.bleu(counts.sum(0))[3]

    def theirs():
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
        gts = {i: [] for i in range(len(rows))}
        res = {i: [{"caption": row[0]}] for i, row in enumerate(rows)}
        for i, row in enumerate(references):
            gts[i] += [{"caption": caption} for caption in row]
        gts = PTBTokenizer().tokenize(gts)
        res = PTBTokenizer().tokenize(res)
        Cider().compute_score(gts, res)
        Bleu(4).compute_score(gts, res, verbose=0)

    seconds = {}
    try:
        seconds["pycocoevalcap 1.2 (Java, Python)"] = {"s": clock(theirs, 1)}
    except (ImportError, OSError) as e:
        print(f"scores    no pycocoevalcap, Java to compare with: {e}", file=sys.stderr)
    seconds["metrics.py"] = {"s": clock(ours, times)}
    print("          CIDEr {:.4f}, BLEU-4 {:.4f}".format(*ours()))
    return seconds


def bench_step(times):
    """A step on the miniature, batch 8: the split backward beside one graph, and the parts."""
    captioner = Captioner.load(device="cpu")
    generator = Generator.load(device="cpu")
    query_only(captioner.model, "crossattention.self.query.weight")
    query_only(generator.unet, "attn2.to_q.weight")
    between = bridge.Bridge(
        captioner.tokenizer, generator.tokenizer,
        generator.text_encoder.get_input_embeddings().weight, len(captioner.head.weight),
        begin=captioner.prompt[0], end=captioner.end)

    def cross(reading, layout):
        soft, ce, _ = between(reading.hidden, reading.weight, reading.bias, layout)
        return bridge.soft_states(generator.text_encoder, soft, layout.target), ce

    def layout(captions):
        texts = [captioner.space + caption for caption in captions]
        return between.layout(texts, captioner.lead, captioner.room)

    def step(*names, batch=None, **options):
        weights = dict.fromkeys(names, 1 / 8)
        total, _ = losses.joint(captioner, generator, cross, batch or human, weights, **options)
        total.backward()

    def own_words():
        """tg of the batch, and ir of as many pictures that the captioner describes itself."""
        step("tg")
        generator.unet.requires_grad_(False)
        said = [row[0] for row in captioner.speak(images, 1)[0]]
        step("ir", batch=replace(human, captions=said, layout=layout(said)))
        query_only(generator.unet, "attn2.to_q.weight")

    def apart(*names):
        for name in names:
            step(name, chunk=8)

    scenes = [world.sample("train", i) for i in range(8)]
    images = torch.stack([world.picture(s) for s in scenes])
    captions = [world.captions(s)[0] for s in scenes]
    latents, _ = generator.encode(images)
    human = losses.Batch(captions, images, layout(captions), latents, torch.randn_like(latents),
                         torch.arange(50, 850, 100))
    every = losses.NAMES
    return {
        "tg": cost(times, step, "tg"),
        "ig": cost(times, step, "ig"),
        "tg and ig, apart": cost(times, apart, "tg", "ig"),
        "tg and ir": cost(times, step, "tg", "ir"),
        "ig and tr": cost(times, step, "ig", "tr", chunk=8),
        "tg, and ir of own words": cost(times, own_words),
        "four losses apart": cost(times, apart, *every),
        "all four": cost(times, step, *every, chunk=8),
        "all four, one graph": cost(times, step, *every, split=False, chunk=8),
        "all four, tr image by image": cost(times, step, *every),
    }


def query_only(model, ending):
    """Freezes all but the weights with that ending."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(ending))


def cost(times, step, *names, **options):
    """Seconds, memory and counted operations of step(*names, **options)."""
    work = partial(step, *names, **options)
    with FlopCounterMode(display=False) as counter:
        work()
    return {"s": clock(work, times), "MiB": peak(work) / 2 ** 20,
            "GFLOP": counter.get_total_flops() / 1e9}


def bench_captions(times):
    """Ten captions of each of 16 pictures: vision once a picture, or on ten copies of it."""
    captioner = Captioner.load(device="cpu")
    images = torch.stack([world.picture(world.sample("test", i)) for i in range(16)])
    ids = torch.tensor([captioner.prompt]).repeat(10, 1)

    @torch.no_grad()
    def naive():
        for image in images:
            pixels = captioner.pixels(image[None]).repeat(10, 1, 1, 1)
            captioner.model.generate(pixels, ids, do_sample=True, top_p=.9, repetition_penalty=1.1,
                                     max_length=20, min_length=5)

    naive()                                                    # the first run is not timed
    return {"generate, ten times each": {"s": clock(naive, times)},
            "speak": {"s": clock(partial(captioner.speak, images, 10), times)}}


# ---------------------------------------------------------------- at full size, on a GPU
def whole(name, tokenizer):
    """vitb, vitl, blip2 or sd14 (a pipeline) at full size, with random weights."""
    import diffusers
    import transformers as hf
    base = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12)
    if name == "sd14":
        vae = diffusers.AutoencoderKL(
            sample_size=512, layers_per_block=2, block_out_channels=[128, 256, 512, 512],
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
        text_encoder = hf.CLIPTextModel(hf.CLIPTextConfig(vocab_size=49408, **base))
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        scheduler = diffusers.PNDMScheduler(
            beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", skip_prk_steps=True,
            steps_offset=1)
        return diffusers.StableDiffusionPipeline(
            vae, text_encoder, tokenizer, unet, scheduler, None, None,
            requires_safety_checker=False)
    if name == "blip2":
        text = hf.OPTConfig(
            vocab_size=50304, hidden_size=2560, word_embed_proj_dim=2560, ffn_dim=10240,
            num_hidden_layers=32, num_attention_heads=32, eos_token_id=tokenizer.eos_token_id)
        config = hf.Blip2Config(text_config=text.to_dict(), image_token_index=50265)
        return hf.Blip2ForConditionalGeneration(config)
    vision = dict(image_size=384)
    if name == "vitl":
        vision |= dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                       num_attention_heads=16)
    text = hf.AutoConfig.from_pretrained(HERE / "miniature/blip").text_config.to_dict() | base
    text |= dict(vocab_size=30524, max_position_embeddings=512,
                 encoder_hidden_size=vision.get("hidden_size", 768))
    return hf.BlipForConditionalGeneration(hf.BlipConfig(text_config=text, vision_config=vision))


def built(name, folder):
    """The folder of a `whole` model in bfloat16, as the hub lays it out. The tokenizer is the
    miniature's, filled up to the size of the vocabulary: its tables have their full size, and so
    has the work."""
    from transformers import AutoTokenizer
    folder = folder / name
    small = HERE / "miniature"
    if (folder / "ready").exists():
        return folder
    vocabulary = "blip" if name.startswith("vit") else "sd/tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(small / vocabulary)
    tokenizer.model_max_length = 77                # Stable Diffusion's; the captioners do not ask
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = whole(name, tokenizer)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    if name != "sd14":
        size = model.config.text_config.vocab_size
        tokenizer.add_tokens([f"[unused{number}]" for number in range(len(tokenizer), size)])
        tokenizer.save_pretrained(folder)
        processor = json.loads((small / "blip/preprocessor_config.json").read_text())
        processor["size"] = {"height": 384, "width": 384}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "ready").touch()
    return folder


@contextlib.contextmanager
def fitting(what):
    """A line in place of what does not fit the GPU."""
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"bench.py: {what} does not fit this GPU", file=sys.stderr)


def models_at(work):
    """{name: folder} of the models that fit this GPU."""
    if not torch.cuda.is_available():
        raise ValueError("real: torch sees no CUDA device here, and a processor would take hours")
    places = {}
    for name in MODELS:
        with fitting(name):
            places[name] = built(name, work)
    return places


def bench_real(places):
    """A step of finetune.py with each captioner and Stable Diffusion 1.4, batch 8, bfloat16."""
    rows = {}
    for row in REAL:
        name = row.split()[0]
        if name not in places:
            continue
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with fitting(row), tempfile.TemporaryDirectory() as out:
            rows[row] = real_step(row.split()[1:], places[name], places["sd14"], name, out)
    return rows


def real_step(options, captioner, generator, name, out):
    """Eight steps of finetune.py in this process: seconds of the fastest, GiB."""
    argv = ["--captioner", str(captioner), "--generator", str(generator), "--data", "miniature",
            "--steps", "8", "--probe", "0", "--held", "0", "--out", out, *options]
    if name == "blip2":
        argv += ["--side", "384"]
    if finetune.main(finetune.flags(argv)):
        raise ValueError(f"finetune.py {' '.join(argv)} did not come to its end")
    log = records.read_rows(Path(out) / "log.jsonl")
    return {"s": min(8 / row["images_per_s"] for row in log[2:]),
            "GiB": torch.cuda.max_memory_allocated() / 2 ** 30,
            "GiB reserved": torch.cuda.max_memory_reserved() / 2 ** 30}


def bench_kernels(places):
    """Seconds of the GPU's kernels in a step with vitb, by what another card does them faster or
    slower: multiply (its peak), move (its bandwidth). The models' loading is in it."""
    gpu = [torch.profiler.ProfilerActivity.CUDA]
    with tempfile.TemporaryDirectory() as out, torch.profiler.profile(activities=gpu) as seen:
        real_step([], places["vitb"], places["sd14"], "vitb", out)
    seconds = {"multiply": 0.0, "move": 0.0}
    for event in seen.events():
        kind = "multiply" if MULTIPLY.search(event.name.lower()) else "move"
        seconds[kind] += event.device_time_total / 1e6 / 8             # of eight steps
    return {"vitb": seconds}


def bench_frozen(times, places):
    """Seconds of one picture's ten captions: saying, scoring and drawing them."""
    scene = world.sample("test", 0)
    image = world.picture(scene)[None]
    ten = list(dict.fromkeys(world.captions(scene, 40)))[:10]
    generator = Generator.load(places["sd14"])
    few = few_steps(Generator.load(places["sd14"]))
    timesteps, noise = cycle.noises(generator)

    score = partial(losses.score, generator, image, ten, timesteps, noise)
    ways = {
        "score by denoising, 12 noises": score,
        "draw in 8 steps": partial(few.draw, ten, [0] * 10, steps=8),
        "draw in 50 steps": partial(generator.draw, ten, [0] * 10),
    }
    for name in MODELS[1:]:
        if name in places:
            ways[f"say, {name}"] = lambda place=places[name]: load_once(place).speak(image, 10)
    rows = {}
    for name, work in ways.items():
        with fitting(name):
            work()                                             # the first run is not timed
            rows[f"ten captions: {name}"] = {"s": clock(work, times)}
    return rows


ON_CPU = {"bridge": bench_bridge, "scores": bench_scores, "step": bench_step,
          "captions": bench_captions}


def main(args):
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"{args.threads} threads, torch {torch.__version__}; ratios are to the first of each")
    found = {}
    for name in ON_CPU if "all" in args.what else args.what:
        if name in ON_CPU:
            found[name] = ON_CPU[name](args.times)
        else:
            places = models_at(args.work)
            found[name] = bench_real(places)
            found["kernels"] = bench_kernels(places)
            found["frozen"] = bench_frozen(args.times, places)
    for name, rows in found.items():
        show(name, rows)
    if args.json:
        write(args.json, found, "real" in found)
    return 0


def write(path, found, gpu):
    """{"about": the machine, bench: rows} as JSON, numbers to five digits."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    if gpu:
        machine = torch.cuda.get_device_name()
    dtype = "bfloat16" if gpu else "float32"
    found = {"about": {"machine": machine, "torch": torch.__version__, "dtype": dtype}} | found
    records.write_text(path, json.dumps(rounded(found), indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")            # the profiler talks to stderr
    script.run(main, flags)
