"""How layers are run in training: queries' attention on a CPU, and again in the backward pass."""

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import softmax_backward_data

PIECE = 512  # tokens that a frozen MLP takes at once where memory is to be spared


class QueriesAttention(torch.autograd.Function):
    """Attention that makes no gradients of the prompt's keys and values, which nobody needs (§3.1).

    q (B, G, R, d), in R the N queries of each head of a group; k and v (B, G, L + N, d), of the
    prompt and then of the queries; mask (B, 1, N, L + N), added to the scores. Exact.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask):
        scores = q @ k.mT
        scores.unflatten(2, (-1, mask.shape[2])).add_(mask[:, None])
        weights = scores.softmax(-1)
        ctx.own, ctx.dim = mask.shape[2], -1
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx, grad):
        (q, k, v, weights), own = ctx.saved_tensors, slice(-ctx.own, None)
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        to_v[:, :, own] = weights[..., own].mT @ grad
        for group in range(k.shape[1]):  # one at a time, to spare memory
            at = (slice(None), group)
            to_scores = softmax_backward_data(ctx, grad[at] @ v[at].mT, weights[at])
            to_q[at] = to_scores @ k[at]
            to_k[at][:, own] = to_scores[..., own].mT @ q[at]
        return to_q, to_k, to_v, None


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


transformers.AttentionInterface.register("queries", attend)
transformers.AttentionMaskInterface.register("queries", sdpa_mask)


def choose_kernels(device):
    """Choose the library's attention kernels that train fastest on a device.

    On a CPU the fused kernel's backward pass is slower than the plain one's; on a GPU cuDNN's
    would plan anew, for a second, at every new length of prompts.
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
    # A model that has no "sdpa" attends in some way of its own.
    if on_cpu and not model.config.train_mllm and decoder.config._attn_implementation == "sdpa":
        decoder.set_attn_implementation("queries")


def checkpoint_layers(model):
    """Run layers of the queries' pass, the connector and the diffusion model again in the backward.

    The queries' pass leaves the prompt's keys and values as they were, so that it can run again.
    The MLLM's MLPs take a long prompt piece by piece.
    """

    def again(forward, index):
        def once(*inputs, past_key_values, **options):
            kept = past_key_values.layers[index]
            before = kept.keys, kept.values
            try:
                return forward(*inputs, past_key_values=past_key_values, **options)
            finally:  # running again ends by an exception, as soon as all that is needed is there
                kept.keys, kept.values = before

        def run(*inputs, **options):
            if not torch.is_grad_enabled():
                return forward(*inputs, **options)
            chosen = once if options.get("past_key_values") is not None else forward
            return checkpoint(chosen, *inputs, use_reentrant=False, **options)

        return run

    def pieces(forward):
        return lambda x: torch.cat([forward(piece) for piece in x.split(PIECE, 1)], 1)

    model.diffusion.enable_gradient_checkpointing()
    decoder = model.mllm.get_decoder().layers
    for layer in decoder:
        layer.mlp.forward = pieces(layer.mlp.forward)
    for layers in (model.connector.layers, decoder):
        for index, layer in enumerate(layers):
            layer.forward = again(layer.forward, index)
