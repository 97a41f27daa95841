"""The two speakers and their conversations: the trained miniature, and small random models in the hub's layouts."""
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import cycle

CAPTION = "a small red ball on the grass"


# ---------------------------------------------------------------- the captioner
def test_pixels_equal_the_processors(captioner):
    """Against the library's PIL-backed processor, pictures of several sizes and shapes, up to its rounding to 8 bit."""
    from PIL import Image
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    rng = np.random.default_rng(0)
    keep = captioner.side
    try:
        for side, shape in ((384, (480, 640)), (32, (50, 41)), (384, (100, 90)), (32, (32, 32))):
            captioner.side = side
            smooth = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
            smooth = smooth.resize(shape[::-1], Image.BICUBIC)
            ours = captioner.pixels(torch.from_numpy(np.asarray(smooth).copy()).permute(2, 0, 1)[None] / 255)
            processor = BlipImageProcessorPil(size={"height": side, "width": side})
            theirs = processor(smooth, return_tensors="pt").pixel_values
            assert (ours - theirs).abs().max() * .2758 < 2.5 / 255
    finally:
        captioner.side = keep


def test_pixels_pass_gradients_where_the_picture_saturates(captioner):
    x = torch.full((1, 3, 40, 40), 1.4, requires_grad=True)
    captioner.pixels(x).sum().backward()
    assert (x.grad.abs() > 0).all()


def test_captions_do_not_depend_on_the_batch(captioner, images):
    together, logp = captioner.speak(images, 5, seed=3)
    alone, logp1 = captioner.speak(images[2:3], 5, seed=3, items=[2])
    assert together[2] == alone[0] and torch.allclose(logp[2], logp1[0], atol=1e-3)
    assert captioner.speak(images[:1], 5, seed=4)[0] != together[:1]


@pytest.mark.parametrize("way", cycle.WAYS)
def test_every_way_of_speaking(captioner, images, way):
    captions, logp = captioner.speak(images, 4, way)
    assert logp.shape == (6, 4) and (logp < 0).all()
    for row in captions:
        assert len(row) == 4 and all(c and c == " ".join(c.split()) for c in row)
        assert all(len(captioner.tokenizer(c, add_special_tokens=False).input_ids) <= 16 for c in row)
    assert len({c for row in captions for c in row}) > 6


def test_likelihood_is_the_librarys_own_loss(captioner, images):
    captioner.model.text_decoder.label_smoothing = 0.0
    ids = captioner.prompt + captioner.tokenizer(CAPTION, add_special_tokens=False).input_ids + [captioner.end]
    ids = torch.tensor([ids])
    labels = ids.clone()
    labels[:, :len(captioner.prompt)] = -100
    loss = captioner.model(pixel_values=captioner.pixels(images[:1]), input_ids=ids, labels=labels).loss
    # beside a longer caption, so that this one is padded
    ours = captioner.likelihood(images[:1].repeat(2, 1, 1, 1), [CAPTION, CAPTION + " and a large blue ring"])
    assert math.isclose(ours[0], -float(loss) * int((labels >= 0).sum()), rel_tol=1e-5)


def test_beam_search_is_the_librarys(captioner, images):
    prompt = torch.tensor([captioner.prompt + [captioner.end]] * len(images))
    ids = captioner.model.generate(captioner.pixels(images), prompt, num_beams=3, min_new_tokens=1, max_new_tokens=16)
    theirs = [captioner.tokenizer.decode(row[4:], skip_special_tokens=True).strip() for row in ids]
    assert [row[0] for row in captioner.speak(images, 1, "beam")[0]] == theirs


