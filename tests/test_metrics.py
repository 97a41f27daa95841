"""Scores against pycocoevalcap's and gensim's golden ones, and against sums done by hand."""
import base64
import json
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import metrics

HERE = Path(__file__).parent


def as_they_are(monkeypatch):
    monkeypatch.setattr(metrics, "tokenize", str.split)


def columns(items):
    return [x["candidate"] for x in items], [x["references"] for x in items]


def golden(shared, name):
    return json.loads((shared / "data/golden" / name).read_text())


# ---------------------------------------------------------------- words
def test_tokenizer_edge_cases(shared):
    cases = golden(shared, "tokenizer_edge_cases.json")
    wrong = [c["caption"] for c in cases if list(metrics.tokenize(c["caption"])) != c["ptb"].split()]
    assert not wrong


@pytest.mark.parametrize("name", ["coco500", "fakecap251"])
def test_tokenizer_on_real_captions(shared, name):
    pairs = []
    raw, tokens = (golden(shared, f"{name}_{kind}.json") for kind in ("input", "ptb_tokens"))
    for x, y in zip(raw, tokens):
        pairs += zip([x["candidate"], *x["references"]], [y["candidate"], *y["references"]])
    assert sum(" ".join(metrics.tokenize(a)) != b for a, b in pairs) <= .001 * len(pairs)


PTB = json.loads((HERE / "ptb.json").read_text(encoding="utf-8"))


def test_tokenizer_is_the_jars():
    """Abbreviations, clitics, numbers, symbols, faces, marks and elided articles of other tongues:
    ptb.json says how its tokens were made."""
    wrong = {}
    for caption, tokens in PTB["invented"].items():
        if " ".join(metrics.tokenize(caption)) != tokens:
            wrong[caption] = metrics.tokenize(caption)
    assert not wrong and len(PTB["invented"]) > 400


@pytest.mark.parametrize("name, most", [("coco_karpathy_test", 2),
                                        ("nocaps_one_caption_each", 0)])
def test_tokenizer_on_public_captions(shared, name, most):
    """Of the jar's tokens a byte of each caption is kept: another tokenization meets it by chance
    once in 256."""
    captions = []
    for row in json.loads((shared / f"data/captions/{name}.json").read_text(encoding="utf-8")):
        captions += row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
    jar = base64.b85decode(PTB[name])
    assert len(captions) == len(jar) > 4000
    ours = [zlib.crc32(" ".join(metrics.tokenize(c)).encode()) & 255 for c in captions]
    assert sum(a != b for a, b in zip(ours, jar)) <= most


@pytest.mark.parametrize("part", [
    "a", "a-", "--a", "a'", "a.", "<a", "A&", "1:", "n't", "aaaa-'", "&amp;", "a\u0301", "'-"])
def test_tokenizing_takes_time_as_the_caption_is_long(part):
    start = time.process_time()
    metrics.tokenize(part * 20000)
    assert time.process_time() - start < 2                      # what goes back takes minutes


def test_the_scores_of_stray_signs():
    """By pycocoevalcap with its jar: a sign that only a reference has is a token."""
    said = ["a red bus on a street", "a man rides a horse", "two dogs in the grass"]
    heard = [["a red bus on a street¬"], ["a man rides a horse¬", "a man on a horse"],
             ["two dogs in the grass"]]
    assert metrics.cider(said, heard) == pytest.approx([8.9741, 6.1242, 10], abs=5e-5)
    corpus = metrics.bleu(metrics.bleu_counts(said, heard).sum(0))
    assert corpus == pytest.approx([.9394] * 4, abs=5e-5)


def test_tokenizer_on_invented_captions():
    data = json.loads((HERE / "synthetic12.json").read_text())
    for x, y in zip(data["items"], data["ptb_tokens"]):
        assert [" ".join(metrics.tokenize(c)) for c in x["references"]] == y["references"]
    assert metrics.tokenize("a\u2028b\r\nc\x0bd") == ("a", "b", "c", "d")


# ---------------------------------------------------------------- CIDEr, WMD
def test_cider_of_invented_captions():
    data = json.loads((HERE / "synthetic12.json").read_text())
    candidates, references = columns(data["items"])
    scores = metrics.cider(candidates, references)
    assert scores.mean() == pytest.approx(data["corpus"]["CIDEr"], abs=1e-9)
    assert scores == pytest.approx(data["per_image"]["CIDEr"], abs=1e-9)


