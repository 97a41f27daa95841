"""Draws the miniature's data and trains its models from scratch, into `miniature/`.

    python -m miniature.train                     # everything; resumes where it was killed
    python -m miniature.train --parts vae unet    # some parts, in this order
    python -m miniature.train --parts splits --out set --count 500    # 500 pictures a domain

Each part is a stock class trained on pictures and captions of world.py, saved as an ordinary
Hugging Face directory in half precision: about two hours in all on two cores, best as two processes
of one thread. A GPU is used where there is one; bf16 autocast where it is fast.
"""
import contextlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import script
from miniature import world
from miniature.material import (
    LENGTH,
    PROMPT,
    dense,
    dense_head,
    dense_of,
    latents_of,
    make_splits,
    make_tokenizers,
    normalise,
    pick,
    pool,
    tokens,
    views_of,
)

HERE = Path(__file__).resolve().parent
PARTS = ("data", "tokenizers", "reader", "vae", "unet", "blip", "clip", "dino", "sbert", "splits")
STEPS = dict(reader=3000, vae=1500, unet=16000, blip=1500, clip=1500, dino=1000, sbert=1200)
HALF = ([.5] * 3, [.5] * 3)                      # mean and standard deviation that pixels get
CLIP = ([.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711])


def flags(argv=None):
    p = script.Parser(__doc__)
    p.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what, in this order")
    p.add_argument("--out", type=Path, default=HERE, help="where the directories go")
    p.add_argument("--work", type=Path, default=HERE.parent / "runs/miniature",
                   help="pictures and unfinished training")
    p.add_argument("--scale", type=float, default=1.0, help="of pictures and steps; tests: 0.001")
    p.add_argument("--threads", type=int, default=1, help="processor threads of this process")
    p.add_argument("--count", type=int, help="pictures a split in `splits`; default as shipped")
    return p.parse_args(argv)


# ---------------------------------------------------------------- the loop, one for all parts
def train(name, modules, loss, steps, work, lr=1e-3, warm=200, decay=.4, average=.998, every=500):
    """Minimise loss(step) over the modules' parameters, and leave their running average in place.

    Resumes from work/name.safetensors: noise and batches are functions of (name, step), so a killed
    run ends where a whole one does.
    """
    params = {}
    for i, module in enumerate(modules):
        for key, p in module.named_parameters():
            if p.requires_grad:
                params[f"{i}.{key}"] = p
    averages = {k: p.detach().clone() for k, p in params.items()}
    adam = torch.optim.AdamW(params.values(), lr=lr, betas=(.9, .98), weight_decay=.01)
    path = work / f"{name}.safetensors"
    start = resume(path, params, averages, adam)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    mean = None
    for step in bar:
        rise = min(1, (step + 1) / warm)
        fall = min(1, (1 - step / steps) / decay + .02)
        for group in adam.param_groups:
            group["lr"] = lr * rise * fall
        with precision():
            value = loss(step)
        adam.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        if not math.isfinite(norm):
            raise ValueError(f"{name} broke at step {step} (gradient norm {norm})")
        adam.step()
        keep = min(average, (step + 1) / (step + 10))
        now = [p.detach() for p in params.values()]
        torch._foreach_lerp_(list(averages.values()), now, 1 - keep)
        value = value.item()
        mean = value if mean is None else .98 * mean + .02 * value
        done = step + 1
        if done % every == 0 or done == steps:
            save(path, done, params, averages, adam)
            print(json.dumps({"part": name, "step": done, "loss": round(mean, 5)}), flush=True)
    for k, p in params.items():
        p.data.copy_(averages[k])
    for module in modules:
        module.eval()


