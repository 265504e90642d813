"""MetaQuery: learnable queries transfer a frozen multimodal LLM's knowledge to a diffusion model.

"Transfer between Modalities with MetaQueries" (Pan et al., 2025), in one file: config, connector,
then the model: queries, frozen forward, loss, sampling. Sizes differ by a preset alone.

    model = MetaQuery.from_pretrained("weights/tiny")
    picture = model.generate(["a red star left of a blue circle"])[0]
"""

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelHubMixin, snapshot_download
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from data.pictures import black, rgb

SYSTEM_PROMPT = (
    "You will be given an image or its caption. "
    "Please describe the content of the image in detail in your own words."
)
MAX_PROMPT_TOKENS, MAX_PICTURES = 256, 6
TINY = Path(__file__).resolve().parent / "weights" / "tiny"


class InputError(ValueError):
    """Bad input that a person can mend; its text is one line that says what is wrong and how."""


@dataclass
class MetaQueryConfig:
    """What defines a MetaQuery model. Components are named by a hub id or a folder (§3, §4).

    diffusion: with its VAE and scheduler. num_queries: N. connector: "enc-proj" or "proj-enc"
    (Table 3). condition (Table 1): "queries", "random" (queries that are not trained) or
    "last_layer" (the prompt's own states). train_mllm, train_diffusion: what else is (Table 2).
    """

    mllm: str = str(TINY / "mllm")
    diffusion: str = str(TINY / "diffusion")
    num_queries: int = 16
    connector: Literal["enc-proj", "proj-enc"] = "enc-proj"
    connector_layers: int = 3
    condition: Literal["queries", "random", "last_layer"] = "queries"
    train_mllm: bool = False
    train_diffusion: bool = True

    def __post_init__(self):
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(field.type)
            if allowed and value not in allowed:
                raise InputError(f"unknown {field.name} {value!r}: choose one of {allowed}.")
            if field.type is int and value < 1:
                raise InputError(f"{field.name} is {value}: it must be at least 1.")

    @classmethod
    def preset(cls, size, **changes):
        """The config of a size, "tiny" or the paper's "base", "large", "xlarge" (§4), changed."""
        if size not in PRESETS:
            raise InputError(f"unknown size {size!r}: choose one of {', '.join(PRESETS)}.")
        return cls(**(PRESETS[size] | changes))