@pytest.mark.parametrize("name,value", [("coco500", .916986), ("fakecap251", .566958)])
def test_cider_is_pycocoevalcaps(shared, monkeypatch, name, value):
    whole = metrics.cider(*columns(golden(shared, f"{name}_input.json")))
    assert whole.mean() == pytest.approx(value, abs=5e-4)
    as_they_are(monkeypatch)                                    # the jar's tokens
    ours = metrics.cider(*columns(golden(shared, f"{name}_ptb_tokens.json")))
    theirs = golden(shared, f"{name}_scores.json")["per_image"]["CIDEr"]
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_without_a_tokenizer_cider_is_another_number(shared, monkeypatch):
    as_they_are(monkeypatch)
    assert metrics.cider(*columns(golden(shared, "coco500_input.json"))).mean() < .75


def test_cider_of_pairs_with_a_document_frequency(shared):
    references = json.loads((shared / "data/captions/coco_karpathy_test.json").read_text())
    df = metrics.document_frequency([row["caption"][1:] for row in references])   # 0: the candidate
    pairs = golden(shared, "cider_df_single_reference.json")["pairs"]
    candidates, others, theirs = zip(*pairs)
    ours = metrics.cider(candidates, [[x] for x in others], df)
    close = np.abs(ours - theirs) < 1e-3        # the golden df is of the jar's tokens
    assert close.mean() > .95
    print(np.abs(ours - theirs).max())


def test_cider_of_several_candidates(monkeypatch):
    """Of n candidates at once what one by one gives; a caption is tokenised once, however often it
    is met."""
    items = json.loads((HERE / "synthetic12.json").read_text())["items"]
    references = [x["references"] for x in items]
    groups = [[x["candidate"], "a red ball", x["references"][0]] for x in items]
    met = []

    class Spy:
        def findall(self, caption, find=metrics.TOKEN.findall):
            met.append(caption)
            return find(caption)
    monkeypatch.setattr(metrics, "TOKEN", Spy())
    metrics.tokenize.cache_clear()
    quality = metrics.cider(groups, references)
    assert len(met) == len({*met})
    assert quality.shape == (12, 3) and quality.dtype == np.float64
    one_by_one = [metrics.cider(column, references) for column in zip(*groups)]
    assert quality == pytest.approx(np.stack(one_by_one, 1), abs=1e-12)
    wider = metrics.document_frequency(references + [["a red ball"]] * 8)
    for got, group, captions in zip(metrics.cider(groups, references, wider), groups, references):
        alone = metrics.cider(group, [captions] * 3, wider)     # as pairs, each with the references
        assert got == pytest.approx(alone, abs=1e-12)
    assert not np.allclose(metrics.cider(groups, references, wider), quality)


def test_document_frequency_by_hand():
    df, images = metrics.document_frequency([["a dog", "a dog a dog"], ["a cat"]])
    assert images == 2 and df[("a",)] == 2 and df[("dog",)] == 1 and df[("dog", "a")] == 1
    assert ("cat", "a") not in df


def test_wmd_is_gensims(shared):
    data = golden(shared, "wmd_random_vectors.json")
    v = np.random.RandomState(0).standard_normal((len(data["vocab"]), 50))
    v = v.astype(np.float32).astype(np.float64)
    vectors = {w: row / np.linalg.norm(row) for w, row in zip(data["vocab"], v)}
    for a, b, value in data["pairs"]:
        ours = metrics.wmd(a, b, vectors)
        assert math.isnan(ours) if value is None else ours == pytest.approx(value, abs=1e-6)


