"""Best of N: candidates as rows, how they are kept and ranked.

    rows, = captions_for([image], ["photo.jpg"], captioner, generator, {})
    best_first(rows, "denoise")[0]["caption"]
    rank_captions(image, ["a cat", "a dog"], captioner, generator)[0]["caption"]

A row is what a line of candidates.jsonl holds of a candidate: {"caption", "picture", "scores":
{name: number or None, higher = better}, "errors": {name: standard error}, "gaps": {name: standard
error of the difference to the best by that score}}. A picture that came out as no numbers is None,
as are the scores that hang on it; its row has "nan".
Copy this file with annotations.py, cycle.py, data.py, losses.py, pictures.py and records.py.

Letters: B items, n candidates of each, H W pixels.
"""
import math
import os

import torch

import cycle
import data
import losses
import records
from records import the

IMAGE, TEXT = "image-text-image", "text-image-text"      # the two directions
RANKS = {IMAGE: "denoise", TEXT: "both"}         # what ranks by RESULTS.md, of scorer `both`
FEW = 30                                         # items below which no interval is to be trusted


# ---------------------------------------------------------------- candidates that exist
def rank_captions(image, captions, captioner, generator, item=0, **more):
    """Captions of one picture (3, H, W) in [0, 1]: their rows, best first.

    more: of captions_for; item: what the noise hangs on. Nothing is drawn, unless `draw` says so.
    """
    if getattr(image, "ndim", 0) != 3 or isinstance(captions, str) or not len(captions):
        raise ValueError("expected one picture (3, H, W), such as data.open_image gives, and a "
                         f"list of captions, not {ascii(image)[:60]} and {captions!r}")
    if more.get("scorer", "both") == "both":
        more["draw"] = {"steps": 0} | more.get("draw", {})
    rows, = captions_for([image], [item], captioner, generator, given=[list(captions)], **more)
    return best_first(rows, default_score(rows, IMAGE, more.get("by")))


def rank_pictures(text, pictures, captioner, generator, item=0, by=None, **more):
    """Pictures (3, H, W) in [0, 1] of one text: their rows, best first. more: of pictures_for."""
    if not isinstance(text, str) or not len(pictures) or pictures[0].ndim != 3:
        raise ValueError("expected one text and a list of pictures (3, H, W)")
    rows, = pictures_for([text], [item], captioner, generator, given=[list(pictures)], **more)
    return best_first(rows, default_score(rows, TEXT, by))


# ---------------------------------------------------------------- the two conversations
def captions_for(images, items, captioner, generator, likeness=None, clip=None, scorer="both", n=10,
                 seed=0, draws=12, speak=None, draw=None, given=None, by=None):
    """n captions of each picture (3, H, W) with their scores: n rows an item.

    scorer: `both` (judged), and only the best is drawn, in 0 `steps` none; or `full`, the cycle.
    items: what chance hangs on; likeness: as in cycle.image_text_image; clip: a judge that compares
    picture and caption; draws: noises of `both`; speak, draw: more arguments of the speakers;
    given: B lists of captions that exist, of any number each, in place of n that are said; by: the
    score that chooses what is drawn.
    """
    speak, draw = speak or {}, draw or {}
    groups = []
    if scorer == "both":
        said, log_p = given, [None] * len(images)
        if given is None:
            said, log_p = captioner.speak(images, n, seed=seed, items=items, **speak)
        for image, item, captions, total in zip(images, items, said, log_p):
            groups.append(judged(captioner, generator, [image], captions, item, total, seed, draws,
                                 draw.get("batch", 16)))
    else:
        groups = talked(cycle.image_text_image, captioner, generator, images, n, likeness, seed,
                        items, speak, draw, given)
    if clip:                                     # the baseline without a cycle
        for image, rows in zip(images, groups):
            put(rows, "clipscore", clip.score(image[None], [row["caption"] for row in rows]))
    if scorer == "both" and draw.get("steps", 50) > 0:
        winners = [best_first(rows, default_score(rows, IMAGE, by))[0] for rows in groups]
        wanted = [row["caption"] for row in winners]
        put_pictures(winners, generator.draw(wanted, items, seed, **draw))
    return groups