def save(path, step, params, averages, adam):
    """The whole state of a training: parameters, their averages, the optimizer's two moments."""
    state = {"step": torch.tensor(step)}
    for k, p in params.items():
        state[f"p.{k}"] = p.data
        state[f"a.{k}"] = averages[k]
        state[f"m.{k}"] = adam.state[p]["exp_avg"]
        state[f"v.{k}"] = adam.state[p]["exp_avg_sq"]
    save_file(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def resume(path, params, averages, adam):
    """The steps that are done; what `save` wrote is put back where it was."""
    if not path.exists():
        return 0
    state = load_file(path)
    step = int(state["step"])
    for k, p in params.items():
        p.data.copy_(state[f"p.{k}"])
        averages[k].copy_(state[f"a.{k}"])
        moments = {"exp_avg": state[f"m.{k}"], "exp_avg_sq": state[f"v.{k}"]}
        adam.state[p] = {name: v.to(p.device) for name, v in moments.items()}
        adam.state[p]["step"] = torch.tensor(float(step), device="cpu")
    return step


def precision():
    """bf16 autocast where it is fast, with plain attention on a CPU (the fused one is slow)."""
    stack = contextlib.ExitStack()
    device = torch.get_default_device().type
    if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        stack.enter_context(torch.autocast(device, torch.bfloat16))
    if device == "cpu":
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def chance(*key):
    """A torch generator, on the device in use, that is a function of its key alone."""
    words = [int.from_bytes(str(k).encode()[:8].ljust(8), "little") for k in key]
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


# ---------------------------------------------------------------- the reader of pictures
def make_reader(data, out, work, steps):
    model = world.reader()

    def loss(step):
        g = chance("reader", step)
        rows, x = data.batch(g, 64)
        # made worse, so that soft drawings can be read as well: blur, contrast, light, noise
        share, gain, shift, noise = torch.rand(4, 64, 1, 1, 1, generator=g)
        soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, soft, share)
        x = x * (.85 + .3 * gain) + .16 * (shift - .5)
        x = x + .08 * noise * torch.randn(x.shape, generator=g)
        return dense(model(x), data.labels[rows])
    train("reader", [model], loss, steps, work, 2e-3)
    (out / "reader").mkdir(parents=True, exist_ok=True)
    save_file(model.half().state_dict(), out / "reader/model.safetensors")


# ---------------------------------------------------------------- the generator
def make_vae(data, out, work, steps):
    from diffusers import AutoencoderKL
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96), layers_per_block=1, latent_channels=8, norm_num_groups=16,
        sample_size=32, mid_block_add_attention=False)

    def loss(step):
        g = chance("vae", step)
        x = data.batch(g, 48)[1] * 2 - 1
        q = vae.encode(x).latent_dist
        noise = torch.empty_like(q.mean).normal_(generator=g)
        y = vae.decode(q.mean + q.std * noise).sample
        return picture_loss(y, x, 1) + 5e-4 * q.kl().float().mean() / 512
    train("vae", [vae], loss, steps, work, 2e-3)
    with torch.no_grad():
        z = vae.encode(data.images[:2000].float() / 127.5 - 1).latent_dist
    scale = round(1 / z.sample().std().item(), 4)
    vae.register_to_config(scaling_factor=scale)
    print(json.dumps({"scaling_factor": scale, "std": z.std.mean().item()}), flush=True)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def polish(step):                            # the decoder alone, objects counting four times
        g = chance("decoder", step)
        rows, x = data.batch(g, 48)
        x = x * 2 - 1
        weight = F.interpolate(1 + 3 * (data.labels[rows, :1] > 0).float(), scale_factor=4)
        with torch.no_grad():
            q = vae.encode(x).latent_dist
        y = vae.decode(q.mean + q.std * torch.randn(q.mean.shape, generator=g)).sample
        return picture_loss(y, x, weight)
    train("decoder", [vae], polish, steps, work, 1.5e-3)
    vae.half().save_pretrained(out / "sd/vae")


