"""Several processes: each holds the whole model (DDP), or with --shard a share of it (FSDP2).

Sharded, a process keeps its share of every trained weight, of its gradient and of AdamW's moments,
all in float32. A unit's weights are gathered just before it runs, and freed after it: each layer of
the connector and of the diffusion model is a unit, and the root holds the rest. A trained MLLM is
in the root as a whole: gradient reaches its layers through the cached keys and values as well,
where FSDP would not gather their weights again.
With --shard-frozen the layers of frozen models are sharded too, but not the vision tower: a process
whose prompts have no image would not take part in gathering it, and the others would wait.

Unsharded, autocast chooses the dtype operation by operation; sharded, a unit's weights are gathered
in it. Gradients are summed over the processes in float32.
"""

import os
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from metaquery import InputError


def open_processes(device):
    """(rank, number of processes); joins the other processes of torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # After a restart the shared store still holds the dead processes' addresses: use a prefix.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(restarts, next(dist.rendezvous("env://"))[0])
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return rank, world


def check_batch_size(batch_size, micro_batch_size, world):
    """Raise InputError if the batch does not divide into the processes' micro-batches."""
    share = max(1, batch_size // world)
    micro = min(micro_batch_size or 1, share)
    if batch_size % (world * micro):
        raise InputError(
            f"--batch-size {batch_size} does not divide into {world} processes' "
            f"micro-batches of {micro}: choose a multiple of {world * micro}."
        )


def layers_of(model):
    """The layers of a MetaQuery's connector and diffusion model, a list."""
    diffusion = model.diffusion
    if hasattr(diffusion, "transformer_blocks"):
        return [*model.connector.layers, *diffusion.transformer_blocks]
    blocks = [*diffusion.down_blocks, diffusion.mid_block, *diffusion.up_blocks]  # a UNet's
    return [*model.connector.layers, *blocks]


def units_of(model, shard_frozen):
    """The modules of a MetaQuery whose weights are gathered together, inner ones first, a list."""
    units = layers_of(model)
    if shard_frozen and not model.config.train_mllm:
        decoder, embeddings = model.mllm.get_decoder(), model.mllm.get_input_embeddings()
        units += [*decoder.layers, embeddings, decoder]
        head = model.mllm.get_output_embeddings()
        if head.weight is not embeddings.weight:
            units.append(head)

    return [u for u in units if shard_frozen or any(p.requires_grad for p in u.parameters())]


def shard(model, device, dtype, shard_frozen=False):
    """Shard a MetaQuery over all processes, in place: its trained weights, and if `shard_frozen`
    its frozen language model. Every process must hold the same weights."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Inputs stay in float32: bfloat16 would round the noise and its level.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    head, embeddings = model.mllm.get_output_embeddings(), model.mllm.get_input_embeddings()
    units = units_of(model, shard_frozen)
    is_shared = head.weight is embeddings.weight and embeddings in units

    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)

    # The root holds the rest of what is trained; frozen weights outside of units stay unsharded.
    # The root too is resharded after the forward pass, so no stale copy survives an update.
    unsharded = {
        p for p in model.parameters() if not p.requires_grad and not isinstance(p, DTensor)
    }
    if is_shared:
        unsharded.add(head.weight)
    options = {"reshard_after_forward": True, "ignored_params": unsharded}
    fully_shard(model, mesh=mesh, mp_policy=policy, **options)

    if is_shared:
        head.weight = embeddings.weight
    register_fsdp_forward_method(model, "generate")


def distribute(model, device, dtype, world, sharded=False, shard_frozen=False, stage="pretrain"):
    """The model as the training step calls it: itself, in DDP, or itself sharded.

    Raises InputError if it cannot be sharded.
    """
    if world == 1:
        if sharded:
            print("warning: --shard has no effect in one process: use torchrun.", file=sys.stderr)
        return model

    if sharded and model.config.train_mllm and stage != "pretrain":
        # A process whose prompts have no image has no gradient of the vision tower to sum.
        fix = "use --stage pretrain, or leave out --shard"
        raise InputError(f"--shard with --train-mllm takes prompts without images only: {fix}.")
    if sharded:
        shard(model, device, dtype, shard_frozen)
        return model

    # A trained MLLM has parts without a gradient: its head, and without images the vision tower.
    unused = model.config.train_mllm
    return DistributedDataParallel(
        model, gradient_as_bucket_view=True, find_unused_parameters=unused
    )


def precision(wrapped, device, dtype):
    """The context of a forward pass: autocast, unless weights are gathered in `dtype` already, or
    it is float32, in which the weights are."""
    if dtype == torch.float32 or isinstance(wrapped, FSDPModule):
        return nullcontext()
    return torch.autocast(device.type, dtype)


def sum_gradients(wrapped, enabled):
    """Choose whether the next backward pass sums the gradients over the processes."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(enabled)
    elif isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = enabled


def whole(tensor):
    """A sharded tensor, gathered by all processes; any other as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def gather(value, world):
    """The list of all processes' values, small Python objects, by rank."""
    values = [value]
    if world > 1:
        values = [None] * world
        dist.all_gather_object(values, value)
    return values


def out_of_memory(batch_size, micro_batch_size):
    """The line that a process ends with when it is out of memory: what to try."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = batch_size // world
    micro = micro_batch_size or share
    smaller = [n for n in range(1, micro // 2 + 1) if share % n == 0]
    fix = "try "
    if smaller:
        fix += f"--micro-batch-size {smaller[-1]} (now {micro}), "
    fix += "--gradient-checkpointing true, or --shard true with more processes"
    return f"out of memory in process {rank}: {fix}; python -m extras.sizes shows what fits."
