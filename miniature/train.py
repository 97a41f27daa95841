"""Draws the miniature data and trains the miniature models from scratch, into `miniature/` (what is shipped there).

    python -m miniature.train                     # everything; resumes where it was killed
    python -m miniature.train --parts vae unet    # some parts, in this order (two processes use two cores best)
    python -m miniature.train --parts splits --out set --count 500    # a larger set: 500 pictures a domain
    python -m miniature.train --check             # measures the shipped models on held-out scenes

Each part is a stock class trained on pictures and captions of world.py, saved as an ordinary Hugging Face directory in
half precision. A GPU is used where there is one; bf16 autocast where the processor or GPU has units for it.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

from miniature import world

HERE = Path(__file__).resolve().parent.parent
PARTS = ("data", "tokenizers", "reader", "vae", "unet", "blip", "clip", "dino", "sbert", "splits")
PROMPT = "a picture of "                     # BLIP's, in training and in use
STEPS = {"reader": 3000, "vae": 1500, "unet": 16000, "blip": 1500, "clip": 1500, "dino": 1000, "sbert": 1200}
POOL = {"all": 80_000, "train": 60_000}
SHIPPED = {"val": 100, "test": 150, "near": 150, "out": 150}
NORM = {"blip": ([.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711]), "dino": ([.5] * 3, [.5] * 3)}
NORM["clip"] = NORM["blip"]


def flags(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to train, in order")
    p.add_argument("--out", type=Path, default=HERE / "miniature", help="where the directories go")
    p.add_argument("--work", type=Path, default=HERE / "runs" / "miniature", help="pictures and unfinished training")
    p.add_argument("--scale", type=float, default=1.0, help="factor on pictures and training steps; tests use 0.002")
    p.add_argument("--threads", type=int, default=1, help="processor threads of this process")
    p.add_argument("--check", action="store_true", help="measure what is in --out instead of training")
    p.add_argument("--count", type=int, help="pictures a split in `splits`; default what is shipped")
    p.add_argument("--scenes", type=int, default=300, help="held-out scenes a domain for --check")
    p.add_argument("--steps", type=int, default=50, help="denoising steps for --check")
    p.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance for --check")
    return p.parse_args(argv)


# ---------------------------------------------------------------- the training loop, one for all parts
def train(name, modules, loss, steps, work, lr, warm=200, decay=.4, average=.998, every=500):
    """Minimise loss(step) over the modules' parameters, and leave their running average in place. Resumes from
    work/name.safetensors: noise and batches are functions of (name, step), so a killed run ends where a whole one does.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm
    params = {f"{i}.{k}": p for i, m in enumerate(modules) for k, p in m.named_parameters() if p.requires_grad}
    slow = {k: p.detach().clone() for k, p in params.items()}
    adam = torch.optim.AdamW(params.values(), lr=lr, betas=(.9, .98), weight_decay=.01)
    path, start = work / f"{name}.safetensors", 0
    if path.exists():
        saved = load_file(path)
        start = int(saved["step"])
        for k, p in params.items():
            p.data.copy_(saved[f"p.{k}"])
            slow[k].copy_(saved[f"a.{k}"])
            adam.state[p] = {"step": torch.tensor(float(start), device="cpu"), "exp_avg": saved[f"m.{k}"].to(p.device),
                             "exp_avg_sq": saved[f"v.{k}"].to(p.device)}
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    mean = None
    for step in bar:
        rate = lr * min(1, (step + 1) / warm) * min(1, (1 - step / steps) / decay + .02)
        for group in adam.param_groups:
            group["lr"] = rate
        with precision():
            value = loss(step)
        adam.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        if not math.isfinite(norm):
            sys.exit(f"miniature.py: {name} broke at step {step} (gradient norm {norm})")
        adam.step()
        a = min(average, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(slow.values()), [p.detach() for p in params.values()], 1 - a)
        mean = value.item() if mean is None else .98 * mean + .02 * value.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if (step + 1) % every == 0 and step + 1 < steps or step + 1 == steps:
            state = {"step": torch.tensor(step + 1)}
            for k, p in params.items():
                s = adam.state[p]
                state |= {f"p.{k}": p.data, f"a.{k}": slow[k], f"m.{k}": s["exp_avg"], f"v.{k}": s["exp_avg_sq"]}
            save_file(state, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
            print(json.dumps({"part": name, "step": step + 1, "loss": round(mean, 5), "time": round(time.time())}),
                  flush=True)
    for k, p in params.items():
        p.data.copy_(slow[k])
    for m in modules:
        m.eval()


def precision():
    """bf16 autocast where it is fast, with plain attention (the fused kernel's backward is slow on a CPU)."""
    import contextlib

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    stack, kind = contextlib.ExitStack(), torch.get_default_device().type
    if kind == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        stack.enter_context(torch.autocast(kind, torch.bfloat16))
    if kind == "cpu":
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def chance(*key):
    """A torch generator, on the device in use, that is a function of its key alone (words and numbers)."""
    import torch
    words = [int.from_bytes(str(k).encode()[:8].ljust(8), "little") for k in key]
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def load(path):
    """The tensors of a safetensors file, on the device in use."""
    import torch
    from safetensors.torch import load_file
    return load_file(path, device=str(torch.get_default_device()))


# ---------------------------------------------------------------- data
def pool(split, work):
    """The drawn pool of a split: pictures (N, 3, 32, 32) uint8, labels (N, 4, 8, 8) uint8, five captions each."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm
    path = work / f"pool_{split}.safetensors"
    if not path.exists():
        scenes = [world.sample(split, i) for i in tqdm(range(POOL[split]), desc=f"scenes of {split}", mininterval=5)]
        images = torch.from_numpy(np.stack([world.draw(s) for s in tqdm(scenes, desc="pictures", mininterval=5)]))
        labels = torch.from_numpy(np.stack([world.grid(s) for s in scenes]).astype(np.uint8))
        texts = [world.captions(s) for s in scenes]
        path.with_suffix(".json").write_text(json.dumps(texts))
        save_file({"images": images.permute(0, 3, 1, 2).contiguous(), "labels": labels}, path)
    data = load(path)
    return data["images"], data["labels"], json.loads(path.with_suffix(".json").read_text())


def batch(images, generator, size):
    """Random rows of a pool and their pictures, float (B, 3, 32, 32) in [0, 1]."""
    import torch
    rows = torch.randint(len(images), (size,), generator=generator)
    return rows, images[rows].float() / 255


def normalise(x, name):
    import torch
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORM[name])
    return (x - mean) / std


def tokens(tokenizer, texts, length):
    """All captions as one array (N, 5, length) of ids, padded; and the mask of what is no padding."""
    import torch
    device = torch.get_default_device()
    flat = tokenizer([t for five in texts for t in five], padding="max_length", max_length=length, truncation=True,
                     return_tensors="pt")
    return tuple(x.view(len(texts), 5, length).to(device) for x in (flat.input_ids, flat.attention_mask.bool()))


def pick(ids, mask, rows, generator):
    """One of the five captions of each row: ids and mask (B, length)."""
    import torch
    which = torch.randint(5, (len(rows),), generator=generator)
    return ids[rows, which], mask[rows, which]


# ---------------------------------------------------------------- two different tokenizers
def make_tokenizers(out, work):
    """A WordPiece of 200 for the captioner, a byte-pair encoding of 645 for the generator, from the same captions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer, CLIPTokenizer
    lines = [c for five in pool("all", work)[2][:20_000] for c in five]
    piece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    piece.normalizer, piece.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    piece.train_from_iterator([PROMPT + line for line in lines], trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    bert = BertTokenizer(vocab=piece.get_vocab(), do_lower_case=True, model_max_length=40)
    bert.save_pretrained(out / "blip")
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=405, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) for m in trained["merges"]]
    words = sorted(alphabet) + sorted(a + "</w>" for a in alphabet)          # the order of CLIP's own vocabulary
    words += ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=24, pad_token="<|endoftext|>")
    for name in ("sd/tokenizer", "clip"):
        clip.save_pretrained(out / name)
    text = "a tiny turquoise wedge beneath a huge violet hoop on checkered tiles"
    print(len(bert), bert.tokenize(text), len(clip), clip.tokenize(text), flush=True)


