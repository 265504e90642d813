"""Public weights of MetaQuery's family, as MetaQuery models: OpenUni and UniPic2.

    model = public_weights.load("openuni-b-512", dtype=torch.bfloat16)

The method is metaquery.py's. What differs is here: the prompt's frame, the connector,
the noise levels of the loss, and how UniPic2 edits.
"""

import math
import shutil
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import constants, snapshot_download
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

import metaquery
from metaquery import InputError, MetaQuery, MetaQueryConfig, PromptFormat

QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
SANA_VAE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"  # not the one in Sana's folder
# name: (start of its files' names, MLLM, diffusion model)
OPENUNI = {
    "openuni-b-512": ("openuni_b_internvl3_1b_sana_0_6b_512_hf",
                      "OpenGVLab/InternVL3-1B-hf", metaquery.SANA_600M),
    "openuni-l-512": ("openuni_l_internvl3_2b_sana_1_6b_512_hf",
                      "OpenGVLab/InternVL3-2B-hf", metaquery.SANA),
    "openuni-l-1024": ("openuni_l_internvl3_2b_sana_1_6b_1024_hf",
                       "OpenGVLab/InternVL3-2B-hf",
                       "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"),
}  # fmt: skip
PLACES = {  # name: where its weights are on the hub, OWNER/REPO or OWNER/REPO/FILE
    "unipic2": "Skywork/UniPic2-Metaquery-9B",
    "unipic2-grpo": "Skywork/UniPic2-Metaquery-GRPO-9B",
}
for _name, (_start, *_) in OPENUNI.items():
    PLACES[_name] = f"wusize/openuni/{_start}_blip3o60k.pth"
    PLACES[f"{_name}-pretrained"] = f"wusize/openuni/{_start}_text2image23m.pth"
LICENCES = {
    "openuni": "OpenUni states none (code: non-commercial), Sana: NVIDIA's",
    "unipic2": "UniPic2: MIT, SD3.5: Stability's community licence",
}


@dataclass
class PublicConfig(MetaQueryConfig):
    """MetaQuery's config, and what config.json must say to load such a model again."""

    family: Literal["openuni", "unipic2"] = "openuni"
    weights: str = ""  # OpenUni's file, if it holds the diffusion model too
    connector_width: int = 64
    connector_mlp: int = 256
    # OpenUni's MLLM was trained and is run with rotary frequencies rounded to bfloat16.
    round_rotary: bool = True
    # UniPic2 counts an image's tokens as its published script, or "3d" as Qwen2.5-VL.
    picture_positions: Literal["1d", "3d"] = "1d"


# ---- The prompt's frame: a user turn without a system message ------------------------
class Frame(PromptFormat):
    """The frame of both families; `size` is the image's (height, width) in pixels.

    As in their code, prompts are not cut, and special tokens in them stay."""

    start = ""  # text that begins the answer, before the queries
    side = 512  # pixels, where no size is given: the diffusion model's own

    def __call__(self, prompts, images=None, system=metaquery.SYSTEM_PROMPT, size=None):
        if system is None:  # a question for the MLLM itself
            return super().__call__(prompts, images, None)

        texts, rows = [], metaquery.image_lists(prompts, images)
        for prompt, row in zip(prompts, rows, strict=True):
            metaquery.clean_prompt(self.tokenizer, prompt, math.inf)  # it must be text
            if row and self.processor.image_token in (prompt or ""):
                fix = f"remove {self.processor.image_token} from the prompt"
                raise InputError(f"the prompt has a token that means an image: {fix}.")
            turn = f"<|im_start|>user\n{self.user(prompt, row)}<|im_end|>\n"
            texts.append(f"{turn}<|im_start|>assistant\n{self.start}")

        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if not any(rows):
            return self.tokenizer(texts, **options)
        height, width = size or (self.side, self.side)
        images = [metaquery.to_rgb(image) for row in rows for image in row]
        images = [x.resize((width, height), Image.Resampling.BICUBIC) for x in images]
        pixels = torch.from_numpy(np.stack(images)) / 255  # (images, H, W, 3)
        return self.with_images(texts, images, pixels.permute(0, 3, 1, 2), options)


