"""How good captions and pictures are, and what choosing among them by a score is worth.

    cider(candidates, references)                      # CIDEr-D of each item; papers print 100 x
    bleu(bleu_counts(candidates, references).sum(0))   # corpus BLEU-1 to 4, or of any other sum
    spice(candidates, references), wmd(tokens, tokens, vectors)
    frechet(features, features), inception_score(logits)
    choices(100 * cider(groups, references), ranking)  # mean, chosen, oracle, with intervals
    paired(values, values)                             # of two systems: difference, interval, p

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
import unicodedata
from collections import Counter
from itertools import chain, zip_longest
from pathlib import Path
from xml.sax.saxutils import unescape

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist
from scipy.special import log_softmax

# ---------------------------------------------------------------- words
# After pycocoevalcap's: the Penn Treebank tokenizer of CoreNLP 3.4.1, then lower case, less some
# punctuation. Of 25,010 captions of COCO and 4,500 of NoCaps two differ from its jar's.
MARKS = "".join(c for c in map(chr, range(0x300, 0xFE00))
                if unicodedata.category(c) in ("Mn", "Mc"))      # vowel signs, accents: not in \w
WORD = rf"\w[\w{MARKS}]*+"
LETTER = r"[^\W\d_]"
ABBREVIATIONS = "|".join(
    "adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bldg blvd brig bros calif capt "
    "cf cie cmdr co col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext "
    "feb fla fri ft ga gen gov govs hon inc ind insp intl jan jos jr jul jun kan kans ky lieut lt "
    "ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms mt mtg natl neb nev nov "
    "oct okla penn pfc ph plc pres prof pte pty pvt rd rep reps rev rt sen sens sep sept sgt sq sr "
    "st ste supt sys tel tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo".split())
PLAIN = str.maketrans({
    "’": "'", "‘": "`", "–": "--", "—": "--", "\xad": "", "€": " $ ", "£": " # ", "¢": " cents ",
    "¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "¹": " ¹ ", "²": " ² ", "³": " ³ "})
BRACKETS = str.maketrans(dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split())))
# A token is what the first rule that fits takes; what none takes, such as . , " or a single -, is
# dropped. Possessive ++ and *+ keep a rule from giving back half a word. (?=...) with a rule's
# sign asks whether the word has one at all, before many rules are tried on it.
TOKEN = re.compile(rf"""
    </?[A-Za-z][^<>]*>                                    # <unk>, <b>
  | https?://\S*\w/?                                      # addresses, but not the comma after them
  | [@\#][A-Za-z_]\w*                                     # @names, #tags
  | [:;=]-?[()\[\]DPp](?!\w)                              # faces
  | [cC]\+\+
  | [A-Z]++(?:&[A-Z]++)+                                  # AT&T, but at & t
  | (?i: can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)
       | 't(?=is\b|was\b) )                               # can not, gon na, 't is
  | (?=\w++[.!?@]) (?:                                    # a dot that ends no sentence:
        (?:{LETTER}\.)++(?!\w)(?:-{WORD})*                #   u.s.  p.m.  J.  u.s.-made
      | {LETTER}++(?:[.!?@]{LETTER}++)+(?:-{WORD})*       #   x.com, and a missing blank.So
      | (?i:{ABBREVIATIONS})\.
      | (?:Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash)\.    #   in small letters they are words
      | (?i:art|ca|figs?|nos?|op|pp)\.(?=\s*\d)           #   only before numbers
      | \w++\.(?=[,;:]) )                                 #   its whim: street., keeps the dot
  | (?=\w++(?:-\w++)*+') (?i:                             # an apostrophe inside a word:
        \w+(?=n't\b)                                      #   do n't
      | [jy]'(?=\w)                                       #   y' all
      | (?:\w++-)*[cdlno]'(?!(?:s|m|d|re|ve|ll)\b){LETTER}++(?:-{WORD})*    # o'clock, l'homme
      | {LETTER}++(?<=[aeiouy])'(?=[aeiou]){LETTER}++     #   ma'am, between vowels
      | (?:ol|dunkin|somethin)' | s'mores | li'l )
  | (?i: n't | '(?:s|m|d|re|ve|ll|em|till?|cause|n) )\b(?:(?<='n)')?       # dog 's, 'em, 'n'
  | (?<!\w)'\d\ds?\b                                      # '90s
  | (?<![-+.])[-+]?(?:\d+(?:[.,:]\d+)+|\.\d+)(?:-{WORD})* # 5.00  10:30  .5  2.5-inch
  | (?<![-+])[-+]\d+                                      # -3
  | {WORD}(?:[-‐/@]{WORD})*                               # words, and 3/4, x-ray, and/or
  | [*\#]+ | [!?]{{2,}} | -{{5,}}                         # runs
  | [()\[\]{{}}] | [$%&+/<=>@\\^_|~¡-ª¬-º¼-¿×÷†-‣‰-‸ℂ-⯿、。！-･]
""", re.X)


@functools.lru_cache(1 << 17)                # a reference meets many candidates
def tokenize(caption):
    """A caption as the field's scorers see it: a tuple of lower-case tokens, no punctuation."""
    if "&" in caption:
        caption = unescape(caption, {"&quot;": '"'})
    if not caption.isascii():
        caption = caption.translate(PLAIN)
    tokens = [token.lower() for token in TOKEN.findall(caption)]
    return tuple([t if t.isalnum() else t.translate(BRACKETS) for t in tokens])


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
    """BLEU-1 to -4 (Papineni et al. 2002), pycocoevalcap's guards: counts (..., 10) -> (..., 4)."""
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
        given.write_text(json.dumps(rows), encoding="utf-8")
        # no -cache: its database reflects into the JDK and has no library for ARM
        command = [java, "-jar", "-Xmx8G", jar, given, "-out", made, "-subset", "-silent"]
        run = subprocess.run(command, cwd=jar.parent, capture_output=True, text=True)
        if run.returncode or not made.is_file():
            last = run.stderr.strip().rpartition("\n")[2][:200]
            raise Unavailable(f"the jar failed with exit code {run.returncode} ({last}); it wants "
                              "8 GB of memory, and CoreNLP 3.6.0 (404 MB) by python -m "
                              "pycocoevalcap.spice.get_stanford_models")
        found = json.loads(made.read_text(encoding="utf-8"))
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
    sizes = {vector.shape for vector in known.values() if vector is not None}
    if new:
        try:
            with open(path, encoding="utf-8") as lines:
                for line in lines:
                    word, _, numbers = line.partition(" ")
                    if word in new and new[word] is None:           # the first of two is meant
                        vector = np.array(numbers.split(), np.float64)
                        new[word] = vector / np.linalg.norm(vector)
                        sizes.add(vector.shape)
                        if not np.isfinite(new[word]).all() or len(sizes) > 1:
                            raise ValueError(f"of {word!r} it has other numbers")
        except (OSError, ValueError) as e:
            raise ValueError(f"{path} is not a GloVe text file ({e}); --glove takes one such as "
                             "glove.6B.200d.txt") from e
        known.update(new)
        if not any(vector is not None for vector in known.values()):
            raise ValueError(f"{path} has a vector of none of {len(known)} words: is it GloVe's, "
                             "and of this language?")
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


def movers(glove, a, b):
    """Minus the word mover's distance of captions a[i] and b[i], stop words removed: (n,)."""
    tokens = {}
    for caption in {*a, *b}:
        tokens[caption] = [word for word in tokenize(caption) if word not in STOP]
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
    return max(0.0, float(apart @ apart + spread - 2 * nuclear))        # of x and x, -1e-12


def inception_score(logits):
    """Inception score (Salimans et al. 2016) of logits (N, C), of all at once: in [1, C]."""
    logp = log_softmax(np.asarray(logits, np.float64), 1)
    p = np.exp(logp)
    divergence = p * (logp - np.log(p.mean(0)))                 # of each picture from the mean
    return math.exp(divergence.sum(1).mean())


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


def paired(a, b, statistic=np.mean, draws=1000, seed=0):
    """Two systems on the same items: {"items", "a", "b", "difference" (b - a), "interval", "p"}.

    a, b: values (N, ...) of each item; statistic: one number of any of their rows, the mean or a
    corpus score such as `lambda counts: bleu(counts.sum(0))[3]`. Items of which either has nan are
    left out. interval: 95 %, by bootstrap over items; p: two-sided, by approximate randomization
    (Noreen 1989): the share of draws in which, each item's values changing sides by a coin, the
    difference is as large.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    whole = np.isfinite(a + b).reshape(len(a), -1).all(1)
    a, b = a[whole], b[whole]
    if not len(a):
        return None
    difference = statistic(b) - statistic(a)
    dice = np.random.default_rng(seed)
    resampled_by, swapped_by = [], []
    for _ in range(draws):
        rows = dice.integers(len(a), size=len(a))
        resampled_by.append(statistic(b[rows]) - statistic(a[rows]))
        changed = dice.random((len(a),) + (1,) * (a.ndim - 1)) < .5
        one, other = np.where(changed, b, a), np.where(changed, a, b)
        swapped_by.append(statistic(other) - statistic(one))
    as_large = np.abs(swapped_by) >= abs(difference) * (1 - 1e-9)      # equal sums may round apart
    low, high = np.quantile(resampled_by, (.025, .975)).tolist()
    return {
        "items": len(a),
        "a": float(statistic(a)),
        "b": float(statistic(b)),
        "difference": float(difference),
        "interval": (low, high),
        "p": float(1 + as_large.sum()) / (1 + draws),
    }


def choices(quality, ranking):
    """What ranking candidates by a score is worth (Tables 1, 2; Figures 3, 4).

    quality, ranking: of each item those of its candidates (n,), of any number, higher = better;
    equal rankings keep the candidates' order. Returns mean (of a random candidate), chosen, oracle,
    gain (chosen - mean) with its 95 % interval over items, and by_rank (the most n,).
    """
    ranked, mean = [], []
    for values, scores in zip(quality, ranking):
        order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
        ranked.append(np.asarray(values, np.float64)[order])
        mean.append(np.mean(values))
    chosen = np.array([values[0] for values in ranked])
    gain = chosen - mean
    by_rank = np.array([*zip_longest(*ranked, fillvalue=np.nan)])
    return {
        "mean": np.mean(mean),
        "chosen": chosen.mean(),
        "oracle": np.mean([*map(max, ranked)]),
        "gain": gain.mean(),
        "interval": interval(gain),
        "by_rank": np.nanmean(by_rank, 1).tolist(),
        "items": len(ranked),
    }