def picture_loss(y, x, weight):
    """How far pictures y are from x: absolute and squared differences, and those of edges."""
    d = (y.float() - x) * weight
    rows = (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    columns = (d[..., 1:] - d[..., :-1]).abs().mean()
    return d.abs().mean() + d.square().mean() + .5 * (rows + columns)


def make_unet(data, out, work, steps):
    """UNet and text encoder, trained together; saved as a pipeline with the VAE."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    vae = diffusers.AutoencoderKL.from_pretrained(out / "sd/vae", dtype=torch.float32)
    vae = vae.to(data.images.device)
    tokenizer = CLIPTokenizer.from_pretrained(out / "sd/tokenizer")
    latents = latents_of(vae, data.images, work / "latents.safetensors")
    ids, mask = tokens(tokenizer, data.captions)
    empty = torch.tensor(tokenizer("", padding="max_length", max_length=LENGTH).input_ids)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=128,
        **special_ids(tokenizer)))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, block_out_channels=(96, 128),
        layers_per_block=1, norm_num_groups=16, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=128, attention_head_dim=4)
    scheduler = diffusers.DDIMScheduler(
        beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction")

    def loss(step):
        g = chance("unet", step)
        rows = torch.randint(len(latents), (64,), generator=g)
        mean, log_variance = latents[rows].float().chunk(2, 1)              # (64, 8, 8, 8) each
        z = mean + (.5 * log_variance).exp() * torch.randn(mean.shape, generator=g)
        z = z * vae.config.scaling_factor
        words = pick(ids, mask, rows, g)[0]                                 # (64, 24)
        words[torch.rand(64, generator=g) < .1] = empty
        noise = torch.randn(z.shape, generator=g)
        t = torch.randint(1000, (64,), generator=g)
        states = text_encoder(words).last_hidden_state                      # (64, 24, 128)
        out = unet(scheduler.add_noise(z, noise, t), t, states).sample.float()
        return F.mse_loss(out, scheduler.get_velocity(z, noise, t))
    train("unet", [unet, text_encoder], loss, steps, work, 1.2e-3, average=.999)
    pipe = diffusers.StableDiffusionPipeline(
        vae.half(), text_encoder.half(), tokenizer, unet.half(), scheduler, None, None,
        requires_safety_checker=False)
    pipe.save_pretrained(out / "sd")


def special_ids(tokenizer):
    return dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)


# ---------------------------------------------------------------- the captioner
def make_blip(data, out, work, steps):
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
    tokenizer = BertTokenizer.from_pretrained(out / "blip")
    begin = len(tokenizer)                       # [DEC], as BLIP's own vocabulary is extended
    ids, mask = tokens(tokenizer, data.captions, PROMPT)
    ids[..., 0] = begin
    prompt = len(tokenizer(PROMPT).input_ids) - 1
    size = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4)
    vision = dict(num_hidden_layers=4, image_size=32, patch_size=4, initializer_range=.02)
    text = dict(num_hidden_layers=2, vocab_size=begin + 2, encoder_hidden_size=128,
                max_position_embeddings=40, bos_token_id=begin, eos_token_id=3,
                sep_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
                label_smoothing=0.0)
    model = BlipForConditionalGeneration(BlipConfig(
        vision_config=size | vision, text_config=size | text, projection_dim=128,
        image_text_hidden_size=128))
    head = dense_head(128)

    def loss(step):
        g = chance("blip", step)
        rows, x = data.batch(g, 48)
        patches = model.vision_model(normalise(x, *CLIP)).last_hidden_state     # (48, 65, 128)
        words, real = pick(ids, mask, rows, g)                                  # (48, 24)
        targets = words.masked_fill(~real, -100)
        targets[:, :prompt] = -100
        said = model.text_decoder(input_ids=words, attention_mask=real.long(),
                                  encoder_hidden_states=patches, labels=targets)
        return said.loss.mean() + .3 * dense_of(head, patches, data.labels[rows])
    train("blip", [model, head], loss, steps, work)
    model.half().save_pretrained(out / "blip")
    save_processor(out / "blip", "BlipImageProcessor", CLIP, processor_class="BlipProcessor")


def save_processor(folder, kind, norm, size=None, **more):
    """preprocessor_config.json as the hub's checkpoints of this class have it."""
    row = dict(do_convert_rgb=True, do_normalize=True, do_rescale=True, do_resize=True,
               image_mean=norm[0], image_std=norm[1], image_processor_type=kind, resample=3,
               rescale_factor=1 / 255, size=size or {"height": 32, "width": 32}, **more)
    (folder / "preprocessor_config.json").write_text(json.dumps(row, indent=2) + "\n")


# ---------------------------------------------------------------- the judges
def make_clip(data, out, work, steps):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(out / "clip")
    ids, mask = tokens(tokenizer, data.captions)
    size = dict(hidden_size=96, intermediate_size=288, num_attention_heads=4)
    text = dict(num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=LENGTH,
                **special_ids(tokenizer))
    vision = dict(num_hidden_layers=3, image_size=32, patch_size=4)
    model = CLIPModel(CLIPConfig(text_config=size | text, vision_config=size | vision,
                                 projection_dim=64))
    head = dense_head(96)

    def loss(step):
        g = chance("clip", step)
        rows, x = data.batch(g, 96)
        seen = model.vision_model(normalise(x, *CLIP))
        words, real = pick(ids, mask, rows, g)                                  # (96, 24)
        said = model.text_model(words, attention_mask=real.long())
        a = F.normalize(model.visual_projection(seen.pooler_output).float(), dim=-1)    # (96, 64)
        b = F.normalize(model.text_projection(said.pooler_output).float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * a @ b.T
        same = torch.arange(len(a))
        contrast = F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)
        return .5 * contrast + .5 * dense_of(head, seen.last_hidden_state, data.labels[rows])
    train("clip", [model, head], loss, steps, work)
    model.half().save_pretrained(out / "clip")
    save_processor(out / "clip", "CLIPImageProcessor", CLIP, {"shortest_edge": 32},
                   do_center_crop=True, crop_size={"height": 32, "width": 32})


def make_dino(data, out, work, steps):
    """A ViT that never saw a word: two drawings of one scene should be encoded alike (VICReg)."""
    from transformers import ViTConfig, ViTModel
    views = views_of(min(20_000, len(data.images)), work / "views.safetensors")
    model = ViTModel(ViTConfig(
        hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4,
        image_size=32, patch_size=4), add_pooling_layer=False)
    head = dense_head(96)
    expand = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Linear(256, 256))

    def loss(step):
        g = chance("dino", step)
        rows = torch.randint(len(views), (64,), generator=g)
        x = torch.cat([data.images[rows], views[rows]]).float() / 255
        states = model(normalise(x, *HALF)).last_hidden_state               # (128, 65, 96)
        a, b = expand(states[:, 0]).float().chunk(2)                        # (64, 256) each
        alike = F.mse_loss(a, b) + .5 * (spread(a) + spread(b)) + .04 * (mixed(a) + mixed(b))
        return alike + .5 * dense_of(head, states[:64], data.labels[rows])
    train("dino", [model, head, expand], loss, steps, work)
    model.half().save_pretrained(out / "dino")
    save_processor(out / "dino", "ViTImageProcessor", HALF)


