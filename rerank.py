"""Best of N: captions for images, images for captions, chosen by what the other model makes of them
(paper, Section 3).

    python rerank.py --n 10                               # pictures of the miniature world: seconds
    python rerank.py photo.jpg holiday/ --captioner vitb  # best of ten captions, for real pictures
    python rerank.py "a small red star on the grass"      # best of ten images for a sentence
    python rerank.py sentences.txt                        # one a line, or a JSON list
    python rerank.py --captions mine.json --captioner vitb    # captions that exist: {image: [...]}
    python rerank.py --images folder/ --captioner vitb    # pictures that exist: a folder a prompt
    python rerank.py --data data/nocaps --split out       # a set with references: worth of choosing
    python rerank.py --scorer full                        # the paper's cycle: each caption is drawn
    python rerank.py --words                              # which words explain the picture
    python rerank.py --pairs trl --margin .02             # preference pairs for DPO

Writes into --out: index.html and sheet.png to look at; candidates.jsonl (a line a candidate: item,
caption, picture, scores and their standard errors, ranks), the same as candidates.csv, best.json;
winners/ (pictures and captions that `datasets` reads). Run again, it goes on where it stopped;
another --by ranks anew without redoing anything. Under torchrun every process takes its share.
"""
import script  # isort: skip
import functools
import itertools
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

import best_of_n
import data
import devices
import inputs
import judges
import loading
import outputs
import records
from best_of_n import IMAGE, TEXT, best_first
from captioners import CAPTIONERS, Captioner
from generators import GENERATORS, Generator, few_steps
from miniature import toys
from script import real, whole

LIKENESSES = {IMAGE: ["clip", "dino", "pixel"], TEXT: ["clip", "sbert", "cider"],
              "both": ["clip"]}                  # for clipscore
SETTINGS = ("n", "captioner", "generator", "way", "steps", "guidance", "likeness", "judges",
            "glove", "seed", "dtype", "ckpt", "scorer", "draws", "decoder")
WRITTEN = ("candidates.jsonl", "candidates.csv", "best.json", "sheet.png", "index.html", "winners",
           "pictures")


