"""Make the toy world's frozen, "pre-trained" parts, each as its real counterpart was made.

    python -m extras.toy_parts --out weights/new        every part that is not there yet, in order

vae        a toy DC-AE (Sana's autoencoder), trained to redraw random scenes
vision     a toy SigLIP tower, taught what each patch shows; it is the MLLM's eye
llm        a toy Qwen2, trained to talk: of facts, of prompts, of pictures given to it as words
mllm       LLaVA-OneVision of the two: its eye learns those words, then it talks of real pictures
diffusion  a toy Sana, conditioned on the last-layer embeddings of `llm`, as Sana is on Gemma's

Each part is saved in the hub's own layout, so that `from_pretrained(folder)` loads it like the
real one; vision/ and llm/ are steps on the way. It takes hours: on one core the language model
alone takes about two.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from diffusers import __version__ as diffusers_version
from PIL import Image
from torchvision.utils import save_image
from transformers import AutoProcessor, Qwen2ForCausalLM

from metaquery import conversation, to_device
from extras.toy_parts.fit import Run, fit, pictures_to_tensor
from extras.toy_parts.language import chat, train_llm, train_mllm, train_vision
from toy.scene import random_scene, read, render, score
from toy.tasks import CAPTION_KINDS, SIX_KINDS, task


def redraw_loss(vae, pixels):
    """L1 + L2 between pictures (B, 3, H, W) in [-1, 1] and what the VAE makes of them."""
    pixels = pixels.to(memory_format=torch.channels_last)
    redrawn = vae(pixels).sample.float()
    return F.l1_loss(redrawn, pixels) + F.mse_loss(redrawn, pixels)


def train_vae(run):
    """A DC-AE: 64x64x3 to 8x8x8, plain L1 + L2."""
    channels = (32, 32, 64, 128)
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 2, 2, 2),
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
    ).to(memory_format=torch.channels_last)

    def make(rng):
        scenes = [random_scene(rng, patterns=0.3, held_out=0.08) for _ in range(run.batch_size)]
        return {"pixels": pictures_to_tensor([render(scene) for scene in scenes])}

    def loss_of(batch):
        return redraw_loss(vae, batch["pixels"])

    @torch.no_grad()
    def evaluate():
        scenes = [random_scene(random.Random(f"test {i}"), 0.2, 0.08) for i in range(200)]
        pixels = pictures_to_tensor([render(scene) for scene in scenes]).to(vae.device)
        latents = vae.encode(pixels).latent
        pixels = vae.decode(latents).sample.clamp(-1, 1)
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        redrawn = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        right = [same(scene, redraw) for scene, redraw in zip(scenes, redrawn, strict=True)]
        return {"readable": sum(right) / len(right)}

    fit("vae", [vae], make, loss_of, 2e-3, run, evaluate)
    vae.to(torch.bfloat16).save_pretrained(run.out / "diffusion" / "vae")


def same(scene, array):
    """Whether a picture (H, W, 3) of uint8 reads as exactly the objects of `scene`."""
    seen, clear = read(Image.fromarray(array))
    there, drawn = (
        sorted(str((item.shape, item.color, item.pattern, item.inner)) for item in each.objects)
        for each in (scene, seen)
    )
    return clear and there == drawn and seen.background == scene.background


def caption_inputs(tokenizer, prompts):
    """The prompts' tokens behind the system turn, padded on the right, as model inputs."""
    texts = [chat(tokenizer, conversation(prompt)) for prompt in prompts]
    return dict(tokenizer(texts, return_tensors="pt", padding=True, padding_side="right"))


@torch.no_grad()
def caption_states(language, skip, input_ids, attention_mask):
    """Last-layer states of the captions' tokens (the first `skip` left out) and their mask."""
    states = language.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return states[:, skip:].float(), attention_mask[:, skip:]


def velocity_loss(sana, vae, pixels, states, mask):
    """The flow's loss of pictures (B, 3, H, W) for captions' states (B, L, c) and mask (B, L).

    Noise levels are drawn logit-normal, as Sana's were: most of them are in the middle.
    """
    with torch.no_grad():
        z = vae.encode(pixels).latent.float() * vae.config.scaling_factor
    sigma = torch.randn(len(z), device=z.device).sigmoid()
    noise = torch.randn_like(z)
    noisy = z + sigma.view(-1, 1, 1, 1) * (noise - z)
    velocity = sana(noisy, states, 1000 * sigma, encoder_attention_mask=mask).sample
    return F.mse_loss(velocity.float(), noise - z)


@torch.no_grad()
def draw(sana, vae, scheduler, states, mask, steps=20, guidance=3):
    """Pictures (B, 3, 64, 64) in [-1, 1] for states (2B, L, c), first those of B empty captions."""
    device = states.device
    scheduler.set_timesteps(steps)
    z = torch.randn(len(states) // 2, 8, 8, 8, device=device)
    for t in scheduler.timesteps:
        with torch.autocast(device.type, torch.bfloat16):
            times = t.expand(len(states)).to(device)
            v = sana(z.repeat(2, 1, 1, 1), states, times, encoder_attention_mask=mask).sample
        free, asked = v.float().chunk(2)
        z = scheduler.step(free + guidance * (asked - free), t, z).prev_sample
    return vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1)


