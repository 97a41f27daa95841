"""What speaks: a BLIP or BLIP-2 that samples captions of images, and reads captions in training.

    captioner = Captioner.load("vitb")           # or a directory, a hub id, "miniature", ...
    captions, likelihood = captioner.speak(images, n=10)

Images are lists of float (3, H, W) in [0, 1], captions str; tokens and normalised pixels stay
inside. A sample is a function of (seed, item).
Copy this file with loading.py, devices.py, foreign.py, records.py and cycle.py's `chance`: it needs
torch and transformers.

Letters: B images, n candidates, L tokens, P states of the vision, D their width, V vocabulary.
"""
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import foreign
from cycle import chance
from devices import device_and_dtype
from loading import check_finite, readable_errors, resolve

CAPTIONERS = {"miniature": Path(__file__).resolve().parent / "miniature/blip",
              "vitb": "Salesforce/blip-image-captioning-base",
              "vitl": "Salesforce/blip-image-captioning-large",
              "blip2": "Salesforce/blip2-opt-2.7b"}
WAYS = ("top-p", "top-k", "temperature", "typical", "beam")


@dataclass
class Reading:
    """Teacher forcing: hidden[b, i] predicts targets[b, i], which is -100 on prompt and padding."""
    hidden: torch.Tensor                         # (B, L, D), before the vocabulary head
    targets: torch.Tensor                        # (B, L) int64
    weight: torch.Tensor                         # (V, D), the head's
    bias: torch.Tensor | None                    # (V,)


