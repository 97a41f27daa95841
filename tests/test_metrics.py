"""Scores against pycocoevalcap's and gensim's golden ones, encoders against the library's processors and poolings."""
import json
import math
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import metrics

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def fresh():
    metrics.grams.cache_clear()
    yield
    metrics.grams.cache_clear()


def as_they_are(monkeypatch):
    metrics.grams.cache_clear()
    monkeypatch.setattr(metrics, "tokenize", str.split)


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
    as_they_are(monkeypatch)                                    # the jar's tokens
    ours = metrics.cider([x["candidate"] for x in tokens], [x["references"] for x in tokens])
    assert ours == pytest.approx(golden(shared, f"{name}_scores.json")["per_image"]["CIDEr"], abs=1e-9)


def test_without_a_tokenizer_cider_is_another_number(shared, monkeypatch):
    raw = golden(shared, "coco500_input.json")
    as_they_are(monkeypatch)
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


# ---------------------------------------------------------------- BLEU, SPICE, and sets of pictures
def test_bleu_of_invented_captions():
    data = json.loads((HERE / "synthetic12.json").read_text())
    counts = metrics.bleu_counts([x["candidate"] for x in data["items"]], [x["references"] for x in data["items"]])
    names = [f"Bleu_{n}" for n in range(1, 5)]
    assert metrics.bleu(counts.sum(0)) == pytest.approx([data["corpus"][k] for k in names], abs=1e-12)
    assert metrics.bleu(counts).T == pytest.approx(np.array([data["per_image"][k] for k in names]), abs=1e-12)


@pytest.mark.parametrize("name", ["coco500", "fakecap251"])
def test_bleu_is_pycocoevalcaps(shared, monkeypatch, name):
    raw, tokens, scores = (golden(shared, f"{name}_{k}.json") for k in ("input", "ptb_tokens", "scores"))
    want = [scores["corpus"][f"Bleu_{n}"] for n in range(1, 5)]
    whole = metrics.bleu_counts([x["candidate"] for x in raw], [x["references"] for x in raw])
    assert metrics.bleu(whole.sum(0)) == pytest.approx(want, abs=5e-4)
    as_they_are(monkeypatch)
    ours = metrics.bleu_counts([x["candidate"] for x in tokens], [x["references"] for x in tokens])
    assert metrics.bleu(ours.sum(0)) == pytest.approx(want, abs=1e-12)


def test_bleu_by_hand():
    """Two of three words, one of two pairs; the reference is one word longer: exp(1 - 4 / 3)."""
    counts = metrics.bleu_counts(["a red dog"], [["a red cat sleeps"]])[0]
    assert counts.tolist() == [2, 1, 0, 0, 3, 2, 1, 0, 3, 4]
    assert metrics.bleu(counts)[:2] == pytest.approx([2 / 3 * math.exp(-1 / 3), (2 / 3 / 2) ** .5 * math.exp(-1 / 3)])
    assert np.isfinite(metrics.bleu(metrics.bleu_counts([""], [["a dog"]]))).all()


JAVA = """#!/bin/sh
if [ "$1" = "-version" ]; then echo 'openjdk version "VERSION"' >&2; exit 0; fi
[ CODE = 0 ] || { echo "OutOfMemoryError: heap" >&2; exit CODE; }
exec PYTHON -c '
import json, sys
rows = json.load(open(sys.argv[1]))
assert rows[0] == {"image_id": 0, "test": "a dog \\x27s ball", "refs": ["the ball"]}, rows
out = [{"image_id": r["image_id"], "scores": {"All": {"f": r["image_id"] / 10}}} for r in rows[:2]]
json.dump(out, open(sys.argv[2], "w"))' "$4" "$6"
"""


def stand_in(folder, version, jar=True, code=0):
    """An executable that answers as `java -version` and as the jar do: SPICE of an item = its number / 10."""
    java = folder / "java"
    java.write_text(JAVA.replace("VERSION", version).replace("CODE", str(code)).replace("PYTHON", sys.executable))
    java.chmod(0o755)
    (folder / "lib").mkdir(exist_ok=True)
    if jar:
        for name in ("spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"):
            (folder / name).touch()
    return str(java)