def test_samples_follow_the_warped_distribution(captioner, images):
    """First tokens of 4000 samples against the probabilities computed in the open (top-p .9, penalty 1.1)."""
    with torch.no_grad():
        hidden, _ = captioner.decode(captioner.look(images[:1]), torch.tensor([captioner.prompt]))
        logits = captioner.head(hidden[0, -1]).double()
    for i in set(captioner.prompt):
        logits[i] = logits[i] / 1.1 if logits[i] > 0 else logits[i] * 1.1
    logits[len(captioner.tokenizer):] = -torch.inf
    logits[captioner.end] = -torch.inf
    p, order = logits.softmax(0).sort(descending=True)
    kept = p.cumsum(0) - p < .9                                 # the fewest tokens whose mass reaches .9
    expected = torch.zeros_like(logits)
    expected[order[kept]] = p[kept] / p[kept].sum()
    first = captioner.sample(captioner.look(images[:1]), 4000, "top-p", 0, [0], (5, 5))[:, 0]
    seen = torch.bincount(first, minlength=len(expected)).double() / 4000
    assert (seen[expected == 0] == 0).all()
    assert (seen - expected).abs().max() < 4 * .5 / math.sqrt(4000)


def test_vision_is_computed_once_per_image(captioner, images):
    """One vision pass over B images, and keys of cross-attention for B rows, not B n."""
    seen = {"vision": [], "keys": []}
    layer = captioner.model.text_decoder.bert.encoder.layer[0].crossattention.self.key
    hooks = [captioner.model.vision_model.register_forward_hook(lambda m, i, o: seen["vision"].append(len(o[0]))),
             layer.register_forward_hook(lambda m, i, o: seen["keys"].append(len(o)))]
    states = captioner.look(images)
    captioner.sample(states, 10, "top-p", 0, range(6), (5, 20))
    for h in hooks:
        h.remove()
    assert seen == {"vision": [6], "keys": [6]}


def test_an_unknown_way_is_named(captioner, images):
    with pytest.raises(ValueError, match="'greedy'.*top-p"):
        captioner.speak(images, 2, "greedy")


# ---------------------------------------------------------------- BLIP-2
def test_blip2_through_the_same_interface(blip2, images):
    captioner = captioners.Captioner.load(str(blip2), "cpu")
    captions, logp = captioner.speak(images[:3], 4)
    assert captions[1] == captioner.speak(images[1:2], 4, items=[1])[0][0] and len(set(captions[0])) > 1
    text = [captions[0][0], "a blue ring"]
    reading = captioner.read(images[:2], text)
    assert reading.hidden.shape[:2] == reading.targets.shape
    # the library's forward on the hub's layout: image placeholders, then </s>, prompt, caption, end
    q = captioner.model.config.num_query_tokens
    ids = captioner.prompt + captioner.tokenizer(" " + text[1], add_special_tokens=False).input_ids + [captioner.end]
    ids = torch.tensor([[captioner.model.config.image_token_id] * q + ids])
    labels = ids.clone()
    labels[:, :q + len(captioner.prompt)] = -100
    logits = captioner.model(pixel_values=captioner.pixels(images[1:2]), input_ids=ids).logits[0, :-1].double()
    theirs = -torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
    assert math.isclose(captioner.likelihood(images[:2], text)[1], theirs, rel_tol=1e-4)
    beams = captioner.speak(images[:2], 2, "beam")[0]
    assert len(beams) == 2 and len(beams[0]) == 2


# ---------------------------------------------------------------- the generator
def test_candidates_of_an_item_share_their_noise(generator):
    a = generator.draw([CAPTION, CAPTION, "a blue ring", CAPTION], items=["x", "x", "x", "y"], steps=4)
    assert torch.equal(a[0], a[1]) and not torch.equal(a[0], a[2]) and not torch.equal(a[0], a[3])
    assert a.shape == (4, 3, 32, 32) and a.min() >= 0 and a.max() <= 1
    b = generator.draw(["a blue ring"], items=["x"], steps=4)
    assert (a[2] - b[0]).abs().max() < 1e-4                     # what else is in the batch does not matter


