"""Speed and memory, ours beside the obvious way, as ratios of one run on this machine.

    python -m lab.bench                     # all but real, about three minutes on two cores
    python -m lab.bench bridge scores       # some: bridge, scores, step, captions
    python -m lab.bench real  # on a GPU: what fits at full size, how fast; four minutes (H100)

What is compared is the same work with the same result; the tests hold the results against each other, not this file.
"""
import argparse
import contextlib
import functools
import json
import os
import platform
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SHOWN = {}


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", help=f"{' '.join(BENCHES)}; default all but real")
    p.add_argument("--times", type=int, default=3, help="runs of each; the fastest counts")
    p.add_argument("--threads", type=int, default=2, help="processor threads")
    p.add_argument("--json", type=Path, metavar="FILE", help="the rows as JSON, too")
    p.add_argument("--work", type=Path, default=HERE / "out/real", help="folder of the random models of `real`: 11 GB")
    p.add_argument("--captions", type=Path, help="Karpathy rows [{image, caption: [5]}] for scores; default invented")
    args = p.parse_args(argv)
    args.what = args.what or [name for name in BENCHES if name != "real"]
    unknown = set(args.what) - set(BENCHES)
    if unknown:
        p.error(f"{', '.join(sorted(unknown))}: choose among {', '.join(BENCHES)}")
    return args


def clock(f, times):
    """Seconds of the fastest of some runs."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - start)
    return best


def show(name, rows):
    """rows: {way: {unit: value}}; the first way is what the others are measured by. Kept for --json."""
    SHOWN.setdefault(name, {}).update(rows)
    first = next(iter(rows.values()))
    for way, values in rows.items():
        cells = [f"{v:9.3f} {unit} ({v / first[unit]:5.2f} x)" for unit, v in values.items()]
        print(f"{name:10}{way:44}{'  '.join(cells)}", flush=True)


def bench_bridge(args):
    """Soft embeddings and caption loss at BLIP's vocabulary, B = 8, L = 40, forward and backward (bridge.measure)."""
    import bridge
    rows = {}
    for chunk in (4096, 8192):
        for line in bridge.measure(chunk, times=args.times)[:2]:
            way, mib, _, seconds, _ = line.replace("fused ", "fused-").split()
            rows["softmax, then the table" if way == "plain" else way] = {"s": float(seconds), "MiB": float(mib)}
    show("bridge", rows)


def bench_scores(args):
    """CIDEr and BLEU of 5,000 captions with 5 references each, tokenizing included; pycocoevalcap where it is."""
    import metrics
    if args.captions:
        rows = [x["caption"] for x in json.loads(args.captions.read_text())]
    else:
        from miniature import world
        rows = [world.captions(world.sample("all", i), 6) for i in range(5000)]
    said, heard = [r[0] for r in rows], [r[1:6] for r in rows]

    def ours():
        metrics.grams.cache_clear()                                     # nothing kept from the run before
        return metrics.cider(said, heard).mean(), metrics.bleu(metrics.bleu_counts(said, heard).sum(0))[3]

    def theirs():
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
        gts = {i: [{"caption": c} for c in r] for i, r in enumerate(heard)}
        res = {i: [{"caption": c}] for i, c in enumerate(said)}
        gts, res = (PTBTokenizer().tokenize(x) for x in (gts, res))
        return Cider().compute_score(gts, res)[0], Bleu(4).compute_score(gts, res, verbose=0)[0][3]
    rows = {}
    try:
        rows["pycocoevalcap 1.2 (Java, Python)"] = {"s": clock(theirs, 1)}
    except (ImportError, OSError) as e:
        print(f"scores    no pycocoevalcap to compare with ({e}): pip install pycocoevalcap, and Java", file=sys.stderr)
    rows["metrics.py"] = {"s": clock(ours, args.times)}
    show("scores", rows)
    print("          CIDEr {:.4f}, BLEU-4 {:.4f}".format(*ours()))


