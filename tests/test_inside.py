"""The attention maps of the notebooks and of the page."""

import pytest
import torch

from notebooks.inside import attention_maps, best_head, information, read_out, words_of


@pytest.mark.parametrize("mllm", ("llava", "qwen", "qwen-vl"))
def test_maps_hold_each_querys_attention_to_the_prompt(build, mllm):
    model = build(mllm)
    maps, tokens = attention_maps(model, "a red star")
    assert maps.shape == (2, 4, 5, len(tokens))
    assert "".join(tokens).replace("Ġ", " ").count("a red star") == 1
    # Query i sees the prompt and queries 0 to i, so what it gives the prompt is less than 1.
    given = maps.sum(-1)
    assert (given > 0).all() and (given < 1).all()


def test_a_map_is_softmax_of_query_times_key(build):
    model = build("qwen")
    inputs = model.format(["a red star"])
    words = model.mllm.get_input_embeddings()(inputs["input_ids"])
    states = torch.cat([words, model.queries[None]], 1)  # (1, T + N, d)
    backbone = model.mllm.model
    layer = backbone.layers[0]
    normed = layer.input_layernorm(states)
    q = layer.self_attn.q_proj(normed).unflatten(-1, (4, -1)).transpose(1, 2)
    k = layer.self_attn.k_proj(normed).unflatten(-1, (2, -1)).transpose(1, 2)
    places = torch.arange(states.shape[1])[None]
    cos, sin = backbone.rotary_emb(states, places)
    half = q.shape[-1] // 2
    turn = lambda x: x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin  # noqa: E731
    scores = turn(q) @ turn(k.repeat_interleave(2, 1)).mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
    maps, tokens = attention_maps(model, "a red star")
    torch.testing.assert_close(maps[0], weights[0, :, len(tokens) :, : len(tokens)])


def test_the_faster_attention_is_back_afterwards(build):
    model = build("llava")
    before = model.mllm.model.language_model.config._attn_implementation
    attention_maps(model, "a red star")
    assert model.mllm.model.language_model.config._attn_implementation == before != "eager"


def test_the_users_words_are_found_in_the_chat(build):
    model = build("llava")
    maps, tokens = attention_maps(model, "a red star")
    part, words = words_of(model, "a red star", maps, tokens)
    assert "".join(words) == "aredstar"
    ends = [i for i, token in enumerate(tokens) if token == "<|im_end|>"]
    assert torch.equal(part, maps[..., ends[-1] - len(words) : ends[-1]])


def test_the_best_head_is_the_one_whose_queries_look_at_different_places():
    maps = torch.full((2, 3, 4, 4), 0.25)  # all queries look everywhere
    maps[0, 1] = torch.tensor([1.0, 0, 0, 0])  # all look at the first place
    maps[1, 2] = torch.eye(4)  # each looks at its own
    scores = information(maps)
    assert scores.shape == (2, 3) and best_head(scores) == (1, 2)
    torch.testing.assert_close(scores[1, 2], 4 * torch.tensor(4.0).log())
    assert scores[0].abs().max() < 1e-6


@pytest.mark.parametrize("width", (8, 400))  # fewer columns than rows, and more
def test_read_out_finds_what_is_linear_and_guesses_what_is_not_there(width):
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(600, width, generator=draw)
    bits = torch.randint(2, (600,), generator=draw)
    states[:, :8] += 2 * bits[:, None]
    labels = ["left" if bit else "right" for bit in bits]
    assert read_out(states, labels, 300) > 0.95
    unrelated = torch.randint(4, (600,), generator=draw).tolist()
    assert read_out(states, unrelated, 300) < 0.35


def test_read_out_is_ridge_regression():
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(50, 3, generator=draw, dtype=torch.float64)
    labels = torch.randint(2, (50,), generator=draw)
    x = (states - states[:40].mean(0)) / (states[:40].std(0) + 1e-6)
    x = torch.cat([x, x.new_ones(50, 1)], 1)
    wanted = torch.nn.functional.one_hot(labels[:40]).double()
    gram = x[:40].T @ x[:40] + 4 * torch.eye(4)  # XᵀX + λ, λ = 0.1 · 40
    guessed = (x[40:] @ torch.linalg.solve(gram.double(), x[:40].T @ wanted)).argmax(-1)
    share = (guessed == labels[40:]).double().mean().item()
    assert read_out(states, labels.tolist(), 40) == pytest.approx(share)
