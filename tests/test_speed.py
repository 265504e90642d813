"""The speed rows at full width: FLOPs as torch counts them, and each row at the tiny size."""

from functools import partialmethod

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from extras.full_width import full_model, multiplications, step_flops, training


def counted(function):
    """The floating-point operations of a function, by torch's own count."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def test_the_formula_of_flops_is_what_torch_counts():
    """Of each part forward, and of all of it forward and backward, within 3%."""
    model = full_model("tiny", "cpu").float()
    inputs = dict(model.prepare_inputs(["a red star left of a blue circle"]))
    tokens, side = inputs["input_ids"].shape[1], model.diffusion.config.sample_size
    made = multiplications(model, tokens)
    states = torch.randn(1, *model.queries.shape)
    x = torch.randn(1, model.diffusion.config.in_channels, side, side)
    with torch.no_grad():
        cond = model.connector(states)
        connector = counted(lambda: model.connector(states))
        diffusion = counted(lambda: model.denoise(x, torch.ones(1), cond, None))
        prompt = counted(lambda: model.mllm.base_model(**inputs))
        model.queries.requires_grad_(False)  # torch's counter refuses its view without gradient
        both = counted(lambda: model.encode_prompts(dict(inputs)))
        model.queries.requires_grad_(True)
    assert connector == pytest.approx(2 * made["connector"], rel=0.03)
    assert diffusion == pytest.approx(2 * made["diffusion"], rel=0.03)
    assert both - prompt - connector == pytest.approx(2 * made["queries"], rel=0.03)
    for block in model.diffusion.transformer_blocks:
        block.ff.conv_depth = torch.nn.Identity()  # torch counts its gradient as a dense one's
    targets = torch.zeros(1, 3, 64, 64)
    encoding = counted(lambda: model.encode_latents(targets))
    step = counted(lambda: model(dict(inputs), targets).backward())
    assert step - prompt - encoding == pytest.approx(step_flops(model, tokens), rel=0.03)


def test_the_rows_of_training_run(monkeypatch, capsys):
    """The plain way, ours and compiled, with text and with a picture; and a drawing."""
    compiled = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    training("tiny", 1, "cpu")
    lines = capsys.readouterr().out.splitlines()
    for way in ("plain", "ours", "compiled"):
        assert len([line for line in lines if f" {way} " in line and "samples/s" in line]) == 2
    assert any("SanaPipeline" in line for line in lines)
