"""What a training step may do in less time or memory, with the same results.

Attention of the queries on a CPU, layers that run again in the backward pass (gradient
checkpointing), and caches of what frozen parts compute.
"""

import hashlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from metaquery import InputError, MetaQuery, Prompt


# ---- Attention -----------------------------------------------------------------------------------
class QueriesAttention(torch.autograd.Function):
    """Attention that computes no gradient of the prompt's keys and values: nothing needs it (§3.1).

    q (B, G, R, d), in R the N queries of each head of a group; k and v (B, G, L + N, d), of the
    prompt and then of the queries; mask (B, 1, N, L + N), added to the scores. Exact.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask):
        scores = q @ k.mT  # S = q·kᵀ, (B, G, R, L + N)
        scores.unflatten(2, (-1, mask.shape[2])).add_(mask[:, None])
        weights = scores.softmax(-1)  # P = softmax(S)
        ctx.num_queries = mask.shape[2]
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v  # O = P·v

    @staticmethod
    def backward(ctx, grad):
        q, k, v, weights = ctx.saved_tensors
        own = slice(-ctx.num_queries, None)  # the queries' own keys and values
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        grad_v[:, :, own] = weights[..., own].mT @ grad  # dv = Pᵀ·dO

        for group in range(k.shape[1]):  # one at a time, to save memory
            p = weights[:, group]
            grad_p = grad[:, group] @ v[:, group].mT  # dP = dO·vᵀ
            grad_s = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))  # dS = P ∘ (dP − Σ P ∘ dP)
            grad_q[:, group] = grad_s @ k[:, group]  # dq = dS·k
            grad_k[:, group, own] = grad_s[..., own].mT @ q[:, group]  # dk = dSᵀ·q
        return grad_q, grad_k, grad_v, None


def attend(module, q, k, v, mask, scaling, **options):
    """The attention of transformers' models, q (B, H, N, d), to (B, N, H, d) and None.

    With gradient, in the queries' pass, it is `QueriesAttention`; else the library's, fused. k and
    v (B, G, L + N, d) hold one head for each group; mask (B, 1, N, L + N) is True where q may look.
    """
    if not torch.is_grad_enabled() or mask is None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **options)

    mask = torch.zeros_like(mask, dtype=v.dtype).masked_fill(~mask, -torch.inf)
    grouped = (q * scaling).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    out = QueriesAttention.apply(grouped.to(v.dtype), k.to(v.dtype), v, mask)
    return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2).transpose(1, 2), None


# transformers' models find it under this name.
transformers.AttentionInterface.register("queries", attend)
transformers.AttentionMaskInterface.register("queries", sdpa_mask)


def choose_attention(model):
    """Choose the attention that trains fastest on the model's device and in its frozen dtype.

    On a CPU in bfloat16 the fused kernel's backward pass is slower than the plain one's, and the
    library's takes two to four times as long over the queries' pass as `QueriesAttention`. In
    float32 the fused kernel is the fastest of them (0.09 s against 0.12 and 0.15 s for two prompts
    of 1,000 tokens and 256 queries, a layer of LLaVA-OneVision-0.5B, one thread of an AVX-512 CPU).
    On a GPU cuDNN's attention plans for a second at every new length of prompts.
    """
    decoder = model.mllm.get_decoder()
    slow_fused = model.queries.device.type == "cpu" and model.mllm.dtype == torch.bfloat16
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(not slow_fused)
    # A model without "sdpa" attends in a way of its own, which is kept.
    is_sdpa = decoder.config._attn_implementation == "sdpa"
    if slow_fused and is_sdpa and not model.config.train_mllm:
        decoder.set_attn_implementation("queries")


# ---- Gradient checkpointing ----------------------------------------------------------------------
class Recomputed(nn.Module):
    """Stands where a layer stood: keeps only its inputs, and runs it again in the backward pass.

    Its parameters and modules are the layer's own, under the same names. A layer of the MLLM finds
    in the cache what the prompt left there, however often it runs: `run` removes what the queries
    append, since nothing reads it later. transformers' own checkpointing refuses a cache.
    """

    def __init__(self, layer, index):
        super().__init__()
        self._parameters, self._modules = layer._parameters, layer._modules
        self.layer, self.index = [layer], index  # in a list: no module of its own name

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer[0], name)

    def forward(self, *inputs, **options):
        layer, cache = self.layer[0], options.get("cache")
        if not torch.is_grad_enabled():
            return layer(*inputs, **options)
        if cache is None:
            return checkpoint(layer, *inputs, use_reentrant=False, **options)

        entry = cache.layers[self.index]
        length = entry.get_seq_length()  # prompt tokens; 0 in the first pass of a trained MLLM
        keys, values = getattr(entry, "keys", None), getattr(entry, "values", None)

        def run(*inputs, **options):
            if length:  # the queries' pass: as the prompt left it
                entry.keys, entry.values = keys, values
            elif entry.get_seq_length():  # the prompt's pass, again: on a cache of its own
                options["cache"] = DynamicCache()
                options["cache"].layers = [type(entry)() for _ in cache.layers]
            return layer(*inputs, **options)

        return checkpoint(run, *inputs, use_reentrant=False, **options)


def checkpoint_layers(model):
    """Gradient checkpointing of the queries' pass, the connector and the diffusion model."""
    model.diffusion.enable_gradient_checkpointing()
    for layers in (model.mllm.get_decoder().layers, model.connector.layers):
        for index, layer in enumerate(layers):
            layers[index] = Recomputed(layer, index)


