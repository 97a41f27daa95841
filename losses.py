"""The four losses of joint finetuning (paper, Section 4, Eq. 1-5), and one of them as a score.

    L = L_TG + L_IR + L_IG + L_TR                                                        (Eq. 5)
    tg  caption loss of the image                                                        (Eq. 1)
    ir  denoising loss under the captioner's own token distributions, through the bridge (Eq. 2)
    ig  denoising loss under the human caption                                           (Eq. 3)
    tr  caption loss of the generator's one-step estimate of the image                   (Eq. 4)

    total, each = joint(captioner, generator, cross, batch, {"tg": 1, "ir": 1, "ig": 1, "tr": 1})
    total.backward()                             # tr's own backward is done by now, image by image

    loss = score(generator, image, captions, timesteps, noise)     # which caption explains it best?
    mean, error = mean_and_error(loss)                             # the smallest mean wins
    both(log_p, mean)                                              # and by the captioner, too

Work is shared: one captioner pass for tg and ir, one UNet call for both contexts, and only what
the losses asked for is computed. Copy this file alone: it needs torch, two objects with the few
methods of captioners.py's Captioner and generators.py's Generator, and `cross`, which takes a
captioner's reading to text states (bridge.py).

Letters: B captions, L positions of the captioner, T slots of the text encoder, D its width,
C h w a latent, n candidates.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

NAMES = ("tg", "ir", "ig", "tr")


@dataclass
class Batch:
    """B samples and the chance that was drawn for them."""
    captions: list                               # B human captions
    images: list | torch.Tensor | None           # B of (3, H, W) in [0, 1]; for tg and ir
    layout: object = None                        # what `cross` wants to know of the captions; ir
    latents: torch.Tensor | None = None          # (B, C, h, w) x_0, scaled; for all but tg
    noise: torch.Tensor | None = None            # (B, C, h, w) epsilon
    timesteps: torch.Tensor | None = None        # (B,) int64
    tr_weight: torch.Tensor | None = None        # (B,) of each sample in tr, 0 = left out; None: 1


# ---------------------------------------------------------------- Eq. 5
def joint(captioner, generator, cross, batch, weights, chunk=1, split=True):
    """-> (total, {name: (B,)}): the weighted losses summed over the batch, to call backward on; and
    each sample's.

    weights: {name: weight} of the wanted losses. cross(reading, layout) -> text states (B, T, D),
    cross-entropies (B, L). split: tr is brought back to the one-step estimate here, `chunk` images
    at a time, so that one image's decoder and captioner are in memory; its share of total's
    gradient is exact, and total's value then lacks tr. With split=False everything is one graph.
    Raises ValueError for other names.
    """
    unknown = set(weights) - set(NAMES)
    if unknown or not weights:
        wrong = sorted(unknown) or "none"
        raise ValueError(f"losses {wrong}: choose some of {', '.join(NAMES)}")
    each, contexts = {}, {}

    # 1) the captioner reads the images, once for both losses
    if "tg" in weights or "ir" in weights:
        reading = captioner.read(batch.images, batch.captions)
        if "ir" in weights:
            contexts["ir"], ce = cross(reading, batch.layout)          # (B, T, D), (B, L)
        else:
            ce = token_loss(reading)                                   # (B, L)
        if "tg" in weights:
            each["tg"] = per_caption(ce, reading.targets)              # Eq. 1

    # 2) the generator denoises under one context or both, in one call
    if "ig" in weights or "tr" in weights:
        with torch.no_grad():
            contexts["ig"] = generator.states(batch.captions)          # (B, T, D)
    if contexts:
        scheduler = generator.scheduler
        noised = add_noise(scheduler, batch.latents, batch.noise, batch.timesteps)
        goal = target(scheduler, batch.latents, batch.noise, batch.timesteps)
        outputs = denoise(generator, noised, batch.timesteps, list(contexts.values()))
        for name, output in zip(contexts, outputs):
            if name in weights:
                each[name] = (output - goal).square().flatten(1).mean(1)     # Eq. 2, Eq. 3
    total = sum(weights[name] * value.sum() for name, value in each.items())

    # 3) the captioner reads what the generator takes the clean image to be
    if "tr" in weights:
        x0 = one_step(scheduler, noised, outputs[-1], batch.timesteps)       # (B, C, h, w)
        tr, each["tr"] = text_reconstruction(captioner, generator.decode, x0, batch, weights["tr"],
                                             chunk, split)
        total = total + tr
    return total, {name: each[name].detach() for name in NAMES if name in each}


def text_reconstruction(captioner, decode, x0, batch, weight, chunk, split):
    """tr (Eq. 4) of estimates x0 -> what to call backward on, losses (B,).

    The split backward: x0 is cut off, and each chunk runs decoder -> captioner -> loss -> backward
    and is forgotten. By the chain rule (x0 * gradient).sum(), which is returned, has the gradient
    of the whole; nothing is computed twice. Samples of weight 0 are not decoded.
    """
    z = x0
    if split:
        z = x0.detach().requires_grad_(x0.requires_grad)
    share = batch.tr_weight
    if share is None:
        share = x0.new_ones(len(x0))
    rows = share.nonzero()[:, 0].tolist()
    value = x0.new_full((len(x0),), torch.nan)                         # nan: was left out
    total = 0 * z.sum()
    for start in range(0, len(rows), chunk):
        some = rows[start:start + chunk]
        captions = [batch.captions[i] for i in some]
        ce = caption_loss(captioner.read(decode(z[some]), captions))   # (chunk,)
        value[some] = ce.detach().to(value)
        part = weight * (ce * share[some].to(ce)).sum()
        if split and part.requires_grad:
            part.backward()
        else:
            total = total + part
    if not split:
        return total, value
    gradient = torch.zeros_like(x0) if z.grad is None else z.grad
    return (x0 * gradient).sum(), value


# ---------------------------------------------------------------- captions
def caption_loss(reading):
    """Cross-entropy of each caption in nats per token (Eq. 1 as the libraries train it): (B,)."""
    return per_caption(token_loss(reading), reading.targets)


def token_loss(reading):
    """Cross-entropy of each token in nats, 0 where there is none: (B, L)."""
    logits = F.linear(reading.hidden, reading.weight, reading.bias)    # (B, L, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ce = F.cross_entropy(logits.flatten(0, 1), reading.targets.flatten(), reduction="none",
                         ignore_index=-100)
    return ce.view(reading.targets.shape)


def per_caption(ce, targets):
    """Mean over each caption's own tokens, so that micro-batches change nothing: (B, L) -> (B,)."""
    return ce.sum(1) / (targets != -100).sum(1)


