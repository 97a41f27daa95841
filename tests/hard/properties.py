"""What must hold of any input: python tests/hard/properties.py [COUNT [SEED]]

    for row, tried, detail in properties(folder, count, seed): ...

Readers of files are given documents and pictures that were changed at random, and may raise
ValueError alone, with the file's name. The tokenizer of captions gives words, in time that grows
with the text; CIDEr is what its definition says; the bridge loses no mass, and takes a captioner
that is certain to the generator's own prompt.
"""
# ruff: noqa: I001
import contextlib
import copy
import io
import json
import math
import sys
import time
from collections import Counter

import make
import numpy as np

WORDS = "a red ring's on the wall n't can't 3/4 U.S. (it) don't \u2019tis \xe9t\xe9 \u4e2d\u6587 \U0001f600 -- ... x-ray @me #no http://a.b/c 12-inch o'clock".split()
ODD = ["", " ", "\0", "\ud800", "\x1b[2J", "..", "/etc/passwd", "\u202e", "a" * 300]
VALUES = [None, True, -1, 0, 1.5, 10 ** 30, float("nan"), [], {}, [None], [[]], {"a": None}, *ODD]
# what repeats itself where a pattern may go back and forth
SLOW = ["a", "a.", "a'", "'", "n't", "a-", "1,", ".", "@a", "a@a.", "http://", "((", "a n't", "\u4e2d", "y'"]
DROPPED = "'' ' ` `` . ? ! , : - -- ... ;".split()
LONG = "more than ten seconds"
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "DDS", "SPIDER", "BLP", "ICO", "TGA", "AVIF", "PCX", "SGI", "IM")


# ---------------------------------------------------------------- documents changed at random
def places(document, path=()):
    """The keys of every value of a document."""
    yield path
    inner = ()
    if isinstance(document, dict):
        inner = document.items()
    elif isinstance(document, list):
        inner = enumerate(document)
    for key, value in inner:
        yield from places(value, (*path, key))


def mutated(document, dice):
    """A document with one to three values replaced, taken out or doubled."""
    document = copy.deepcopy(document)
    for _ in range(dice.integers(1, 4)):
        known = list(places(document))
        path = known[dice.integers(len(known))]
        value = copy.deepcopy(VALUES[dice.integers(len(VALUES))])
        if path and dice.random() < .25:
            value = make.DROP
        document = make.put(document, path, value)
    return document


def scratched(text, dice):
    """The bytes of a text with some changed."""
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for place in dice.integers(0, max(len(data), 1), 3):
        data[place:place + 1] = [b"", b"\xff", b"{", b"\"", b"\0", b"]", b"\xed\xa0\x80"][dice.integers(7)]
    return bytes(data)


def readers(finished, folder):
    """{name: (file, f())}: f reads the file, which is there."""
    import annotations
    import best_of_n
    import checkpoints
    import data
    import records
    import loading
    import inputs
    import outputs
    make.build(folder, {"coco": make.karpathy, "blip": make.blip, "nocaps": make.nocaps, "plain": make.imagefolder})
    for name, copied in finished.items():
        copied(folder / name)
    make.build(folder, {"captions.json": [{"image_id": 1, "caption": "a ring"}, {"image_id": 2, "caption": "a wall"}],
                        "refs.json": {"images": [{"id": 1, "domain": "x"}], "annotations": [{"image_id": 1, "caption": "a ring"}]},
                        "sentences.json": ["a ring", "a wall"], "revisions.json": {"a/b": ["1"]},
                        "given.json": {"coco/0.png": ["a ring", "a wall"]}, "shown.jsonl": '{"prompt": "a ring", "images": ["coco/0.png"]}\n'})
    loading.REVISIONS["a/b"] = "2"

    def ranked():
        best_of_n.rank(best_of_n.finished(folder / "done", 2)[0])
    return {"Karpathy's file": (folder / "coco/dataset_coco.json", lambda: data.read(folder / "coco", "test")),
            "BLIP's file": (folder / "blip/coco_karpathy_test.json", lambda: data.read(folder / "blip", "test")),
            "NoCaps' file": (folder / "nocaps/nocaps_val_4500_captions.json", lambda: data.read(folder / "nocaps", "in")),
            "metadata.jsonl": (folder / "plain/metadata.jsonl", lambda: data.read(folder / "plain")),
            "captions": (folder / "captions.json", lambda: annotations.by_key(folder / "captions.json")),
            "references": (folder / "refs.json", lambda: annotations.by_key(folder / "refs.json")),
            "sentences": (folder / "sentences.json", lambda: inputs.sentences_in(str(folder / "sentences.json"))),
            "given captions": (folder / "given.json", lambda: inputs.given_captions(folder / "given.json")),
            "given pictures": (folder / "shown.jsonl", lambda: inputs.given_pictures(folder / "shown.jsonl")),
            "candidates.jsonl": (folder / "done/candidates.jsonl", ranked),
            "settings.json": (folder / "done/settings.json", lambda: records.same_settings(folder / "done", {"n": "2"})),
            "words.jsonl": (folder / "worded/words.jsonl", lambda: outputs.recall_words([{"item": "a", "caption": "b", "picture": None}], folder / "worded")),
            "revisions.json": (folder / "revisions.json", lambda: loading.record_revisions(folder)),
            "a checkpoint's header": (folder / "trained/checkpoint.safetensors", lambda: checkpoints.header(folder / "trained"))}


