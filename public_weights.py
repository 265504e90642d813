"""Public weights of MetaQuery's family, as MetaQuery models: OpenUni and UniPic2.

    model = public_weights.load("openuni-b-512", dtype=torch.bfloat16)

The method is metaquery.py's. What differs is here: the prompt's frame, the connector,
the noise levels of the loss, and how UniPic2 edits.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub import try_to_load_from_cache as cached
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

import metaquery
from metaquery import InputError, MetaQuery, MetaQueryConfig, PromptFormat

# hub id: (a file of it, GB to download; of Sana its transformer alone)
INTERNVL, QWEN = "OpenGVLab/InternVL3-{}B-hf", "Qwen/Qwen2.5-VL-7B-Instruct"
SANA, SANA15 = metaquery.SANA, "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
SANA_VAE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"  # not the one in Sana's folder
GIGABYTES = {INTERNVL.format(1): 1.88, INTERNVL.format(2): 4.2, QWEN: 16.6,
             SANA_VAE: 1.25, metaquery.SANA_600M: 2.4, SANA: 6.4, SANA15: 6.4}  # fmt: skip
# name: (MLLM, diffusion model, file, GB of the fine-tuned and the pre-trained file)
SIZES = {
    "openuni-b-512": (INTERNVL.format(1), metaquery.SANA_600M,
                      "openuni_b_internvl3_1b_sana_0_6b_512_hf", 1.29, 0.11),
    "openuni-l-512": (INTERNVL.format(2), SANA,
                      "openuni_l_internvl3_2b_sana_1_6b_512_hf", 3.66, 0.45),
    "openuni-l-1024": (INTERNVL.format(2), SANA15,
                       "openuni_l_internvl3_2b_sana_1_6b_1024_hf", 3.66, 0.45),
}  # fmt: skip
UNIPIC2 = {"unipic2": "Skywork/UniPic2-Metaquery-9B",
           "unipic2-grpo": "Skywork/UniPic2-Metaquery-GRPO-9B"}  # fmt: skip
FOLDERS = ("transformer", "vae", "conditioner", "scheduler")
LICENCES = {
    "openuni": "OpenUni states none (code: non-commercial), Sana: NVIDIA's",
    "unipic2": "UniPic2: MIT, SD3.5: Stability's community licence",
}
# How they generate. Without guidance by images: the images are in both branches.
DEFAULTS = {
    "openuni": {"num_inference_steps": 20, "guidance_scale": 4.5,
                "image_guidance_scale": 1.0},
    "unipic2": {"num_inference_steps": 50, "guidance_scale": 3.5,
                "image_guidance_scale": 1.0, "height": 512, "width": 384},
}  # fmt: skip


@dataclass
class PublicConfig(MetaQueryConfig):
    """MetaQuery's config, and what config.json must say to load such a model again."""

    family: Literal["openuni", "unipic2"] = "openuni"
    weights: str = ""  # OpenUni's file, if it holds the diffusion model too
    connector_width: int = 64
    connector_mlp: int = 256
    round_rotary: bool = True
    picture_positions: Literal["1d", "3d"] = "1d"


# ---- The prompt's frame: a user turn without a system message ------------------------
class Frame(PromptFormat):
    """The frame of both families; `size` is the image's (height, width) in pixels."""

    start = ""  # text that begins the answer, before the queries
    side = 512  # where no size is given; the diffusion model's own

    def __call__(self, prompts, images=None, system=metaquery.SYSTEM_PROMPT, size=None):
        if system is None:  # a question for the MLLM itself
            return super().__call__(prompts, images, None)
        rows = metaquery.image_lists(prompts, images)
        if any(len(row) > 1 for row in rows):
            raise InputError("this model takes one image for a prompt: give one.")

        texts = []
        for prompt, row in zip(prompts, rows, strict=True):
            if prompt is not None:  # the families do not limit it to 256 tokens
                prompt = metaquery.clean_prompt(self.tokenizer, prompt, 4096)
            user = f"<|im_start|>user\n{self.user(prompt, row)}<|im_end|>\n"
            texts.append(f"{user}<|im_start|>assistant\n{self.start}")

        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if not any(rows):
            return self.tokenizer(texts, **options)
        height, width = size or (self.side, self.side)
        images = [metaquery.to_rgb(image) for row in rows for image in row]
        images = [x.resize((width, height), Image.Resampling.BICUBIC) for x in images]
        arrays = np.stack([np.asarray(image) for image in images])
        pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255  # (images, 3, H, W)
        return self.with_images(texts, images, pixels, options)


