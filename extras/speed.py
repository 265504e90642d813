"""Whole training steps and whole images, ours beside the plain way, in one process.

    python -m extras.speed --size base                          on a GPU
    python -m extras.speed --size base --layers 6               on a CPU: fewer layers, real widths
    python -m extras.speed                                      the tiny size

Weights are random, of the real shapes. The plain way passes prompt and queries through the MLLM at
once, with gradient, and encodes each image at each step. A step is forward, backward, clipping and
AdamW; the ways take turns. A row begins with the plain way's time over its own: median, least and
most of all turns. Several noise levels count as so many samples.
"""

import platform
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor

from cli import DTYPES, bounded, choose_dtype, device_of, errors_in_one_line, open_parser
from extras.architectures import build, mllm_config
from metaquery import PRESETS, TINY, MetaQuery, MetaQueryConfig, to_device
from notebooks.plain import one_pass
from training.attention import KeepsLatents, choose_attention
from training.distributed import precision

PLAIN, OURS, KEPT = "plain", "ours", "ours, latents kept"
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, without sparsity
TEXT_TOKENS = 64  # the system prompt and a short caption


class Plain(MetaQuery):
    """One pass over prompt and queries, with gradient through both."""

    def encode_inputs(self, inputs):
        decoder = self.mllm.get_decoder()
        before = decoder.config._attn_implementation
        decoder.set_attn_implementation("sdpa")  # not the one for queries alone
        hidden = one_pass(self, inputs)
        decoder.set_attn_implementation(before)
        return self.connector(hidden.to(self.queries.dtype)), None


def random_model(config, layers, device, dtype):
    """(MetaQuery of random weights, the share of its layers that it has)."""
    all_layers = mllm_config(config.mllm).get_text_config().num_hidden_layers
    share = min(1.0, (layers or all_layers) / all_layers)
    torch.manual_seed(0)
    with device:
        model = build(config, dtype, AutoProcessor.from_pretrained(TINY / "mllm"), share)
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
    ids = torch.randint(10, 300, (samples, TEXT_TOKENS))  # none is special
    inputs = {}

    if with_image and config.model_type == "llava_onevision":
        pixels, patch = config.vision_config.image_size, config.vision_config.patch_size
        side = pixels // patch
        tokens = side * side + side * (side + 1)  # the image, and a tile with line breaks
        ids = torch.cat([torch.full((samples, tokens), config.image_token_id), ids], 1)
        inputs["pixel_values"] = torch.randn(samples, 2, 3, pixels, pixels)
        inputs["image_sizes"] = torch.full((samples, 2), pixels)
        inputs["batch_num_images"] = torch.ones(samples, dtype=torch.long)
    elif with_image and config.model_type == "internvl":
        vision = config.vision_config
        side = int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)
        ids = torch.cat([torch.full((samples, side * side), config.image_token_id), ids], 1)
        inputs["pixel_values"] = torch.randn(samples, 3, *vision.image_size)
    elif with_image:  # Qwen2.5-VL: 504 x 504 pixels are 36 x 36 patches, 18 x 18 tokens
        image = torch.full((samples, 326), config.image_token_id)
        image[:, 0], image[:, -1] = config.vision_start_token_id, config.vision_end_token_id
        ids = torch.cat([image, ids], 1)
        inputs["pixel_values"] = torch.randn(samples * 36 * 36, 3 * 2 * 14 * 14)
        inputs["image_grid_thw"] = torch.tensor([[1, 36, 36]] * samples)
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()

    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return to_device(inputs, model.queries.device)


def seconds_of(runs, repeats, device):
    """{name: seconds of each turn} of functions that take turns; the first turn warms up."""
    times = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":  # it may not have done all yet
                torch.cuda.synchronize()
            if turn > 0:
                times[name].append(time.perf_counter() - began)
    return times


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

    model.queries.requires_grad_(False)  # torch's counter refuses their view without gradient
    x = model.encode_latents(targets)
    prompt, read = counted(model.read_prompt, dict(inputs))
    hidden, queries = counted(model.run_queries, prompt)
    cond, connector = counted(model.connector, hidden.to(model.queries.dtype))
    _, denoising = counted(model.denoise, x, torch.ones(len(x), device=x.device), cond, None)
    model.queries.requires_grad_(model.config.condition_on == "queries")
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
    kind = {"cpu": "CPU", "cuda": "CUDA"}[device.type]
    with profile(activities=[getattr(ProfilerActivity, kind)]) as profiled:
        step()
    own = f"self_{'device' if kind == 'CUDA' else 'cpu'}_time_total"
    times = {event.key: getattr(event, own) for event in profiled.key_averages()}
    largest = sorted(times, key=times.get, reverse=True)[:3]
    return ", ".join(f"{name} {times[name] / sum(times.values()):.0%}" for name in largest)


