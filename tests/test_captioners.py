"""The captioner: the trained miniature against the library's own BLIP; small models in the hub's
layouts; what is exported."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from layouts import BLIP2, VITB

import captioners
from captioners import Captioner

CAPTION = "a small red ball on the grass"


def sentence_ids(captioner, caption):
    """Prompt, caption and end, as the library's forward wants them."""
    words = captioner.tokenizer(captioner.space + caption, add_special_tokens=False).input_ids
    return captioner.prompt + words + [captioner.end]


# ---------------------------------------------------------------- pixels and tokens in
def test_pixels_equal_the_processors(captioner):
    """Against the library's PIL-backed processor, pictures of several sizes and shapes, up to its
    rounding to 8 bit."""
    from PIL import Image
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    rng = np.random.default_rng(0)
    keep = captioner.side
    cases = (384, (480, 640)), (32, (50, 41)), (384, (100, 90)), (32, (32, 32))
    try:
        for side, shape in cases:
            captioner.side = side
            coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
            smooth = coarse.resize(shape[::-1], Image.BICUBIC)
            image = torch.from_numpy(np.asarray(smooth).copy()).permute(2, 0, 1) / 255
            ours = captioner.pixels(image[None])
            processor = BlipImageProcessorPil(size={"height": side, "width": side})
            theirs = processor(smooth, return_tensors="pt").pixel_values
            assert (ours - theirs).abs().max() * .2758 < 2.5 / 255
    finally:
        captioner.side = keep


def test_pixels_pass_gradients_where_the_picture_saturates(captioner):
    x = torch.full((1, 3, 40, 40), 1.4, requires_grad=True)
    captioner.pixels(x).sum().backward()
    assert (x.grad.abs() > 0).all()


def test_likelihood_is_the_librarys_own_loss(captioner, images):
    captioner.model.text_decoder.label_smoothing = 0.0
    ids = torch.tensor([sentence_ids(captioner, CAPTION)])
    labels = ids.clone()
    labels[:, :len(captioner.prompt)] = -100
    pixels = captioner.pixels(images[:1])
    loss = captioner.model(pixel_values=pixels, input_ids=ids, labels=labels).loss
    # beside a longer caption, so that this one is padded
    both = [CAPTION, CAPTION + " and a large blue ring"]
    ours = captioner.likelihood(images[:1].repeat(2, 1, 1, 1), both)
    assert math.isclose(ours[0], -float(loss) * int((labels >= 0).sum()), rel_tol=1e-5)


def test_a_caption_is_cut_at_the_decoders_room(captioner, images):
    """lead and room are what `read` does: places before the first prediction, tokens that fit."""
    reading = captioner.read(images[:2], ["red " * 500, CAPTION])
    first = captioner.tokenizer("red", add_special_tokens=False).input_ids[0]
    said = reading.targets[0]
    assert said.tolist() == [-100] * captioner.lead + [first] * captioner.room + [captioner.end]
    assert len(said) == captioner.limit - 1
    assert (reading.targets[1] >= 0).nonzero()[0].item() == captioner.lead


# ---------------------------------------------------------------- captions out
def test_captions_do_not_depend_on_the_batch(captioner, images):
    together, logp = captioner.speak(images, 5, seed=3)
    alone, logp1 = captioner.speak(images[2:3], 5, seed=3, items=[2])
    assert together[2] == alone[0] and torch.allclose(logp[2], logp1[0], atol=1e-3)
    assert captioner.speak(images[:1], 5, seed=4)[0] != together[:1]


@pytest.mark.parametrize("way", captioners.WAYS)
def test_every_way_of_speaking(captioner, images, way):
    captions, logp = captioner.speak(images, 4, way)
    assert logp.shape == (6, 4) and (logp < 0).all()
    assert [len(row) for row in captions] == [4] * 6
    said = [caption for row in captions for caption in row]
    for caption in said:
        assert caption and caption == " ".join(caption.split())
        assert len(captioner.tokenizer(caption, add_special_tokens=False).input_ids) <= 16
    assert len(set(said)) > 6


def test_beam_search_is_the_librarys(captioner, images):
    prompt = torch.tensor([captioner.prompt + [captioner.end]] * len(images))
    ids = captioner.model.generate(captioner.pixels(images), prompt, num_beams=3, min_new_tokens=1,
                                   max_new_tokens=16)
    read = captioner.tokenizer.decode
    theirs = [read(row[4:], skip_special_tokens=True).strip() for row in ids]
    assert [row[0] for row in captioner.speak(images, 1, "beam")[0]] == theirs


