"""MetaQuery: queries carry a frozen multimodal LLM's knowledge to a diffusion model.

"Transfer between Modalities with MetaQueries" (Pan et al., 2025), in one file:

    system prompt, images, text, "assistant:"       N learnable queries (trained)
                     │                                       │
            ┌────────▼───────────────────────────────────────▼────────┐
            │       multimodal LLM, causal mask, weights frozen       │
            │  pass 1: prompt → keys, values     pass 2: the queries  │
            └────────────────────────────────────────────┬────────────┘
                                                         │ hidden states (B, N, d)
                                                connector (trained)
                                                         │ condition (B, N, c)
                      noise ─────────► diffusion model (trained) ──► VAE ──► image

Frozen means that no *weight* of the LLM changes. Gradient still flows *through* it: the
loss reaches the queries by way of all its layers, as in prompt tuning.
B prompts of T tokens, N queries, L condition tokens; d MLLM width, c caption width.
"""

import json
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import init_empty_weights
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelHubMixin, snapshot_download
from jinja2 import TemplateError
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2 import functional as transforms


# ---- 1. Config and presets -----------------------------------------------------------
class InputError(ValueError):
    """An error the user can fix, in one line: what is wrong, and what to do."""


@dataclass
class MetaQueryConfig:
    """What defines a MetaQuery model (paper §3). Every field is a flag of train.py."""

    mllm: str  # hub id or folder: LLaVA-OneVision, Qwen2.5-VL, InternVL3 or a text LLM
    diffusion: str  # hub id or folder: Sana or Stable Diffusion, with its scheduler
    num_queries: int = 256  # N, number of learnable queries
    connector: Literal["enc-proj", "proj-enc"] = "enc-proj"  # Table 3
    connector_layers: int = 24  # transformer layers of the connector
    condition_on: Literal["queries", "random", "last_layer"] = "queries"  # Table 1
    train_mllm: bool = False  # Table 2: the paper keeps the MLLM frozen
    train_diffusion: bool = True  # Table 2: tuning the diffusion model helps
    sigma_shift: float = 1.0  # above 1, training sees more noise; 1 is uniform
    vae: str = ""  # hub id or folder of another VAE than the diffusion model's own

    def __post_init__(self):
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(field.type)
            is_number = field.type in (int, float)
            fits = value in choices if choices else type(value) is field.type
            if not fits or is_number and not 0 < value <= 65_536:
                allowed = choices or f"{field.type.__name__}, numbers from 1 to 65,536"
                raise InputError(f"{field.name} is {value!r}: give one of {allowed}.")

    @classmethod
    def preset(cls, size, **changes):
        """The config of a size, a key of PRESETS, with some fields changed."""
        if size not in PRESETS:
            raise InputError(f"no size {size!r}: choose one of {', '.join(PRESETS)}.")
        return cls(**(PRESETS[size] | changes))


HERE = Path(__file__).resolve().parent
TINY = HERE / "weights" / "tiny"
LLAVA = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
SANA = "Efficient-Large-Model/Sana_1600M_512px_diffusers"
SANA_600M = "Efficient-Large-Model/Sana_600M_512px_diffusers"
PRESETS = {
    "tiny": {"mllm": str(TINY / "mllm"), "diffusion": str(TINY / "diffusion"),
             "num_queries": 16, "connector_layers": 3},
    "study": {"mllm": LLAVA, "diffusion": SANA_600M, "num_queries": 64,
              "train_diffusion": False},  # the paper's own setting of §3.2
    "base": {"mllm": LLAVA, "diffusion": SANA},
    "large": {"mllm": "Qwen/Qwen2.5-VL-3B-Instruct", "diffusion": SANA},
    "xlarge": {"mllm": "Qwen/Qwen2.5-VL-7B-Instruct", "diffusion": SANA},
}  # fmt: skip
# How a model generates unless its checkpoint's generation_config.json says otherwise.
# "restates": the MLLM says in a few words what it takes a prompt for (the toy's does).
GENERATION = {"num_inference_steps": 30, "guidance_scale": 3.0,
              "image_guidance_scale": 1.5, "restates": False}  # fmt: skip

# ---- 2. From prompts to the MLLM's inputs --------------------------------------------
#
# A prompt with one image. The N queries come next, where the MLLM would describe it:
#
#   <|im_start|>system
#   You will be given an image or its caption. Please describe ... own words.<|im_end|>
#   <|im_start|>user
#   <image>
#   make the star green<|im_end|>
#   <|im_start|>assistant

SYSTEM_PROMPT = """You will be given an image or its caption. Please describe the \
content of the image in detail in your own words."""
MAX_PROMPT_TOKENS = 256  # the user's text is cut here, with a warning
MAX_IMAGES = 6  # in one prompt, as in the paper's instruction data (§4)
MAX_ASPECT_RATIO = 100  # Qwen2.5-VL's processor refuses 200
QWEN_PIXELS = {"shortest_edge": 256 * 28 * 28, "longest_edge": 1280 * 28 * 28}
NO_IMAGES = "images must be PIL images: open files with PIL.Image.open."


