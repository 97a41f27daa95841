"""How good captions and pictures are, and what choosing among them by a score is worth.

    cider(candidates, references)                      # CIDEr-D of each item; papers print 100 x
    bleu(bleu_counts(candidates, references).sum(0))   # corpus BLEU-1 to 4, or of any other sum
    spice(candidates, references), wmd(tokens, tokens, vectors)
    frechet(features, features), inception_score(logits)
    choices(caption_quality(groups, references), ranking)   # mean, chosen, oracle, with intervals

Captions are str; a candidate has one or several references. Copy this file alone: it needs numpy
and scipy (SPICE: its authors' jar, and Java).
"""
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist
from scipy.special import log_softmax

# ---------------------------------------------------------------- words
# After the Penn Treebank tokenizer of CoreNLP, by which COCO captions are scored: clitics are split
# off, hyphens, slashes and inner dots are kept, sentence punctuation is dropped. The jar differs in
# fewer than one caption of 1000.
ASCII = str.maketrans("’‘“”–—", "''\"\"--")
BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split()))
DROPPED = frozenset("'' ' ` `` . ? ! , : - -- ... ; \"".split())
SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na",
         "gimme": "gim me", "lemme": "lem me", "'tis": "'t is", "'twas": "'t was"}
TOKEN = re.compile(r"""
    https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | [@\#][a-z]\w*    # addresses, @names, #tags
  | (?:[a-z]\.){2,}                                                # u.s.  p.m.
  | (?:mr|mrs|ms|dr|st|vs|etc|no|jr|sr|prof|ave|ft|inc|co)\.(?=\s|$|\w)
  | \d+(?:[.,:/-]\d+)*(?:[a-z]\w*)?(?:-\w+)* | \.\d+               # 5.00  10:30  3/4  1st  12-inch
  | (?:can)(?=not\b) | o'clock\b | n't\b | '(?:s|m|d|re|ve|ll)\b | '(?:em|bout|n|tis|twas)\b'?
  | [do]'[a-z]+(?!') | y'(?=all)
  | [^\W_]+?(?=n't\b) | \w+(?:[-/.&]\w+)*                          # x-ray  a/b  at&t
  | \.\.\. | [$%&@#<>=+*\\] | [()\[\]{}]
""", re.X)


@functools.lru_cache(1 << 17)                # a reference meets many candidates
def tokenize(caption):
    """A caption as the field's scorers see it: a tuple of lower-case tokens without sentence
    punctuation."""
    plain = caption.lower().translate(ASCII)
    tokens = []
    for match in TOKEN.findall(" ".join(plain.split())):
        tokens += SPLIT.get(match, match).split()
    return tuple(BRACKETS.get(t, t) for t in tokens if t not in DROPPED)


# ---------------------------------------------------------------- captions against captions
def ngrams(caption):
    """The n-grams of a caption, one to four words long: a list of tuples."""
    words = tokenize(caption)
    found = []
    for n in range(1, 5):
        found += zip(*(words[i:] for i in range(n)))
    return found


def count(captions):
    """N captions -> how often each has each of their G n-grams, sparse (N, G); the n-grams; and
    their orders (G, 4), 1 in the column of the length: `counts @ orders` sums over each length."""
    column = {}                                             # of each n-gram
    found = []                                              # columns, caption after caption
    ends = [0]
    for caption in captions:
        found += [column.setdefault(gram, len(column)) for gram in ngrams(caption)]
        ends.append(len(found))
    shape = len(captions), len(column)
    counts = csr_array((np.ones(len(found)), found, ends), shape=shape)
    counts.sum_duplicates()
    orders = np.eye(4)[[len(gram) - 1 for gram in column]]
    return counts, list(column), orders


def document_frequency(references):
    """(df, N): in how many of N images' references each n-gram occurs. references: N lists."""
    df = Counter()
    for captions in references:
        df.update(set(chain(*map(ngrams, captions))))
    return df, len(references)


