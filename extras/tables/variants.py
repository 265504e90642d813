"""One variant of a table: the frozen parts it needs, how it is trained, what is measured of it."""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from cli import choose_dtype, device_of
from extras.flags.flag_parts import make_flags
from extras.tables.metrics import measure, training_figures
from metaquery import HERE, TINY, InputError, MetaQuery, MetaQueryConfig

IN_WORK = ("mllm", "diffusion", "data")  # fields that name folders in --work


class Variant(NamedTuple):
    """Fields of MetaQueryConfig that differ from the tiny preset's, and the stages of training."""

    config: dict  # "mllm" and "diffusion" are folders in --work that PARTS make
    stages: tuple = ("pretrain",)
    run: dict = {}  # fields of TrainConfig that differ; "data" is a folder in --work


def run(command, log):
    """Run a program of this project, its output in a file. Raises InputError with its last line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=HERE, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise InputError(f"failed: {' '.join(last)} (see {log})")


@cache
def frozen_digest():
    """Eight digits that tell the shipped frozen parts from any others."""
    files = sorted([*TINY.glob("mllm/*.safetensors"), *TINY.glob("diffusion/*/*.safetensors")])
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:8]


def make_random_mllm(folder):
    """The shipped MLLM with random weights."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(TINY / "mllm"))
    AutoProcessor.from_pretrained(TINY / "mllm").save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)


def make_language_models(folder):
    """A toy language model, llm/, and the MLLM that visual tuning makes of it, mllm/.

    The vision tower is the shipped MLLM's. It takes about two hours on one core.
    """
    shipped = AutoModelForImageTextToText.from_pretrained(TINY / "mllm", dtype=torch.float32)
    shipped.model.vision_tower.save_pretrained(folder / "vision")
    for part, steps in (("llm", 2000), ("mllm", 600)):
        if not (folder / part / "model.safetensors").exists():
            command = ["-m", "extras.toy_parts", "--out", folder, "--part", part, "--steps", steps]
            run(command, folder / f"{part}.log")
    AutoProcessor.from_pretrained(folder / "mllm").tokenizer.save_pretrained(folder / "llm")


# How to make what a variant names as "mllm" or "diffusion", in a folder.
PARTS = {"random-mllm": make_random_mllm, "language": make_language_models, "flags": make_flags}


def name_of(variant, seed):
    """A training's name: its stages, the fields that differ from the preset's, and its seed."""
    preset = asdict(MetaQueryConfig.preset("tiny"))
    fields = variant.config | variant.run
    changes = sorted(f"{name}={x}" for name, x in fields.items() if x != preset.get(name))
    return Path(",".join(["+".join(variant.stages), *changes]).replace("/", "-")) / f"{seed}"


def folder_of(variant, seed, args):
    """Where a variant's training for a seed is kept; variants that are the same share it."""
    settings = f"{frozen_digest()}-{args.steps}x{args.batch_size}-lr{args.lr}"
    return args.work / settings / name_of(variant, seed)


def read_scores(variant, seed, args):
    """What was measured of a training: {metric: {name: figure}}, also under "training"."""
    path = folder_of(variant, seed, args) / f"scores-{args.limit}.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text())


def train(variant, seed, args):
    """Train a variant's last stage, from the stage before if there is one, unless that is done."""
    out = folder_of(variant, seed, args)
    if (out / f"step-{args.steps:08d}").exists():
        return
    flags = {"size": "tiny", "stage": variant.stages[-1], "seed": seed, "out": out, "keep": 1}
    flags |= {"steps": args.steps, "batch_size": args.batch_size, "warmup": args.steps // 10}
    flags |= {"lr": args.lr, "save_every": 100, "sample_every": args.steps}
    # One, uniform, noise level a sample, unless the variant has others.
    flags |= {"sigma_shift": 1.0, "noises_per_sample": 1}
    flags |= variant.config | variant.run

    flags |= {name: args.work / flags[name] for name in IN_WORK if name in flags}
    if len(variant.stages) > 1:
        before = variant._replace(stages=variant.stages[:-1])
        flags["checkpoint"] = folder_of(before, seed, args)
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in flags.items())
    run(["train.py", *chain.from_iterable(pairs)], out.with_suffix(".log"))


def machine(device):
    """The device that trains and generates here, and the versions of what it runs."""
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {name: version(name) for name in ("torch", "transformers", "diffusers")}
    return {"device": name} | versions


def score(variant, metrics, seed, args):
    """Measure what is not measured yet of a trained model: {metric: {name: figure}}."""
    folder = folder_of(variant, seed, args)
    scores = read_scores(variant, seed, args)
    missing = [name for name in metrics if name not in scores]
    if missing:
        device = device_of()
        dtype, _ = choose_dtype(device)
        model = MetaQuery.from_pretrained(folder, dtype).to(device, dtype).eval()
        scores["training"] = training_figures(folder, model)
        scores["made on"] = machine(device)
        for name in missing:
            scores[name] = measure(model, name, args.limit, seed, args.work)
            path = folder / f"scores-{args.limit}.json"
            path.write_text(json.dumps(scores, indent=2) + "\n")
    return {name: scores[name] for name in (*metrics, "training")}
