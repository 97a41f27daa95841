"""Scores against pycocoevalcap's and gensim's golden ones, encoders against the library's processors and poolings."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics

HERE = Path(__file__).parent


def golden(shared, name):
    return json.loads((shared / "data/golden" / name).read_text())


# ---------------------------------------------------------------- words
def test_tokenizer_edge_cases(shared):
    cases = golden(shared, "tokenizer_edge_cases.json")
    assert sum(" ".join(metrics.tokenize(c["caption"])) == c["ptb"] for c in cases) >= 46


@pytest.mark.parametrize("name", ["coco500", "fakecap251"])
def test_tokenizer_on_real_captions(shared, name):
    pairs = [(a, b) for x, y in zip(golden(shared, f"{name}_input.json"), golden(shared, f"{name}_ptb_tokens.json"))
             for a, b in zip([x["candidate"], *x["references"]], [y["candidate"], *y["references"]])]
    assert sum(" ".join(metrics.tokenize(a)) != b for a, b in pairs) <= .001 * len(pairs)


def test_tokenizer_on_invented_captions():
    data = json.loads((HERE / "synthetic12.json").read_text())
    for x, y in zip(data["items"], data["ptb_tokens"]):
        assert [" ".join(metrics.tokenize(c)) for c in x["references"]] == y["references"]
    assert metrics.tokenize("a\u2028b\r\nc\x0bd") == ["a", "b", "c", "d"]


# ---------------------------------------------------------------- CIDEr, WMD
def test_cider_of_invented_captions():
    data = json.loads((HERE / "synthetic12.json").read_text())
    scores = metrics.cider([x["candidate"] for x in data["items"]], [x["references"] for x in data["items"]])
    assert scores.mean() == pytest.approx(data["corpus"]["CIDEr"], abs=1e-9)
    assert scores == pytest.approx(data["per_image"]["CIDEr"], abs=1e-9)


@pytest.mark.parametrize("name,value", [("coco500", .916986), ("fakecap251", .566958)])
def test_cider_is_pycocoevalcaps(shared, monkeypatch, name, value):
    raw, tokens = golden(shared, f"{name}_input.json"), golden(shared, f"{name}_ptb_tokens.json")
    whole = metrics.cider([x["candidate"] for x in raw], [x["references"] for x in raw])
    assert whole.mean() == pytest.approx(value, abs=5e-4)
    monkeypatch.setattr(metrics, "tokenize", str.split)         # the jar's tokens, taken as they are
    ours = metrics.cider([x["candidate"] for x in tokens], [x["references"] for x in tokens])
    assert ours == pytest.approx(golden(shared, f"{name}_scores.json")["per_image"]["CIDEr"], abs=1e-9)


def test_without_a_tokenizer_cider_is_another_number(shared, monkeypatch):
    raw = golden(shared, "coco500_input.json")
    monkeypatch.setattr(metrics, "tokenize", str.split)
    assert metrics.cider([x["candidate"] for x in raw], [x["references"] for x in raw]).mean() < .75


def test_cider_of_pairs_with_a_document_frequency(shared):
    references = json.loads((shared / "data/captions/coco_karpathy_test.json").read_text())
    df = metrics.document_frequency([row["caption"][1:] for row in references])         # caption 0 is the candidate
    pairs = golden(shared, "cider_df_single_reference.json")["pairs"]
    ours = metrics.cider([a for a, _, _ in pairs], [[b] for _, b, _ in pairs], df)
    close = np.abs(ours - [c for _, _, c in pairs]) < 1e-3      # the golden df is of the jar's tokens, ours of our own
    assert close.mean() > .95
    print(np.abs(ours - [c for _, _, c in pairs]).max())


def test_wmd_is_gensims(shared):
    data = golden(shared, "wmd_random_vectors.json")
    v = np.random.RandomState(0).standard_normal((len(data["vocab"]), 50)).astype(np.float32).astype(np.float64)
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
    likeness = metrics.likenesses(["wmd"], "text", glove=tmp_path / "glove.txt").pairs["wmd"]
    scores = likeness(["a dog"] * 2, ["the dog", "a car"])
    assert scores[0] == 0 and scores[1] == pytest.approx(-2)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="bad.txt"):
        metrics.word_vectors(tmp_path / "bad.txt", {"x"})


# ---------------------------------------------------------------- encoders
@pytest.fixture(scope="module")
def encoders():
    root = metrics.HERE / "miniature"
    return {name: metrics.Encoder(name, str(root / name), ("image", "text") if name == "clip" else (kind,))
            for name, kind in (("clip", "image"), ("dino", "image"), ("sbert", "text"))}


@pytest.mark.parametrize("shape", [(32, 32), (48, 80), (90, 31)])
@pytest.mark.parametrize("name", ["clip", "dino"])
def test_views_equal_the_processors(encoders, name, shape):
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(shape[::-1], Image.BICUBIC)
    processor = {"clip": CLIPImageProcessorPil, "dino": ViTImageProcessorPil}[name].from_pretrained(
        metrics.HERE / "miniature" / name)
    theirs = processor(picture, return_tensors="pt").pixel_values
    ours = encoders[name].pixels(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() * .5 < 3 / 255


def test_embeddings_are_the_papers_poolings(encoders, images):
    from transformers import BertModel, CLIPTextModel, CLIPVisionModel, ViTModel
    root = metrics.HERE / "miniature"
    texts = ["a small red ball", "a huge ring on the grass"]

    def same(ours, theirs):
        return torch.allclose(ours, torch.nn.functional.normalize(theirs.double(), dim=-1), atol=1e-5)
    with torch.no_grad():
        x = encoders["clip"].pixels(images)
        vision = CLIPVisionModel.from_pretrained(root / "clip", dtype=torch.float32).eval()(x).pooler_output
        assert same(encoders["clip"].images(images), vision)
        i = encoders["clip"].tokenizer(texts, padding=True, return_tensors="pt")
        assert same(encoders["clip"].texts(texts),
                    CLIPTextModel.from_pretrained(root / "clip", dtype=torch.float32).eval()(**i).pooler_output)
        d = ViTModel.from_pretrained(root / "dino", dtype=torch.float32, add_pooling_layer=False).eval()
        assert same(encoders["dino"].images(images), d(encoders["dino"].pixels(images)).last_hidden_state[:, 0])
        s = BertModel.from_pretrained(root / "sbert", dtype=torch.float32, add_pooling_layer=False).eval()
        one = encoders["sbert"].tokenizer(texts[:1], return_tensors="pt").input_ids   # alone, so that nothing is padded
        assert same(encoders["sbert"].texts(texts)[:1], s(one).last_hidden_state.mean(1))


def test_judges_know_their_world(encoders, scenes, images):
    """A picture is most like itself, and its own caption scores above the others' on average."""
    import world
    for name in ("clip", "dino"):
        assert (encoders[name].alike("image", images, images) > 1 - 1e-6).all()
        assert encoders[name].alike("image", images, images.roll(1, 0)).max() < .999
    captions = [world.captions(s)[0] for s in scenes]
    own = encoders["clip"].score(images, captions)
    assert own.mean() > encoders["clip"].score(images, captions[1:] + captions[:1]).mean() + .2
    two = [world.captions(s)[1] for s in scenes]
    alike = encoders["sbert"].alike
    assert alike("text", captions, two).mean() > alike("text", captions, two[::-1]).mean()


