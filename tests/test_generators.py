"""The generator: the trained miniature against the plain loop; pipelines of another layout; few
steps and a small decoder."""
import re
from copy import deepcopy

import pytest
import torch
from conftest import ROOT
from layouts import BLIP2, SD14, TAESD

import cycle
import generators
from generators import Generator

CAPTION = "a small red ball on the grass"


# ---------------------------------------------------------------- drawing
def test_candidates_of_an_item_share_their_noise(generator):
    said = [CAPTION, CAPTION, "a blue ring", CAPTION]
    a = generator.draw(said, items=["x", "x", "x", "y"], steps=4)
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[0], a[2]) and not torch.equal(a[0], a[3])
    assert a.shape == (4, 3, 32, 32) and a.min() >= 0 and a.max() <= 1
    b = generator.draw(["a blue ring"], items=["x"], steps=4)
    assert (a[2] - b[0]).abs().max() < 1e-4      # what else is in the batch does not matter


def test_draw_is_the_plain_loop(generator):
    """Against denoising written out: one UNet call per half, guidance, the scheduler's own step."""
    x = torch.randn(1, 8, 8, 8, generator=cycle.chance("draw", 5, "x"))
    scheduler = deepcopy(generator.scheduler)
    scheduler.set_timesteps(6)
    with torch.no_grad():
        no = generator.states([""])
        yes = generator.states([CAPTION])
        for t in scheduler.timesteps:
            a = generator.predict(x, t, no)
            b = generator.predict(x, t, yes)
            x = scheduler.step(a + 7.5 * (b - a), t, x).prev_sample
        expected = generator.decode(x).clamp(0, 1)
    found = generator.draw([CAPTION], items=["x"], seed=5, steps=6)
    assert (found - expected).abs().max() < 1e-4


def test_both_guidance_halves_in_one_call(generator):
    sizes = []
    hook = generator.unet.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    generator.draw([CAPTION] * 5, steps=3, batch=5)
    hook.remove()
    assert sizes == [10] * 3


def test_prompts_over_the_encoders_length_are_counted(generator):
    assert generator.too_long([CAPTION, CAPTION * 6, "a"]) == [False, True, False]


# ---------------------------------------------------------------- its parts
def test_encode_and_decode(generator, images):
    mean, std = generator.encode(images)
    assert mean.shape == std.shape == (6, 8, 8, 8) and .5 < mean.std() < 2 and (std > 0).all()
    again = generator.decode(mean)
    other = (images - images.roll(1, 0)).square().mean()
    assert (again - images).square().mean() < .005 < other
    # (1, 3, 32, 64): the middle is what the generator sees
    wide = torch.nn.functional.pad(images[:1], (16, 16, 0, 0))
    assert torch.allclose(generator.encode(wide)[0], mean[:1], atol=1e-4)


# ---------------------------------------------------------------- others
def test_a_pipeline_of_another_layout_can_draw(tmp_path):
    """A small random SDXL, as any directory that diffusers knows."""
    import diffusers
    import transformers
    torch.manual_seed(0)
    place = generators.GENERATORS["miniature"] / "tokenizer"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(place)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, projection_dim=32,
        eos_token_id=tokenizer.eos_token_id)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)
    one = transformers.CLIPTextModel(config)
    two = transformers.CLIPTextModelWithProjection(config)
    pipe = diffusers.StableDiffusionXLPipeline(vae, one, two, tokenizer, tokenizer, unet,
                                               diffusers.DDIMScheduler(), add_watermarker=False)
    pipe.save_pretrained(tmp_path)
    found = Generator.load(str(tmp_path), "cpu")
    a = found.draw([CAPTION, CAPTION], items=[1, 2], steps=2)
    assert a.shape == (2, 3, 16, 16) and not torch.equal(a[0], a[1])
    assert not found.denoises


def test_stable_diffusion_denoises(generator, layouts):
    assert generator.denoises and generator.side == 32
    assert Generator.load(layouts / SD14, "cpu").denoises


def test_a_model_from_a_file(tmp_path, captioner, images):
    """The GAN-like toy of the README, as it stands there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(# gan.py.*?)```", readme, re.S).group(1)
    (tmp_path / "gan.py").write_text(code)
    gan = Generator.load(f"{tmp_path / 'gan.py'}:load")
    pixel = {"pixel": lambda a, b: -(a - b).square().mean((1, 2, 3))}
    talk = cycle.image_text_image(captioner, gan, images[:2], 3, pixel)
    assert talk.images.shape == (2, 3, 3, 32, 32)
    assert len(set(talk.scores["pixel"][0].tolist())) > 1


# ---------------------------------------------------------------- few steps, a small decoder
def test_few_steps_draw_nearly_the_same(generator):
    """DPM-Solver++ in 10 steps from the same noise: near the 50 steps of the checkpoint's own
    solver."""
    said = ["a red ring", "a blue box at night"]
    own = generator.draw(said, items=[0, 1], steps=50)
    quick = generators.few_steps(Generator.load("miniature", "cpu"))
    few = quick.draw(said, items=[0, 1], steps=10)
    other = generator.draw(said, items=[2, 3], steps=50)
    assert (few - own).square().mean() < .5 * (other - own).square().mean()


def test_distilled_checkpoints_keep_their_solver():
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
    generator = Generator.load("miniature", "cpu")
    own = generator.pipe.scheduler
    trailing = EulerDiscreteScheduler(timestep_spacing="trailing")
    plain = EulerDiscreteScheduler()
    cases = (LCMScheduler(), True), (trailing, True), (plain, False), (own, False)
    for scheduler, keeps in cases:
        generator.pipe.scheduler = scheduler
        generators.few_steps(generator)
        assert (generator.pipe.scheduler is scheduler) == keeps
        assert keeps or isinstance(generator.pipe.scheduler, DPMSolverMultistepScheduler)


def test_a_tiny_decoder_is_the_libraries(layouts):
    from diffusers import AutoencoderTiny
    generator = Generator.load(layouts / SD14, "cpu")
    generator.decoder = generators.tiny_vae(layouts / TAESD, generator)
    theirs = AutoencoderTiny.from_pretrained(layouts / TAESD, low_cpu_mem_usage=False)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    found = generator.decode(x)
    assert torch.allclose(found, theirs.decode(x).sample / 2 + .5, atol=1e-6)
    found.sum().backward()
    assert x.grad.abs().sum() > 0                # gradients pass, and none is kept by the weights


@pytest.mark.parametrize("name, word", [(TAESD, "4 latent channels, the generator has 8"),
                                        (BLIP2, "could not be loaded")])
def test_a_decoder_that_does_not_fit_is_named(generator, layouts, name, word):
    with pytest.raises(ValueError, match=word) as e:
        generators.tiny_vae(layouts / name, generator)
    assert "\n" not in str(e.value) and str(layouts / name) in str(e.value)
