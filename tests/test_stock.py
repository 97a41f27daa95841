"""Models in the layouts of the hub's real ones see, say and draw what the stock libraries do with
the same files."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED
from layouts import BLIP2, CLIP, DINO, SBERT, SD14, TAESD, TURBO, VITB, VITL
from PIL import Image

import captioners
import cycle
import generators
import judges
import loading

TEXTS = ["a small red ball on the grass", "", "two very large blue rings " * 30]
NEAR = 4 / 255                               # the libraries resize in 8 bit, once in each direction
VIEWS = {"a number": {"size": 24}, "height and width": {"size": {"height": 24, "width": 40}},
         "a pair": {"size": [24, 40]}, "the shorter side": {"size": {"shortest_edge": 24}},
         "left as it is": {"do_resize": False}, "cut": {"size": {"shortest_edge": 40},
                                                        "do_center_crop": True, "crop_size": 25},
         "cut to an oblong": {"size": 40, "do_center_crop": True, "crop_size": {"height": 20,
                                                                                "width": 29}},
         "cut beyond its rim": {"size": {"height": 24, "width": 24}, "do_center_crop": True,
                                "crop_size": 33},
         "said but not cut": {"size": {"shortest_edge": 40}, "do_center_crop": False,
                              "crop_size": 24}, "bilinear": {"size": {"height": 24, "width": 24},
                                                             "resample": 2}, }


@pytest.fixture(scope="module")
def photo():
    """A photograph (480, 640) where ../shared has it; else a picture with as fine a grain."""
    file = SHARED / "data/images/000000039769.png"
    if file.is_file():
        return Image.open(file).convert("RGB")
    dice = np.random.default_rng(0)
    coarse = Image.fromarray(dice.integers(60, 200, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((640, 480), Image.BICUBIC))
    grain = dice.normal(0, 10, (480, 640, 3))
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def tensor(picture):
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255


def stock_view(folder, picture, **more):
    from transformers import AutoImageProcessor
    return AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt",
                                                      **more).pixel_values


def near(ours, theirs, std=.2613):
    """Normalised pixels by at most four grey levels; std: the smallest of the three."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() * std < NEAR


def judge(name, folder, kind):
    place, options = loading.resolve(str(folder), {}, "judge")
    return judges.Encoder(name, place, kind, "cpu", options)


