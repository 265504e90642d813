"""MetaQuery: learnable queries carry a frozen multimodal LLM's knowledge to a diffusion model.

"Transfer between Modalities with MetaQueries" (Pan et al., 2025), in one file that needs no other:

    system prompt, pictures, text, "assistant:"      N learnable queries (trained)
                     │                                       │
            ┌────────▼───────────────────────────────────────▼────────┐
            │       multimodal LLM, causal mask, weights frozen       │
            │  pass 1: prompt → keys, values     pass 2: the queries  │
            └────────────────────────────────────────────┬────────────┘
                                                         │ last hidden states (B, N, d)
                                                connector (trained)
                                                         │ condition (B, N, c)
                         noise ──────────────► diffusion model (trained) ──► VAE decoder ──► picture

Frozen means that no *weight* of the LLM changes. Gradient still flows *through* it: the loss
reaches the queries by way of all its layers, as in prompt tuning.
B prompts, T prompt tokens, N queries, L condition tokens; d MLLM width, c caption width.
"""

import json
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelHubMixin, snapshot_download
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


# ---- 1. Config and presets -----------------------------------------------------------------------
class InputError(ValueError):
    """An error the user can fix. Its text is one line: what is wrong, and what to do."""


@dataclass
class MetaQueryConfig:
    """What defines a MetaQuery model (paper §3). Every field is a flag of train.py."""

    mllm: str  # hub id or folder: LLaVA-OneVision, Qwen2.5-VL or a text-only ChatML model
    diffusion: str  # hub id or folder: Sana or Stable Diffusion, with its VAE and scheduler
    num_queries: int = 256  # N, how many learnable queries
    connector: Literal["enc-proj", "proj-enc"] = "enc-proj"  # Table 3
    connector_layers: int = 24  # transformer layers of the connector
    condition_on: Literal["queries", "random", "last_layer"] = "queries"  # Table 1
    train_mllm: bool = False  # Table 2: the paper keeps the MLLM frozen
    train_diffusion: bool = True  # Table 2: tuning the diffusion model helps
    image_guidance: float = 1.5  # g_img of drawings from pictures, unless `generate` is given one

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = get_args(field.type)
            if allowed and value not in allowed:
                raise InputError(f"unknown {field.name} {value!r}: choose one of {allowed}.")
            if not allowed and type(value) is not field.type:
                raise InputError(f"{field.name} is {value!r}: give a {field.type.__name__}.")
            if field.type is int and value < 1:
                raise InputError(f"{field.name} is {value}: it must be at least 1.")

    @classmethod
    def preset(cls, size, **changes):
        """The config of a size, a key of PRESETS, with some fields changed."""
        if size not in PRESETS:
            raise InputError(f"unknown size {size!r}: choose one of {', '.join(PRESETS)}.")
        return cls(**(PRESETS[size] | changes))


HERE = Path(__file__).resolve().parent
TINY = HERE / "weights" / "tiny"
SANA = "Efficient-Large-Model/Sana_1600M_512px_diffusers"
PRESETS = {
    "tiny": {"mllm": str(TINY / "mllm"), "diffusion": str(TINY / "diffusion"),
             "num_queries": 16, "connector_layers": 3, "image_guidance": 3.25},
    "base": {"mllm": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "diffusion": SANA},
    "large": {"mllm": "Qwen/Qwen2.5-VL-3B-Instruct", "diffusion": SANA},
    "xlarge": {"mllm": "Qwen/Qwen2.5-VL-7B-Instruct", "diffusion": SANA},
}  # fmt: skip

# ---- 2. From prompts to the MLLM's inputs --------------------------------------------------------
#
# A prompt with one picture; the N queries come next, where the MLLM would begin its description:
#
#   <|im_start|>system
#   You will be given an image or its caption. Please describe ... in your own words.<|im_end|>
#   <|im_start|>user
#   <image>
#   make the star green<|im_end|>
#   <|im_start|>assistant

