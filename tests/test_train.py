"""train.py as its user runs it: learns, resumes, and two processes do what one does."""

import subprocess
import sys

import pytest
import torch
from conftest import launcher, losses, noise_picture, run
from diffusers import AutoencoderDC
from safetensors.torch import load_file

from metaquery import InputError
from train import TrainConfig
from train import train as train_here


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


def test_cached_latents_are_made_once(parts, tmp_path, monkeypatch):
    """Three pictures, seen twice: six encodings, or three with the cache; the curve is the same."""
    (tmp_path / "data").mkdir()
    for seed in range(3):
        noise_picture(32, 32, seed).save(tmp_path / "data" / f"{seed}.png")
    changes = {"mllm": str(parts / "llava"), "diffusion": str(parts / "sana"), "num_queries": 4}
    encoded, plain = [], AutoencoderDC.encode
    monkeypatch.setattr(
        AutoencoderDC, "encode", lambda self, x: encoded.append(len(x)) or plain(self, x)
    )
    names = {"data": str(tmp_path / "data"), "stage": "reconstruct", "sample_every": 100}
    names |= {"steps": 6, "batch_size": 1, "warmup": 1}
    curves = []
    for name, cache in (("plain", ""), ("cached", str(tmp_path / "latents"))):
        out = tmp_path / name
        monkeypatch.setattr("train.draw_samples", lambda *inputs: None)
        train_here(TrainConfig(out=str(out), cache_latents=cache, **names), changes)
        curves.append(losses(out))
    assert sum(encoded) == 6 + 3 and curves[0] == pytest.approx(curves[1], rel=1e-2)


def test_random_latents_are_not_cached(parts, tmp_path):
    """Stable Diffusion's VAE encodes to a distribution, of which each step takes another sample."""
    changes = {"mllm": str(parts / "qwen"), "diffusion": str(parts / "sd")}
    with pytest.raises(InputError, match="--cache-latents needs Sana's VAE"):
        train_here(TrainConfig(out=str(tmp_path), cache_latents=str(tmp_path / "x")), changes)