def test_draw_is_the_plain_loop(generator):
    """Against denoising written out: one UNet call per half, guidance, the scheduler's own step."""
    from copy import deepcopy
    noise = torch.randn(1, 8, 8, 8, generator=cycle.chance("draw", 5, "x"))
    scheduler = deepcopy(generator.scheduler)
    scheduler.set_timesteps(6)
    with torch.no_grad():
        no, yes = generator.states([""]), generator.states([CAPTION])
        x = noise
        for t in scheduler.timesteps:
            a, b = generator.predict(x, t, no), generator.predict(x, t, yes)
            x = scheduler.step(a + 7.5 * (b - a), t, x).prev_sample
        expected = generator.decode(x).clamp(0, 1)
    assert (generator.draw([CAPTION], items=["x"], seed=5, steps=6) - expected).abs().max() < 1e-4


def test_both_guidance_halves_in_one_call(generator):
    sizes = []
    hook = generator.unet.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    generator.draw([CAPTION] * 5, steps=3, batch=5)
    hook.remove()
    assert sizes == [10] * 3


def test_encode_and_decode(generator, images):
    mean, std = generator.encode(images)
    assert mean.shape == std.shape == (6, 8, 8, 8) and .5 < mean.std() < 2 and (std > 0).all()
    again = generator.decode(mean)
    assert (again - images).square().mean() < .005 < (images - images.roll(1, 0)).square().mean()
    wide = torch.nn.functional.pad(images[:1], (16, 16, 0, 0))  # (1, 3, 32, 64): the middle is what the generator sees
    assert torch.allclose(generator.encode(wide)[0], mean[:1], atol=1e-4)


def test_prompts_over_the_encoders_length_are_counted(generator):
    assert generator.too_long([CAPTION, CAPTION * 6, "a"]) == [False, True, False]


def test_a_pipeline_of_another_layout_can_draw(tmp_path):
    """A small random SDXL, as any directory that diffusers knows."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(cycle.GENERATORS["miniature"] / "tokenizer")
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=4, max_position_embeddings=24, projection_dim=32,
                            eos_token_id=tokenizer.eos_token_id)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
        cross_attention_dim=64)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)
    StableDiffusionXLPipeline(vae, CLIPTextModel(config), CLIPTextModelWithProjection(config), tokenizer, tokenizer,
                              unet, DDIMScheduler(), add_watermarker=False).save_pretrained(tmp_path)
    a = generators.Generator.load(str(tmp_path), "cpu").draw([CAPTION, CAPTION], items=[1, 2], steps=2)
    assert a.shape == (2, 3, 16, 16) and not torch.equal(a[0], a[1])


def test_a_model_from_a_file(tmp_path, captioner, images):
    """The GAN-like toy of the README, as it stands there."""
    code = re.search(r"```python\n(# gan.py.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    (tmp_path / "gan.py").write_text(code)
    gan = generators.Generator.load(f"{tmp_path / 'gan.py'}:load")
    pixel = {"pixel": lambda a, b: -(a - b).square().mean((1, 2, 3))}
    talk = cycle.image_text_image(captioner, gan, images[:2], 3, pixel)
    assert talk.images.shape == (2, 3, 3, 32, 32) and len(set(talk.scores["pixel"][0].tolist())) > 1
    with pytest.raises(ValueError, match="defines no nothing"):
        generators.Generator.load(f"{tmp_path / 'gan.py'}:nothing")
    with pytest.raises(ValueError, match="there is no file"):
        captioners.Captioner.load("elsewhere.py:load")


def test_nothing_reaches_for_a_network():
    """Everything a default run loads, in a process that was not told to be offline and cannot connect."""
    code = """