def cider(candidates, references, df=None):
    """CIDEr-D without stemming, which the field reports as CIDEr (Vedantam et al. 2015), of every
    candidate: float64, (N,) or (N, n) as they are. Papers print 100 x the mean.

    candidates: N captions, or N lists of n; references: N lists of captions. df: what
    document_frequency gives, of a reference set; without it that of `references` itself, as corpus
    scores have it (one image alone then scores 0).
    """
    df, images = df or document_frequency(references)
    candidates = np.array(candidates, object)
    n = candidates[:1].size                                         # candidates of each item
    counts, names, orders = count([*candidates.flat, *chain(*references)])
    seen = np.array([df.get(name, 0) for name in names])
    rarity = math.log(max(images, 1)) - np.log(np.maximum(seen, 1))
    weighted = counts.copy()                                        # tf-idf
    weighted.data *= rarity[weighted.indices]
    norm = (weighted.power(2) @ orders) ** .5                       # (captions, 4)
    length = (counts @ orders)[:, 1]                                # in pairs of words, as theirs
    several = np.array([*map(len, references)], int)
    item = np.arange(len(several)).repeat(several)                  # (R,) whose each reference is
    right = candidates.size + np.arange(len(item))                  # (R,) the references' rows
    heard = weighted[right]                                         # (R, G)
    scores = np.zeros((len(several), n))
    for j in range(n):
        left = item * n + j                                         # (R,) who is held against them
        dots = weighted[left].minimum(heard).multiply(heard) @ orders       # (R, 4)
        norms = norm[left] * norm[right]
        cosine = dots / np.where(norms > 0, norms, 1)
        longer = length[left] - length[right]
        penalty = np.exp(-longer ** 2 / 72)                         # Gaussian, sigma 6
        alike = 10 * penalty * cosine.mean(1)                       # (R,)
        scores[:, j] = np.bincount(item, alike, len(several))
    scores /= np.maximum(1, several)[:, None]
    return scores.reshape(candidates.shape)


def caption_quality(groups, references, df=None):
    """100 x CIDEr of n candidate captions of each item, as `choices` takes it: (items, n).
    groups: lists of n captions; references: lists of captions; df: of a wider set of those."""
    return 100 * cider(groups, references, df)


def bleu_counts(candidates, references):
    """What corpus BLEU adds up, of each item: (N, 10) of 4 x clipped matches, 4 x n-grams, length,
    reference length (the closest one). Sum over any subset, or over a bootstrap draw, and give it
    to `bleu`. Each item needs a reference or more."""
    n = len(candidates)
    counts, _, orders = count([*candidates, *chain(*references)])
    several = np.array([*map(len, references)], int)
    ends = n + np.cumsum(several)
    starts = ends - several
    # the most often a reference has each n-gram: of the first ones, the second, ... the last again
    most = counts[starts]
    for k in range(1, several.max()):
        most = most.maximum(counts[np.minimum(starts + k, ends - 1)])
    matches = counts[:n].minimum(most) @ orders                     # (N, 4)
    totals = counts @ orders                                        # (N + R, 4)
    length = totals[:, 0]
    closest = []
    for said, start, end in zip(length, starts, ends):
        heard = np.sort(length[start:end])                          # of two as close the shorter
        closest.append(heard[np.abs(heard - said).argmin()])
    return np.column_stack([matches, totals[:n], length[:n], closest])


def bleu(counts):
    """BLEU-1, -2, -3, -4 (Papineni et al. 2002) of counts (..., 10), with pycocoevalcap's guards:
    (..., 4)."""
    match, total, length, reference = np.split(counts, (4, 8, 9), -1)
    precision = (match + 1e-15) / (total + 1e-9)
    ratio = (length + 1e-15) / (reference + 1e-9)
    brevity = np.exp(1 - 1 / np.minimum(ratio, 1))
    log_mean = np.log(precision).cumsum(-1) / np.arange(1, 5)
    return np.exp(log_mean) * brevity


class Unavailable(Exception):
    """A metric that can't be had on this machine; its text says why, and the remedy."""