# ---------------------------------------------------------------- diffusion
def levels(scheduler, timesteps, like):
    """sqrt(alpha_t), sqrt(1 - alpha_t), each (B, 1, 1, 1); the paper's alpha is alphas_cumprod."""
    a = scheduler.alphas_cumprod.to(like.device)[timesteps].to(like.dtype).view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


def add_noise(scheduler, x, noise, timesteps):
    """x_t of x_0: (B, C, h, w)."""
    signal, spread = levels(scheduler, timesteps, x)
    return signal * x + spread * noise


def target(scheduler, x, noise, timesteps):
    """What the UNet is to predict: the noise, the velocity (Salimans & Ho 2022) or x_0, as the
    scheduler says. Raises ValueError where it says something else."""
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type {kind!r}: epsilon, v_prediction and sample are known")
    signal, spread = levels(scheduler, timesteps, x)
    return {"epsilon": noise, "v_prediction": signal * noise - spread * x, "sample": x}[kind]


def one_step(scheduler, noised, out, timesteps):
    """The one-step estimate of x_0 (Section 4.2) from x_t and the UNet's output: (B, C, h, w)."""
    # Differs: the authors' code takes the scheduler's previous sample of the clean latents
    kind = scheduler.config.prediction_type
    signal, spread = levels(scheduler, timesteps, noised)
    if kind == "epsilon":
        return (noised - spread * out) / signal
    if kind == "v_prediction":
        return signal * noised - spread * out
    return out


def denoise(generator, noised, timesteps, contexts):
    """The UNet's output under each of k contexts (B, T, D), in one call: k of (B, C, h, w)."""
    k = len(contexts)
    states = torch.cat([c.to(generator.dtype) for c in contexts])      # (k B, T, D)
    noised_k = noised.to(generator.dtype).repeat(k, 1, 1, 1)           # (k B, C, h, w)
    out = generator.predict(noised_k, timesteps.repeat(k), states)
    return out.to(noised.dtype).chunk(k)