# ---------------------------------------------------------------- what every picture model also learns
def dense(logits, labels):
    """Cross-entropy of shape, colour, size and ground under each cell. logits (B, 25, 8, 8), labels (B, 4, 8, 8).

    A stand-in for large-scale vision pretraining: from captions alone a small ViT does not learn to see shapes."""
    import torch.nn.functional as F
    parts = logits.float().split(world.HEADS, 1)
    return sum(F.cross_entropy(part, labels[:, i].long()) for i, part in enumerate(parts))


def dense_head(width):
    import torch
    return torch.nn.Linear(width, sum(world.HEADS))


def cells(head, patches):
    """Logits under each cell from a ViT's patch tokens (B, 64, D) -> (B, 25, 8, 8)."""
    return head(patches).transpose(1, 2).unflatten(2, (8, 8))


# ---------------------------------------------------------------- the parts
def make_reader(out, work, steps):
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file
    images, labels, _ = pool("all", work)
    model = world.reader()

    def loss(step):
        g = chance("reader", step)
        rows, x = batch(images, g, 64)                         # made worse, so that soft drawings can be read as well:
        share, gain, shift, noise = torch.rand(4, 64, 1, 1, 1, generator=g)
        x = torch.lerp(x, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), share)  # blur
        x = x * (.85 + .3 * gain) + .16 * (shift - .5)           # contrast, light
        x = x + .08 * noise * torch.randn(x.shape, generator=g)
        return dense(model(x), labels[rows])
    train("reader", [model], loss, steps, work, 2e-3)
    (out / "reader").mkdir(parents=True, exist_ok=True)
    save_file(model.half().state_dict(), out / "reader" / "model.safetensors")


