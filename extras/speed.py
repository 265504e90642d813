"""Measure speed and memory, ours beside the plain way, on the same weights in one run.

    python -m extras.speed                 every row of speed.md
    python -m extras.speed --rows a,g      some of them
    python -m extras.speed --rows base     one loss of the base size at full width
    python -m extras.speed --rows vae      the share of its training step that the VAE takes
    python -m extras.speed --rows a,b,g --device cuda --batch 16        the same on a GPU
    python -m extras.speed --rows training --device cuda      training and drawing at full width

The plain way is one pass over prompt and queries with gradient checkpointing, without the language
head. Each figure is the median of --repeats runs, with the least and the most; memory is what the
tensors of a step take beside the weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import transformers
from torch.profiler import profile

from extras.full_width import BATCHES, CACHE, now, one_loss, training, vae_arithmetic, vae_share
from extras.sizes import MLLMS
from metaquery import TINY, MetaQuery, MetaQueryConfig
from training.attention import checkpoint_layers, choose_attention

WAYS = ("plain", "ours", "ours with checkpointed layers")
CASES = {  # (b): what the prompt is, and its tokens
    "one picture, 756 prompt tokens": 756,
    "1,485 prompt tokens": 1485,
    "four pictures, 2,943 prompt tokens": 2943,
}


def half_billion(device):
    """A MetaQuery whose MLLM has the shape of Qwen2.5-0.5B, with random weights, and a toy Sana."""
    folder = CACHE / "half-billion"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        transformers.AutoTokenizer.from_pretrained(TINY / "mllm").save_pretrained(folder)
        config = MLLMS["Qwen/Qwen2.5-0.5B-Instruct"]()
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    config = MetaQueryConfig(str(folder), str(TINY / "diffusion"), connector_layers=1)
    model = MetaQuery(config, torch.bfloat16)
    model.connector = torch.nn.Identity()  # only the MLLM is measured
    model.connector.norm, model.connector.layers = torch.nn.RMSNorm(1), torch.nn.ModuleList()
    return model.to(device)


def loss_of(model, tokens, n, way, batch):
    """A function that runs `tokens` random tokens and n queries and returns a loss."""
    device = model.queries.device
    model.queries = torch.nn.Parameter(torch.randn(n, 896, device=device) * 0.02)
    ids = torch.randint(1000, 100000, (batch, tokens), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    backbone = model.mllm.base_model

    def one_pass():
        embeds = model.mllm.get_input_embeddings()(ids)
        queries = model.queries.to(embeds.dtype).expand(batch, -1, -1)
        return backbone(inputs_embeds=torch.cat([embeds, queries], 1)).last_hidden_state[:, -n:]

    if way == "plain":
        model.mllm.gradient_checkpointing_enable({"use_reentrant": False})
        model.mllm.train()
        return lambda: one_pass().float().square().mean()
    choose_attention(model)
    if way != "ours":
        checkpoint_layers(model)
    return lambda: model.encode_prompts(inputs)[0].float().square().mean()


def timed(loss, device):
    """Seconds of a forward pass and of a backward pass."""
    began = now(device)
    value = loss()
    middle = now(device)
    value.backward()
    return middle - began, now(device) - middle


def peak(loss, device):
    """The most memory that the tensors of a step take beside those there before, in GB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(loss, device)
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    with profile(profile_memory=True) as profiled:
        timed(loss, device)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 1e9


