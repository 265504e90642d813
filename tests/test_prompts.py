"""--cache-prompts changes no figure, and each prompt is read once."""

import sys

import pytest
import torch
from conftest import check_refused, run

from training.attention import checkpoint_layers
from training.prompts import CachedPrompts

PROMPTS = ["a red star left of a blue circle", "a star", "", "a star"]


def condition(model, prompts):
    """(the condition, the queries' gradient or None) for prompts."""
    model.zero_grad()
    cond, _ = model.encode_prompts(prompts)
    cond.square().sum().backward()
    return cond.detach(), model.queries.grad


@pytest.mark.parametrize("mllm", ["llava", "qwen", "qwen-vl"])
@pytest.mark.parametrize("condition_on", ["queries", "random", "last_layer"])
def test_kept_prompts_give_the_same_conditions_and_gradients(build, mllm, condition_on):
    model = build(mllm, dtype=torch.float64, condition_on=condition_on)
    expected = [condition(model, prompts) for prompts in (PROMPTS, PROMPTS[1:])]
    read = []
    backbone = model.mllm.base_model
    forward = backbone.forward
    backbone.forward = lambda **inputs: (read.append(inputs), forward(**inputs))[1]
    backbone.forward = cached = CachedPrompts(model)
    for _ in range(2):  # the second time other prompts are the longest, so the padding differs
        for prompts, (cond, grad) in zip((PROMPTS, PROMPTS[1:]), expected, strict=True):
            ours = condition(model, prompts)
            torch.testing.assert_close(ours[0], cond, atol=1e-10, rtol=1e-10)
            if condition_on == "queries":
                torch.testing.assert_close(ours[1], grad, atol=1e-10, rtol=1e-10)
    assert len(cached.kept) == len(set(PROMPTS))
    assert len([inputs for inputs in read if inputs.get("input_ids") is not None]) == 1


def test_kept_prompts_with_gradient_checkpointing(build):
    model = build("qwen", dtype=torch.float64)
    cond, grad = condition(model, PROMPTS)
    checkpoint_layers(model)
    model.mllm.base_model.forward = CachedPrompts(model)
    for _ in range(2):
        ours = condition(model, PROMPTS)
        torch.testing.assert_close(ours[0], cond, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(ours[1], grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("other", ["--train-mllm", "--shard"])
def test_what_kept_prompts_do_not_go_with_is_refused(other, tmp_path):
    flags = ["--cache-prompts", "true", other, "true", "--steps", "2"]
    done = run([sys.executable, "train.py", *flags, "--out", str(tmp_path / "run")])
    check_refused(done, "--cache-prompts needs")
