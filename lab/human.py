"""How well each score agrees with people, on the field's benchmarks in the files that circulate.

    python -m lab.human flickr8k flickr8k.json                 # CIDEr, BLEU-4: no pictures needed
    python -m lab.human flickr8k flickr8k.json --images DIR --captioner vitb --generator sd14

and so pascal50s, thumb and nebula, whose files the loaders name; none is shipped. With pictures,
every judged caption is scored (once: it is kept in NAME.jsonl beside --out) by
    clipscore   CLIPScore (Hessel et al. 2021): 2.5 max(cos, 0), of "A photo depicts CAPTION"
    per token   log p(caption | picture) over its tokens, the end included
    denoise     minus the denoising loss, less the empty caption's, so that pictures compare
    both        z(per token) + z(denoise), z over all judgments of the run
    cycle       likeness, by CLIP, of the picture drawn from the caption to the picture
"""
import collections
import json
import sys
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from scipy.stats import kendalltau, pearsonr, zscore
from tqdm import tqdm

import cycle
import data
import devices
import judges
import loading
import losses
import metrics
import records
import script
from lab import keep
from miniature import toys
from rerank import speakers

SETTINGS = ("images", "captioner", "generator", "judges", "steps", "guidance")


def flags(argv=None):
    p = script.Parser(__doc__)
    p.add_argument("name", choices=BENCHMARKS)
    p.add_argument("file", type=Path, help="the judgments")
    p.add_argument("--images", type=Path, help="the pictures, by the names that the file has")
    p.add_argument("--captioner", help="miniature, vitb, vitl, blip2, folder, hub id, file.py:f")
    p.add_argument("--generator", help="miniature, sd14, folder, hub id, file.py:f")
    p.add_argument("--judges", help="miniature, hub, cache, or folder; default as the models")
    p.add_argument("--limit", type=int, help="pictures, for a first look")
    p.add_argument("--steps", type=int, default=50, help="of drawing; 0: no cycle")
    p.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance")
    p.add_argument("--out", type=Path, help="the numbers; default out/human/NAME.json")
    args = p.parse_args(argv)
    if not bool(args.images) == bool(args.captioner) == bool(args.generator):
        p.error("--images, --captioner and --generator go together")
    args.out = args.out or Path(f"out/human/{args.name}.json")
    if args.limit == 0 or args.steps < 0 or args.out.suffix != ".json":
        p.error("--limit is at least 1, --steps at least 0, --out ends in .json")
    return args


# ---------------------------------------------------------------- the benchmarks
def flickr8k(path):
    """{picture: {image_path, ground_truth: references, human_judgement: [{caption, rating}]}}, as
    Flickr8k-Expert (Hodosh et al. 2013) circulates since CLIPScore."""
    given = [(x, y) for x in records.load_json(path).values() for y in x["human_judgement"]]
    rows = [(x["image_path"], y["caption"], x["ground_truth"]) for x, y in given]
    ratings = [y["rating"] for _, y in given]
    return rows, {"tau-b": ("b", ratings, True), "tau-c": ("c", ratings, True)}


def pascal50s(path):
    """A folder with pair_pascal.mat (new_input: picture, two captions; category 1 to 4: HC, HI, HM,
    MM) and consensus_pascal.mat (triplets: reference, two captions, 1 if the first is nearer), as
    code reads Pascal-50S (Vedantam et al. 2015), not seen itself. Five of the references count."""
    pairs = loadmat(path / "pair_pascal.mat", squeeze_me=True)
    triplets = loadmat(path / "consensus_pascal.mat", squeeze_me=True)["triplets"]
    each = len(triplets) // len(pairs["new_input"])
    rows, votes = [], []
    for i, row in enumerate(pairs["new_input"]):
        picture, *said = map(str.strip, row)
        cast = triplets[i * each:(i + 1) * each]
        nearer = [a if vote == 1 else b for _, a, b, vote in cast]
        won = collections.Counter(map(str.strip, nearer))
        votes += [won[caption] for caption in said]
        if sum(votes[-2:]) < each:
            raise ValueError(f"the votes of pair {i + 1} are of other captions")
        references = [row[0].strip() for row in cast[:5]]
        rows += [(picture, caption, references) for caption in said]
    columns = {"all": ("pairs", votes, True)}
    for number, name in enumerate(("HC", "HI", "HM", "MM"), 1):
        columns[name] = "pairs", votes, pairs["category"].repeat(2) == number
    return rows, columns


