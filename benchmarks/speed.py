"""Measure speed and memory, ours beside the plain way, on the same weights in one run.

    python -m benchmarks.speed                 every row of the table
    python -m benchmarks.speed --rows a,g      some of them
    python -m benchmarks.speed --rows base   one loss of the base size at full width
    python -m benchmarks.speed --rows a,b,c,g --device cuda --batch 16        the same on a GPU

The plain way is one pass over prompt and queries with gradient checkpointing, the language head
left out. Each figure is the median of --repeats runs with the
least and the most; memory is what tensors take beside the weights; nothing here is asserted.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
CACHE = Path(tempfile.gettempdir()) / "metaquery-bench"


def half_billion(device="cpu"):
    """A MetaQuery whose MLLM has the shape of Qwen2.5-0.5B, with random weights, and a toy Sana."""
    import torch
    import transformers

    from metaquery import TINY, MetaQuery, MetaQueryConfig
    from training.sizes import MLLMS

    folder = CACHE / "half-billion"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        transformers.AutoTokenizer.from_pretrained(TINY / "mllm").save_pretrained(folder)
        config = MLLMS["Qwen/Qwen2.5-0.5B-Instruct"]()
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    config = MetaQueryConfig(str(folder), str(TINY / "diffusion"), connector_layers=1)
    model = MetaQuery(config, torch.bfloat16)
    model.connector = torch.nn.Identity()
    model.connector.norm, model.connector.layers = torch.nn.RMSNorm(1), torch.nn.ModuleList()
    return model.to(device)


WAYS = ("plain", "ours", "ours with checkpointed layers")


def conditions(model, tokens, n, way, batch):
    """A function that makes the states of n queries after `tokens` random ones, and its loss."""
    import torch

    from training.kernels import checkpoint_layers, choose_attention

    device = model.queries.device
    model.queries = torch.nn.Parameter(torch.randn(n, 896, device=device) * 0.02)
    ids = torch.randint(1000, 100000, (batch, tokens), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    backbone = model.mllm.base_model

    def one_pass():
        embeds = model.mllm.get_input_embeddings()(ids)
        queries = model.queries.to(embeds.dtype).expand(batch, -1, -1)
        return backbone(inputs_embeds=torch.cat([embeds, queries], 1)).last_hidden_state[:, -n:]

    if way != "plain":
        choose_attention(model)
        if way != "ours":
            checkpoint_layers(model)
        return lambda: model.encode_prompts(inputs)[0].float().square().mean()
    model.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    model.mllm.train()
    return lambda: one_pass().float().square().mean()


def now(device):
    """Seconds, once the device has done all that it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.time()


def timed(loss, device):
    """Seconds of a forward pass and of a backward pass."""
    began = now(device)
    made = loss()
    middle = now(device)
    made.backward()
    return middle - began, now(device) - middle


def peak(loss, device):
    """The most memory that the tensors of a step take at once beside those there before, in GB."""
    import torch
    from torch.profiler import profile

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(loss, device)
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    with profile(profile_memory=True) as made:
        timed(loss, device)
    events = [e for e in made.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes)) / 1e9


def measure(tokens, n, way, repeats, device, batch):
    """Times of a step and its peak memory above the weights; run in a process of its own."""
    loss = conditions(half_billion(device), tokens, n, way, batch)
    memory = peak(loss, device)
    return {"times": [timed(loss, device) for _ in range(repeats)], "memory": memory}


def backwards(lengths, n, repeats, device, batch):
    """Times of our backward pass with prompts of each length in turn; in a process of its own."""
    model = half_billion(device)
    losses = [conditions(model, tokens, n, "ours", batch) for tokens in lengths]
    return [[timed(loss, device)[1] for loss in losses] for _ in range(repeats + 1)][1:]


def apart(name, *values):
    """What a function of this file returns in a fresh process."""
    module = "benchmarks.speed"
    code = f"import json, {module} as m; print(json.dumps(m.{name}(*{values!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def ratio(name, plain, ours, unit="s"):
    """Print one row: both medians and the ratio of each pair, with its spread."""
    pairs = sorted(p / o for p, o in zip(plain, ours, strict=True))
    print(
        f"{name:<78} plain {statistics.median(plain):8.3f} {unit:<3} ours "
        f"{statistics.median(ours):8.3f} {unit:<3} ratio {statistics.median(pairs):5.2f} "
        f"({pairs[0]:.2f} to {pairs[-1]:.2f})",
        flush=True,
    )


def steps(row, tokens, n, what, *options):
    """One row of (a) or (b), and its peaks of memory as (c)."""
    made = {way: apart("measure", tokens, n, way, *options) for way in WAYS}
    times = {way: [sum(pair) for pair in made[way]["times"]] for way in WAYS}
    for way in WAYS[1:]:
        ratio(f"({row}) step, {what}, N={n}, {way}", times["plain"], times[way])
    plain, *ours = (made[way]["memory"] for way in WAYS)
    for way, memory in zip(WAYS[1:], ours, strict=True):
        print(
            f"(c) peak memory above the weights, {what}, {way}: {memory:.3f} GB, "
            f"{memory / plain:.2f} of the plain way's {plain:.3f} GB",
            flush=True,
        )