class OpenUniFrame(Frame):
    start = "<img>"

    def user(self, prompt, row):
        if row:
            seen = self.processor.image_token * self.processor.image_seq_length
            if prompt is None:
                prompt = "Keep the image as it is."
            return f"<img>{seen}</img>\n" * len(row) + prompt
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
        if len(row) > 1:
            raise InputError("this model takes one image for a prompt: give one.")
        if row:
            return f"<|vision_start|><|image_pad|><|vision_end|>{prompt or ''}"
        return f"Generate an image: {prompt or ''}"

    def with_images(self, texts, images, pixels, options):
        """The MLLM sees an image at 28/32 of its size; `sources` holds its pixels."""
        if len(images) < len(texts):
            fix = "give each an image, or take batches of 1"
            raise InputError(f"some prompts of a batch have no image: {fix}.")
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
        settings = SiglipVisionConfig(
            hidden_size=width, intermediate_size=config.connector_mlp,
            num_hidden_layers=config.connector_layers, attn_implementation="sdpa",
            num_attention_heads=max(1, width // metaquery.HEAD_DIM),
        )  # fmt: skip
        self.connector = SiglipEncoder(settings)
        self.pooled = pooled
        if pooled:
            self.projector_1 = nn.Linear(d, width)
            self.projector_2 = nn.Linear(width, pooled)
            self.projector_3 = nn.Linear(width, c)
        else:
            self.projector = nn.Linear(width, c)

    @property
    def layers(self):
        return self.connector.layers

    def forward(self, x, mask=None):
        """x (B, N, d). Returns (B, N, c), and for UniPic2 (B, pooled)."""
        if not self.pooled:
            return self.projector(self.connector(x).last_hidden_state)
        x = self.connector(self.projector_1(x)).last_hidden_state  # (B, N, width)
        return self.projector_3(x), self.projector_2(x.mean(1))


class OpenUni(MetaQuery):
    """InternVL3 and Sana."""

    config_class = PublicConfig
    format_class = OpenUniFrame
    # How it generates. Without guidance by images: the images are in both branches.
    settings = {"num_inference_steps": 20, "guidance_scale": 4.5,
                "image_guidance_scale": 1.0}  # fmt: skip

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
        if self.config.train_diffusion:
            parts = self.diffusion.state_dict(prefix="diffusion.")
            state = {name: x for name, x in parts.items() if not x.is_meta} | state
        try:
            super().load_trained_state_dict(state, source, dtype)
        except InputError as error:
            fix = "give the --mllm and --diffusion of its own size"
            raise InputError(f"{str(error).split(':')[0]}: {fix}.") from None


class UniPic2(OpenUni):
    """Qwen2.5-VL and Stable Diffusion 3.5; edits with the source's latents too."""

    format_class = UniPic2Frame
    settings = {"num_inference_steps": 50, "guidance_scale": 3.5,
                "image_guidance_scale": 1.0, "height": 512, "width": 384}  # fmt: skip
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
                fix = "give height and width, or take batches of 1"
                raise InputError(f"the source images differ in shape: {fix}.")
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

        joined = model.pos_embed.register_forward_hook(join)
        with joined, model.norm_out.register_forward_pre_hook(leave):
            return super().denoise(x, timestep, cond, pooled)


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
        reason = (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]
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


class NoBar(tqdm):
    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"disable": True})


def is_on_hub(place):
    """Whether a place is the hub's OWNER/REPO or OWNER/REPO/FILE, and nothing here."""
    is_name = place.count("/") in (1, 2) and place[0] not in "./~"
    return is_name and not Path(place).exists()


def published(name, weights=None):
    """(fields of the config, place of the weights) of what a name stands for, or None.

    name: a public name, a .pth, or a folder or hub id of UniPic2's layout."""
    known, folder = PLACES.get(name, name), name
    place = str(weights or known)
    if Path(place).exists():
        place = str(Path(place).absolute())
    if is_on_hub(name):  # its small files tell its kind
        with suppress(Exception):
            options = {"allow_patterns": "*config.json", "tqdm_class": NoBar}
            folder = snapshot_download(name, **options)

    has_config = Path(folder, "config.json").exists()
    is_unipic2 = known.startswith("Skywork/") or Path(folder, "conditioner").is_dir()
    if is_unipic2 or Path(folder, "transformer").is_dir() and not has_config:
        return {"family": "unipic2", "mllm": QWEN, "diffusion": place}, place
    if known.endswith(".pth"):  # its name tells the size
        size = next((x for x in OPENUNI if OPENUNI[x][0] in known), "openuni-b-512")
        _, mllm, diffusion = OPENUNI[size]
        return {"mllm": mllm, "diffusion": diffusion, "vae": SANA_VAE}, place
    if folder != name and not has_config:
        fix = "name a file of it, as OWNER/REPO/FILE.pth"
        raise InputError(f"{name} on the hub is no checkpoint: {fix}.")
    if folder == name and not Path(name).exists():
        fix = f"give a folder, a hub id, or one of {', '.join(PLACES)}"
        raise InputError(f"found no checkpoint {name}: {fix}.")
    return None