SYSTEM_PROMPT = """You will be given an image or its caption. Please describe the content of the \
image in detail in your own words."""
MAX_PROMPT_TOKENS = 256  # of the user's text; what follows is cut off
MAX_PICTURES = 6  # in one prompt, as in the paper's instruction data (§4)
MAX_ASPECT_RATIO = 100  # Qwen2.5-VL's processor refuses 200
QWEN_PIXELS = {"shortest_edge": 256 * 28 * 28, "longest_edge": 1280 * 28 * 28}  # a token: 28 × 28


def prepare_inputs(processor, mllm_config, prompts, images=None, system=SYSTEM_PROMPT):
    """Tokenize B prompts as chats, padded on the left: a dict of tensors. It needs no weights.

    images: as for `picture_lists`. With system=None, to ask the MLLM itself, they stay uncropped.
    Raises InputError if there are too many, or the MLLM reads text only."""
    takes_images = hasattr(mllm_config, "vision_config")
    tokenizer = getattr(processor, "tokenizer", processor)
    images = [[to_rgb(picture) for picture in row] for row in picture_lists(prompts, images)]
    if any(images) and not takes_images:
        raise InputError("this MLLM reads text only: use LLaVA-OneVision or Qwen2.5-VL.")
    if max(map(len, images)) > MAX_PICTURES:
        raise InputError(f"too many pictures for one prompt: give at most {MAX_PICTURES}.")
    chats = [
        conversation(clean_prompt(tokenizer, prompt), len(row), system, takes_images)
        for prompt, row in zip(prompts, images, strict=True)
    ]
    texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if not any(images):
        return tokenizer(texts, **options)
    if system and mllm_config.model_type == "llava_onevision":
        square = (mllm_config.vision_config.image_size,) * 2
        images = [[resize_and_crop(picture, square) for picture in row] for row in images]
    elif system:
        options["size"] = QWEN_PIXELS
    return processor(text=texts, images=images, **options)


def picture_lists(prompts, images):
    """Per prompt a list of PIL images. `images` may also be None, or hold one image a prompt; for a
    single prompt, be a list of its images. Raises InputError if it fits neither."""
    images = [None] * len(prompts) if images is None else list(images)
    if len(prompts) == 1 and images and all(isinstance(row, Image.Image) for row in images):
        images = [images]
    images = [[row] if isinstance(row, Image.Image) else row for row in images]
    images = [[] if row is None else row for row in images]
    if len(images) != len(prompts):
        raise InputError(f"{len(images)} lists of images for {len(prompts)} prompts: give as many.")
    for row in images:
        if not isinstance(row, list | tuple) or not all(isinstance(x, Image.Image) for x in row):
            raise InputError("images must be lists of PIL images: open files with PIL.Image.open.")
    return images


def conversation(prompt, pictures=0, system=SYSTEM_PROMPT, as_parts=False):
    """Chat messages: so many pictures, then the text, also when it is empty; as lists of parts, or
    as plain strings for the templates of text-only models."""
    parts = [{"type": "image"}] * pictures + [{"type": "text", "text": prompt}]
    user = {"role": "user", "content": parts if as_parts or pictures else prompt}
    system_content = [{"type": "text", "text": system}] if as_parts else system
    return [user] if system is None else [{"role": "system", "content": system_content}, user]


def clean_prompt(tokenizer, prompt):
    """A prompt without the tokenizer's special tokens, cut at MAX_PROMPT_TOKENS with a warning.

    Raises InputError if it is not text that UTF-8 can encode."""
    if not isinstance(prompt, str) or prompt != prompt.encode(errors="ignore").decode():
        raise InputError(f"the prompt {prompt!r} is not Unicode text: correct or remove it.")
    for token in tokenizer.all_special_tokens:
        prompt = prompt.replace(token, " ")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(ids) <= MAX_PROMPT_TOKENS:
        return prompt
    warnings.warn(f"prompt cut from {len(ids)} to {MAX_PROMPT_TOKENS} tokens", stacklevel=4)
    return tokenizer.decode(ids[:MAX_PROMPT_TOKENS])