def backward_growth(*options):
    """(g) How our backward pass grows with the prompt."""
    lengths = (64, 256, 1024, 2048, 4096)
    for n in (64, 256):
        rounds = apart("backwards", lengths, n, *options)
        for tokens, times in zip(lengths, zip(*rounds, strict=True), strict=True):
            growth = sorted(time / made[0] for time, made in zip(times, rounds, strict=True))
            print(
                f"(g) our backward pass, {tokens:5} prompt tokens, N={n:3}: "
                f"{statistics.median(times):6.3f} s, {statistics.median(growth):.2f} times that "
                f"of 64 ({growth[0]:.2f} to {growth[-1]:.2f})",
                flush=True,
            )


def cold():
    """(h) Seconds of the command line from cold, help and a picture."""
    for flags in (["--help"], ["a red star left of a blue circle", "--out", str(CACHE / "x.png")]):
        times = []
        for _ in range(3):
            began = time.time()
            subprocess.run(
                [sys.executable, "sample.py", *flags], cwd=ROOT, check=True, capture_output=True
            )
            times.append(time.time() - began)
        print(
            f"(h) python sample.py {flags[0]!r}: {statistics.median(times):.1f} s "
            f"({min(times):.1f} to {max(times):.1f})",
            flush=True,
        )


def sampling(repeats):
    """(e) Eight pictures of one prompt and of eight, ours beside one condition per picture."""
    import torch

    from metaquery import TINY, MetaQuery

    model, prompt = MetaQuery.from_pretrained(TINY), "a red star"
    several = [
        f"a {color} star" for color in "red green blue yellow purple orange pink brown".split()
    ]
    for name, prompts, options in (
        ("one prompt", [prompt], {"num_images_per_prompt": 8}),
        ("eight prompts", several, {}),
    ):
        times = {"plain": [], "ours": []}
        for _ in range(repeats + 1):
            for way in times:
                began = time.time()
                with torch.no_grad():
                    if way == "ours":
                        model.generate(prompts, **options)
                    else:
                        for one in several if len(prompts) > 1 else [prompt] * 8:
                            model.generate([one])
                times[way].append(time.time() - began)
        ratio(f"(e) sampling 8 pictures of {name}", times["plain"][1:], times["ours"][1:])


def train_rate(*flags, number=1):
    """Samples a second of a short tiny training run, its first steps left out."""
    out = Path(tempfile.mkdtemp())
    start = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={number}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    subprocess.run(
        [sys.executable, *start, "train.py", "--steps", "16", "--out", str(out), *flags],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    passed = [32 * entry["step"] / entry["samples_per_s"] for entry in log]
    return 32 * (len(log) - 4) / (passed[-1] - passed[3])


def processes(repeats):
    """(f) Samples a second of training in one process and in two, a thread each."""
    one, two = ([1 / train_rate(number=n) for _ in range(repeats)] for n in (1, 2))
    ratio("(f) training in 2 processes against 1 (time a sample)", one, two)


def base(repeats):
    """One text-to-image loss and query gradient of the base size at full width, random weights."""
    import torch
    import transformers
    from diffusers import DPMSolverMultistepScheduler

    from metaquery import SANA, TINY, MetaQuery, MetaQueryConfig
    from training.sizes import DIFFUSIONS, LLAVA, MLLMS

    folder = CACHE / "base"
    if not (folder / "sana" / "scheduler").exists():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        transformers.AutoProcessor.from_pretrained(TINY / "mllm").save_pretrained(folder / "mllm")
        mllm = transformers.AutoModelForImageTextToText.from_config(MLLMS[LLAVA]())
        mllm.save_pretrained(folder / "mllm")
        del mllm
        scheduler = DPMSolverMultistepScheduler.from_pretrained(TINY / "diffusion" / "scheduler")
        scheduler.save_pretrained(folder / "sana" / "scheduler")
        transformer, vae = DIFFUSIONS[SANA]()
        transformer.save_pretrained(folder / "sana" / "transformer")
        vae.save_pretrained(folder / "sana" / "vae")
        del transformer, vae
        torch.set_default_dtype(torch.float32)
    parts = {"mllm": str(folder / "mllm"), "diffusion": str(folder / "sana")}
    began = time.time()
    model = MetaQuery(MetaQueryConfig.preset("base", **parts), torch.bfloat16)
    print(f"base at full width, random weights: loaded in {time.time() - began:.0f} s", flush=True)
    began = time.time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(["a red star left of a blue circle"], torch.zeros(1, 3, 512, 512))
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gradient = model.queries.grad.norm().item()
    print(
        f"loss {loss.item():.4f}, query gradient norm {gradient:.3g}, "
        f"{time.time() - began:.0f} s, peak memory {peak:.1f} GiB"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="a,b,c,e,f,g,h")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of rows a, b, c and g")
    parser.add_argument("--batch", type=int, default=1, help="prompts a step, in the same rows")
    args = parser.parse_args()
    rows, repeats = args.rows.split(","), args.repeats
    options = repeats, args.device, args.batch
    CACHE.mkdir(exist_ok=True)
    prompts = {
        "a": [("64 prompt tokens", 64)],
        "b": [
            ("one picture, 756 prompt tokens", 756),
            ("1,485 prompt tokens", 1485),
            ("four pictures, 2,943 prompt tokens", 2943),
        ],
    }
    for row, cases in prompts.items():
        for what, tokens in cases if row in rows else ():
            steps(row, tokens, 256, what, *options)
    for row, run in {
        "e": sampling,
        "f": processes,
        "base": base,
    }.items():
        if row in rows:
            run(repeats)
    if "g" in rows:
        backward_growth(*options)
    if "h" in rows:
        cold()


if __name__ == "__main__":
    main()