def spice(candidates, references):
    """SPICE (Anderson et al. 2016) of each item by its authors' jar: (N,) float64, nan where it
    gave none. Needs pycocoevalcap (the jar), its CoreNLP models, and Java 8 to 14: SPICE_JAVA
    names another java than the first on the path, SPICE_JAR another jar. Raises Unavailable."""
    java = os.environ.get("SPICE_JAVA", "java")
    try:
        version = subprocess.run([java, "-version"], capture_output=True, text=True).stderr
    except OSError as e:
        raise Unavailable(f"{java} does not run: install Java 8, or name it by SPICE_JAVA") from e
    if not re.search(r'version "(1\.8|9|1[0-4])\b', version):       # from 15 on without Nashorn
        about = version.partition("\n")[0]
        raise Unavailable(f"{java} is {about}, and the jar needs 8 to 14: name one by SPICE_JAVA")
    package = importlib.util.find_spec("pycocoevalcap")
    folder = Path(package.origin).parent / "spice" if package else Path()
    jar = Path(os.environ.get("SPICE_JAR", folder / "spice-1.0.jar")).resolve()
    if not jar.is_file():
        raise Unavailable("its jar is not here: pip install pycocoevalcap, or name it by SPICE_JAR")
    rows = []
    for candidate, captions in zip(candidates, references):
        test = " ".join(tokenize(candidate))
        refs = [" ".join(tokenize(caption)) for caption in captions]
        rows.append({"image_id": len(rows), "test": test, "refs": refs})
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "in.json"), Path(folder, "out.json")
        given.write_text(json.dumps(rows))
        # no -cache: its database reflects into the JDK and has no library for ARM
        command = [java, "-jar", "-Xmx8G", jar, given, "-out", made, "-subset", "-silent"]
        run = subprocess.run(command, cwd=jar.parent, capture_output=True, text=True)
        if run.returncode or not made.is_file():
            last = run.stderr.strip().rpartition("\n")[2][:200]
            raise Unavailable(f"the jar failed with exit code {run.returncode} ({last}); it wants "
                              "8 GB of memory, and CoreNLP 3.6.0 (404 MB) by python -m "
                              "pycocoevalcap.spice.get_stanford_models")
        found = json.loads(made.read_text())
    scores = np.full(len(rows), math.nan)
    for row in found:
        scores[row["image_id"]] = row["scores"]["All"]["f"]
    return scores


STOP = frozenset(
    "a an the of on in at to and or is are was were be been being with by for from as it its this "
    "that these those there here he she they his her their them i we you my your our up down out "
    "into over under some".split())
READ = {}       # of each GloVe file what was looked for: {word: unit vector, or None}


def word_vectors(path, words):
    """The vectors of `words` in a GloVe text file, as {word: unit vector}: one pass over the file
    for all words not asked for before. Raises ValueError where the file is none."""
    known = READ.setdefault(str(path), {})
    new = dict.fromkeys(set(words) - known.keys())
    if new:
        try:
            with open(path, encoding="utf-8") as lines:
                for line in lines:
                    word, _, numbers = line.partition(" ")
                    if word in new and new[word] is None:           # the first of two is meant
                        vector = np.array(numbers.split(), np.float64)
                        new[word] = vector / np.linalg.norm(vector)
        except (OSError, ValueError) as e:
            raise ValueError(f"{path} is not a GloVe text file ({e}); --glove takes one such as "
                             "glove.6B.200d.txt") from e
        known.update(new)
    return {word: known[word] for word in words if known[word] is not None}


