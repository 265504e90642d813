"""Make the toy VAE, a DC-AE, and the toy diffusion model, a Sana that captions condition."""

import json
import random
from collections import Counter

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers import __version__ as diffusers_version
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from transformers import AutoProcessor, Qwen2ForCausalLM

from extras.toy_parts.fit import fit
from extras.toy_parts.language import SYSTEM, chat, user_turn
from metaquery import to_device, to_pixels
from toy.scene import SIZE, random_scene, read, render, score
from toy.tasks import CAPTION_KINDS, SIX_KINDS, task


# ---- The VAE -------------------------------------------------------------------------------------
def redraw_loss(vae, pixels):
    """L1 + L2 between images (B, 3, H, W) in [-1, 1] and what the VAE makes of them."""
    pixels = pixels.to(memory_format=torch.channels_last)
    redrawn = vae(pixels).sample.float()
    return F.l1_loss(redrawn, pixels) + F.mse_loss(redrawn, pixels)


@torch.no_grad()
def redraw(vae, pixels):
    """What a VAE makes of images (B, 3, H, W); sets its scaling factor by their latents' spread."""
    latents = vae.encode(pixels).latent
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae.decode(latents).sample.clamp(-1, 1)


def train_vae(run):
    """A DC-AE: 64x64x3 to 8x8x8, plain L1 + L2."""
    channels = (32, 32, 64, 128)
    vae = AutoencoderDC(
        in_channels=3, latent_channels=8,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 1, 1), decoder_layers_per_block=(0, 2, 2, 2),
        encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4,
    ).to(memory_format=torch.channels_last)  # fmt: skip

    def make(rng):
        scenes = [random_scene(rng, patterns=0.3, held_out=0.08) for _ in range(run.batch_size)]
        return {"pixels": to_pixels([render(scene) for scene in scenes], SIZE)}

    def loss_of(batch):
        return redraw_loss(vae, batch["pixels"])

    def evaluate():
        scenes = [random_scene(random.Random(f"test {i}"), 0.2, 0.08) for i in range(200)]
        pixels = to_pixels([render(scene) for scene in scenes], SIZE).to(vae.device)
        images = VaeImageProcessor().postprocess(redraw(vae, pixels))
        right = [shows(image, scene) for image, scene in zip(images, scenes, strict=True)]
        return {"readable": sum(right) / len(right)}

    fit("vae", [vae], make, loss_of, 2e-3, run, evaluate)
    vae.to(torch.bfloat16).save_pretrained(run.out / "diffusion" / "vae")


def shows(image, scene):
    """Whether an image reads as exactly the objects of a scene, wherever they are."""

    def looks(scene):
        return Counter((o.shape, o.color, o.pattern, o.inner) for o in scene.objects)

    seen, is_clear = read(image)
    return is_clear and looks(seen) == looks(scene) and seen.background == scene.background


# ---- The diffusion model -------------------------------------------------------------------------
# The kinds of task that it learns, with weights: also crowded scenes, in any layout.
KINDS = CAPTION_KINDS | {"crowded dense": 4, "free dense": 4, "two colours": 3}


def caption_inputs(tokenizer, prompts):
    """The prompts' tokens behind the system turn, padded on the right, as model inputs."""
    texts = [chat(tokenizer, [SYSTEM, user_turn(prompt)]) for prompt in prompts]
    return dict(tokenizer(texts, return_tensors="pt", padding=True, padding_side="right"))


@torch.no_grad()
def caption_states(language, skip, input_ids, attention_mask):
    """Last-layer states of the captions' tokens (the first `skip` left out) and their mask."""
    states = language.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return states[:, skip:].float(), attention_mask[:, skip:]