def flags(argv=None):
    p = script.Parser(__doc__)
    p.add_argument("inputs", nargs="*", help="pictures, folders, sentences, or a .txt or .json")
    p.add_argument("-n", "--n", type=whole(1, 10_000),
                   help="candidates an input; default 10 (the paper's N)")
    p.add_argument("--captioner", default="miniature",
                   help="miniature, vitb, vitl, blip2, folder, hub id, file.py:function")
    p.add_argument("--generator", help="default miniature or sd14, as the captioner; or as above")
    p.add_argument("--ckpt", help="a checkpoint of finetune.py, or its folder: its trained weights")
    p.add_argument("--captions", help="captions that exist: JSON {picture: [captions]}, JSON lines "
                   "{image, captions}, or a folder of pictures with .txt beside them; pictures may "
                   "be those of --data, by name")
    p.add_argument("--images", help="pictures that exist: JSON {prompt: [pictures]}, or a folder "
                   "with a folder of pictures a prompt")
    p.add_argument("--data", help="a set for inputs, if none are given, and for references")
    p.add_argument("--split", help="of --data: val, test (default); in, near, out, nocaps (of it)")
    p.add_argument("--anywhere", action="store_true", help="pictures that a file names may lie out "
                   "of its folder")
    p.add_argument("--turn", choices=["image", "text"], help="side of --data; default image")
    p.add_argument("--limit", type=whole(1), help="items; default 4 of --data miniature, else all")
    p.add_argument("--scorer", choices=["both", "full", "few"],
                   help="both (default): what both models say of a candidate, its log-likelihood "
                   "and the denoising loss; full: the paper's cycle, each is drawn or read; few: "
                   "of captions, in 8 steps of DPM-Solver++")
    p.add_argument("--decoder", help="of few: tiny (TAESD), or an AutoencoderTiny's place")
    p.add_argument("--draws", type=whole(1, 10_000), default=12, help="of both: noises a candidate")
    p.add_argument("--draw", action="store_true", help="draw winners that another --by has chosen")
    p.add_argument("--words", action="store_true", help="what each word of the winner adds")
    p.add_argument("--pairs", choices=["trl", "diffusion"], help="preference pairs: of captions "
                   "for TRL's DPO (JSON lines), of pictures for Diffusion-DPO (parquet)")
    p.add_argument("--margin", type=real(0), default=0.0, help="of --pairs: as near is a tie")
    p.add_argument("--way", default="top-p", help="or top-k, temperature, typical, beam")
    p.add_argument("--steps", type=whole(0, 1000),
                   help="of drawing; default 50, of few 8; 0: none is drawn")
    p.add_argument("--guidance", type=real(0, 1000), default=7.5, help="classifier-free guidance")
    p.add_argument("--likeness", nargs="*",
                   help="of images: clip dino pixel inception; of text: clip sbert cider wmd")
    p.add_argument("--by", help="the score that ranks: denoise (default of captions), both (of "
                   "pictures), per_token, likelihood, clipscore; of full, few a likeness")
    p.add_argument("--judges", help="miniature, hub, cache (the hub's, as fetched before), folder "
                   "with clip, dino, sbert; default as the models, cache beside local ones")
    p.add_argument("--glove", help="GloVe text file for wmd")
    p.add_argument("--seed", type=int, default=0, help="chance is a function of seed and item")
    p.add_argument("--batch", type=whole(1, 100_000),
                   help="pictures drawn at once; default 10, miniature 40")
    p.add_argument("--device", help="cuda, mps or cpu; default the best there is")
    p.add_argument("--dtype", help="float32, float16 or bfloat16; default by device")
    p.add_argument("--out", type=Path, help="folder for what comes out; default out/rerank, or "
                   "out/rerank-2 ... where that holds a run of other settings")
    args = p.parse_args(argv)
    args.typed = script.typed(p, args)
    data.LEAVE = args.anywhere
    return complete(args)


def complete(args):
    """Defaults that follow from other flags, and what cannot be."""
    small = args.captioner == "miniature"
    exist = args.captions or args.images
    if bool(args.captions) + bool(args.images) + bool(args.inputs) > 1:
        raise ValueError("--captions, --images and other inputs are runs of their own: give one")
    if exist and args.n is not None:
        raise ValueError(f"--n {args.n}: of --captions and --images, every candidate is ranked")
    if args.n is None and not exist:
        args.n = 10
    args.generator = args.generator or ("miniature" if small else "sd14")
    args.judges = args.judges or judges.default_place(args.captioner, args.generator)
    args.data = args.data or ("miniature" if small and not exist else None)
    if args.split is None:
        own = args.data in (None, "miniature")
        args.split = "test" if own else data.default_split(args.data)
    if args.batch is None:
        args.batch = 40 if small else 10
    if args.steps is None:
        args.steps = 8 if args.scorer == "few" else 50
    return args


def refuse_idle(args, direction):
    """Refuses flags that do nothing in this run: whoever types one expects something of it."""
    text = direction == TEXT
    exist = args.captions or args.images
    idle = {
        "decoder": args.scorer != "few" and "only --scorer few decodes by another",
        "draws": args.scorer != "both" and not args.words and "nothing is denoised",
        "margin": not args.pairs and "it is of --pairs",
        "turn": (args.inputs or exist) and "the inputs say what they are",
        "split": args.inputs and "data" not in args.typed and "it is of --data",
        "way": (text or exist) and "of sentences, --captions and --images none is sampled",
        "pairs": args.pairs == ("trl" if text else "diffusion") and "trl compares captions of a "
                 "picture, diffusion pictures of a sentence",
    }
    for name, why in idle.items():
        if name in args.typed and why:
            raise ValueError(f"--{name} {getattr(args, name)} does nothing here: {why}")


