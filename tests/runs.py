"""How tests train: train.py's main() in processes that are forked with everything imported.

A run takes a second or two so, where a new interpreter takes ten.
"""

import json
import multiprocessing
import os
import socket
import sys
from contextlib import suppress

import torch
from conftest import ROOT, losses
from safetensors.torch import load_file

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])


def flags(parts, out, **changes):
    """train.py's flags for a tiny model of the real classes: 6 steps of 4 samples in float32."""
    values = {"mllm": parts / "llava", "diffusion": parts / "sana64", "out": out}
    values |= {"num_queries": 4, "connector_layers": 1, "batch_size": 4, "warmup": 2, "steps": 6}
    values |= {"sample_every": 1000, "dtype": "float32"} | changes
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def process(argv, rank, world, port, errors, change, samples):
    """What one process runs; its output goes to a file."""
    with suppress(PermissionError):
        os.setsid()  # a signal to the group reaches its loader's workers too
    torch.set_num_threads(1)
    stream = os.open(f"{errors}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.chdir(ROOT)
    sys.argv = ["train.py", *argv]
    import train

    if not samples:
        train.save_samples = lambda *inputs: None
    if change:
        change(rank)
    train.main()


class Running:
    """A run in so many processes. change(rank), a function of a module, may break something
    first; only with `samples`, which take time, are samples generated."""

    def __init__(self, folder, argv, world=1, change=None, samples=False):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.errors = [folder / f"errors-{rank}" for rank in range(world)]
        options = (world, port, folder / "errors", change, samples)
        self.processes = [
            FORKS.Process(target=process, args=(argv, rank, *options)) for rank in range(world)
        ]
        for rank in self.processes:
            rank.start()

    def end(self, timeout=150):
        """(exit codes, what each process printed), once they have ended, or were killed."""
        for rank in self.processes:
            rank.join(timeout)
            rank.kill()
            rank.join()
        texts = [path.read_text() if path.exists() else "" for path in self.errors]
        return [rank.exitcode for rank in self.processes], texts


def train(folder, argv, world=1, change=None, samples=False):
    """Run and wait: (exit codes, what each process printed)."""
    return Running(folder, argv, world, change, samples).end()


def succeed(folder, argv, **options):
    """Train, and assert that it ended well."""
    codes, texts = train(folder, argv, **options)
    assert not any(codes), texts[0]
    return texts[0]


def refused(folder, argv, words, **options):
    """Train, and assert that it ends with exit code 2 and one last line with these words."""
    codes, texts = train(folder, argv, **options)
    lines = texts[0].strip().splitlines()
    assert codes[0] == 2, texts[0]
    assert "Traceback" not in texts[0] and lines[-1].startswith("error: ") and words in lines[-1]


def log_of(out):
    """The entries of a run's log, one per step."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def newest(out):
    """The newest step folder of a run."""
    return out / (out / "latest").read_text().strip()


def end_of(out):
    """A run's weights and optimizer state: {name: tensor}."""
    tensors = load_file(newest(out) / "model.safetensors")
    state = torch.load(newest(out) / "training.pt", weights_only=True)
    for name, values in state["optimizer"]["state"].items():
        tensors |= {f"{name} {key}": value for key, value in values.items()}
    return tensors


def check_same(out, other, exactly=False):
    """Assert that two runs had the same curve and ended with the same weights and moments."""
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    if exactly:
        tolerance = {"rtol": 0, "atol": 0}
        assert losses(out) == losses(other)
    for a, b in zip(losses(out), losses(other), strict=True):
        assert abs(a - b) < 1e-5 * abs(b) + 1e-12
    ours, theirs = end_of(out), end_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], msg=name, **tolerance)
