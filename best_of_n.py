"""Best of N: candidates as rows, how they are kept and ranked, their words, preference pairs.

    rows, = captions_for([image], ["photo.jpg"], captioner, generator, {})
    best_first(rows, "both")[0]["caption"]

A row is what a line of candidates.jsonl holds of a candidate: {"caption", "picture", "scores":
{name: number or None, higher = better}, "errors": {name: standard error}, "gaps": {name: standard
error of the difference to the best by that score}}.
Copy this file with cycle.py, losses.py and data.py.

Letters: B items, n candidates of each, H W pixels.
"""
import itertools
import math
from pathlib import Path

import torch
from tqdm import tqdm

import cycle
import data
import losses

IMAGE, TEXT = "image-text-image", "text-image-text"      # the two directions


# ---------------------------------------------------------------- the two conversations
def captions_for(images, items, captioner, generator, likeness, clip=None, scorer="both", n=10,
                 seed=0, draws=12, speak=None, draw=None):
    """n captions of each picture (3, H, W) with their scores: n rows an item.

    scorer: `both` (judged), and only the best is drawn, in 0 `steps` none; or `full`, the cycle.
    items: what chance hangs on; likeness: as in cycle.image_text_image; clip: a judge that compares
    picture and caption; draws: noises of `both`; speak, draw: more arguments of the speakers.
    """
    speak, draw = speak or {}, draw or {}
    groups = []
    if scorer == "both":
        said, log_p = captioner.speak(images, n, seed=seed, items=items, **speak)
        for image, item, captions, total in zip(images, items, said, log_p):
            found = judged(captioner, generator, image, captions, item, total, seed, draws,
                           draw.get("batch", 16))
            groups.append(rows_of(captions, [None] * n, *found))
    else:
        talk = cycle.image_text_image(captioner, generator, images, n, likeness, seed, items,
                                      speak, draw)
        groups = rows_of_talk(talk, captioner)
    if clip:                                     # the baseline without a cycle
        for image, rows in zip(images, groups):
            put(rows, "clipscore", clip.score(image[None], [row["caption"] for row in rows]))
    if scorer == "both" and draw.get("steps", 50) > 0:
        winners = [best_first(rows, default_score(rows))[0] for rows in groups]
        captions = [row["caption"] for row in winners]
        for row, picture in zip(winners, generator.draw(captions, items, seed, **draw)):
            row["picture"] = picture
    return groups


def pictures_for(texts, items, captioner, generator, likeness, clip=None, scorer="both", n=10,
                 seed=0, draws=12, speak=None, draw=None):
    """n pictures (3, H, W) of each text with their scores: n rows an item. By `both` the caption of
    a row is the text; by `full` what the captioner read. likeness: as in cycle.text_image_text; the
    rest as above."""
    speak, draw = speak or {}, draw or {}
    groups = []
    if scorer == "both":
        wanted = [text for text in texts for _ in range(n)]
        each = [(item, j) for item in items for j in range(n)]    # what the noise of each hangs on
        drawn = generator.draw(wanted, each, seed, **draw)                     # (B n, 3, H, W)
        for text, item, pictures in zip(texts, items, drawn.split(n)):
            total = captioner.likelihood(pictures, [text] * n)
            found = judged(captioner, generator, pictures, [text], item, total, seed, draws,
                           draw.get("batch", 16))
            groups.append(rows_of([text] * n, pictures, *found))
    else:
        talk = cycle.text_image_text(captioner, generator, texts, n, likeness, seed, items, speak,
                                     draw)
        groups = rows_of_talk(talk, captioner)
    if clip:
        for text, rows in zip(texts, groups):
            pictures = torch.stack([row["picture"] for row in rows])
            put(rows, "clipscore", clip.score(pictures, [text]))
    return groups