def test_samples_follow_the_warped_distribution(captioner, images):
    """First tokens of 4000 samples against the probabilities computed in the open (top-p .9,
    penalty 1.1)."""
    with torch.no_grad():
        states = captioner.see(images[:1])
        hidden, _ = captioner.decode(states, torch.tensor([captioner.prompt]))
        logits = captioner.head(hidden[0, -1]).double()
    for i in set(captioner.prompt):
        logits[i] = logits[i] / 1.1 if logits[i] > 0 else logits[i] * 1.1
    logits[len(captioner.tokenizer):] = -torch.inf
    logits[captioner.end] = -torch.inf
    p, order = logits.softmax(0).sort(descending=True)
    kept = p.cumsum(0) - p < .9                  # the fewest tokens whose mass reaches .9
    expected = torch.zeros_like(logits)
    expected[order[kept]] = p[kept] / p[kept].sum()
    first = captioner.sample(captioner.see(images[:1]), 4000, "top-p", 0, [0], (5, 5))[:, 0]
    found = torch.bincount(first, minlength=len(expected)).double() / 4000
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 4 * .5 / math.sqrt(4000)


def test_vision_is_computed_once_per_image(captioner, images):
    """One vision pass over B images, and keys of cross-attention for B rows, not B n."""
    seen = {"vision": [], "keys": []}

    def vision(module, given, out):
        seen["vision"].append(len(out[0]))

    def keys(module, given, out):
        seen["keys"].append(len(out))

    layer = captioner.model.text_decoder.bert.encoder.layer[0].crossattention.self.key
    hooks = [captioner.model.vision_model.register_forward_hook(vision),
             layer.register_forward_hook(keys)]
    states = captioner.see(images)
    captioner.sample(states, 10, "top-p", 0, range(6), (5, 20))
    for hook in hooks:
        hook.remove()
    assert seen == {"vision": [6], "keys": [6]}


def test_an_unknown_way_is_named(captioner, images):
    with pytest.raises(ValueError, match="'greedy'.*top-p"):
        captioner.speak(images, 2, "greedy")


# ---------------------------------------------------------------- BLIP-2
def test_blip2_through_the_same_interface(blip2, images):
    captioner = Captioner.load(str(blip2), "cpu")
    captions, logp = captioner.speak(images[:3], 4)
    alone = captioner.speak(images[1:2], 4, items=[1])[0]
    assert captions[1] == alone[0] and len(set(captions[0])) > 1
    text = [captions[0][0], "a blue ring"]
    reading = captioner.read(images[:2], text)
    assert reading.hidden.shape[:2] == reading.targets.shape
    # the library's forward on the hub's layout: image placeholders, then </s>, prompt, caption, end
    q = captioner.model.config.num_query_tokens
    places = [captioner.model.config.image_token_id] * q
    ids = torch.tensor([places + sentence_ids(captioner, text[1])])
    labels = ids.clone()
    labels[:, :q + len(captioner.prompt)] = -100
    pixels = captioner.pixels(images[1:2])
    logits = captioner.model(pixel_values=pixels, input_ids=ids).logits[0, :-1].double()
    theirs = -torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100,
                                                reduction="sum")
    assert math.isclose(captioner.likelihood(images[:2], text)[1], theirs, rel_tol=1e-4)
    beams = captioner.speak(images[:2], 2, "beam")[0]
    assert len(beams) == 2 and len(beams[0]) == 2


@pytest.mark.parametrize("way", captioners.WAYS)
def test_the_images_token_is_never_said(blip2, images, way):
    """Nor what the tokenizer lacks, though the head prefers both by far."""
    captioner = Captioner.load(str(blip2), "cpu")
    image = captioner.model.config.image_token_id
    unsaid = [image, *range(len(captioner.tokenizer), len(captioner.head.weight))]
    assert sorted(captioner.unsaid) == sorted(unsaid) and len(unsaid) > 1
    bias = torch.zeros(len(captioner.head.weight))
    bias[unsaid] = 1e4
    hook = captioner.head.register_forward_hook(lambda module, given, out: out + bias)
    if way == "beam":
        ids = captioner.beam_search(captioner.see(images[:2]), 3, (5, 20))
    else:
        ids = captioner.sample(captioner.see(images[:2]), 3, way, 0, range(2), (5, 20))
    said = captioner.speak(images[:2], 3, way)[0]
    hook.remove()
    assert ids.numel() and not torch.isin(ids, torch.tensor(unsaid)).any()
    assert not any("<image>" in caption for row in said for caption in row)


