"""Best of N: captions for images, images for captions, chosen by what the other model makes of them
(paper, Section 3).

    python rerank.py --n 10                               # pictures of the miniature world: seconds
    python rerank.py photo.jpg holiday/ --captioner vitb  # best of ten captions, for real pictures
    python rerank.py "a small red star on the grass"      # best of ten images for a sentence
    python rerank.py sentences.txt                        # one a line, or a JSON list
    python rerank.py --data data/nocaps --split out       # a set with references: worth of choosing
    python rerank.py --scorer full                        # the paper's cycle: each caption is drawn
    python rerank.py --words                              # which words explain the picture
    python rerank.py --pairs trl --margin .02             # preference pairs for DPO

Writes into --out: candidates.jsonl (a line a candidate: item, caption, picture, scores and their
standard errors, ranks), best.json, sheet.png, index.html. Run again, it goes on where it stopped;
another --by ranks anew without redoing anything. Under torchrun every process takes its share. The
miniature runs on one thread a process (OMP_NUM_THREADS rules).
"""
import argparse
import functools
import itertools
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

import best_of_n
import data
import judges
import loading
import metrics
import page
from best_of_n import IMAGE, TEXT, best_first, score_of
from captioners import Captioner
from generators import Generator, few_steps

LIKENESSES = {IMAGE: ["clip", "dino", "pixel"], TEXT: ["clip", "sbert", "cider"],
              "both": ["clip"]}                  # for clipscore
SETTINGS = ("n", "captioner", "generator", "way", "steps", "guidance", "likeness", "judges",
            "glove", "seed", "dtype", "ckpt", "scorer", "draws", "decoder")


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("inputs", nargs="*", help="pictures, folders, sentences, or a .txt or .json")
    p.add_argument("-n", "--n", type=int, default=10, help="candidates an input (the paper's N)")
    p.add_argument("--captioner", default="miniature",
                   help="miniature, vitb, vitl, blip2, folder, hub id, file.py:function")
    p.add_argument("--generator", help="default miniature or sd14, as the captioner; or as above")
    p.add_argument("--ckpt", help="a checkpoint of finetune.py, or its folder: its trained weights")
    p.add_argument("--data", help="a set for inputs, if none are given, and for references")
    p.add_argument("--split", help="of --data: val, test (default); in, near, out, nocaps (of it)")
    p.add_argument("--turn", choices=["image", "text"], help="side of --data; default image")
    p.add_argument("--limit", type=int, help="items; default 4 of --data miniature, else all")
    p.add_argument("--scorer", choices=["both", "full", "few"],
                   help="both (default): what both models say of it, log-likelihood and denoising "
                   "loss; full: the paper's cycle, draws or reads every candidate; few: of "
                   "captions, in 8 steps of DPM-Solver++")
    p.add_argument("--decoder", help="of few: tiny (TAESD), or an AutoencoderTiny's place")
    p.add_argument("--draws", type=int, default=12, help="of both: noises a candidate")
    p.add_argument("--words", action="store_true", help="what each word of the winner adds")
    p.add_argument("--pairs", choices=["trl", "diffusion"], help="preference pairs: of captions "
                   "for TRL's DPO (JSON lines), of pictures for Diffusion-DPO (parquet)")
    p.add_argument("--margin", type=float, default=0.0, help="of --pairs: as near is a tie")
    p.add_argument("--way", default="top-p", help="or top-k, temperature, typical, beam")
    p.add_argument("--steps", type=int, help="of drawing; default 50, of few 8; 0: none is drawn")
    p.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance")
    p.add_argument("--likeness", nargs="*",
                   help="of images: clip dino pixel inception; of text: clip sbert cider wmd")
    p.add_argument("--by", help="the score that ranks; default both, else the first likeness")
    p.add_argument("--judges", help="miniature, hub, cache (the hub's, as fetched before), folder "
                   "with clip, dino, sbert; default as the models, cache beside local ones")
    p.add_argument("--glove", help="GloVe text file for wmd")
    p.add_argument("--seed", type=int, default=0, help="chance is a function of seed and item")
    p.add_argument("--batch", type=int, help="pictures drawn at once; default 10, miniature 40")
    p.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    p.add_argument("--dtype", help="float32, float16 or bfloat16; default by device")
    p.add_argument("--out", type=Path, help="folder for what comes out; default out/rerank, or "
                   "out/rerank-2 ... where that holds a run of other settings")
    args = p.parse_args(argv)
    small = args.captioner == "miniature"
    args.generator = args.generator or ("miniature" if small else "sd14")
    args.data = args.data or ("miniature" if small else None)
    if args.split is None:
        own = args.data in (None, "miniature")
        args.split = "test" if own else data.default_split(args.data)
    if args.batch is None:
        args.batch = 40 if small else 10
    if args.steps is None:
        args.steps = 8 if args.scorer == "few" else 50
    if min(args.n, args.batch, args.draws) < 1 or args.steps < 0 or not args.margin >= 0:
        p.error("--n, --batch and --draws are at least 1, --steps and --margin at least 0")
    return args


