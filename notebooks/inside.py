"""What the queries look at inside the MLLM."""

import torch

from metaquery import to_device


@torch.no_grad()
def attention_maps(model, prompt, images=()):
    """How much each query takes from each prompt token, in each layer and head of the MLLM.

    images: a list of PIL images. Returns the attention weights (layers, heads, N, T), float32, and
    the prompt's T tokens as strings. A row's weights on the N queries, which this leaves out, make
    up its sum to 1.
    """
    inputs = model.prepare_inputs([prompt], [list(images)])
    tokens = model.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    language = model.mllm.base_model
    language = getattr(language, "language_model", language)  # without the vision tower
    maps, hooks = {}, []
    for number, layer in enumerate(language.layers):

        def keep(module, args, outputs, number=number):
            maps[number] = outputs[1]  # of the last call, which is the queries' pass

        hooks.append(layer.self_attn.register_forward_hook(keep))
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")  # faster kernels never hold the weights
    try:
        model.encode_prompts(to_device(inputs, model.queries.device))
    finally:
        language.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    stacked = torch.cat([maps[number] for number in range(len(maps))])  # (layers, heads, N, T + N)
    return stacked[..., : len(tokens)].float(), tokens


def read_out(states, labels, train):
    """How well labels can be read from states by a linear map: the share right on unseen rows.

    states (B, n); labels, B values of any kind. The first `train` rows fit the map, by least
    squares with a small penalty on its weights (ridge regression); the rest test it.
    """
    values = sorted(set(labels), key=str)
    classes = torch.tensor([values.index(label) for label in labels])  # (B,)
    wanted = torch.nn.functional.one_hot(classes).double()  # (B, values)
    x = states.double()
    x = (x - x[:train].mean(0)) / (x[:train].std(0) + 1e-6)  # (B, n)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # and a constant
    known, unseen = x[:train], x[train:]
    # The weights are Xᵀ(XXᵀ + λ)⁻¹Y: with fewer rows than columns this inverts the smaller matrix.
    penalty = 0.1 * train * torch.eye(train, dtype=x.dtype)
    solved = torch.linalg.solve(known @ known.T + penalty, wanted[:train])  # (train, values)
    guessed = (unseen @ (known.T @ solved)).argmax(-1)
    return (guessed == classes[train:]).double().mean().item()
