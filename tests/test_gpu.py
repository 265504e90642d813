"""What must hold on the device that is there: a GPU, or, where there is none, the CPU.

On a GPU run this file first: `python -m pytest tests/test_gpu.py -v -rA`.
"""

import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, environment, losses, noise_image, pixels

from cli import device_of
from metaquery import TINY, MetaQuery
from notebooks.plain import one_pass
from training.attention import choose_attention

DEVICE = device_of()
PROMPTS = ["a red star left of a blue circle", "a red circle"]


@pytest.fixture(scope="module")
def model():
    return MetaQuery.from_pretrained(TINY).to(DEVICE).eval()


@pytest.mark.parametrize("with_images", [False, True])
def test_two_passes_equal_one(model, with_images):
    """Hidden states and the queries' gradient, in float32; in bfloat16 within its rounding."""
    images = [[noise_image(64, 64)], []] if with_images else None
    inputs = model.format(PROMPTS, images)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.15)):
        tested = copy.deepcopy(model).to(dtype)
        tested.mllm.get_decoder().set_attn_implementation("sdpa")
        results = []
        for way in (lambda x, m=tested: m.run_queries(m.read_prompt(x)),
                    lambda x, m=tested: one_pass(m, x)):  # fmt: skip
            tested.zero_grad()
            hidden = way(dict(inputs))
            hidden.float().square().mean().backward()
            results.append((hidden.detach().float(), tested.queries.grad.float()))
        for two, one in zip(*results, strict=True):
            assert (two - one).norm() <= tolerance * one.norm()


def test_the_training_attention_equals_the_default_one(model):
    inputs = model.format(PROMPTS)
    targets = torch.zeros(2, 3, 64, 64, device=DEVICE)
    shape = (2, model.diffusion.config.in_channels, *model.latent_size(64, 64))
    fixed = {"noise": torch.randn(shape).to(DEVICE), "u": torch.tensor([0.3, 0.8]).to(DEVICE)}
    chosen = copy.deepcopy(model)
    choose_attention(chosen)
    expected = model(dict(inputs), targets, **fixed)
    assert chosen(dict(inputs), targets, **fixed).item() == pytest.approx(expected.item(), rel=1e-3)


def test_images_are_the_cpus(model):
    """In float32, from one seed, hardly a level away from the CPU's."""
    results = []
    for there in (model, copy.deepcopy(model).to("cpu")):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
        results.append(there.generate(PROMPTS, num_inference_steps=4, generator=seeds))
    for one, other in zip(*results, strict=True):
        assert (pixels(one).float() - pixels(other).float()).abs().mean() < 2


def test_offload_gives_the_same_images(model):
    """Bit for bit, and afterwards only the queries are on the device."""
    options = {"num_inference_steps": 2}
    expected = model.generate(PROMPTS, generator=torch.Generator().manual_seed(0), **options)
    offloaded = copy.deepcopy(model).offload_to(DEVICE)
    images = offloaded.generate(PROMPTS, generator=torch.Generator().manual_seed(0), **options)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    away = {x.device.type for name, x in offloaded.named_parameters() if name != "queries"}
    assert away == {"cpu"}


@pytest.mark.parametrize("flags", [[], pytest.param(["--compile", "true"], id="compile")])
def test_a_killed_run_resumes(tmp_path, flags):
    """Trains 12 steps of the toy world, killed after the save at step 6; then the whole of it."""
    if flags and DEVICE.type == "cpu":
        pytest.skip("compiling for a CPU takes minutes")
    command = [sys.executable, "train.py", "--steps", "12", "--batch-size", "4", "--warmup", "2"]
    command += ["--save-every", "6", "--sample-every", "100", *flags, "--out", str(tmp_path)]
    options = {"cwd": ROOT, "env": environment(), "start_new_session": True}
    first = subprocess.Popen(command, **options, stderr=subprocess.DEVNULL)
    until = time.time() + 200
    while not (tmp_path / "latest").exists() and first.poll() is None and time.time() < until:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert (tmp_path / "latest").exists()

    subprocess.run(command, **options, check=True, capture_output=True, timeout=300)
    assert len(losses(tmp_path)) == 12 and (tmp_path / "step-00000012").exists()


def test_random_parts_and_images_train(tmp_path):
    """The folders and tars that stand in for a download are what train.py reads."""
    command = [sys.executable, "-m", "extras.random_parts", "tiny", "--images", "12"]
    options = {"cwd": ROOT, "env": environment(), "check": True, "capture_output": True}
    subprocess.run([*command, "--out", str(tmp_path)], **options)
    command = [sys.executable, "train.py", "--mllm", tmp_path / "mllm"]
    command += ["--diffusion", tmp_path / "diffusion", "--data", tmp_path / "images"]
    command += ["--streaming", "true", "--steps", "2", "--batch-size", "4", "--warmup", "1"]
    subprocess.run([*map(str, command), "--out", str(tmp_path / "run")], **options)
    assert len(losses(tmp_path / "run")) == 2
