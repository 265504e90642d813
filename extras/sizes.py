"""The paper's sizes without their weights: architectures by hub id, parameters and memory.

    python -m extras.sizes base
    python -m extras.sizes xlarge --processes 8 --shard true --micro-batch-size 4

builds each part on the meta device, from the hub's or a folder's config if there is one and from
the fields below if not, and prints its parameters, the memory that each of the processes needs in
training, and the largest micro-batch that fits a GPU of 80 GB.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import diffusers
import torch
import transformers

from cli import begin, check_bounds, stop
from extras.memory import Run, plan
from metaquery import Connector, InputError, MetaQueryConfig, caption_width

BOUNDS = {"processes": (1, 10**6), "micro_batch_size": (1, 10**6), "prompt_tokens": (1, 10**6)}

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


def meta_model(config):
    """The parts of a MetaQuery without their weights: a module with the same attributes."""
    model = torch.nn.Module()
    model.config = config
    model.mllm = meta_mllm(config.mllm).requires_grad_(config.train_mllm)
    model.diffusion, model.vae = meta_diffusion(config.diffusion)
    model.diffusion.requires_grad_(config.train_diffusion)
    model.vae.requires_grad_(False)
    d = model.mllm.config.get_text_config().hidden_size
    with torch.device("meta"):
        c = caption_width(model.diffusion)
        model.connector = Connector(d, c, config.connector_layers, config.connector)
        model.queries = torch.nn.Parameter(torch.empty(config.num_queries, d))
    model.queries.requires_grad_(config.condition_on == "queries")
    return model


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


@dataclass
class Part:
    """A part of a model, and what it weighs: a frozen one its bfloat16 weights; a trained one its
    float32 weights, and in training their gradients and AdamW's two moments too."""

    name: str
    parameters: int
    is_trained: bool

    @property
    def at_rest(self):
        """Bytes of the weights."""
        return self.parameters * (4 if self.is_trained else 2)

    @property
    def in_training(self):
        """Bytes of all that a step updates."""
        return self.at_rest * (4 if self.is_trained else 1)


def parts_of(model):
    """The `Part`s of what `meta_model` made, a list."""
    config = model.config
    return [
        Part("MLLM", count(model.mllm), config.train_mllm),
        Part("queries", model.queries.numel(), config.condition_on == "queries"),
        Part("connector", count(model.connector), True),
        Part("diffusion model", count(model.diffusion), config.train_diffusion),
        Part("VAE", count(model.vae), False),
    ]


def print_parts(model):
    """Print a table of a model's parts, and its lengths."""
    parts = parts_of(model)
    print(f"{'part':>16} {'parameters':>12}  {'':8} {'dtype':8} {'at rest':>8} {'training':>9}")
    for part in parts:
        how = "trained  float32 " if part.is_trained else "frozen   bfloat16"
        millions = f"{part.parameters / 1e6:10.1f} M"
        weights, training = part.at_rest / 1e9, part.in_training / 1e9
        print(f"{part.name:>16} {millions:>12}  {how} {weights:5.2f} GB {training:6.2f} GB")
    millions = f"{sum(part.parameters for part in parts) / 1e6:10.1f} M"
    weights = sum(part.at_rest for part in parts) / 1e9
    training = sum(part.in_training for part in parts) / 1e9
    print(f"{'in all':>16} {millions:>12}  {'':17} {weights:5.2f} GB {training:6.2f} GB")
    print("training: weights, gradients and AdamW's moments, without activations")
    n, d = model.queries.shape
    side, width = model.diffusion.config.sample_size, caption_width(model.diffusion)
    print(
        f"condition: {n} queries {d} wide -> {n} x {width}; prompt: up to 256 tokens of text, "
        f"{picture_tokens(model.mllm)}; latents {side} x {side}"
    )


def print_plan(model, run):
    """Print what a process of a run needs, and the largest micro-batch that fits a GPU."""
    made = plan(model, run)
    print(f"each of {run.processes} processes, micro-batches of {run.micro_batch_size}:")
    for name, size in vars(made).items():
        if size:
            print(f"{name.replace('_', ' '):>20} {size / 1e9:7.2f} GB")
    print(f"{'in all':>20} {made.total / 1e9:7.2f} GB")
    most = made.largest_micro_batch(run)
    what = f"the largest micro-batch is {most}" if most else "not even a micro-batch of 1 fits"
    print(f"prompts of {run.prompt_tokens} tokens, 80 GB a GPU, of which a tenth is spare: {what}")


def main():
    """Print the tables of a size, with any field of its config, and of `Run`, as a flag."""
    parser = transformers.HfArgumentParser([MetaQueryConfig, Run], description=__doc__)
    begin(parser)
    parser.add_argument("size", nargs="?", default="tiny", help="tiny, base, large or xlarge")
    for action in parser._actions:
        action.required = False  # the size names the parts
    run_fields, config_fields = fields(Run), fields(MetaQueryConfig)
    parser.set_defaults(**{field.name: None for field in config_fields})
    flags = vars(parser.parse_args())
    run = Run(**{field.name: flags[field.name] for field in run_fields})
    given = {field.name: flags[field.name] for field in config_fields}
    changes = {name: value for name, value in given.items() if value is not None}
    check_bounds(vars(run), BOUNDS)
    try:
        config = MetaQueryConfig.preset(flags["size"], **changes)
        model = meta_model(config)
    except (InputError, OSError, ValueError) as error:
        stop(error)
    print(f"{flags['size']}: {config.mllm} x {config.diffusion}")
    print_parts(model)
    print_plan(model, run)


if __name__ == "__main__":
    main()