# ---------------------------------------------------------------- the generator: VAE, then UNet with text encoder
def make_vae(out, work, steps):
    import torch
    import torch.nn.functional as F
    from diffusers import AutoencoderKL
    images, labels, _ = pool("all", work)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                        block_out_channels=(32, 64, 96), layers_per_block=1, latent_channels=8, norm_num_groups=16,
                        sample_size=32, mid_block_add_attention=False)

    def error(y, x, weight):
        d = (y.float() - x) * weight
        edges = (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()
        return d.abs().mean() + d.square().mean() + .5 * edges

    def loss(step):
        g = chance("vae", step)
        x = batch(images, g, 48)[1] * 2 - 1
        q = vae.encode(x).latent_dist
        y = vae.decode(q.mean + q.std * q.mean.new_empty(q.mean.shape).normal_(generator=g)).sample
        return error(y, x, 1) + 5e-4 * q.kl().float().mean() / q.mean[0].numel()
    train("vae", [vae], loss, steps, work, 2e-3)
    with torch.no_grad():
        z = vae.encode(images[:2000].float() / 127.5 - 1).latent_dist
    vae.register_to_config(scaling_factor=round(1 / z.sample().std().item(), 4))
    print(json.dumps({"scaling_factor": vae.config.scaling_factor, "std": z.std.mean().item()}), flush=True)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def polish(step):                                           # the decoder alone, objects counting four times
        g = chance("decoder", step)
        rows, x = batch(images, g, 48)
        x, weight = x * 2 - 1, F.interpolate(1 + 3 * (labels[rows, :1] > 0).float(), scale_factor=4)
        with torch.no_grad():
            q = vae.encode(x).latent_dist
        y = vae.decode(q.mean + q.std * torch.randn(q.mean.shape, generator=g)).sample
        return error(y, x, weight)
    train("decoder", [vae], polish, steps, work, 1.5e-3)
    vae.half().save_pretrained(out / "sd" / "vae")


def make_unet(out, work, steps):
    import torch
    import torch.nn.functional as F
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    images, _, texts = pool("all", work)
    vae = AutoencoderKL.from_pretrained(out / "sd" / "vae", dtype=torch.float32)
    vae = vae.to(images.device)
    tokenizer = CLIPTokenizer.from_pretrained(out / "sd" / "tokenizer")
    if not (work / "latents.safetensors").exists():
        with torch.no_grad():
            made = [vae.encode(x.float() / 127.5 - 1).latent_dist.parameters.half() for x in images.split(500)]
        save_file({"latents": torch.cat(made)}, work / "latents.safetensors")
    latents = load(work / "latents.safetensors")["latents"]             # (N, 16, 8, 8) mean, log variance
    ids, mask = tokens(tokenizer, texts, 24)
    empty = tokenizer("", padding="max_length", max_length=24, return_tensors="pt").input_ids[0].to(ids.device)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, projection_dim=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, block_out_channels=(96, 128), layers_per_block=1,
        norm_num_groups=16, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=128, attention_head_dim=4)
    scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction")

    def loss(step):
        g = chance("unet", step)
        rows = torch.randint(len(latents), (64,), generator=g)
        mean, var = latents[rows].float().chunk(2, 1)
        z = (mean + (.5 * var).exp() * torch.randn(mean.shape, generator=g)) * vae.config.scaling_factor
        words = pick(ids, mask, rows, g)[0]
        words[torch.rand(64, generator=g) < .1] = empty
        eps, t = torch.randn(z.shape, generator=g), torch.randint(1000, (64,), generator=g)
        states = text_encoder(words).last_hidden_state
        v = unet(scheduler.add_noise(z, eps, t), t, states).sample.float()
        return F.mse_loss(v, scheduler.get_velocity(z, eps, t))
    train("unet", [unet, text_encoder], loss, steps, work, 1.2e-3, average=.999)
    StableDiffusionPipeline(vae.half(), text_encoder.half(), tokenizer, unet.half(), scheduler, None, None,
                            requires_safety_checker=False).save_pretrained(out / "sd")


