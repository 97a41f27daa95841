"""How alike two captions or two images are, and what choosing by it is worth.

    cider(candidates, references)                            # the field's CIDEr (CIDEr-D), per item; papers print x 100
    likeness = likenesses(["clip", "pixel"], "image", "miniature").pairs
    likeness["clip"](pictures, image)                # (n,) cosine of the encoder's embeddings, higher = more alike
    choices(quality, ranking)                                # mean, chosen, oracle, score by rank, with 95 % intervals
    bleu(bleu_counts(candidates, references).sum(0))         # corpus BLEU-1 to 4; other sums of rows: any subset's
    frechet(features, features), inception_score(logits), spice(candidates, references)

Captions are str, images float (B, 3, H, W) in [0, 1]. Pooling and distances are those of the paper's experiments.
Copy this file alone: it needs numpy and scipy, and for the encoders torch and transformers.
"""
import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
HUB = {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dino-vitb8",
       "sbert": "sentence-transformers/all-MiniLM-L6-v2"}
NAMES = {"image": ("clip", "dino", "pixel", "inception"), "text": ("clip", "sbert", "cider", "wmd")}

REMEDY = "give --inception torch-fidelity's weights-inception-2015-12-05-6726825d.pth"


# ---------------------------------------------------------------- words
# After the Penn Treebank tokenizer of CoreNLP, by which COCO captions are scored: clitics are split off, hyphens,
# slashes and inner dots are kept, sentence punctuation is dropped. The jar differs in fewer than one caption of 1000.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = {"''", "'", "`", "``", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}
SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me",
         "lemme": "lem me", "'tis": "'t is", "'twas": "'t was"}
TOKEN = re.compile(r"""
    https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | [@\#][a-z]\w*                       # addresses, @names, #tags
  | (?:[a-z]\.){2,} | (?:mr|mrs|ms|dr|st|vs|etc|no|jr|sr|prof|ave|ft|inc|co)\.(?=\s|$|\w)  # u.s.  p.m.  mr.
  | \d+(?:[.,:/-]\d+)*(?:[a-z]\w*)?(?:-\w+)*  | \.\d+                                 # 5.00  10:30  3/4  1st  12-inch
  | (?:can)(?=not\b) | o'clock\b| n't\b | '(?:s|m|d|re|ve|ll)\b | '(?:em|bout|n|tis|twas)\b'?
  | [do]'[a-z]+(?!') | y'(?=all)
  | [^\W_]+?(?=n't\b) | \w+(?:[-/.&]\w+)*                                              # x-ray  a/b  at&t
  | \.\.\. | [$%&@#<>=+*\\] | [()\[\]{}]
""", re.X)


def tokenize(caption):
    """A caption as the field's scorers see it: lower-case tokens without sentence punctuation."""
    text = " ".join(caption.lower().translate(str.maketrans("’‘“”–—", "''\"\"--")).split())
    tokens = []
    for match in TOKEN.findall(text):
        tokens += SPLIT.get(match, match).split()
    return [BRACKETS.get(t, t) for t in tokens if t and t not in DROPPED]


# ---------------------------------------------------------------- captions against captions
class Grams(NamedTuple):
    counts: object                               # sparse (N, G): how often caption i has n-gram j
    order: np.ndarray                            # (G,) 0 for single words ... 3 for four
    names: list                                  # G tuples of words


@functools.lru_cache(4)
def grams(captions, longest=4):
    """The n-grams of a tuple of N captions, up to four words: Grams. Kept, so that CIDEr and BLEU count once."""
    from scipy.sparse import csr_array
    known, columns, ends = {}, [], [0]
    for caption in captions:
        words = tokenize(caption)
        for n in range(longest):
            columns += [known.setdefault(g, len(known)) for g in zip(*(words[i:] for i in range(n + 1)))]
        ends.append(len(columns))
    counts = csr_array((np.ones(len(columns)), columns, ends), shape=(len(captions), len(known)))
    counts.sum_duplicates()
    return Grams(counts, np.array([len(g) - 1 for g in known], np.int64), list(known))


def by_order(matrix, order):
    """Sums of a sparse (N, G) over the n-grams of each length: (N, 4)."""
    m = matrix.tocoo()
    return np.bincount(m.row * 4 + order[m.col], m.data, 4 * m.shape[0]).reshape(-1, 4).astype(np.float64)