# ---------------------------------------------------------------- what goes in
def from_set(root, split, turn, limit):
    """(direction, items) of a set."""
    if not root:
        raise ValueError("nothing to rerank: give pictures, folders or sentences, or --data with a "
                         "set's folder")
    items = data.read(root, split)[:limit or (4 if root == "miniature" else None)]
    if turn == "text" and not all(item.captions for item in items):
        raise ValueError(f"--turn text: {root} has pictures without captions")
    return (TEXT if turn == "text" else IMAGE), items


def from_arguments(inputs, limit):
    """(direction, items) of pictures or of sentences; both in one run are refused."""
    pictures, sentences = {}, {}
    for given in inputs:
        path = Path(given)
        if os.path.isdir(given):                 # of a long sentence, Path.is_dir raises
            for item in data.read(path):
                name = item.path.as_posix()
                pictures[name] = data.Item(name, item.path, item.captions)
        elif path.suffix.lower() in data.SUFFIXES:
            if not os.path.exists(given):
                raise ValueError(f"{given}: no such picture")
            pictures[path.as_posix()] = data.Item(path.as_posix(), path)
        else:
            for sentence in map(data.one_line, sentences_in(given, path.suffix.lower())):
                sentences[sentence] = data.Item(sentence, None, [sentence])
    if pictures and sentences:
        raise ValueError(f"pictures and sentences in one run (such as {next(iter(pictures))!r} and "
                         f"{next(iter(sentences))!r}): give one kind; a picture's name ends in "
                         f"{' '.join(sorted(data.SUFFIXES))}")
    if "" in sentences:
        raise ValueError("an empty sentence can't be drawn")
    found = list((pictures or sentences).values())
    return (IMAGE if pictures else TEXT), found[:limit]


def sentences_in(given, kind):
    """Of a .txt, one a line; of a .json, a list; else what is given is one."""
    if kind not in (".txt", ".json"):
        return [given]
    if not os.path.exists(given):
        raise ValueError(f"{given}: no such file of sentences")
    text = Path(given).read_text(encoding="utf-8")
    lines = data.load_json(given) if kind == ".json" else text.splitlines()
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{given}: expected a JSON list of strings, or a .txt, one a line")
    return [line for line in lines if line.strip()]


def default_folder(settings):
    """Of out/rerank, out/rerank-2 ... the one with a run of these settings, or the first free."""
    folders = [Path("out/rerank"), *(Path(f"out/rerank-{i}") for i in range(2, 1000))]
    used = [folder for folder in folders if (folder / "settings.json").exists()]
    for folder in used:
        try:
            data.same_settings(folder, settings)
            return folder
        except ValueError:                       # of other settings
            continue
    free = [folder for folder in folders if folder not in used]
    if not free:
        raise ValueError("out/rerank and 998 more hold runs of other settings: say --out")
    return free[0]