def fetch(config, place, needs_transformer):
    """The path here of a place of weights; downloads what is missing of all parts.

    First it prints what, how many GB, and under which licences. Raises InputError if
    the disk is too small or the network fails."""
    every = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    diffusion = ["scheduler/*", "transformer/*.json"]
    if needs_transformer:
        diffusion[1] = "transformer/*"
    if not config.vae:
        diffusion.append("vae/*")
    parts = {"--checkpoint": (place, place.split("/")[2:] or ["conditioner/*"]),
             "--mllm": (config.mllm, every), "--vae": (config.vae, every),
             "--diffusion": (config.diffusion, diffusion)}  # fmt: skip
    needed = {  # flag: (repository, files)
        flag: ("/".join(name.split("/")[:2]), files)
        for flag, (name, files) in parts.items() if is_on_hub(name)
    }  # fmt: skip
    download = partial(snapshot_download, ignore_patterns=["*.fp16*", "*.bf16*"])

    sizes = Counter()
    for repo, files in needed.values():
        plan = None
        with suppress(Exception):  # without a network what is here may do
            plan = download(repo, allow_patterns=files, dry_run=True, tqdm_class=NoBar)
        if plan == []:
            raise InputError(f"{repo} on the hub has no {files[0]}: give another.")
        sizes[repo] += sum(file.file_size for file in plan or () if file.will_download)
    gigabytes = sizes.total() / 1e9
    cache = Path(constants.HF_HUB_CACHE)
    cache = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(cache).free / 1e9
    if free < gigabytes:
        reason = f"{gigabytes:.1f} GB to download, {free:.1f} GB free in {cache}"
        raise InputError(f"{reason}: free some, or set HF_HOME to another disk.")
    if gigabytes:
        names = ", ".join(repo for repo in sizes if sizes[repo])
        what = f"downloading {names}: {gigabytes:.2f} GB"
        print(f"{what}. Licences: {LICENCES[config.family]}.", file=sys.stderr)
    else:
        download = partial(download, tqdm_class=NoBar)

    try:
        for flag, (repo, files) in needed.items():
            folder = download(repo, allow_patterns=files)
            if flag == "--checkpoint":
                place = Path(folder, *place.split("/")[2:])
    except Exception as error:  # the hub's client raises many kinds
        reason = (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]
        each = [f"{flag} {' '.join(files)} of huggingface.co/{repo}"
                for flag, (repo, files) in needed.items()]  # fmt: skip
        fix = f"go online, or place by hand and name by flags: {'; '.join(each)}"
        raise InputError(f"cannot download {repo} ({reason}): {fix}.") from None
    return place


def has_diffusion(state):
    return any(name.startswith("diffusion.") for name in state)


def moved(place):
    """A place of weights; the hub's of the same last name where a local one is gone."""
    if Path(place).exists():
        return place
    known = {Path(place).name: place for place in PLACES.values()}
    return known.get(Path(place).name, place)


def load(
    name, dtype=torch.float32, trained_dtype=torch.float32, weights=None, mixins=(),
    **changes,
):  # fmt: skip
    """The MetaQuery of a public name, folder, hub id or .pth. Raises InputError.

    Frozen parts are in `dtype`, those that a fine-tuning trains in `trained_dtype`.
    weights: a public name's files, here. mixins: classes that the model's class is to
    inherit from as well. changes: fields of PublicConfig, such as mllm, diffusion and
    vae, hub ids or folders; None: the checkpoint's."""
    changes = {key: value for key, value in changes.items() if value is not None}
    for part in changes.keys() & {"mllm", "diffusion", "vae"}:
        changes[part] = str(changes[part])

    def of_class(model_class):
        if mixins:
            return type(model_class.__name__, (*mixins, model_class), {})
        return model_class

    state, settings = {}, {}
    if found := published(str(name), weights):
        fields, place = found
        config = PublicConfig(**(fields | changes))
        is_whole = "blip3o60k" in place
        if Path(place).is_file():
            is_whole = has_diffusion(read_weights(place))
    else:
        name = metaquery.find_checkpoint(str(name))
        path = Path(name, "config.json")
        if not path.is_file() or b'"family"' not in path.read_bytes():
            plain = of_class(MetaQuery)
            return plain.from_pretrained(name, dtype, trained_dtype, **changes)
        if weights:
            changes["weights"] = str(weights)
        config, state, settings = metaquery.read_checkpoint(name, changes, PublicConfig)
        config.diffusion = moved(config.diffusion)
        config.weights = moved(config.weights)
        is_whole = has_diffusion(state)
        place = ""
        if not is_whole:
            place = config.weights
        if place and not is_on_hub(place) and not Path(place).exists():
            fix = f"put it there, or write another place as weights in {path}"
            raise InputError(f"{place}, with the diffusion model, is gone: {fix}.")

    path = fetch(config, place, not is_whole)
    if place:
        if config.family == "unipic2":
            path = Path(path, "conditioner")
        state = read_weights(path) | state
    if found:
        config = replace(config, **(shape_of(state, path) | changes))
        if has_diffusion(state):
            config.weights = place

    model_class = of_class({"openuni": OpenUni, "unipic2": UniPic2}[config.family])
    model = model_class.from_state(config, state, path or name, dtype, trained_dtype)
    model.has_own_diffusion = has_diffusion(state) and not place or config.train_diffusion
    model.generation_config |= settings or model_class.settings
    if config.family == "openuni" and config.round_rotary:
        for key, buffer in model.mllm.named_buffers():
            if key.endswith("inv_freq"):  # rounded, it stays in float32
                buffer.copy_(buffer.bfloat16())
    return model.eval()
