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