def read_documents(finished, folder, count, dice):
    """Yields (row, tried, detail): detail tells what else than ValueError was raised, and where."""
    for name, (file, read) in readers(finished, folder).items():
        whole = file.read_bytes()
        lines = file.suffix == ".jsonl"
        header = file.suffix == ".safetensors"
        text = "" if header else whole.decode("utf-8")
        document = [json.loads(row) for row in text.splitlines()] if lines else None
        document = json.loads(text) if not (lines or header) else document
        found = {}
        for i in range(count):
            if header:
                file.write_bytes(whole)
                make.tensors(None, lambda about: {"header": json.dumps(mutated(json.loads(about["header"]), dice))})(file)
            elif i % 4 == 0:
                file.write_bytes(scratched(text, dice))
            else:
                new = mutated(document, dice)
                rows = new if lines and isinstance(new, list) else [new]
                file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            outcome(read, found, file.name, f"{file.parent.name} holds")
        file.write_bytes(whole)
        yield f"property: {name}", count, "; ".join(sorted(found))
    sys.modules["loading"].REVISIONS.clear()         # as the runs to come find it


def outcome(read, found, *names):
    """Calls a reader; notes into `found` what was not a ValueError that names the file."""
    began = time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            read()
    except ValueError as e:
        if not any(n in str(e) for n in names) or "\n" in str(e):
            note(found, e, "unnamed ")
    except Exception as e:
        note(found, e)
    if time.process_time() - began > 10:
        found[LONG] = True


def note(found, error, word=""):
    place = error.__traceback__
    while place.tb_next and "site-packages" not in place.tb_next.tb_frame.f_code.co_filename and "/python3" not in place.tb_next.tb_frame.f_code.co_filename:
        place = place.tb_next
    code = place.tb_frame.f_code
    found[f"{word}{type(error).__name__} in {code.co_name}"] = True


def read_pictures(folder, count, dice):
    """The same of pictures with bytes flipped, under the name of a PNG."""
    import data
    file = folder / "fuzzed.png"
    for kind in FORMATS:
        found = {}
        for _ in range(count):
            if LONG in found:                    # one will do
                break
            file.write_bytes(make.flipped(kind, dice.integers(2 ** 31), int(dice.integers(1, 12))))
            outcome(lambda: data.open_image(file), found, file.name)
        yield f"property: a {kind} as picture", count, "; ".join(sorted(found))


# ---------------------------------------------------------------- words and scores
def said(dice, most=12):
    """A caption of odd words."""
    some = [*WORDS, *ODD[:3]]
    return " ".join(some[i] for i in dice.integers(len(some), size=dice.integers(0, most)))


