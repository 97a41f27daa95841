"""From the index of a sample to a batch of the losses: pictures, captions, latents, chance.

    samples = Samples("data/coco", "train")
    image, captions = samples[7]
    batch = collate(run, samples, [7, 11], step, ("tg", "ir", "ig", "tr"))      # a losses.Batch

What a sample is at a step (its caption, timestep and noise) is a function of (seed, step, index)
and of the data: neither the number of processes nor the size of a batch changes it.

Letters: B samples; C h w a latent.
"""
import os
import sys

import torch
from safetensors.torch import load_file, save_file

import data
import records
from cycle import chance
from losses import Batch
from miniature import world
from records import digest, fingerprint

DRAWN = 20_000                                   # pictures that the miniature's train and all have


class Samples:
    """Pictures by index, with captions if they are described."""

    def __init__(self, place, split, described=True):
        self.split = split
        self.described = described
        self.unreadable = set()
        self.cache = None                        # folder of their latents, a Path
        self.items = None                        # the miniature's are drawn, one by one
        self.content = f"{split}: {DRAWN} pictures"
        if place != "miniature" or split not in ("train", "all"):
            items = data.read(place, split)
            self.items = [x for x in items if x.captions or not described]
            left = len(items) - len(self.items)
            if left:
                records.say(f"finetune.py: {left} of the {len(items)} pictures of {place}, "
                            f"{split}, have no caption and are left out")
            # names, captions and the pictures themselves, of many by a few of them
            some = self.items[::max(1, len(self.items) // 64)]
            seen = [data.content_of(self.items), *(fingerprint(x.path) for x in some)]
            self.content = f"{split}: {len(self.items)} pictures, {digest(seen)}"
        self.name = f"{place}/{self.content}"
        if len(self) == 0:
            raise ValueError(f"{place} has no captions in its {split} split")

    def __len__(self):
        return DRAWN if self.items is None else len(self.items)

    def __getitem__(self, index):
        """(image (3, H, W) in [0, 1], captions); the next one's where a picture cannot be read."""
        if self.items is None:
            scene = world.sample(self.split, index)
            return world.picture(scene), world.captions(scene)
        for i in range(index, index + len(self)):
            item = self.items[i % len(self)]
            try:
                return data.open_image(item.path), item.captions
            except ValueError as e:
                if item.path not in self.unreadable:
                    print(f"finetune.py: {e}; the next picture stands in for it", file=sys.stderr)
                self.unreadable.add(item.path)
        raise ValueError(f"{self.name}: none of them can be read")


def open_samples(place, split, own, batch):
    """(Samples with captions, those without or None, what both hold). own: a folder, or a split."""
    sets = [Samples(place, split)]
    if own:
        place, split = (own, "train") if os.path.isdir(own) else (place, own)
        sets.append(Samples(place, split, described=False))
    for some in sets:
        if len(some) < batch:
            raise ValueError(f"{some.name}: less than one --batch of {batch}")
    content = "; own words of ".join([some.content for some in sets])
    return sets[0], sets[1] if own else None, content


def held_out(place, count, trained):
    """The first pictures of the val split that none of the Samples trained on has; where there are
    none, None, and a line that says why."""
    if count < 1:
        return None
    seen = {os.path.abspath(item.path) for some in trained for item in some.items or ()}
    try:
        held = Samples(place, "val")
        held.items = [x for x in held.items if os.path.abspath(x.path) not in seen][:count]
        if not held.items:
            raise ValueError(f"all of {place}, val, is trained on")
    except ValueError as e:
        records.say(f"finetune.py: nothing is held out: {e}")
        return None
    return held


def latents(generator, image, path):
    """Mean and standard deviation of a picture's latents, (2, C, h, w); kept at path, if any."""
    if path and path.exists():
        return load_file(path)["latents"]
    with torch.no_grad():
        found = torch.cat(generator.encode([image])).cpu()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        save_file({"latents": found}, beside)
        os.replace(beside, path)
    return found


def collate(run, samples, indices, step, wanted):
    """The Batch of these of the samples at this step, with what the wanted losses need.

    Where nobody described the pictures, what the captioner says of them now stands for captions.
    run: of finetune.py; captioner, generator, bridge, thin and seed are read.
    """
    described = samples.described
    steps = run.generator.scheduler.config.num_train_timesteps
    captions, images, x0, noise, timesteps, tr_weight = [], [], [], [], [], []
    for i in indices:
        image, texts = samples[i]
        images.append(image)
        # all chance of a sample is one stream: what is drawn first, second, ... is part of a seed
        g = chance("finetune" if described else "own", run.seed, step, i)
        if described:
            captions.append(texts[torch.randint(len(texts), (), generator=g)])
        timesteps.append(torch.randint(steps, (), generator=g))
        thinned = torch.rand((), generator=g) * run.thin >= 1
        tr_weight.append(0 if thinned else run.thin)
        if set(wanted) != {"tg"}:
            path = samples.cache and samples.cache / f"{i}.safetensors"
            found = latents(run.generator, image, path)
            mean, std = found.to(torch.promote_types(found.dtype, torch.float32))
            first, second = torch.randn(2, *mean.shape, generator=g).to(mean)
            x0.append(mean + std * first)                             # (C, h, w)
            noise.append(second)
    if not described:
        items = [[step, i] for i in indices]
        spoken, _ = run.captioner.speak(images, 1, seed=run.seed, items=items)
        captions = [row[0] for row in spoken]

    batch = Batch(captions, images)
    if x0:
        device = run.generator.device
        batch.latents = torch.stack(x0).to(device)                    # (B, C, h, w)
        batch.noise = torch.stack(noise).to(device)                   # (B, C, h, w)
        batch.timesteps = torch.stack(timesteps).to(device)           # (B,)
        batch.tr_weight = torch.tensor(tr_weight).to(batch.latents)   # (B,)
    if "ir" in wanted:
        texts = [run.captioner.space + caption for caption in captions]
        layout = run.bridge.layout(texts, run.captioner.lead, run.captioner.room)
        batch.layout = layout.to(run.captioner.device)
    return batch