class Captioner:
    """A BLIP checkpoint that describes images. Weights frozen, in eval mode.

    Another family is a subclass, with a line in `load`: its own set_prompt, see, decode, new_cache,
    beam_search and stock_processor, as Captioner2. finetune.py also uses read, speak, save, prompt,
    head, end, lead, room and the class attributes below; checkpoints.py names what it trains.
    """
    space = ""                                   # between prompt and caption
    beams = 3                                    # of beam search, at least
    length_penalty = 1.0                         # of beam search; above 1: longer captions
    micro = None                                 # samples at once in training; None: all
    learns_queries = False                       # whether query tokens are trained

    @classmethod
    def load(cls, name="miniature", device=None, dtype=None):
        """name: of CAPTIONERS, a directory, a hub id, or file.py:function (which gets device and
        dtype, and returns an object with `speak`). Raises ValueError with the remedy."""
        device, dtype = device_and_dtype(device, dtype)
        if ".py:" in str(name):
            return foreign.load(name, device, dtype)
        place, options = resolve(name, CAPTIONERS, "captioner")
        local = {"local_files_only": True, "trust_remote_code": False}
        with readable_errors(name, "captioner"):
            import transformers
            kind = transformers.AutoConfig.from_pretrained(place, **local).model_type
            if kind not in ("blip", "blip-2"):
                raise ValueError(f"it is a {kind} model: BLIP and BLIP-2 are known here, another "
                                 "comes in as file.py:function")
            model = transformers.AutoModelForImageTextToText.from_pretrained(place, dtype=dtype,
                                                                             **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **local)
            processor = transformers.AutoImageProcessor.from_pretrained(place, **local)
            model = model.to(device)
            check_finite(model)
            own_class = cls if kind == "blip" else Captioner2
            return own_class(model, tokenizer, processor)

    def __init__(self, model, tokenizer, processor):
        known = processor.do_normalize and processor.image_mean is not None
        known = known and processor.do_resize and int(processor.resample) in (2, 3)
        if not known or processor.do_center_crop or not processor.size.height:
            raise ValueError("its preprocessor_config.json is of no kind known here: a captioner's "
                             "pictures are resized to a height and a width, bilinearly or "
                             "bicubically, and normalised, not cut")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor
        self.device = model.device
        self.dtype = model.dtype
        self.side = None                         # pixels a side, where not as the processor says
        self.mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(3, 1, 1)
        self.set_prompt()
        self.head = self.decoder.get_output_embeddings()
        self.lead = len(self.prompt) - 1         # places before a caption's first prediction
        self.room = self.limit - len(self.prompt) - 1          # tokens that a caption may have
        # ids that are no words, such as [DEC], [ENC] and <image>: never sampled, never in a beam
        image = [i for word, i in tokenizer.get_added_vocab().items() if word == "<image>"]
        self.unsaid = [*range(len(tokenizer), len(self.head.weight)), *image]
        if 2 * len(self.unsaid) > len(self.head.weight):
            raise ValueError(f"its tokenizer knows {len(tokenizer)} words, the model "
                             f"{len(self.head.weight)}: its files are of another")

    def set_prompt(self):
        """The ids of prompt, end, padding. BLIP's tokenizer lacks [DEC], which begins captions."""
        text = self.model.config.text_config
        words = self.tokenizer("a picture of ", add_special_tokens=False).input_ids
        self.prompt = [text.bos_token_id, *words]
        self.end = text.sep_token_id
        self.pad = text.pad_token_id
        self.limit = text.max_position_embeddings
        self.decoder = self.model.text_decoder

    def save(self, folder):
        """As a stock directory: from_pretrained of the model and of AutoProcessor read it. (BLIP-2
        of another `side` wants interpolate_pos_encoding=True of the library.)"""
        processor = copy.deepcopy(self.processor)
        if self.side:
            processor.size = {"height": self.side, "width": self.side}
        processor.save_pretrained(folder)
        self.stock_processor(processor).save_pretrained(folder)
        self.model.save_pretrained(folder)

    def stock_processor(self, processor):
        from transformers import BlipProcessor
        return BlipProcessor(processor, self.tokenizer)

    # pixels and tokens in
    def pixels(self, images):
        """Images as the model sees them: (B, 3, S, S), resized (to `side`, if it is set) and
        normalised as the library's processor does, but differentiable: values are clamped to
        [0, 1], gradients pass (a clamp stops them where a picture saturates)."""
        size = self.processor.size
        goal = (self.side or size.height, self.side or size.width)
        mode = "bilinear" if int(self.processor.resample) == 2 else "bicubic"
        wide = torch.promote_types(self.dtype, torch.float32)
        views = [F.interpolate(image[None].to(self.device, wide), goal, mode=mode, antialias=True)
                 for image in images]
        x = torch.cat(views)
        x = x + (x.clamp(0, 1) - x).detach()
        return ((x - self.mean.to(x)) / self.std.to(x)).to(self.dtype)

    def see(self, images):
        """Vision, once per image: (B, P, D), what the decoder attends to."""
        return self.model.vision_model(self.pixels(images)).last_hidden_state

    def decode(self, states, ids, cache=None):
        """Decoder over ids (B, L), after the cache: hidden (B, L, D), before the head; cache."""
        out = self.decoder.bert(ids, encoder_hidden_states=states, past_key_values=cache,
                                use_cache=cache is not None, is_decoder=True)
        return self.decoder.cls.predictions.transform(out.last_hidden_state), out.past_key_values

    def new_cache(self):
        """An empty cache of the decoder's keys and values, of its own words and of vision."""
        from transformers import DynamicCache, EncoderDecoderCache
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def tokenize(self, captions):
        """Ids of prompt, caption and end of each, cut at the decoder's length: B lists."""
        texts = [self.space + c for c in captions]
        rows = self.tokenizer(texts, add_special_tokens=False).input_ids
        return [self.prompt + ids[:self.room] + [self.end] for ids in rows]

    def read(self, images, captions, states=None):
        """One teacher-forced pass for the caption losses (Eq. 1, 4): B images (or their states) and
        captions -> Reading. Differentiable with respect to images and weights."""
        if states is None:
            states = self.see(images)
        rows = [torch.tensor(row) for row in self.tokenize(captions)]
        ids = pad_sequence(rows, True, self.pad)                       # (B, L + 1)
        targets = pad_sequence(rows, True, -100)
        targets[:, :len(self.prompt)] = -100
        # padding is on the right: a causal decoder never sees it
        hidden, _ = self.decode(states, ids[:, :-1].to(self.device))
        return Reading(hidden, targets[:, 1:].to(self.device), self.head.weight, self.head.bias)

    @torch.no_grad()
    def likelihood(self, images, captions, states=None):
        """log p(caption | image) in nats, its end included: (B,) float64 on the CPU."""
        r = self.read(images, captions, states)
        logp = F.linear(r.hidden, r.weight, r.bias).float().log_softmax(-1)     # (B, L, V)
        said = logp.gather(2, r.targets.clamp(min=0)[..., None])[..., 0]        # (B, L)
        return said.masked_fill(r.targets < 0, 0).sum(1).cpu().double()

    def tokens(self, captions):
        """How many tokens the model says for each caption, its end included: (B,) float64."""
        counts = [len(row) - len(self.prompt) for row in self.tokenize(captions)]
        return torch.tensor(counts, dtype=torch.float64)

    # captions out
    @torch.no_grad()
    def speak(self, images, n=10, way="top-p", seed=0, items=None, length=(5, 20)):
        """Generates n captions of each image: (list of B lists of n str, log-likelihoods (B, n)).

        way: top-p .9 (the paper's), top-k 50, temperature .7, typical .9, beam (3, or n if more);
        sampling has the repetition penalty 1.1. length: fewest and most tokens, the prompt's
        included, as BLIP counts them. Raises ValueError for another way.
        """
        if way not in WAYS:
            raise ValueError(f"unknown way of speaking {way!r}: choose one of {', '.join(WAYS)}")
        states = self.see(images)
        if way == "beam":
            ids = self.beam_search(states, n, length)
        else:
            items = range(len(images)) if items is None else items
            ids = self.sample(states, n, way, seed, items, length)
        # end and padding are special, or white space
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True,
                                            clean_up_tokenization_spaces=True)
        texts = [" ".join(text.split()) for text in texts]
        likelihood = self.likelihood(None, texts, states.repeat_interleave(n, 0)).view(-1, n)
        return [texts[i:i + n] for i in range(0, len(texts), n)], likelihood

    def sample(self, states, n, way, seed, items, length):
        """n samples for each of B states -> ids after the prompt (B n, L). Prompt and vision are
        computed once per image; then the cache is repeated n times."""
        from transformers.generation import logits_process as warp
        warpers = {"top-p": warp.TopPLogitsWarper(.9), "top-k": warp.TopKLogitsWarper(50),
                   "temperature": warp.TemperatureLogitsWarper(.7),
                   "typical": warp.TypicalLogitsWarper(.9)}
        penalty = warp.RepetitionPenaltyLogitsProcessor(1.1)
        ids = torch.tensor([self.prompt] * len(states), device=self.device)
        hidden, cache = self.decode(states, ids, self.new_cache())
        cache.batch_repeat_interleave(n)
        hidden, ids, states = (x.repeat_interleave(n, 0) for x in (hidden, ids, states))
        # one throw of the dice for each token of each sample
        dice = [torch.rand(n, length[1], generator=chance("speak", seed, i)) for i in items]
        dice = torch.cat(dice).double()                                # (B n, most tokens)
        live = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        for step in range(length[1] - len(self.prompt)):
            logits = self.head(hidden[:, -1]).float()                  # (B n, V)
            logits[:, self.unsaid] = -torch.inf
            if ids.shape[1] < length[0]:
                logits[:, self.end] = -torch.inf
            logits = warpers[way](ids, penalty(ids, logits))
            total = logits.softmax(-1).cpu().double().cumsum(-1)
            aim = dice[:, step, None] * total[:, -1:]
            token = torch.searchsorted(total, aim, right=True)[:, 0].to(self.device)
            token = torch.where(live, token, self.pad)
            ids = torch.cat([ids, token[:, None]], 1)
            live = live & (token != self.end)
            if not live.any():
                break
            hidden, cache = self.decode(states, token[:, None], cache)
        return ids[:, len(self.prompt):]

    def beam_search(self, states, n, length):
        """The n best of max(3, n) beams, by the library -> ids after the prompt (B n, L)."""
        ids = torch.tensor([self.prompt] * len(states), device=self.device)
        out = self.decoder.generate(ids, attention_mask=torch.ones_like(ids),
                                    encoder_hidden_states=states, **self.beam_options(n, length))
        return out[:, len(self.prompt):]

    def beam_options(self, n, length):
        fewest, most = (max(0, tokens - len(self.prompt)) for tokens in length)
        return {"num_beams": max(self.beams, n), "length_penalty": self.length_penalty,
                "num_return_sequences": n, "do_sample": False,
                "eos_token_id": self.end, "pad_token_id": self.pad, "min_new_tokens": fewest,
                "max_new_tokens": most, "suppress_tokens": self.unsaid or None}