PAPER = {"diffusion": "Efficient-Large-Model/Sana_1600M_512px_diffusers"}
PAPER |= {"num_queries": 256, "connector_layers": 24}
PRESETS = {
    "tiny": {},
    "base": PAPER | {"mllm": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"},
    "large": PAPER | {"mllm": "Qwen/Qwen2.5-VL-3B-Instruct"},
    "xlarge": PAPER | {"mllm": "Qwen/Qwen2.5-VL-7B-Instruct"},
}


class ConnectorLayer(nn.Module):
    """A Qwen2-style transformer layer without a causal mask (§3.3)."""

    def __init__(self, dim):
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm, self.key_norm = nn.RMSNorm(64, eps=1e-6), nn.RMSNorm(64, eps=1e-6)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, 4 * dim, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x, cos, sin, mask):
        """x (B, L, dim); cos, sin (1, L, 64); mask (B, 1, 1, L) bool, False at padding, or None."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, -1, 64)).transpose(1, 3)
        q, k, v = heads.unbind(2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        q, k = self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Connector(nn.Module):
    """Maps MLLM states (B, L, dim) to conditions (B, L, condition_dim) for diffusion (§3.3).

    "enc-proj" runs the bidirectional encoder at the MLLM's width, then projects; "proj-enc"
    projects first (Table 3). `gain` starts the last norm: √5.5 suits Sana, 1 Stable Diffusion.
    Raises InputError where the encoder's width is no multiple of 64, its head size.
    """

    def __init__(self, dim, condition_dim, layers=24, design="enc-proj", gain=1.0):
        super().__init__()
        self.design, width = design, dim if design == "enc-proj" else condition_dim
        if width % 64:
            raise InputError(f"the connector's width {width} is no multiple of its head size, 64.")
        self.layers = nn.ModuleList(ConnectorLayer(width) for _ in range(layers))
        self.projection = nn.Sequential(
            nn.Linear(dim, condition_dim), nn.GELU("tanh"), nn.Linear(condition_dim, condition_dim)
        )
        self.norm = nn.RMSNorm(condition_dim, eps=1e-5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.014)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.norm.weight, gain)

    def forward(self, x, mask=None):
        """x (B, L, dim) and a mask (B, L) of its real tokens, or None, to (B, L, condition_dim)."""
        x = self.projection(x) if self.design == "proj-enc" else x
        frequencies = 10_000 ** (-torch.arange(0, 64, 2, device=x.device).float() / 64)
        angles = torch.arange(x.shape[1], device=x.device).float()[None, :, None] * frequencies
        cos, sin = (f(angles).repeat(1, 1, 2).to(x.dtype) for f in (torch.cos, torch.sin))
        mask = None if mask is None else mask[:, None, None].bool()
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        x = self.projection(x) if self.design == "enc-proj" else x
        return self.norm(x.to(self.norm.weight.dtype))


class MetaQuery(nn.Module, ModelHubMixin, library_name="metaquery", license="mit"):
    """Learnable queries, a frozen MLLM, a connector and a diffusion model (Figure 1).

    Attributes: queries (N, d), mllm, processor, connector, diffusion, vae, scheduler, config.
    Frozen parts are kept in `dtype`, trained ones in float32. Raises InputError on a bad part.
    """

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config = config
        self.mllm, self.processor, self.diffusion, *rest = load_parts(config, dtype)
        self.vae, self.scheduler = rest
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.prepare = partial(prepare, self.processor, self.mllm.config)
        self.sees = hasattr(self.mllm.config, "vision_config")
        self.is_flow = "flow" in str(self.scheduler.config.get("prediction_type"))
        z, width = self.vae.config, condition_width(self.diffusion)
        self.scale, self.shift = z.scaling_factor, z.get("shift_factor") or 0
        d = self.mllm.config.get_text_config().hidden_size
        gain = 5.5**0.5 if "caption_channels" in self.diffusion.config else 1.0
        self.queries = nn.Parameter(torch.randn(config.num_queries, d) * 0.02)
        self.connector = Connector(d, width, config.connector_layers, config.connector, gain)
        self.queries.requires_grad_(config.condition == "queries")
        self.vae.requires_grad_(False)
        self.mllm.requires_grad_(config.train_mllm)
        self.diffusion.requires_grad_(config.train_diffusion)

    def condition(self, prompts, images=None):
        """Conditions for the diffusion model (§3.1): (B, L, c), and its mask (B, L) or None.

        `prompts` may be what `prepare` made of them. L is N for queries (mask None), the prompt's
        length for "last_layer". The prompt is run once without gradient for its keys and values;
        only the queries are run with gradient, against them. Under a causal mask no prompt token
        sees a query: this is exact, and the backward pass costs N tokens for prompts of any length.
        """
        inputs = prompts if isinstance(prompts, Mapping) else self.prepare(prompts, images)
        inputs = to_device(inputs, self.queries.device)
        mask, backbone = inputs.pop("attention_mask"), self.mllm.base_model
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if "image_grid_thw" in inputs:  # Qwen2.5-VL counts along time, height and width (3, B, L)
            ids = {name: value for name, value in inputs.items() if name != "pixel_values"}
            positions = backbone.get_rope_index(**ids, attention_mask=mask)[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_mllm):
            prompt = backbone(**inputs, attention_mask=mask, position_ids=positions, use_cache=True)
        trained = self.connector.norm.weight.dtype
        if self.config.condition == "last_layer":
            return self.connector(prompt.last_hidden_state.to(trained), mask), mask
        queries = self.queries.to(self.mllm.dtype).expand(len(mask), -1, -1)
        after = 1 + torch.arange(len(self.queries), device=mask.device)
        hidden = backbone(
            inputs_embeds=queries, past_key_values=prompt.past_key_values, use_cache=True,
            attention_mask=torch.cat([mask, mask.new_ones(queries.shape[:2])], 1),
            position_ids=positions.amax(-1, keepdim=True) + after,
        ).last_hidden_state  # fmt: skip
        return self.connector(hidden.to(trained)), None

    @torch.no_grad()
    def encode_latents(self, pixels):
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, h, w): (z − shift)·scale, float32."""
        encoded = self.vae.encode(pixels.to(self.vae.dtype))
        z = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        return ((z - self.shift) * self.scale).float()

    @torch.no_grad()
    def decode_latents(self, latents):
        """Latents (B, C, h, w) to PIL pictures."""
        z = (latents / self.scale + self.shift).to(self.vae.dtype)
        pixels = self.vae.decode(z).sample.float().clamp(-1, 1)
        arrays = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in arrays]

    def denoise(self, x, timestep, condition, mask):
        """The diffusion model's prediction for noisy latents x (B, C, h, w) at timestep (B,)."""
        return self.diffusion(
            x, encoder_hidden_states=condition, timestep=timestep, encoder_attention_mask=mask
        ).sample.float()

    def forward(self, prompts, targets, images=None, noise=None, sigma=None):
        """The loss of drawing `targets` (B, 3, H, W) in [-1, 1] from `prompts` and `images` (§3.1).

        Flow matching (Sana): σ uniform on (0, 1], x_σ = (1 − σ)·x + σ·ε, timestep 1000·σ, target
        ε − x. Diffusion (Stable Diffusion 1.5): the scheduler's forward process at a whole
        timestep, target ε, or v as its config says. noise (B, C, h, w) is ε; sigma (B,) is σ or
        the timestep; targets may be latents (B, C, h, w) instead.
        """
        x = self.encode_latents(targets) if targets.shape[1] == 3 else targets
        noise = torch.randn_like(x) if noise is None else noise
        condition, mask = self.condition(prompts, images)
        if self.is_flow:
            sigma = 1 - torch.rand(len(x), device=x.device) if sigma is None else sigma
            s = sigma.view(-1, 1, 1, 1)
            noisy, timestep, target = (1 - s) * x + s * noise, 1000 * sigma, noise - x
        else:
            if sigma is None:
                sigma = torch.randint(self.scheduler.config.num_train_timesteps, (len(x),))
            timestep = sigma.long().to(x.device)
            noisy, target = self.scheduler.add_noise(x, noise, timestep), noise
            if self.scheduler.config.prediction_type == "v_prediction":
                target = self.scheduler.get_velocity(x, noise, timestep)
        return F.mse_loss(self.denoise(noisy, timestep, condition, mask), target)

    @torch.no_grad()
    def generate(self, prompts, images=None, negative_prompt="", num_inference_steps=30,
                 guidance_scale=3.0, image_guidance_scale=1.5, num_images_per_prompt=1,
                 generator=None):  # fmt: skip
        """Draw pictures: a list of PIL images, `num_images_per_prompt` for each prompt in turn.

        Guidance: v(neg) + g·(v(text) − v(neg)); g = 1 needs no second branch. With pictures:
        v(neg, black) + g_img·(v(neg, pic) − v(neg, black)) + g·(v(text, pic) − v(neg, pic)), and
        image_guidance_scale ≤ 1 drops the first branch. `generator` seeds the starting noise.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        images = [[rgb(p) for p in row or []] for row in images or [None] * len(prompts)]
        negative, weights = [negative_prompt] * len(prompts), [guidance_scale]
        texts, pictures = prompts, images
        if any(images) and image_guidance_scale > 1:
            texts, pictures = texts + negative * 2, pictures + images + black(images)
            weights += [image_guidance_scale - guidance_scale, 1 - image_guidance_scale]
        elif guidance_scale != 1:
            texts, pictures = texts + negative, pictures + images
            weights.append(1 - guidance_scale)
        condition, mask = self.condition(texts, pictures)
        condition = condition.repeat_interleave(num_images_per_prompt, 0)
        mask = None if mask is None else mask.repeat_interleave(num_images_per_prompt, 0)
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps, device=self.queries.device)
        side, channels = self.diffusion.config.sample_size, self.diffusion.config.in_channels
        shape = (len(prompts) * num_images_per_prompt, channels, side, side)
        x = randn_tensor(shape, generator, self.queries.device, torch.float32)
        x = x * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(x, timestep).repeat(len(weights), 1, 1, 1)
            noisy, steps = noisy.to(condition.dtype), timestep.expand(len(noisy))
            predictions = self.denoise(noisy, steps, condition, mask).chunk(len(weights))
            guided = sum(w * p for w, p in zip(weights, predictions, strict=True))
            x = scheduler.step(guided, timestep, x).prev_sample
        return self.decode_latents(x)

    @torch.no_grad()
    def answer(self, prompt, images=None, max_new_tokens=256, system=None, streamer=None):
        """The MLLM's own answer to a prompt about `images`, a list of PIL pictures: a text.

        Greedy, by transformers' `generate`; `streamer` is one of its streamers. The queries take
        no part in it, so it is the untouched MLLM's, token for token (§3.1).
        """
        inputs = to_device(self.prepare([prompt], [images], system), self.queries.device)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "streamer": streamer}
        made = self.mllm.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(made, skip_special_tokens=True)[0].strip()

    def interleave(self, prompt, images=None, max_new_tokens=256, **options):
        """Text, then a picture, both of one conversation: yields each; `options` of `generate`."""
        yield self.answer(prompt, images, max_new_tokens, SYSTEM_PROMPT)
        yield self.generate([prompt], [images], **options)[0]

    def _save_pretrained(self, folder):
        """Write what was trained to model.safetensors; config.json names the frozen parts.

        save_pretrained(folder), of huggingface_hub, adds a model card; push_to_hub(id) uploads all.
        """
        config = asdict(self.config)
        for name in ("mllm", "diffusion"):
            if (path := Path(config[name])).exists():
                inside = path.resolve().is_relative_to(folder.resolve())
                config[name] = os.path.relpath(path, folder) if inside else str(path.resolve())
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(self.trained_state(), folder / "model.safetensors", {"format": "pt"})

    def trained_state(self):
        """What a checkpoint holds: queries, connector and what else the config trains."""
        trains = {"mllm": self.config.train_mllm, "diffusion": self.config.train_diffusion}
        kept = {"queries": True, "connector": True} | trains
        named = self.named_parameters()
        return {n: p.detach().contiguous() for n, p in named if kept.get(n.split(".")[0])}

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, **changes):
        """Load a checkpoint, a folder or a hub id; `changes` replace fields of its config.

        Frozen parts are in `dtype`. Raises InputError where it is missing, broken or misshapen.
        """
        folder = Path(folder)
        if not folder.exists() and len(folder.parts) == 2:
            with suppress(OSError, ValueError):
                folder = Path(snapshot_download(str(folder)))
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} holds no {name}: name a folder that train.py saved.")
        try:
            saved = json.loads((folder / "config.json").read_text())
            state = load_file(folder / "model.safetensors")
            for name in ("mllm", "diffusion"):
                beside = folder / saved[name]
                saved[name] = str(beside) if beside.exists() else saved[name]
            config = MetaQueryConfig(**(saved | changes))
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            reason = f"{folder} is damaged or has no MetaQuery config ({error})"
            raise InputError(f"{reason}: take an older step or train anew.") from None
        model = cls(config, dtype)
        model.load_trained(state, folder)
        return model

    def load_trained(self, state, source):
        """Put `trained_state` weights in; raises InputError naming what does not fit."""
        expected = self.trained_state()
        wrong = [k for k in expected if k not in state or state[k].shape != expected[k].shape]
        wrong += [k for k in state if k not in expected]
        if wrong:
            raise InputError(f"{len(wrong)} weights of {source} do not fit the config: {wrong[0]}.")
        self.load_state_dict(state, strict=False)


def prepare(processor, config, prompts, images=None, system=SYSTEM_PROMPT):
    """Prompts and pictures as the MLLM's inputs, padded on the left; needs no weights.

    images: per prompt a list of PIL pictures of any mode, or None. A prompt of over 256 tokens is
    cut, with a warning; with a `system` prompt, pictures are cut as conditions are (§3.1). Raises
    InputError where a text-only MLLM is given pictures, or one prompt more than 6.
    """
    tokenizer, sees = getattr(processor, "tokenizer", processor), hasattr(config, "vision_config")
    images = [[rgb(p) for p in row or []] for row in images or [None] * len(prompts)]
    if any(images) and not sees:
        raise InputError("this MLLM reads text only: LLaVA-OneVision or Qwen2.5-VL sees pictures.")
    if (most := max(map(len, images))) > MAX_PICTURES:
        raise InputError(f"{most} pictures for one prompt: give at most {MAX_PICTURES}.")
    rows = zip(prompts, map(len, images), strict=True)
    chats = [conversation(clean(tokenizer, prompt), n, system, sees) for prompt, n in rows]
    texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if not any(images):
        return tokenizer(texts, **options)
    if system and config.model_type == "llava_onevision":
        square = (config.vision_config.image_size,) * 2
        images = [[ImageOps.fit(p, square) for p in row] for row in images]
    elif system:
        options["size"] = {"shortest_edge": 256 * 28 * 28, "longest_edge": 1280 * 28 * 28}
    return processor(text=texts, images=images, **options)


def conversation(prompt, pictures=0, system=SYSTEM_PROMPT, as_parts=False):
    """Chat messages of one user turn: pictures, then text. `as_parts` suits picture templates."""
    parts = [{"type": "image"}] * pictures + [{"type": "text", "text": prompt}] * bool(prompt)
    user = {"role": "user", "content": parts if as_parts or pictures else prompt}
    text = [{"type": "text", "text": system}] if as_parts else system
    return [{"role": "system", "content": text}] * (system is not None) + [user]


def clean(tokenizer, prompt):
    """A prompt without the tokenizer's special tokens, cut at 256 tokens with a warning."""
    for token in tokenizer.all_special_tokens:
        prompt = prompt.replace(token, " ")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(ids) <= MAX_PROMPT_TOKENS:
        return prompt
    warnings.warn(f"the prompt's {len(ids)} tokens are cut to {MAX_PROMPT_TOKENS}", stacklevel=4)
    return tokenizer.decode(ids[:MAX_PROMPT_TOKENS])