# ---------------------------------------------------------------- who speaks, who judges
def speakers(captioner, generator, ckpt, device, dtype):
    """Both by name, with the trained weights of --ckpt. A captioner of None is not needed."""
    if captioner is not None:
        captioner = Captioner.load(captioner, device, dtype)
    generator = Generator.load(generator, device, dtype)
    if ckpt:
        loading.load_trained(ckpt, captioner, generator)
    return captioner, generator


def make_fit(generator, scorer, decoder, name):
    """Readies a generator for --scorer, or says why it can't do that."""
    if scorer == "both" and not getattr(generator, "denoises", False):
        raise ValueError(f"--scorer both: {name} is no Stable Diffusion 1.x or 2.x: say "
                         "--scorer full")
    if scorer == "few" and not hasattr(generator, "pipe"):
        raise ValueError(f"--scorer few: {name} is no pipeline of diffusers: say --scorer full")
    if scorer == "few":
        few_steps(generator, decoder)


def likenesses(names, asked, by, direction, place, device, references, glove):
    """({name: f(candidates, inputs) -> (n,)}, CLIP's judge or None). What is absent is refused if
    --likeness asked for it, or --by; of the others there is a line."""
    kind = "image" if direction == IMAGE else "text"
    ours = [name for name in names if kind == "text" and name in ("cider", "wmd")]
    found, absent = judges.load([name for name in names if name not in ours], kind, place, device)
    likeness = {name: judge.alike for name, judge in found.items()}
    if "cider" in ours and len(references) > 1:
        likeness["cider"] = functools.partial(cider, metrics.document_frequency(references))
    elif "cider" in ours:
        absent["cider"] = "it needs the document frequency of a set of references; give --data"
    if glove and not Path(glove).is_file():
        raise ValueError(f"--glove {glove}: no such file")
    if "wmd" in ours and glove:
        likeness["wmd"] = functools.partial(metrics.movers, glove)
    elif "wmd" in ours:
        absent["wmd"] = "it needs word vectors; give --glove glove.6B.200d.txt"
    for name, reason in absent.items():
        if name == by or name in (asked or ()):
            flag = "--by" if name == by else "--likeness"
            raise ValueError(f"{flag} {name}: {reason}")
        if data.rank_and_world()[0] == 0:
            print(f"rerank.py: no likeness {name}: {reason}", file=sys.stderr)
    return {name: likeness[name] for name in names if name in likeness}, found.get("clip")


def check(by, scorer, likeness, clip, captioner):
    """Refuses a run that would have nothing to rank by, or not --by."""
    names = ["denoise"] if scorer == "both" else list(likeness)
    names += ["likelihood", "clipscore"] if clip else ["likelihood"]
    if hasattr(captioner, "tokens"):
        names += ["per_token", "both"] if scorer == "both" else ["per_token"]
    elif scorer == "both" and data.rank_and_world()[0] == 0:
        print("rerank.py: the captioner has no `tokens`, so that there is no log-likelihood per "
              "token: denoise alone ranks", file=sys.stderr)
    if not likeness and scorer != "both":
        raise ValueError("no likeness is left to rank by; of images, --likeness pixel needs "
                         "nothing")
    if by and by not in names:
        raise ValueError(f"--by {by}: this run has {', '.join(names)}")


def cider(df, captions, texts):
    return metrics.cider(captions, [[text] for text in texts], df)