class Captioner2(Captioner):
    """BLIP-2 with a decoder-only language model: query tokens stand before the prompt."""
    space = " "
    micro = 4                                    # eight at once take more than 24 GB
    learns_queries = True

    def set_prompt(self):
        config = self.model.config
        text = config.text_config
        if text.is_encoder_decoder:
            raise ValueError("a BLIP-2 with an encoder-decoder language model is not supported: "
                             "use blip2-opt-2.7b")
        # Differs: the paper's prompt is BLIP's; BLIP-2 was trained with this one (Li et al. 2023)
        words = self.tokenizer("a photo of", add_special_tokens=False).input_ids
        self.prompt = [self.tokenizer.bos_token_id, *words]
        self.end = text.eos_token_id
        self.pad = text.pad_token_id
        self.limit = text.max_position_embeddings - config.num_query_tokens
        self.decoder = self.model.language_model

    def stock_processor(self, processor):
        """The stock model puts the picture where the prompt has num_query_tokens times <image>:
        without that number it answers unseeing. Older clones get the token."""
        from transformers import Blip2Processor
        config = self.model.config
        stock = Blip2Processor(processor, copy.deepcopy(self.tokenizer),
                               num_query_tokens=config.num_query_tokens)
        config.image_token_index = stock.tokenizer.convert_tokens_to_ids("<image>")
        return stock

    def see(self, images):
        pixels = self.pixels(images)
        other = pixels.shape[-1] != self.model.config.vision_config.image_size
        return self.model.get_image_features(pixels, interpolate_pos_encoding=other).pooler_output

    def new_cache(self):
        from transformers import DynamicCache
        return DynamicCache()

    def decode(self, states, ids, cache=None):
        inputs = self.decoder.get_input_embeddings()(ids)              # (B, L, D)
        if cache is None or cache.get_seq_length() == 0:
            inputs = torch.cat([states.to(inputs), inputs], 1)
        out = self.decoder.model(inputs_embeds=inputs, past_key_values=cache,
                                 use_cache=cache is not None)
        return out.last_hidden_state[:, -ids.shape[1]:], out.past_key_values

    def beam_search(self, states, n, length):
        prompt = torch.tensor([self.prompt] * len(states), device=self.device)
        words = self.decoder.get_input_embeddings()(prompt)
        inputs = torch.cat([states.to(words), words], 1)
        mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=self.device)
        return self.decoder.generate(inputs_embeds=inputs, attention_mask=mask,
                                     **self.beam_options(n, length))