def test_spice_through_its_protocol(tmp_path, monkeypatch):
    said, heard = ["A dog's ball.", "two cats", "x"], [["The ball!"], ["a cat", "cats"], ["y"]]
    monkeypatch.setenv("SPICE_JAR", str(tmp_path / "spice-1.0.jar"))
    for version, jar, code, remedy in (("17.0.15", True, 0, "is Java 17.*8 to 14.*SPICE_JAVA"),
                                       ("11.0.2", True, 3, r"exit code 3 \(OutOfMemoryError: heap\)")):
        monkeypatch.setenv("SPICE_JAVA", stand_in(tmp_path, version, jar, code))
        with pytest.raises(metrics.Unavailable, match=remedy):
            metrics.spice(said, heard)
    monkeypatch.setenv("SPICE_JAVA", stand_in(tmp_path, "1.8.0_392"))
    scores = metrics.spice(said, heard)
    assert scores[:2].tolist() == [0, .1] and math.isnan(scores[2])         # the jar gave none for the third
    (tmp_path / "lib/stanford-corenlp-3.6.0-models.jar").unlink()
    with pytest.raises(metrics.Unavailable, match="get_stanford_models"):
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
        x, w = g.standard_normal((case["n"], case["d"])), g.standard_normal((case["d"], case["d"])) / case["d"] ** .5
        y = g.standard_normal((case["m"], case["d"])) @ w + .1
        if name == "very_rank_deficient":
            x, y = x.clip(0), y.clip(0)
        y = x if name == "same_rank_deficient" else y
        assert metrics.frechet(x, y) == pytest.approx(case["fid"]["nuclear norm (own)"], abs=1e-9)


def test_frechet_in_closed_form():
    """Diagonal covariances: the sum of squared differences of means and of deviations; of itself, 0."""
    u = np.stack(np.meshgrid([-1., 1.], [-1., 1.], [-1., 1.]), -1).reshape(-1, 3)        # uncorrelated, variance 8 / 7
    x, y = u * [1, 2, 3], u * [2, 2, 5] + [1, 0, -2]
    assert metrics.frechet(x, y) == pytest.approx(5 + 8 / 7 * (1 + 0 + 4)) and abs(metrics.frechet(x, x)) < 1e-12
    with pytest.raises(ValueError, match="two pictures or more"):
        metrics.frechet(x[:1], y)


def test_inception_score(shared):
    for case in golden(shared, "inception_score.json").values():
        z = np.random.RandomState(case["seed"]).standard_normal((case["n"], case["c"])) * case["scale"]
        for splits in (1, 10):
            want = case[f"torch_fidelity_splits{splits}_no_shuffle"]
            assert metrics.inception_score(z, splits) == pytest.approx(want, abs=1e-9)


def test_inception_score_in_closed_form():
    assert metrics.inception_score(np.eye(7) * 1e4)[0] == pytest.approx(7)               # sure, and all different
    assert metrics.inception_score(np.zeros((9, 5)))[0] == pytest.approx(1)              # sure of nothing