def spread(z):
    """How far standard deviations over the batch stay below one (Bardes et al. 2022, Eq. 1)."""
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def mixed(z):
    """How much the dimensions tell of each other: squared covariances, a dimension."""
    z = z - z.mean(0)
    covariance = z.T.mm(z).div(63).fill_diagonal_(0)
    return covariance.square().sum() / 256


def make_sbert(data, out, work, steps):
    """A sentence encoder: two captions of one scene should be encoded alike, as SBERT's are."""
    from transformers import BertConfig, BertModel, BertTokenizer
    tokenizer = BertTokenizer.from_pretrained(out / "blip")
    ids, mask = tokens(tokenizer, data.captions)
    model = BertModel(BertConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=288, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=40), add_pooling_layer=False)

    def encode(words, real):
        states = model(words, attention_mask=real.long()).last_hidden_state.float()
        mean = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)                                    # (96, 96)

    def loss(step):
        g = chance("sbert", step)
        rows = torch.randint(len(ids), (96,), generator=g)
        a = encode(*pick(ids, mask, rows, g))
        b = encode(*pick(ids, mask, rows, g))
        return F.cross_entropy(20 * a @ b.T, torch.arange(len(a)))
    train("sbert", [model], loss, steps, work)
    model.half().save_pretrained(out / "sbert")
    tokenizer.save_pretrained(out / "sbert")


# ---------------------------------------------------------------- what runs
MODELS = {"reader": make_reader, "vae": make_vae, "unet": make_unet, "blip": make_blip,
          "clip": make_clip, "dino": make_dino, "sbert": make_sbert}


def main(args):
    torch.set_num_threads(args.threads)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    args.work.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        torch.manual_seed(0)                     # initial weights do not hang on other parts
        if part == "splits":
            make_splits(args.out / "data", args.count)
        elif part == "data":
            pool("all", args.work, args.scale)
            pool("train", args.work, args.scale)
        elif part == "tokenizers":
            make_tokenizers(pool("all", args.work, args.scale).captions, args.out)
        else:
            drawn = pool("train" if part == "blip" else "all", args.work, args.scale)
            steps = max(2, int(STEPS[part] * args.scale))
            MODELS[part](drawn, args.out, args.work, steps)
    return 0


if __name__ == "__main__":
    script.run(main, flags)