# ---- Caches --------------------------------------------------------------------------------------
def pad_left(tensors, length):
    """Tensors (..., T, d) with T of their own, stacked: (B, ..., length, d), zeros on the left."""
    return torch.stack([F.pad(x, (0, 0, length - x.shape[-2], 0)) for x in tensors])


class KeepsPrompts(MetaQuery):
    """--cache-prompts: keeps keys, values and last states of each text prompt in memory.

    They depend on the prompt alone (§3.1: no prompt token can see a query), so each is computed
    once. They take memory: with SmolLM2-135M in bfloat16, 24 kB a token.
    """

    def read_prompt(self, inputs):
        """As MetaQuery's, for a frozen MLLM; prompts with images are computed each time."""
        if self.config.train_mllm:
            raise InputError("--cache-prompts needs a frozen MLLM: leave out --train-mllm.")
        if len(inputs) > 2:  # more than token ids and their mask: images
            return super().read_prompt(inputs)

        kept = self.__dict__.setdefault("kept_prompts", {})
        mask = inputs["attention_mask"].bool()  # (B, T), False at padding, which is on the left
        rows = zip(inputs["input_ids"], mask, strict=True)
        prompts = [tuple(ids[real].tolist()) for ids, real in rows]
        new = [i for i, prompt in enumerate(prompts) if prompt not in kept]
        if new:
            read = super().read_prompt({name: x[new] for name, x in inputs.items()})
            layers = [torch.stack([layer.keys, layer.values], 1) for layer in read.cache.layers]
            states = torch.stack(layers, 1)  # (B, layers, 2, heads, T, head size)
            for row, i in enumerate(new):
                real = slice(-len(prompts[i]), None)
                kept[prompts[i]] = states[row, ..., real, :].clone(), read.hidden[row, real].clone()

        states, hidden = zip(*(kept[prompt] for prompt in prompts), strict=True)
        states = pad_left(states, mask.shape[1])  # (B, layers, 2, heads, T, head size)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(states.permute(1, 2, 0, 3, 4, 5)):
            cache.update(keys, values, layer)
        mask = inputs["attention_mask"].to(states.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
        return Prompt(cache, pad_left(hidden, mask.shape[1]), mask, positions)


class KeepsLatents(MetaQuery):
    """--cache-latents: a folder keeps each image's latents, so that the VAE encodes it once.

    A file's name tells the weights of the VAE and the pixels, so any runs may share a folder.
    """

    def keep_latents_in(self, folder):
        """Choose the folder. Raises InputError for a VAE whose latents are random."""
        if not hasattr(self.vae.config, "encoder_block_out_channels"):
            raise InputError("--cache-latents needs Sana's VAE: another's latents are random.")
        digest = hashlib.sha256()
        for weight in self.vae.encoder.parameters():
            digest.update(weight.detach().flatten().view(torch.uint8).cpu().numpy())
        self.latents_folder = Path(folder) / digest.hexdigest()[:16]

    def encode_latents(self, pixels):
        """As MetaQuery's; a file that cannot be read is made again."""
        latents = {}
        arrays = [image.numpy() for image in pixels.cpu().contiguous()]
        names = [hashlib.sha256(array).hexdigest() for array in arrays]
        paths = [self.latents_folder / name[:3] / name for name in names]
        for i, path in enumerate(paths):
            try:
                latents[i] = torch.load(path, weights_only=True)
            except Exception:  # not there, or cut off
                continue

        new = [i for i in range(len(paths)) if i not in latents]
        if new:
            encoded = super().encode_latents(pixels[new]).to(self.vae.dtype).cpu()
            for i, x in zip(new, encoded, strict=True):
                latents[i] = x.clone()
                paths[i].parent.mkdir(parents=True, exist_ok=True)
                # torch.save refuses names that begin with a dot.
                temporary = paths[i].with_name(f"{paths[i].name}-{os.getpid()}.tmp")
                torch.save(latents[i], temporary)
                temporary.replace(paths[i])
        stacked = torch.stack([latents[i] for i in range(len(paths))])  # (B, C, h, w)
        return stacked.float().to(pixels.device)