# ---------------------------------------------------------------- the captioner
def make_blip(out, work, steps):
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
    images, labels, texts = pool("train", work)
    tokenizer = BertTokenizer.from_pretrained(out / "blip")
    words = len(tokenizer)
    ids, mask = tokens(tokenizer, [[PROMPT + t for t in five] for five in texts], 24)
    ids[..., 0] = words                                         # [DEC], as BLIP's own vocabulary is extended
    prompt = len(tokenizer(PROMPT).input_ids) - 1
    config = BlipConfig(
        vision_config={"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                       "image_size": 32, "patch_size": 4, "initializer_range": .02},
        text_config={"vocab_size": words + 2, "hidden_size": 128, "encoder_hidden_size": 128, "intermediate_size": 384,
                     "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
                     "bos_token_id": words, "eos_token_id": 3, "sep_token_id": tokenizer.sep_token_id,
                     "pad_token_id": tokenizer.pad_token_id, "label_smoothing": 0.0}, projection_dim=128,
        image_text_hidden_size=128)
    model, head = BlipForConditionalGeneration(config), dense_head(128)

    def loss(step):
        g = chance("blip", step)
        rows, x = batch(images, g, 48)
        vision = model.vision_model(normalise(x, "blip")).last_hidden_state                       # (48, 65, 128)
        i, m = pick(ids, mask, rows, g)
        targets = i.masked_fill(~m, -100)
        targets[:, :prompt] = -100
        said = model.text_decoder(input_ids=i, attention_mask=m.long(), encoder_hidden_states=vision,
                                  labels=targets)
        return said.loss.mean() + .3 * dense(cells(head, vision[:, 1:]), labels[rows])
    train("blip", [model, head], loss, steps, work, 1e-3)
    model.half().save_pretrained(out / "blip")
    preprocessor(out / "blip", "blip", "BlipImageProcessor", {"height": 32, "width": 32}, "BlipProcessor")


def preprocessor(folder, name, kind, size, wrapper=None):
    """preprocessor_config.json as the hub's checkpoints of this class have it."""
    mean, std = NORM[name]
    row = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": mean,
           "image_std": std, "image_processor_type": kind, "resample": 3, "rescale_factor": 1 / 255, "size": size}
    if wrapper:
        row["processor_class"] = wrapper
    if kind == "CLIPImageProcessor":
        row |= {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(row, indent=2) + "\n")