def thumb(path):
    """JSON lines {image, hyp, SYS, seg_id, P, R, human_score}, those of THumB 1.0 (Kasai et al.
    2022), and beside them mscoco_references.json, lines {seg_id, refs}."""
    given = records.read_rows(path)
    beside = records.read_rows(path.with_name("mscoco_references.json"))
    references = {str(row["seg_id"]): row["refs"] for row in beside}
    rows = [(x["image"], x["hyp"], references[str(x["seg_id"])] if beside else []) for x in given]
    columns = {}
    for name, key in (("total", "human_score"), ("P", "P"), ("R", "R")):
        columns[name] = "pearson", [x[key] for x in given], True
    systems = [x["SYS"] != "Human" for x in given]             # without the captions by people
    _, total, _ = columns["total"]
    columns["systems"] = "pearson", total, systems
    return rows, columns


def nebula(path):
    """A parquet of file_name, refs, mt, human_score: Nebula's on the hub (Matsuda et al. 2024)."""
    from pyarrow import parquet
    given = parquet.read_table(path, columns=["file_name", "refs", "mt", "human_score"]).to_pylist()
    rows = [(x["file_name"], x["mt"], x["refs"]) for x in given]
    return rows, {"tau-c": ("c", [x["human_score"] for x in given], True)}


BENCHMARKS = {"flickr8k": flickr8k, "pascal50s": pascal50s, "thumb": thumb, "nebula": nebula}


def read(name, path):
    """N (picture, caption), N lists of references, {agreement: (measure, (N,) ratings, which of
    them)}; measure: b, c of Kendall's tau, pearson, pairs of rows. ValueError of another shape."""
    try:
        rows, columns = BENCHMARKS[name](path)
        pairs = [(picture, records.one_line(caption)) for picture, caption, _ in rows]
        for key, (measure, ratings, some) in columns.items():
            ratings = np.array(ratings, float)
            if not rows or not np.isfinite(ratings).all():
                raise ValueError("no judgments, or ratings that are no numbers")
            columns[key] = measure, ratings, some
        return pairs, [list(references) for _, _, references in rows], columns
    except Exception as e:                       # of foreign files a reader may raise anything
        raise ValueError(f"{path} can't be read as {name} ({type(e).__name__}: {e}); "
                         f"expected: {BENCHMARKS[name].__doc__}") from e


def agreement(column, scores, rows):
    """100 x that of (N,) scores and a column of `read` over rows (N,) bool; nan of none."""
    measure, ratings, some = column
    at = rows & some
    x, y = scores[at], ratings[at]
    if not at.any():
        return np.nan
    if measure == "pairs":
        # a tie, of votes or of scores, counts half: what the papers' coin gives on average
        same = np.diff(x.reshape(-1, 2)) * np.diff(y.reshape(-1, 2))
        return 50 + 50 * np.sign(same).mean()
    if measure == "pearson":
        return 100 * pearsonr(x, y).statistic
    return 100 * kendalltau(x, y, variant=measure).statistic


# ---------------------------------------------------------------- scores that see the pictures
def score(left, files, args):
    """Scores captions {picture: captions} of files {picture: path} as far as the models can:
    picture by picture, lists of rows {picture, caption, cut, a number for each score}."""
    captioner, generator = speakers(args.captioner, args.generator, None, None, None)
    device, _ = devices.device_and_dtype()
    found, absent = judges.load(["clip"], "image", args.judges, device)
    if absent:
        raise ValueError(f"--judges {args.judges}: {absent['clip']}")
    clip = found["clip"]
    for name, captions in tqdm(left.items(), desc="pictures"):
        image = data.open_image(files[name])
        names = [name] * len(captions)
        columns = {"picture": names, "caption": captions}
        if hasattr(generator, "too_long"):
            columns["cut"] = generator.too_long(captions)
        prompts = [f"A photo depicts {caption}" for caption in captions]
        columns["clipscore"] = (2.5 * clip.score(image[None], prompts).clip(0)).tolist()
        if hasattr(captioner, "tokens"):
            states = captioner.see([image]).expand(len(captions), -1, -1)
            log_p = captioner.likelihood(None, captions, states)
            columns["per token"] = (log_p / captioner.tokens(captions)).tolist()
        if getattr(generator, "denoises", False):
            timesteps, noise = cycle.noises(generator, item=name)
            loss = losses.score(generator, image, captions, timesteps, noise, 16, empty=True)
            columns["denoise"] = (-loss.mean(0)).tolist()
        if args.steps:
            drawn = generator.draw(captions, names, steps=args.steps, guidance=args.guidance)
            columns["cycle"] = clip.alike(drawn, image[None]).tolist()
        yield [dict(zip(columns, row)) for row in zip(*columns.values())]