def bench_step(args):
    """A step of all four losses on the miniature, batch 8: the split backward beside one graph, and the parts."""
    import dataclasses

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import bridge
    import cycle
    import losses
    from miniature import world
    captioner, generator = cycle.Captioner.load(device="cpu"), cycle.Generator.load(device="cpu")
    for model, end in ((captioner.model, "crossattention.self.query.weight"), (generator.unet, "attn2.to_q.weight")):
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith(end))
    queries = [p for p in generator.unet.parameters() if p.requires_grad]
    way = bridge.Bridge(captioner.tokenizer, generator.tokenizer, generator.text_encoder.get_input_embeddings().weight,
                        len(captioner.head.weight), begin=captioner.prompt[0], end=captioner.end)

    def cross(reading, layout):
        embeddings, ce, _ = way(reading.hidden, reading.weight, reading.bias, layout)
        return bridge.soft_states(generator.text_encoder, embeddings, layout.target), ce
    scenes = [world.sample("train", i) for i in range(8)]
    images = torch.stack([torch.from_numpy(world.draw(s).copy()).permute(2, 0, 1) / 255 for s in scenes])
    said = [world.captions(s)[0] for s in scenes]
    mean, _ = generator.encode(images)
    batch = losses.Batch(said, images, way.layout(said, len(captioner.prompt) - 1), mean, torch.randn_like(mean),
                         torch.arange(50, 850, 100))
    every = dict.fromkeys(losses.NAMES, 1 / 8)

    def step(weights, **options):
        losses.joint(captioner, generator, cross, batch, weights, **options)[0].backward()

    def own():
        """tg of the batch, and ir of as many pictures that the captioner describes itself (finetune.py --own)."""
        step({"tg": eighth})
        generator.unet.requires_grad_(False)
        words = [row[0] for row in captioner.speak(images, 1)[0]]
        theirs = dataclasses.replace(batch, captions=words, layout=way.layout(words, len(captioner.prompt) - 1))
        losses.joint(captioner, generator, cross, theirs, {"ir": eighth})[0].backward()
        for p in queries:
            p.requires_grad_()
    rows, eighth = {}, 1 / 8
    for name, f in {"tg": lambda: step({"tg": eighth}), "ig": lambda: step({"ig": eighth}),
                    "tg and ig, apart": lambda: [step({"tg": eighth}), step({"ig": eighth})],
                    "tg and ir": lambda: step({"tg": eighth, "ir": eighth}),
                    "ig and tr": lambda: step({"ig": eighth, "tr": eighth}, chunk=8),
                    "tg, and ir of own words": own,
                    "four losses apart": lambda: [step({k: eighth}, chunk=8) for k in every],
                    "all four": lambda: step(every, chunk=8),
                    "all four, one graph": lambda: step(every, split=False, chunk=8),
                    "all four, tr image by image": lambda: step(every)}.items():
        with FlopCounterMode(display=False) as counter:
            f()
        rows[name] = {"s": clock(f, args.times), "MiB": bridge.peak(f) / 2 ** 20,
                      "GFLOP": counter.get_total_flops() / 1e9}
    show("step", rows)


def bench_captions(args):
    """Ten captions of each of 16 pictures: vision and the prompt once a picture, or generate on repeated pictures."""
    import torch

    import cycle
    from miniature import world
    captioner = cycle.Captioner.load(device="cpu")
    images = torch.stack([torch.from_numpy(world.draw(world.sample("test", i)).copy()).permute(2, 0, 1) / 255
                          for i in range(16)])
    ids = torch.tensor([captioner.prompt])

    @torch.no_grad()
    def naive():
        for x in images:
            captioner.model.generate(captioner.pixels(x[None]).repeat(10, 1, 1, 1), ids.repeat(10, 1), do_sample=True,
                                     top_p=.9, repetition_penalty=1.1, max_length=20, min_length=5)
    naive()
    show("captions", {"generate, ten times each": {"s": clock(naive, args.times)},
                      "speak": {"s": clock(lambda: captioner.speak(images, 10), args.times)}})


def whole(name, tokenizer):
    """vitb, vitl, blip2 or sd14 (a pipeline) at full size, with random weights, from its configuration."""
    import diffusers
    import transformers as hf
    if name == "sd14":
        return diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL(
                sample_size=512, layers_per_block=2, block_out_channels=[128, 256, 512, 512],
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4),
            text_encoder=hf.CLIPTextModel(hf.CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12)),
            unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            scheduler=diffusers.PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                                              skip_prk_steps=True, steps_offset=1),
            tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if name == "blip2":
        text = hf.OPTConfig(vocab_size=50304, hidden_size=2560, word_embed_proj_dim=2560, ffn_dim=10240,
                            num_hidden_layers=32, num_attention_heads=32, eos_token_id=tokenizer.eos_token_id)
        return hf.Blip2ForConditionalGeneration(hf.Blip2Config(text_config=text.to_dict(), image_token_index=50265))
    vision = {"image_size": 384} if name == "vitb" else {
        "image_size": 384, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16}
    text = hf.AutoConfig.from_pretrained(HERE / "miniature/blip").text_config.to_dict() | {
        "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 512,
        "encoder_hidden_size": vision.get("hidden_size", 768)}
    return hf.BlipForConditionalGeneration(hf.BlipConfig(text_config=text, vision_config=vision))