def test_wmd_by_hand(tmp_path):
    (tmp_path / "glove.txt").write_text("dog 1 0\ncat 0 2\ncar -3 0\n")
    v = metrics.word_vectors(tmp_path / "glove.txt", {"dog", "cat", "car", "bus"})
    assert set(v) == {"dog", "cat", "car"} and np.allclose(v["cat"], [0, 1])
    # half of "dog" stays, half goes to "cat" (sqrt 2); unknown words are dropped
    assert metrics.wmd(["dog"], ["dog", "cat", "bus"], v) == pytest.approx(math.sqrt(2) / 2)
    assert math.isnan(metrics.wmd(["bus"], ["dog"], v))
    scores = metrics.movers(tmp_path / "glove.txt", ["a dog"] * 2, ["the dog", "a car"])
    assert scores[0] == 0 and scores[1] == pytest.approx(-2)
    scores = metrics.movers(tmp_path / "glove.txt", ["the dog, dog, cat", "the"], ["dog", "dog"])
    assert scores[0] == pytest.approx(-math.sqrt(2) / 3) and math.isnan(scores[1])  # words repeat
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="bad.txt"):
        metrics.word_vectors(tmp_path / "bad.txt", {"x"})
    with pytest.raises(ValueError, match="none.txt.*--glove"):
        metrics.word_vectors(tmp_path / "none.txt", {"x"})


def test_word_vectors_are_read_once(tmp_path):
    """A word is looked for once, also where the file has none; of two lines the first is meant."""
    path = tmp_path / "glove.txt"
    path.write_text("dog 3 4\ndog 1 0\ncat 0 1\n")
    found = metrics.word_vectors(path, {"dog", "bus"})
    assert set(found) == {"dog"} and found["dog"].tolist() == [.6, .8]
    assert set(metrics.word_vectors(path, {"dog", "cat"})) == {"dog", "cat"}
    path.unlink()
    assert set(metrics.word_vectors(path, {"dog", "cat", "bus"})) == {"dog", "cat"}
    with pytest.raises(ValueError, match="glove.txt"):
        metrics.word_vectors(path, {"horse"})


# ---------------------------------------------------------------- BLEU, SPICE, and sets of pictures
def test_bleu_of_invented_captions():
    data = json.loads((HERE / "synthetic12.json").read_text())
    counts = metrics.bleu_counts(*columns(data["items"]))
    names = [f"Bleu_{n}" for n in range(1, 5)]
    corpus = [data["corpus"][k] for k in names]
    each = np.array([data["per_image"][k] for k in names])
    assert metrics.bleu(counts.sum(0)) == pytest.approx(corpus, abs=1e-12)
    assert metrics.bleu(counts).T == pytest.approx(each, abs=1e-12)


@pytest.mark.parametrize("name", ["coco500", "fakecap251"])
def test_bleu_is_pycocoevalcaps(shared, monkeypatch, name):
    corpus = golden(shared, f"{name}_scores.json")["corpus"]
    want = [corpus[f"Bleu_{n}"] for n in range(1, 5)]
    whole = metrics.bleu_counts(*columns(golden(shared, f"{name}_input.json")))
    assert metrics.bleu(whole.sum(0)) == pytest.approx(want, abs=5e-4)
    as_they_are(monkeypatch)
    ours = metrics.bleu_counts(*columns(golden(shared, f"{name}_ptb_tokens.json")))
    assert metrics.bleu(ours.sum(0)) == pytest.approx(want, abs=1e-12)


def test_bleu_by_hand():
    """Two of three words, one of two pairs; the reference is one word longer: exp(1 - 4 / 3)."""
    counts = metrics.bleu_counts(["a red dog"], [["a red cat sleeps"]])[0]
    assert counts.tolist() == [2, 1, 0, 0, 3, 2, 1, 0, 3, 4]
    short = math.exp(-1 / 3)
    assert metrics.bleu(counts)[:2] == pytest.approx([2 / 3 * short, (2 / 3 / 2) ** .5 * short])
    two = metrics.bleu_counts(["a a a b"], [["a b c", "a a b c d"]])[0]     # 3 and 5 are as close
    assert two.tolist()[:4] == [3, 2, 1, 0] and two[9] == 3
    assert np.isfinite(metrics.bleu(metrics.bleu_counts([""], [["a dog"]]))).all()


JAVA = """#!/bin/sh
if [ "$1" = "-version" ]; then echo 'openjdk version "VERSION"' >&2; exit 0; fi
if [ ! -f lib/stanford-corenlp-3.6.0-models.jar ]; then
  echo "Exception in thread: NoClassDefFoundError" >&2; exit 1; fi
[ CODE = 0 ] || { echo "OutOfMemoryError: heap" >&2; exit CODE; }
exec PYTHON -c '
import json, sys
rows = json.load(open(sys.argv[1]))
assert rows[0] == {"image_id": 0, "test": "a dog \\x27s ball", "refs": ["the ball"]}, rows
out = [{"image_id": r["image_id"], "scores": {"All": {"f": r["image_id"] / 10}}} for r in rows[:2]]
json.dump(out, open(sys.argv[2], "w"))' "$4" "$6"
"""


