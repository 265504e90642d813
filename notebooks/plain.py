"""The plain way: prompt and queries through the MLLM in one pass, as the paper draws it."""

import torch

from metaquery import to_device


def one_pass(model, inputs):
    """The last hidden states (B, N, d) at the queries, for what `model.format` made of prompts.

    It equals `run_queries(read_prompt(inputs))`, but gradient runs through the prompt's tokens too.
    """
    inputs = to_device(inputs, model.queries.device)
    backbone = model.mllm.base_model
    embeddings = model.mllm.get_input_embeddings()
    words = embeddings(inputs["input_ids"])  # (B, T, d)
    queries = model.queries.to(words.dtype)
    queries = queries.expand(len(words), -1, -1)  # (B, N, d)
    mask = inputs.pop("attention_mask")  # (B, T)
    full_mask = torch.cat([mask, mask.new_ones(queries.shape[:2])], 1)  # (B, T + N)

    positions = (full_mask.cumsum(-1) - 1).clamp(min=0)  # (B, T + N)
    if "image_grid_thw" in inputs:  # Qwen2.5-VL: the queries continue after the prompt's largest
        ids = {name: x for name, x in inputs.items() if name != "pixel_values"}
        of_prompt = backbone.get_rope_index(**ids, attention_mask=mask)[0]  # (3, B, T)
        steps = 1 + torch.arange(queries.shape[1], device=mask.device)
        of_queries = of_prompt.amax(-1, keepdim=True) + steps  # (3, B, N)
        positions = torch.cat([of_prompt, of_queries], -1)  # (3, B, T + N)

    images = {
        name: x for name, x in inputs.items() if name not in ("input_ids", "mm_token_type_ids")
    }
    outputs = backbone(
        inputs_embeds=torch.cat([words, queries], 1),
        attention_mask=full_mask,
        position_ids=positions,
        use_cache=False,
        **images,
    )
    return outputs.last_hidden_state[:, -queries.shape[1] :]
