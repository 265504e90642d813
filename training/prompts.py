"""--cache-prompts: a frozen MLLM reads each text prompt once, and what it computed is kept."""

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from metaquery import InputError


def pad_left(tensors, length):
    """Tensors (..., T, d) with T of their own, stacked: (B, ..., length, d), zeros on the left."""
    return torch.stack([F.pad(x, (0, 0, length - x.shape[-2], 0)) for x in tensors])


class CachedPrompts:
    """The `forward` of a frozen MLLM that keeps the keys, values and last states of each prompt.

    They depend on the prompt alone (§3.1: no prompt token can see a query), so each is computed
    once. They take memory: of SmolLM2-135M in bfloat16, 24 kB a token.
    """

    def __init__(self, model):
        if model.config.train_mllm:
            raise InputError("--cache-prompts needs a frozen MLLM: leave out --train-mllm.")
        self.forward = model.mllm.base_model.forward
        self.kept = {}  # a prompt's token ids: its keys and values, and its last hidden states

    def __call__(self, input_ids=None, **options):
        """As the MLLM's: what is kept of prompts; queries and pictures are computed."""
        if input_ids is None or "pixel_values" in options:
            return self.forward(input_ids=input_ids, **options)
        mask = options["attention_mask"].bool()  # (B, T), False at padding, which is on the left
        prompts = [tuple(row[real].tolist()) for row, real in zip(input_ids, mask, strict=True)]
        new = [i for i, prompt in enumerate(prompts) if prompt not in self.kept]
        if new:
            self.read(new, prompts, input_ids, options)
        states, hidden = zip(*(self.kept[prompt] for prompt in prompts), strict=True)
        states = pad_left(states, input_ids.shape[1])  # (B, layers, 2, heads, T, head size)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(states.permute(1, 2, 0, 3, 4, 5)):
            cache.update(keys, values, layer)
        hidden = pad_left(hidden, input_ids.shape[1])  # (B, T, d)
        return BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache)

    def read(self, rows, prompts, input_ids, options):
        """Compute and keep the prompts of some rows."""
        inputs = {name: options[name][rows] for name in ("attention_mask", "position_ids")}
        output = self.forward(input_ids=input_ids[rows], use_cache=True, **inputs)
        layers = [torch.stack([layer.keys, layer.values], 1) for layer in output.cache.layers]
        states = torch.stack(layers, 1)  # (B, layers, 2, heads, T, head size)
        for row, i in enumerate(rows):
            real = slice(-len(prompts[i]), None)
            hidden = output.last_hidden_state[row, real]
            self.kept[prompts[i]] = states[row, ..., real, :].clone(), hidden.clone()
