"""How layers are run in training changes no figure: attention on a CPU, layers run again."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from training.attention import QueriesAttention, checkpoint_layers, choose_attention

PROMPTS = ["a red star left of a blue circle", "a star", ""]


@pytest.fixture(autouse=True)
def kernels():
    """The library's choice of attention kernels is one for all; it is put back."""
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_attention_without_the_prompts_gradients():
    """Outputs and gradients of queries, and of their own keys and values, are the formula's."""
    torch.manual_seed(0)
    own, prompt, groups, heads = 3, 7, 2, 4
    q = torch.randn(2, heads, own, 8, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(2, groups, prompt + own, 8, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    mask = torch.ones(own, prompt + own, dtype=torch.bool).tril(prompt).expand(2, 1, -1, -1).clone()
    mask[1, :, :, :2] = False
    wide = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *wide, attn_mask=mask, scale=1.0)
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    grouped = q.unflatten(1, (groups, -1)).flatten(2, 3)
    made = QueriesAttention.apply(grouped, k, v, bias).unflatten(2, (-1, own)).flatten(1, 2)
    torch.testing.assert_close(made, expected, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(made)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (made, expected))
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-12, rtol=1e-12)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine[:, :, -own:], other[:, :, -own:], atol=1e-12, rtol=1e-12)
        assert not mine[:, :, :-own].any() and other[:, :, :-own].any()


@pytest.mark.parametrize("mllm", ["llava", "qwen", "qwen-vl"])
@pytest.mark.parametrize("condition_on", ["queries", "random", "last_layer"])
def test_training_attention_changes_no_figure(build, mllm, condition_on):
    """Conditions and all gradients in float64, for padded prompts, with pictures where it sees."""
    model = build(mllm, dtype=torch.float64, condition_on=condition_on)
    picture = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 50)
    images = None if mllm == "qwen" else [[picture], [], [picture, picture]]
    weights, made = None, []
    for chosen in (False, True):
        if chosen:
            choose_attention(model)
            assert model.mllm.get_decoder().config._attn_implementation == "queries"
        model.zero_grad()
        states = model.encode_prompts(PROMPTS, images)[0]
        weights = torch.randn_like(states) if weights is None else weights
        (states * weights).sum().backward()
        made.append([states] + [p.grad for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


def test_a_trained_mllm_keeps_its_prompts_gradients(build):
    """Where the MLLM is trained too (Table 2), the prompt's keys and values need gradients."""
    model = build("qwen", dtype=torch.float64, train_mllm=True)
    before = torch.autograd.grad(
        model.encode_prompts(PROMPTS)[0].sum(), model.mllm.parameters(), allow_unused=True
    )
    choose_attention(model)
    after = torch.autograd.grad(
        model.encode_prompts(PROMPTS)[0].sum(), model.mllm.parameters(), allow_unused=True
    )
    assert any(x is not None and x.any() for x in before)
    for ours, theirs in zip(after, before, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("mllm", ("llava", "qwen", "qwen-vl"))
def test_a_trained_mllm_is_checkpointed_too(build, mllm):
    """The prompt's keys and values, which carry gradient then, are there for the queries."""
    model = build(mllm, dtype=torch.float64, train_mllm=True)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_layers(model)
        model.zero_grad()
        cond, _ = model.encode_prompts(PROMPTS)
        cond.square().sum().backward()
        grads.append([p.grad.clone() for p in model.mllm.parameters() if p.grad is not None])
    assert len(grads[0]) > 10
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


def test_a_long_prompt_goes_through_mlps_in_pieces(build, monkeypatch):
    """Checkpointed layers take at most so many tokens at once, and the states stay the same."""
    monkeypatch.setattr("training.kernels.PIECE", 128)
    model, most = build("qwen", dtype=torch.float64), []
    choose_attention(model)
    prompt = ["star " * 150]
    expected = model.encode_prompts(prompt)[0]
    for layer in model.mllm.get_decoder().layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda m, inputs, made: most.append(made.shape[1])
        )
    checkpoint_layers(model)
    torch.testing.assert_close(model.encode_prompts(prompt)[0], expected, atol=1e-10, rtol=1e-9)
    assert max(most) == 128


def test_layers_run_again_leave_the_prompt_as_it_was(build):
    """After the backward pass the cache holds the prompt's own keys, and no graph."""
    model, caches = build("qwen", dtype=torch.float64), []
    checkpoint_layers(model)
    layer = model.mllm.get_decoder().layers[0]
    inner = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **options: (
        caches.append(options["cache"]) or inner(*args, **options)
    )
    model.encode_prompts(PROMPTS)[0].sum().backward()
    length = model.prepare_inputs(PROMPTS)["input_ids"].shape[1]
    for kept in caches[-1].layers:
        assert kept.keys.shape[2] == kept.values.shape[2] == length and not kept.keys.requires_grad