# ---------------------------------------------------------------- what goes in, where it goes
def find(listed, captions, pictures, root, split, turn, limit):
    """inputs.Inputs of what the command line names."""
    if captions:
        return inputs.given_captions(captions, limit, data.read(root, split) if root else ())
    if pictures:
        return inputs.given_pictures(pictures, limit)
    if listed:
        return inputs.from_arguments(listed, limit)
    return inputs.from_set(root, split, turn, limit)


def default_scorer(captioner, generator, reads):
    """`both`, by RESULTS.md; what is file.py:function may lack a loss. reads: captioner's, too."""
    names = [generator, captioner] if reads else [generator]
    return "full" if any(".py:" in name for name in names) else "both"


def default_folder(settings):
    """Of out/rerank, out/rerank-2 ... the one with a run of these settings, or the first free."""
    folders = [Path("out/rerank"), *(Path(f"out/rerank-{i}") for i in range(2, 1000))]
    for folder in sorted(folders, key=lambda folder: not (folder / "settings.json").exists()):
        try:
            return claimed(folder, settings)
        except ValueError:                       # of other settings, or in use
            continue
    raise ValueError("out/rerank and 998 more hold runs of other settings: say --out")


def claimed(out, settings):
    """Claims a folder, unless another run, or nobody's files of these names, are in it."""
    records.same_settings(out, settings, write=False)
    ours = (out / "settings.json").exists() or (out / "candidates.jsonl").exists()
    records.claim(out, () if ours else WRITTEN)
    return out


def take_folder(out, settings):
    """The folder of this run: `out`, or a default one. Of torchrun's processes one chooses."""
    process, processes = records.rank_and_world()
    place = [None]
    if process == 0:
        place = [claimed(out, settings) if out else default_folder(settings)]
        if processes > 1:                        # the others write at once
            records.same_settings(place[0], settings)
    if processes > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))   # all wait for the slowest
        dist.broadcast_object_list(place)
    return place[0]


def settings_of(args, found):
    """What a run is made of, {name: str}: its folder takes no other one."""
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    models = {name: getattr(args, name) for name in ("captioner", "generator", "ckpt", "judges")}
    settings |= records.marks(models, {*CAPTIONERS, *GENERATORS, *judges.PLACES})
    settings |= {"direction": found.direction, "given": str(bool(found.given) or None)}
    if args.inputs or args.images or not args.data:
        return settings | {"data": "None", "split": "None"}
    content = data.content_of(found.whole)
    return settings | {"data": str(Path(args.data)), "split": args.split, "content": content}


# ---------------------------------------------------------------- who speaks, who judges
def speakers(captioner, generator, ckpt, device, dtype):
    """Both by name, with the trained weights of --ckpt. A captioner of None is not needed."""
    if captioner is not None:
        captioner = Captioner.load(captioner, device, dtype)
    generator = Generator.load(generator, device, dtype)
    if ckpt:
        loading.load_trained(ckpt, captioner, generator)
    return captioner, generator


def make_fit(captioner, generator, scorer, decoder, reads, name):
    """Readies a generator for --scorer, or says why it can't do that. reads: whether the captioner
    has to read what it has not said."""
    if reads and not hasattr(captioner, "likelihood"):
        raise ValueError("the captioner has no `likelihood`: it can't read what it has not said")
    if scorer == "both" and not getattr(generator, "denoises", False):
        raise ValueError(f"--scorer both: {name} is no Stable Diffusion 1.x or 2.x: say "
                         "--scorer full")
    if scorer == "few" and not hasattr(generator, "pipe"):
        raise ValueError(f"--scorer few: {name} is no pipeline of diffusers: say --scorer full")
    if scorer == "few":
        few_steps(generator, decoder)