def velocity_loss(sana, vae, pixels, states, mask):
    """The flow's loss of images (B, 3, H, W) for captions' states (B, L, c) and mask (B, L).

    Noise levels are drawn logit-normal, as Sana's were: most of them are in the middle.
    """
    with torch.no_grad():
        z = vae.encode(pixels).latent.float() * vae.config.scaling_factor
    sigma = torch.randn(len(z), device=z.device).sigmoid()
    noise = torch.randn_like(z)
    noisy = z + sigma.view(-1, 1, 1, 1) * (noise - z)
    velocity = sana(noisy, states, 1000 * sigma, encoder_attention_mask=mask).sample
    return F.mse_loss(velocity.float(), noise - z)


def images_of_states(sana, vae, scheduler, states, mask):
    """B PIL images for captions' states (2B, L, c) and mask (2B, L): first B empty captions."""
    empty, captions = states.chunk(2)
    empty_mask, caption_mask = mask.chunk(2)
    pipeline = SanaPipeline(None, None, vae, sana, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    with torch.autocast(sana.device.type, torch.bfloat16):
        return pipeline(
            prompt_embeds=captions, prompt_attention_mask=caption_mask, negative_prompt=None,
            negative_prompt_embeds=empty, negative_prompt_attention_mask=empty_mask,
            num_inference_steps=20, guidance_scale=3.0,
            height=SIZE, width=SIZE, use_resolution_binning=False,
        ).images  # fmt: skip


def train_diffusion(run):
    """A toy Sana on captions alone: 8x8 latents, 6 layers, 192 wide, flow matching."""
    tokenizer = AutoProcessor.from_pretrained(run.out / "mllm").tokenizer
    language = Qwen2ForCausalLM.from_pretrained(run.out / "llm", dtype=torch.float32)
    language = language.eval().to(run.device)
    vae = AutoencoderDC.from_pretrained(run.out / "diffusion" / "vae").eval().to(run.device)
    skip = len(tokenizer(chat(tokenizer, [SYSTEM], open_end=False))["input_ids"])
    sana = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_layers=6, sample_size=8, interpolation_scale=1.0,
        num_attention_heads=6, attention_head_dim=32, num_cross_attention_heads=3,
        cross_attention_head_dim=64, cross_attention_dim=192, caption_channels=192,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=1.0,
    )  # fmt: skip

    def make(rng):
        kinds = rng.choices(list(KINDS), list(KINDS.values()), k=run.batch_size)
        tasks = [task(kind, rng.randrange(1 << 40), "sana") for kind in kinds]
        prompts = ["" if rng.random() < 0.1 else each.prompt for each in tasks]
        pixels = to_pixels([each.target_image for each in tasks], SIZE)
        return {"pixels": pixels, **caption_inputs(tokenizer, prompts)}

    def loss_of(batch):
        pixels = batch.pop("pixels")
        states, mask = caption_states(language, skip, **batch)
        return velocity_loss(sana, vae, pixels, states, mask)

    def evaluate(number=16):
        right, shown = {}, []
        kinds = (*SIX_KINDS, "dense", "free dense", "two colours", "held-out")
        for kind in kinds:
            tasks = [task(kind, i, split="test") for i in range(number)]
            inputs = caption_inputs(tokenizer, [""] * number + [each.prompt for each in tasks])
            states, mask = caption_states(language, skip, **to_device(inputs, run.device))
            images = images_of_states(sana, vae, scheduler, states, mask)
            cases = zip(images, tasks, strict=True)
            right[kind] = sum(score(image, each.goal) for image, each in cases) / number
            shown += images[:8]
        make_image_grid(shown, len(kinds), 8).save(run.out / "diffusion.png")
        return right

    fit("diffusion", [sana], make, loss_of, 1e-3, run, evaluate)
    save_pipeline(run.out / "diffusion", sana, vae, scheduler)


def save_pipeline(folder, sana, vae, scheduler):
    """Save the parts in bfloat16, in the layout of a Sana pipeline on the hub."""
    parts = {"transformer": sana, "vae": vae, "scheduler": scheduler}
    index = {"_class_name": "SanaPipeline", "_diffusers_version": diffusers_version}
    index |= {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    sana.to(torch.bfloat16)
    vae.to(torch.bfloat16)
    vae.register_to_config(_name_or_path="")  # not the folder it was read from
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