def pictures_for(texts, items, captioner, generator, likeness=None, clip=None, scorer="both", n=10,
                 seed=0, draws=12, speak=None, draw=None, given=None):
    """n pictures (3, H, W) of each text with their scores: n rows an item. By `both` the caption of
    a row is the text; by `full` what the captioner read. likeness: as in cycle.text_image_text;
    given: B lists of pictures that exist, of any number and size each; the rest as above."""
    speak, draw = speak or {}, draw or {}
    groups = []
    if scorer == "both":
        drawn = given
        if given is None:
            wanted = [text for text in texts for _ in range(n)]
            each = [(item, j) for item in items for j in range(n)]    # what its noise hangs on
            drawn = generator.draw(wanted, each, seed, **draw).split(n)
        for text, item, pictures in zip(texts, items, drawn):
            rows = judged(captioner, generator, pictures, [text], item, None, seed, draws,
                          draw.get("batch", 16))
            groups.append(put_pictures(rows, pictures))
    else:
        groups = talked(cycle.text_image_text, captioner, generator, texts, n, likeness, seed,
                        items, speak, draw, given)
    if clip:
        for text, rows in zip(texts, groups):
            pictures = [row["picture"] for row in rows]
            scores = [math.nan if x is None else float(clip.score(x[None], [text])[0])
                      for x in pictures]
            put(rows, "clipscore", scores)
    return groups