def check(by, scorer, likeness, clip, captioner):
    """Refuses a run that would have nothing to rank by, or not --by."""
    names = ["denoise"] if scorer == "both" else list(likeness)
    names += ["likelihood", "clipscore"] if clip else ["likelihood"]
    if hasattr(captioner, "tokens"):
        names += ["per_token", "both"] if scorer == "both" else ["per_token"]
    elif scorer == "both":
        records.say("the captioner has no `tokens`, so that there is no log-likelihood per token: "
                    "denoise alone ranks")
    if not likeness and scorer != "both":
        raise ValueError("no likeness is left to rank by; of images, --likeness pixel needs "
                         "nothing")
    if by and by not in names:
        raise ValueError(f"--by {by}: this run has {', '.join(names)}")


# ---------------------------------------------------------------- the road
def opened(item, candidates, skipped):
    """(picture or text of an item, its given candidates or None, the files of such pictures). Adds
    to `skipped` why one of these can't be read."""
    if item.path:
        return data.open_image(item.path), candidates, None
    if candidates is None:
        return item.captions[0], None, None
    pictures, files = [], []
    for path in candidates:
        try:
            pictures.append(data.open_image(path))
            files.append(str(path.resolve()))
        except ValueError as e:
            skipped.append(str(e))
    if not pictures:
        raise ValueError(f"{item.name}: none of its pictures can be read")
    return item.captions[0], pictures, files


