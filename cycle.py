"""The two conversations of a captioner and a generator with frozen weights (paper, Section 3).

    captioner = Captioner.load("miniature")                      # captioners.py; or "vitb"
    generator = Generator.load("miniature")                      # generators.py; or "sd14"
    talk = image_text_image(captioner, generator, images, n=10, likeness={"clip": likeness})
    best = talk.order["clip"][0, 0]
    talk.captions[0][best]                # the caption whose picture is most like the first image

An image is float (3, H, W) in [0, 1], a caption is a str. Chance is a function of (seed, item): the
captions of a picture, and the noise its candidates are all drawn from, do not depend on what else
is in the batch.
Copy this file alone: it needs torch, an object that speaks and one that draws (`noises`: one with
the unet and scheduler of a Stable Diffusion).

Letters: B images, n candidates.
"""
import hashlib
import json
from dataclasses import dataclass, field

import torch


# ---------------------------------------------------------------- the two conversations
@dataclass
class Talk:
    """What came of a conversation over B items with n candidates each.

    image -> text -> image: captions[b] are candidates, images (B, n, 3, H, W) their drawings.
    text -> image -> text: images (B, n, 3, H, W) are candidates, captions[b] what was read; images
    that were given are as they were given. What hangs on a picture that is not finite is nan.
    """
    captions: list
    images: torch.Tensor | list
    likelihood: torch.Tensor                     # (B, n) log p(caption | image it was read from)
    scores: dict = field(default_factory=dict)   # likeness -> (B, n) float64, higher = more alike

    @property
    def order(self):
        """{likeness: (B, n)} candidates, best first."""
        known = {name: score.nan_to_num(-torch.inf) for name, score in self.scores.items()}
        return {name: score.argsort(dim=1, descending=True, stable=True)
                for name, score in known.items()}


def image_text_image(captioner, generator, images, n=10, likeness=None, seed=0, items=None,
                     speak=None, draw=None, captions=None):
    """Image -> n captions -> a picture of each -> how alike picture and image are (Section 3.1,
    Fig. 2 left): Talk.

    images: list of B (3, H, W) or one (B, 3, H, W); items: B names or numbers that chance hangs on
    (default 0, 1, ...); likeness: {name: f(pictures (n, 3, h, w), image (1, 3, H, W)) -> (n,)};
    speak, draw: more arguments of the speakers; captions: B lists of as many that exist, which the
    captioner only reads. All candidates of an item are drawn from the same noise; equal captions
    are drawn once.
    """
    if items is None:
        items = list(range(len(images)))
    if captions is None:
        captions, likelihood = captioner.speak(images, n, seed=seed, items=items, **speak or {})
    else:
        likelihood = []
        for image, row in zip(images, captions):
            likelihood.append(read(captioner, [image] * len(row), row))
        likelihood = torch.stack(likelihood)

    # every different caption of an item is drawn once
    wanted = {}
    for item, row in zip(items, captions):
        for caption in row:
            wanted.setdefault((item, caption), len(wanted))
    drawn = generator.draw([caption for _, caption in wanted], items=[item for item, _ in wanted],
                           seed=seed, **draw or {})
    drawings = []
    for item, row in zip(items, captions):
        drawings.append(drawn[[wanted[item, caption] for caption in row]])      # (n, 3, h, w)

    scores = {}
    for name, f in (likeness or {}).items():
        rows = []
        for pictures, image in zip(drawings, images):
            row = torch.as_tensor(f(pictures.nan_to_num(0, 1, 0), image[None])).double()
            rows.append(torch.where(finite(pictures), row, torch.nan))
        scores[name] = torch.stack(rows)
    return Talk(captions, torch.stack(drawings), likelihood, scores)


def text_image_text(captioner, generator, captions, n=10, likeness=None, seed=0, items=None,
                    speak=None, draw=None, pictures=None):
    """Text -> n pictures -> the caption of each, by beam search -> how alike caption and text are
    (Fig. 2 right): Talk.

    likeness: {name: f(captions: n strings, texts: n strings) -> (n,)}; candidate j of an item has
    the noise of (seed, item, j). pictures: B lists of as many (3, H, W) of any size that exist:
    nothing is drawn.
    """
    if items is None:
        items = list(range(len(captions)))
    if pictures is None:
        texts = [caption for caption in captions for _ in range(n)]
        noises_of = [(item, j) for item in items for j in range(n)]
        drawn = generator.draw(texts, items=noises_of, seed=seed, **draw or {})  # (B n, 3, H, W)
        pictures = drawn.unflatten(0, (len(captions), n))
    n = len(pictures[0])
    drawn = [picture for row in pictures for picture in row]
    fine = finite(drawn)                                                        # (B n,)
    seen = [picture.nan_to_num(0, 1, 0) for picture in drawn]
    heard, likelihood = captioner.speak(seen, 1, **{"way": "beam"} | (speak or {}))
    heard = [row[0] for row in heard]
    rows = [heard[i:i + n] for i in range(0, len(heard), n)]

    scores = {}
    for name, f in (likeness or {}).items():
        found = [torch.as_tensor(f(row, [text] * n)).double() for row, text in zip(rows, captions)]
        scores[name] = torch.where(fine.view(-1, n), torch.stack(found), torch.nan)
    likelihood = torch.where(fine, likelihood.flatten(), torch.nan).view(-1, n)
    return Talk(rows, pictures, likelihood, scores)


def finite(pictures):
    """Which of n pictures (3, H, W) are all numbers, (n,) bool: half precision may overflow."""
    return torch.tensor([bool(picture.isfinite().all()) for picture in pictures])


def read(captioner, images, captions, batch=16):
    """log p(caption | image) in nats, (n,), of n captions with an image each; `batch` at once."""
    parts = []
    for i in range(0, len(captions), batch):
        parts.append(captioner.likelihood(images[i:i + batch], captions[i:i + batch]))
    return torch.cat(parts)


# ---------------------------------------------------------------- chance
def chance(*key):
    """A CPU generator that is a function of its key alone: numbers, strings and tuples."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noises(generator, draws=12, seed=0, item=0):
    """What losses.score compares an item's candidates at: timesteps (draws,), one in each of as
    many equal parts of the schedule, and noise (draws, C, h, w)."""
    g = chance("denoise", seed, item, 0)
    config = generator.unet.config
    steps = generator.scheduler.config.num_train_timesteps
    u = (torch.arange(draws) + torch.rand(draws, generator=g)) / draws          # in [0, 1)
    timesteps = (u * steps).long().clamp(max=steps - 1)
    shape = (draws, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=g)
    return timesteps.to(generator.device), noise.to(generator.device)