def changed(source, folder, **config):
    """A copy of a repository whose processor has other settings."""
    shutil.copytree(source, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


# ---------------------------------------------------------------- pixels
@pytest.mark.parametrize("name", [VITB, VITL, BLIP2])
def test_a_captioner_sees_what_the_stock_one_sees(layouts, photo, name):
    ours = captioners.Captioner.load(layouts / name, "cpu").pixels([tensor(photo)])
    near(ours, stock_view(layouts / name, photo))


def test_clip_sees_what_the_stock_one_sees(layouts, photo):
    ours = judge("clip", layouts / CLIP, "image").pixels(tensor(photo)[None])
    near(ours, stock_view(layouts / CLIP, photo))


@pytest.mark.parametrize("resample", [2, 3])
def test_dino_is_resized_as_its_checkpoint_says(layouts, photo, tmp_path, resample):
    """To the paper's 384 px; bilinearly as facebook/dino-vitb8, bicubically if a config says so."""
    folder = changed(layouts / DINO, tmp_path / "dino", resample=resample)
    ours = judge("dino", folder, "image").pixels(tensor(photo)[None])
    near(ours, stock_view(folder, photo, size={"height": 384, "width": 384}), std=.224)


@pytest.mark.parametrize("view", VIEWS)
def test_every_shape_of_size_and_crop(layouts, photo, tmp_path, view):
    folder = changed(layouts / CLIP, tmp_path / "model", **{"do_center_crop": False} | VIEWS[view])
    ours = judge("clip", folder, "image").pixels(tensor(photo)[None])
    near(ours, stock_view(folder, photo))


@pytest.mark.parametrize("view", [*VIEWS, "the longer side"])
def test_a_captioner_resizes_or_says_that_it_cannot(layouts, photo, tmp_path, view):
    """Its vision reads one size of picture: what keeps a picture's shape, or cuts it, is named."""
    config = {"the longer side": {"size": {"longest_edge": 30}}} | VIEWS
    folder = changed(layouts / VITB, tmp_path / "model", **config[view])
    if view in ("a number", "a pair", "height and width", "bilinear"):
        ours = captioners.Captioner.load(folder, "cpu").pixels([tensor(photo)])
        near(ours, stock_view(folder, photo))
        return
    with pytest.raises(ValueError, match="preprocessor_config.json") as e:
        captioners.Captioner.load(folder, "cpu")
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


# ---------------------------------------------------------------- words
@pytest.mark.parametrize("name", [VITB, VITL])
def test_blips_prompt_is_the_stock_one(layouts, photo, name, monkeypatch):
    """What the library's generate hands to the decoder: [DEC] for [CLS], no [SEP]."""
    from transformers import AutoProcessor, BlipForConditionalGeneration
    model = BlipForConditionalGeneration.from_pretrained(layouts / name).eval()
    seen = []
    monkeypatch.setattr(model.text_decoder, "generate",
                        lambda **given: seen.append(given["input_ids"].tolist()))
    model.generate(**AutoProcessor.from_pretrained(layouts / name)(photo, "a picture of",
                                                                   return_tensors="pt"))
    assert seen == [[captioners.Captioner.load(layouts / name, "cpu").prompt]]


def test_blip2s_prompt_is_the_stock_one(layouts, photo):
    from transformers import AutoProcessor
    processor = AutoProcessor.from_pretrained(layouts / BLIP2)
    ids = processor(photo, "a photo of", return_tensors="pt").input_ids[0].tolist()
    captioner = captioners.Captioner.load(layouts / BLIP2, "cpu")
    image = captioner.model.config.image_token_id
    assert ids == [image] * captioner.model.config.num_query_tokens + captioner.prompt


@pytest.mark.parametrize("name", [VITB, VITL, BLIP2])
def test_beam_search_is_stock_on_equal_pixels(layouts, photo, name):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    captioner = captioners.Captioner.load(layouts / name, "cpu")
    model = AutoModelForImageTextToText.from_pretrained(layouts / name).eval()
    processor = AutoProcessor.from_pretrained(layouts / name)
    prompt = "a photo of" if name == BLIP2 else "a picture of"
    pictures = [photo, photo.crop((0, 100, 200, 400)), photo.crop((300, 0, 640, 300))]
    theirs = []
    for picture in pictures:
        given = processor(picture, prompt, return_tensors="pt")
        given["pixel_values"] = captioner.pixels([tensor(picture)])
        length = len(captioner.prompt)
        with torch.no_grad():
            ids = model.generate(**given, num_beams=3, min_new_tokens=max(0, 5 - length),
                                 max_new_tokens=20 - length)
        start = given.input_ids.shape[1] if name == BLIP2 else length
        theirs.append(" ".join(processor.decode(ids[0, start:], skip_special_tokens=True).split()))
    ours = captioner.speak([tensor(p) for p in pictures], 1, "beam")[0]
    assert [row[0] for row in ours] == theirs
    assert len(set(theirs)) > 1 and all(theirs)


# ---------------------------------------------------------------- judges
def test_judges_are_the_stock_encoders(layouts, photo):
    """CLIP's and DINO's of a photograph, CLIP's and SBERT's of texts, but for rounded pixels."""
    from transformers import AutoTokenizer, BertModel, CLIPModel, ViTModel
    small = photo.resize((384, 384))
    clip = CLIPModel.from_pretrained(layouts / CLIP).eval()
    dino = ViTModel.from_pretrained(layouts / DINO, add_pooling_layer=False).eval()
    sbert = BertModel.from_pretrained(layouts / SBERT, add_pooling_layer=False).eval()
    see_and_read = judge("clip", layouts / CLIP, "both")
    see = judge("dino", layouts / DINO, "image")
    read = judge("sbert", layouts / SBERT, "text")
    words = {name: AutoTokenizer.from_pretrained(layouts / name) for name in (CLIP, SBERT)}
    x, pairs = tensor(small)[None], []
    with torch.no_grad():
        view = stock_view(layouts / CLIP, small)
        pairs.append((see_and_read.embed(x), clip.vision_model(view)[1]))
        view = stock_view(layouts / DINO, small, size={"height": 384, "width": 384})
        pairs.append((see.embed(x), dino(view, interpolate_pos_encoding=True)[0][:, 0]))
        for text in (TEXTS[0], TEXTS[2]):
            given = words[CLIP](text, truncation=True, return_tensors="pt")
            pairs.append((see_and_read.embed([text]), clip.text_model(**given)[1]))
            given = words[SBERT](text, truncation=True, max_length=256, return_tensors="pt")
            pairs.append((read.embed([text]), sbert(**given)[0].mean(1)))
    for a, b in pairs:
        assert torch.cosine_similarity(a, b.double()) > .9999


# ---------------------------------------------------------------- generators
@pytest.fixture(scope="module", params=[SD14, TURBO])
def both(request, layouts):
    """Ours, and the stock pipeline of the same files."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    logging.set_verbosity_error()
    theirs = StableDiffusionPipeline.from_pretrained(layouts / request.param, safety_checker=None,
                                                     requires_safety_checker=False,
                                                     low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    return generators.Generator.load(layouts / request.param, "cpu"), theirs


def drawn(pipe, steps, guidance):
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=cycle.chance("draw", 0, i))
                       for i in range(len(TEXTS))])
    with torch.no_grad():
        return pipe(TEXTS, latents=noise, num_inference_steps=steps, guidance_scale=guidance,
                    output_type="pt").images


def test_draws_are_stock_from_equal_noise(both):
    ours, theirs = both
    turbo = type(theirs.scheduler).__name__ == "EulerDiscreteScheduler"
    assert turbo or type(theirs.scheduler).__name__ == "PNDMScheduler"
    steps, guidance = (2, 0.0) if turbo else (5, 7.5)
    a, b = ours.draw(TEXTS, seed=0, steps=steps, guidance=guidance), drawn(theirs, steps, guidance)
    assert a.shape == (3, 3, 16, 16) and (a - b).abs().max() < 1e-4
    assert (a[0] - a[1]).abs().max() > .01


def test_text_states_are_encode_prompts(both):
    ours, theirs = both
    with torch.no_grad():
        expected = theirs.encode_prompt(TEXTS, "cpu", 1, False)[0]
        assert torch.equal(ours.states(TEXTS), expected)
    assert ours.too_long(TEXTS) == [False, False, True]


def test_few_steps_and_a_tiny_decoder_are_the_stock_recipe(layouts):
    from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, StableDiffusionPipeline
    theirs = StableDiffusionPipeline.from_pretrained(layouts / SD14, safety_checker=None,
                                                     low_cpu_mem_usage=False,
                                                     requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.vae = AutoencoderTiny.from_pretrained(layouts / TAESD, low_cpu_mem_usage=False)
    ours = generators.few_steps(generators.Generator.load(layouts / SD14, "cpu"), layouts / TAESD)
    assert (ours.draw(TEXTS, seed=0, steps=3) - drawn(theirs, 3, 7.5)).abs().max() < 1e-4