# What the diffusion model learns to draw, with weights: also crowded scenes, in any layout.
DRAWN_KINDS = CAPTION_KINDS | {"crowded dense": 4, "free dense": 4, "two colours": 3}


def train_diffusion(run):
    """A toy Sana on captions alone: 8x8 latents, 6 layers, 192 wide, flow matching."""
    tokenizer = AutoProcessor.from_pretrained(run.out / "mllm").tokenizer
    language = Qwen2ForCausalLM.from_pretrained(run.out / "llm", dtype=torch.float32)
    language = language.eval().to(run.device)
    vae = AutoencoderDC.from_pretrained(run.out / "diffusion" / "vae").eval().to(run.device)
    skip = len(tokenizer(chat(tokenizer, conversation("")[:1], False))["input_ids"])
    sana = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=6,
        attention_head_dim=32,
        num_layers=6,
        num_cross_attention_heads=3,
        cross_attention_head_dim=64,
        cross_attention_dim=192,
        caption_channels=192,
        sample_size=8,
        interpolation_scale=1.0,
    )
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
    )

    def make(rng):
        kinds = rng.choices(list(DRAWN_KINDS), list(DRAWN_KINDS.values()), k=run.batch_size)
        tasks = [task(kind, rng.randrange(1 << 40), "sana") for kind in kinds]
        prompts = ["" if rng.random() < 0.1 else each.prompt for each in tasks]
        pixels = pictures_to_tensor([each.picture for each in tasks])
        return {"pixels": pixels, **caption_inputs(tokenizer, prompts)}

    def loss_of(batch):
        pixels = batch.pop("pixels")
        states, mask = caption_states(language, skip, **batch)
        return velocity_loss(sana, vae, pixels, states, mask)

    @torch.no_grad()
    def evaluate(number=16):
        right, drawn = {}, []
        for kind in (*SIX_KINDS, "dense", "free dense", "two colours", "held-out"):
            tasks = [task(kind, i, split="test") for i in range(number)]
            inputs = caption_inputs(tokenizer, [""] * number + [each.prompt for each in tasks])
            states, mask = caption_states(language, skip, **to_device(inputs, run.device))
            pixels = draw(sana, vae, scheduler, states, mask)
            arrays = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            pictures = [Image.fromarray(array) for array in arrays]
            cases = zip(pictures, tasks, strict=True)
            right[kind] = sum(score(picture, each.goal) for picture, each in cases) / number
            drawn += pixels[:8].float().cpu()
        save_image(drawn, run.out / "diffusion.png", nrow=8, normalize=True, value_range=(-1, 1))
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


class Part(NamedTuple):
    """One of the frozen parts: how it is made, and from which others."""

    make: Callable
    steps: int
    batch_size: int
    file: str  # below --out; it is there once the part is made
    needs: tuple = ()


PARTS = {
    "vae": Part(train_vae, 5500, 32, "diffusion/vae/config.json"),
    "vision": Part(train_vision, 3000, 64, "vision/config.json"),
    "llm": Part(train_llm, 5000, 32, "llm/config.json"),
    "mllm": Part(train_mllm, 100, 32, "mllm/config.json", ("vision", "llm")),
    "diffusion": Part(
        train_diffusion, 8000, 32, "diffusion/transformer/config.json", ("vae", "llm")
    ),
}


def stop(message, code=2):
    """End the program with one line on stderr."""
    print(message, file=sys.stderr)
    sys.exit(code)


def parse_arguments():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"error: {message}")
    add = parser.add_argument
    add("--out", type=Path, default=Path("weights/new"), help="the parts' folder (weights/new)")
    add("--part", choices=list(PARTS), help="make this part only, again if it is there")
    add("--steps", type=int, help="training steps of --part")
    add("--batch-size", type=int, help="samples or conversations a step of --part")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (all)")
    add("--device", default="cuda" if cuda else "cpu", help="cpu or cuda (cuda if there is one)")
    add("--workers", type=int, default=(os.cpu_count() - 2) * cuda, help="that prepare batches")
    args = parser.parse_args()
    for name, least in (("steps", 1), ("batch_size", 1), ("threads", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            stop(f"error: --{flag} is {value}: it must be at least {least}.")
    if (args.steps or args.batch_size) and not args.part:
        stop("error: --steps and --batch-size are of one part: give --part too.")
    for name in PARTS[args.part].needs if args.part else ():
        if not (args.out / PARTS[name].file).exists():
            stop(f"error: --part {args.part} needs {name} in {args.out}: make --part {name} first.")
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name, part in PARTS.items():
        if args.part == name or (args.part is None and not (args.out / part.file).exists()):
            args.out.mkdir(parents=True, exist_ok=True)
            steps = args.steps or part.steps
            batch_size = args.batch_size or part.batch_size
            part.make(Run(args.out, steps, batch_size, args.device, args.workers))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("stopped: the same command resumes", 130)
    except OSError as error:
        stop(f"error: cannot read or write {error.filename or ''} ({error.strerror or error}).")
