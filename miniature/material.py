"""What the miniature's models learn from, and the pictures that are shipped.

Drawn once and kept: a pool of pictures, labels and captions for training, second drawings of the
same scenes, and small splits as files. Two tokenizers are made of the captions.
"""
import itertools
import json
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from miniature import world

COUNTS = {"all": 80_000, "train": 60_000}        # scenes drawn for training
SHIPPED = {"val": 100, "test": 150, "near": 150, "out": 150}
DOMAINS = {"test": "in-domain", "near": "near-domain", "out": "out-domain"}
PROMPT = "a picture of "                         # BLIP's, in training and in use
LENGTH = 24                                      # tokens of a caption


# ---------------------------------------------------------------- for training
@dataclass
class Pool:
    images: torch.Tensor        # (N, 3, 32, 32) uint8
    labels: torch.Tensor        # (N, 4, 8, 8) uint8, as world.grid
    captions: list              # N lists of five

    def batch(self, generator, size):
        """Random rows and their pictures, float (B, 3, 32, 32) in [0, 1]."""
        rows = torch.randint(len(self.images), (size,), generator=generator)
        return rows, self.images[rows].float() / 255


def pool(split, work, scale):
    """The Pool of a split, drawn if it was not yet."""
    path = work / f"pool_{split}.safetensors"
    if not path.exists():
        count = max(100, int(COUNTS[split] * scale))
        scenes = [world.sample(split, i) for i in range(count)]
        images = [world.draw(s) for s in tqdm(scenes, desc=f"pictures of {split}", mininterval=5)]
        labels = np.stack([world.grid(s) for s in scenes]).astype(np.uint8)
        captions = [world.captions(s) for s in scenes]
        path.with_suffix(".json").write_text(json.dumps(captions))
        save_file({"images": channels_first(images), "labels": torch.from_numpy(labels)}, path)
    captions = json.loads(path.with_suffix(".json").read_text())
    return Pool(**load_here(path), captions=captions)


def channels_first(images):
    """Pictures (32, 32, 3) -> (N, 3, 32, 32) uint8."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def load_here(path):
    """The tensors of a safetensors file, on the device in use."""
    return load_file(path, device=str(torch.get_default_device()))


def tokens(tokenizer, captions, prompt=""):
    """Five captions of each picture -> ids and the mask of what is no padding, (N, 5, LENGTH)."""
    flat = [prompt + caption for caption in itertools.chain.from_iterable(captions)]
    rows = tokenizer(flat, padding="max_length", max_length=LENGTH, truncation=True,
                     return_tensors="pt").to(torch.get_default_device())
    shape = (len(captions), 5, LENGTH)
    return rows.input_ids.view(shape), rows.attention_mask.bool().view(shape)


def pick(ids, mask, rows, generator):
    """One of the five captions of each row: ids and mask (B, LENGTH)."""
    which = torch.randint(5, (len(rows),), generator=generator)
    return ids[rows, which], mask[rows, which]


def views_of(count, path):
    """Second drawings of scenes, objects moved and shades changed: (count, 3, 32, 32) uint8."""
    if not path.exists():
        views = []
        for i in range(count):
            scene = world.sample("all", i)
            rng = np.random.default_rng([13, i])
            scene["seed"] = [*scene["seed"], 13]
            for o in scene["objects"]:
                o["x"] += rng.uniform(-1.5, 1.5)
                o["y"] += rng.uniform(-1.5, 1.5)
            views.append(world.draw(scene))
        save_file({"views": channels_first(views)}, path)
    return load_here(path)["views"]


def latents_of(vae, images, path):
    """Mean and log variance of the pictures' latents, (N, 16, 8, 8) float16; made once."""
    if not path.exists():
        with torch.no_grad():
            made = [vae.encode(x.float() / 127.5 - 1).latent_dist.parameters.half()
                    for x in images.split(500)]
        save_file({"latents": torch.cat(made)}, path)
    return load_here(path)["latents"]


# ---------------------------------------------------------------- what every picture model learns
def dense(logits, labels):
    """Cross-entropy of what lies under each cell: logits (B, 25, 8, 8), labels (B, 4, 8, 8)."""
    parts = logits.float().split(world.HEADS, 1)
    return sum(F.cross_entropy(part, labels[:, i].long()) for i, part in enumerate(parts))


def normalise(x, mean, std):
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def dense_head(width):
    return torch.nn.Linear(width, sum(world.HEADS))


def dense_of(head, patches, labels):
    """The same from a ViT's patches (B, 64, D), and a class token before them.

    A stand-in for large-scale pretraining: from captions alone a small ViT does not learn to see.
    """
    logits = head(patches[:, 1:]).transpose(1, 2).unflatten(2, (8, 8))
    return dense(logits, labels)


# ---------------------------------------------------------------- two different tokenizers
def make_tokenizers(captions, out):
    """A WordPiece of 200 for the captioner, a byte-pair encoding of 645 for the generator."""
    lines = list(itertools.chain.from_iterable(captions[:20_000]))
    piece = word_piece(lines)
    pairs = byte_pairs(lines)
    piece.save_pretrained(out / "blip")
    pairs.save_pretrained(out / "sd/tokenizer")
    pairs.save_pretrained(out / "clip")
    text = "a tiny turquoise wedge beneath a huge violet hoop on checkered tiles"
    for tokenizer in (piece, pairs):
        print(len(tokenizer), tokenizer.tokenize(text), flush=True)


def word_piece(lines):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer()
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    model.train_from_iterator([PROMPT + line for line in lines], trainer)
    return BertTokenizer(vocab=model.get_vocab(), do_lower_case=True, model_max_length=40)


def byte_pairs(lines):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    end = "</w>"
    model = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix=end))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    model.pre_tokenizer = pre_tokenizers.Sequence(split)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=405, initial_alphabet=alphabet,
                                  end_of_word_suffix=end, show_progress=False)
    model.train_from_iterator(lines, trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    # the order of CLIP's own vocabulary
    words = alphabet + sorted(letter + end for letter in alphabet)
    words += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH,
                         pad_token="<|endoftext|>")


# ---------------------------------------------------------------- what is shipped as pictures
def make_splits(root, count=None):
    """Splits as files: val and test as Karpathy's, test (in), near and out as NoCaps'."""
    coco = []
    images = []
    annotations = []
    for split, shipped in SHIPPED.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        for i in range(count or shipped):
            scene = world.sample(split, i)
            captions = world.captions(scene)
            name = f"{i:04d}.png"
            Image.fromarray(world.draw(scene)).save(root / split / name, optimize=True)
            if split in ("val", "test"):
                coco.append(coco_row(len(coco), split, name, captions))
            if split in DOMAINS:
                row = len(images)
                images.append({"id": row, "file_name": f"{split}/{name}", "domain": DOMAINS[split]})
                for j, caption in enumerate(captions):
                    annotations.append({"image_id": row, "id": 5 * row + j, "caption": caption})
    write_json(root / "dataset_coco.json", {"dataset": "miniature", "images": coco})
    write_json(root / "nocaps_val_4500_captions.json",
               {"images": images, "annotations": annotations})


def coco_row(number, split, name, captions):
    sentences = []
    for j, caption in enumerate(captions):
        words = caption.split()
        sentences.append({"raw": caption, "tokens": words, "sentid": 5 * number + j})
    return {"filepath": split, "filename": name, "imgid": number, "cocoid": number, "split": split,
            "sentences": sentences}


def write_json(path, content):
    path.write_text(json.dumps(content))
