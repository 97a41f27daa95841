"""The four losses of joint finetuning (paper, Section 4, Eq. 1-5), and one backward pass for all of them.

    L = L_TG + L_IR + L_IG + L_TR                                                                       (Eq. 5)
    tg  caption loss of the image                                                                       (Eq. 1)
    ir  denoising loss under the captioner's own token distributions, through the bridge                (Eq. 2)
    ig  denoising loss under the human caption                                                          (Eq. 3)
    tr  caption loss of the generator's one-step estimate of the image                                  (Eq. 4)

    total, each = joint(captioner, generator, cross, batch, {"tg": 1, "ir": 1, "ig": 1, "tr": 1})
    total.backward()                                # tr's own backward is done by now, image by image

Work is shared: one captioner pass for tg and ir, one UNet call for both contexts, and only what the losses asked for is
computed. Copy this file alone: it needs torch, two objects with the few methods of cycle.py's Captioner and Generator,
and `cross`, which takes a captioner's reading to text states (bridge.py).

Letters: B captions, L positions of the captioner, T slots of the text encoder, D its width, C h w a latent.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

NAMES = ("tg", "ir", "ig", "tr")


@dataclass
class Batch:
    """B samples and the chance that was drawn for them."""
    captions: list                               # B human captions
    images: list | torch.Tensor | None           # B of (3, H, W) in [0, 1]; None if neither tg nor ir is wanted
    layout: object = None                        # what `cross` needs to know of the captions; None without ir
    latents: torch.Tensor | None = None          # (B, C, h, w) x_0, scaled; None if tg alone is wanted
    noise: torch.Tensor | None = None            # (B, C, h, w) epsilon
    timesteps: torch.Tensor | None = None        # (B,) int64
    heard: torch.Tensor | None = None            # (B,) the weight of each sample in tr, 0 = left out; None: all 1


# ---------------------------------------------------------------- Eq. 5
def joint(captioner, generator, cross, batch, weights, chunk=1, split=True, decode=None):
    """-> (total, {name: (B,)}): the sum over the batch of the weighted losses, to call backward on; each sample's.

    weights: {name: weight} of the wanted losses. cross(reading, layout) -> text states (B, T, D), cross-entropies
    (B, L). decode: latents -> images about [0, 1]; default the generator's own decoder. split: tr is brought back to
    the one-step estimate here, `chunk` images at a time, so that one image's decoder and captioner are in memory; its
    share of total's gradient is exact, and total's value then lacks tr. With split=False everything is one graph.
    """
    unknown = set(weights) - set(NAMES)
    if unknown or not weights:
        raise ValueError(f"losses {sorted(unknown) or 'none'}: choose some of {', '.join(NAMES)}")
    each, contexts = {}, {}
    if "tg" in weights or "ir" in weights:
        reading = captioner.read(batch.images, batch.captions)                          # one pass for both
        if "ir" in weights:
            contexts["ir"], ce = cross(reading, batch.layout)                           # (B, T, D), (B, L)
            tg = per_caption(ce, reading.targets)
        else:
            tg = caption_loss(reading)
        if "tg" in weights:
            each["tg"] = tg                                                             # Eq. 1
    if "ig" in weights or "tr" in weights:
        with torch.no_grad():
            contexts["ig"] = generator.states(batch.captions)                           # (B, T, D)
    if contexts:
        noised = add_noise(generator.scheduler, batch.latents, batch.noise, batch.timesteps)
        out = denoise(generator, noised, batch.timesteps, list(contexts.values()))
        goal = target(generator.scheduler, batch.latents, batch.noise, batch.timesteps)
        for name, o in zip(contexts, out):
            if name in weights:
                each[name] = (o - goal).square().flatten(1).mean(1)                     # Eq. 2, Eq. 3
    total = sum(weights[name] * value.sum() for name, value in each.items())
    if "tr" in weights:
        x0 = one_step(generator.scheduler, noised, out[-1], batch.timesteps)            # (B, C, h, w)
        grad, each["tr"] = echo(captioner, decode or generator.decode, x0, batch, weights["tr"], chunk, split)
        total = total + (grad if not split else (x0 * grad).sum())
    return total, {name: each[name].detach() for name in NAMES if name in each}


def echo(captioner, decode, x0, batch, weight, chunk, split):
    """tr (Eq. 4) of estimates x0 -> (gradient at x0, or without split the weighted sum itself; losses (B,)).

    The split backward: x0 is cut off, and each chunk runs decoder -> captioner -> loss -> backward and is forgotten.
    By the chain rule (x0 * gradient).sum() has the gradient of the whole; nothing is computed twice. Samples of
    weight 0 are not decoded.
    """
    z = x0.detach().requires_grad_(x0.requires_grad) if split else x0
    heard = batch.heard if batch.heard is not None else x0.new_ones(len(x0))
    rows = [i for i, h in enumerate(heard.tolist()) if h]
    value, total = x0.new_full((len(x0),), torch.nan), 0 * z.sum()                       # nan: was not asked
    for start in range(0, len(rows), chunk):
        some = rows[start:start + chunk]
        ce = caption_loss(captioner.read(decode(z[some]), [batch.captions[i] for i in some]))
        value[some] = ce.detach().to(value)
        part = weight * (ce * heard[some].to(ce)).sum()
        if split and part.requires_grad:
            part.backward()
        else:
            total = total + part
    if not split:
        return total, value
    return (torch.zeros_like(x0) if z.grad is None else z.grad), value


# ---------------------------------------------------------------- captions
def caption_loss(reading):
    """Cross-entropy of each caption in nats per token (Eq. 1 as the libraries train it): (B,)."""
    return per_caption(token_loss(reading), reading.targets)


def token_loss(reading):
    """Cross-entropy of each token in nats, 0 where there is none: (B, L)."""
    logits = F.linear(reading.hidden, reading.weight, reading.bias)                     # (B, L, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ce = F.cross_entropy(logits.flatten(0, 1), reading.targets.flatten(), reduction="none", ignore_index=-100)
    return ce.view(reading.targets.shape)


def per_caption(ce, targets):
    """Mean over each caption's own tokens, so that a micro-batch changes nothing: (B, L), (B, L) -> (B,)."""
    return ce.sum(1) / (targets != -100).sum(1)