# ---------------------------------------------------------------- the judges
def make_clip(out, work, steps):
    import torch
    import torch.nn.functional as F
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    images, labels, texts = pool("all", work)
    tokenizer = CLIPTokenizer.from_pretrained(out / "clip")
    ids, mask = tokens(tokenizer, texts, 24)
    shape = {"hidden_size": 96, "intermediate_size": 288, "num_attention_heads": 4}
    model = CLIPModel(CLIPConfig(
        text_config={**shape, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": 24,
                     "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                     "pad_token_id": tokenizer.pad_token_id},
        vision_config={**shape, "num_hidden_layers": 3, "image_size": 32, "patch_size": 4}, projection_dim=64))
    head = dense_head(96)

    def loss(step):
        g = chance("clip", step)
        rows, x = batch(images, g, 96)
        vision = model.vision_model(normalise(x, "clip"))
        i, m = pick(ids, mask, rows, g)
        a = F.normalize(model.visual_projection(vision.pooler_output).float(), dim=-1)
        text = model.text_model(i, attention_mask=m.long()).pooler_output
        b = F.normalize(model.text_projection(text).float(), dim=-1)
        logits, same = model.logit_scale.exp().clamp(max=100) * a @ b.T, torch.arange(len(a))
        return .5 * (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) + .5 * dense(
            cells(head, vision.last_hidden_state[:, 1:]), labels[rows])
    train("clip", [model, head], loss, steps, work, 1e-3)
    model.half().save_pretrained(out / "clip")
    preprocessor(out / "clip", "clip", "CLIPImageProcessor", {"shortest_edge": 32})


def make_dino(out, work, steps):
    """A ViT that never saw a word: two drawings of one scene, its objects moved and its shades changed, should be
    encoded alike (VICReg, Bardes et al. 2022, in place of DINO: no negatives)."""
    import torch
    import torch.nn.functional as F
    from transformers import ViTConfig, ViTModel
    images, labels, _ = pool("all", work)
    path = work / "views.safetensors"
    from safetensors.torch import save_file
    if not path.exists():
        views = []
        for i in range(min(20_000, len(images))):
            scene, rng = world.sample("all", i), np.random.default_rng([13, i])
            scene["seed"] = [*scene["seed"], 13]
            for o in scene["objects"]:
                o["x"], o["y"] = o["x"] + rng.uniform(-1.5, 1.5), o["y"] + rng.uniform(-1.5, 1.5)
            views.append(world.draw(scene))
        save_file({"views": torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()}, path)
    views = load(path)["views"]
    model = ViTModel(ViTConfig(hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4,
                               image_size=32, patch_size=4), add_pooling_layer=False)
    head = dense_head(96)
    expand = torch.nn.Sequential(torch.nn.Linear(96, 256), torch.nn.GELU(), torch.nn.Linear(256, 256))

    def loss(step):
        g = chance("dino", step)
        rows = torch.randint(len(views), (64,), generator=g)
        x = torch.cat([images[rows], views[rows]]).float() / 255
        h = model(normalise(x, "dino")).last_hidden_state                                # (128, 65, 96)
        a, b = expand(h[:, 0]).float().chunk(2)                                          # (64, 256) twice
        spread = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b))
        mixed = sum((z - z.mean(0)).T.mm(z - z.mean(0)).div(63).fill_diagonal_(0).square().sum() / 256 for z in (a, b))
        alike = F.mse_loss(a, b) + .5 * spread + .04 * mixed
        return alike + .5 * dense(cells(head, h[:64, 1:]), labels[rows])
    train("dino", [model, head, expand], loss, steps, work, 1e-3)
    model.half().save_pretrained(out / "dino")
    preprocessor(out / "dino", "dino", "ViTImageProcessor", {"height": 32, "width": 32})


