"""Tiny random parts of the real classes, saved in folders of exactly the hub's layout."""

import json

import diffusers
import torch
import transformers

from metaquery import TINY
from public_weights import PublicConfig, PublicConnector


def make_stable_diffusion(folder, side, prediction_type="epsilon"):
    """A Stable Diffusion pipeline of random weights with latents (4, side, side).

    Its VAE halves an image's sides, so that it generates images of 2·side pixels.
    """
    unet = diffusers.UNet2DConditionModel(
        sample_size=side,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )

    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    for name, part in {"unet": unet, "vae": vae, "scheduler": scheduler}.items():
        part.save_pretrained(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


def make_openuni(folder, num_queries=16, width=64):
    """OpenUni's two downloads, random: folder/internvl, an InternVL3, and folder/openuni.pth.

    Its connector speaks to the shipped toy Sana. An image is 28 x 28 pixels and 4 tokens.
    """
    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    names |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        TINY / "mllm", extra_special_tokens=names
    )
    size = {"height": 28, "width": 28}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size),
        tokenizer,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=transformers.AutoProcessor.from_pretrained(TINY / "mllm").chat_template,
    )

    layers = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.Qwen2Config(
        vocab_size=len(tokenizer), intermediate_size=96, num_key_value_heads=2, **layers
    )
    vision = transformers.InternVLVisionConfig(
        intermediate_size=96, image_size=[28, 28], patch_size=[7, 7], **layers
    )
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    transformers.InternVLForConditionalGeneration(config).save_pretrained(folder / "internvl")
    processor.save_pretrained(folder / "internvl")

    config = PublicConfig(mllm="", diffusion="", connector_layers=2, connector_width=width)
    connector = PublicConnector(config, d=width, c=192, pooled=0)
    queries = torch.randn(num_queries, width)
    torch.save({"meta_queries": queries} | connector.state_dict(), folder / "openuni.pth")
