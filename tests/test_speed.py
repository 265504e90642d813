"""The speed command: what it compares computes the same, and every row prints."""

import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from extras import speed
from metaquery import MetaQueryConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("mllm", ["llava", "qwen-vl", "internvl"])
@pytest.mark.parametrize("with_image", [False, True])
def test_the_plain_way_computes_the_same(build, mllm, with_image):
    """Loss and gradient of the queries, in float64, for the inputs that are measured."""
    model = build(mllm).double()
    plain = speed.sharing(model, speed.Plain)
    inputs = speed.random_inputs(model, 2, with_image)
    for name in inputs:
        if inputs[name].is_floating_point():
            inputs[name] = inputs[name].double()
    fixed = {"noise": torch.randn(2, 4, 4, 4).double(), "u": torch.tensor([0.3, 0.8]).double()}
    results = []
    for kind in (model, plain):
        model.zero_grad()
        loss = kind(dict(inputs), torch.zeros(2, 3, 8, 8).double(), **fixed)
        loss.backward()
        results.append((loss.item(), model.queries.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-6, atol=1e-12)


def test_needed_flops_are_what_torch_counts_of_a_step():
    """Forward and backward of a whole step, less the VAE, within 3%."""
    model, _ = speed.random_model(MetaQueryConfig.preset("tiny"), None, CPU, torch.float32)
    model.mllm.get_decoder().set_attn_implementation("sdpa")
    inputs = speed.random_inputs(model, 1, with_image=True)
    targets = torch.zeros(1, 3, 64, 64)
    for block in model.diffusion.transformer_blocks:
        block.ff.conv_depth = torch.nn.Identity()  # torch counts its gradient as a dense one's
    with sdpa_kernel(SDPBackend.MATH):
        needed = speed.needed_flops(model, inputs, targets)
        with FlopCounterMode(display=False) as encoding:
            model.encode_latents(targets)
        with FlopCounterMode(display=False) as step:
            model(dict(inputs), targets).backward()
    counted = step.get_total_flops() - encoding.get_total_flops()
    assert needed == pytest.approx(counted, rel=0.03)


def test_every_row_is_printed(monkeypatch, capsys, handlers_restored):
    flags = ["--layers", "2", "--repeats", "1", "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["speed", *flags, "--noises-per-sample", "3"])
    speed.main()
    lines = capsys.readouterr().out.splitlines()
    for way in ("plain ", "ours ", "ours, latents kept ", "ours, latents kept, 3 noise levels "):
        rows = [line for line in lines if f")  {way}" in line]
        assert len(rows) == 2 and all("with all layers about" in row for row in rows)
    assert all(line.startswith(" 1.00") for line in lines if ")  plain" in line)
    assert any("SanaPipeline" in line for line in lines)
    assert sum("largest costs" in line for line in lines) == 2