def stand_in(folder, version, jar=True, code=0):
    """What answers as `java -version` and as the jar do: SPICE of an item = its number / 10."""
    java = folder / "java"
    script = JAVA.replace("VERSION", version).replace("CODE", str(code))
    java.write_text(script.replace("PYTHON", sys.executable))
    java.chmod(0o755)
    (folder / "lib").mkdir(exist_ok=True)
    if jar:
        (folder / "spice-1.0.jar").touch()
        (folder / "lib/stanford-corenlp-3.6.0-models.jar").touch()
    return str(java)


def test_spice_through_its_protocol(tmp_path, monkeypatch):
    said = ["A dog's ball.", "two cats", "x"]
    heard = [["The ball!"], ["a cat", "cats"], ["y"]]
    monkeypatch.setenv("SPICE_JAR", str(tmp_path / "spice-1.0.jar"))
    for version, code, remedy in (("17.0.15", 0, 'is openjdk version "17.*8 to 14.*SPICE_JAVA'),
                                  ("15", 0, "8 to 14"), ("1.7.0_80", 0, "8 to 14"),
                                  ("11.0.2", 3, r"exit code 3 \(OutOfMemoryError: heap\)")):
        monkeypatch.setenv("SPICE_JAVA", stand_in(tmp_path, version, code=code))
        with pytest.raises(metrics.Unavailable, match=remedy):
            metrics.spice(said, heard)
    for version in ("9", "14.0.2", "1.8.0_392"):
        monkeypatch.setenv("SPICE_JAVA", stand_in(tmp_path, version))
        scores = metrics.spice(said, heard)
        assert scores[:2].tolist() == [0, .1] and math.isnan(scores[2])     # none for the third
    (tmp_path / "lib/stanford-corenlp-3.6.0-models.jar").unlink()
    with pytest.raises(metrics.Unavailable, match="NoClassDefFoundError.*get_stanford_models"):
        metrics.spice(said, heard)
    (tmp_path / "spice-1.0.jar").unlink()
    with pytest.raises(metrics.Unavailable, match="pip install pycocoevalcap"):
        metrics.spice(said, heard)
    monkeypatch.setenv("SPICE_JAVA", str(tmp_path / "none"))
    with pytest.raises(metrics.Unavailable, match="does not run.*SPICE_JAVA"):
        metrics.spice(said, heard)


def test_frechet_is_fid(shared):
    for name, case in golden(shared, "fid_features.json")["cases"].items():
        g = np.random.RandomState(case["seed"])
        x = g.standard_normal((case["n"], case["d"]))
        w = g.standard_normal((case["d"], case["d"])) / case["d"] ** .5
        y = g.standard_normal((case["m"], case["d"])) @ w + .1
        if name == "very_rank_deficient":
            x, y = x.clip(0), y.clip(0)
        y = x if name == "same_rank_deficient" else y
        want = case["fid"]["nuclear norm (own)"]
        assert metrics.frechet(x, y) == pytest.approx(want, abs=1e-9)


def test_frechet_in_closed_form():
    """Diagonal covariances: squared differences of means and of deviations; of itself, 0."""
    u = np.stack(np.meshgrid([-1., 1.], [-1., 1.], [-1., 1.]), -1).reshape(-1, 3)
    x = u * [1, 2, 3]                                           # uncorrelated, variance 8 / 7
    y = u * [2, 2, 5] + [1, 0, -2]
    assert metrics.frechet(x, y) == pytest.approx(5 + 8 / 7 * (1 + 0 + 4))
    for scale in (1, 1e3):
        assert 0 <= metrics.frechet(scale * x, scale * x) < 1e-6 and metrics.frechet(u, u) >= 0
    with pytest.raises(ValueError, match="two pictures or more"):
        metrics.frechet(x[:1], y)


