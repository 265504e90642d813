"""Frozen parts that extras.tables needs beside the shipped ones, and how it runs programs."""

import hashlib
import subprocess
import sys
from functools import cache

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from metaquery import HERE, TINY, InputError


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


PARTS = {"random-mllm": make_random_mllm, "language": make_language_models}