import socket
def refuse(*a): raise SystemExit(f"connects to {a[1:]}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *a, **k: refuse(*a)
import cycle, metrics
captioners.Captioner.load("miniature", "cpu"), generators.Generator.load("miniature", "cpu")
assert not metrics.likenesses(["clip", "dino"], "image", "miniature").absent
assert not metrics.likenesses(["clip", "sbert"], "text", "miniature").absent
"""
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("kind", [captioners.Captioner, generators.Generator])
@pytest.mark.parametrize("name", ["vit_b", "./no/such/folder", "/nowhere"])
def test_what_cannot_be_loaded_is_named(kind, name):
    with pytest.raises(ValueError, match=name) as e:
        kind.load(name, "cpu")
    assert "\n" not in str(e.value)


def test_a_folder_without_a_model_is_named(tmp_path):
    for kind in (captioners.Captioner, generators.Generator):
        with pytest.raises(ValueError, match=str(tmp_path)):
            kind.load(str(tmp_path), "cpu")


def test_every_process_has_its_own_gpu(monkeypatch):
    """torchrun's processes; what is no device and no dtype is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert cycle.settle("cuda") == (torch.device("cuda"), torch.float16) and not taken
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cycle.settle()[0] == torch.device("cuda:3") == taken[-1]
    assert cycle.settle("cuda:1", "bfloat16") == (torch.device("cuda:1"), torch.bfloat16) and len(taken) == 1
    for device, dtype in (("gpu", None), ("cpu", "fp16"), ("cpu", "nn")):
        with pytest.raises(ValueError, match="gpu|fp16|nn"):
            cycle.settle(device, dtype)


def test_a_captioner_is_read_as_it_was_saved(captioner, tmp_path):
    """Its size of picture too; and from a processor as transformers 5 saves it."""
    other = captioners.Captioner(captioner.model, captioner.tokenizer, captioner.processor)
    other.side = 16
    other.save(tmp_path)
    assert captioners.Captioner.load(tmp_path, "cpu").pixels(torch.rand(1, 3, 40, 60)).shape == (1, 3, 16, 16)
    own = tmp_path / "preprocessor_config.json"
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(own.read_text())}))
    own.unlink()
    found = captioners.Captioner.load(tmp_path, "cpu")
    assert found.pixels(torch.rand(1, 3, 40, 60)).shape == (1, 3, 16, 16) and torch.equal(found.mean, captioner.mean)


# ---------------------------------------------------------------- the conversations
def test_image_text_image(captioner, generator, images):
    likeness = {"pixel": lambda a, b: -(a - b).square().mean((1, 2, 3))}
    talk = cycle.image_text_image(captioner, generator, images[:3], 4, likeness, seed=1, draw={"steps": 4})
    assert [len(row) for row in talk.captions] == [4] * 3 and talk.images.shape == (3, 4, 3, 32, 32)
    for b in range(3):
        by_hand = sorted(range(4), key=lambda j: float((talk.images[b, j] - images[b]).square().mean()))
        assert talk.order["pixel"][b].tolist() == by_hand
        expected = generator.draw(talk.captions[b], items=[b] * 4, seed=1, steps=4)
        assert (talk.images[b] - expected).abs().max() < 1e-4   # the caption beside a picture is what it was drawn from
    again = captioner.likelihood(images[:1].repeat(4, 1, 1, 1), talk.captions[0])
    assert torch.allclose(talk.likelihood[0], again, atol=1e-3)


def test_text_image_text(captioner, generator):
    texts = [CAPTION, "a large blue ring at night"]
    talk = cycle.text_image_text(captioner, generator, texts, 3, {"words": lambda a, b: torch.tensor(
        [len(set(x.split()) & set(y.split())) for x, y in zip(a, b)])}, draw={"steps": 4})
    assert talk.images.shape == (2, 3, 3, 32, 32) and not torch.equal(talk.images[0, 0], talk.images[0, 1])
    assert talk.captions[1][2] == captioner.speak(talk.images[1, 2:], 1, "beam")[0][0][0]
    assert talk.scores["words"][0].tolist() == [len(set(c.split()) & set(CAPTION.split())) for c in talk.captions[0]]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is asked")
def test_freed_memory_is_kept_on_a_cpu():
    """Page faults of the same allocations: few where a model is loaded on the CPU, unless the environment objects."""
    code = ("import resource, torch, cycle; cycle.settle('cpu'); torch.set_num_threads(1)\n"
            "def faults():\n    [torch.zeros(2 ** 22) for _ in range(6)]\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "faults(); first = faults(); [faults() for _ in range(9)]; print(faults() - first)")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}

    def faults(env):
        return int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True,
                                  check=True).stdout)
    assert faults(plain) < faults(plain | {"MALLOC_TRIM_THRESHOLD_": "131072"}) / 4
