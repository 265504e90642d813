"""Whole training steps and whole images, ours beside the plain way, in one process.

    python -m extras.speed --size base                          on a GPU
    python -m extras.speed --size base --layers 6               on a CPU: fewer layers, real widths
    python -m extras.speed                                      the tiny size

Models have random weights of the real shapes. The plain way passes prompt and queries through the
MLLM at once, with gradient, and encodes each image at each step. A step is forward, backward,
clipping and AdamW; the ways take turns. First of each row is the plain way's time over this way's:
the median of all turns, with the least and the most. Several noise levels count as so many samples.
"""

import argparse
import platform
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, SanaPipeline
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor

from cli import DTYPES, bounded, choose_dtype, device_of, errors_in_one_line, set_up
from extras.architectures import build, mllm_config
from metaquery import PRESETS, TINY, MetaQuery, MetaQueryConfig, to_device
from training.attention import KeepsLatents, choose_attention
from training.distributed import precision

PLAIN, OURS, KEPT = "plain", "ours", "ours, latents kept"
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, without sparsity
TEXT_TOKENS = 64  # the system prompt and a short caption


# ---- The plain way -------------------------------------------------------------------------------
def one_pass(model, inputs):
    """The queries' states (B, N, d) by one pass over prompt and queries, with gradient."""
    n = len(model.queries)
    decoder = model.mllm.get_decoder()

    def add_queries(decoder, args, options):
        embeds = options["inputs_embeds"]
        queries = model.queries.to(embeds.dtype).expand(len(embeds), -1, -1)
        mask = F.pad(options["attention_mask"], (0, n), value=1)  # (B, T + N)
        positions = options.get("position_ids")
        if positions is None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
        else:  # Qwen2.5-VL's, of the prompt
            after = positions.amax(-1, keepdim=True) + 1 + torch.arange(n, device=mask.device)
            positions = torch.cat([positions, after], -1)
        embeds = torch.cat([embeds, queries], 1)
        added = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        return args, options | added

    inputs = to_device(inputs, model.queries.device)
    if "pixel_values" not in inputs:
        inputs["inputs_embeds"] = model.mllm.get_input_embeddings()(inputs.pop("input_ids"))
    hook = decoder.register_forward_pre_hook(add_queries, with_kwargs=True)
    try:
        return model.mllm.base_model(**inputs, use_cache=False).last_hidden_state[:, -n:]
    finally:
        hook.remove()


class Plain(MetaQuery):
    """MetaQuery without its two passes."""

    def encode_inputs(self, inputs):
        decoder = self.mllm.get_decoder()
        before = decoder.config._attn_implementation
        decoder.set_attn_implementation("sdpa")  # not the one for queries alone
        hidden = one_pass(self, inputs)
        decoder.set_attn_implementation(before)
        return self.connector(hidden.to(self.queries.dtype)), None


# ---- What is measured ----------------------------------------------------------------------------
def random_model(size, layers, device, dtype):
    """(MetaQuery of random weights, the share of its layers that it has)."""
    config = MetaQueryConfig.preset(size)
    all_layers = mllm_config(config.mllm).get_text_config().num_hidden_layers
    share = min(1.0, (layers or all_layers) / all_layers)
    torch.manual_seed(0)
    with device:
        model = build(config, AutoProcessor.from_pretrained(TINY / "mllm"), share)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    choose_attention(model)
    return model, share


def sharing(model, kind):
    """A model of another class with the same parts."""
    parts = (model.mllm, model.processor, model.diffusion, model.vae, model.scheduler)
    other = kind(model.config, *parts, model.connector).eval()
    other.queries = model.queries
    return other


