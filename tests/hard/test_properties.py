"""What must hold of any input, by hypothesis: a few examples each in `make test`, many in
`make test-hard`.

Readers of files are given documents and pictures that were changed at random: they may raise
ValueError alone, in one line that names the file. The tokenizer of captions gives words; CIDEr is
what its definition says; the bridge loses no mass, and takes a captioner that is certain to the
generator's own prompt.
"""
import copy
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import annotations
import best_of_n
import bridge
import checkpoints
import data
import inputs
import loading
import metrics
import records

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make  # noqa: E402

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "DDS", "SPIDER", "BLP", "ICO", "TGA", "AVIF", "PCX", "SGI", "IM")
WORDS = ("a red ring's on the wall n't can't 3/4 U.S. (it) don't \u2019tis \xe9t\xe9 \u4e2d\u6587 \U0001f600 -- ... x-ray @me #no "
         "http://a.b/c 12-inch o'clock").split()
DROPPED = "'' ' ` `` . ? ! , : - -- ... ;".split()           # by the tokenizer, as they stand
# what repeats itself where a pattern may go back and forth
SLOW = ("a", "a.", "a'", "'", "n't", "a-", "1,", ".", "@a", "a@a.", "http://", "((", "a n't", "\u4e2d", "y'")
ODD = st.sampled_from(["", "\0", "\ud800", "\x1b[2J", "..", "/etc/passwd", "\u202e", "a" * 300, 10 ** 30, make.DROP])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = ODD | st.recursive(PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=6)
SCRATCHES = st.sampled_from([b"", b"\xff", b"{", b'"', b"\0", b"]", b"\xed\xa0\x80"])
SAID = st.lists(st.sampled_from([*WORDS, "", " ", "\0"]), max_size=12).map(" ".join)


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