def judged(captioner, generator, images, captions, item, log_p, seed=0, draws=12, batch=16):
    """What both models say of n candidates, one image (3, H, W) and n captions or n images and one
    caption: {score: (n,)}, their standard errors, and those of the differences to the best.

    log_p (n,): log-likelihoods; the generator's noises are those of cycle.noises.
    """
    timesteps, noise = cycle.noises(generator, draws, seed, item)
    loss = losses.score(generator, images, captions, timesteps, noise, batch)  # (draws, n)
    mean, error = losses.mean_and_error(loss)
    scores = {"denoise": -mean} | likelihoods(captioner, captions, log_p)
    unit = {"denoise": 1.0}
    if "per_token" in scores:
        scores = {"both": losses.both(scores["per_token"], mean)} | scores
        unit["both"] = float(mean.std(correction=0)) or 1.0       # of denoise, in z: losses.both
    errors, gaps = {}, {}
    for name, spread in unit.items():
        best = loss[:, [int(scores[name].argmax())]]
        errors[name] = error / spread
        gaps[name] = losses.mean_and_error(loss - best)[1] / spread
    return scores, errors, gaps


def likelihoods(captioner, captions, log_p):
    """Log-likelihoods (n,) of captions in nats, of the whole and, where the captioner knows its
    tokens, per token: Eq. 1 with another sign."""
    found = {"likelihood": log_p}
    if hasattr(captioner, "tokens"):
        found["per_token"] = log_p / captioner.tokens(captions)
    return found


def rows_of_talk(talk, captioner):
    """The rows of each item of a conversation."""
    groups = []
    for b, captions in enumerate(talk.captions):
        scores = {name: score[b] for name, score in talk.scores.items()}
        scores |= likelihoods(captioner, captions, talk.likelihood[b])
        groups.append(rows_of(captions, talk.images[b], scores))
    return groups


def rows_of(captions, pictures, scores, errors=None, gaps=None):
    """n candidates -> n rows; numbers to six digits, nan as None."""
    rows = []
    for caption, picture in zip(captions, pictures):
        rows.append({"caption": caption, "picture": picture, "scores": {}, "errors": {},
                     "gaps": {}})
    for kind, columns in (("scores", scores), ("errors", errors), ("gaps", gaps)):
        for name, values in (columns or {}).items():
            put(rows, name, values, kind)
    return rows


def put(rows, name, values, kind="scores"):
    """Values (n,) into the rows, as `name` of their `kind`."""
    for row, value in zip(rows, values):
        row[kind][name] = None if math.isnan(value) else round(float(value), 6)


# ---------------------------------------------------------------- kept in a file
def keep(item, rows, direction, seed, generator, out):
    """Appends an item's lines to candidates.jsonl, once its pictures are saved."""
    given = str(item.path) if direction == IMAGE else item.captions[0]
    prefix = None if direction == IMAGE else "sentence"
    cut = [False] * len(rows)
    if hasattr(generator, "too_long"):           # which captions it did not read to the end
        drawn = [row["caption"] if direction == IMAGE else given for row in rows]
        cut = generator.too_long(drawn)
    lines = []
    for j, row in enumerate(rows):
        if row["picture"] is not None:
            name = f"pictures/{data.picture_name(item.name, j, prefix)}.png"
            data.save_image(row["picture"], out / name)
            row["picture"] = name
        lines.append({"item": item.name, "direction": direction, "candidate": j, "input": given,
                      "seed": seed, "cut": cut[j], **row})
    data.append_rows(out / "candidates.jsonl", lines)


def finished(out, n):
    """{item: its n rows} of candidates.jsonl; an item with fewer is done again."""
    found = {}
    for row in data.read_rows(out / "candidates.jsonl"):
        found.setdefault(row["item"], {})[row["candidate"]] = row
    done = {}
    for item, rows in found.items():
        if len(rows) == n:
            done[item] = [rows[j] for j in range(n)]
    return done


# ---------------------------------------------------------------- ranks
def score_of(row, name):
    """A row's score as a number to rank by: a missing one comes last."""
    score = row["scores"].get(name)
    return -math.inf if score is None else score


def default_score(rows):
    """What ranks rows by themselves: both models, else the generator, else the first score."""
    names = rows[0]["scores"]
    return next((name for name in ("both", "denoise") if name in names), next(iter(names)))


def best_first(rows, name):
    """Rows in order of a score; equal ones keep the candidates' order."""
    return sorted(rows, key=lambda row: -score_of(row, name))


def rank(rows):
    """Puts into each row its rank (0 = best) by every score."""
    for row in rows:
        row["rank"] = {}
    for name in rows[0]["scores"]:
        for place, row in enumerate(best_first(rows, name)):
            row["rank"][name] = place