# ---------------------------------------------------------------- what is exported
def test_a_captioner_is_read_as_it_was_saved(captioner, tmp_path):
    """Its size of picture too; and from a processor as transformers 5 saves it."""
    other = Captioner(captioner.model, captioner.tokenizer, captioner.processor)
    other.side = 16
    other.save(tmp_path)
    view = Captioner.load(tmp_path, "cpu").pixels(torch.rand(1, 3, 40, 60))
    assert view.shape == (1, 3, 16, 16)
    own = tmp_path / "preprocessor_config.json"
    view = {"image_processor": json.loads(own.read_text())}
    (tmp_path / "processor_config.json").write_text(json.dumps(view))
    own.unlink()
    found = Captioner.load(tmp_path, "cpu")
    assert found.pixels(torch.rand(1, 3, 40, 60)).shape == (1, 3, 16, 16)
    assert torch.equal(found.mean, captioner.mean)


def answers(folder, prompt):
    """The stock model's logits (2, L, V) for two pictures, all through its own processor."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    dice = np.random.default_rng(0)
    shapes = dice.integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    pictures = [Image.fromarray(x) for x in shapes]
    given = processor(pictures, [prompt] * 2, return_tensors="pt")
    with torch.no_grad():
        return processor, given, model(**given).logits


@pytest.mark.parametrize("name, prompt", [(VITB, "a picture of"), (BLIP2, "a photo of")])
def test_the_stock_model_sees_with_what_was_exported(layouts, tmp_path, name, prompt):
    """Other logits for another picture; and the same as before the export."""
    Captioner.load(layouts / name, "cpu").save(tmp_path)
    _, _, logits = answers(tmp_path, prompt)
    assert (logits[0] - logits[1]).abs().max() > .01
    _, _, before = answers(layouts / name, prompt)
    assert torch.equal(logits, before)


def test_an_export_of_blip2_has_its_query_tokens(layouts, tmp_path):
    """And as many places for the picture stand before the prompt."""
    captioner = Captioner.load(layouts / BLIP2, "cpu")
    captioner.save(tmp_path)
    q = captioner.model.config.num_query_tokens
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["num_query_tokens"] == q == 6
    from transformers import Blip2ForConditionalGeneration, Blip2Processor
    assert isinstance(Blip2ForConditionalGeneration.from_pretrained(tmp_path).query_tokens,
                      torch.nn.Parameter)
    assert Blip2Processor.from_pretrained(tmp_path).num_query_tokens == q
    processor, given, _ = answers(tmp_path, "a photo of")
    assert type(processor) is Blip2Processor
    image = captioner.model.config.image_token_id
    assert given.input_ids[0].tolist() == [image] * q + captioner.prompt


def test_an_older_blip2_is_given_its_token(layouts, tmp_path):
    """A clone from before <image>: what it says stays, and exported, the stock model sees."""
    old = tmp_path / "old"
    shutil.copytree(layouts / BLIP2, old)
    (old / "processor_config.json").unlink()
    words = json.loads((old / "tokenizer.json").read_text())
    words["added_tokens"] = [t for t in words["added_tokens"] if t["content"] != "<image>"]
    (old / "tokenizer.json").write_text(json.dumps(words))
    for file, key in (("tokenizer_config.json", "extra_special_tokens"),
                      ("config.json", "image_token_index")):
        settings = json.loads((old / file).read_text())
        del settings[key]
        (old / file).write_text(json.dumps(settings))
    captioner = Captioner.load(old, "cpu")
    assert "<image>" not in captioner.tokenizer.get_vocab()
    captioner.save(tmp_path / "new")
    assert "<image>" not in captioner.tokenizer.get_vocab()
    _, _, logits = answers(tmp_path / "new", "a photo of")
    _, _, expected = answers(layouts / BLIP2, "a photo of")
    assert torch.equal(logits, expected)
    again = Captioner.load(tmp_path / "new", "cpu")
    x = torch.rand(2, 3, 30, 40)
    assert again.speak(x, 2, "beam")[0] == captioner.speak(x, 2, "beam")[0]