def test_inception_score(shared):
    for case in golden(shared, "inception_score.json").values():
        z = np.random.RandomState(case["seed"]).standard_normal((case["n"], case["c"]))
        z *= case["scale"]
        want, _ = case["torch_fidelity_splits1_no_shuffle"]
        assert metrics.inception_score(z) == pytest.approx(want, abs=1e-9)


def test_inception_score_in_closed_form():
    assert metrics.inception_score(np.eye(7) * 1e4) == pytest.approx(7)      # all different
    assert metrics.inception_score(np.zeros((9, 5))) == pytest.approx(1)     # sure of nothing


def test_intervals():
    """Of a mean: the normal approximation. Paired: noise that two systems share cancels."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(400)
    a = noise
    b = noise + .1 + .01 * rng.standard_normal(400)
    low, high = metrics.resampled(lambda r: a[r].mean(), 400)
    half = 1.96 * a.std() / 20
    assert low == pytest.approx(a.mean() - half, abs=.02)
    assert high == pytest.approx(a.mean() + half, abs=.02)
    found = metrics.paired(a, b)
    low, high = found["interval"]
    assert found["difference"] == pytest.approx(.1, abs=.002) and .098 < low < high < .102
    assert found["a"] == pytest.approx(a.mean()) and found["p"] < .002


@pytest.mark.parametrize("gain", [0, .3])
def test_paired_is_scipys(gain):
    """Interval and p of a mean, by another library's bootstrap and permutations."""
    rng = np.random.default_rng(1)
    a = rng.standard_normal(40)
    b = a + gain + rng.standard_normal(40)
    found = metrics.paired(a, b, draws=4000)

    def difference(x, y, axis=-1):
        return y.mean(axis) - x.mean(axis)
    theirs = stats.bootstrap((a, b), difference, paired=True, method="percentile", rng=2)
    assert found["interval"] == pytest.approx(theirs.confidence_interval, abs=.03)
    p = stats.permutation_test((a, b), difference, permutation_type="samples", rng=2).pvalue
    assert found["p"] == pytest.approx(p, abs=.03)


def test_paired_of_corpus_scores_and_of_few():
    """BLEU-1 of two of three words and of all: counts are resampled, not its values."""
    heard = [["a red dog"]] * 6
    a = metrics.bleu_counts(["a red cat"] * 6, heard)
    b = metrics.bleu_counts(["a red dog"] * 6, heard)

    def bleu_1(counts):
        return metrics.bleu(counts.sum(0))[0]
    found = metrics.paired(a, b, bleu_1)
    assert (found["a"], found["b"]) == pytest.approx((2 / 3, 1)) and found["items"] == 6
    assert found["interval"] == pytest.approx((1 / 3, 1 / 3))
    assert found["p"] == pytest.approx(2 / 64, abs=.02)         # all six on one side, or the other
    assert metrics.paired(a, a, bleu_1)["p"] == 1
    assert metrics.paired([1.], [2.])["p"] == 1                 # of one item nothing is known
    some = metrics.paired([1, math.nan, 3], [2, 5, math.nan])
    assert some["items"] == 1 and some["difference"] == 1
    assert metrics.paired([math.nan], [1]) is None


# ---------------------------------------------------------------- choices
def test_choices_by_hand():
    quality = [[1, 2, 3], [6, 5, 4]]
    c = metrics.choices(quality, [[0, 0, 9], [0, 7, 7]])
    assert (c["mean"], c["chosen"], c["oracle"], c["gain"]) == (3.5, 4, 4.5, .5)
    # equal scores keep the candidates' order; the gains are 1 and 0
    assert c["by_rank"] == [(3 + 5) / 2, (1 + 4) / 2, (2 + 6) / 2]
    assert c["interval"] == (0, 1) and c["items"] == 2
    c = metrics.choices([[1, 2, 3], [6]], [[0, 0, 9], [0]])          # of any number each
    assert (c["mean"], c["chosen"], c["oracle"], c["gain"]) == (4, 4.5, 4.5, .5)
    assert c["by_rank"] == [(3 + 6) / 2, 1, 2] and c["interval"] == (0, 1)


def test_the_interval_covers():
    """Of 200 normal samples of 60, about 95 % of the intervals hold the true mean."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(200):
        low, high = metrics.interval(rng.normal(1, 2, 60), 500)
        hits.append(low < 1 < high)
    assert .89 < np.mean(hits) < .99