def built(name, folder):
    """The folder of a `whole` model in bfloat16, as the hub lays it out. The tokenizer is the miniature's: the
    vocabulary's tables have their full size, and so has the work."""
    import torch
    from transformers import AutoTokenizer
    folder, small = folder / name, HERE / "miniature"
    if (folder / "ready").exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(small / ("blip" if name.startswith("vit") else "sd/tokenizer"))
    tokenizer.model_max_length = 77                                     # Stable Diffusion's; the captioners do not ask
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = whole(name, tokenizer)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    if name != "sd14":
        tokenizer.save_pretrained(folder)
        processor = json.loads((small / "blip/preprocessor_config.json").read_text())
        processor["size"] = {"height": 384, "width": 384}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "ready").touch()
    return folder


# of finetune.py at full size; the first is what the others are measured by
REAL = ("vitb", "vitb --losses tg", "vitb --losses ig", "vitb --losses tg ir", "vitb --losses tg ir --own all",
        "vitb --micro 4", "vitb --micro 2", "vitb --micro 1", "vitb --checkpointing", "vitb --chunk 2",
        "vitb --chunk 8", "vitl", "vitl --micro 4", "blip2", "blip2 --micro 8", "blip2 --micro 1")


@contextlib.contextmanager
def fitting(what):
    """A line in place of what does not fit the GPU."""
    import torch
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"bench.py: {what} does not fit this GPU", file=sys.stderr)


def bench_real(args):
    """A step of finetune.py with BLIP ViT-B, ViT-L, BLIP-2 and Stable Diffusion v1-4 at 512 px, batch 8, bfloat16; and
    what a picture's ten captions and their scores cost."""
    import gc
    import runpy
    import tempfile

    import torch
    if not torch.cuda.is_available():
        raise ValueError("real: torch sees no CUDA device here, and a processor would take hours")
    place, rows = {}, {}
    for name in ("sd14", "vitb", "vitl", "blip2"):
        with fitting(name):
            place[name] = str(built(name, args.work))
    for row in (x for x in REAL if x.split()[0] in place):
        name, *options = row.split()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with fitting(row), tempfile.TemporaryDirectory() as out:
            sys.argv = ["finetune.py", "--captioner", place[name], "--generator", place["sd14"], "--data", "miniature",
                        "--steps", "8", "--probe", "0", "--held", "0", *["--side", "384"] * (name == "blip2"), *options,
                        "--out", out]
            try:
                runpy.run_path(str(HERE / "finetune.py"), run_name="__main__")
            except SystemExit as e:
                if e.code:
                    raise ValueError(f"{' '.join(sys.argv)} ended with exit code {e.code}") from e
            log = [json.loads(x) for x in (Path(out) / "log.jsonl").read_text().splitlines()]
            rows[row] = {"s": min(8 / x["images_per_s"] for x in log[2:]),
                         "GiB": torch.cuda.max_memory_allocated() / 2 ** 30,
                         "GiB reserved": torch.cuda.max_memory_reserved() / 2 ** 30}
    show("real", rows)
    show("frozen", frozen(args, place))


def frozen(args, place):
    """Seconds of one picture's ten captions: saying, scoring and drawing them."""
    import torch

    import cycle
    from miniature import world
    scene, rows = world.sample("test", 0), {}
    image = torch.from_numpy(world.draw(scene).copy()).permute(2, 0, 1)[None] / 255
    ten = list(dict.fromkeys(world.captions(scene, 40)))[:10]
    generator, few = cycle.Generator.load(place["sd14"]), cycle.few_steps(cycle.Generator.load(place["sd14"]))
    ways = {"score by denoising, 12 noises": lambda: cycle.score(generator, image, ten),
            "draw in 8 steps": lambda: few.draw(ten, [0] * 10, steps=8),
            "draw in 50 steps": lambda: generator.draw(ten, [0] * 10)}
    load = functools.cache(cycle.Captioner.load)                              # the first call loads, and is not timed
    for name in [k for k in place if k != "sd14"]:
        ways[f"say, {name}"] = lambda name=name: load(place[name]).speak(image, 10)
    for name, f in ways.items():
        with fitting(name):
            f()
            rows[f"ten captions: {name}"] = {"s": clock(f, args.times)}
    return rows


BENCHES = {"bridge": bench_bridge, "scores": bench_scores, "step": bench_step, "captions": bench_captions,
           "real": bench_real}


def main(args):
    import torch
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, "
          f"torch {torch.__version__}; ratios are to the first line of each")
    for name in args.what:
        BENCHES[name](args)
    if args.json:
        gpu = args.what == ["real"]
        about = {"machine": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} cores, {platform.machine()}",
                 "torch": torch.__version__, "dtype": "bfloat16" if gpu else "float32"}
        five = {k: {row: {u: float(f"{v:.5g}") for u, v in x.items()} for row, x in rows.items()}
                for k, rows in SHOWN.items()}
        args.json.write_text(json.dumps({"about": about} | five, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")                  # the profiler of bridge.peak talks to stderr
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        print(f"bench.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