# ---------------------------------------------------------------- what comes of it
def show(items, groups, by, direction, note, out):
    """best.json, sheet.png, index.html; and prints the candidates of the first items."""
    best, shown = {}, []
    for item in [item for item in items if item.name in groups]:
        rows = groups[item.name]
        picture = item.path if direction == IMAGE else None
        shown.append((item.name, picture, "" if picture else item.captions[0], rows))
        best[item.name] = {"caption": rows[0]["caption"], "picture": rows[0]["picture"], "by": by,
                           "score": rows[0]["scores"].get(by)}
    data.write_text(out / "best.json", json.dumps(best, indent=2, ensure_ascii=False) + "\n")
    page.sheet(shown, by, out / "sheet.png")
    page.index(shown, by, direction, note, out / "index.html")
    for name, picture, text, rows in shown[:20]:
        print(f"\n{name if picture else text}")
        for place, row in enumerate(rows, 1):
            shown = [f"{name} {score_of(row, name):8.4f}" for name in (by, *page.PARTS.get(by, ()))]
            print(f"  {place:2d}  {'  '.join(shown)}  {row['caption']}")
            for word, value, error in row.get("words", ()):
                print(f"        {word:12s} {value:+.4f} +- {error:.4f}")
    print()


def show_worth(groups, items):
    """Of captions with references, prints 100 x CIDEr of a random one, of the one that each score
    chooses, of the best."""
    references = {item.name: item.captions for item in items if len(item.captions) > 1}
    groups = {name: rows for name, rows in groups.items() if name in references}
    if len(groups) < 2:
        return
    captions, scores = [], {}
    for rows in groups.values():
        captions.append([row["caption"] for row in rows])
        for name in rows[0]["scores"]:
            scores.setdefault(name, []).append([score_of(row, name) for row in rows])
    # a judge that was absent for a while has scored some items only
    scores = {name: values for name, values in scores.items() if len(values) == len(groups)}
    df = metrics.document_frequency(list(references.values()))
    quality = metrics.caption_quality(captions, [references[name] for name in groups], df)
    for name, ranking in scores.items():
        found = metrics.choices(quality, ranking)
        low, high = found["interval"]
        print(f"CIDEr of {len(groups)} items by {name:11s} mean {found['mean']:6.1f}   chosen "
              f"{found['chosen']:6.1f}   oracle {found['oracle']:6.1f}   gain "
              f"{found['gain']:+6.1f} [{low:+.1f}, {high:+.1f}]")