def in_fresh_process(function, *values):
    """What a function returns in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *values).result()


def measure_way(way, tokens, repeats, device, batch):
    """(seconds of each step, peak memory) of one way, for 256 queries."""
    loss = loss_of(half_billion(device), tokens, 256, way, batch)
    memory = peak(loss, device)  # also warms up
    return [sum(timed(loss, device)) for _ in range(repeats)], memory


def measure_backward(lengths, n, repeats, device, batch):
    """Rounds of the seconds of our backward pass, for prompts of each length in turn."""
    model = half_billion(device)
    losses = [loss_of(model, tokens, n, "ours", batch) for tokens in lengths]
    return [[timed(loss, device)[1] for loss in losses] for _ in range(repeats + 1)][1:]


def show(name, plain, ours):
    """Print one row: both medians, and the ratio of each pair of runs with its spread."""
    ratios = sorted(p / o for p, o in zip(plain, ours, strict=True))
    spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    times = f"plain {median(plain):7.3f} s  ours {median(ours):7.3f} s"
    print(f"{name:<76} {times}  ratio {median(ratios):.2f} {spread}", flush=True)


def step(row, what, tokens, *options):
    """(a), (b) Seconds of a step, and (c) its peak memory."""
    times, memory = {}, {}
    for way in WAYS:
        times[way], memory[way] = in_fresh_process(measure_way, way, tokens, *options)
    for way in WAYS[1:]:
        show(f"({row}) step, {what}, N=256, {way}", times["plain"], times[way])
        share = f"{memory[way] / memory['plain']:.2f} of the plain way's {memory['plain']:.3f} GB"
        print(f"(c) memory beside the weights, {what}, {way}: {memory[way]:.3f} GB, {share}")


def sampling(repeats):
    """(e) Eight pictures of one prompt and of eight, ours beside one condition per picture."""
    model = MetaQuery.from_pretrained(TINY)
    stars = [f"a {c} star" for c in "red green blue yellow purple orange pink brown".split()]
    for name, prompts, number in (("one prompt", stars[:1], 8), ("eight prompts", stars, 1)):
        plain, ours = [], []
        for _ in range(repeats + 1):
            began = time.time()
            for prompt in prompts * number:
                model.generate([prompt])
            plain.append(time.time() - began)
            began = time.time()
            model.generate(prompts, num_images_per_prompt=number)
            ours.append(time.time() - began)
        show(f"(e) drawing 8 pictures of {name}", plain[1:], ours[1:])


def training_seconds(processes):
    """Seconds a sample of a short tiny training run, its first steps left out."""
    out = Path(tempfile.mkdtemp())
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node={processes} train.py"
    command = [sys.executable, *torchrun.split(), "--steps", "16", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    passed = [32 * entry["step"] / entry["samples_per_s"] for entry in log]
    return (passed[-1] - passed[3]) / 32 / (len(log) - 4)


def backward_growth(*options):
    """(g) How our backward pass grows with the prompt."""
    lengths = (64, 256, 1024, 2048, 4096)
    for n in (64, 256):
        rounds = in_fresh_process(measure_backward, lengths, n, *options)
        for tokens, times in zip(lengths, zip(*rounds, strict=True), strict=True):
            growth = sorted(time / first[0] for time, first in zip(times, rounds, strict=True))
            name = f"(g) our backward pass, {tokens:5} prompt tokens, N={n:3}"
            spread = f"({growth[0]:.2f} to {growth[-1]:.2f})"
            print(f"{name}: {median(times):.3f} s, {median(growth):.2f} of 64 tokens' {spread}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="a,b,e,f,g", help="c comes with a and b (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each row (5)")
    parser.add_argument("--device", default="cpu", help="of rows a, b, g and training (cpu)")
    parser.add_argument(
        "--size", default="base", choices=BATCHES, help="of rows base and training (base)"
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="prompts a step of rows a, b, g and vae (1)"
    )
    args = parser.parse_args()
    rows, options = args.rows.split(","), (args.repeats, args.device, args.batch)
    CACHE.mkdir(exist_ok=True)
    if "a" in rows:
        step("a", "64 prompt tokens", 64, *options)
    for what, tokens in CASES.items() if "b" in rows else ():
        step("b", what, tokens, *options)
    if "e" in rows:
        sampling(args.repeats)
    if "f" in rows:
        one, two = ([training_seconds(n) for _ in range(args.repeats)] for n in (1, 2))
        show("(f) a sample of training, 2 processes of a thread against 1", one, two)
    if "g" in rows:
        backward_growth(*options)
    if "base" in rows:
        one_loss(args.size)
    if "vae" in rows:
        vae_arithmetic()
        vae_share(args.batch, args.repeats)
    if "training" in rows:
        training(args.size, args.repeats, args.device)


if __name__ == "__main__":
    main()
