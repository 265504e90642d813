"""Public weights of MetaQuery's family, as MetaQuery models: OpenUni and UniPic2-MetaQuery.

    model = public_weights.load("openuni-b-512", dtype=torch.bfloat16)

The method is metaquery.py's. What differs stands here: the prompt's frame, the connector, the
noise levels of the loss, and how UniPic2 edits. Licences: OpenUni's weights state none, their code
is non-commercial; Sana's are NVIDIA's; UniPic2 is MIT, on SD3.5's community licence.
"""

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

import metaquery
from metaquery import SYSTEM_PROMPT, InputError, MetaQuery, MetaQueryConfig, PromptFormat

SANA = "Efficient-Large-Model/"
SANA_VAE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"  # not the one in Sana's folder
LICENCES = {"openuni": "OpenUni states none (code: non-commercial), Sana: NVIDIA's",
            "unipic2": "UniPic2: MIT, SD3.5: Stability's community licence"}  # fmt: skip
LONGEST_TEXT = 4096  # tokens: the families have no limit of their own

# name: (file in wusize/openuni, MLLM, diffusion model)
SIZES = {
    "openuni-b-512": ("openuni_b_internvl3_1b_sana_0_6b_512_hf",
                      "OpenGVLab/InternVL3-1B-hf", SANA + "Sana_600M_512px_diffusers"),
    "openuni-l-512": ("openuni_l_internvl3_2b_sana_1_6b_512_hf",
                      "OpenGVLab/InternVL3-2B-hf", SANA + "Sana_1600M_512px_diffusers"),
    "openuni-l-1024": ("openuni_l_internvl3_2b_sana_1_6b_1024_hf",
                       "OpenGVLab/InternVL3-2B-hf", SANA + "SANA1.5_1.6B_1024px_diffusers"),
}  # fmt: skip
UNIPIC2 = {"unipic2": "Skywork/UniPic2-Metaquery-9B",
           "unipic2-grpo": "Skywork/UniPic2-Metaquery-GRPO-9B"}  # fmt: skip
QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
# What is fetched of each, in GB: of Sana the transformer alone, not its text encoder.
GIGABYTES = {"OpenGVLab/InternVL3-1B-hf": 1.88, "OpenGVLab/InternVL3-2B-hf": 4.2,
             SIZES["openuni-b-512"][2]: 2.4, SIZES["openuni-l-512"][2]: 6.4,
             SIZES["openuni-l-1024"][2]: 6.4, SANA_VAE: 1.25, QWEN: 16.6}  # fmt: skip
FILE_GB = {("b", True): 1.29, ("b", False): 0.11, ("l", True): 3.66, ("l", False): 0.45}


@dataclass
class PublicConfig(MetaQueryConfig):
    """MetaQuery's config, and what config.json must say to load such a model again."""

    family: Literal["openuni", "unipic2"] = "openuni"
    weights: str = ""  # the file that holds the diffusion model too, if one does
    connector_width: int = 64
    connector_mlp: int = 256
    round_rotary: bool = True
    picture_positions: Literal["1d", "3d"] = "1d"


# ---- The prompt's frame --------------------------------------------------------------
class Frame(PromptFormat):
    """A user turn without a system message, and what stands before the queries."""

    start = ""  # of the answer, before the queries
    side = 512  # pixels along an image, where no size is given

    def __call__(self, prompts, images=None, system=SYSTEM_PROMPT, size=None):
        if system is None:  # a question for the MLLM itself
            return super().__call__(prompts, images, None)
        rows = metaquery.image_lists(prompts, images)
        if any(len(row) > 1 for row in rows):
            raise InputError("this model takes one image for a prompt: give one.")
        height, width = size or (self.side, self.side)
        rows = [[self.resized(image, width, height) for image in row] for row in rows]

        texts = []
        for prompt, row in zip(prompts, rows, strict=True):
            if prompt is not None:
                prompt = metaquery.clean_prompt(self.tokenizer, prompt, LONGEST_TEXT)
            user = self.user(prompt, row)
            frame = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
            texts.append(frame + self.start)
        return self.tokens(texts, sum(rows, []))

    def resized(self, image, width, height):
        return metaquery.to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)


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

    def tokens(self, texts, images):
        """Images are one tile each, shrunk without antialiasing."""
        inputs = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        if not images:
            return inputs
        norm, size = self.processor.image_processor, self.mllm_config.vision_config.image_size
        side = size if isinstance(size, int) else size[0]
        x = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        x = x.permute(0, 3, 1, 2).float() / 255  # (images, 3, height, width)
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=False)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in
                     (norm.image_mean, norm.image_std))  # fmt: skip
        return dict(inputs) | {"pixel_values": (x - mean) / std}


