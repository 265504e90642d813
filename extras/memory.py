"""How much memory each process needs in training, planned without a GPU and without weights.

Weights, gradients and AdamW's moments follow from the numbers of parameters. For the activations a
step is run on fake tensors (torch's FakeTensorMode), which have a shape and a dtype but no values,
and the bytes of those alive are followed: what the backward pass needs, and what comes and goes.
Their sum is an upper bound, since not all of them are at their peak at once.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.batches import resolution_of
from training.attention import checkpoint_layers
from training.distributed import DTYPE, units_of

GPU = 80e9  # bytes
SPARE = 0.1  # of a GPU, for CUDA itself, NCCL's buffers and fragmentation
FULL, HALF = 4, 2  # bytes of a float32 and of a bfloat16


@dataclass
class Run:
    """How a model is trained, as far as memory depends on it."""

    processes: int = 1  # one for each GPU
    micro_batch_size: int = 8  # samples a forward pass
    accumulate: bool = True  # whether a process takes several micro-batches a step
    shard: bool = False  # as in train.py
    shard_frozen: bool = False  # as in train.py
    gradient_checkpointing: bool = False  # as in train.py
    prompt_tokens: int = 300  # T, padding included

    @property
    def is_sharded(self):
        return self.shard and self.processes > 1


@dataclass
class Plan:
    """Bytes of one process at its peak."""

    trained_weights: float  # float32
    frozen_weights: float  # bfloat16
    gradients: float  # float32
    moments: float  # AdamW's two, float32
    gathered: float  # weights and gradients of the units at work, if sharded
    fixed_activations: float  # whatever the micro-batch: autocast's copies of weights
    activations: float  # of a micro-batch

    @property
    def total(self):
        return sum(vars(self).values())

    def largest_micro_batch(self, run):
        """The most samples a forward pass that fit a GPU; 0 if none does."""
        free = (1 - SPARE) * GPU - (self.total - self.activations)
        return max(0, int(free * run.micro_batch_size / self.activations))


class PeakMemory(TorchDispatchMode):
    """Follows the bytes of the tensors that operations make: those alive now, and the most."""

    def __init__(self, model):
        super().__init__()
        self.alive, self.most = 0, 0
        self.known = weakref.WeakSet()
        for tensor in [*model.parameters(), *model.buffers()]:  # views of these are nothing new
            self.known.add(tensor.untyped_storage())
            if tensor.grad is not None:
                self.known.add(tensor.grad.untyped_storage())

    def __torch_dispatch__(self, operation, types, inputs=(), options=None):
        made = operation(*inputs, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor.untyped_storage())
        return made

    def follow(self, storage):
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.forget, size)

    def forget(self, size):
        self.alive -= size


def fake(model, trained_dtype):
    """Replace a model's tensors, on the meta device, by fake ones on the CPU, in place."""
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                dtype = trained_dtype if parameter.requires_grad else DTYPE
                tensor = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                part._parameters[name] = torch.nn.Parameter(tensor, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def loss_of(model, samples, prompt_tokens):
    """The training loss of samples without content: the same calls as MetaQuery.forward."""
    diffusion, config, n = model.diffusion, model.config, model.config.num_queries
    size = resolution_of(model)
    with torch.no_grad():
        model.vae.encode(torch.empty(samples, 3, size, size, dtype=DTYPE))
    side = diffusion.config.sample_size
    x = torch.empty(samples, diffusion.config.in_channels, side, side)
    mask = torch.ones(samples, prompt_tokens + n, dtype=torch.long)
    positions = torch.arange(prompt_tokens + n).expand(samples, -1)
    decoder = model.mllm.get_decoder()
    with nullcontext() if config.train_mllm else torch.no_grad():
        words = model.mllm.get_input_embeddings()(positions[:, :-n])
        inputs = (None, mask[:, :-n], positions[:, :-n])
        hidden, cache = decoder(*inputs, inputs_embeds=words, use_cache=True)[:2]
    if config.condition_on != "last_layer":
        queries = model.queries.to(words.dtype).expand(samples, -1, -1)
        inputs = (None, mask, positions[:, -n:], cache)
        hidden = decoder(*inputs, inputs_embeds=queries, use_cache=True)[0]
    cond = model.connector(hidden.to(model.connector.norm.weight.dtype)).to(diffusion.dtype)
    inputs = {"timestep": torch.ones(samples), "encoder_hidden_states": cond}
    return (diffusion(x.to(diffusion.dtype), **inputs).sample.float() - x).square().mean()


def peak_of_step(model, run, samples):
    """Bytes of the most tensors alive in a step of so many samples, beside weights and gradients.

    The tensors of `model`, which `sizes.meta_model` made, become fake."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake(model, DTYPE if run.is_sharded else torch.float32)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        with PeakMemory(model) as memory:
            with torch.autocast("cpu", DTYPE, enabled=not run.is_sharded):
                loss = loss_of(model, samples, run.prompt_tokens)
            loss.backward()
    return memory.most


def plan(model, run):
    """The `Plan` of a run. The tensors of `model`, which `sizes.meta_model` made, become fake."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    processes, split_frozen, gathered = 1, 0, 0
    if run.is_sharded:
        processes = run.processes
        counted, sizes, trained_in_units = set(), [], 0
        for unit in units_of(model, run.shard_frozen):
            own = [p for p in unit.parameters() if p not in counted]
            counted.update(own)
            sizes.append(sum(p.numel() for p in own))
            trained_in_units += sum(p.numel() for p in own if p.requires_grad)
        split_frozen = sum(sizes) - trained_in_units
        root = trained - trained_in_units
        # The root's weights and gradients, for the whole step; of the largest unit the weights, the
        # gradients, and these again in float32 to be summed; and the weights of the unit after it.
        gathered = (HALF + HALF) * root + (HALF + HALF + FULL + HALF) * max(sizes)
    if run.gradient_checkpointing:
        checkpoint_layers(model)
    two, four = (peak_of_step(model, run, samples) for samples in (2, 4))
    each = (four - two) / 2
    return Plan(
        trained_weights=FULL * trained / processes,
        frozen_weights=HALF * (frozen - split_frozen + split_frozen / processes),
        # Micro-batches add up to whole gradients, of which the processes then exchange the sum.
        gradients=FULL * trained / (1 if run.accumulate else processes),
        moments=2 * FULL * trained / processes,
        gathered=gathered,
        fixed_activations=max(0, two - 2 * each),
        activations=each * run.micro_batch_size,
    )