class PromptFormat:
    """Turns prompts and images into the MLLM's inputs, in its own chat format.

    It needs the processor and the MLLM's config, no weights: loader workers use it.
    A family with another format overrides `chat` or `__call__`."""

    def __init__(self, processor, mllm_config):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.mllm_config = mllm_config
        self.takes_images = hasattr(mllm_config, "vision_config")

    def __call__(self, prompts, images=None, system=SYSTEM_PROMPT, size=None):
        """Tokenize B prompts, strings or None, padded on the left: a dict of tensors.

        size: (height, width) of the image to generate, for families that need it.
        images: as for `image_lists`. system: None to ask the MLLM itself, uncropped.
        Raises InputError if there are too many, or the MLLM reads text only."""
        rows = image_lists(prompts, images)
        images = [[to_rgb(image) for image in row] for row in rows]
        if any(images) and not self.takes_images:
            raise InputError("this MLLM reads text only: choose one that takes images.")
        if max(map(len, images), default=0) > MAX_IMAGES:
            raise InputError(f"too many images in a prompt: give at most {MAX_IMAGES}.")

        chats = [
            self.chat(clean_prompt(self.tokenizer, prompt), len(row), system)
            for prompt, row in zip(prompts, images, strict=True)
        ]
        texts = self.processor.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )

        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if not any(images):
            return self.tokenizer(texts, **options)

        family = self.mllm_config.model_type
        if system and family == "llava_onevision":
            side = self.mllm_config.vision_config.image_size
            images = [[resize_and_crop(image, side) for image in row] for row in images]
        elif system and family.startswith("qwen"):
            options["size"] = QWEN_PIXELS
        elif system and family == "internvl":
            options["crop_to_patches"] = False  # one tile, 256 tokens
        return self.processor(text=texts, images=images, **options)

    def chat(self, prompt, num_images=0, system=SYSTEM_PROMPT):
        """Chat messages: the system's, and a user turn with images, then the text."""
        if system and not self.takes_system:
            prompt, system = f"{system}\n\n{prompt}", None
        return self.messages(prompt, num_images, system)

    def messages(self, prompt, num_images, system):
        """Chat messages in the shape that the processor's template wants."""
        if self.takes_images:
            parts = [{"type": "image"}] * num_images
            user = [*parts, {"type": "text", "text": prompt}]
            system_parts = [{"type": "text", "text": system}]
        else:  # the templates of text-only models want plain strings
            user = prompt
            system_parts = system
        messages = [{"role": "user", "content": user}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system_parts})
        return messages

    @cached_property
    def takes_system(self):
        """Whether the chat template has a system role: Gemma's raises an exception."""
        try:
            messages = self.messages("", 0, SYSTEM_PROMPT)
            text = self.processor.apply_chat_template([messages], tokenize=False)[0]
        except TemplateError:
            return False
        return SYSTEM_PROMPT in text


def clean_prompt(tokenizer, prompt, limit=MAX_PROMPT_TOKENS):
    """The prompt without special tokens, cut at `limit` tokens; None becomes "".

    Raises InputError if it is not text that UTF-8 can encode."""
    if prompt is None:
        return ""
    if not isinstance(prompt, str) or prompt != prompt.encode(errors="ignore").decode():
        raise InputError(f"the prompt {prompt!r} is not Unicode text: correct it.")
    for token in tokenizer.all_special_tokens:
        prompt = prompt.replace(token, " ")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(ids) <= limit:
        return prompt
    cut = f"prompt cut from {len(ids)} to {limit} tokens"
    warnings.warn(cut, stacklevel=4)
    return tokenizer.decode(ids[:limit])


def image_lists(prompts, images):
    """A list of PIL images for each prompt.

    Accepts None, one image per prompt, a list of images per prompt, or, for a single
    prompt, a flat list of them. Raises InputError for anything else."""
    if images is None:
        images = [None] * len(prompts)
    if isinstance(images, Image.Image):
        images = [images]
    if not isinstance(images, list | tuple):
        raise InputError(NO_IMAGES)
    if len(prompts) == 1 and images and isinstance(images[0], Image.Image):
        images = [images]
    if len(images) != len(prompts):
        raise InputError(f"{len(images)} lists of images for {len(prompts)} prompts.")

    rows = [[x] if isinstance(x, Image.Image) else list(x or []) for x in images]
    if not all(isinstance(image, Image.Image) for row in rows for image in row):
        raise InputError(NO_IMAGES)
    return rows


