"""How alike two pictures or two captions are: CLIP, DINO, SBERT, Inception, pixels.

    judges, absent = load(["clip", "pixel"], "image", "miniature")
    judges["clip"].alike(pictures, image)        # (n,) cosines, higher = more alike
    judges["clip"].embed(pictures)               # (n, D) unit vectors
    judges["clip"].score(pictures, captions)     # (n,) cosines of picture and caption
    judges["clip"].clipscore(picture, caption, references)      # CLIPScore, RefCLIPScore

Images are float (B, 3, H, W) in [0, 1], captions lists of str. Pooling is that of the paper's
experiments. Copy this file with loading.py, metrics.py and records.py: it needs torch
and transformers.
"""
import contextlib
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import loading
import metrics
import records

HERE = Path(__file__).resolve().parent
HUB = {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dino-vitb8",
       "sbert": "sentence-transformers/all-MiniLM-L6-v2"}
MODELS = {"clip": "CLIPModel", "dino": "ViTModel", "sbert": "BertModel"}     # of transformers
PLACES = ("miniature", "hub", "cache", "none")
NAMES = {"image": ("clip", "dino", "pixel", "inception"), "text": ("clip", "sbert")}
REMEDY = "give --inception torch-fidelity's weights-inception-2015-12-05-6726825d.pth"


def load(names, kind, place="hub", device="cpu", inception=None):
    """({name: judge}, {name: why it is absent, and the remedy}) of the judges called `names`.

    kind: "image" or "text". place: "hub" (the paper's encoders), "cache" (those of them that were
    fetched before), "miniature", "none", or a folder that holds clip/, dino/, sbert/. inception: a
    file of its weights. Raises ValueError for an unknown name.
    """
    if place not in PLACES and not Path(place).is_dir():
        raise ValueError(f"--judges {place}: it is one of {', '.join(PLACES)}, or a folder")
    judges, absent = {}, {}
    for name in names:
        if name not in NAMES[kind]:
            raise ValueError(f"--likeness {name!r} is unknown for {kind}s: choose among "
                             f"{', '.join(NAMES[kind])}")
        try:
            if name == "pixel":
                judges[name] = Pixel()
            elif name == "inception":
                judges[name] = Inception(device, inception)
            else:
                judges[name] = encoder(name, kind, place, device)
        except (ValueError, OSError) as e:
            absent[name] = " ".join(str(e).split())
    return judges, absent


def encoder(name, kind, place, device):
    """The Encoder of a name, for images or text (CLIP for both). Raises ValueError."""
    if place == "none":
        raise ValueError("name --judges hub, miniature or a folder")
    folder = HERE / "miniature" if place == "miniature" else Path(place)
    where = HUB[name] if place in ("hub", "cache") else str(folder / name)
    if where != HUB[name] and not Path(where).is_dir():
        raise ValueError(f"there is no folder {where}")        # nor is it taken for a hub id
    found, options = loading.resolve(where, {}, "judge", cached=place == "cache")
    with loading.readable_errors(where, "judge"):
        encoder = Encoder(name, found, "both" if name == "clip" else kind, device, options)
        loading.check_finite(encoder.model)
        return encoder


def default_place(captioner, generator):
    """Where judges come from beside these two: the miniature beside its captioner; the hub beside
    a model from there; else, as two local models never reach for the network, the hub's cache."""
    if captioner == "miniature":
        return "miniature"
    local = loading.is_local(captioner) and loading.is_local(generator)
    return "cache" if local else "hub"


def likenesses(names, asked, by, kind, place, device, references, glove):
    """({name: f(candidates, inputs) -> (n,)}, CLIP's judge or None). What is absent is refused if
    --likeness asked for it, or --by; of the others there is a line."""
    ours = [name for name in names if kind == "text" and name in ("cider", "wmd")]
    found, absent = load([name for name in names if name not in ours], kind, place, device)
    likeness = {name: judge.alike for name, judge in found.items()}
    if "cider" in ours and len(references) > 1:
        df = metrics.document_frequency(references)
        likeness["cider"] = lambda said, texts: metrics.cider(said, [[text] for text in texts], df)
    elif "cider" in ours:
        absent["cider"] = "it needs the document frequency of a set of references; give --data"
    if glove and not Path(glove).is_file():
        raise ValueError(f"--glove {glove}: no such file")
    if "wmd" in ours and glove:
        likeness["wmd"] = lambda said, texts: metrics.movers(glove, said, texts)
    elif "wmd" in ours:
        absent["wmd"] = "it needs word vectors; give --glove glove.6B.200d.txt"
    for name, reason in absent.items():
        if name == by or name in (asked or ()):
            flag = "--by" if name == by else "--likeness"
            raise ValueError(f"{flag} {name}: {reason}")
        records.say(f"no likeness {name}: {reason}")
    return {name: likeness[name] for name in names if name in likeness}, found.get("clip")


