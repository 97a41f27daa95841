"""Speed and memory, ours beside the obvious way, as ratios of one run on this machine.

    python bench.py                     # all of it, about three minutes on two cores
    python bench.py bridge scores       # some: bridge, scores, step, captions

What is compared is the same work with the same result; the tests hold the results against each other, not this file.
"""
import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHOWN = {}


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", help="bridge, scores, step, captions; default all")
    p.add_argument("--times", type=int, default=3, help="runs of each; the fastest counts")
    p.add_argument("--threads", type=int, default=2, help="processor threads")
    p.add_argument("--json", type=Path, metavar="FILE", help="the rows as JSON, too")
    p.add_argument("--captions", type=Path, help="Karpathy rows [{image, caption: [5]}] for scores; default invented")
    args = p.parse_args(argv)
    args.what = args.what or list(BENCHES)
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
        import world
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
    import world
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
    import world
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


BENCHES = {"bridge": bench_bridge, "scores": bench_scores, "step": bench_step, "captions": bench_captions}


def main(args):
    import torch
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, "
          f"torch {torch.__version__}; ratios are to the first line of each")
    for name in args.what:
        BENCHES[name](args)
    if args.json:
        args.json.write_text(json.dumps(SHOWN, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")                  # the profiler of bridge.peak talks to stderr
    sys.exit(main(flags()))