def make_sbert(out, work, steps):
    """A sentence encoder: two captions of one scene should be encoded alike (masked mean, InfoNCE), as SBERT's are."""
    import torch
    import torch.nn.functional as F
    from transformers import BertConfig, BertModel, BertTokenizer
    _, _, texts = pool("all", work)
    tokenizer = BertTokenizer.from_pretrained(out / "blip")
    ids, mask = tokens(tokenizer, texts, 24)
    model = BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=288, num_hidden_layers=2,
                                 num_attention_heads=4, max_position_embeddings=40), add_pooling_layer=False)

    def encode(i, m):
        h = model(i, attention_mask=m.long()).last_hidden_state.float()
        return F.normalize((h * m[..., None]).sum(1) / m.sum(1, keepdim=True), dim=-1)

    def loss(step):
        g = chance("sbert", step)
        rows = torch.randint(len(ids), (96,), generator=g)
        a, b = encode(*pick(ids, mask, rows, g)), encode(*pick(ids, mask, rows, g))
        return F.cross_entropy(20 * a @ b.T, torch.arange(len(a)))
    train("sbert", [model], loss, steps, work, 1e-3)
    model.half().save_pretrained(out / "sbert")
    tokenizer.save_pretrained(out / "sbert")


# ---------------------------------------------------------------- what is shipped as pictures
def make_splits(out, work, steps):
    """Small splits as files: val and test in Karpathy's schema; in (the test pictures), near and out in NoCaps'."""
    from PIL import Image
    root, images = out / "data", {split: [] for split in SHIPPED}
    for split, count in SHIPPED.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            scene = world.sample(split, i)
            name = f"{split}/{i:04d}.png"
            Image.fromarray(world.draw(scene)).save(root / name, optimize=True)
            images[split].append((name, world.captions(scene)))
    karpathy, number = [], 0
    for split in ("val", "test"):
        for name, five in images[split]:
            sentences = [{"raw": c, "tokens": c.split(), "sentid": 5 * number + j} for j, c in enumerate(five)]
            karpathy.append({"filepath": split, "filename": Path(name).name, "imgid": number, "cocoid": number,
                             "split": split, "sentences": sentences})
            number += 1
    (root / "dataset_coco.json").write_text(json.dumps({"dataset": "miniature", "images": karpathy}))
    domains = {"test": "in-domain", "near": "near-domain", "out": "out-domain"}
    rows = [(name, five, domain) for split, domain in domains.items() for name, five in images[split]]
    (root / "nocaps_val_4500_captions.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": name, "domain": domain} for i, (name, _, domain) in enumerate(rows)],
        "annotations": [{"image_id": i, "id": 5 * i + j, "caption": c} for i, (_, five, _) in enumerate(rows)
                        for j, c in enumerate(five)]}))


# ---------------------------------------------------------------- is it good enough to mean something?
BARS = {"captioner facts, in": .90, "captioner facts, in - out": .05, "generator pairs, in": .85,
        "generator pairs, near": .85, "generator pairs, out": .85, "vae pairs": .97, "captions distinct of 10": 3.0}