def to_rgb(picture):
    """A PIL image of any mode as it looks: upright, RGB, 8 bits, transparent parts white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF":  # 16 bits, 0 to 65,535, or floats: 0 to 1, or 0 to 255
        values = np.asarray(picture)
        most = 65_535 if picture.mode != "F" else 1 if values.max() <= 1 else 255
        picture = Image.fromarray((values * (255 / most)).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    longest = MAX_ASPECT_RATIO * min(picture.size)
    size = [min(side, longest) for side in picture.size]
    return ImageOps.fit(picture.convert("RGB"), size)  # crops what is too long, and only that


def resize_and_crop(picture, size):
    """A PIL image resized (bilinear, antialiased, as in the authors' code) and centre-cropped."""
    return ImageOps.fit(to_rgb(picture), size, Image.Resampling.BILINEAR)


def black_like(pictures):
    """Black pictures of the same sizes: what stands for a dropped picture."""
    return [Image.new("RGB", to_rgb(picture).size) for picture in pictures]


def drop_conditions(prompt, images, u, stage):
    """(prompt, images) of one training sample, some of it dropped by a uniform u in [0, 1).

    Guidance needs the prediction *without* a condition, so the model must see some such samples: a
    tenth lose what they have; of instructions a tenth the text, a tenth both, a tenth pictures."""
    if not images:
        return "" if u < 0.1 else prompt, images
    if stage == "instruct" and prompt:
        return "" if u < 0.2 else prompt, black_like(images) if 0.1 <= u < 0.3 else images
    return prompt, black_like(images) if u < 0.1 else images


def to_device(inputs, device):
    """Move inputs to a device, except for those that LLaVA-OneVision reads on the CPU."""
    cpu = ("image_sizes", "batch_num_images")
    return {n: x if n in cpu else x.to(device, non_blocking=True) for n, x in inputs.items()}


# ---- 3. The connector ----------------------------------------------------------------------------
HEAD_DIM = 64  # of each attention head
ROPE_BASE = 10_000  # θ of the rotary position embedding
INIT_STD = 0.014  # of linear weights


def rotate(x, cos, sin):
    """Rotary embedding: turn each pair (x_i, x_{i+32}) of x (B, heads, L, 64) by its angle."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class ConnectorLayer(nn.Module):
    """A Qwen2-style transformer layer that looks both ways: no causal mask (§3.3)."""

    def __init__(self, width):
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6)
        self.key_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, cos, sin, mask):
        """x (B, L, width); cos, sin (L, 64); mask (B, 1, 1, L), False at padding, or None."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, -1, HEAD_DIM))  # (B, L, 3, h, 64)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, heads, L, 64)
        q = self.query_norm(rotate(q, cos, sin)).to(v.dtype)
        k = self.key_norm(rotate(k, cos, sin)).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, 64)
        x = x + self.out(attended.transpose(1, 2).flatten(2))  # (B, L, width)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))  # (B, L, width)


class Connector(nn.Module):
    """Maps MLLM states (B, L, d) to the condition (B, L, c) of the diffusion model (§3.3, Table 3).

    "enc-proj" runs its layers at the MLLM's width d, then projects to c; "proj-enc" projects first.
    `gain` starts the last norm. Raises InputError if the width is not a multiple of HEAD_DIM."""

    def __init__(self, d, c, layers=24, design="enc-proj", gain=1.0):
        super().__init__()
        self.design = design
        width = d if design == "enc-proj" else c
        if width % HEAD_DIM:
            raise InputError(f"the connector's width {width} is not a multiple of {HEAD_DIM}.")
        self.layers = nn.ModuleList(ConnectorLayer(width) for _ in range(layers))
        self.projection = nn.Sequential(nn.Linear(d, c), nn.GELU("tanh"), nn.Linear(c, c))
        self.norm = nn.RMSNorm(c, eps=1e-5)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.constant_(self.norm.weight, gain)

    def forward(self, x, mask=None):
        """x (B, L, d); mask (B, L), 0 at padding, or None. Returns (B, L, c)."""
        if self.design == "proj-enc":
            x = self.projection(x)  # (B, L, c)
        frequencies = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2, device=x.device) / HEAD_DIM)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies  # (L, 32)
        angles = angles.repeat(1, 2)  # (L, 64)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        mask = None if mask is None else mask[:, None, None].bool()  # (B, 1, 1, L)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        if self.design == "enc-proj":
            x = self.projection(x)  # (B, L, c)
        return self.norm(x.to(self.norm.weight.dtype))  # (B, L, c)


