"""train.py as its user runs it: learns, resumes, and two processes do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


def environment(**changes):
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


def run(command, **changes):
    """Run a command line from the project's root; returns the finished process."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=300
    )


def launcher(processes):
    """The start of a command line: python, or torchrun's processes."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
            "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # fmt: skip


def train(parts, out, *flags, torchrun=1):
    command = [
        *launcher(torchrun), "train.py", "--mllm", parts / "llava", "--diffusion", parts / "sana64",
        "--out", out,
        "--num-queries", "4", "--connector-layers", "1", "--batch-size", "4", "--warmup", "2",
        "--steps", "6", *flags,
    ]  # fmt: skip
    return run([str(part) for part in command])


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def parts(parts):
    """The random models, with a Sana whose latents are those of 64x64 pictures."""
    import diffusers

    if not (parts / "sana64").exists():
        (parts / "sana64").symlink_to(parts / "sana")
        model = diffusers.SanaTransformer2DModel.from_pretrained(
            parts / "sana", subfolder="transformer", low_cpu_mem_usage=False
        )
        (parts / "sana64").unlink()
        (parts / "sana64").mkdir()
        for part in ("vae", "scheduler"):
            (parts / "sana64" / part).symlink_to(parts / "sana" / part)
        model.register_to_config(sample_size=32)
        model.save_pretrained(parts / "sana64" / "transformer")
    return parts


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
    drawn = run([sys.executable, "sample.py", "a star", "--checkpoint", str(one), "--steps", "2",
                 "--out", str(one / "star.png")])  # fmt: skip
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


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--size", "huge"], "tiny, base"),
        (["--size", "huge", "--checkpoint", "weights/tiny"], "tiny, base"),
        (["--stage", "dream"], "pretrain"),
        (["--steps", "0"], "at least 1"),
        (["--batch-size", "5", "--micro-batch-size", "2"], "multiple of 2"),
        (["--mllm", "/nowhere/mllm"], "--mllm"),
        (["--checkpoint", "/nowhere/run"], "/nowhere/run"),
        (["--checkpoint", "weights/tiny", "--num-queries", "9"], "do not fit the config: queries"),
        (["--flag-that-is-not"], "flag"),
    ],
)
def test_bad_input_is_one_line(flags, words, tmp_path):
    done = run([sys.executable, "train.py", "--out", str(tmp_path), *flags])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words in done.stderr.strip().splitlines()[-1]