def to_rgb(image):
    """Apply EXIF rotation and convert a PIL image of any mode to 8-bit RGB on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 or 32-bit integers, or floats: scale them to 0..255
        values = np.asarray(image)
        top = 65_535
        if image.mode == "F" and values.max() <= 1:
            top = 1
        elif image.mode in "IF" and values.max() <= 255:
            top = 255
        values = (values * (255 / top)).clip(0, 255)
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    longest = MAX_ASPECT_RATIO * min(image.size)
    size = [min(side, longest) for side in image.size]
    return ImageOps.fit(image.convert("RGB"), size)  # crops what is longer than that


def resize_and_crop(image, side):
    """Resize a PIL image's short side (bilinear, antialiased), then cut the centre.

    In this order, with torchvision's rounding, it equals the authors' code."""
    resized = transforms.resize(to_rgb(image), [side], antialias=True)
    return transforms.center_crop(resized, [side, side])


def to_pixels(images, side):
    """PIL images to targets of `forward`: (B, 3, side, side) float32 in [-1, 1]."""
    arrays = [np.asarray(resize_and_crop(image, side)) for image in images]
    pixels = torch.from_numpy(np.stack(arrays))  # (B, side, side, 3), 0..255
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def black_like(images):
    """Black images of the same sizes: what stands for a dropped image."""
    return [Image.new("RGB", to_rgb(image).size) for image in images]


def drop_conditions(prompt, images, u, stage):
    """(prompt or None, images) of a training sample; a uniform u decides what goes.

    Guidance compares predictions with and without a condition, so the model must have
    learned both. What is dropped (§4, App. C):

        text only            u < 0.1: text
        edit, reconstruct    u < 0.1: images
        instruct             u < 0.1: text   0.1 ≤ u < 0.2: both   0.2 ≤ u < 0.3: images
    """
    drop_text = u < 0.1
    drop_images = False
    if images:
        drop_text = False
        drop_images = u < 0.1
    if images and prompt and stage == "instruct":
        drop_text = u < 0.2
        drop_images = 0.1 <= u < 0.3

    if drop_text:
        prompt = None
    if drop_images:
        images = black_like(images)
    return prompt, images


# ---- 3. The connector ----------------------------------------------------------------
HEAD_DIM = 64  # width of an attention head
ROPE_BASE = 10_000  # θ of the rotary position embedding
INIT_STD = 0.014  # standard deviation of new linear weights
SANA_GAIN = 5.5**0.5  # Sana's own text encoder hands over states of this spread


def rotate(x, cos, sin):
    """Rotary embedding: turn each pair (x_i, x_{i+32}) of x (B, heads, L, 64)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class ConnectorLayer(nn.Module):
    """A Qwen2-style transformer layer that looks both ways: no causal mask (§3.3).

    In the MLLM query 0 has seen no other query; only here can it hear of them."""

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
        """x (B, L, width); cos, sin (L, 64); mask (B, 1, 1, L), False at padding."""
        qkv = self.qkv(self.attention_norm(x))  # (B, L, 3·width)
        qkv = qkv.unflatten(-1, (3, -1, HEAD_DIM))  # (B, L, 3, heads, 64)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, heads, L, 64)
        q = self.query_norm(rotate(q, cos, sin)).to(v.dtype)
        k = self.key_norm(rotate(k, cos, sin)).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))  # (B, L, width)

        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))  # (B, L, width)


class Connector(nn.Module):
    """Maps MLLM states (B, L, d) to the condition (B, L, c) (§3.3, Table 3).

    "enc-proj" runs its layers at the MLLM's width d, then projects to c; "proj-enc"
    projects first. gain: initial weight of the final RMSNorm. pooled: width of a second
    output, of the tokens' mean, for SD3-type models. Raises InputError if the width is
    not a multiple of HEAD_DIM."""

    def __init__(self, d, c, layers=24, design="enc-proj", gain=1.0, pooled=0):
        super().__init__()
        self.design = design
        width = d if design == "enc-proj" else c
        if width % HEAD_DIM:
            raise InputError(f"connector width {width}: give a multiple of {HEAD_DIM}.")
        self.layers = nn.ModuleList(ConnectorLayer(width) for _ in range(layers))
        project = [nn.Linear(d, c), nn.GELU("tanh"), nn.Linear(c, c)]
        self.projection = nn.Sequential(*project)
        self.norm = nn.RMSNorm(c, eps=1e-5)
        if pooled:
            self.pool = nn.Linear(c, pooled)

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

        exponents = torch.arange(0, HEAD_DIM, 2, device=x.device) / HEAD_DIM
        places = torch.arange(x.shape[1], device=x.device)
        angles = places[:, None] * ROPE_BASE**-exponents  # (L, 32)
        angles = angles.repeat(1, 2)  # (L, 64)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        if mask is not None:
            mask = mask[:, None, None].bool()  # (B, 1, 1, L)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)

        if self.design == "enc-proj":
            x = self.projection(x)  # (B, L, c)
        x = self.norm(x.to(self.norm.weight.dtype))  # (B, L, c)
        if hasattr(self, "pool"):
            return x, self.pool(x.mean(1))  # (B, pooled)
        return x


# ---- 4. The model --------------------------------------------------------------------
class Prompt(NamedTuple):
    """What pass 1 leaves of B prompts: all that the queries can see."""

    cache: Any  # keys and values of each layer
    hidden: torch.Tensor  # (B, T, d), the last hidden states
    mask: torch.Tensor  # (B, T), 0 at padding
    positions: torch.Tensor  # (B, T), or (3, B, T) for Qwen2.5-VL


def guide(predictions, g, g_img):
    """Classifier-free guidance from 1 to 3 predictions, each (B, C, h, w) (§5.2).

    Moves away from what the model predicts without the text, and without the images."""
    if len(predictions) == 1:
        return predictions[0]
    if len(predictions) == 2:
        v_text, v_neg = predictions
        return v_neg + g * (v_text - v_neg)
    v_text, v_neg, v_black = predictions
    return v_black + g_img * (v_neg - v_black) + g * (v_text - v_neg)


