"""train.py as its user runs it: learns, resumes, and two processes do what one does."""

import subprocess
import sys

import pytest
import torch
from conftest import launcher, losses, run
from safetensors.torch import load_file


def train(parts, out, *flags, torchrun=1):
    command = [
        *launcher(torchrun),
        "train.py",
        "--mllm",
        parts / "llava",
        "--diffusion",
        parts / "sana64",
        "--out",
        out,
        "--num-queries",
        "4",
        "--connector-layers",
        "1",
        "--batch-size",
        "4",
        "--warmup",
        "2",
        "--steps",
        "6",
        *flags,
    ]
    return run([str(part) for part in command])


@pytest.fixture(scope="module")
def one(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    done = train(parts, out)
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_leaves_what_it_promises(one):
    """Step folders, a log, sample grids, and the latest weights at the top."""
    assert len(losses(one)) == 6
    assert (one / "samples" / "step-00000006.png").exists()
    step = one / "step-00000006"
    assert (step / "training.pt").exists() and (step / "config.json").exists()
    assert (one / "model.safetensors").read_bytes() == (step / "model.safetensors").read_bytes()
    drawn = run(
        [
            sys.executable,
            "sample.py",
            "a star",
            "--checkpoint",
            str(one),
            "--steps",
            "2",
            "--out",
            str(one / "star.png"),
        ]
    )
    assert drawn.returncode == 0 and (one / "star.png").exists(), drawn.stderr


def test_two_processes_are_one(parts, one, tmp_path):
    """The same global batch gives the same loss curve and the same weights."""
    done = train(parts, tmp_path, torchrun=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(losses(one), rel=2e-2)
    two, single = (load_file(out / "model.safetensors") for out in (tmp_path, one))
    for name, weights in single.items():
        torch.testing.assert_close(two[name], weights, atol=5e-3, rtol=5e-2)


def test_micro_batches_are_one_batch(parts, one, tmp_path):
    done = train(parts, tmp_path, "--micro-batch-size", "1")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(losses(one), rel=2e-2)


def test_resumed_run_equals_an_uninterrupted_one(parts, one, tmp_path):
    assert train(parts, tmp_path, "--save-every", "3").returncode == 0
    for name in ("step-00000006", "log.jsonl"):
        subprocess.run(["rm", "-r", str(tmp_path / name)], check=True)
    done = train(parts, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path)) == 3
    again, single = (load_file(out / "model.safetensors") for out in (tmp_path, one))
    assert all(torch.equal(again[name], weights) for name, weights in single.items())


def test_learning_lowers_the_loss(parts, tmp_path):
    done = train(parts, tmp_path, "--steps", "40", "--lr", "1e-2", "--sample-every", "100")
    assert done.returncode == 0, done.stderr
    curve = losses(tmp_path)
    assert sum(curve[-8:]) < 0.9 * sum(curve[:8])