def owners(references):
    """References in a row, and the sparse (N, R) that says whose they are."""
    from scipy.sparse import csr_array
    flat = [c for captions in references for c in captions]
    ends = np.cumsum([0, *map(len, references)])
    return flat, csr_array((np.ones(len(flat)), np.arange(len(flat)), ends), shape=(len(references), len(flat)))


def document_frequency(references):
    """(df, n): in how many of n images' references each n-gram occurs. references: n lists of captions."""
    flat, whose = owners(references)
    g = grams(tuple(flat))
    return dict(zip(g.names, ((whose @ g.counts) > 0).sum(0).tolist())), len(references)


def cider(candidates, references, df=None):
    """CIDEr-D without stemming, which the field reports as CIDEr (Vedantam et al. 2015), of each item: (N,) float64.

    candidates: N captions; references: N lists of captions. df: what document_frequency gives, of a reference set;
    without it that of `references` itself, as corpus scores have it (one image alone then scores 0). Papers print
    100 x the mean.
    """
    flat, whose = owners(references)
    g, n = grams((*candidates, *flat)), len(candidates)
    if df is None:
        seen, images = np.asarray(((whose @ g.counts[n:]) > 0).sum(0)), n
    else:
        seen, images = np.array([df[0].get(x, 0) for x in g.names]), df[1]
    weighted = g.counts.copy()                                                            # tf-idf
    weighted.data *= (math.log(max(images, 1)) - np.log(np.maximum(seen, 1)))[weighted.indices]
    norm, length = by_order(weighted.power(2), g.order) ** .5, by_order(g.counts, g.order)[:, 1]
    item = np.repeat(np.arange(n), np.diff(whose.indptr))                                 # of each reference
    said, heard = weighted[item], weighted[n:]
    dots, norms = by_order(said.minimum(heard).multiply(heard), g.order), norm[item] * norm[n:]       # (R, 4)
    closeness = np.exp(-(length[item] - length[n:]) ** 2 / 72)                            # Gaussian, sigma 6
    pairs = 10 * closeness * np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).mean(1)
    return np.bincount(item, pairs, n) / np.maximum(1, np.diff(whose.indptr))


def bleu_counts(candidates, references):
    """What corpus BLEU adds up, of each item: (N, 10) of 4 x clipped matches, 4 x n-grams, length, reference length
    (the closest one). Sum over any subset, or over a bootstrap draw, and give it to `bleu`. Each item needs a reference
    or more."""
    flat, whose = owners(references)
    g, n = grams((*candidates, *flat)), len(candidates)
    said, heard, most = g.counts[:n], g.counts[n:], None
    totals = by_order(g.counts, g.order)
    for k in range(max(map(len, references))):                     # the most often a reference has each n-gram
        rows = np.minimum(whose.indptr[:-1] + k, np.maximum(whose.indptr[1:] - 1, whose.indptr[:-1]))
        most = heard[rows] if most is None else most.maximum(heard[rows])
    lengths = [totals[n:, 0][i:j] for i, j in zip(whose.indptr, whose.indptr[1:])]
    closest = [min(x, key=lambda y, c=c: (abs(y - c), y)) for x, c in zip(lengths, totals[:n, 0])]
    return np.column_stack([by_order(said.minimum(most), g.order), totals[:n], totals[:n, 0], closest])


def bleu(counts):
    """BLEU-1, -2, -3, -4 (Papineni et al. 2002) of counts (..., 10), with pycocoevalcap's guards: (..., 4)."""
    match, total, length, reference = counts[..., :4], counts[..., 4:8], counts[..., 8:9], counts[..., 9:]
    precision = (match + 1e-15) / (total + 1e-9)
    ratio = (length + 1e-15) / (reference + 1e-9)
    brevity = np.exp(1 - 1 / np.minimum(ratio, 1))
    return np.exp(np.log(precision).cumsum(-1) / np.arange(1, 5)) * brevity


class Unavailable(Exception):
    """A metric that can't be had on this machine; its text says why, and the remedy."""