def converse(items, found, out, settings, how):
    """Has the conversation over items, some at a time, and keeps their rows, with the settings of
    the run. Returns why what was skipped. how: arguments of captions_for and pictures_for."""
    image = found.direction == IMAGE
    conversation = best_of_n.captions_for if image else best_of_n.pictures_for
    n = how["n"] or max(map(len, found.given.values()))
    chunk = max(1, how["draw"]["batch"] // n)
    skipped = []
    bar = tqdm(total=len(items), desc=found.direction, disable=records.rank_and_world()[0] > 0)
    for start in range(0, len(items), chunk):
        ready = []
        for item in items[start:start + chunk]:
            try:
                ready.append((item, *opened(item, found.given.get(item.name), skipped)))
            except ValueError as e:
                skipped.append(str(e))
        if ready:
            some, asked, given, files = zip(*ready)
            groups = conversation(list(asked), [item.name for item in some],
                                  given=given if found.given else None, **how)
            loading.record_revisions(out)        # only now: what came to nothing binds nobody
            if records.rank_and_world()[0] == 0:
                records.same_settings(out, settings)
            for item, rows, names in zip(some, groups, files):
                for row, name in zip(rows, names or ()):
                    row["picture"] = name
                best_of_n.keep(item, rows, found, how["seed"], how["generator"], out)
        bar.update(len(items[start:start + chunk]))
    bar.close()
    return skipped


def tell(found, done):
    """Says what was left out of the inputs, and how many are done already."""
    old = sum(item.name in done for item in found.items)
    for note in found.notes:
        script.say(note)
    if done:
        print(f"{old} of {len(found.items)} already done")
    if len(done) > old:
        print(f"{len(done) - old} earlier items stay in candidates.jsonl; all else is of this run")


def main(args):
    process, processes = records.rank_and_world()
    toys.tune_process(args.captioner, args.generator)

    # 1) what goes in, what the run is made of, and what of it is done
    found = find(args.inputs, args.captions, args.images, args.data, args.split, args.turn,
                 args.limit)
    direction, items = found.direction, found.items
    if not items:
        raise ValueError(f"{', '.join(args.inputs) or args.data}: nothing to rerank")
    reads = direction == TEXT or bool(found.given)
    args.scorer = args.scorer or default_scorer(args.captioner, args.generator, reads)
    refuse_idle(args, direction)
    draws = args.draw or direction == TEXT or args.scorer != "both"
    if args.steps == 0 and draws and not args.images:
        raise ValueError("--steps 0: only --scorer both of pictures needs no drawing")
    settings = settings_of(args, found)
    out = take_folder(args.out, settings)
    if out.name != "rerank" and args.out is None:
        found.notes.append(f"out/rerank holds another run, or is in use; this one is in {out}")
    done, _ = best_of_n.finished(out, args.n, found)
    if process == 0:
        tell(found, done)
    rest = [item for item in items[process::processes] if item.name not in done]

    # 2) the conversations that are left
    wanted = args.likeness or LIKENESSES["both" if args.scorer == "both" else direction]
    draw = {"steps": args.steps, "guidance": args.guidance, "batch": args.batch}
    own = {"speak": {"way": args.way}, "by": args.by} if direction == IMAGE else {}
    generator, skipped = None, []
    if rest:                                     # models before judges: the real cause comes first
        captioner, generator = speakers(args.captioner, args.generator, args.ckpt, args.device,
                                        args.dtype)
        make_fit(captioner, generator, args.scorer, args.decoder,
                 reads and (direction == IMAGE or args.scorer == "both"), args.generator)
        references = [x.captions for x in data.read(args.data, args.split)] if args.data else []
        likeness, clip = judges.likenesses(
            wanted, args.likeness, args.by, direction.partition("-")[0], args.judges,
            devices.device_and_dtype(args.device)[0], references, args.glove)
        check(args.by, args.scorer, likeness, clip, captioner)
        skipped = converse(rest, found, out, settings, {
            "captioner": captioner, "generator": generator, "likeness": likeness, "clip": clip,
            "scorer": args.scorer, "n": args.n, "seed": args.seed, "draws": args.draws,
            "draw": draw, **own})
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    if process > 0:
        for reason in skipped:
            script.say(f"skipped {reason}")
        return 0
    done, stale = best_of_n.finished(out, args.n, found)
    groups = {item.name: done[item.name] for item in items if item.name in done}
    if not groups:
        of = args.captions or args.images or "what was given"
        raise ValueError(f"none of the {len(items)} inputs of {of} could be read: "
                         f"{'; '.join(skipped[:3])}")
    for reason in skipped:
        script.say(f"skipped {reason}")

    # 3) all of it once more, ranked and in the order of the inputs
    best_of_n.rank(done)
    names = [{"scores": best_of_n.score_names(groups)}]
    by = best_of_n.default_score(names, direction, args.by)
    ordered = {name: best_first(rows, by) for name, rows in groups.items()}
    best = [rows[0] for rows in ordered.values() if rows[0]["scores"].get(by) is not None]
    undrawn = [row for row in best if not row["picture"] and "nan" not in row]

    @functools.cache
    def drawer():
        return generator or speakers(None, args.generator, args.ckpt, args.device, args.dtype)[1]
    if undrawn and args.draw:
        best_of_n.draw_later(undrawn, drawer(), args.seed, draw, out)
    whole = list(itertools.chain(*(stale | groups | done).values()))
    records.write_rows(out / "candidates.jsonl", whole)
    new = [row for row in best if args.words and "words" not in row]
    if new:
        outputs.explain(new, whole, drawer(), 2 * args.draws, args.seed, args.batch, out)
    home, warning = toys.told(args.captioner, args.generator, found)
    note = (f"{args.captioner} and {args.generator}, N = {args.n or 'as given'}, {args.steps} "
            f"steps, seed {args.seed}, ranked by {by}. {home}")
    absent = "not drawn: --draw does it" if args.steps else ""
    outputs.show(found, ordered, by, note, warning, absent, out)
    if args.pairs:
        print(outputs.write_pairs(groups, by, args.margin, out))
    for line in outputs.odd(ordered, found.given, by, args.generator, absent):
        print(line)
    print(f"{len(groups)} of {len(items)} inputs done, {len(items) - len(groups)} skipped; look at "
          f"{out}/index.html and {out}/sheet.png")
    return 0


if __name__ == "__main__":
    script.run(main, flags)