def test_likeness_by_name(images):
    import world
    all_of = metrics.likenesses(["clip", "dino", "pixel"], "image", "miniature")
    assert list(all_of.pairs) == ["clip", "dino", "pixel"] and not all_of.absent and all_of.clipscore
    for f in all_of.pairs.values():
        s = f(images, images[:1])
        assert s.shape == (6,) and s.argmax() == 0
    references = [world.captions(world.sample("test", i)) for i in range(50)]
    text = metrics.likenesses(["clip", "sbert", "cider", "wmd"], "text", "miniature", references=references)
    assert list(text.pairs) == ["clip", "sbert", "cider"] and "--glove" in text.absent["wmd"]
    for f in text.pairs.values():
        assert np.argmax(f(["a red ball", "a huge blue ring at night"], ["a huge blue ring at night"] * 2)) == 1


def test_inception_through_torch_fidelity(monkeypatch, images):
    """With a stand-in of its extractor: bytes go in, the cosine of the features comes out. Without it, a remedy."""
    import sys
    import types
    assert "pip install torch-fidelity" in metrics.likenesses(["inception"], "image").absent["inception"]

    class Extractor(torch.nn.Module):
        def __init__(self, name, features):
            super().__init__()
            assert features == ["2048"]

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.max() > 1
            return (x.float().mean((2, 3)),)                    # a picture's mean colour
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    likeness = metrics.likenesses(["inception"], "image").pairs["inception"]
    mean = (images * 255).round().mean((2, 3)).double()
    expected = torch.cosine_similarity(mean, mean[:1])
    assert np.allclose(likeness(images, images[:1]), expected, atol=1e-5)


def test_what_is_absent_costs_a_line(tmp_path):
    out = metrics.likenesses(["clip", "dino", "pixel"], "image", str(tmp_path))
    assert list(out.pairs) == ["pixel"] and set(out.absent) == {"clip", "dino"}
    assert str(tmp_path) in out.absent["clip"] and "\n" not in out.absent["clip"]
    with pytest.raises(ValueError, match="'ssim'.*pixel"):
        metrics.likenesses(["ssim"], "image")


# ---------------------------------------------------------------- choices
def test_choices_by_hand():
    quality = [[1, 2, 3], [6, 5, 4]]
    c = metrics.choices(quality, [[0, 0, 9], [0, 7, 7]])
    assert (c["mean"], c["chosen"], c["oracle"], c["gain"]) == (3.5, 4, 4.5, .5)
    assert c["by_rank"] == [(3 + 5) / 2, (1 + 4) / 2, (2 + 6) / 2]       # equal scores keep the candidates' order
    assert c["interval"][0] == 0 and c["interval"][1] == 1               # gains 1 and 0


def test_the_interval_covers():
    """Of 200 normal samples of 60, about 95 % of the intervals hold the true mean."""
    rng = np.random.default_rng(0)
    hits = [low < 1 < high for low, high in (metrics.interval(rng.normal(1, 2, 60), 500) for _ in range(200))]
    assert .89 < np.mean(hits) < .99