def check(args):
    """Measures the models in args.out on scenes nothing was trained on, and prints each figure with its 95 % interval
    beside the bar it has to clear (and into args.work / check.json). A scene's pairs are right if all are. Returns how
    many bars were missed."""
    import torch
    from tqdm import tqdm

    import cycle
    eye = world.reader(args.out / "reader" / "model.safetensors")
    captioner, generator = cycle.Captioner.load(args.out / "blip", "cpu"), cycle.Generator.load(args.out / "sd", "cpu")
    found = {}
    for split, domain in tqdm([("test", "in"), ("near", "near"), ("out", "out")], desc="domains"):
        scenes = [world.sample(split, 10_000 + i) for i in range(args.scenes)]     # the shipped pictures are others
        images = torch.from_numpy(np.stack([world.draw(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255
        said = [c[0] for c in captioner.speak(images, 1, "beam")[0]]
        facts = np.array([world.verify(c, s) for c, s in zip(said, scenes)])                             # (N, 2)
        found[f"captioner facts, {domain}"] = facts[:, 0] / np.maximum(1, facts[:, 1])
        ten = captioner.speak(images[:100], 10)[0]
        found[f"captions distinct of 10, {domain}"] = np.array([len(set(row)) for row in ten])
        with torch.no_grad():
            redrawn = torch.cat([generator.decode(generator.encode(x)[0]) for x in images.split(100)]).clamp(0, 1)
        for name, seen in (("real", images), ("vae", redrawn)):
            found[f"{name} pairs, {domain}"] = np.array(
                [world.colour_shapes(a) == world.colour_shapes(b) for a, b in zip(world.read_back(eye, seen), scenes)])
        prompts = [world.full_caption(s) for s in scenes]
        drawn = generator.draw(prompts, seed=1, steps=args.steps, guidance=args.guidance, batch=50)
        read_back = [world.colour_shapes(s) for s in world.read_back(eye, drawn)]
        found[f"generator pairs, {domain}"] = np.array([a == world.colour_shapes(b) for a, b in zip(read_back, scenes)])
        sheet(list(images[:12]) + list(redrawn[:12]) + list(drawn[:60]), args.work / f"check_{domain}.png", 12)
        for caption, row in list(zip(prompts, read_back))[:3]:
            print(f"  {caption!r}: read back as {row}", flush=True)
    for name in ("captions distinct of 10", "real pairs", "vae pairs"):
        found[name] = np.concatenate([found[f"{name}, {d}"] for d in ("in", "near", "out")])
    rng, figures = np.random.default_rng(0), {}
    for name, v in found.items():
        means = v[rng.integers(len(v), size=(1000, len(v)))].mean(1)
        figures[name] = (float(v.mean()), *(float(q) for q in np.quantile(means, (.025, .975))), len(v))
    a, b = figures["captioner facts, in"], figures["captioner facts, out"]
    wide = math.hypot(a[2] - a[1], b[2] - b[1]) / 2
    figures["captioner facts, in - out"] = (a[0] - b[0], a[0] - b[0] - wide, a[0] - b[0] + wide, a[3])
    missed = [name for name, bar in BARS.items() if figures[name][0] < bar]
    for name, (mean, low, high, n) in figures.items():
        bar = f"   bar {BARS[name]}{'  MISSED' if name in missed else ''}" if name in BARS else ""
        print(f"{name:30s} {mean:6.3f} [{low:.3f}, {high:.3f}] n={n}{bar}")
    (args.work / "check.json").write_text(json.dumps({k: {"value": v[0], "low": v[1], "high": v[2], "n": v[3],
                                                          "bar": BARS.get(k)} for k, v in figures.items()}))
    return len(missed)


def sheet(images, path, columns):
    """Pictures in a grid, magnified, for a person to look at before believing a number."""
    import torch
    from PIL import Image
    x = torch.nn.functional.pad(torch.stack(images), (1, 1, 1, 1), value=1.0)
    x = torch.cat([torch.cat(list(row), 2) for row in x.split(columns) if len(row) == columns], 1)
    pixels = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((pixels.shape[1] * 3, pixels.shape[0] * 3), 0).save(path)


def main(args):
    import torch
    torch.set_num_threads(args.threads)
    SHIPPED.update({split: args.count or count for split, count in SHIPPED.items()})
    POOL.update({split: max(100, int(count * args.scale)) for split, count in POOL.items()})
    args.work.mkdir(parents=True, exist_ok=True)
    if args.check:
        return int(check(args) > 0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    for part in args.parts:
        torch.manual_seed(0)                                    # a part's initial weights do not hang on the others
        if part == "data":
            for split in POOL:
                pool(split, args.work)
        elif part == "tokenizers":
            make_tokenizers(args.out, args.work)
        else:
            globals()[f"make_{part}"](args.out, args.work, max(2, int(STEPS.get(part, 0) * args.scale)))


if __name__ == "__main__":
    sys.exit(main(flags()))
