"""Encoders against the library's processors and poolings; what is absent costs a line."""
import json
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

import judges
import metrics
from miniature import world

# ---------------------------------------------------------------- encoders
KINDS = {"clip": "both", "dino": "image", "sbert": "text"}


@pytest.fixture(scope="module")
def encoders():
    return {name: judges.Encoder(name, str(ROOT / "miniature" / name), kind)
            for name, kind in KINDS.items()}


def smooth(shape):
    """A picture of (height, width) without fine grain, which each library rounds in its own way."""
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return coarse.resize(shape[::-1], Image.BICUBIC)


def tensor(picture):
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255


def library(name):
    """The library's own processor without torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    return {"clip": CLIPImageProcessorPil, "dino": ViTImageProcessorPil}[name]


@pytest.mark.parametrize("shape", [(32, 32), (48, 80), (90, 31)])
@pytest.mark.parametrize("name", ["clip", "dino"])
def test_views_equal_the_processors(encoders, name, shape):
    picture = smooth(shape)
    processor = library(name).from_pretrained(ROOT / "miniature" / name)
    theirs = processor(picture, return_tensors="pt").pixel_values
    ours = encoders[name].pixels(tensor(picture))
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() * .5 < 3 / 255


@pytest.mark.parametrize("name, file", [("clip", "preprocessor_config.json"),
                                        ("dino", "processor_config.json")])
def test_sizes_as_the_hub_has_them(tmp_path, name, file):
    """One number, as in openai/clip-vit-base-patch32 (the shorter side); and as transformers 5
    saves a processor."""
    shutil.copytree(ROOT / "miniature" / name, tmp_path / name)
    config = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
    config |= {"size": 32, "crop_size": 32}
    (tmp_path / name / "preprocessor_config.json").unlink()
    saved = {"image_processor": config} if file == "processor_config.json" else config
    (tmp_path / name / file).write_text(json.dumps(saved))
    picture = smooth((48, 80))
    theirs = library(name)(**config)(picture, return_tensors="pt").pixel_values
    ours = judges.Encoder(name, str(tmp_path / name), "image").pixels(tensor(picture))
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() * .5 < 3 / 255


def test_embeddings_are_the_papers_poolings(encoders, images):
    from transformers import BertModel, CLIPTextModel, CLIPVisionModel, ViTModel
    texts = ["a small red ball", "a huge ring on the grass"]

    def fresh(kind, name, **options):
        place = ROOT / "miniature" / name
        return kind.from_pretrained(place, dtype=torch.float32, **options).eval()

    def same(ours, theirs):
        theirs = torch.nn.functional.normalize(theirs.double(), dim=-1)
        return torch.allclose(ours, theirs, atol=1e-5)
    clip, dino, sbert = encoders["clip"], encoders["dino"], encoders["sbert"]
    with torch.no_grad():
        vision = fresh(CLIPVisionModel, "clip")(clip.pixels(images))
        assert same(clip.embed(images), vision.pooler_output)
        text = fresh(CLIPTextModel, "clip")
        text = text(**clip.tokenizer(texts, padding=True, return_tensors="pt"))
        assert same(clip.embed(texts), text.pooler_output)
        vit = fresh(ViTModel, "dino", add_pooling_layer=False)(dino.pixels(images))
        assert same(dino.embed(images), vit.last_hidden_state[:, 0])
        alone = sbert.tokenizer(texts[:1], return_tensors="pt").input_ids   # so nothing is padded
        bert = fresh(BertModel, "sbert", add_pooling_layer=False)(alone)
        assert same(sbert.embed(texts)[:1], bert.last_hidden_state.mean(1))


def test_judges_know_their_world(encoders, scenes, images):
    """A picture is most like itself, and its own caption scores above the others' on average."""
    for name in ("clip", "dino"):
        assert (encoders[name].alike(images, images) > 1 - 1e-6).all()
        assert encoders[name].alike(images, images.roll(1, 0)).max() < .999
    captions = [world.captions(s)[0] for s in scenes]
    own = encoders["clip"].score(images, captions)
    others = encoders["clip"].score(images, captions[1:] + captions[:1])
    assert own.mean() > others.mean() + .2
    two = [world.captions(s)[1] for s in scenes]
    alike = encoders["sbert"].alike
    assert alike(captions, two).mean() > alike(captions, two[::-1]).mean()