class MetaQuery(nn.Module, ModelHubMixin, library_name="metaquery", license="mit"):
    """Learnable queries, a frozen MLLM, a connector and a diffusion model (Figure 1).

    The parts are given, so that any of them can be another; `from_config` loads those
    that a config names. connector: maps (B, L, d) to (B, L, c); by default a new
    `Connector`. generation_config: a dict as GENERATION, the defaults of `generate`."""

    config_class = MetaQueryConfig
    format_class = PromptFormat

    def __init__(
        self, config, mllm, processor, diffusion, vae, scheduler, connector=None
    ):
        super().__init__()
        self.config = config
        self.mllm = mllm
        self.processor = processor
        self.diffusion = diffusion
        self.vae = vae
        self.scheduler = scheduler
        self.format = self.format_class(processor, mllm.config)
        self.tokenizer = self.format.tokenizer
        self.generation_config = dict(GENERATION)
        self.is_offloaded = False
        self.has_own_diffusion = config.train_diffusion  # not the named folder's

        d = mllm.config.get_text_config().hidden_size
        self.queries = nn.Parameter(torch.randn(config.num_queries, d) * 0.02)  # (N, d)
        if connector is None:
            connector = self.new_connector(d)
        self.connector = connector

        self.queries.requires_grad_(config.condition_on == "queries")
        mllm.requires_grad_(config.train_mllm)
        diffusion.requires_grad_(config.train_diffusion)
        vae.requires_grad_(False)

    def new_connector(self, d):
        """The connector for MLLM states of width d; a family may override it."""
        gain = 1.0
        if "caption_channels" in self.diffusion.config:  # Sana
            gain = SANA_GAIN
        layers, design = self.config.connector_layers, self.config.connector
        pooled = self.diffusion.config.get("pooled_projection_dim", 0)
        return Connector(d, caption_width(self.diffusion), layers, design, gain, pooled)

    @property
    def is_flow(self):
        """Whether diffusion predicts velocity (Sana, SD3), not noise (SD1.5)."""
        prediction = self.scheduler.config.get("prediction_type")
        return "flow" in f"{type(self.scheduler).__name__} {prediction}".lower()

    @property
    def downsampling(self):
        """Pixels per latent along a side: 32 for Sana's VAE."""
        config = self.vae.config
        levels = config.get("block_out_channels") or config.encoder_block_out_channels
        return 2 ** (len(levels) - 1)

    @property
    def resolution(self):
        """Pixels along a side of the images that the diffusion model is made for."""
        return self.diffusion.config.sample_size * self.downsampling

    def offload_to(self, device):
        """Keep the parts on the CPU; each visits `device` while it works. To generate
        and answer only: the largest part must fit the device, not all of them."""
        self.to("cpu")
        self.queries.data = self.queries.data.to(device)
        self.is_offloaded = True
        return self

    @contextmanager
    def visit(self, part):
        """If the model is offloaded, `part` is on its device in this context."""
        if self.is_offloaded:
            part.to(self.queries.device)
        try:
            yield
        finally:
            if self.is_offloaded:
                part.to("cpu")

    def encode_prompts(self, prompts, images=None, size=None):
        """The condition for the diffusion model: cond (B, L, c), and None.

        prompts: B strings; images: as for `image_lists`; size: (height, width) of the
        image to generate. L is N. For condition_on "last_layer", L is the prompts'
        length T, and the mask (B, T) is second; for SD3 the pooled condition is."""
        if isinstance(prompts, str):
            prompts = [prompts]
        return self.encode_inputs(self.format(prompts, images, size=size))

    def encode_inputs(self, inputs):
        """As `encode_prompts`, for what `self.format` made of the prompts (§3.1)."""
        dtype = next(self.connector.parameters()).dtype
        with self.visit(self.mllm):
            prompt = self.read_prompt(inputs)
            if self.config.condition_on != "last_layer":
                hidden = self.run_queries(prompt)  # (B, N, d)
        with self.visit(self.connector):
            if self.config.condition_on == "last_layer":
                return self.connector(prompt.hidden.to(dtype), prompt.mask), prompt.mask
            cond = self.connector(hidden.to(dtype))  # (B, N, c)
        if isinstance(cond, tuple):
            return cond  # with the pooled condition
        return cond, None

    def read_prompt(self, inputs):
        """Pass 1: the prompts alone, without gradient. Returns a `Prompt`.

        The mask is causal: no prompt token can see a query. So a prompt's keys and
        values are the same with and without queries, and no gradient to a query crosses
        them. Positions count real tokens, so that padding on the left changes nothing:

            tokens      pad pad  a  red star | q0  q1  q2
            mask         0   0   1   1   1   |  1   1   1
            positions    0   0   0   1   2   |  3   4   5
        """
        inputs = to_device(inputs, self.queries.device)
        backbone = self.mllm.base_model  # the MLLM without its language head
        mask = inputs.pop("attention_mask")  # (B, T)
        positions = self.positions_of(inputs, mask)

        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_mllm):
            outputs = backbone(
                **inputs, attention_mask=mask, position_ids=positions, use_cache=True
            )
        return Prompt(outputs.cache, outputs.last_hidden_state, mask, positions)

    def positions_of(self, inputs, mask):
        """Positions of prompt tokens, (B, T); Qwen2.5-VL's with images (3, B, T)."""
        if "image_grid_thw" in inputs:  # Qwen2.5-VL counts in time, height and width
            ids = {name: x for name, x in inputs.items() if name != "pixel_values"}
            return self.mllm.base_model.get_rope_index(**ids, attention_mask=mask)[0]
        return (mask.cumsum(-1) - 1).clamp(min=0)

    def run_queries(self, prompt):
        """Pass 2: the queries, with gradient, against the prompt's keys and values.

        Returns their last hidden states (B, N, d). It equals one pass over prompt and
        queries, `one_pass` of notebooks/plain.py, but its backward pass costs N tokens,
        however long the prompt is."""
        count = len(self.queries)
        queries = self.queries.to(self.mllm.dtype)
        queries = queries.expand(len(prompt.mask), -1, -1)  # (B, N, d)
        mask = F.pad(prompt.mask, (0, count), value=1)  # (B, T + N)
        steps = 1 + torch.arange(count, device=mask.device)  # (N,)
        last = prompt.positions.amax(-1, keepdim=True)
        positions = last + steps  # (B, N) or (3, B, N)
        outputs = self.mllm.base_model(
            inputs_embeds=queries, cache=prompt.cache, attention_mask=mask,
            position_ids=positions, use_cache=True,
        )  # fmt: skip
        return outputs.last_hidden_state  # (B, N, d)

    def sigma_of(self, u):
        """Noise levels σ (B,) in (0, 1] for uniform u (B,) in [0, 1), in training.

        σ = s·(1 − u) / (1 + (s − 1)·(1 − u)); s = 1 is uniform (Stable Diffusion 3,
        equation 23)."""
        s = self.config.sigma_shift
        return s * (1 - u) / (1 + (s - 1) * (1 - u))

    def forward(self, prompts, targets, images=None, noise=None, u=None):
        """The training loss, a scalar: the mean squared error of the prediction (§4).

        prompts: B strings, or what `self.format` made of them and their images. targets
        (B, 3, H, W) in [-1, 1], as of `to_pixels`. noise ε (B·K, C, h, w) and u (B·K,)
        in [0, 1) are drawn if None, with K = 1; with K > 1 each sample serves K noise
        levels, and its condition and latents are computed once."""
        if not isinstance(prompts, Mapping):
            if isinstance(prompts, str):
                prompts = [prompts]
            prompts = self.format(prompts, images)
        shape = (len(prompts["input_ids"]), 3, self.resolution, self.resolution)
        is_float = torch.is_tensor(targets) and targets.is_floating_point()
        if not is_float or targets.shape != shape:
            raise InputError(f"targets must be floats in [-1, 1] of shape {shape}.")
        x = self.encode_latents(targets)  # (B, C, h, w)
        cond, extra = self.encode_inputs(prompts)  # (B, L, c)

        if u is None:
            u = torch.rand(len(x), device=x.device)  # (B·K,)
        if not len(u) or len(u) % len(x) or noise is not None and len(noise) != len(u):
            raise InputError("u and noise must have the same number K of each target.")
        repeats = len(u) // len(x)  # K
        x = x.repeat_interleave(repeats, 0)  # (B·K, C, h, w)
        cond, extra = repeat(cond, repeats), repeat(extra, repeats)
        if noise is None:
            noise = torch.randn_like(x)  # (B·K, C, h, w)

        sigma = self.sigma_of(u)  # (B·K,)
        if self.is_flow:
            s = sigma.view(-1, 1, 1, 1)
            noisy = (1 - s) * x + s * noise  # x_σ = (1 − σ)·x + σ·ε
            timestep = 1000 * sigma
            target = noise - x  # the velocity dx_σ/dσ = ε − x
        else:
            steps = self.scheduler.config.num_train_timesteps
            timestep = (sigma * steps).ceil().long() - 1  # 0 .. steps − 1
            # x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε
            noisy = self.scheduler.add_noise(x, noise, timestep)
            target = noise
            if self.scheduler.config.prediction_type == "v_prediction":
                # √ᾱ_t·ε − √(1 − ᾱ_t)·x
                target = self.scheduler.get_velocity(x, noise, timestep)
        return F.mse_loss(self.denoise(noisy, timestep, cond, extra), target)

    def denoise(self, x, timestep, cond, extra=None):
        """The diffusion model's prediction (B, C, h, w) for latents x at timestep (B,).

        cond, extra: as of `encode_prompts`."""
        dtype = self.diffusion.dtype
        options = {"encoder_attention_mask": extra}
        if "pooled_projection_dim" in self.diffusion.config:  # SD3
            options = {"pooled_projections": extra.to(dtype)}
        options["encoder_hidden_states"] = cond.to(dtype)
        return self.diffusion(x.to(dtype), timestep=timestep, **options).sample.float()

    def new_solver(self):
        """A new solver of the equation of sampling: DPM-Solver, or SD3's own."""
        if isinstance(self.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            return type(self.scheduler).from_config(self.scheduler.config)
        return diffusers.DPMSolverMultistepScheduler.from_config(self.scheduler.config)

    @torch.no_grad()
    def generate(
        self, prompts, images=None, negative_prompt="", num_inference_steps=None,
        guidance_scale=None, image_guidance_scale=None, num_images_per_prompt=1,
        height=None, width=None, generator=None, callback=None,
    ):  # fmt: skip
        """Generate PIL images, a list: num_images_per_prompt n for each prompt in turn.

        images: as for `image_lists`. negative_prompt: one, or one for each prompt. What
        is None is the checkpoint's own; height and width, in pixels, `resolution`. No
        guidance: guidance_scale g = 1, image_guidance_scale g_img ≤ 1. generator: a
        torch.Generator, or a list of B·n, seeds the noise as in a diffusers pipeline.
        callback(guess) is called after each step with the solver's current estimate of
        the clean latents (B·n, C, h, w). Raises InputError for bad arguments, or if the
        latents are not finite."""
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, list | tuple):
            raise InputError("prompts must be a string or a list of strings.")
        prompts, images = list(prompts), image_lists(prompts, images)
        defaults = self.generation_config
        if num_inference_steps is None:
            num_inference_steps = defaults["num_inference_steps"]
        if guidance_scale is None:
            guidance_scale = defaults["guidance_scale"]
        if image_guidance_scale is None:
            image_guidance_scale = defaults["image_guidance_scale"]
        counts = (num_inference_steps, num_images_per_prompt)
        if not prompts or not all(isinstance(n, int) and n > 0 for n in counts):
            raise InputError("give at least one prompt, step and image per prompt.")
        for scale in (guidance_scale, image_guidance_scale):
            if not isinstance(scale, int | float) or not np.isfinite(scale):
                raise InputError("guidance scales must be finite numbers.")

        # Each branch of guidance is one way to condition. They are one batch: text and
        # images; negative prompt and images; negative prompt and black images.
        if isinstance(negative_prompt, str | None):
            negative_prompt = [negative_prompt] * len(prompts)
        is_list = isinstance(negative_prompt, list | tuple)
        if not is_list or len(negative_prompt) != len(prompts):
            raise InputError("give one negative prompt, or one for each prompt.")
        negative = [text or None for text in negative_prompt]
        all_prompts, all_images = list(prompts), list(images)
        guides_by_images = any(images) and image_guidance_scale > 1
        if guidance_scale != 1 or guides_by_images:
            all_prompts += negative
            all_images += images
        if guides_by_images:
            all_prompts += negative
            all_images += [black_like(row) for row in images]
        branches = len(all_prompts) // len(prompts)
        h, w = self.latent_size(height, width, images)
        size = (h * self.downsampling, w * self.downsampling)  # pixels
        cond, extra = self.encode_prompts(all_prompts, all_images, size)
        cond = repeat(cond, num_images_per_prompt)  # (branches·B·n, L, c)
        extra = repeat(extra, num_images_per_prompt)

        # The model has learned the velocity dx_σ/dσ = ε − x. To generate, follow it
        # from noise, σ = 1, to an image, σ = 0: a differential equation, whose
        # path is nearly a straight line and so needs few steps of a solver.
        solver = self.new_solver()
        solver.set_timesteps(num_inference_steps, device=self.queries.device)
        channels = self.diffusion.config.in_channels
        shape = (len(prompts) * num_images_per_prompt, channels, h, w)
        noise = randn_tensor(shape, generator, self.queries.device, torch.float32)
        x = noise * getattr(solver, "init_noise_sigma", 1.0)  # (B·n, C, h, w)

        with self.visit(self.diffusion):
            for timestep in solver.timesteps:
                noisy = x.repeat(branches, 1, 1, 1)  # (branches·B·n, C, h, w)
                v = self.denoise(noisy, timestep.expand(len(noisy)), cond, extra)
                v = guide(v.chunk(branches), guidance_scale, image_guidance_scale)
                if callback and not hasattr(solver, "model_outputs"):
                    callback(x - timestep / 1000 * v)  # x̂ = x_σ − σ·v
                x = solver.step(v, timestep, x).prev_sample  # (B·n, C, h, w)
                if callback and hasattr(solver, "model_outputs"):
                    callback(solver.model_outputs[-1])

        if not x.isfinite().all():
            fix = "lower guidance_scale, use bfloat16 or float32, or check the weights"
            raise InputError(f"the latents are not finite: {fix}.")
        return self.decode_latents(x)

    def latent_size(self, height, width, images=()):
        """(h, w) of latents for an image's height and width in pixels, or None.

        images: the sources, for families whose images take their size from them."""
        patch = self.diffusion.config.get("patch_size") or 1
        blocks = self.diffusion.config.get("down_block_types", [0])  # a UNet's
        unit = self.downsampling * patch * 2 ** (len(blocks) - 1)
        sizes = []
        for name, pixels in (("height", height), ("width", width)):
            if pixels is None:
                pixels = self.generation_config.get(name) or self.resolution
            is_whole = isinstance(pixels, int) and pixels >= 1
            if not is_whole or pixels % unit and pixels != self.resolution:
                raise InputError(f"{name} is {pixels}: give a multiple of {unit}.")
            sizes.append(pixels // self.downsampling)
        return sizes

    @torch.no_grad()
    def answer(
        self, prompt, images=None, max_new_tokens=256, system=None, streamer=None
    ):
        """The MLLM's own answer, a string, to a prompt about a list of PIL images.

        No query takes part: it is the untouched MLLM's. With system=SYSTEM_PROMPT it
        says what it takes a prompt for. streamer: transformers', prints the answer."""
        if images is not None:
            images = [images]
        inputs = to_device(self.format([prompt], images, system), self.queries.device)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        with self.visit(self.mllm):
            tokens = self.mllm.generate(**inputs, **options, streamer=streamer)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip()

    @torch.no_grad()
    def encode_latents(self, pixels, sample=True):
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w) float32.

        In training those of a KL autoencoder are sampled, unless sample is False."""
        encoded = self.vae.encode(pixels.to(self.vae.dtype))
        if hasattr(encoded, "latent"):  # Sana's autoencoder
            z = encoded.latent
        elif self.training and sample:  # a KL autoencoder's is a distribution
            z = encoded.latent_dist.sample()
        else:
            z = encoded.latent_dist.mode()
        shift = self.vae.config.get("shift_factor") or 0
        return ((z - shift) * self.vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode_latents(self, latents):
        """Latents (B, C, h, w) to a list of B PIL images."""
        shift = self.vae.config.get("shift_factor") or 0
        z = latents / self.vae.config.scaling_factor + shift
        with self.visit(self.vae):
            pixels = self.vae.decode(z.to(self.vae.dtype)).sample  # (B, 3, H, W)
        arrays = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
        return [Image.fromarray(a) for a in arrays.permute(0, 2, 3, 1).cpu().numpy()]

    def trained_state_dict(self):
        """What a checkpoint holds: queries, connector, and what else is trained."""
        return {
            name: parameter.detach().contiguous()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
            or name == "queries"  # random ones are kept too
            or name.startswith("diffusion.") and self.has_own_diffusion
        }

    def load_trained_state_dict(self, state, source, dtype=None):
        """Load a `trained_state_dict`; raises InputError if it does not fit the config.

        dtype: the weights become these tensors, in it. None: they are copied."""
        expected = self.trained_state_dict()
        if any(name.startswith("diffusion.") for name in state):
            self.has_own_diffusion = True  # also if it is frozen from here on
            expected = self.diffusion.state_dict(prefix="diffusion.") | expected
        shapes = {name: x.shape for name, x in state.items()}
        fits = {name for name, x in expected.items() if shapes.get(name) == x.shape}
        wrong = [name for name in expected | state if name not in fits]
        if wrong:
            reason = f"{len(wrong)} weights of {source} do not fit, first {wrong[0]}"
            raise InputError(f"{reason}: use the flags of its training.")
        state = {name: x.to(dtype or x.dtype) for name, x in state.items()}
        self.load_state_dict(state, strict=False, assign=dtype is not None)

    def _save_pretrained(self, folder):  # called by save_pretrained and push_to_hub
        save_checkpoint(self, self.trained_state_dict(), folder)

    @classmethod
    def from_config(cls, config, dtype=torch.float32):
        """A new model of the parts that a config names: frozen ones in `dtype`, trained
        ones in float32. Raises InputError if a part cannot be loaded."""
        mllm, processor = load_mllm(config, dtype)
        diffusion, vae, scheduler = load_diffusion(config, dtype)
        return cls(config, mllm, processor, diffusion, vae, scheduler)

    @classmethod
    def from_pretrained(
        cls, folder, dtype=torch.float32, trained_dtype=torch.float32, **changes
    ):
        """Load a checkpoint, a folder or hub id; `changes` replace config fields.

        Frozen parts are in `dtype`, those that the checkpoint holds in `trained_dtype`.
        Raises InputError if it is missing, corrupt or does not fit the config."""
        config, state, settings = read_checkpoint(
            folder, changes, cls.config_class, trained_dtype
        )
        model = cls.from_state(config, state, folder, dtype, trained_dtype)
        model.generation_config |= settings
        return model

    @classmethod
    def from_state(cls, config, state, source, dtype, trained_dtype=torch.float32):
        """The model of a config and the trained weights `state`, read from `source`."""
        mllm, processor = load_mllm(config, dtype)
        saved = any(name.startswith("diffusion.") for name in state)
        diffusion, vae, scheduler = load_diffusion(config, dtype, without_weights=saved)
        with init_empty_weights():  # the checkpoint's weights come instead
            model = cls(config, mllm, processor, diffusion, vae, scheduler)
        model.load_trained_state_dict(state, source, trained_dtype)
        if not config.train_diffusion:
            nn.Module.to(model.diffusion, dtype)  # diffusers' own warns
        return model


def to_device(inputs, device):
    """Move inputs to a device, except two that LLaVA-OneVision reads on the CPU."""
    moved = dict(inputs)
    for name, x in inputs.items():
        if name not in ("image_sizes", "batch_num_images"):
            moved[name] = x.to(device, non_blocking=True)
    return moved


def repeat(x, times):
    """Each row of x (B, ...) `times` times, one after the other; None stays None.

    x may be a tuple of such tensors."""
    if x is None:
        return None
    if isinstance(x, tuple):
        return tuple(repeat(part, times) for part in x)
    return x.repeat_interleave(times, 0)


# ---- 5. Loading the parts ------------------------------------------------------------
def caption_width(diffusion):
    """c, the width of a diffusion model's condition: 2304 for Sana, 768 for SD1.5."""
    names = ("caption_channels", "joint_attention_dim", "cross_attention_dim")
    return next(diffusion.config[name] for name in names if diffusion.config.get(name))