# ---------------------------------------------------------------- Eq. 3 as a score
@torch.no_grad()
def score(generator, images, captions, timesteps, noise, batch=64, empty=None):
    """How badly the generator denoises an image under a caption: loss (draws, n) float64 (CPU).

    One image and n captions; n images and one caption; or n images, each with its own caption.
    images: a list or tensor of (3, H, W) in [0, 1], or one alone. timesteps (draws,), noise
    (draws, C, h, w): all candidates meet the same (cycle.noises). The loss is the one the model was
    trained with, unweighted. empty: subtract the loss under the empty caption, so that images
    compare; default where there are several. Equal captions of an image are scored once. Nothing is
    drawn or decoded, and there is no guidance. Captions longer than the text encoder reads are
    scored without their ends: Generator.too_long tells which. Raises ValueError for other counts.
    """
    if isinstance(images, torch.Tensor) and images.ndim == 3:
        images = images[None]
    n = max(len(images), len(captions))
    if not {len(images), len(captions)} <= {1, n}:
        raise ValueError(f"{len(images)} images and {len(captions)} captions: as many of both, or "
                         "one of one kind")
    several = len(images) > 1
    wanted = list(captions)
    place = list(range(n))
    if not several:
        wanted = list(dict.fromkeys(captions))
        place = [wanted.index(c) for c in captions]
    latents = generator.encode(images)[0].float()                      # (1 or n, C, h, w)
    states = generator.states(wanted)                                  # (k or 1, T, D)
    loss = denoising_loss(generator, latents, states, timesteps, noise, batch)
    if empty or (empty is None and several):
        nothing = generator.states([""])                               # (1, T, D)
        loss = loss - denoising_loss(generator, latents, nothing, timesteps, noise, batch)
    return loss[:, place]


def denoising_loss(generator, latents, states, timesteps, noise, batch):
    """Mean squared errors (draws, k) of k latents or one, and k states or one, at each draw."""
    k = max(len(latents), len(states))
    step = max(1, batch // k)                    # draws at once
    parts = []
    for i in range(0, len(timesteps), step):
        t = timesteps[i:i + step]
        rows = len(t) * k
        x = latents.expand(k, -1, -1, -1).repeat(len(t), 1, 1, 1)      # (rows, C, h, w)
        context = states.repeat(rows // len(states), 1, 1)             # (rows, T, D)
        e = noise[i:i + step].repeat_interleave(k, 0)                  # (rows, C, h, w)
        t = t.repeat_interleave(k)                                     # (rows,)
        noised = add_noise(generator.scheduler, x, e, t)
        out = generator.predict(noised.to(generator.dtype), t, context).float()
        error = out - target(generator.scheduler, x, e, t)
        error = error.cpu().double()                                   # mps has no float64
        parts.append(error.square().mean((1, 2, 3)).view(-1, k))
    return torch.cat(parts)


def mean_and_error(loss):
    """Mean (n,) and standard error (n,) of losses (draws, n), stratified over the timesteps.

    The error is from second differences of neighbours in time: a loss that moves with the timestep
    hardly moves a stratified mean. Nan of one draw. For a difference give the losses' difference.
    """
    draws = len(loss)
    order = min(2, draws - 1)                    # of two draws, the first difference
    if order == 0:
        return loss.mean(0), loss[0] * torch.nan
    variance = loss.diff(n=order, dim=0).square().mean(0) / math.comb(2 * order, order)
    return loss.mean(0), (variance / draws).sqrt()


def both(log_p, loss):
    """What both models say of an item's candidates: (..., n) float64, higher = better.

    log_p (..., n): the captioner's log-likelihood per token, minus Eq. 1; loss (..., n): the
    generator's denoising loss, Eq. 3 (score's mean). Each is standardised among the n candidates,
    so that neither unit nor weight is to be chosen: it is how many standard deviations a candidate
    lies above the others, by the one model and by the other, added up.
    """
    return standardised(log_p) - standardised(loss)


def standardised(x):
    """x (..., n) less its mean over its standard deviation, among n; 0 where all are equal, but for
    rounding. Of two it is 1 and -1, however near they are."""
    x = torch.as_tensor(x, dtype=torch.float64)
    apart = x - x.mean(-1, keepdim=True)
    spread = apart.square().mean(-1, keepdim=True).sqrt()
    alike = spread <= 1e-5 * x.abs().mean(-1, keepdim=True)
    return torch.where(alike, 0, apart / spread)


def words(generator, image, caption, timesteps, noise, batch=64):
    """What each word adds: [(word, contribution, standard error)], in order; image (3, H, W).

    The contribution is how much the denoising loss grows when the word is dropped, at the same
    timesteps and noise. Positive: the word explains the picture; negative: without it the picture
    is better explained.
    """
    said = caption.split()
    without = [" ".join(said[:i] + said[i + 1:]) for i in range(len(said))]
    loss = score(generator, image, [caption, *without], timesteps, noise, batch)
    change, error = mean_and_error(loss[:, 1:] - loss[:, :1])          # (words,)
    return list(zip(said, change.tolist(), error.tolist()))