def test_intervals():
    """Of a mean: the normal approximation. Paired: noise that two systems share cancels."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(400)
    a, b = noise, noise + .1 + .01 * rng.standard_normal(400)
    low, high = metrics.resampled(lambda r: a[r].mean(), 400)
    half = 1.96 * a.std() / 20
    assert low == pytest.approx(a.mean() - half, abs=.02) and high == pytest.approx(a.mean() + half, abs=.02)
    gain, (low, high), share = metrics.paired(lambda r: a[r].mean(), lambda r: b[r].mean(), 400)
    assert gain == pytest.approx(.1, abs=.002) and .098 < low < high < .102 and share == 0


# ---------------------------------------------------------------- encoders
@pytest.fixture(scope="module")
def encoders():
    root = metrics.HERE / "miniature"
    return {name: metrics.Encoder(name, str(root / name), ("image", "text") if name == "clip" else (kind,))
            for name, kind in (("clip", "image"), ("dino", "image"), ("sbert", "text"))}


def smooth(shape):
    """A picture of (height, width) without fine grain, which each library rounds in its own way."""
    from PIL import Image
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(shape[::-1], Image.BICUBIC)


@pytest.mark.parametrize("shape", [(32, 32), (48, 80), (90, 31)])
@pytest.mark.parametrize("name", ["clip", "dino"])
def test_views_equal_the_processors(encoders, name, shape):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    picture = smooth(shape)
    processor = {"clip": CLIPImageProcessorPil, "dino": ViTImageProcessorPil}[name].from_pretrained(
        metrics.HERE / "miniature" / name)
    theirs = processor(picture, return_tensors="pt").pixel_values
    ours = encoders[name].pixels(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() * .5 < 3 / 255


@pytest.mark.parametrize("name, file", [("clip", "preprocessor_config.json"), ("dino", "processor_config.json")])
def test_sizes_as_the_hub_has_them(encoders, tmp_path, name, file):
    """One number, as in openai/clip-vit-base-patch32 (the shorter side); and as transformers 5 saves a processor."""
    import shutil

    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    shutil.copytree(metrics.HERE / "miniature" / name, tmp_path / name)
    config = json.loads((tmp_path / name / "preprocessor_config.json").read_text()) | {"size": 32, "crop_size": 32}
    processor = {"clip": CLIPImageProcessorPil, "dino": ViTImageProcessorPil}[name](**config)
    (tmp_path / name / "preprocessor_config.json").unlink()
    (tmp_path / name / file).write_text(json.dumps({"image_processor": config} if "pre" not in file else config))
    picture = smooth((48, 80))
    theirs = processor(picture, return_tensors="pt").pixel_values
    ours = metrics.Encoder(name, str(tmp_path / name), ("image",)).pixels(
        torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255)
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
    from miniature import world
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
    from miniature import world
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


def fidelity_stand_in(monkeypatch):
    """torch-fidelity as far as it is used: it unpickles what it is given, as the true one does."""
    class Extractor(torch.nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__()
            assert features == ["2048", "logits_unbiased"]
            self.scale = torch.nn.Parameter(torch.zeros(1))
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.max() > 1
            colour = self.scale * x.float().mean((2, 3))
            return colour, x.float()[:, 0, 0]                    # a mean colour, and a row
    package = types.ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = types.SimpleNamespace(
        FeatureExtractorInceptionV3=Extractor, URL_INCEPTION_V3="https://x.org/weights.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)


class Canary:
    """What leaves a file behind where it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_inception_runs_no_code(monkeypatch, tmp_path, images):
    """Tensors are read, from either kind of file; what would run, or is no tensor, costs a line."""
    fidelity_stand_in(monkeypatch)
    good = {"scale": torch.full((1,), 2.)}
    torch.save(good, tmp_path / "good.pth")
    torch.save(good, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(good, tmp_path / "good.safetensors")
    mean = 2 * (images * 255).round().mean((2, 3)).double()
    for name in ("good.pth", "old.pth", "good.safetensors"):
        seen = metrics.fidelity("cpu", str(tmp_path / name))(images)[0]
        assert np.allclose(seen, mean, atol=1e-3)
    canary = tmp_path / "canary"
    torch.save({"scale": torch.ones(1), "more": Canary(canary)}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Canary(canary), 2))
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>404</html>")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>404</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pth")
    torch.save({"epoch": 3}, tmp_path / "number.pth")
    for name in ("evil.pth", "evil.pkl", "page.pth", "page.safetensors", "empty.pth", "list.pth",
                 "other.pth", "number.pth", "nowhere.pth", "."):
        with pytest.raises(metrics.Unavailable) as e:
            metrics.fidelity("cpu", str(tmp_path / name))
        said = str(e.value)
        assert str(tmp_path / name) in said and "give --inception" in said and "\n" not in said
        assert "weights_only" not in said                        # torch's advice is to run the code
    assert not canary.exists()
    pickle.loads((tmp_path / "evil.pkl").read_bytes())
    assert canary.exists()                                       # and it would have sung


def test_inception_through_torch_fidelity(monkeypatch, images):
    """With a stand-in of its extractor: bytes go in, the cosine of the features comes out. Without it, a remedy."""
    assert "pip install torch-fidelity" in metrics.likenesses(["inception"], "image").absent["inception"]

    fidelity_stand_in(monkeypatch)
    asked = []

    def download(url, map_location, weights_only):
        asked.append(url)
        assert weights_only is True
        return {"scale": torch.ones(1)}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    likeness = metrics.likenesses(["inception"], "image").pairs["inception"]
    assert asked == ["https://x.org/weights.pth"]
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
