"""What several tests share: command lines, pictures, and tiny random models of the real classes.

The models are saved in folders of exactly the hub's layout. A test imports the functions with
`from conftest import run` and gets the fixtures, `parts` and `build`, as arguments.
"""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time: a thread each
    os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from extras.toy_parts.language import CHAT_TEMPLATE, language_config, make_processor, make_tokenizer
from metaquery import SYSTEM_PROMPT, MetaQuery, MetaQueryConfig
from notebooks.tiny_parts import make_stable_diffusion

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny"

# ---- Command lines -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def handlers_restored():
    """Commands set up how Ctrl-C and warnings are handled; other modules' tests keep theirs."""
    handler, show = signal.getsignal(signal.SIGINT), warnings.showwarning
    yield
    signal.signal(signal.SIGINT, handler)
    warnings.showwarning = show


def environment(**changes):
    """The environment of a command: one thread, no network, and some changes."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


def run(command, **changes):
    """Run a command line from the project's root; returns the finished process.

    changes: environment variables.
    """
    return subprocess.run(
        command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=300
    )


def launcher(processes):
    """The start of a command line: python, or torchrun with several processes."""
    if processes == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [*torchrun, f"--nproc-per-node={processes}", *rendezvous]


def losses(out):
    """The losses in a run's log, one per step."""
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


# ---- Pictures and models -------------------------------------------------------------------------


def pixels(picture):
    """A PIL image's values: a flat uint8 tensor."""
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)


def noise_image(width, height, seed=0):
    """A PIL image of uniform noise."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def recorded(model, prediction):
    """Replace the diffusion model by a fixed prediction; returns the list of its calls."""
    calls = []

    def denoise(x, timestep, cond, mask):
        calls.append((x, timestep, cond, mask))
        return prediction(x)

    model.denoise = denoise
    return calls


# ---- Tiny random models --------------------------------------------------------------------------

WORDS = [f"{SYSTEM_PROMPT} system user assistant a red star left of a blue circle"] * 9


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# As LLaVA-OneVision's own: pictures first, then a line break before each text, also an empty one.
LLAVA_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] }}
{%- if message['content'] is string -%}
{{ '\\n' + message['content'] }}
{%- else -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}
{{ '<image>' }}
{%- endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
{{ '\\n' + part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def make_llava(folder):
    tokenizer = make_tokenizer(WORDS, 400)
    processor = make_processor(tokenizer, 16, 8)
    processor.chat_template = LLAVA_TEMPLATE
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            vision_use_head=False,
        ),
        text_config=language_config(tokenizer, **SMALL),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=[[16, 16]],
    )
    transformers.LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def make_qwen(folder):
    tokenizer = make_tokenizer(WORDS, 400)
    transformers.Qwen2ForCausalLM(language_config(tokenizer, **SMALL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


QWEN_TEMPLATE = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")


def make_qwen_vl(folder):
    tokenizer = make_tokenizer(WORDS, 400, "<|image_pad|>", "<|video_pad|>")
    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(names[:2], special_tokens=True)
    start, end, image, video = tokenizer.convert_tokens_to_ids(names)
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(patch_size=14, merge_size=2),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )
    text = dict(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        **SMALL,
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=14,
        spatial_merge_size=2,
        out_hidden_size=64,
        fullatt_block_indexes=[1],
        window_size=56,
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


IMAGE_TOKENS = 4


def make_internvl(folder):
    """InternVL3's classes, tiny: 28 pixels, 4 tokens an image."""
    tokenizer = make_tokenizer(WORDS, 420, "<IMG_CONTEXT>", "<video>")
    tokenizer.add_tokens(["<img>", "</img>"], special_tokens=True)
    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    names |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tokenizer.init_kwargs["extra_special_tokens"] = names
    tokenizer._set_model_specific_special_tokens(names)
    image_processor = transformers.GotOcr2ImageProcessor(
        size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor = transformers.InternVLProcessor(
        image_processor,
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=IMAGE_TOKENS,
        chat_template=INTERNVL_TEMPLATE,
    )
    vision = transformers.InternVLVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=[28, 28], patch_size=[7, 7], norm_type="layer_norm",
    )  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=language_config(tokenizer, **SMALL),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=IMAGE_TOKENS,
    )
    transformers.InternVLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


INTERNVL_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<IMG_CONTEXT>\\n' }}
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def make_sana(folder):
    diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=64,
        sample_size=4,
    ).save_pretrained(folder / "transformer")
    diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    ).save_pretrained(folder / "vae")
    diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    ).save_pretrained(folder / "scheduler")
    make_index(
        folder,
        "SanaPipeline",
        transformer=["diffusers", "SanaTransformer2DModel"],
        vae=["diffusers", "AutoencoderDC"],
        scheduler=["diffusers", "DPMSolverMultistepScheduler"],
    )


def make_index(folder, pipeline, **parts):
    """The model_index.json of a diffusers pipeline folder."""
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__} | parts
    (folder / "model_index.json").write_text(json.dumps(index))


def make_sana64(folder, sana):
    """The Sana of folder `sana` with 32 x 32 latents, those of a 64 x 64 picture."""
    transformer = diffusers.SanaTransformer2DModel.from_pretrained(
        sana, subfolder="transformer", low_cpu_mem_usage=False
    )
    transformer.register_to_config(sample_size=32)
    transformer.save_pretrained(folder / "transformer")
    for part in ("vae", "scheduler"):
        (folder / part).symlink_to(sana / part)


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """A folder of random models in the hub's layouts.

    MLLMs: llava, qwen, qwen-vl, internvl. Diffusion models: sana, sana64 (64 x 64 pictures),
    sd, sd-v.
    """
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    make_llava(folder / "llava")
    make_qwen(folder / "qwen")
    make_qwen_vl(folder / "qwen-vl")
    make_internvl(folder / "internvl")
    make_sana(folder / "sana")
    make_stable_diffusion(folder / "sd", 4)
    make_stable_diffusion(folder / "sd-v", 4, "v_prediction")
    make_sana64(folder / "sana64", folder / "sana")
    return folder


@pytest.fixture
def build(parts):
    """build(mllm="llava", diffusion="sana", dtype=float32, **config) makes a random MetaQuery."""

    def make(mllm="llava", diffusion="sana", dtype=torch.float32, **changes):
        torch.manual_seed(1)
        options = {"num_queries": 5, "connector_layers": 2} | changes
        config = MetaQueryConfig(str(parts / mllm), str(parts / diffusion), **options)
        return MetaQuery.from_config(config, dtype).to(dtype).eval()

    return make