class Encoder:
    """CLIP, DINO or SBERT of transformers; embeddings are unit vectors in float64."""

    def __init__(self, name, place, kind, device="cpu", options=None):
        """place: directory; kind: "image", "text" or "both"; options: of from_pretrained."""
        import transformers
        options = options or {"use_safetensors": True, "trust_remote_code": False}
        plain = {k: v for k, v in options.items() if k != "use_safetensors"}
        self.name = name
        if name != "clip":
            options = options | {"add_pooling_layer": False}
        model = getattr(transformers, MODELS[name]).from_pretrained(place, **options)
        self.model = model.float().eval().requires_grad_(False).to(device or "cpu")
        self.kind = kind
        if kind != "image":
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(place, **plain)
        if kind != "text":
            self.processor = transformers.AutoImageProcessor.from_pretrained(place, **plain)
            if name == "dino" and self.processor.size.height >= 224:
                # the paper's size; a checkpoint trained on less keeps its own
                plain["size"] = {"height": 384, "width": 384}
                self.processor = transformers.AutoImageProcessor.from_pretrained(place, **plain)

    def pixels(self, images):
        """Images resized, cut and normalised by the library's processor: (B, 3, S, S).

        What has the right size already keeps its values between the 8 bits of a resize.
        """
        size = self.processor.size
        goal = (size.shortest_edge, size.shortest_edge)
        if size.height:
            goal = (size.height, size.width)
        resize = self.processor.do_resize and goal != tuple(images.shape[-2:])
        arrays = images.float().cpu()
        if resize:
            arrays = (arrays.clamp(0, 1) * 255).round().byte()
        out = self.processor(list(arrays.numpy()), do_resize=resize, do_rescale=resize,
                             input_data_format="channels_first", return_tensors="pt")
        return out["pixel_values"].to(self.model.device)

    def tokens(self, texts):
        most = 256
        if self.name == "clip":
            most = self.model.config.text_config.max_position_embeddings
        most = min(most, self.tokenizer.model_max_length)
        out = self.tokenizer(list(texts), padding=True, truncation=True, max_length=most,
                             return_tensors="pt")
        return {k: out[k].to(self.model.device) for k in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def pooled(self, x):
        """The pooled state of B images or captions: (B, D). CLIP: that before the projection; DINO:
        its CLS; SBERT: the mean of its tokens."""
        if isinstance(x, torch.Tensor):
            if self.name == "clip":
                return self.model.vision_model(self.pixels(x)).pooler_output
            out = self.model(self.pixels(x), interpolate_pos_encoding=True)
            return out.last_hidden_state[:, 0]
        tokens = self.tokens(x)
        if self.name == "clip":
            return self.model.text_model(**tokens).pooler_output
        hidden = self.model(**tokens).last_hidden_state                    # (B, L, D)
        mask = tokens["attention_mask"][..., None]                         # (B, L, 1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def embed(self, x):
        """Images (B, 3, H, W), or B captions -> unit vectors (B, D) float64, on the CPU."""
        return F.normalize(self.pooled(x).cpu().double(), dim=-1)

    def project(self, x):
        """As `embed`, through CLIP's projections, into the space that images and captions share."""
        model = self.model
        into = model.visual_projection if isinstance(x, torch.Tensor) else model.text_projection
        return F.normalize(into(self.pooled(x)).cpu().double(), dim=-1)

    def alike(self, candidates, inputs):
        """Cosine of n candidates with n inputs, or with one: (n,)."""
        return (self.embed(candidates) * self.embed(inputs)).sum(-1).numpy()

    def score(self, images, captions):
        """Cosine of images and captions in the space they share, in [-1, 1]: (n,). What is named
        CLIPScore has other words before the caption, and no values below 0: `clipscore`."""
        return (self.project(images) * self.project(captions)).sum(-1).numpy()

    def clipscore(self, image, caption, references):
        """(CLIPScore, RefCLIPScore) of one image (1, 3, H, W), its caption, references (Hessel et
        al. 2021): 2.5 max(cos, 0) of image and caption; its harmonic mean with max(cos, 0) of the
        caption and the nearest reference."""
        vision = self.project(image)[0]                                    # (D,)
        texts = self.project([f"A photo depicts {text}" for text in (caption, *references)])
        seen = 2.5 * max(float(vision @ texts[0]), 0.0)
        heard = max(float((texts[1:] @ texts[0]).max()), 0.0)
        both = 2 * seen * heard / (seen + heard) if seen + heard else 0.0
        return seen, both


class Pixel:
    """Minus the root mean square difference of pixels, 0 = equal."""

    def alike(self, candidates, inputs):
        """Inputs are resized to the candidates' size: (n,)."""
        size = candidates.shape[-2:]
        if inputs.shape[-2:] != size:
            inputs = F.interpolate(inputs, size, mode="bicubic", antialias=True).clamp(0, 1)
        difference = (candidates - inputs).cpu().double()
        return -difference.square().mean((1, 2, 3)).sqrt().numpy()


# ---------------------------------------------------------------- Inception
class Inception(Encoder):
    """Cosine of the 2048 features of torch-fidelity's Inception v3, those of FID. (The paper's
    "FID" of one image can only be such a distance: one image has no covariance.)"""

    def __init__(self, device="cpu", weights=None):
        self.see = inception_features(device, weights)

    def pooled(self, images):
        return torch.from_numpy(self.see(images)[0])


def inception_features(device=None, weights=None):
    """A function: images (B, 3, H, W) -> features (B, 2048), logits (B, 1008) of the Inception v3
    of FID and IS, by torch-fidelity. weights: a local copy of its weights. Raises ValueError.

    torch-fidelity unpickles whatever it is given, code and all. So what it is given is a file of
    our own, into which the tensors of `inception_weights` were written.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as theirs
    except (ImportError, RuntimeError) as e:     # torchvision's own operators, too
        raise ValueError(f"torch-fidelity can't be imported ({str(e)[:100]}): pip install "
                         "torch-fidelity, and a torchvision that fits this torch") from e
    tensors = inception_weights(weights or theirs.URL_INCEPTION_V3)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ours = str(Path(folder) / "inception.pth")
            torch.save(tensors, ours)
            extractor = theirs.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"],
                feature_extractor_weights_path=ours)
    except Exception as e:                       # of no common class
        reason = " ".join(str(e).split())[:100]
        raise ValueError(f"{weights or 'what was downloaded'} is not torch-fidelity's Inception "
                         f"({reason}): {REMEDY}") from e
    extractor = extractor.to(device or "cpu").eval()

    @torch.no_grad()
    def see(images):
        eight_bit = (images.clamp(0, 1) * 255).round().byte()
        out = extractor(eight_bit.to(device or "cpu"))
        return [y.cpu().double().numpy() for y in out]
    return see


def inception_weights(source):
    """{name: tensor} of a file, or of an address, by readers that run no code: safetensors, or
    torch's restricted unpickler. Raises ValueError in one line."""
    try:
        if source.startswith("https://"):
            with contextlib.redirect_stdout(sys.stderr):
                found = torch.hub.load_state_dict_from_url(source, map_location="cpu",
                                                           weights_only=True)
        elif source.endswith(".safetensors"):
            found = load_file(source)
        else:
            found = torch.load(source, map_location="cpu", weights_only=True)
        if not found or not all(isinstance(x, torch.Tensor) for x in found.values()):
            raise ValueError("not tensors by name alone")
        return found
    except Exception as e:                       # of foreign bytes a reader may raise anything
        reason = getattr(e, "strerror", None) or type(e).__name__
        raise ValueError(f"{source} could not be read as plain tensors ({reason}): "
                         f"{REMEDY}") from e