class OpenUniFrame(Frame):
    start = "<img>"

    def user(self, prompt, row):
        if row:
            seen = self.processor.image_token * self.processor.image_seq_length
            if prompt is None:
                prompt = "Keep the image as it is."
            return f"<img>{seen}</img>\n{prompt}"
        if prompt is None:
            return "Generate an image."
        return f"Generate an image: {prompt.strip()}"

    def with_images(self, texts, images, pixels, options):
        """One tile, shrunk without antialiasing; the processor would cut several."""
        norm = self.processor.image_processor
        side = self.mllm_config.vision_config.image_size
        x = F.interpolate(pixels, side, mode="bilinear", antialias=False)
        mean, std = torch.tensor([norm.image_mean, norm.image_std])[..., None, None]
        return self.tokenizer(texts, **options) | {"pixel_values": (x - mean) / std}


class UniPic2Frame(Frame):
    def user(self, prompt, row):
        if row:
            return f"<|vision_start|><|image_pad|><|vision_end|>{prompt or ''}"
        return f"Generate an image: {prompt or ''}"

    def with_images(self, texts, images, pixels, options):
        """The MLLM sees an image at 28/32 of its size; `sources` holds its pixels."""
        if len(images) < len(texts):
            raise InputError("give every prompt of a batch an image, or none.")
        height, width = pixels.shape[2:]
        area = (height * 28 // 32) * (width * 28 // 32)
        options["size"] = {"shortest_edge": area, "longest_edge": area}
        inputs = self.processor(text=texts, images=[[x] for x in images], **options)
        return dict(inputs) | {"sources": 2 * pixels - 1}


# ---- The models ----------------------------------------------------------------------
class PublicConnector(nn.Module):
    """SigLIP's encoder layers, no positions, and projections, named as in the files.

    UniPic2's has a projection before them, and a pooled condition beside the other."""

    def __init__(self, config, d, c, pooled):
        super().__init__()
        width = config.connector_width
        heads = max(1, width // metaquery.HEAD_DIM)
        layers = SiglipVisionConfig(
            hidden_size=width, intermediate_size=config.connector_mlp,
            num_hidden_layers=config.connector_layers, num_attention_heads=heads,
            attn_implementation="sdpa",
        )  # fmt: skip
        self.connector = SiglipEncoder(layers)
        if pooled:
            self.projector_1 = nn.Linear(d, width)
            self.projector_2 = nn.Linear(width, pooled)
            self.projector_3 = nn.Linear(width, c)
        else:
            self.projector = nn.Linear(width, c)

    def forward(self, x, mask=None):
        """x (B, N, d). Returns (B, N, c), and for UniPic2 (B, pooled)."""
        if hasattr(self, "projector"):
            return self.projector(self.connector(x).last_hidden_state)
        x = self.connector(self.projector_1(x)).last_hidden_state  # (B, N, width)
        return self.projector_3(x), self.projector_2(x.mean(1))


class OpenUni(MetaQuery):
    """InternVL3 and Sana."""

    config_class = PublicConfig
    format_class = OpenUniFrame

    def new_connector(self, d):
        self.format.side = self.resolution
        c = metaquery.caption_width(self.diffusion)
        pooled = self.diffusion.config.get("pooled_projection_dim", 0)
        return PublicConnector(self.config, d, c, pooled)

    def sigma_of(self, u):
        """σ in {1/1000 … 1}: 1 − floor(1000·u)/1000."""
        return 1 - (1000 * u).floor() / 1000

    def load_trained_state_dict(self, state, source, dtype=None):
        """As MetaQuery's; a diffusion model that no file replaces is its folder's."""
        for name, x in self.diffusion.state_dict(prefix="diffusion.").items():
            if self.config.train_diffusion and not x.is_meta and dtype:
                state.setdefault(name, x)
        try:
            super().load_trained_state_dict(state, source, dtype)
        except InputError as error:
            fix = "give the --mllm and --diffusion of its own size"
            raise InputError(f"{str(error).split(':')[0]}: {fix}.") from None


class UniPic2(OpenUni):
    """Qwen2.5-VL and Stable Diffusion 3.5; edits with the source's latents too."""

    format_class = UniPic2Frame
    sigma_of = MetaQuery.sigma_of

    def latent_size(self, height, width, images=()):
        """A source's longer side becomes 512, the other a multiple of 32."""
        sources = {metaquery.to_rgb(image).size for row in images for image in row}
        fitted = {
            tuple(32 * max(1, round(side * 512 / max(size) / 32)) for side in size)
            for size in sources
        }
        if fitted and (height is None or width is None):
            if len(fitted) > 1:
                raise InputError("sources differ in shape: give height and width.")
            own_width, own_height = fitted.pop()
            height, width = height or own_height, width or own_width

        sizes = super().latent_size(height, width)
        config = self.diffusion.config
        most = config.pos_embed_max_size * config.patch_size  # its table of positions
        if max(sizes) > most:
            most *= self.downsampling
            raise InputError(f"height and width are at most {most} for this model.")
        return sizes

    def positions_of(self, inputs, mask):
        """The published script counts an image's tokens in one dimension."""
        if self.config.picture_positions == "1d":
            return (mask.cumsum(-1) - 1).clamp(min=0)
        return super().positions_of(inputs, mask)

    def encode_inputs(self, inputs):
        """(cond, pooled), or with sources (cond, (pooled, latents of the sources))."""
        inputs = dict(inputs)
        sources = inputs.pop("sources", None)
        cond, pooled = super().encode_inputs(inputs)
        if sources is None:
            return cond, pooled
        with self.visit(self.vae):
            latents = self.encode_latents(sources.to(cond.device), sample=False)
        return cond, (pooled, latents)

    def denoise(self, x, timestep, cond, extra=None):
        """The tokens of the clean source stand before the noisy ones in every block."""
        if not isinstance(extra, tuple):
            return super().denoise(x, timestep, cond, extra)
        pooled, latents = extra
        model = self.diffusion
        source = model.pos_embed(latents.to(model.dtype))  # (B, S, width)
        count = x[0, 0].numel() // model.config.patch_size**2  # tokens of x

        def join(_, args, tokens):
            return torch.cat([source, tokens], 1)

        def leave(_, args):
            return args[0][:, -count:], *args[1:]

        hooks = [model.pos_embed.register_forward_hook(join),
                 model.norm_out.register_forward_pre_hook(leave)]  # fmt: skip
        try:
            return super().denoise(x, timestep, cond, pooled)
        finally:
            for hook in hooks:
                hook.remove()


# ---- Files ---------------------------------------------------------------------------
def read_weights(path):
    """The weights in a .pth, or in a folder's safetensors files, by MetaQuery's names.

    Raises InputError. Code in a .pth is never run."""
    state, names = {}, {"meta_queries": "queries", "transformer": "diffusion"}
    try:
        if Path(path).is_dir():
            files = [load_file(file) for file in Path(path).glob("*.safetensors")]
        else:
            files = [torch.load(path, "cpu", weights_only=True, mmap=True)]
        for name, x in (pair for found in files for pair in found.items()):
            first, dot, rest = name.partition(".")
            state[names.get(first, f"connector.{first}") + dot + rest] = x
    except Exception as error:  # a corrupt file may raise any
        reason = (str(error).strip() or repr(error)).splitlines()[0][:120]
        fix = "download it again, or give another file"
        reason = f"cannot read {path}, tensors only ({reason})"
        raise InputError(f"{reason}: {fix}.") from None
    return state


def shape_of(state, source):
    """Fields of the config that a file's weights tell; raises InputError."""
    try:
        start = "connector.connector.layers."
        mlp, width = state[f"{start}0.mlp.fc1.weight"].shape
        layers = {name.split(".")[3] for name in state if name.startswith(start)}
        return {"num_queries": len(state["queries"]), "connector_layers": len(layers),
                "connector_width": width, "connector_mlp": mlp}  # fmt: skip
    except (KeyError, ValueError, AttributeError, TypeError):
        fix = "give a file of OpenUni, or a folder of UniPic2"
        raise InputError(f"{source} holds another model: {fix}.") from None


def announce(config, repo="", file="", size=0):
    """Print what will be downloaded; raises InputError if the disk is too small for it.

    repo, file, size: the weights' hub id, a file of theirs, and GB; the rest of what is
    needed is the parts that the config names."""
    needed = [(repo, file, size)]
    for part in ("mllm", "vae", "diffusion"):
        name, file = config.get(part, ""), "config.json"
        if part == "diffusion":
            file = "transformer/config.json"
        needed.append((name, file, GIGABYTES.get(name, 0)))
    missing = [x for x in needed if x[2] and not cached(x[0], x[1])]
    sizes = {name: size for name, _, size in missing}
    if not sizes or constants.HF_HUB_OFFLINE:
        return

    cache = Path(constants.HF_HUB_CACHE).absolute()
    cache = next(path for path in (cache, *cache.parents) if path.exists())
    free, total = shutil.disk_usage(cache).free / 1e9, sum(sizes.values())
    if free < total:
        reason = f"{total:.1f} GB to download, {free:.1f} GB free in {cache}"
        raise InputError(f"{reason}: free some, or set HF_HOME to another disk.")
    what = f"downloading {', '.join(sizes)}: {total:.1f} GB"
    print(f"{what}. Licences: {LICENCES[config['family']]}.", file=sys.stderr)


def fetch(repo, file=""):
    """The path here of a hub's file, or of UniPic2's folders. Raises InputError."""
    try:
        if file:
            return hf_hub_download(repo, file)
        return snapshot_download(repo, allow_patterns=[f"{name}/*" for name in FOLDERS])
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        files = file or f"the folders {', '.join(FOLDERS)}"
        fix = f"go online, or get {files} from huggingface.co/{repo} and give their "
        fix += "place as --checkpoint, and folders as --mllm, --diffusion and --vae"
        raise InputError(f"cannot download {repo} ({reason}): {fix}.") from None


def openuni(name, weights, config):
    """(config, weights) by a public name, a local .pth, or OWNER/REPO/FILE.pth."""
    if name.endswith(".pth"):
        weights = weights or name
    size = name.removesuffix("-pretrained")
    if size not in SIZES:  # a file: its name tells
        size = next((x for x in SIZES if SIZES[x][2] in name), "openuni-b-512")
    mllm, diffusion, file, *gigabytes = SIZES[size]
    is_pretrained = name.endswith("-pretrained") or "text2image23m" in name
    repo, file = "wusize/openuni", file + "_blip3o60k.pth"
    if is_pretrained:
        file = file.replace("blip3o60k", "text2image23m")
    if weights and not Path(weights).exists() and str(weights).count("/") == 2:
        repo, file = str(weights).rsplit("/", 1)
        weights = None

    parts = {"mllm": mllm, "diffusion": diffusion, "vae": SANA_VAE}
    config = {"family": "openuni"} | parts | config
    needed = dict(config)
    if not is_pretrained:  # the file holds the transformer
        needed.pop("diffusion")
    if weights is None:
        announce(needed, repo, file, gigabytes[is_pretrained])
    else:
        announce(needed)

    path = weights or fetch(repo, file)
    state = read_weights(path)
    if any(key.startswith("diffusion.") for key in state):
        config["weights"] = f"{repo}/{file}"
        if weights:
            config["weights"] = str(Path(weights).absolute())
    return shape_of(state, path) | config, state


def unipic2(name, weights, config):
    """(config, weights) by a public name or a folder of UniPic2's layout."""
    if name not in UNIPIC2:
        weights = weights or name
    config = {"family": "unipic2", "mllm": QWEN} | config
    folder = weights
    if weights is None:
        announce(config, UNIPIC2[name], "conditioner/config.json", 6.9)
        folder = fetch(UNIPIC2[name])
    else:
        announce(config)
    state = read_weights(Path(folder, "conditioner"))
    return shape_of(state, folder) | {"diffusion": str(folder)} | config, state


def load(
    name, dtype=torch.float32, weights=None, mllm=None, diffusion=None, vae=None,
    round_rotary=True, picture_positions="1d", trained_dtype=torch.float32, **changes,
):  # fmt: skip
    """The MetaQuery of a public name, folder, hub id or .pth. Raises InputError.

    Frozen parts are in `dtype`, those that a fine-tuning trains in `trained_dtype`.
    weights: the files of a public name, here. mllm, diffusion, vae: hub ids or folders;
    None: the checkpoint's. round_rotary: OpenUni's MLLM was trained and is run with its
    rotary frequencies rounded to bfloat16. picture_positions: how UniPic2 counts the
    tokens of an image, "1d" as its published script, or "3d" as Qwen2.5-VL. changes:
    fields of the config."""
    name = str(name)
    parts = {"mllm": mllm, "diffusion": diffusion, "vae": vae}
    changes |= {part: str(place) for part, place in parts.items() if place}
    new = {"round_rotary": round_rotary, "picture_positions": picture_positions} | changes
    if name.removesuffix("-pretrained") in SIZES or name.endswith(".pth"):
        config, state = openuni(name, weights, new)
    elif name in UNIPIC2 or Path(name, "conditioner").is_dir():
        config, state = unipic2(name, weights, new)
    else:
        folder = metaquery.find_checkpoint(name)
        if Path(folder, "conditioner").is_dir():  # a hub id of UniPic2's layout
            return load(folder, dtype, trained_dtype=trained_dtype, **new)
        path = Path(folder, "config.json")
        if not path.is_file() or '"family"' not in path.read_text(encoding="utf-8"):
            return MetaQuery.from_pretrained(folder, dtype, trained_dtype, **changes)
        saved = metaquery.read_checkpoint(folder, changes, PublicConfig)
        config, state, settings = saved
        if config.weights and not any(key.startswith("diffusion.") for key in state):
            path = config.weights
            if not Path(path).exists() and path.count("/") == 2:
                path = fetch(*path.rsplit("/", 1))
            state = read_weights(path) | state

    if not isinstance(config, PublicConfig):
        config = PublicConfig(**config)
        folder, settings = weights or name, DEFAULTS[config.family]
    model_class = {"openuni": OpenUni, "unipic2": UniPic2}[config.family]
    model = model_class.from_state(config, state, folder, dtype, trained_dtype)
    model.generation_config |= settings
    if config.family == "openuni" and config.round_rotary:
        for key, buffer in model.mllm.named_buffers():
            if key.endswith("inv_freq"):  # rounded, it stays in float32
                buffer.copy_(buffer.bfloat16())
    return model.eval()
