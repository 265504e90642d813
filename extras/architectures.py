"""The paper's sizes without a download: models of random weights, or of none on the meta device.

architectures.json holds the configs of the paper's parts by hub id, as far as they differ from
their classes' defaults; other parts' configs are read from their folders.
"""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers

from metaquery import InputError, MetaQuery

KNOWN = json.loads(Path(__file__).with_suffix(".json").read_text())


def folder_of(name, flag):
    """The folder of a part that is not in architectures.json. Raises InputError if it is none."""
    if not Path(name).is_dir():
        raise InputError(f"{name} is no folder and of no known size: give another {flag}.")
    return name


def mllm_config(name):
    """The config of an MLLM by hub id or folder."""
    if name in KNOWN:
        return transformers.AutoConfig.for_model(**KNOWN[name])
    return transformers.AutoConfig.from_pretrained(folder_of(name, "--mllm"))


def diffusion_configs(name):
    """The configs of a diffusion model and its VAE, dicts, by hub id or folder."""
    if name in KNOWN:
        return KNOWN[name].values()
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
    for part in diffusion_configs(config.diffusion):
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