def random_inputs(model, samples, with_image):
    """Inputs of B prompts as a processor makes them: tokens of text, behind an image's."""
    config = model.mllm.config
    ids = torch.randint(10, 1000, (samples, TEXT_TOKENS))
    inputs = {}
    if with_image and config.model_type == "llava_onevision":
        pixels, patch = config.vision_config.image_size, config.vision_config.patch_size
        side = pixels // patch
        tokens = side * side + side * (side + 1)  # the image, and a tile with line breaks
        ids = torch.cat([torch.full((samples, tokens), config.image_token_id), ids], 1)
        inputs["pixel_values"] = torch.randn(samples, 2, 3, pixels, pixels)
        inputs["image_sizes"] = torch.full((samples, 2), pixels)
        inputs["batch_num_images"] = torch.ones(samples, dtype=torch.long)
    elif with_image:  # Qwen2.5-VL: 504 x 504 pixels are 36 x 36 patches, 18 x 18 tokens
        image = torch.full((samples, 326), config.image_token_id)
        image[:, 0], image[:, -1] = config.vision_start_token_id, config.vision_end_token_id
        ids = torch.cat([image, ids], 1)
        inputs["pixel_values"] = torch.randn(samples * 36 * 36, 3 * 2 * 14 * 14)
        inputs["image_grid_thw"] = torch.tensor([[1, 36, 36]] * samples)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return to_device(inputs, model.queries.device)


def seconds(function, device):
    """How long a function takes, until the device has done it all."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def needed_flops(model, inputs, targets):
    """Floating-point operations that a step of these samples needs, with latents kept.

    By torch's count of the forward pass: a backward pass takes twice as many through what is
    trained, and as many through what is frozen.
    """

    def counted(function, *args):
        with FlopCounterMode(display=False) as counter:
            result = function(*args)
        return result, counter.get_total_flops()

    x = model.encode_latents(targets)
    prompt, read = counted(model.read_prompt, dict(inputs))
    hidden, queries = counted(model.run_queries, prompt)
    cond, connector = counted(model.connector, hidden.to(model.queries.dtype))
    _, denoising = counted(model.denoise, x, torch.ones(len(x), device=x.device), cond, None)
    trained = 2 + model.config.train_diffusion
    return read + 2 * queries + 3 * connector + trained * denoising


def host_syncs(step):
    """How often the host waits for the GPU in a step."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def largest_costs(step, device):
    """The three operations that take most of a step's time, with their shares, as text."""
    with profile() as profiled:
        step()
    attribute = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    times = {event.key: getattr(event, attribute) for event in profiled.key_averages()}
    total = sum(times.values())
    largest = sorted(times, key=times.get)[-3:][::-1]
    return ", ".join(f"{name} {times[name] / total:.0%}" for name in largest)


def print_steps(model, share, with_image, args, device, dtype):
    """Print a row for each way to take a training step on prompts of text, or of an image."""
    inputs = random_inputs(model, args.batch_size, with_image)
    targets = torch.rand(args.batch_size, 3, model.resolution, model.resolution, device=device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-6, fused=True)
    kept = sharing(model, KeepsLatents)
    kept.keep_latents_in(tempfile.mkdtemp())
    k = args.noises_per_sample
    ways = {PLAIN: (sharing(model, Plain), 1), OURS: (model, 1), KEPT: (kept, 1)}
    ways[f"{KEPT}, {k} noise levels"] = (kept, k)

    def step(way):
        way_model, repeats = ways[way]
        u = torch.rand(args.batch_size * repeats, device=device)
        with precision(model, device, dtype):
            loss = way_model(dict(inputs), targets, u=u)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = {way: [] for way in ways}
    for turn in range(args.repeats + 1):  # the first one warms up
        for way, (_, repeats) in ways.items():
            taken = seconds(partial(step, way), device) / repeats
            times[way] += [taken] * (turn > 0)
    encoding = median(
        seconds(partial(model.encode_latents, targets), device) for _ in range(args.repeats)
    )

    tokens = inputs["input_ids"].shape[1]
    what = "one image" if with_image else "text"
    print(f"\n{what}, {tokens} prompt tokens, batch {args.batch_size}; VAE's part {encoding:.3f} s")
    full = {}
    for way in ways:
        encoded = encoding * (way in (PLAIN, OURS))  # the VAE has all its layers
        full[way] = encoded + (median(times[way]) - encoded) / share
        ratios = sorted(p / t for p, t in zip(times[PLAIN], times[way], strict=True))
        row = f"{median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})  {way:<34}"
        row += f"{median(times[way]):8.3f} s"
        if share < 1:
            row += f"; with all layers about {full[PLAIN] / full[way]:.2f}, {full[way]:.1f} s"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            row += f", {host_syncs(partial(step, way))} syncs"
            row += f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
            peaks = [x for name, x in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()]
            if peaks and way != f"{KEPT}, {k} noise levels":
                needed = needed_flops(model, inputs, targets)
                row += f", {needed / median(times[way]) / peaks[0]:.1%} of peak"
        print(row, flush=True)
    print(f"largest costs of ours, latents kept: {largest_costs(partial(step, KEPT), device)}")


