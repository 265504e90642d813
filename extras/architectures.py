"""The paper's sizes without a download: models of random weights, or of none on the meta device.

What is named here is a part's difference from its class's defaults; other parts are read from their
folders.
"""

from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers

from metaquery import LLAVA, SANA, SANA_600M, InputError, MetaQuery

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Qwen2.5 language models: vocabulary, width, width of the feed-forward layers, layers, attention
# heads, key and value heads, and whether the head shares the embeddings' weights.
FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
FIELDS += ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
LANGUAGE = {
    LLAVA: (152_000, 896, 4864, 24, 14, 2, True),
    "Qwen/Qwen2.5-0.5B-Instruct": (151_936, 896, 4864, 24, 14, 2, True),
    "Qwen/Qwen2.5-VL-3B-Instruct": (151_936, 2048, 11_008, 36, 16, 2, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": (152_064, 3584, 18_944, 28, 28, 4, False),
    "OpenGVLab/InternVL3-1B-hf": (151_674, 896, 4864, 24, 14, 2, False),
    "OpenGVLab/InternVL3-2B-hf": (151_674, 1536, 8960, 28, 12, 2, False),
}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26}
SIGLIP |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False}
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
QWEN_VISION |= {"fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
SMALL_SANA = {"num_attention_heads": 36, "num_cross_attention_heads": 16}
SMALL_SANA |= {"cross_attention_head_dim": 72, "cross_attention_dim": 1152, "num_layers": 28}


def folder_of(name, flag):
    """The folder of a part that is not named here. Raises InputError if there is none."""
    if not Path(name).is_dir():
        raise InputError(f"{name} is no folder and of no known size: give another {flag}.")
    return name


def mllm_config(name):
    """The config of an MLLM by hub id or folder."""
    if name not in LANGUAGE:
        return transformers.AutoConfig.from_pretrained(folder_of(name, "--mllm"))

    text = dict(zip(FIELDS, LANGUAGE[name], strict=True))
    tied = text["tie_word_embeddings"]
    if name == LLAVA:
        vision = transformers.SiglipVisionConfig(**SIGLIP)
        grid = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
        return transformers.LlavaOnevisionConfig(
            text_config=transformers.Qwen2Config(**text), vision_config=vision,
            image_grid_pinpoints=grid, tie_word_embeddings=tied,
        )  # fmt: skip
    if "InternVL" in name:  # its vision tower is its class's default
        return transformers.InternVLConfig(
            text_config=transformers.Qwen2Config(**text), tie_word_embeddings=tied
        )
    if "VL" in name:
        vision = QWEN_VISION | {"out_hidden_size": text["hidden_size"]}
        text["rope_scaling"] = QWEN_ROPE
        return transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied
        )
    return transformers.Qwen2Config(**text)


def diffusion_config(name):
    """The configs of a diffusion model and its VAE, dicts, by hub id or folder."""
    if name == STABLE_DIFFUSION:
        unet = {"_class_name": "UNet2DConditionModel", "sample_size": 64}
        vae = {"_class_name": "AutoencoderKL", "block_out_channels": (128, 256, 512, 512)}
        vae |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2}
        vae |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
        return unet | {"cross_attention_dim": 768}, vae
    if name in (SANA, SANA_600M):
        sana = {"_class_name": "SanaTransformer2DModel", "sample_size": 16, "num_layers": 20}
        if name == SANA_600M:
            sana |= SMALL_SANA
        vae = {"_class_name": "AutoencoderDC", "scaling_factor": 0.41407}
        return sana, vae | {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"}

    part = "unet"
    if (Path(folder_of(name, "--diffusion")) / "transformer").exists():
        part = "transformer"
    load = diffusers.AutoModel.load_config
    return load(name, subfolder=part), load(name, subfolder="vae")


def build(config, dtype, processor=None, share=1.0):
    """A MetaQuery of random weights on torch's default device, frozen ones in `dtype`.

    share: of each part's layers. Raises InputError for a part that is not known.
    """

    def cut(layers):
        return max(1, round(share * layers))

    mllm = mllm_config(config.mllm)
    text = mllm.get_text_config()
    text.num_hidden_layers = cut(text.num_hidden_layers)
    text.layer_types = text.layer_types[: text.num_hidden_layers]
    auto = transformers.AutoModelForCausalLM
    if hasattr(mllm, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
        depth = "depth" if hasattr(mllm.vision_config, "depth") else "num_hidden_layers"
        setattr(mllm.vision_config, depth, cut(getattr(mllm.vision_config, depth)))
    mllm = auto.from_config(mllm, dtype=torch.float32)

    parts = []
    for part in diffusion_config(config.diffusion):
        if "num_layers" in part:
            part = {**part, "num_layers": cut(part["num_layers"])}
        parts.append(getattr(diffusers, part["_class_name"]).from_config(part))
    with torch.device("cpu"):  # where schedulers compute
        scheduler = diffusers.DDPMScheduler()
        if "caption_channels" in parts[0].config:  # Sana
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
            scheduler = diffusers.DPMSolverMultistepScheduler(**flow, flow_shift=3.0)
    config = replace(config, connector_layers=cut(config.connector_layers))
    model = MetaQuery(config, mllm, processor, *parts, scheduler).eval()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model