class UniPic2Frame(Frame):
    def user(self, prompt, row):
        if row:
            return f"<|vision_start|><|image_pad|><|vision_end|>{prompt or ''}"
        return f"Generate an image: {prompt or ''}"

    def tokens(self, texts, images):
        """The MLLM sees an image at 28/32 of its size; `sources` holds its pixels."""
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if not images:
            return self.tokenizer(texts, **options)
        if len(images) < len(texts):
            raise InputError("give an image with every prompt of a batch, or with none.")
        width, height = images[0].size
        area = (height * 28 // 32) * (width * 28 // 32)
        options["size"] = {"shortest_edge": area, "longest_edge": area}
        inputs = self.processor(text=texts, images=[[image] for image in images], **options)
        x = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return dict(inputs) | {"sources": x.permute(0, 3, 1, 2).float() / 127.5 - 1}


# ---- The models ----------------------------------------------------------------------
class PublicConnector(nn.Module):
    """A SigLIP-style encoder without positions, named as in the files, and projections.

    UniPic2's has one before it, and a pooled condition beside the other."""

    def __init__(self, config, d, c, pooled):
        super().__init__()
        width = config.connector_width
        self.connector = SiglipEncoder(
            SiglipVisionConfig(
                hidden_size=width,
                intermediate_size=config.connector_mlp,
                num_hidden_layers=config.connector_layers,
                num_attention_heads=max(1, width // metaquery.HEAD_DIM),
                attn_implementation="sdpa",
            )
        )
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


class Public(MetaQuery):
    config_class = PublicConfig

    def new_connector(self, d):
        self.format.side = self.resolution
        pooled = self.diffusion.config.get("pooled_projection_dim", 0)
        return PublicConnector(self.config, d, metaquery.caption_width(self.diffusion), pooled)

    def load_trained_state_dict(self, state, source, dtype=None):
        """As MetaQuery's; a diffusion model that no file replaces is its folder's."""
        for name, x in self.diffusion.state_dict(prefix="diffusion.").items():
            if self.config.train_diffusion and not x.is_meta and dtype:
                state.setdefault(name, x)
        try:
            super().load_trained_state_dict(state, source, dtype)
        except InputError as error:
            reason = str(error).split(":")[0]
            fix = "give the --mllm and --diffusion of its own size"
            raise InputError(f"{reason}: {fix}.") from None


class OpenUni(Public):
    format_class = OpenUniFrame

    def sigma_of(self, u):
        """σ in {1/1000 … 1}: 1 − floor(1000·u)/1000."""
        return 1 - (1000 * u).floor() / 1000


class UniPic2(Public):
    format_class = UniPic2Frame

    def latent_size(self, height, width, images=()):
        """A source's longer side becomes 512, the other a multiple of 32, unless given."""
        sizes = {metaquery.to_rgb(image).size for row in images for image in row}
        if sizes and (height is None or width is None):
            fitted = [(round(w * 512 / max(w, h) / 32) * 32 or 32,
                       round(h * 512 / max(w, h) / 32) * 32 or 32) for w, h in sizes]  # fmt: skip
            if len(set(fitted)) > 1:
                raise InputError("sources of a batch differ in shape: give height and width.")
            width, height = width or fitted[0][0], height or fitted[0][1]
        sizes = super().latent_size(height, width)
        config = self.diffusion.config
        if max(sizes) > config.pos_embed_max_size * config.patch_size:
            most = config.pos_embed_max_size * config.patch_size * self.downsampling
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
            return cond, (pooled, self.encode_latents(sources.to(cond.device), sample=False))

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
RENAMED = {"meta_queries": "queries", "transformer": "diffusion"}
DEFAULTS = {  # how they generate; the images are in both branches of guidance
    "openuni": {"num_inference_steps": 20, "guidance_scale": 4.5,
                "image_guidance_scale": 1.0},
    "unipic2": {"num_inference_steps": 50, "guidance_scale": 3.5,
                "image_guidance_scale": 1.0, "height": 512, "width": 384},
}  # fmt: skip
FAMILIES = {"openuni": OpenUni, "unipic2": UniPic2}


def read_weights(path):
    """The weights in a .pth file or in safetensors files of a folder, by MetaQuery's names.

    Raises InputError. Code in a .pth is never run."""
    state = {}
    try:
        files = [path]
        if Path(path).is_dir():
            files = sorted(Path(path).glob("*.safetensors"))
        for file in files:
            if str(file).endswith(".safetensors"):
                found = load_file(file)
            else:
                found = torch.load(file, "cpu", weights_only=True, mmap=True)
            for name, x in found.items():
                first, _, rest = name.partition(".")
                first = RENAMED.get(first, f"connector.{first}")
                state[f"{first}.{rest}".rstrip(".")] = x
    except Exception as error:  # a corrupt file may raise any
        reason = (str(error).strip() or repr(error)).splitlines()[0][:120]
        fix = "download it again, or give another file"
        raise InputError(f"cannot read {path}, tensors only ({reason}): {fix}.") from None
    return state


def shape_of(state, source):
    """Fields of the config that a file's weights tell; raises InputError."""
    try:
        start = "connector.connector.layers."
        layers = {name.split(".")[3] for name in state if name.startswith(start)}
        mlp, width = state[f"{start}0.mlp.fc1.weight"].shape
        return {"num_queries": len(state["queries"]), "connector_layers": len(layers),
                "connector_width": width, "connector_mlp": mlp}  # fmt: skip
    except (KeyError, ValueError, AttributeError, TypeError):
        fix = "give a file of OpenUni, or a folder of UniPic2"
        raise InputError(f"{source} holds another model: {fix}.") from None


def is_local(name, file):
    """Whether a folder, or a file of a hub id, is here already."""
    if Path(name).exists() or str(name).count("/") != 1:
        return True
    return isinstance(try_to_load_from_cache(name, file), str)


def announce(parts, family):
    """Print what will be downloaded. Raises InputError if the disk is too small for it.

    parts: (hub id or folder, a file of it, GB) of each."""
    parts = [(name, size) for name, file, size in parts if not is_local(name, file)]
    if not parts or constants.HF_HUB_OFFLINE:
        return
    cache = Path(constants.HF_HUB_CACHE).absolute()
    cache = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(cache).free / 1e9
    total = sum(size for _, size in parts)
    if free < total:
        reason = f"{total:.1f} GB to download, {free:.1f} GB free in {cache}"
        raise InputError(f"{reason}: free some, or set HF_HOME to another disk.")
    names = ", ".join(name for name, _ in parts)
    licences = LICENCES[family]
    print(f"downloading {names}: {total:.1f} GB. Licences: {licences}.", file=sys.stderr)


def fetch(repo, file=""):
    """A file of the hub, or the folders of UniPic2: its path here. Raises InputError."""
    folders = ("transformer", "vae", "conditioner", "scheduler")
    try:
        if file:
            return hf_hub_download(repo, file)
        patterns = [f"{folder}/*" for folder in folders]
        return snapshot_download(repo, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        files = file or "the folders " + ", ".join(folders)
        fix = f"go online, or get {files} from huggingface.co/{repo} and give their place"
        fix += " as --checkpoint, and folders as --mllm, --diffusion and --vae"
        raise InputError(f"cannot download {repo} ({reason}): {fix}.") from None


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
    names = {"round_rotary": round_rotary, "picture_positions": picture_positions}
    dtypes = (dtype, trained_dtype)
    if name.removesuffix("-pretrained") in SIZES or name.endswith(".pth"):
        return load_openuni(name, dtypes, weights, changes | names)
    if name in UNIPIC2 or Path(name, "conditioner").is_dir():
        return load_unipic2(name, dtypes, weights, changes | names)

    family, folder = "", metaquery.find_checkpoint(name)
    with suppress(OSError, ValueError, AttributeError):
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = values.get("family", "")
    if Path(folder, "conditioner").is_dir():  # a hub id of UniPic2's layout
        return load_unipic2(str(folder), dtypes, weights, changes | names)
    if family not in FAMILIES:
        return MetaQuery.from_pretrained(folder, *dtypes, **changes)

    config, state, settings = metaquery.read_checkpoint(folder, changes, PublicConfig)
    if config.weights and not any(key.startswith("diffusion.") for key in state):
        state = read_weights(config.weights) | state
    return assemble(config, state, folder, dtypes, settings)


def load_openuni(name, dtypes, weights, changes):
    """OpenUni by a public name, a local .pth, or OWNER/REPO/FILE.pth of the hub."""
    size = name.removesuffix("-pretrained")
    if size not in SIZES:
        weights = weights or name
        size = "openuni-b-512"
        if "_l_" in name:
            size = "openuni-l-1024" if "1024" in name else "openuni-l-512"
    is_tuned = "pretrained" not in name and "text2image23m" not in name
    repo, file = "wusize/openuni", f"{SIZES[size][0]}_text2image23m.pth"
    if is_tuned:
        file = f"{SIZES[size][0]}_blip3o60k.pth"
    if weights and not Path(weights).exists() and str(weights).count("/") == 2:
        repo, file = str(weights).rsplit("/", 1)
        weights = None

    config = {"family": "openuni", "vae": SANA_VAE}
    config |= {"mllm": SIZES[size][1], "diffusion": SIZES[size][2]} | changes
    needed = [(config[part], "config.json", GIGABYTES.get(config[part], 0))
              for part in ("mllm", "vae")]  # fmt: skip
    if not is_tuned:  # a fine-tuned file holds the transformer
        place = config["diffusion"]
        needed.append((place, "transformer/config.json", GIGABYTES.get(place, 0)))
    if weights is None:
        needed.append((repo, file, FILE_GB[size.split("-")[1], is_tuned]))
    announce(needed, "openuni")

    weights = weights or fetch(repo, file)
    state = read_weights(weights)
    if any(key.startswith("diffusion.") for key in state):
        config["weights"] = str(Path(weights).absolute())
    config = PublicConfig(**(shape_of(state, weights) | config))
    return assemble(config, state, weights, dtypes, DEFAULTS["openuni"])


def load_unipic2(name, dtypes, weights, changes):
    """UniPic2 by a public name or a folder of its layout."""
    folder = weights
    if folder is None and Path(name).is_dir():
        folder = name
    config = {"family": "unipic2", "mllm": QWEN} | changes
    needed = [(config["mllm"], "config.json", GIGABYTES.get(config["mllm"], 0))]
    if folder is None:
        needed.append((UNIPIC2[name], "conditioner/config.json", 6.9))
    announce(needed, "unipic2")

    folder = folder or fetch(UNIPIC2[name])
    state = read_weights(Path(folder, "conditioner"))
    config = shape_of(state, folder) | {"diffusion": str(folder)} | config
    return assemble(PublicConfig(**config), state, folder, dtypes, DEFAULTS["unipic2"])


def assemble(config, state, source, dtypes, generation_config):
    """The model of a config, of its family."""
    model = FAMILIES[config.family].from_state(config, state, source, *dtypes)
    model.generation_config |= generation_config
    if config.family == "openuni" and config.round_rotary:
        for name, buffer in model.mllm.named_buffers():
            if name.endswith("inv_freq"):  # rounded, it stays in float32
                buffer.copy_(buffer.bfloat16())
    return model.eval()