def picture_scores(pairs, names, args):
    """({score: (N,)}, which N have them) of the pictures in `names`; none is scored twice."""
    files = {}
    for name in names:
        for path in (args.images / name, args.images / Path(name).name):
            if path.is_file():
                files[name] = path
    if not files:
        raise ValueError(f"{args.images} has none of the pictures, such as {names[0]}")
    kept = args.out.with_suffix(".jsonl")
    folder = args.out.with_suffix("")
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    if (folder / "settings.json").exists():
        records.same_settings(folder, settings)
    known = {(row["picture"], row["caption"]): row for row in records.read_rows(kept)}
    if known:
        say(f"{len(known)} captions are in {kept}: they are not scored again")
    left = collections.defaultdict(list)
    for name, caption in dict.fromkeys(pairs):
        if name in files and (name, caption) not in known:
            left[name].append(caption)
    for rows in score(left, files, args) if left else ():
        records.same_settings(folder, settings)     # only now: what came to nothing binds nobody
        loading.record_revisions(folder)
        records.append_rows(kept, rows)
        known |= {(row["picture"], row["caption"]): row for row in rows}
    say(f"{len(files)} of {len(names)} pictures are there")
    cut = sum(row.get("cut", False) for row in known.values())
    say(f"{cut} of {len(known)} captions are longer than the generator reads")
    seen = [known[pair] if pair[0] in files else {} for pair in pairs]
    rows = np.array(seen, bool)
    scores = {}
    for name in ("clipscore", "per token", "denoise", "cycle"):
        values = np.array([row.get(name) for row in seen], float)        # (N,), else nan
        if np.isfinite(values[rows]).all():
            scores[name] = values
        else:
            say(f"no {name}: these models, or settings, do not have it of all captions")
    if {"per token", "denoise"} <= scores.keys():
        z = [zscore(scores[name], nan_policy="omit") for name in ("per token", "denoise")]
        scores["both"] = sum(z)
    return scores, rows


def say(text):
    print(f"human.py: {text}", file=sys.stderr)


def main(args):
    pairs, references, columns = read(args.name, args.file)
    pictures, captions = zip(*pairs)
    names = list(dict.fromkeys(pictures))[:args.limit]
    rows = np.isin(pictures, names)
    scores = {}
    if all(references):
        step = 2 if "all" in columns else 1                    # of a pair they are counted once
        df = metrics.document_frequency(references[::step])
        scores["CIDEr"] = metrics.cider(captions, references, df)
        scores["BLEU-4"] = metrics.bleu(metrics.bleu_counts(captions, references))[:, 3]
    else:
        say("no CIDEr, no BLEU-4: there are captions without references")
    if args.images:
        toys.tune_process(args.captioner, args.generator)
        args.judges = args.judges or judges.default_place(args.captioner, args.generator)
        more, rows = picture_scores(pairs, names, args)
        scores |= more
    print(f"{rows.sum()} of {len(rows)} judgments; agreement x 100")
    print(args.name.ljust(10), *columns, sep="\t")
    found = {}
    for name, values in scores.items():
        found[name] = {key: agreement(column, values, rows) for key, column in columns.items()}
        print(name.ljust(10), *map("{:.3f}".format, found[name].values()), sep="\t")
    result = {"about": vars(args), "judgments": rows.sum(), "agreement": found}
    text = json.dumps(keep.rounded(result, 8), indent=1, default=str)
    records.write_text(args.out, text + "\n")


if __name__ == "__main__":
    script.run(main, flags)