def tokenizer(count, dice):
    """Lower-case words without space or sentence punctuation; linear time."""
    import metrics
    wrong = set()
    for _ in range(count):
        text = "".join(chr(c) for c in dice.integers(1, 0x3000, size=12)) if dice.random() < .3 else said(dice)
        words = metrics.tokenize(text)
        if any(not w or w.split() != [w] or w in DROPPED for w in words):
            wrong.add("words that are none")
        if metrics.tokenize(" ".join(text.split())) != words:
            wrong.add("white space matters")
    for pattern in SLOW:
        times = []
        for length in (10_000, 40_000):
            began = time.process_time()
            metrics.tokenize(pattern * (length // len(pattern)))
            times.append(time.process_time() - began)
        if times[1] > 2 or times[1] > 10 * max(times[0], .02):
            wrong.add(f"{pattern!r} repeated takes {times[1]:.1f} s")
    yield "property: the tokenizer", count, "; ".join(sorted(wrong))


def slow_cider(candidates, references):
    """CIDEr-D by its definition, word by word: a list of numbers."""
    import metrics

    def grams(text, n):
        words = metrics.tokenize(text)
        return Counter(words[i:i + n] for i in range(len(words) - n + 1))
    scores = []
    for candidate, refs in zip(candidates, references):
        total = 0.0
        for n in range(1, 5):
            seen = [set().union(*(grams(r, n) for r in some)) for some in references]

            def weights(text, n=n, seen=seen):
                return {g: c * (math.log(len(seen)) - math.log(max(1, sum(g in s for s in seen)))) for g, c in grams(text, n).items()}
            mine = weights(candidate)
            for ref in refs:
                theirs = weights(ref)
                norm = math.sqrt(sum(v * v for v in mine.values())) * math.sqrt(sum(v * v for v in theirs.values()))
                dot = sum(min(mine[g], theirs[g]) * theirs[g] for g in mine.keys() & theirs.keys())
                gap = sum(grams(candidate, 2).values()) - sum(grams(ref, 2).values())
                total += (dot / norm if norm else 0.0) * math.exp(-gap ** 2 / 72) / len(refs)
        scores.append(10 * total / 4)
    return scores


def cider(count, dice):
    import metrics
    wrong = set()
    for _ in range(count):
        n = dice.integers(2, 6)
        references = [[said(dice) for _ in range(dice.integers(1, 4))] for _ in range(n)]
        candidates = [refs[0] if dice.random() < .3 else said(dice) for refs in references]
        gap = np.abs(metrics.cider(candidates, references) - slow_cider(candidates, references)).max()
        if not gap < 1e-9:
            wrong.add(f"off by {gap:.1g}")
    yield "property: CIDEr", count, "; ".join(sorted(wrong))


# ---------------------------------------------------------------- the bridge
def crossing(count, dice):
    """Ones stay ones; a captioner that is certain of the caption gives the generator's own prompt."""
    import torch

    import bridge
    from captioners import Captioner
    from generators import Generator
    source, target = Captioner.load("miniature").tokenizer, Generator.load("miniature").tokenizer
    torch.manual_seed(0)
    wrong = Counter()
    for kind in bridge.KINDS:
        ones = bridge.Bridge(source, target, torch.ones(len(target), 1), kind=kind)
        own = bridge.Bridge(source, target, torch.randn(len(target), 16), kind=kind)
        head = torch.randint(2, (len(source), 64)).float() * 2 - 1
        for _ in range(count):
            texts = [said(dice) for _ in range(2)]
            lead = int(dice.integers(3))
            layout = ones.layout(texts, lead)
            width = layout.source.shape
            mass, *_ = ones(torch.randn(*width, 8), torch.randn(len(source), 8), None, layout)
            wrong[f"{kind}: mass is lost"] += bool((mass - 1).abs().max() > 1e-5)
            if kind == "anchored":
                embedded, *_ = own(16 * head[layout.source.clamp(min=0)], head, None, own.layout(texts, lead))
                prompt = target(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
                wrong["a certain captioner is not heard"] += not torch.allclose(embedded, own.embeddings[prompt], atol=1e-5)
    yield "property: the bridge", count, "; ".join(k for k, v in wrong.items() if v)


def properties(finished, folder, count, seed=0):
    """All of them: yields (row, tried, what is wrong or "")."""
    dice = np.random.default_rng(seed)
    folder.mkdir()
    yield from read_documents(finished, folder, count, dice)
    yield from read_pictures(folder, count, dice)
    yield from tokenizer(4 * count, dice)
    yield from cider(max(count // 4, 8), dice)
    yield from crossing(max(count // 4, 8), dice)