def to_device(inputs, device):
    """Inputs on a device, but for those that LLaVA-OneVision reads one by one on the host."""
    host = ("image_sizes", "batch_num_images")
    return {n: x if n in host else x.to(device, non_blocking=True) for n, x in inputs.items()}


def condition_width(diffusion):
    """c, the width of a diffusion model's text condition: 2304 for Sana, 768 for SD1.5."""
    return diffusion.config.get("caption_channels") or diffusion.config.cross_attention_dim


def load_parts(config, dtype):
    """MLLM, processor (a text-only MLLM's tokenizer), diffusion model, VAE and scheduler."""
    options, trained = {"low_cpu_mem_usage": False}, {True: torch.float32, False: dtype}
    name, auto = config.mllm, transformers
    try:
        sees = hasattr(auto.AutoConfig.from_pretrained(name), "vision_config")
        mllm = auto.AutoModelForImageTextToText if sees else auto.AutoModelForCausalLM
        mllm = mllm.from_pretrained(name, dtype=trained[config.train_mllm]).eval()
        processor = (auto.AutoProcessor if sees else auto.AutoTokenizer).from_pretrained(name)
        name, auto = config.diffusion, diffusers.AutoModel
        try:
            part, scheduler = "transformer", diffusers.DPMSolverMultistepScheduler
            diffusers.SanaTransformer2DModel.load_config(name, subfolder=part)
        except OSError:
            part, scheduler = "unet", diffusers.DDPMScheduler
        vae = auto.from_pretrained(name, subfolder="vae", torch_dtype=dtype, **options).eval()
        options["torch_dtype"] = trained[config.train_diffusion]
        diffusion = auto.from_pretrained(name, subfolder=part, **options)
        scheduler = scheduler.from_pretrained(name, subfolder="scheduler")
    except (OSError, ValueError) as error:
        reason = f"cannot load {name} ({str(error).strip().splitlines()[0]})"
        mend = "go online (log in if gated) or name a folder like the hub's: --mllm, --diffusion."
        raise InputError(f"{reason}: {mend}") from None
    return mllm, processor, diffusion, vae, scheduler


if __name__ == "__main__":
    from data.paper import main

    main()