def print_steps(model, share, with_image, args, device, dtype):
    """Print a row for each way to take a training step on prompts of text, or of an image."""
    inputs = random_inputs(model, args.batch_size, with_image)
    targets = torch.rand(args.batch_size, 3, model.resolution, model.resolution, device=device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-6, fused=True)
    kept = sharing(model, KeepsLatents)
    kept.keep_latents_in(tempfile.mkdtemp())

    def step(way_model, repeats=1):
        u = torch.rand(args.batch_size * repeats, device=device)
        with precision(model, device, dtype):
            loss = way_model(dict(inputs), targets, u=u)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    k = args.noises_per_sample
    several = f"{KEPT}, {k} noise levels"
    ways = {PLAIN: partial(step, sharing(model, Plain)), OURS: partial(step, model)}
    ways |= {KEPT: partial(step, kept), several: partial(step, kept, k)}
    encode = {"VAE": partial(model.encode_latents, targets)}
    times = seconds_of(ways | encode, args.repeats, device)
    times[several] = [t / k for t in times[several]]
    encoding = median(times["VAE"])

    what = f"{'one image' if with_image else 'text'}, {inputs['input_ids'].shape[1]} prompt tokens"
    print(f"\n{what}, batch {args.batch_size}; the VAE encodes in {encoding:.3f} s")
    full = {}
    for way, run in ways.items():
        ratios = sorted(p / t for p, t in zip(times[PLAIN], times[way], strict=True))
        row = f"{median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})  {way:<34}"
        row += f"{median(times[way]):8.3f} s"
        if share < 1:  # the VAE has all its layers
            encoded = encoding * (way in (PLAIN, OURS))
            full[way] = encoded + (median(times[way]) - encoded) / share
            if min(full[PLAIN], full[way]) > 0:  # times too noisy for it are not scaled
                ratio = full[PLAIN] / full[way]
                row += f"; with all layers about {ratio:.2f}, {full[way]:.1f} s"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            row += f", {host_syncs(run)} syncs"
            row += f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
            for name, flops in PEAK_FLOPS.items():
                if name in torch.cuda.get_device_name(device) and way != several:
                    used = needed_flops(model, inputs, targets) / median(times[way])
                    row += f", {used / flops:.1%} of {name}'s peak"
        print(row, flush=True)
    print(f"largest costs of ours, latents kept: {largest_costs(ways[KEPT], device)}")


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
    times = seconds_of(runs, args.repeats, device)
    ours, encoding, theirs = (median(times[name]) for name in runs)
    print(f"\nan image of {model.resolution} px, {args.steps} steps: ours {ours:.3f} s,", end=" ")
    print(f"encoding prompts {encoding:.3f} s, SanaPipeline of encoded prompts {theirs:.3f} s")
    print(f"{(ours - encoding) / theirs:5.2f}  ours without encoding, over SanaPipeline")

    if device.type == "cuda":
        for way in ("all parts on the GPU", "--offload"):
            if way == "--offload":
                model.offload_to(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            runs["ours"]()
            seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() / 1e9
            print(f"{way}: {seconds:.2f} s, {peak:.1f} GB")


def processor_name():
    """The name of the CPU, for example "AMD EPYC"."""
    if not Path("/proc/cpuinfo").exists():
        return platform.processor()
    return Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: ")


def main():
    parser = open_parser(__doc__)
    number = bounded(int, 1, 1000)
    add = parser.add_argument
    add("--size", choices=list(PRESETS), default="tiny", help="(tiny)")
    add("--mllm", help="another, of extras/architectures.json or a folder")
    add("--diffusion", help="another, likewise")
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
        parts = {"mllm": args.mllm, "diffusion": args.diffusion}
        changes = {part: name for part, name in parts.items() if name}
        config = MetaQueryConfig.preset(args.size, **changes)
        model, share = random_model(config, args.layers, device, dtype)
        name = f"{processor_name()}, {torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        print(f"{args.size}, {share:.0%} of the layers, on {name}")
        print(f"{dtype} ({reason}), version {torch.__version__} of torch")
        for with_image in (False, True):
            print_steps(model, share, with_image, args, device, dtype)
        print_image(model, args, device, dtype)


if __name__ == "__main__":
    main()