def spice(candidates, references):
    """SPICE (Anderson et al. 2016) of each item by its authors' jar: (N,) float64, nan where it gave none.

    Needs pycocoevalcap (the jar), its CoreNLP models, and Java 8 to 14: SPICE_JAVA names another java than the first
    on the path, SPICE_JAR another jar. Raises Unavailable with the remedy.
    """
    import importlib.util
    java = os.environ.get("SPICE_JAVA", "java")
    try:
        said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Unavailable(f"{java} does not run: install Java 8, or name one by SPICE_JAVA") from e
    version = re.search(r'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    if not version or not 8 <= int(version[1]) <= 14:
        raise Unavailable(f"{java} is Java {version[1] if version else '(unknown)'}, and the jar needs 8 to 14 (from "
                          "15 on there is no Nashorn): name one by SPICE_JAVA")
    package = importlib.util.find_spec("pycocoevalcap")
    jar = Path(os.environ.get("SPICE_JAR") or (Path(package.origin).parent / "spice/spice-1.0.jar" if package else ""))
    if not jar.is_file():
        raise Unavailable("its jar is not here: pip install pycocoevalcap, or name it by SPICE_JAR")
    if len(list((jar.parent / "lib").glob("stanford-corenlp-3.6.0*.jar"))) < 2:
        raise Unavailable(f"CoreNLP 3.6.0 is not in {jar.parent / 'lib'}: python -m "
                          "pycocoevalcap.spice.get_stanford_models (404 MB)")
    rows = [{"image_id": i, "test": " ".join(tokenize(c)), "refs": [" ".join(tokenize(r)) for r in refs]}
            for i, (c, refs) in enumerate(zip(candidates, references))]
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "in.json"), Path(folder, "out.json")
        given.write_text(json.dumps(rows))
        # no -cache: its database reflects into the JDK and has no library for ARM
        run = subprocess.run([java, "-jar", "-Xmx8G", str(jar), str(given), "-out", str(made), "-subset", "-silent"],
                             cwd=jar.parent, capture_output=True, text=True)
        if run.returncode or not made.is_file():
            last = (run.stderr.strip().splitlines() or ["no message"])[-1][:200]
            raise Unavailable(f"the jar failed with exit code {run.returncode} ({last}); it wants 8 GB of memory")
        found = {x["image_id"]: x["scores"]["All"]["f"] for x in json.loads(made.read_text())}
    return np.array([float(found.get(i, math.nan)) for i in range(len(rows))])


STOP = frozenset(
    "a an the of on in at to and or is are was were be been being with by for from as it its this that these those "
    "there here he she they his her their them i we you my your our up down out into over under some".split())


def word_vectors(path, words):
    """The vectors of `words` in a GloVe text file, as {word: unit vector}. Raises ValueError where the file is none."""
    found = {}
    try:
        where = lines_of(path)
        with open(path, "rb") as f:
            for word in words & where.keys():
                f.seek(where[word])
                v = np.array(f.readline().split()[1:], np.float64)
                found[word] = v / np.linalg.norm(v)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is not a GloVe text file ({e}); --glove takes one such as glove.6B.200d.txt") from e
    return found


@functools.cache
def lines_of(path):
    """{word: where its line begins} of a GloVe text file, read once."""
    where, at = {}, 0
    with open(path, "rb") as f:
        for line in f:
            where.setdefault(line.partition(b" ")[0].decode(), at)
            at += len(line)
    return where