# ---------------------------------------------------------------- the road
def converse(items, direction, out, settings, how):
    """Has the conversation over items, some at a time, and keeps their rows, with the settings of
    the run. Returns why items were skipped. how: arguments of captions_for and pictures_for."""
    conversation = best_of_n.captions_for if direction == IMAGE else best_of_n.pictures_for
    chunk = max(1, how["draw"]["batch"] // how["n"])
    quiet = data.rank_and_world()[0] > 0
    skipped = []
    bar = tqdm(total=len(items), desc=f"{direction}, N = {how['n']}", disable=quiet)
    for start in range(0, len(items), chunk):
        given = {}                               # pictures, or texts, by their items' places
        for i, item in enumerate(items[start:start + chunk], start):
            try:
                given[i] = item.captions[0] if direction == TEXT else data.open_image(item.path)
            except ValueError as e:
                skipped.append(str(e))
        if given:
            names = [items[i].name for i in given]
            groups = conversation(list(given.values()), names, **how)
            loading.record_revisions(out)
            data.same_settings(out, settings)    # only now: what came to nothing binds nobody
            for i, rows in zip(given, groups):
                best_of_n.keep(items[i], rows, direction, how["seed"], how["generator"], out)
        bar.update(len(items[start:start + chunk]))
    bar.close()
    return skipped


def main(args):
    process, processes = data.rank_and_world()
    if processes > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))   # all wait for the slowest
    loading.tune_process(args.captioner, args.generator)

    # 1) what goes in, what the run is made of, and what of it is done
    if args.inputs:
        direction, items = from_arguments(args.inputs, args.limit)
    else:
        direction, items = from_set(args.data, args.split, args.turn, args.limit)
    if args.scorer is None:                      # by RESULTS.md; what comes in may lack a loss
        judges_of = [args.generator, args.captioner] if direction == TEXT else [args.generator]
        args.scorer = "full" if any(".py:" in name for name in judges_of) else "both"
    if args.steps == 0 and (direction == TEXT or args.scorer != "both"):
        raise ValueError("--steps 0: only --scorer both of pictures needs no drawing")
    args.judges = args.judges or judges.default_place(args.captioner, args.generator)
    settings = {name: str(getattr(args, name)) for name in SETTINGS} | {"direction": direction}
    settings["set"] = "None" if args.inputs else f"{Path(args.data).name} {args.split}"
    out = args.out or default_folder(settings)
    if (out / "settings.json").exists():
        data.same_settings(out, settings)
    if args.out is None and out.name != "rerank" and process == 0:
        print(f"rerank.py: out/rerank holds another run; this one is in {out}", file=sys.stderr)
    if processes > 1:
        dist.barrier()                           # nothing is written before all know where
    done = best_of_n.finished(out, args.n)
    rest = [item for item in items[process::processes] if item.name not in done]

    # 2) the conversations that are left
    wanted = args.likeness or LIKENESSES["both" if args.scorer == "both" else direction]
    generator, skipped = None, []
    if rest:                                     # models before judges: the real cause comes first
        captioner, generator = speakers(args.captioner, args.generator, args.ckpt, args.device,
                                        args.dtype)
        make_fit(generator, args.scorer, args.decoder, args.generator)
        device, _ = loading.device_and_dtype(args.device)
        references = [x.captions for x in data.read(args.data, args.split)] if args.data else []
        likeness, clip = likenesses(wanted, args.likeness, args.by, direction, args.judges, device,
                                    references, args.glove)
        check(args.by, args.scorer, likeness, clip, captioner)
        skipped = converse(rest, direction, out, settings, {
            "captioner": captioner, "generator": generator, "likeness": likeness, "clip": clip,
            "scorer": args.scorer, "n": args.n, "seed": args.seed, "draws": args.draws,
            "speak": {"way": args.way} if direction == IMAGE else None,
            "draw": {"steps": args.steps, "guidance": args.guidance, "batch": args.batch}})
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    for reason in skipped:
        print(f"rerank.py: skipped {reason}", file=sys.stderr)
    if process > 0:
        return 0

    # 3) all of it once more, ranked and in the order of the inputs
    done = best_of_n.finished(out, args.n)
    groups = {item.name: done[item.name] for item in items if item.name in done}
    if not groups:
        raise ValueError(f"none of the {len(items)} pictures could be read")
    for rows in done.values():
        best_of_n.rank(rows)
    data.write_rows(out / "candidates.jsonl", itertools.chain(*(groups | done).values()))
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows[0]["scores"]))
    by = args.by or next(name for name in ["both", "denoise", *wanted] if name in names)
    if by not in names:
        raise ValueError(f"--by {by}: this run has {', '.join(names)}")
    ordered = {name: best_first(rows, by) for name, rows in groups.items()}
    if args.words:
        new = best_of_n.recall_words([rows[0] for rows in ordered.values()], out)
        if new and generator is None:
            _, generator = speakers(None, args.generator, args.ckpt, args.device, args.dtype)
        if new:
            best_of_n.explain(new, generator, 2 * args.draws, args.seed, args.batch, out)
    note = f"{args.captioner} and {args.generator}, N = {args.n}, {args.steps} steps"
    show(items, ordered, by, direction, f"{note}, seed {args.seed}, ranked by {by}", out)
    if direction == IMAGE:
        show_worth(groups, items)
    if args.pairs:
        print(best_of_n.write_pairs(args.pairs, groups, by, args.margin, out))
    cut = sum(row.get("cut", False) for rows in groups.values() for row in rows)
    if cut:
        print(f"{cut} of {len(groups) * args.n} captions are longer than the text encoder of "
              f"{args.generator} reads: they were drawn and scored without their ends (`cut` in "
              "candidates.jsonl)")
    print(f"{len(groups)} of {len(items)} inputs done, {len(skipped)} skipped; look at "
          f"{out / 'index.html'} and {out / 'sheet.png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        print(f"rerank.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
