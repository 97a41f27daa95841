"""Small random repositories in the layouts of the hub's real ones: file names, configuration keys,
old names of weights.

    build(folder)       # folder/OWNER/NAME/..., about two seconds; the words are the miniature's

What is not to be fetched is there as well, as text that says so: TensorFlow's and half-precision
weights, the safety checker, a generator's single file, code.
"""
import json

import torch
from conftest import ROOT

VITB, VITL = "Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-large"
BLIP2 = "Salesforce/blip2-opt-2.7b"
SD14, TURBO = "CompVis/stable-diffusion-v1-4", "stabilityai/sd-turbo"
CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vitb8"
SBERT, TAESD = "sentence-transformers/all-MiniLM-L6-v2", "madebyollin/taesd"
UNET, VAE = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"
TEXT = "text_encoder/model"
OF_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073],
           "image_std": [0.26862954, 0.26130258, 0.27577711]}
CLIP_VIEW = OF_CLIP | {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor", "size": 224}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4}


def build(root):
    """All of them."""
    torch.manual_seed(0)
    blip(root / VITB, large=False)
    blip(root / VITL, large=True)
    blip2(root / BLIP2)
    clip(root / CLIP)
    dino(root / DINO)
    sbert(root / SBERT)
    stable_diffusion(root / SD14, turbo=False)
    stable_diffusion(root / TURBO, turbo=True)
    taesd(root / TAESD)
    return root


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=2))


def bait(folder, *names):
    """Files that no run needs."""
    for name in names:
        put(folder / name, "not to be fetched\n" * 50)


def lively(model):
    """A fresh model's outputs hardly hang on its inputs; after this they do."""
    for p in model.parameters():
        p.data += (.15 if p.ndim > 1 else .05) * torch.randn_like(p)
    return model.eval()


def write(state, *paths):
    """Weights as safetensors or pickled, as the ending says; half where it says fp16."""
    from safetensors.torch import save_file
    state = {k: v.clone().contiguous() for k, v in state.items()}
    for path in paths:
        if path.suffix == ".bin":
            torch.save(state, path)
        else:
            save_file(state, path, {"format": "pt"})


def renamed(state, *pairs, within=""):
    """The names that an older library gave to the weights."""
    found = {}
    for key, value in state.items():
        for new, old in pairs if within in key else ():
            key = key.replace(new, old)
        found[key] = value
    return found


def positions(n):
    return torch.arange(n)[None]             # a buffer that old versions saved with the weights


# ---------------------------------------------------------------- words
def wordpiece(folder, **config):
    """The tokenizer of a BERT, in four files: its vocabulary {word: id}."""
    text = (ROOT / "miniature/blip/tokenizer.json").read_text()
    vocab = json.loads(text)["model"]["vocab"]
    special = {"cls_token": "[CLS]", "mask_token": "[MASK]", "pad_token": "[PAD]",
               "sep_token": "[SEP]", "unk_token": "[UNK]"}
    put(folder / "tokenizer.json", text)
    put(folder / "vocab.txt", "\n".join(sorted(vocab, key=vocab.get)) + "\n")
    put(folder / "special_tokens_map.json", special)
    put(folder / "tokenizer_config.json", {"do_basic_tokenize": True, "do_lower_case": True,
                                           "model_max_length": 512,
                                           "tokenizer_class": "BertTokenizer"} | special | config)
    return vocab


