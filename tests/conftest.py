"""Shared by all tests: the repository on the path, one thread (results must not hang on their number), no network."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"                     # the planning folder beside a checkout; absent in a clone
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared (real vocabularies, captions, photographs) is not beside this clone")
    return SHARED


@pytest.fixture(scope="session")
def scenes():
    from miniature import world
    return [world.sample("test", i) for i in range(6)]


@pytest.fixture(scope="session")
def images(scenes):
    """Six pictures of the miniature world: (6, 3, 32, 32) in [0, 1]."""
    import torch

    from miniature import world
    return torch.stack([torch.from_numpy(world.draw(s).copy()).permute(2, 0, 1) / 255 for s in scenes])


@pytest.fixture(scope="session")
def captioner():
    import cycle
    return cycle.Captioner.load("miniature", "cpu")


@pytest.fixture(scope="session")
def generator():
    import cycle
    return cycle.Generator.load("miniature", "cpu")


@pytest.fixture(scope="session")
def blip2(tmp_path_factory):
    """A small random BLIP-2 in the layout of Salesforce/blip2-opt-2.7b: byte-level BPE, OPT, 6 query tokens, 28 px."""
    import json

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        GPT2Tokenizer,
        OPTConfig,
    )

    from miniature import world
    folder = tmp_path_factory.mktemp("blip2")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([c + "\n" for i in range(200) for c in world.captions(world.sample("all", i))],
                            trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = GPT2Tokenizer(vocab=trained["vocab"], merges=[tuple(m) for m in trained["merges"]], bos_token="</s>",
                              eos_token="</s>", pad_token="<pad>", unk_token="</s>")
    end = tokenizer("\n", add_special_tokens=False).input_ids
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = OPTConfig(vocab_size=len(tokenizer) + 5, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                     num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=2,
                     pad_token_id=1, eos_token_id=end[-1])
    vision = Blip2VisionConfig(**size, image_size=28, patch_size=7, initializer_range=.1)
    qformer = Blip2QFormerConfig(**size, encoder_hidden_size=32, vocab_size=40)
    config = Blip2Config(vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), text_config=text.to_dict(),
                         num_query_tokens=6, image_token_index=len(tokenizer) - 1)
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= 3                                         # livelier than its initial weights: outputs must differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "BlipImageProcessor", "do_resize": True, "size": {"height": 28, "width": 28},
         "resample": 3, "image_mean": [.481, .458, .408], "image_std": [.269, .261, .276]}))
    return folder