def judged(captioner, generator, images, captions, item, log_p, seed, draws, batch):
    """What both models say of n candidates, one image (3, H, W) and n captions or n images and one
    caption: their rows, with standard errors, and those of the differences to the best.

    log_p (n,): log-likelihoods, or None; the generator's noises are those of cycle.noises. A
    candidate whose loss is no number has no scores, and no part in those of the others.
    """
    n = max(len(images), len(captions))
    said = list(captions) * (n // len(captions))
    if log_p is None:
        log_p = cycle.read(captioner, list(images) * (n // len(images)), said)
    timesteps, noise = cycle.noises(generator, draws, seed, item)
    parts = []
    for i in range(0, n, batch):
        some = images if len(images) == 1 else images[i:i + batch]
        texts = captions if len(captions) == 1 else captions[i:i + batch]
        parts.append(losses.score(generator, some, texts, timesteps, noise, batch,
                                  empty=len(images) > 1))
    loss = torch.cat(parts, 1)                                         # (draws, n)
    mean, error = losses.mean_and_error(loss)
    scores = {"denoise": -mean} | likelihoods(captioner, captions, log_p)
    unit = {"denoise": 1.0}
    if "per_token" in scores:
        fine = (mean + scores["per_token"]).isfinite()
        total = torch.full_like(mean, torch.nan)
        total[fine] = losses.both(scores["per_token"][fine], mean[fine])
        scores = {"both": total} | scores
        spread = float(mean[fine].std(correction=0)) if fine.any() else 1.0
        unit["both"] = spread or 1.0                                   # of denoise, in z
    errors, gaps = {}, {}
    for name, spread in unit.items():
        best = loss[:, [int(scores[name].nan_to_num(-torch.inf).argmax())]]
        errors[name] = error / spread
        gaps[name] = losses.mean_and_error(loss - best)[1] / spread
    return rows_of(said, scores=scores, errors=errors, gaps=gaps)


def likelihoods(captioner, captions, log_p):
    """Log-likelihoods (n,) of captions in nats, of the whole and, where the captioner knows its
    tokens, per token: Eq. 1 with another sign."""
    found = {"likelihood": log_p}
    if hasattr(captioner, "tokens"):
        found["per_token"] = log_p / captioner.tokens(captions)
    return found


def talked(conversation, captioner, generator, asked, n, likeness, seed, items, speak, draw, given):
    """The rows of each item of a conversation of cycle.py. Items whose candidates exist come one by
    one, as they may have any number each."""
    groups, step = [], 1 if given else max(1, len(items))
    for start in range(0, len(items), step):
        some = slice(start, start + step)
        talk = conversation(captioner, generator, asked[some], n, likeness, seed, items[some],
                            speak, draw, given and given[some])
        for b, captions in enumerate(talk.captions):
            scores = {name: score[b] for name, score in talk.scores.items()}
            scores |= likelihoods(captioner, captions, talk.likelihood[b])
            groups.append(put_pictures(rows_of(captions, scores=scores), talk.images[b]))
    return groups


def rows_of(captions, **columns):
    """n candidates -> n rows; columns: scores, errors, gaps, {name: (n,)} each."""
    rows = []
    for caption in captions:
        rows.append({"caption": caption, "picture": None, "scores": {}, "errors": {}, "gaps": {}})
    for kind, found in columns.items():
        for name, values in found.items():
            put(rows, name, values, kind)
    return rows


def put(rows, name, values, kind="scores"):
    """Values (n,) into the rows, as `name` of their `kind`: to six digits, nan as None."""
    for row, value in zip(rows, values):
        row[kind][name] = None if math.isnan(value) else round(float(value), 6)


def put_pictures(rows, pictures):
    """The rows with pictures (3, H, W); in place of one that is not finite, the mark `nan`."""
    for row, picture in zip(rows, pictures):
        if picture.isfinite().all():
            row["picture"] = picture
        else:
            row["nan"] = True
    return rows


# ---------------------------------------------------------------- kept in a file
def keep(item, rows, found, seed, generator, out):
    """Appends an item's lines to candidates.jsonl, once its pictures are saved (those that existed
    are files already). found: the inputs.Inputs that it is of."""
    direction, source, mark = found.direction, found.input(item), found.mark(item)
    prefix = None if direction == IMAGE else "sentence"
    cut = [False] * len(rows)
    if hasattr(generator, "too_long"):           # which captions it did not read to the end
        drawn = [row["caption"] if direction == IMAGE else source for row in rows]
        cut = generator.too_long(drawn)
    lines = []
    for j, row in enumerate(rows):
        if isinstance(row["picture"], torch.Tensor):
            save_picture(row, data.picture_name(item.name, j, prefix), out)
        line = {
            "item": item.name,
            "direction": direction,
            "candidate": j,
            "of": len(rows),
            "input": source,
            "seed": seed,
            "cut": cut[j],
            "mark": mark,
        }
        lines.append(line | row)
    records.append_rows(out / "candidates.jsonl", lines)


def save_picture(row, name, out):
    """A row's picture (3, H, W) as a file beside the rows; the row then has its name."""
    path = f"pictures/{name}.png"
    data.save_image(row["picture"], out / path)
    row["picture"] = path


def draw_later(rows, generator, seed, draw, out):
    """Draws lines of candidates.jsonl that were not drawn, and saves the pictures."""
    captions = [row["caption"] for row in rows]
    items = [row["item"] for row in rows]
    for row in put_pictures(rows, generator.draw(captions, items, seed, **draw)):
        if row["picture"] is not None:
            save_picture(row, data.picture_name(row["item"], row["candidate"]), out)


def groups_in(out, found=None):
    """{item: its rows} of candidates.jsonl; of one that was done again the last. ValueError for
    rows that no run has written. found: inputs.Inputs, whose pictures may lie out of the folder."""
    path = out / "candidates.jsonl"
    items = {item.name: item for item in found.items} if found else {}
    groups, begun = {}, {}
    for number, row in enumerate(records.read_rows(path), 1):
        known = ()
        if items:                                # of an item not asked for nothing is shown
            item = items.get(str(row.get("item")))
            known = found.pictures(item) if item else [row.get("picture")]
        check_row(row, out, f"{path}, line {number}", known)
        if row["candidate"] == 0:                # an item's lines are written at once, in order
            begun[row["item"]] = []
        rows = begun.setdefault(row["item"], [])
        if row["candidate"] != len(rows):
            raise ValueError(f"{path}, line {number}: it was to be candidate {len(rows)}")
        rows.append(row)
        if row["item"] not in groups or len(rows) == row.get("of", len(rows)):
            groups[row["item"]] = rows           # whole ones do not give way to one that was cut
    return groups


def check_row(row, out, where, known=()):
    """Raises ValueError for a line that no run has written: what it names is read and shown. known:
    pictures that may lie out of the folder."""
    for name in ("item", "caption", "input", "direction"):
        the(row, name, str, where)
    the(row, "candidate", int, where)
    if row["direction"] not in RANKS:
        raise ValueError(f"{where}: its direction is none of {', '.join(RANKS)}")
    picture = the(row, "picture", (str, type(None)), where)
    if picture and picture not in known:
        data.inside(out / picture, out, where, ours=True)
    for kind in ("scores", "errors", "gaps"):
        for name in the(row, kind, dict, where, {}):
            value = the(row[kind], name, (int, float, type(None)), where)
            if not name.isidentifier() or not math.isfinite(value or 0):
                raise ValueError(f"{where}: {name!r} {value} is no score")
    if not row.get("scores"):
        raise ValueError(f"{where}: it has no scores")
    for word in the(row, "words", list, where, []):
        kinds = [type(part) for part in word] if isinstance(word, list) else []
        if kinds != [str, float, float]:
            raise ValueError(f"{where}: expected words [word, number, number]")


def finished(out, n, found=None):
    """Items of candidates.jsonl: ({item: its rows}, as many as each line says (`of`; else n); the
    same of those that are others now). An item that lacks some, or a picture, is done again, as is
    one that is another now. found: as of groups_in."""
    done, stale = {}, {}
    items = {item.name: item for item in found.items} if found else {}
    for name, rows in groups_in(out, found).items():
        named = [x["picture"] for x in rows if x["picture"]]
        gone = [picture for picture in named if not os.path.exists(out / picture)]
        if gone or len(rows) != rows[0].get("of", n):
            records.say(f"{out}: {name} is done again: {gone[0] if gone else 'some'} is missing")
        elif name in items and others(rows, items[name], found, out):
            records.say(f"{out}: {name} is done again: it, or its candidates, are others now")
            stale[name] = rows
        else:
            done[name] = rows
    return done, stale


def others(rows, item, found, out):
    """Whether an item's rows are of other bytes than there are now. ValueError: of other files."""
    for row in rows:
        if (row["direction"], row["input"]) != (found.direction, found.input(item)):
            raise ValueError(f"{out}: {item.name!r} is of {row['input']!r}, not of "
                             f"{found.input(item)!r}: choose another --out")
    mark = found.mark(item)
    return mark is not None and {mark} != {row.get("mark") for row in rows}


# ---------------------------------------------------------------- ranks
def score_of(row, name):
    """A row's score as a number to rank by: a missing one comes last."""
    score = row["scores"].get(name)
    return -math.inf if score is None else score


def score_names(groups):
    """The names of all scores of {item: rows}, in their order."""
    names = {}
    for rows in groups.values():
        names |= dict.fromkeys(rows[0]["scores"])
    return list(names)


def default_score(rows, direction, by=None):
    """The score that ranks: `by`, else that of RANKS, else the first. ValueError for no score."""
    names = rows[0]["scores"]
    if by and by not in names:
        raise ValueError(f"--by {by}: there are {', '.join(names)}")
    return next(name for name in (by, RANKS[direction], "denoise", *names) if name in names)


def best_first(rows, name):
    """Rows in order of a score; equal ones keep the candidates' order."""
    return sorted(rows, key=lambda row: -score_of(row, name))


def rank(groups):
    """Puts into each row of {item: rows} its rank (0 = best) by every score."""
    for rows in groups.values():
        for row in rows:
            row["rank"] = {}
        for name in rows[0]["scores"]:
            for place, row in enumerate(best_first(rows, name)):
                row["rank"][name] = place


# ---------------------------------------------------------------- what a choice is worth
def rankings(groups, notes):
    """What metrics.choices ranks by, {score: [of each item the values of its rows]}, of {item:
    rows}. Adds to `notes` what lacks a score."""
    found = {}
    for name in score_names(groups):
        values = []
        for rows in groups.values():
            values.append([score_of(row, name) for row in rows])
        missing = sum(row.count(-math.inf) for row in values)
        if min(map(max, values)) == -math.inf:
            notes.append(f"no choice by {name}: some items have no such score")
            continue
        if missing:
            notes.append(f"{missing} candidates without {name} come last by it")
        found[name] = values
    return found


# ---------------------------------------------------------------- why the first wins
def with_reason(rows, by):
    """The rows, which are best first; in the first `why` it wins, in all others with a score
    `behind`: how far, and the standard error of that or None, and `tie`: not beyond that error."""
    first, *others = rows = [dict(row) for row in rows]
    best = first["scores"].get(by)
    equal, near, beyond = [], [], []
    for place, row in enumerate(others, 2):
        if row["scores"].get(by) is None:
            continue
        apart, error = row["behind"] = best - row["scores"][by], row.get("gaps", {}).get(by)
        row["tie"] = apart <= (error or 0)
        kind = beyond
        if row["tie"]:
            kind = near if apart else equal
        kind.append((place, apart, error))
    said = []
    if equal:
        said.append(f"equal to {listed(equal)}, a tie")
    for _, apart, error in near[:1]:
        said.append(f"+{apart:.3f}, within its error of {error:.3f}: a tie with {listed(near)}")
    for place, apart, error in beyond[:1]:
        sure = "" if error is None else f", beyond its error of {error:.3f}"
        said.append(f"+{apart:.3f} before {place}{sure}")
    first["why"] = "; ".join(said) or "the only one that has a score"
    if best is None:
        first["why"] = f"no winner, as no candidate has a score by {by}"
    return rows


def listed(places):
    """The numbers of places as words: 2, 3 and 5."""
    *most, last = [str(place) for place, *_ in places]
    return f"{', '.join(most)} and {last}" if most else last