@st.composite
def changed(draw, document):
    """A document with one to three values replaced, or taken out."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        value = draw(VALUES)
        if path or value is not make.DROP:
            document = make.put(document, path, copy.deepcopy(value))
    return document


def candidates(folder):
    """candidates.jsonl and settings.json of two captions."""
    folder.mkdir()
    rows = best_of_n.rows_of(["a ring", "a wall"], scores={"denoise": torch.tensor([0.5, 0.25])})
    item = data.Item("a", Path("a.png"), [])
    best_of_n.keep(item, rows, inputs.Inputs(best_of_n.IMAGE, [item]), 0, None, folder)
    records.same_settings(folder, {"n": "2"})


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """{name: (file, f())}: f reads the file, which is there."""
    folder = tmp_path_factory.mktemp("read")
    make.build(folder, {
        "coco": make.karpathy, "blip": make.blip, "nocaps": make.nocaps, "plain": make.imagefolder, "done": candidates,
        "captions.json": [{"image_id": 1, "caption": "a ring"}, {"image_id": 2, "caption": "a wall"}],
        "refs.json": {"images": [{"id": 1, "domain": "x"}], "annotations": [{"image_id": 1, "caption": "a ring"}]},
        "sentences.json": ["a ring", "a wall"], "revisions.jsonl": '{"repo": "a/b", "commit": "1"}\n',
        "given.json": {"coco/0.png": ["a ring", "a wall"]}, "shown.json": {"a ring": ["coco/0.png"]}})
    about = {"step": 1, "data": "x", "settings": {"captioner": "miniature", "lr": [0.1]}}
    save_file({"captioner.x": torch.zeros(2)}, folder / "checkpoint.safetensors", {"header": json.dumps(about)})
    return {
        "Karpathy's file": (folder / "coco/dataset_coco.json", lambda: data.read(folder / "coco", "test")),
        "BLIP's file": (folder / "blip/coco_karpathy_test.json", lambda: data.read(folder / "blip", "test")),
        "NoCaps' file": (folder / "nocaps/nocaps_val_4500_captions.json", lambda: data.read(folder / "nocaps", "in")),
        "metadata.jsonl": (folder / "plain/metadata.jsonl", lambda: data.read(folder / "plain")),
        "captions": (folder / "captions.json", lambda: annotations.by_key(folder / "captions.json")),
        "references": (folder / "refs.json", lambda: annotations.by_key(folder / "refs.json")),
        "sentences": (folder / "sentences.json", lambda: inputs.sentences_in(str(folder / "sentences.json"))),
        "given captions": (folder / "given.json", lambda: inputs.given_captions(folder / "given.json")),
        "given pictures": (folder / "shown.json", lambda: inputs.given_pictures(folder / "shown.json")),
        "candidates.jsonl": (folder / "done/candidates.jsonl", lambda: best_of_n.rank(best_of_n.finished(folder / "done", 2)[0])),
        "settings.json": (folder / "done/settings.json", lambda: records.same_settings(folder / "done", {"n": "2"})),
        "revisions.jsonl": (folder / "revisions.jsonl", lambda: loading.record_revisions(folder)),
        "a checkpoint's header": (folder / "checkpoint.safetensors", lambda: checkpoints.header(folder))}


READERS = ("Karpathy's file", "BLIP's file", "NoCaps' file", "metadata.jsonl", "captions", "references", "sentences",
           "given captions", "given pictures", "candidates.jsonl", "settings.json", "revisions.jsonl")


def refused_well(read, *names):
    """Calls a reader: it reads, or raises a ValueError with one of these names, which script.py
    makes one line."""
    try:
        read()
    except ValueError as e:
        assert any(name in str(e) for name in names), str(e)


@pytest.fixture
def begun(monkeypatch):
    monkeypatch.setitem(loading.REVISIONS, "a/b", "2")


@pytest.mark.parametrize("name", READERS)
@given(draw=st.data())
def test_a_document_changed_at_random(name, readers, begun, draw):
    file, read = readers[name]
    whole = file.read_bytes()
    lines = file.suffix == ".jsonl"
    document = [json.loads(row) for row in whole.splitlines()] if lines else json.loads(whole)
    new = draw.draw(changed(document))
    rows = new if lines and isinstance(new, list) else [new]
    try:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        refused_well(read, file.name, f"{file.parent.name} holds")
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", READERS)
@given(draw=st.data())
def test_a_document_with_scratches(name, readers, begun, draw):
    file, read = readers[name]
    whole = file.read_bytes()
    scratched = bytearray(whole)
    for place in draw.draw(st.lists(st.integers(0, len(whole)), min_size=1, max_size=3)):
        scratched[place:place + 1] = draw.draw(SCRATCHES)
    try:
        file.write_bytes(scratched)
        refused_well(read, file.name, f"{file.parent.name} holds")
    finally:
        file.write_bytes(whole)


@given(draw=st.data())
def test_a_checkpoints_header_changed_at_random(readers, draw):
    file, read = readers["a checkpoint's header"]
    whole = file.read_bytes()
    try:
        make.tensors(None, lambda about: {"header": json.dumps(draw.draw(changed(json.loads(about["header"]))))})(file)
        refused_well(read, file.name)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", FORMATS)
@given(seed=st.integers(0, 2 ** 31), count=st.integers(1, 12))
def test_a_picture_with_flipped_bytes(kind, tmp_path_factory, seed, count):
    file = tmp_path_factory.getbasetemp() / f"fuzzed-{kind}.png"
    file.write_bytes(make.flipped(kind, seed, count))
    refused_well(lambda: data.open_image(file), file.name)


# ---------------------------------------------------------------- words and scores
@given(SAID | st.text(max_size=40))
def test_the_tokenizer_gives_words(text):
    words = metrics.tokenize(text)
    assert all(word.split() == [word] and word not in DROPPED for word in words)
    assert metrics.tokenize(" ".join(text.split())) == words          # white space does not matter


@pytest.mark.parametrize("pattern", SLOW)
def test_the_tokenizer_comes_to_an_end(pattern):
    """40,000 letters, where a pattern that goes back and forth would take hours."""
    began = time.process_time()
    metrics.tokenize(pattern * (40_000 // len(pattern)))
    assert time.process_time() - began < 20


def slow_cider(candidates, references):
    """CIDEr-D by its definition, word by word: a list of numbers."""
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


@given(st.lists(st.tuples(SAID, st.lists(SAID, min_size=1, max_size=3), st.booleans()), min_size=2, max_size=5))
def test_cider_is_what_its_definition_says(items):
    references = [refs for _, refs, _ in items]
    candidates = [refs[0] if same else said for said, refs, same in items]
    assert np.allclose(metrics.cider(candidates, references), slow_cider(candidates, references), rtol=0, atol=1e-9)


# ---------------------------------------------------------------- the bridge
@pytest.fixture(scope="module")
def bridges(captioner, generator):
    """{kind: (one whose embeddings are all one, one of random embeddings)}; the head's rows."""
    source, target = captioner.tokenizer, generator.tokenizer
    torch.manual_seed(0)
    random, ones = torch.randn(len(target), 16), torch.ones(len(target), 1)
    found = {kind: (bridge.Bridge(source, target, ones, kind=kind), bridge.Bridge(source, target, random, kind=kind))
             for kind in bridge.KINDS}
    return found, torch.randint(2, (len(source), 64)).float() * 2 - 1


@pytest.mark.parametrize("kind", bridge.KINDS)
@given(texts=st.lists(SAID, min_size=1, max_size=3), lead=st.integers(0, 2), seed=st.integers(0, 99))
def test_the_bridge_loses_no_mass(kind, bridges, texts, lead, seed):
    ones, _ = bridges[0][kind]
    layout = ones.layout(texts, lead)
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(*layout.source.shape, 8, generator=g), torch.randn(len(ones.table), 8, generator=g)
    mass, *_ = ones(hidden, head, None, layout)
    assert torch.allclose(mass, torch.ones(()), atol=1e-5)


@given(texts=st.lists(SAID, min_size=1, max_size=3), lead=st.integers(0, 2))
def test_a_captioner_that_is_certain_gives_the_generators_own_prompt(generator, bridges, texts, lead):
    (_, own), head = bridges[0]["anchored"], bridges[1]
    layout = own.layout(texts, lead)
    embedded, *_ = own(16 * head[layout.source.clamp(min=0)], head, None, layout)
    prompt = generator.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.allclose(embedded, own.embeddings[prompt], atol=1e-5)