def wmd(a, b, vectors):
    """Word mover's distance (Kusner et al. 2015) of two token lists, exact: the assignment of
    tokens repeated to the least common multiple. Words without a vector are dropped; nan where none
    is left. vectors: {word: unit vector}."""
    a = [vectors[token] for token in a if token in vectors]
    b = [vectors[token] for token in b if token in vectors]
    if not a or not b:
        return math.nan
    both = math.lcm(len(a), len(b))
    cost = cdist(a, b).repeat(both // len(a), 0)
    cost = cost.repeat(both // len(b), 1)
    return float(cost[linear_sum_assignment(cost)].mean())


def content(caption):
    return [word for word in tokenize(caption) if word not in STOP]


def movers(glove, a, b):
    """Minus the word mover's distance of captions a[i] and b[i], stop words removed: (n,)."""
    tokens = {caption: content(caption) for caption in {*a, *b}}
    vectors = word_vectors(glove, set(chain(*tokens.values())))
    distances = [wmd(tokens[x], tokens[y], vectors) for x, y in zip(a, b)]
    return -np.array(distances)


# ---------------------------------------------------------------- sets of pictures
def frechet(x, y):
    """Frechet distance of two sets of features (n, D), (m, D), the FID where they are Inception's.

    Without a matrix square root, and exact where n < D: with A, B the R factors of the centred
    features over sqrt(n - 1), it is |mean difference|^2 + |A|^2 + |B|^2 - 2 |A B^T|_* (nuclear
    norm). In float64.
    """
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError("a covariance needs two pictures or more a side, "
                         f"got {len(x)} and {len(y)}")
    factors = []
    for features in (x, y):
        scale = math.sqrt(len(features) - 1)
        centred = features - features.mean(0)
        factors.append(np.linalg.qr(centred / scale, mode="r"))
    a, b = factors
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    apart = x.mean(0) - y.mean(0)
    spread = np.vdot(a, a) + np.vdot(b, b)
    return float(apart @ apart + spread - 2 * nuclear)


def inception_score(logits, splits=1):
    """Inception score (Salimans et al. 2016) of logits (N, C), in order, over `splits` parts:
    (mean, deviation)."""
    logp = log_softmax(np.asarray(logits, np.float64), 1)
    edges = [i * len(logp) // splits for i in range(1, splits)]
    scores = []
    for part in np.split(logp, edges):
        p = np.exp(part)
        divergence = p * (part - np.log(p.mean(0)))             # of each picture from the mean
        scores.append(math.exp(divergence.sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


# ---------------------------------------------------------------- what choosing is worth
def interval(values, draws=2000, seed=0):
    """95 % bootstrap interval of the mean of (N,) values: (low, high)."""
    values = np.asarray(values, np.float64)
    dice = np.random.default_rng(seed)
    rows = dice.integers(len(values), size=(draws, len(values)))
    return tuple(np.quantile(values[rows].mean(1), (.025, .975)).tolist())


def resampled(statistic, items, draws=1000, seed=0):
    """95 % bootstrap interval of any corpus score, statistic(rows) of resampled row numbers."""
    dice = np.random.default_rng(seed)
    values = [statistic(dice.integers(items, size=items)) for _ in range(draws)]
    return tuple(np.nanquantile(values, (.025, .975)).tolist())


def paired(statistic_a, statistic_b, items, draws=1000, seed=0):
    """Two systems on the same items: (b - a, its 95 % interval, share of draws without a gain)."""
    dice = np.random.default_rng(seed)
    gains = []
    for _ in range(draws):
        rows = dice.integers(items, size=items)
        gains.append(statistic_b(rows) - statistic_a(rows))
    whole = np.arange(items)
    gain = float(statistic_b(whole) - statistic_a(whole))
    low, high = np.nanquantile(gains, (.025, .975)).tolist()
    lost = sum(g <= 0 for g in gains)
    return gain, (low, high), lost / draws


def choices(quality, ranking):
    """What ranking N candidates by a score is worth (Tables 1, 2; Figures 3, 4).

    quality, ranking: (items, N), higher = better; equal rankings keep the candidates' order.
    Returns mean (of a random candidate), chosen, oracle, gain (chosen - mean) with its 95 %
    interval over items, and by_rank (N,).
    """
    quality = np.asarray(quality, np.float64)
    order = np.argsort(-np.asarray(ranking, np.float64), 1, kind="stable")
    ranked = np.take_along_axis(quality, order, 1)
    gain = ranked[:, 0] - quality.mean(1)
    return {
        "mean": quality.mean(),
        "chosen": ranked[:, 0].mean(),
        "oracle": quality.max(1).mean(),
        "gain": gain.mean(),
        "interval": interval(gain),
        "by_rank": ranked.mean(0).tolist(),
        "items": len(quality),
    }