# ---------------------------------------------------------------- diffusion
def levels(scheduler, timesteps, like):
    """sqrt(alpha_t), sqrt(1 - alpha_t), each (B, 1, 1, 1); the paper's alpha_t is alphas_cumprod."""
    a = scheduler.alphas_cumprod.to(like.device)[timesteps].to(like.dtype).view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


def add_noise(scheduler, x, noise, timesteps):
    """x_t of x_0: (B, C, h, w)."""
    signal, spread = levels(scheduler, timesteps, x)
    return signal * x + spread * noise


def target(scheduler, x, noise, timesteps):
    """What the UNet is to predict: the noise, the velocity (Salimans & Ho 2022) or x_0, as the scheduler says."""
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type {kind!r}: epsilon, v_prediction and sample are known")
    signal, spread = levels(scheduler, timesteps, x)
    return {"epsilon": noise, "v_prediction": signal * noise - spread * x, "sample": x}[kind]


def one_step(scheduler, noised, out, timesteps):
    """The one-step estimate of x_0 (Section 4.2) from x_t and the UNet's output: (B, C, h, w)."""
    # Differs: the authors' code takes the scheduler's previous sample of the clean latents; this is the formula.
    kind = scheduler.config.prediction_type
    signal, spread = levels(scheduler, timesteps, noised)
    if kind == "epsilon":
        return (noised - spread * out) / signal
    return signal * noised - spread * out if kind == "v_prediction" else out


def denoise(generator, noised, timesteps, contexts):
    """The UNet's output under each of k contexts (B, T, D), in one call on k B: k of (B, C, h, w)."""
    k = len(contexts)
    out = generator.predict(noised.to(generator.dtype).repeat(k, 1, 1, 1), timesteps.repeat(k),
                            torch.cat([c.to(generator.dtype) for c in contexts]))
    return out.to(noised.dtype).chunk(k)