def print_image(model, args, device, dtype):
    """Print the time of an image beside diffusers' pipeline, given the same embeddings."""
    model = model.to(dtype)
    prompts = ["a red star left of a blue circle", ""]
    solver = DPMSolverMultistepScheduler.from_config(model.scheduler.config)
    pipeline = SanaPipeline(None, None, model.vae, model.diffusion, solver)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        cond, _ = model.encode_prompts(prompts)
    mask = torch.ones(1, cond.shape[1], dtype=torch.long, device=device)
    runs = {
        "ours": lambda: model.generate(prompts[:1], num_inference_steps=args.steps),
        "encoding": torch.no_grad()(lambda: model.encode_prompts(prompts)),
        "SanaPipeline": lambda: pipeline(
            negative_prompt=None, prompt_embeds=cond[:1], prompt_attention_mask=mask,
            negative_prompt_embeds=cond[1:], negative_prompt_attention_mask=mask,
            num_inference_steps=args.steps, guidance_scale=3.0, height=model.resolution,
            width=model.resolution, use_resolution_binning=False,
        ),
    }  # fmt: skip
    times = {name: [] for name in runs}
    for turn in range(args.repeats + 1):
        for name, run in runs.items():
            times[name] += [seconds(run, device)] * (turn > 0)
    ours, encoding, theirs = (median(times[name]) for name in runs)
    print(f"\nan image of {model.resolution} px in {args.steps} steps: {ours:.3f} s, of which")
    print(f"encoding the prompts {encoding:.3f} s; diffusers' SanaPipeline, given the encoded")
    print(f"prompts, {theirs:.3f} s; the rest of ours over it: {(ours - encoding) / theirs:.2f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    set_up(parser)
    number = bounded(int, 1, 1000)
    add = parser.add_argument
    add("--size", choices=list(PRESETS), default="tiny", help="(tiny)")
    add("--layers", type=number, help="of the MLLM; the other parts are cut alike (all)")
    add("--batch-size", type=number, default=2, help="samples a step (2)")
    add("--noises-per-sample", type=number, default=4, help="of the last row (4)")
    add("--repeats", type=number, default=5, help="turns (5)")
    add("--steps", type=number, default=30, help="denoising steps of the image (30)")
    add("--device", default="", help="(the best there is)")
    add("--dtype", choices=DTYPES, default="", help="of the arithmetic (what is fast)")
    args = parser.parse_args()

    with errors_in_one_line():
        device = device_of(args.device)
        dtype, reason = choose_dtype(device, args.dtype)
        model, share = random_model(args.size, args.layers, device, dtype)
        name = platform.processor() or platform.machine()
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        elif Path("/proc/cpuinfo").exists():
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
        print(
            f"{args.size}, {share:.0%} of the layers, on {name}, {torch.get_num_threads()} threads"
        )
        versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
        print(f"{str(dtype).removeprefix('torch.')} ({reason}), {versions}")
        for with_image in (False, True):
            print_steps(model, share, with_image, args, device, dtype)
        print_image(model, args, device, dtype)


if __name__ == "__main__":
    main()
