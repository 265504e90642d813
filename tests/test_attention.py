"""How layers are run in training changes no figure: attention on a CPU, layers run again."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from training.attention import (
    KeepsPrompts,
    QueriesAttention,
    checkpoint_layers,
    choose_attention,
)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_chosen_by_dtype(build, dtype):
    """On a CPU our own in bfloat16, whose fused backward pass is slow; the fused one in float32."""
    model = build("llava", dtype=dtype)
    choose_attention(model)
    in_bfloat16 = dtype == torch.bfloat16
    chosen = model.mllm.get_decoder().config._attn_implementation
    assert chosen == ("queries" if in_bfloat16 else "sdpa")
    assert torch.backends.cuda.flash_sdp_enabled() != in_bfloat16


@pytest.mark.parametrize("mllm", ["llava", "qwen", "qwen-vl"])
@pytest.mark.parametrize("condition_on", ["queries", "random", "last_layer"])
def test_training_attention_changes_no_figure(build, mllm, condition_on):
    """Conditions and all gradients in float64, for padded prompts, with images where it sees."""
    model = build(mllm, dtype=torch.float64, condition_on=condition_on)
    image = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 50)
    images = [[image], [], [image, image]]
    if mllm == "qwen":
        images = None
    weights, made = None, []
    for chosen in (False, True):
        if chosen:
            model.mllm.get_decoder().set_attn_implementation("queries")
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


def test_layers_run_again_leave_the_prompt_as_it_was(build):
    """Run again, with images or without, the condition and its gradient are the same."""
    model = build("llava", dtype=torch.float64)
    image = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 50)
    names = [name for name, _ in model.named_parameters()]
    grads = []
    for recomputed in (False, True):
        if recomputed:
            checkpoint_layers(model)
        model.zero_grad()
        cond, _ = model.encode_prompts(PROMPTS, [[image], [], []])
        cond.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)
    assert [name for name, _ in model.named_parameters()] == names, "checkpoints keep their names"


def test_layers_run_again_keep_only_their_inputs(build):
    """What the backward pass holds on to is less: the point of it."""
    kept = []
    for recomputed in (False, True):
        model = build("qwen", connector_layers=4)
        if recomputed:
            checkpoint_layers(model)
        saved = []

        def pack(x, saved=saved):
            saved.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.encode_prompts(PROMPTS)
        kept.append(sum(saved))
    assert kept[1] < 0.5 * kept[0]


# ---- Caches --------------------------------------------------------------------------------------
@pytest.mark.parametrize("condition_on", ["queries", "random", "last_layer"])
def test_kept_prompts_give_the_same_conditions_and_gradients(build, condition_on):
    """In any company and padding; each prompt is read once."""
    plain = build("qwen", dtype=torch.float64, condition_on=condition_on)
    parts = (plain.mllm, plain.processor, plain.diffusion, plain.vae, plain.scheduler)
    keeps = KeepsPrompts(plain.config, *parts, connector=plain.connector)
    keeps.queries = plain.queries
    read = []
    plain.mllm.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: read.append(len(inputs[0]))
    )
    for prompts in (PROMPTS, [PROMPTS[1], PROMPTS[0], PROMPTS[0]]):
        figures = []
        for model in (plain, keeps):
            model.zero_grad()
            cond, _ = model.encode_prompts(prompts)
            cond.square().sum().backward()
            figures.append([cond.detach()] + [p.grad for p in model.connector.parameters()])
            figures[-1] += [model.queries.grad] * (condition_on == "queries")
        for ours, theirs in zip(*figures, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)
    assert read == [3, 3, 3], "plain twice, and the cache once"
