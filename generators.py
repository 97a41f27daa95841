"""What draws: a Stable Diffusion that draws captions, and denoises in training and as a judge.

    generator = Generator.load("sd14")           # or a directory, a hub id, "miniature", ...
    pictures = generator.draw(["a small red ball"], items=["first"], seed=0)

Images are float (B, 3, H, W) in [0, 1], captions str; latents and text states stay inside, but for
losses.py. The noise of a picture is a function of (seed, item).
Copy this file with loading.py, devices.py, foreign.py, records.py and cycle.py's `chance`: it needs
torch and diffusers.

Letters: B images, C h w a latent, D the width of the text states.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

import foreign
from cycle import chance
from devices import device_and_dtype
from loading import check_finite, readable_errors, resolve

GENERATORS = {"miniature": Path(__file__).resolve().parent / "miniature/sd",
              "sd14": "CompVis/stable-diffusion-v1-4"}


class Generator:
    """A Stable Diffusion 1.x or 2.x; any other text-to-image pipeline can only `draw`."""

    @classmethod
    def load(cls, name="miniature", device=None, dtype=None):
        """name: of GENERATORS, a pipeline directory, hub id or .safetensors file, or
        file.py:function (which returns an object with `draw`)."""
        device, dtype = device_and_dtype(device, dtype)
        if ".py:" in str(name):
            return foreign.load(name, device, dtype)
        place, options = resolve(name, GENERATORS, "generator")
        with readable_errors(name, "generator"):
            from diffusers import DiffusionPipeline, StableDiffusionPipeline
            from diffusers.utils import logging
            logging.disable_progress_bar()
            logging.set_verbosity_error()
            if place.endswith(".safetensors"):
                pipe = StableDiffusionPipeline.from_single_file(place, dtype=dtype,
                                                                local_files_only=True)
            else:
                # Differs: no safety checker, as a picture it blackens could not be compared
                pipe = DiffusionPipeline.from_pretrained(place, dtype=dtype, safety_checker=None,
                                                         requires_safety_checker=False, **options)
            return cls(pipe.to(device))

    def __init__(self, pipe):
        pipe.set_progress_bar_config(disable=True)
        if hasattr(pipe, "safety_checker"):      # of a pipeline that was not loaded here
            pipe.safety_checker = None
        if getattr(pipe, "vae", None) is not None:
            pipe.vae.enable_slicing()            # picture by picture: it is the peak of memory
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                check_finite(part.eval().requires_grad_(False))
        self.pipe = pipe
        self.device = pipe.device
        self.dtype = getattr(pipe, "dtype", torch.float32)
        for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            setattr(self, name, getattr(pipe, name, None))
        self.decoder = self.vae                  # of decode; a tiny_vae can take its place

    @torch.no_grad()
    def draw(self, captions, items=None, seed=0, steps=50, guidance=7.5, batch=16):
        """One picture per caption: (B, 3, H, W) float32 in [0, 1], on the CPU, by the checkpoint's
        own scheduler.

        The noise is a function of (seed, item): captions of equal items start from equal noise.
        Both guidance halves of a batch go through the UNet in one call.
        """
        if items is None:
            items = list(range(len(captions)))
        done = []
        for i in range(0, len(captions), batch):
            noise = [chance("draw", seed, item) for item in items[i:i + batch]]
            out = self.pipe(captions[i:i + batch], generator=noise, num_inference_steps=steps,
                            guidance_scale=guidance, output_type="pt")
            done.append(out.images.float().cpu())
        return torch.cat(done)

    def too_long(self, captions):
        """Which captions have more tokens than the text encoder reads, and lose their ends."""
        if self.tokenizer is None or not captions:
            return [False] * len(captions)
        most = self.tokenizer.model_max_length
        return [len(ids) > most for ids in self.tokenizer(list(captions), verbose=False).input_ids]

    # the parts, for training and for scoring without drawing (Stable Diffusion only)
    @property
    def denoises(self):
        """Whether it is a Stable Diffusion 1.x or 2.x; SDXL wants more than a caption's states."""
        if None in (self.unet, self.vae, self.text_encoder):
            return False
        return not self.unet.config.addition_embed_type

    @property
    def side(self):
        """Pixels a side of its pictures."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode(self, images):
        """Images -> mean and standard deviation of their latents, each (B, C, h, w), scaled as the
        UNet expects. As in its training: the shorter side made to fit, the middle taken."""
        views = []
        for image in images:
            scale = self.side / min(image.shape[-2:])
            if scale != 1:
                size = [max(self.side, round(s * scale)) for s in image.shape[-2:]]
                image = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
                image = image.clamp(0, 1)
            top, left = ((s - self.side) // 2 for s in image.shape[-2:])
            views.append(image[:, top:top + self.side, left:left + self.side])
        x = (torch.stack(views) * 2 - 1).to(self.device, self.dtype)           # (B, 3, S, S)
        latents = self.vae.encode(x).latent_dist
        scale = self.vae.config.scaling_factor
        return latents.mean * scale, latents.std * scale

    def decode(self, latents):
        """Latents (B, C, h, w) -> images (B, 3, H, W), about [0, 1]: a clamp stops gradients."""
        latents = latents.to(self.dtype) / self.decoder.config.scaling_factor
        return self.decoder.decode(latents).sample / 2 + .5

    def states(self, captions):
        """Captions -> text states (B, 77, D), with begin, end and padding as in its training."""
        ids = self.tokenizer(list(captions), padding="max_length", truncation=True,
                             max_length=self.tokenizer.model_max_length,
                             return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state

    def predict(self, noised, timesteps, states):
        """The UNet's output (B, C, h, w) for x_t, t (B,) and text states: noise or velocity, as the
        scheduler's prediction_type says."""
        return self.unet(noised, timesteps, states).sample


def few_steps(generator, decoder=None):
    """Gives a generator the solver that needs few steps, DPM-Solver++ (Lu et al. 2022), on its own
    noise schedule. A checkpoint distilled to few steps (LCM, TCD, Turbo: trailing timesteps), and
    one of flow matching, keeps its own. decoder: as in tiny_vae."""
    from diffusers import DPMSolverMultistepScheduler
    own = generator.pipe.scheduler
    keeps = type(own).__name__.startswith(("LCM", "TCD", "Flo"))
    if not keeps and own.config.get("timestep_spacing") != "trailing":
        generator.pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
    if decoder:
        generator.pipe.vae = tiny_vae(decoder, generator)
    return generator


def tiny_vae(name, generator):
    """A distilled autoencoder for a generator's latents, 1/18 of the work of its own: an
    AutoencoderTiny's place, or `tiny` for Stable Diffusion's or SDXL's (TAESD)."""
    tiny = "madebyollin/taesd" if generator.denoises else "madebyollin/taesdxl"
    place, options = resolve(name, {"tiny": tiny}, "decoder")
    with readable_errors(name, "decoder"):
        from diffusers import AutoencoderTiny
        vae = AutoencoderTiny.from_pretrained(place, dtype=generator.dtype, **options)
    own = generator.vae.config.latent_channels
    if vae.config.latent_channels != own:
        raise ValueError(f"decoder {str(name)!r} reads {vae.config.latent_channels} latent "
                         f"channels, the generator has {own}")
    return vae.to(generator.device).eval().requires_grad_(False)