# ---- 4. The model --------------------------------------------------------------------------------
class MetaQuery(nn.Module, ModelHubMixin, library_name="metaquery", license="mit"):
    """Learnable queries, a frozen MLLM, a connector and a diffusion model (Figure 1).

    Attributes: queries (N, d), mllm, processor, connector, diffusion, vae, scheduler, config.
    Frozen parts are kept in `dtype`, trained ones in float32."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config = config
        self.mllm, self.processor = load_mllm(config, dtype)
        self.diffusion, self.vae, self.scheduler = load_diffusion(config, dtype)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.prepare_inputs = partial(prepare_inputs, self.processor, self.mllm.config)
        self.takes_images = hasattr(self.mllm.config, "vision_config")
        self.is_flow = "flow" in str(self.scheduler.config.get("prediction_type"))
        self.shift = self.vae.config.get("shift_factor") or 0
        self.scale = self.vae.config.scaling_factor
        d = self.mllm.config.get_text_config().hidden_size
        c = caption_width(self.diffusion)
        gain = 5.5**0.5 if "caption_channels" in self.diffusion.config else 1.0  # Sana, or SD
        self.queries = nn.Parameter(torch.randn(config.num_queries, d) * 0.02)  # (N, d)
        self.connector = Connector(d, c, config.connector_layers, config.connector, gain)
        self.queries.requires_grad_(config.condition_on == "queries")
        self.mllm.requires_grad_(config.train_mllm)
        self.diffusion.requires_grad_(config.train_diffusion)
        self.vae.requires_grad_(False)

    def encode_prompts(self, prompts, images=None):
        """The condition for the diffusion model: cond (B, L, c) and its mask (B, L) or None (§3.1).

        prompts: B strings, or what `prepare_inputs` made of them; images: per prompt a list of PIL
        images, or None. L is N, or the prompts' length T for condition_on "last_layer"."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        inputs = prompts if isinstance(prompts, Mapping) else self.prepare_inputs(prompts, images)
        inputs = to_device(inputs, self.queries.device)
        backbone = self.mllm.base_model  # the MLLM without its language head
        mask = inputs.pop("attention_mask")  # (B, T), 0 at padding

        # Positions count the real tokens, so that padding on the left changes nothing:
        #   tokens      pad pad  a  red star | q0  q1  q2
        #   mask         0   0   1   1   1   |  1   1   1
        #   positions    0   0   0   1   2   |  3   4   5
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
        if "image_grid_thw" in inputs:  # Qwen2.5-VL counts in time, height and width
            ids = {name: value for name, value in inputs.items() if name != "pixel_values"}
            positions = backbone.get_rope_index(**ids, attention_mask=mask)[0]  # (3, B, T)

        # Pass 1: the prompt alone. The mask is causal: no prompt token can see a query, so its keys
        # and values are the same with and without queries, and no gradient to a query crosses them.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_mllm):
            prompt = backbone(**inputs, attention_mask=mask, position_ids=positions, use_cache=True)
        if self.config.condition_on == "last_layer":
            hidden = prompt.last_hidden_state.to(self.connector.norm.weight.dtype)  # (B, T, d)
            return self.connector(hidden, mask), mask

        # Pass 2: the queries, with gradient, against these keys and values. It equals one pass, but
        # its backward pass costs N tokens, however long the prompt is. The same in one pass:
        #   words = self.mllm.get_input_embeddings()(input_ids)  # (B, T, d)
        #   both = backbone(inputs_embeds=torch.cat([words, queries], 1), attention_mask=full_mask)
        #   hidden = both.last_hidden_state[:, -N:]
        queries = self.queries.to(self.mllm.dtype).expand(len(mask), -1, -1)  # (B, N, d)
        full_mask = torch.cat([mask, mask.new_ones(queries.shape[:2])], 1)  # (B, T + N)
        steps = 1 + torch.arange(queries.shape[1], device=mask.device)  # (N,)
        positions = positions.amax(-1, keepdim=True) + steps  # (B, N) or (3, B, N)
        outputs = backbone(inputs_embeds=queries, cache=prompt.cache, attention_mask=full_mask,
                           position_ids=positions, use_cache=True)  # fmt: skip
        hidden = outputs.last_hidden_state.to(self.connector.norm.weight.dtype)  # (B, N, d)
        return self.connector(hidden), None

    def forward(self, prompts, targets, images=None, noise=None, sigma=None):
        """The training loss, a scalar: how well `targets` are drawn from `prompts` and `images`.

        targets (B, 3, H, W) in [-1, 1]. noise (B, C, h, w) is ε, sigma (B,) is σ in (0, 1], for
        Stable Diffusion the integer timestep; both are random unless given."""
        x = self.encode_latents(targets)  # (B, C, h, w)
        noise = torch.randn_like(x) if noise is None else noise
        cond, cond_mask = self.encode_prompts(prompts, images)  # (B, L, c)
        if self.is_flow:
            sigma = 1 - torch.rand(len(x), device=x.device) if sigma is None else sigma  # in (0, 1]
            s = sigma.view(-1, 1, 1, 1)
            noisy = (1 - s) * x + s * noise  # x_σ = (1 − σ)·x + σ·ε
            timestep = 1000 * sigma
            target = noise - x  # the velocity dx_σ/dσ = ε − x
        else:
            if sigma is None:
                sigma = torch.randint(self.scheduler.config.num_train_timesteps, (len(x),))
            timestep = sigma.long().to(x.device)
            noisy = self.scheduler.add_noise(x, noise, timestep)  # x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε
            target = noise  # ε
            if self.scheduler.config.prediction_type == "v_prediction":
                target = self.scheduler.get_velocity(x, noise, timestep)  # √ᾱ_t·ε − √(1 − ᾱ_t)·x
        return F.mse_loss(self.denoise(noisy, timestep, cond, cond_mask), target)

    def denoise(self, x, timestep, cond, cond_mask):
        """The diffusion model's prediction (B, C, h, w) for noisy latents x at timestep (B,)."""
        dtype = self.diffusion.dtype
        x, cond = x.to(dtype), cond.to(dtype)
        return self.diffusion(x, timestep=timestep, encoder_hidden_states=cond,
                              encoder_attention_mask=cond_mask).sample.float()  # fmt: skip

    @torch.no_grad()
    def generate(self, prompts, images=None, negative_prompt="", num_inference_steps=30,
                 guidance_scale=3.0, image_guidance_scale=None, num_images_per_prompt=1,
                 generator=None, callback=None):  # fmt: skip
        """Draw pictures: a list of PIL images, `num_images_per_prompt` for each prompt in turn.

        images: per prompt a list of PIL images, or None. No guidance: guidance_scale g = 1,
        image_guidance_scale g_img ≤ 1; None is the config's, 1.5 for the paper's sizes.
        `generator` seeds the noise, as in a diffusers pipeline.
        `callback(guess)` is called after each step with latents (B·n, C, h, w), the picture as it
        looks to the solver. Raises InputError if the latents are not finite."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        images = picture_lists(prompts, images)
        negative = [negative_prompt] * len(prompts)
        if image_guidance_scale is None:
            image_guidance_scale = self.config.image_guidance
        # Each branch is one way to condition; all are encoded, and denoised, as one batch.
        branches = {"text": (prompts, images)}
        guide_by_images = any(images) and image_guidance_scale > 1
        if guidance_scale != 1 or guide_by_images:
            branches["negative"] = (negative, images)
        if guide_by_images:
            branches["black"] = (negative, [black_like(row) for row in images])

        def guide(v):  # steers away from what is not asked for
            if "black" in v:  # v = v_black + g_img·(v_neg − v_black) + g·(v_text − v_neg)
                by_images = v["black"] + image_guidance_scale * (v["negative"] - v["black"])
                return by_images + guidance_scale * (v["text"] - v["negative"])
            if "negative" in v:  # v = v_neg + g·(v_text − v_neg)
                return v["negative"] + guidance_scale * (v["text"] - v["negative"])
            return v["text"]

        texts = sum((branch_texts for branch_texts, _ in branches.values()), [])
        pictures = sum((branch_images for _, branch_images in branches.values()), [])
        cond, cond_mask = self.encode_prompts(texts, pictures)  # (branches·B, L, c)
        cond = cond.repeat_interleave(num_images_per_prompt, 0)
        if cond_mask is not None:
            cond_mask = cond_mask.repeat_interleave(num_images_per_prompt, 0)
        # The model has learned the velocity dx_σ/dσ = ε − x. To draw is to follow it from noise,
        # σ = 1, to a picture, σ = 0: an ordinary differential equation, solved in a few steps.
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps, device=self.queries.device)
        channels, side = self.diffusion.config.in_channels, self.diffusion.config.sample_size
        shape = (len(prompts) * num_images_per_prompt, channels, side, side)
        noise = randn_tensor(shape, generator, self.queries.device, torch.float32)
        x = noise * scheduler.init_noise_sigma  # (B·n, C, h, w)
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(x, timestep).repeat(len(branches), 1, 1, 1)
            predicted = self.denoise(noisy, timestep.expand(len(noisy)), cond, cond_mask)
            v = dict(zip(branches, predicted.chunk(len(branches)), strict=True))
            x = scheduler.step(guide(v), timestep, x).prev_sample
            if callback:
                callback(scheduler.model_outputs[-1])
        if not x.isfinite().all():
            todo = "lower guidance_scale, or check that all weights are finite"
            raise InputError(f"the drawing is not finite: {todo}.")
        return self.decode_latents(x)

    @torch.no_grad()
    def answer(self, prompt, images=None, max_new_tokens=256, streamer=None):
        """The MLLM's own answer, a string, to a prompt about `images`, a list of PIL images. No
        query takes part: it is the untouched MLLM's. `streamer` (transformers') prints it."""
        inputs = to_device(self.prepare_inputs([prompt], [images], None), self.queries.device)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "streamer": streamer}
        tokens = self.mllm.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()

    @torch.no_grad()
    def encode_latents(self, pixels):
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), float32: (z − shift)·scale."""
        encoded = self.vae.encode(pixels.to(self.vae.dtype))
        if hasattr(encoded, "latent"):  # Sana's autoencoder
            z = encoded.latent
        else:  # a KL autoencoder encodes to a normal distribution
            z = encoded.latent_dist.sample() if self.training else encoded.latent_dist.mode()
        return ((z - self.shift) * self.scale).float()

    @torch.no_grad()
    def decode_latents(self, latents):
        """Latents (B, C, h, w) to a list of B PIL images: z = latents / scale + shift."""
        z = latents / self.scale + self.shift
        pixels = self.vae.decode(z.to(self.vae.dtype)).sample.float().clamp(-1, 1)  # (B, 3, H, W)
        arrays = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in arrays]

    def trained_state_dict(self):
        """What a checkpoint holds: queries, connector and whatever else the config trains."""
        named = self.named_parameters()
        kept = ((n, p) for n, p in named if p.requires_grad or n == "queries")  # also random ones
        return {name: parameter.detach().contiguous() for name, parameter in kept}

    def load_trained_state_dict(self, state, source):
        """Load a `trained_state_dict`; raises InputError if it is incompatible with the config."""
        expected = self.trained_state_dict()
        fits = {n for n in expected if n in state and state[n].shape == expected[n].shape}
        if wrong := [name for name in expected | state if name not in fits]:
            reason = f"{len(wrong)} weights of {source} are incompatible with the config"
            raise InputError(f"{reason}, first {wrong[0]}: use the flags it was trained with.")
        self.load_state_dict(state, strict=False)

    def _save_pretrained(self, folder):  # called by save_pretrained(folder) and push_to_hub(id)
        save_checkpoint(self.config, self.trained_state_dict(), folder)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, **changes):
        """Load a checkpoint, a folder or a hub id; `changes` replace fields of its config. Raises
        InputError if it is missing, corrupt or incompatible with the config."""
        return load_checkpoint(folder, dtype, changes)


