"""How layers are run in training: attention of the queries on a CPU, and gradient checkpointing.

The results are those of the plain model; only time and memory differ.
"""

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PIECE = 512  # tokens that a frozen MLP takes at once, to save memory


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
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
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


# The library's models find it under this name.
transformers.AttentionInterface.register("queries", attend)
transformers.AttentionMaskInterface.register("queries", sdpa_mask)


def choose_kernels(device):
    """Choose the library's attention kernels that train fastest on a device.

    On a CPU the fused kernel's backward pass is slower than the plain one's. On a GPU cuDNN's
    plans for a second at every new length of prompts.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")


def choose_attention(model):
    """Choose the attention that trains fastest on the model's device.

    On a CPU the library's takes two to four times as long over the queries' pass as
    `QueriesAttention`.
    """
    choose_kernels(model.queries.device)
    on_cpu, decoder = model.queries.device.type == "cpu", model.mllm.get_decoder()
    # A model without "sdpa" attends in a way of its own, which is kept.
    if on_cpu and not model.config.train_mllm and decoder.config._attn_implementation == "sdpa":
        decoder.set_attn_implementation("queries")


class Recomputed:
    """A layer's `forward` that keeps only its inputs and runs again in the backward pass."""

    def __init__(self, forward, index):
        self.forward, self.index = forward, index

    def __call__(self, *inputs, **options):
        if not torch.is_grad_enabled():
            return self.forward(*inputs, **options)
        cache = options.get("cache")
        run = self.forward if cache is None else self.from_cache(cache.layers[self.index])
        return checkpoint(run, *inputs, use_reentrant=False, **options)

    def from_cache(self, own):
        """A `forward` that finds the layer's cache as it is now, however often it runs.

        What it appends is dropped again: of the queries nothing is read later. Only the first run
        over a prompt, of an MLLM that is trained too, leaves its keys and values for the queries.
        """
        begin = dict(vars(own))

        def run(*inputs, **options):
            entry = dict(vars(own))
            vars(own).update(begin)
            try:
                return self.forward(*inputs, **options)
            finally:  # recomputing ends by an exception once all that is needed is there
                if begin["is_initialized"] or entry["is_initialized"]:
                    vars(own).update(entry)

        return run


class InPieces:
    """An MLP's `forward` that takes a long prompt PIECE tokens at a time."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, x):
        return torch.cat([self.forward(piece) for piece in x.split(PIECE, 1)], 1)


def checkpoint_layers(model):
    """Gradient checkpointing of the queries' pass, the connector and the diffusion model.

    The queries' pass leaves the prompt's keys and values as they were, so that it can run again;
    transformers' own checkpointing refuses a cache. Called twice, it changes nothing more.
    """
    model.diffusion.enable_gradient_checkpointing()
    decoder_layers = model.mllm.get_decoder().layers
    if isinstance(decoder_layers[0].forward, Recomputed):
        return
    for layer in decoder_layers:
        layer.mlp.forward = InPieces(layer.mlp.forward)
    for layers in (decoder_layers, model.connector.layers):
        for index, layer in enumerate(layers):
            layer.forward = Recomputed(layer.forward, index)