def test_clipscore_is_its_authors(encoders, scenes, images):
    """Hessel et al. 2021: 2.5 max(cos, 0), the prefix, the harmonic mean with the nearest
    reference; by the library's own features."""
    from transformers import CLIPModel
    model = CLIPModel.from_pretrained(ROOT / "miniature/clip", dtype=torch.float32).eval()
    clip = encoders["clip"]

    def features(texts):
        tokens = clip.tokenizer([f"A photo depicts {x}" for x in texts], padding=True,
                                truncation=True, max_length=24, return_tensors="pt")
        return model.get_text_features(**tokens).pooler_output
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=clip.pixels(images)).pooler_output
    signs = []
    for i, scene in enumerate(scenes):
        references = world.captions(scene)[1:]
        caption = world.captions(scenes[i - 1] if i % 2 else scene)[0]
        found = clip.clipscore(images[[i]], caption, references)
        with torch.no_grad():
            own, others = features([caption]), features(references)
        cosine = torch.cosine_similarity(seen[[i]], own).item()
        signs.append(cosine > 0)
        near = max(torch.cosine_similarity(own, others).max().item(), 0)
        first = 2.5 * max(cosine, 0)
        second = 2 * first * near / (first + near) if first * near else 0
        assert found == pytest.approx((first, second), abs=1e-5)
    assert len({*signs}) == 2                        # one below 0 is 0


def test_judges_by_name(images):
    found, absent = judges.load(["clip", "dino", "pixel"], "image", "miniature")
    assert list(found) == ["clip", "dino", "pixel"] and not absent and found["clip"].score
    for judge in found.values():
        s = judge.alike(images, images[:1])
        assert s.shape == (6,) and s.argmax() == 0
    said = ["a red ball", "a huge blue ring at night"]
    found, absent = judges.load(["clip", "sbert"], "text", "miniature")
    assert list(found) == ["clip", "sbert"] and not absent
    for judge in found.values():
        assert np.argmax(judge.alike(said, [said[1]] * 2)) == 1
    references = [world.captions(world.sample("test", i)) for i in range(50)]
    df = metrics.document_frequency(references)
    assert np.argmax(metrics.cider(said, [[said[1]]] * 2, df)) == 1


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
        seen = judges.inception_features("cpu", str(tmp_path / name))(images)[0]
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
        with pytest.raises(ValueError) as e:
            judges.inception_features("cpu", str(tmp_path / name))
        said = str(e.value)
        assert str(tmp_path / name) in said and "give --inception" in said and "\n" not in said
        assert "weights_only" not in said                        # torch's advice is to run the code
    assert not canary.exists()
    pickle.loads((tmp_path / "evil.pkl").read_bytes())
    assert canary.exists()                                       # and it would have sung


def test_inception_through_torch_fidelity(monkeypatch, images):
    """With a stand-in of its extractor: bytes go in, the cosine of the features comes out. Without
    it, a remedy."""
    _, absent = judges.load(["inception"], "image")
    assert "pip install torch-fidelity" in absent["inception"]
    fidelity_stand_in(monkeypatch)
    asked = []

    def download(url, map_location, weights_only):
        asked.append(url)
        assert weights_only is True
        return {"scale": torch.ones(1)}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    found, _ = judges.load(["inception"], "image")
    assert asked == ["https://x.org/weights.pth"]
    mean = (images * 255).round().mean((2, 3)).double()
    expected = torch.cosine_similarity(mean, mean[:1])
    alike = found["inception"].alike(images, images[:1])
    assert np.allclose(alike, expected, atol=1e-5)


def test_what_is_absent_costs_a_line(tmp_path):
    found, absent = judges.load(["clip", "dino", "pixel"], "image", str(tmp_path))
    assert list(found) == ["pixel"] and set(absent) == {"clip", "dino"}
    assert str(tmp_path) in absent["clip"] and "\n" not in absent["clip"]
    with pytest.raises(ValueError, match="'ssim'.*pixel"):
        judges.load(["ssim"], "image")