# ---- 5. Loading the frozen parts -----------------------------------------------------------------
def caption_width(diffusion):
    """c, the width of a diffusion model's text condition: 2304 for Sana, 768 for SD1.5."""
    return diffusion.config.get("caption_channels") or diffusion.config.cross_attention_dim


@contextmanager
def loading(name, flag):
    """Turn the errors of loading a part into an InputError; `flag` is what replaces the part."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a corrupt file may raise any: of safetensors, of tokenizers, ...
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        todo = f"go online (log in if the model is gated), or name another hub id or folder: {flag}"
        raise InputError(f"cannot load {name} ({reason}): {todo}.") from None


def load_mllm(config, dtype):
    """(MLLM in evaluation mode, its processor; a text-only MLLM's tokenizer)."""
    name = config.mllm
    auto_model, auto_processor = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    with loading(name, "--mllm"):
        if hasattr(transformers.AutoConfig.from_pretrained(name), "vision_config"):
            auto_model = transformers.AutoModelForImageTextToText
            auto_processor = transformers.AutoProcessor
        processor = auto_processor.from_pretrained(name)
        if not processor.chat_template:
            todo = "copy chat_template.jinja of its Instruct version into the folder"
            raise InputError(f"{name} has no chat template: {todo}, or choose another --mllm.")
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        dtype = torch.float32 if config.train_mllm else dtype
        return auto_model.from_pretrained(name, dtype=dtype).eval(), processor


def load_diffusion(config, dtype):
    """(diffusion model, VAE, scheduler): Sana's transformer, or Stable Diffusion's UNet."""
    name = config.diffusion
    load = partial(diffusers.AutoModel.from_pretrained, name, low_cpu_mem_usage=False)
    with loading(name, "--diffusion"):
        try:
            diffusers.SanaTransformer2DModel.load_config(name, subfolder="transformer")
            part, scheduler = "transformer", diffusers.DPMSolverMultistepScheduler
        except OSError:  # it has no such folder
            part, scheduler = "unet", diffusers.DDPMScheduler
        vae = load(subfolder="vae", torch_dtype=dtype).eval()
        trained_dtype = torch.float32 if config.train_diffusion else dtype
        diffusion = load(subfolder=part, torch_dtype=trained_dtype)
        return diffusion, vae, scheduler.from_pretrained(name, subfolder="scheduler")


# ---- 6. Checkpoints: skip on first reading -------------------------------------------------------
def portable(config, folder):
    """A config's fields, for its config.json in `folder`: the paths of parts that lie in `folder`,
    or beside this file, are relative to it. Hub ids and other paths stay as given."""
    values = asdict(config)
    for name in ("mllm", "diffusion"):
        path = Path(values[name]).resolve()
        bases = [base for base in (Path(folder).resolve(), HERE) if path.is_relative_to(base)]
        if path.exists() and bases:
            values[name] = str(path.relative_to(bases[0]))
    return values


def save_checkpoint(config, state, folder):
    """Write what was trained, a `trained_state_dict`; config.json names the frozen parts."""
    text = json.dumps(portable(config, folder), indent=2)
    (folder / "config.json").write_text(text + "\n")
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def load_checkpoint(folder, dtype, changes):
    """The MetaQuery saved in a folder or under a hub id; see `MetaQuery.from_pretrained`."""
    if not Path(folder).exists() and len(Path(folder).parts) == 2:
        with suppress(OSError, ValueError):
            folder = snapshot_download(str(folder))
    folder = Path(folder)
    try:
        values = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
        if "condition" in values:  # as older checkpoints named it
            values["condition_on"] = values.pop("condition")
        for name in ("mllm", "diffusion"):
            bases = [base for base in (folder, HERE) if (base / values[name]).is_dir()]
            values[name] = str(bases[0] / values[name]) if bases else values[name]
        config = MetaQueryConfig(**(values | changes))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        reason = f"{folder} is corrupt or not a MetaQuery checkpoint ({error})"
        todo = "name a folder that train.py saved, or an older step"
        raise InputError(f"{reason}: {todo}.") from None
    model = MetaQuery(config, dtype)
    model.load_trained_state_dict(state, folder)
    return model