@contextmanager
def loading(name, flag):
    """Turn errors of loading a part into an InputError; `flag` selects another."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a corrupt file may raise any
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        fix = f"go online (log in if the model is gated), or give another {flag}"
        raise InputError(f"cannot load {name} ({reason}): {fix}.") from None


def load_weights(part_class, name, flag, **options):
    """`part_class.from_pretrained`; raises InputError if the files lack weights.

    The libraries only warn, and leave random numbers in their place."""
    if part_class is diffusers.AutoModel:  # it cannot tell what is missing
        found = part_class.load_config(name, subfolder=options.get("subfolder"))
        part_class = getattr(diffusers, found["_class_name"])
    part, info = part_class.from_pretrained(name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        where = f"{name}/{options['subfolder']}" if "subfolder" in options else name
        reason = f"{where} lacks {len(missing)} weights, first {missing[0]}"
        raise InputError(f"{reason}: download it again, or give another {flag}.")
    return part.eval()


def load_mllm(config, dtype):
    """(MLLM in evaluation mode, its processor; a text-only MLLM's tokenizer)."""
    name = config.mllm
    model_class = transformers.AutoModelForCausalLM
    processor_class = transformers.AutoTokenizer
    with loading(name, "--mllm"):
        found = transformers.AutoConfig.from_pretrained(name)
        if hasattr(found, "vision_config"):
            if not found.model_type.startswith(("llava_onevision", "qwen", "internvl")):
                fix = "give LLaVA-OneVision, Qwen2.5-VL or InternVL3 as --mllm"
                raise InputError(f"{name} is of type {found.model_type}: {fix}.")
            model_class = transformers.AutoModelForImageTextToText
            processor_class = transformers.AutoProcessor

        processor = processor_class.from_pretrained(name)
        if not processor.chat_template:
            fix = "copy its Instruct version's chat_template.jinja, or name another"
            raise InputError(f"--mllm {name} has no chat template: {fix}.")
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

        if config.train_mllm:
            dtype = torch.float32
        return load_weights(model_class, name, "--mllm", dtype=dtype), processor


DIFFUSION_CLASSES = ("SanaTransformer2DModel", "SD3Transformer2DModel",
                     "UNet2DConditionModel")  # fmt: skip


def check_diffusion(name, config):
    """Raise InputError if a model takes more than noisy latents, a time and a text."""
    kind, channels = config["_class_name"], config.get("in_channels")
    inputs = ("addition_embed_type", "class_embed_type", "num_class_embeds",
              "guidance_embeds")  # fmt: skip
    for field in inputs:
        if config.get(field):
            kind += f" with {field}"
    if channels != (config.get("out_channels") or channels):
        kind += f" of {channels} input channels"
    if kind not in DIFFUSION_CLASSES:
        fix = "give Sana, Stable Diffusion 1.5 or 3 as --diffusion"
        raise InputError(f"{name} is a {kind}, which takes other inputs: {fix}.")


def load_diffusion(config, dtype, without_weights=False):
    """(diffusion model, VAE, scheduler): Sana's, SD3's or Stable Diffusion 1.5's."""
    name, load = config.diffusion, diffusers.AutoModel
    with loading(name, "--diffusion"):
        try:
            found = load.load_config(name, subfolder="transformer")
            part, scheduler_class = "transformer", diffusers.DPMSolverMultistepScheduler
        except OSError:  # it has no such folder
            found = load.load_config(name, subfolder="unet")
            part, scheduler_class = "unet", diffusers.DDPMScheduler
        check_diffusion(name, found)
        settings = scheduler_class.load_config(name, subfolder="scheduler")
        if settings["_class_name"] == "FlowMatchEulerDiscreteScheduler":  # SD3
            scheduler_class = diffusers.FlowMatchEulerDiscreteScheduler
        scheduler = scheduler_class.from_config(settings)
        trained_dtype = dtype
        if config.train_diffusion:
            trained_dtype = torch.float32
        if without_weights:  # a checkpoint has them
            diffusion_class = getattr(diffusers, found["_class_name"])
            with init_empty_weights():
                diffusion = diffusion_class.from_config(found)
        else:
            options = {"subfolder": part, "torch_dtype": trained_dtype}
            diffusion = load_weights(load, name, "--diffusion", **options)

    with loading(config.vae or name, "--vae"):
        options = {"torch_dtype": dtype}
        if not config.vae:
            options["subfolder"] = "vae"
        vae = load_weights(load, config.vae or name, "--vae", **options)
        channels = vae.config.latent_channels
        if channels != found["in_channels"]:
            reason = f"the VAE's latents have {channels} channels"
            needed = found["in_channels"]
            raise InputError(f"{reason}, {name}'s {needed}: give another --vae.")
    return diffusion, vae, scheduler


# ---- 6. Checkpoints: skip on first reading -------------------------------------------
def portable(config, folder):
    """A config's fields for the config.json in `folder`: parts that lie in `folder`, or
    beside this file, are relative to it. Hub ids and other paths stay as given."""
    values = asdict(config)
    for name in ("mllm", "diffusion", "vae"):
        path = Path(values[name]).resolve()
        for base in (Path(folder).resolve(), HERE):
            if values[name] and path.exists() and path.is_relative_to(base):
                values[name] = path.relative_to(base).as_posix()
                break
    return values


def save_checkpoint(model, state, folder):
    """Write a `trained_state_dict`; config.json names the frozen parts."""
    folder = Path(folder)
    texts = {"config.json": portable(model.config, folder),
             "generation_config.json": model.generation_config}  # fmt: skip
    for name, values in texts.items():
        text = json.dumps(values, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def find_checkpoint(name):
    """The folder of a checkpoint: a folder, a run's folder, or a hub id, downloaded."""
    if not Path(name).exists() and len(Path(name).parts) == 2:
        with suppress(OSError, ValueError):
            name = snapshot_download(str(name))
    folder = Path(name)
    if (folder / "latest").is_file():  # a run's folder: its newest checkpoint
        folder = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    return folder


def read_weights(path, dtype=None):
    """{name: tensor} of a safetensors file, in `dtype`; None: as they are stored.

    A file's pages count as memory until it is closed: so it is opened for each."""
    state = {}
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    for name in names:
        with safe_open(path, "pt") as file:
            state[name] = file.get_tensor(name).to(dtype)
    return state


def read_checkpoint(folder, changes, config_class=MetaQueryConfig, dtype=None):
    """(config, trained weights in `dtype`, generation config) of a folder or hub id."""
    try:
        folder = find_checkpoint(folder)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = read_weights(folder / "model.safetensors", dtype)
        for name in ("mllm", "diffusion", "vae"):
            paths = [base / values.get(name, "") for base in (HERE, folder)]
            for path in paths:  # the checkpoint's own folder has the last word
                if values.get(name) and path.is_dir():
                    values[name] = str(path)
        config = config_class(**(values | changes))
        generation_config = {}
        if (folder / "generation_config.json").exists():
            text = (folder / "generation_config.json").read_text(encoding="utf-8")
            generation_config = dict(json.loads(text))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        reason = f"{folder} is corrupt or not a MetaQuery checkpoint ({error})"
        raise InputError(f"{reason}: give a folder that train.py saved.") from None

    return config, state, generation_config