def wmd(a, b, vectors):
    """Word mover's distance (Kusner et al. 2015) of two token lists, exact: the assignment of tokens repeated to the
    least common multiple. Words without a vector are dropped; nan where none is left. vectors: {word: unit vector}."""
    from scipy.optimize import linear_sum_assignment
    a, b = ([t for t in tokens if t in vectors] for tokens in (a, b))
    if not a or not b:
        return math.nan
    cost = np.linalg.norm(np.stack([vectors[t] for t in a])[:, None] - np.stack([vectors[t] for t in b])[None], axis=2)
    both = math.lcm(len(a), len(b))
    cost = cost.repeat(both // len(a), 0).repeat(both // len(b), 1)
    return float(cost[linear_sum_assignment(cost)].mean())


# ---------------------------------------------------------------- likeness by name
@dataclass
class Likenesses:
    """pairs[name](candidates, inputs) -> (n,) float64, higher = more alike; absent[name]: why not, and the remedy.
    clipscore(pictures, captions) -> (n,) is the baseline without a cycle, where there is a CLIP."""
    pairs: dict = field(default_factory=dict)
    absent: dict = field(default_factory=dict)
    clipscore: object = None


def likenesses(names, kind, judges="hub", device="cpu", references=(), glove=None, resolve=None):
    """The likenesses called `names` of images or of text. What can't be had here is in `absent`, the rest works.

    kind: "image" (clip, dino, pixel, inception) or "text" (clip, sbert, cider, wmd). judges: "hub" (the paper's
    encoders), "cache" (those of them that were fetched before), "miniature", or a folder that holds clip/, dino/,
    sbert/. references: lists of captions, whose document frequency weighs cider. resolve: (name, table, kind, cached)
    -> (place, options of from_pretrained), as cycle.resolve; without it the libraries fetch by themselves.
    Raises ValueError for an unknown name.
    """
    out = Likenesses()
    root = HERE / "miniature" if judges == "miniature" else Path(judges)
    for name in names:
        if name not in NAMES[kind]:
            raise ValueError(f"--likeness {name!r} is unknown for {kind}s: choose among {', '.join(NAMES[kind])}")
        try:
            if name == "pixel":
                out.pairs[name] = pixel
            elif name == "cider":
                if len(references) < 2:
                    raise Unavailable("it needs the document frequency of a set of references; give --data")
                df = document_frequency(references)
                out.pairs[name] = lambda a, b, df=df: cider(a, [[x] for x in b], df)
            elif name == "wmd":
                if not glove:
                    raise Unavailable("it needs word vectors; give --glove glove.6B.200d.txt")
                out.pairs[name] = functools.partial(movers, glove)
            elif name == "inception":
                out.pairs[name] = inception(device)
            else:
                place, options = HUB[name] if judges in ("hub", "cache") else str(root / name), None
                if resolve:
                    place, options = resolve(place, {}, "judge", judges == "cache")
                made = Encoder(name, place, ("image", "text") if name == "clip" else (kind,), device, options)
                out.pairs[name] = functools.partial(made.alike, kind)
                out.clipscore = made.score if name == "clip" else out.clipscore
        except Unavailable as e:
            out.absent[name] = str(e)
        except Exception as e:                                   # of the libraries: of no common class
            reason = " ".join(str(e).split())[:300]
            out.absent[name] = f"{reason}; --judges takes a folder with {name}/"
            if "torchvision" in reason:
                out.absent[name] = "torchvision does not fit this torch: uninstall it, nothing here needs it"
    return out


def pixel(a, b):
    """Minus the root mean square difference of pixels, b resized to a's size: (n,), 0 = equal."""
    import torch.nn.functional as F
    if b.shape[-2:] != a.shape[-2:]:
        b = F.interpolate(b, a.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
    return -(a - b).cpu().double().square().mean((1, 2, 3)).sqrt().numpy()


def inception(device):
    """Cosine of the 2048 features of torch-fidelity's Inception v3, those of FID. (The paper's per-image "FID" can only
    be such a distance: one image has no covariance.)"""
    see = fidelity(device)

    def features(x):
        f = see(x)[0]
        return f / np.linalg.norm(f, axis=1, keepdims=True)
    return lambda a, b: (features(a) * features(b)).sum(-1)


def fidelity(device=None, weights=None):
    """A function: images (B, 3, H, W) -> features (B, 2048), logits (B, 1008) of the Inception v3
    of FID and IS, by torch-fidelity. weights: a local copy of its weights. Raises Unavailable.

    torch-fidelity unpickles whatever it is given, code and all. So what it is given is a file of
    our own, into which the tensors of `inception_weights` were written.
    """
    import torch
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as theirs
    except ImportError as e:
        raise Unavailable(f"{e.name} is not installed: pip install torch-fidelity") from e
    tensors = inception_weights(weights or theirs.URL_INCEPTION_V3)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ours = str(Path(folder) / "inception.pth")
            torch.save(tensors, ours)
            extractor = theirs.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"],
                feature_extractor_weights_path=ours)
    except (OSError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:100]
        raise Unavailable(f"{weights or 'what was downloaded'} is not torch-fidelity's Inception "
                          f"({reason}): {REMEDY}") from e
    extractor = extractor.to(device or "cpu").eval()

    def see(x):
        with torch.no_grad():
            out = extractor((x.clamp(0, 1) * 255).round().byte().to(device or "cpu"))
        return [y.cpu().double().numpy() for y in out]
    return see


def inception_weights(source):
    """{name: tensor} of a file, or of an address, by readers that run no code: safetensors, or
    torch's restricted unpickler. Raises Unavailable in one line."""
    import torch
    from safetensors.torch import load_file
    source = str(source)
    try:
        if source.startswith("https://"):
            with contextlib.redirect_stdout(sys.stderr):
                found = torch.hub.load_state_dict_from_url(source, map_location="cpu",
                                                           weights_only=True)
        elif source.endswith(".safetensors"):
            found = load_file(source)
        else:
            found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as e:                       # of foreign bytes a reader may raise anything
        reason = e.strerror if isinstance(e, OSError) and e.strerror else type(e).__name__
        raise Unavailable(f"{source} could not be read as plain tensors ({reason}): "
                          f"{REMEDY}") from e
    plain = isinstance(found, dict) and all(isinstance(x, torch.Tensor) for x in found.values())
    if not plain or not found:
        raise Unavailable(f"{source} holds other things than tensors by name: {REMEDY}")
    return found


def movers(glove, a, b):
    """Minus the word mover's distance of captions, stop words removed: (n,)."""
    rows = [[[t for t in tokenize(c) if t not in STOP] for c in side] for side in (a, b)]
    vectors = word_vectors(glove, {t for side in rows for tokens in side for t in tokens})
    return np.array([-wmd(x, y, vectors) for x, y in zip(*rows)])


class Encoder:
    """CLIP, DINO or SBERT of transformers, pooled as the paper's experiments have it; embeddings are unit vectors."""

    def __init__(self, name, place, towers, device="cpu", options=None):
        """name: clip, dino, sbert; place: directory or hub id; towers: what to encode, "image", "text" or both;
        options: of from_pretrained."""
        import transformers
        from transformers.utils import logging
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        options = options or {"use_safetensors": True, "trust_remote_code": False}
        own = {k: v for k, v in options.items() if k != "use_safetensors"}
        kind = {"clip": transformers.CLIPModel, "dino": transformers.ViTModel, "sbert": transformers.BertModel}[name]
        extra = {} if name == "clip" else {"add_pooling_layer": False}
        model = kind.from_pretrained(place, **options, **extra)
        self.name, self.model = name, model.float().eval().requires_grad_(False).to(device or "cpu")
        if "text" in towers:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(place, **own)
        if "image" in towers:
            self.processor = transformers.AutoImageProcessor.from_pretrained(place, **own)
            if name == "dino" and self.processor.size.height >= 224:        # the paper's; less is the miniature's
                own["size"] = {"height": 384, "width": 384}
                self.processor = transformers.AutoImageProcessor.from_pretrained(place, **own)

    def pixels(self, images):
        """Images resized, cut and normalised by the library's processor: (B, 3, S, S). What has the right size already
        keeps its values between the 8 bits of a resize."""
        size = self.processor.size
        goal = (size.height, size.width) if size.height else (size.shortest_edge,) * 2
        out = self.processor(list(images.float().cpu().numpy()), do_resize=goal != tuple(images.shape[-2:]),
                             do_rescale=False, input_data_format="channels_first", return_tensors="pt")
        return out["pixel_values"].to(self.model.device)

    def images(self, images):
        """Images (B, 3, H, W) -> unit vectors (B, D): CLIP's pooled vision state before the projection, DINO's CLS."""
        import torch
        import torch.nn.functional as F
        with torch.no_grad():
            if self.name == "clip":
                e = self.model.vision_model(self.pixels(images)).pooler_output
            else:
                e = self.model(self.pixels(images), interpolate_pos_encoding=True).last_hidden_state[:, 0]
        return F.normalize(e.cpu().double(), dim=-1)

    def texts(self, texts):
        """Captions -> unit vectors (B, D): CLIP's pooled text state before the projection, SBERT's masked mean."""
        import torch
        import torch.nn.functional as F
        i = self.tokens(texts)
        with torch.no_grad():
            if self.name == "clip":
                e = self.model.text_model(**i).pooler_output
            else:
                h, m = self.model(**i).last_hidden_state, i["attention_mask"][..., None]
                e = (h * m).sum(1) / m.sum(1)
        return F.normalize(e.cpu().double(), dim=-1)

    def tokens(self, texts):
        most = self.model.config.text_config.max_position_embeddings if self.name == "clip" else 256
        most = min(most, self.tokenizer.model_max_length)
        out = self.tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        return {k: v.to(self.model.device) for k, v in out.items() if k in ("input_ids", "attention_mask")}

    def alike(self, kind, a, b):
        """Cosine of n candidates with n inputs, or with one: (n,)."""
        encode = self.images if kind == "image" else self.texts
        return (encode(a) * encode(b)).sum(-1).numpy()

    def score(self, images, captions):
        """Cosine of image and caption after CLIP's projections (CLIPScore without its factor; Hessel et al. 2021)."""
        import torch
        import torch.nn.functional as F
        with torch.no_grad():
            a = self.model.visual_projection(self.model.vision_model(self.pixels(images)).pooler_output)
            b = self.model.text_projection(self.model.text_model(**self.tokens(captions)).pooler_output)
        return (F.normalize(a.cpu().double(), dim=-1) * F.normalize(b.cpu().double(), dim=-1)).sum(-1).numpy()


# ---------------------------------------------------------------- sets of pictures
def frechet(x, y):
    """Frechet distance of two sets of features (n, D), (m, D), the FID where they are Inception's: float.

    Without a matrix square root, and exact where n < D: with A, B the R factors of the centred features over
    sqrt(n - 1), it is |mean difference|^2 + |A|^2 + |B|^2 - 2 |A B^T|_* (nuclear norm). In float64.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a covariance needs two pictures or more a side, got {len(x)} and {len(y)}")
    a, b = (np.linalg.qr((f - f.mean(0)) / math.sqrt(len(f) - 1), mode="r") for f in (x, y))
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * nuclear)


def inception_score(logits, splits=1):
    """Inception score (Salimans et al. 2016) of logits (N, C), in order, over `splits` parts: (mean, deviation)."""
    z = np.asarray(logits, np.float64)
    logp = z - z.max(1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(1, keepdims=True))
    scores = []
    for i in range(splits):
        part = logp[i * len(z) // splits:(i + 1) * len(z) // splits]
        p = np.exp(part)
        scores.append(math.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


# ---------------------------------------------------------------- what choosing is worth
def interval(values, draws=2000, seed=0):
    """95 % bootstrap interval of the mean of (N,) values: (low, high)."""
    values = np.asarray(values, np.float64)
    rows = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return tuple(float(q) for q in np.quantile(values[rows].mean(1), (.025, .975)))


def resampled(statistic, items, draws=1000, seed=0):
    """95 % bootstrap interval of any corpus score: statistic(rows) of N resampled row numbers -> (low, high)."""
    dice = np.random.default_rng(seed)
    values = [statistic(dice.integers(items, size=items)) for _ in range(draws)]
    return tuple(float(q) for q in np.nanquantile(values, (.025, .975)))


def paired(statistic_a, statistic_b, items, draws=1000, seed=0):
    """Two systems on the same items: (b - a, its 95 % interval, share of draws in which b is not better)."""
    dice, whole = np.random.default_rng(seed), np.arange(items)
    rows = [dice.integers(items, size=items) for _ in range(draws)]
    gains = np.array([statistic_b(r) - statistic_a(r) for r in rows])
    low, high = np.nanquantile(gains, (.025, .975))
    return float(statistic_b(whole) - statistic_a(whole)), (float(low), float(high)), float((gains <= 0).mean())


def choices(quality, ranking):
    """What ranking N candidates by a score is worth (Tables 1, 2; Figures 3, 4).

    quality, ranking: (items, N), higher = better; equal rankings keep the candidates' order. Returns mean (of a random
    candidate), chosen, oracle, gain (chosen - mean) with its 95 % interval over items, and by_rank (N,).
    """
    quality, ranking = np.asarray(quality, np.float64), np.asarray(ranking, np.float64)
    order = np.argsort(-ranking, 1, kind="stable")
    ranked = np.take_along_axis(quality, order, 1)
    gain = ranked[:, 0] - quality.mean(1)
    return {"mean": quality.mean(), "chosen": ranked[:, 0].mean(), "oracle": quality.max(1).mean(), "gain": gain.mean(),
            "interval": interval(gain), "by_rank": ranked.mean(0).tolist(), "items": len(quality)}