# ---------------------------------------------------------------- words
def recall_words(rows, out):
    """Puts `words` into the rows for which words.jsonl has them; returns the others."""
    known = {}
    for row in data.read_rows(out / "words.jsonl"):
        known[row["item"], row["caption"], row["picture"]] = row["words"]
    for row in rows:
        row["words"] = known.get((row["item"], row["caption"], row["picture"]))
    return [row for row in rows if row["words"] is None]


def explain(rows, generator, draws, seed, batch, out):
    """Puts `words` into rows, and into words.jsonl: [word, contribution, standard error] of caption
    and picture; of a sentence, of the picture chosen for it."""
    if not getattr(generator, "denoises", False):
        raise ValueError("--words: the generator is no Stable Diffusion 1.x or 2.x, whose loss is "
                         "known here")
    for row in tqdm(rows, desc="words"):
        picture, text = row["input"], row["caption"]
        if row["direction"] == TEXT:
            picture, text = out / row["picture"], row["input"]
        timesteps, noise = cycle.noises(generator, draws, seed, row["item"])
        image = data.open_image(picture)
        words = losses.words(generator, image, text, timesteps, noise, batch)
        row["words"] = [[word, round(value, 6), round(error, 6)] for word, value, error in words]
        kept = {name: row[name] for name in ("item", "caption", "picture", "words")}
        data.append_rows(out / "words.jsonl", [kept])


# ---------------------------------------------------------------- pairs of preferences
def write_pairs(kind, groups, by, margin, folder):
    """Writes preference pairs into `folder` and returns the line to say about them. A pair is every
    two different candidates of an item whose scores `by` lie more than `margin` apart; nearer ones
    are ties. The order of candidates changes nothing. groups: {item: rows of candidates.jsonl}.

    trl: pairs.jsonl, rows {images, prompt, chosen, rejected} as TRL's DPOTrainer takes them for
    vision-language models. diffusion: pairs.parquet, columns caption, jpg_0, jpg_1 (encoded
    pictures), label_0, label_1, as Diffusion-DPO reads Pick-a-Pic.
    """
    direction = next(iter(groups.values()))[0]["direction"]
    if (kind == "trl") != (direction == IMAGE):
        raise ValueError(f"--pairs {kind}: trl compares captions of a picture, diffusion pictures "
                         "of a sentence")
    content = "caption" if kind == "trl" else "picture"
    rows, ties, equal, without = [], 0, 0, 0
    for candidates in groups.values():
        scored = [row for row in candidates if row["scores"].get(by) is not None]
        without += len(candidates) - len(scored)
        different = {row[content]: row for row in reversed(scored)}
        equal += len(scored) - len(different)
        order = best_first([different[key] for key in sorted(different)], by)
        for better, worse in itertools.combinations(order, 2):
            gap = better["scores"][by] - worse["scores"][by]
            if gap <= margin:
                ties += 1
                continue
            pair = trl_pair(better, worse) if kind == "trl" else dpo_pair(better, worse, folder)
            rows.append(pair | {"margin": gap})
    path = folder / ("pairs.jsonl" if kind == "trl" else "pairs.parquet")
    if kind == "trl":
        data.write_rows(path, rows)
    elif rows:
        write_parquet(path, rows)
    line = (f"{len(rows)} preference pairs by {by} in {path}; {ties} ties (at most {margin:g} "
            f"apart) left out, {equal} candidates equal to another one")
    return f"{line}, {without} without a score" if without else line


def trl_pair(better, worse):
    question = [{"type": "image"}, {"type": "text", "text": "Describe this picture."}]
    answers = []
    for row in (better, worse):
        content = [{"type": "text", "text": row["caption"]}]
        answers.append([{"role": "assistant", "content": content}])
    return {"images": [str(Path(better["input"]).resolve())],
            "prompt": [{"role": "user", "content": question}],
            "chosen": answers[0], "rejected": answers[1]}


def dpo_pair(better, worse, folder):
    first, second = ((folder / row["picture"]).read_bytes() for row in (better, worse))
    return {"caption": better["input"], "jpg_0": first, "jpg_1": second, "label_0": 1.0,
            "label_1": 0.0}


def write_parquet(path, rows):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise ValueError("--pairs diffusion writes parquet: pip install pyarrow") from e
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