def clip_words(folder, pad="<|endoftext|>"):
    """The tokenizer of a CLIP, in four files without a tokenizer.json: its vocabulary."""
    model = json.loads((ROOT / "miniature/sd/tokenizer/tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    put(folder / "vocab.json", model["vocab"])
    put(folder / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "unk_token": "<|endoftext|>", "pad_token": pad}
    put(folder / "special_tokens_map.json", special)
    put(folder / "tokenizer_config.json", {"add_prefix_space": False, "do_lower_case": True,
                                           "errors": "replace", "model_max_length": 77,
                                           "tokenizer_class": "CLIPTokenizer"} | special)
    return model["vocab"]


def opt_words(folder):
    """A byte-level BPE of the miniature's captions as OPT has it, <image> its last token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    from miniature import world
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    captions = []
    for i in range(200):
        captions += [c + "\n" for c in world.captions(world.sample("all", i))]
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"]))
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = GPT2Tokenizer(vocab=trained["vocab"], merges=[tuple(m) for m in trained["merges"]],
                              bos_token="</s>", eos_token="</s>", pad_token="<pad>",
                              unk_token="</s>", add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    return tokenizer


# ---------------------------------------------------------------- captioners
def blip(folder, large):
    """-base: only pytorch_model.bin, a size that is a number; -large: safetensors, wider vision."""
    from transformers import BlipConfig, BlipForConditionalGeneration
    vocab = wordpiece(folder, processor_class="BlipProcessor")
    wide = 48 if large else 32
    text = SMALL | {"model_type": "blip_text_model", "vocab_size": len(vocab) + 2,
                    "max_position_embeddings": 64, "bos_token_id": len(vocab), "eos_token_id": 2,
                    "pad_token_id": 0, "sep_token_id": vocab["[SEP]"], "is_decoder": True,
                    "hidden_act": "gelu", "projection_dim": 768}
    if large:
        text["encoder_hidden_size"] = wide
    vision = SMALL | {"model_type": "blip_vision_model", "hidden_size": wide, "image_size": 384,
                      "patch_size": 32, "projection_dim": 512}
    put(folder / "config.json", {"architectures": ["BlipForConditionalGeneration"],
                                 "model_type": "blip", "image_text_hidden_size": 256,
                                 "projection_dim": 512, "logit_scale_init_value": 2.6592,
                                 "torch_dtype": "float32", "text_config": text,
                                 "vision_config": vision, "transformers_version": None})
    view = OF_CLIP | {"do_normalize": True, "do_resize": True,
                      "image_processor_type": "BlipImageProcessor",
                      "processor_class": "BlipProcessor", "size": 384}
    if large:
        view |= {"do_pad": True, "do_rescale": True, "resample": 3, "rescale_factor": 1 / 255,
                 "size_divisor": 32, "size": {"height": 384, "width": 384}}
    put(folder / "preprocessor_config.json", view)
    state = lively(BlipForConditionalGeneration(BlipConfig.from_pretrained(folder))).state_dict()
    state["text_decoder.bert.embeddings.position_ids"] = positions(64)
    write(state, folder / "pytorch_model.bin")
    if large:
        write(state, folder / "model.safetensors")
    bait(folder, "tf_model.h5", "README.md", ".gitattributes")


def blip2(folder):
    """Two shards and their index; 6 query tokens, 28 px."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration
    tokenizer = opt_words(folder)
    end = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    text = {"model_type": "opt", "vocab_size": len(tokenizer) + 5, "hidden_size": 32, "ffn_dim": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
            "word_embed_proj_dim": 32, "eos_token_id": end, "prefix": "</s>",
            "torch_dtype": "float16"}
    put(folder / "config.json", {"architectures": ["Blip2ForConditionalGeneration"],
                                 "model_type": "blip-2", "num_query_tokens": 6,
                                 "image_token_index": len(tokenizer) - 1,
                                 "use_decoder_only_language_model": True, "torch_dtype": "float32",
                                 "text_config": text, "transformers_version": "4.47.0.dev0",
                                 "vision_config": SMALL | {"model_type": "blip_2_vision_model",
                                                           "image_size": 28, "patch_size": 7},
                                 "qformer_config": SMALL | {"model_type": "blip_2_qformer",
                                                            "encoder_hidden_size": 32,
                                                            "vocab_size": 40}})
    put(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": end,
                                            "pad_token_id": 1})
    put(folder / "processor_config.json", {"num_query_tokens": 6,
                                           "processor_class": "Blip2Processor"})
    put(folder / "preprocessor_config.json", OF_CLIP | {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "resample": 3, "rescale_factor": 1 / 255, "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor", "size": {"height": 28, "width": 28}})
    model = lively(Blip2ForConditionalGeneration(Blip2Config.from_pretrained(folder)))
    torch.nn.init.normal_(model.query_tokens)
    state = {k: v for k, v in model.state_dict().items() if k != "language_model.lm_head.weight"}
    place = {}
    for i, name in enumerate(state):
        place[name] = f"model-0000{1 if i < len(state) // 2 else 2}-of-00002.safetensors"
    for file in set(place.values()):
        write({k: v for k, v in state.items() if place[k] == file}, folder / file)
    total = sum(v.nbytes for v in state.values())
    put(folder / "model.safetensors.index.json", {"metadata": {"total_size": total},
                                                  "weight_map": place})
    bait(folder, "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
         "README.md")
    put(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": {}})


# ---------------------------------------------------------------- judges
def clip(folder):
    """Weights pickled only, sizes are numbers."""
    from transformers import CLIPConfig, CLIPModel
    vocab = clip_words(folder)
    text = SMALL | {"model_type": "clip_text_model", "vocab_size": len(vocab),
                    "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2,
                    "pad_token_id": 1, "projection_dim": 16}
    vision = SMALL | {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 56,
                      "projection_dim": 16}
    put(folder / "config.json", {"architectures": ["CLIPModel"], "model_type": "clip",
                                 "projection_dim": 16, "text_config": text,
                                 "text_config_dict": None, "vision_config": vision,
                                 "vision_config_dict": None, "torch_dtype": "float32",
                                 "transformers_version": None})
    put(folder / "preprocessor_config.json", CLIP_VIEW)
    old = {"text_model.embeddings.position_ids": positions(77),
           "vision_model.embeddings.position_ids": positions(17)}
    write(lively(CLIPModel(CLIPConfig.from_pretrained(folder))).state_dict() | old,
          folder / "pytorch_model.bin")
    bait(folder, "tf_model.h5", "flax_model.msgpack", "README.md")


def dino(folder):
    """Resized bilinearly: resample 2."""
    from transformers import ViTConfig, ViTModel
    put(folder / "config.json", SMALL | {"architectures": ["ViTModel"], "model_type": "vit",
                                         "image_size": 224, "patch_size": 16, "qkv_bias": True,
                                         "transformers_version": "4.10.0.dev0"})
    put(folder / "preprocessor_config.json", {"do_normalize": True, "do_resize": True,
                                              "feature_extractor_type": "ViTFeatureExtractor",
                                              "resample": 2, "image_mean": [.485, .456, .406],
                                              "image_std": [.229, .224, .225], "size": 224})
    state = lively(ViTModel(ViTConfig.from_pretrained(folder),
                            add_pooling_layer=False)).state_dict()
    state = renamed(state, ("layers.", "encoder.layer."), ("attention.o_proj",
                                                           "attention.output.dense"),
                    ("attention.q_proj", "attention.attention.query"), ("attention.k_proj",
                                                                        "attention.attention.key"),
                    ("attention.v_proj", "attention.attention.value"), ("mlp.fc1",
                                                                        "intermediate.dense"),
                    ("mlp.fc2", "output.dense"))
    write(state, folder / "model.safetensors")
    bait(folder, "pytorch_model.bin", "README.md")


def sbert(folder):
    from transformers import BertConfig, BertModel
    vocab = wordpiece(folder)
    put(folder / "config.json", SMALL | {"architectures": ["BertModel"], "model_type": "bert",
                                         "pad_token_id": 0, "vocab_size": len(vocab),
                                         "max_position_embeddings": 512, "type_vocab_size": 2,
                                         "transformers_version": "4.8.2"})
    put(folder / "modules.json", [])
    put(folder / "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": False})
    put(folder / "1_Pooling/config.json", {"word_embedding_dimension": 32,
                                           "pooling_mode_mean_tokens": True})
    state = lively(BertModel(BertConfig.from_pretrained(folder))).state_dict()
    write(state | {"embeddings.position_ids": positions(512)}, folder / "model.safetensors")
    bait(folder, "pytorch_model.bin", "tf_model.h5", "rust_model.ot", "train_script.py",
         "README.md")
    bait(folder, "onnx/model.onnx", "openvino/openvino_model.bin")


# ---------------------------------------------------------------- generators
def stable_diffusion(folder, turbo):
    """v1-4: PNDM without prediction_type, a safety checker; sd-turbo: trailing Euler."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    vocab = clip_words(folder / "tokenizer", "!" if turbo else "<|endoftext|>")
    vae = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.2.2", "act_fn": "silu",
           "in_channels": 3, "block_out_channels": [32, 32],
           "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 4,
           "layers_per_block": 1, "out_channels": 3, "sample_size": 16,
           "up_block_types": ["UpDecoderBlock2D"] * 2}
    unet = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.9.0", "act_fn": "silu",
            "attention_head_dim": [2, 4] if turbo else 8, "block_out_channels": [32, 32],
            "cross_attention_dim": 32, "center_input_sample": False,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "downsample_padding": 1,
            "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 1,
            "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
            "out_channels": 4, "sample_size": 8, "up_block_types": ["UpBlock2D",
                                                                    "CrossAttnUpBlock2D"]}
    text = SMALL | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
                    "vocab_size": len(vocab), "max_position_embeddings": 77, "bos_token_id": 0,
                    "eos_token_id": 2, "pad_token_id": 1,
                    "hidden_act": "gelu" if turbo else "quick_gelu",
                    "transformers_version": "4.21.0.dev0"}
    scheduler = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0",
                 "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                 "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False,
                 "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
    if turbo:
        unet["use_linear_projection"] = True
        vae |= {"scaling_factor": .18215, "force_upcast": True}
        scheduler |= {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon",
                      "sigma_max": None, "timestep_spacing": "trailing",
                      "timestep_type": "discrete", "use_karras_sigmas": False}
    for part, config in (("vae", vae), ("unet", unet), ("text_encoder", text)):
        put(folder / part / "config.json", config)
    put(folder / "scheduler/scheduler_config.json", scheduler)
    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    encoder = lively(encoder).state_dict()
    states = {UNET: lively(UNet2DConditionModel.from_config(unet)).state_dict(),
              VAE: lively(AutoencoderKL.from_config(vae)).state_dict(),
              TEXT: {"text_model." + k.removeprefix("text_model."): v for k, v in encoder.items()}}
    if not turbo:
        states[VAE] = renamed(states[VAE], ("to_q.", "query."), ("to_k.", "key."),
                              ("to_v.", "value."), ("to_out.0.", "proj_attn."),
                              within=".attentions.")
        states[TEXT]["text_model.embeddings.position_ids"] = positions(77)
        bait(folder, "text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.bin",
             "unet/diffusion_pytorch_model.fp16.bin",
             "unet/diffusion_pytorch_model.non_ema.safetensors")
    for stem, state in states.items():
        write(state, folder / f"{stem}.safetensors")
        bait(folder, f"{stem}.fp16.safetensors")
    index = {"_class_name": "StableDiffusionPipeline",
             "_diffusers_version": "0.24.0.dev0" if turbo else "0.2.2",
             "scheduler": ["diffusers", scheduler["_class_name"]],
             "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"],
             "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    if turbo:
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None],
                  "requires_safety_checker": True}
        bait(folder, "sd_turbo.safetensors", "README.md", "LICENSE.txt", "image_of_examples.png")
    else:
        index |= {"feature_extractor": ["transformers", "CLIPFeatureExtractor"],
                  "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
        put(folder / "feature_extractor/preprocessor_config.json", CLIP_VIEW)
        put(folder / "safety_checker/config.json",
            {"architectures": ["StableDiffusionSafetyChecker"], "model_type": "clip"})
        bait(folder, "safety_checker/model.safetensors", "safety_checker/pytorch_model.bin",
             "safety_checker/model.fp16.safetensors", "README.md", "v1-variants-scores.jpg")
    put(folder / "model_index.json", index)


def taesd(folder):
    from diffusers import AutoencoderTiny
    put(folder / "config.json", {"_class_name": "AutoencoderTiny",
                                 "_diffusers_version": "0.20.0.dev0", "act_fn": "relu",
                                 "in_channels": 3, "decoder_block_out_channels": [8, 8],
                                 "encoder_block_out_channels": [8, 8], "latent_channels": 4,
                                 "latent_magnitude": 3, "latent_shift": .5,
                                 "num_decoder_blocks": [1, 1], "num_encoder_blocks": [1, 1],
                                 "out_channels": 3, "scaling_factor": 1.0,
                                 "upsampling_scaling_factor": 2})
    model = AutoencoderTiny.from_config(json.loads((folder / "config.json").read_text()))
    write(lively(model).state_dict(), folder / "diffusion_pytorch_model.safetensors")
    bait(folder, "diffusion_pytorch_model.bin", "taesd_decoder.safetensors",
         "taesd_encoder.safetensors", "README.md")
