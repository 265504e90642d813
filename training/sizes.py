"""The paper's sizes without their weights: architectures by hub id, parameters and memory.

    python -m training.sizes base

builds each part on the meta device, from the hub's or a folder's config if there is one and from
the fields below if not, and prints its parameters and memory.
"""

from dataclasses import fields
from pathlib import Path

import diffusers
import torch
import transformers

from data.command_line import begin, stop
from metaquery import Connector, InputError, MetaQueryConfig, caption_width

LLAVA = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
QWEN = "Qwen/Qwen2.5-0.5B-Instruct"
QWEN3 = "Qwen/Qwen2.5-VL-3B-Instruct"
QWEN7 = "Qwen/Qwen2.5-VL-7B-Instruct"

# Language models: vocabulary, width, width of the feed-forward layers, layers, attention heads,
# key and value heads, and whether the head shares the embeddings' weights.
TEXT_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
TEXT_FIELDS += ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
TEXT_SIZES = {
    QWEN: (151_936, 896, 4864, 24, 14, 2, True),
    LLAVA: (152_000, 896, 4864, 24, 14, 2, True),
    QWEN3: (151_936, 2048, 11_008, 36, 16, 2, True),
    QWEN7: (152_064, 3584, 18_944, 28, 28, 4, False),
}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26}
SIGLIP |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False}
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
QWEN_VISION |= {"fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def text_size(name):
    """The fields in which a language model differs from its class's defaults."""
    return dict(zip(TEXT_FIELDS, TEXT_SIZES[name], strict=True))


def llava_config():
    grid = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
    text = transformers.Qwen2Config(**text_size(LLAVA))
    vision = transformers.SiglipVisionConfig(**SIGLIP)
    parts = {"text_config": text, "vision_config": vision, "image_grid_pinpoints": grid}
    return transformers.LlavaOnevisionConfig(**parts, tie_word_embeddings=True)


def qwen_vl_config(name):
    text = text_size(name)
    tied = text.pop("tie_word_embeddings")
    vision = QWEN_VISION | {"out_hidden_size": text["hidden_size"]}
    parts = {"text_config": text | {"rope_scaling": QWEN_ROPE}, "vision_config": vision}
    return transformers.Qwen2_5_VLConfig(**parts, tie_word_embeddings=tied)


MLLMS = {
    LLAVA: llava_config,
    QWEN3: lambda: qwen_vl_config(QWEN3),
    QWEN7: lambda: qwen_vl_config(QWEN7),
    QWEN: lambda: transformers.Qwen2Config(**text_size(QWEN)),
}


def sana(**fields):
    """A Sana transformer for 512 pixels and its VAE."""
    blocks = {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"}
    vae = diffusers.AutoencoderDC(**blocks, scaling_factor=0.41407)
    return diffusers.SanaTransformer2DModel(sample_size=16, **fields), vae


def sana_600m():
    heads = {"num_attention_heads": 36, "num_cross_attention_heads": 16}
    return sana(**heads, num_layers=28, cross_attention_head_dim=72, cross_attention_dim=1152)


def stable_diffusion():
    """Stable Diffusion 1.5's UNet and its VAE."""
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768), vae


DIFFUSIONS = {
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": sana,
    "Efficient-Large-Model/Sana_600M_512px_diffusers": sana_600m,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
}


def meta_mllm(name):
    """A (multimodal) language model without weights, by folder or hub id."""
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        if name not in MLLMS:
            raise OSError(f"{name} is not cached and not a known size: name a folder.") from None
        config = MLLMS[name]()
    sees = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def meta_diffusion(name):
    """A diffusion model and its VAE without weights, by folder or hub id."""
    with torch.device("meta"):
        if name in DIFFUSIONS:
            return DIFFUSIONS[name]()
        part = "transformer" if (Path(name) / "transformer").exists() else "unet"
        found = []
        for subfolder in (part, "vae"):
            config = diffusers.SanaTransformer2DModel.load_config(name, subfolder=subfolder)
            found.append(getattr(diffusers, config["_class_name"]).from_config(config))
        return found


def count(module):
    """Parameters of a module, those shared by two names counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def picture_tokens(mllm):
    """How many tokens a picture takes in the prompt, as a phrase (§3.1)."""
    vision = getattr(mllm.config, "vision_config", None)
    if vision is None:
        return "no pictures"
    if mllm.config.model_type == "llava_onevision":
        side = vision.image_size // vision.patch_size
        return f"a picture {side**2 + side * (side + 1)} tokens, one of several {side**2 + 1}"
    return "a picture 256 to 1280 tokens"


def table(config):
    """Rows (part, parameters, trained, GB at rest, GB in training) and lengths of a config.

    In training a frozen part costs its bf16 weights; a trained one its fp32 weights, gradients and
    AdamW's two moments. Activations come on top.
    """
    mllm, (diffusion, vae) = meta_mllm(config.mllm), meta_diffusion(config.diffusion)
    d = mllm.config.get_text_config().hidden_size
    with torch.device("meta"):
        width = caption_width(diffusion)
        connector = Connector(d, width, config.connector_layers, config.connector)
    parts = [
        ("MLLM", count(mllm), config.train_mllm),
        ("queries", config.num_queries * d, config.condition_on == "queries"),
        ("connector", count(connector), True),
        ("diffusion model", count(diffusion), config.train_diffusion),
        ("VAE", count(vae), False),
    ]
    rows = []
    for name, number, trained in parts:
        rest = number * (4 if trained else 2) / 1e9
        rows.append((name, number, trained, rest, rest * (4 if trained else 1)))
    total = [sum(row[i] for row in rows) for i in (1, 3, 4)]
    rows.append(("in all", total[0], None, *total[1:]))
    side, n = diffusion.config.sample_size, config.num_queries
    lengths = (
        f"condition: {n} queries {d} wide -> {n} x {width}; "
        f"prompt: up to 256 tokens of text, {picture_tokens(mllm)}; "
        f"latents {side} x {side}"
    )
    return rows, lengths


def main():
    """Print the table of a size, with any field of the config as a flag."""
    parser = transformers.HfArgumentParser(MetaQueryConfig, description=__doc__)
    begin(parser)
    parser.add_argument("size", nargs="?", default="tiny", help="tiny, base, large or xlarge")
    names = [field.name for field in fields(MetaQueryConfig)]
    for action in parser._actions:
        action.required = False  # the size names the parts
    parser.set_defaults(**dict.fromkeys(names))
    flags = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    size = flags.pop("size")
    try:
        config = MetaQueryConfig.preset(size, **flags)
        rows, lengths = table(config)
    except (InputError, OSError, ValueError) as error:
        stop(error)
    print(f"{size}: {config.mllm} x {config.diffusion}")
    print(f"{'part':>16} {'parameters':>12}  {'':8} {'dtype':8} {'at rest':>8} {'training':>9}")
    for name, number, trained, rest, training in rows:
        word = {True: "trained", False: "frozen", None: ""}[trained]
        dtype = {True: "float32", False: "bfloat16", None: ""}[trained]
        shown = f"{number / 1e6:10.1f} M"
        print(f"{name:>16} {shown:>12}  {word:8} {dtype:8} {rest:5.2f} GB {training:6.2f} GB")
    print(lengths)
    print("training: weights, gradients and AdamW's moments of one process, without activations")


if __name__ == "__main__":
    main()
