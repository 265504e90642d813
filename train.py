r"""Train MetaQuery: every stage, in one process or with torchrun.

    python train.py --size tiny --stage pretrain --out runs/tiny
    torchrun --nproc-per-node=8 train.py --size base --micro-batch-size 16 --out runs/base
    torchrun --nproc-per-node=8 train.py --size xlarge --shard true --gradient-checkpointing true \
      --micro-batch-size 16 --out runs/xlarge

Stages: pretrain draws captions; reconstruct draws pictures again; mix does both; edit and instruct
fine-tune a --checkpoint on edits, and on prompts with pictures. Every field of MetaQueryConfig is a
flag too. `--out` holds step-00001000/ folders (weights and training state), log.jsonl,
samples/step-*.png, and the latest weights at its top, so that `sample.py --checkpoint OUT` works at
any time. The same command resumes a run. What fits a GPU: python -m extras.sizes SIZE.
"""

from training.flags import parse_flags

if __name__ == "__main__":  # --help and bad flags are answered before the slow imports
    FLAGS = parse_flags(__doc__)

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from datasets import disable_progress_bars
from transformers import get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from data.batches import Collate, open_batches
from cli import device_of, errors_in_one_line
from sample import grid, save_picture
from data.sources import open_rows
from data.stages import STAGES
from metaquery import InputError, MetaQuery, MetaQueryConfig
from toy.tasks import task
from training.checkpoint import load_weights, lock, resume, save
from training.attention import checkpoint_layers, choose_attention
from training.latents import CachedLatents
from training.log import Log
from training.prompts import CachedPrompts
from training.distributed import (
    DTYPE,
    check_batch_size,
    distribute,
    layers_of,
    open_processes,
    out_of_memory,
    precision,
    sum_gradients,
    whole,
)
from training.signals import StopSignals
from training.spikes import SpikeGuard

MIN_LR = 1e-5  # where the cosine ends (§4)


@dataclass
class TrainConfig:
    """What defines a run beside the model: the data, the recipe and where it is saved."""

    size: Literal["tiny", "base", "large", "xlarge"] = "tiny"  # the model's size
    stage: Literal["pretrain", "reconstruct", "mix", "edit", "instruct"] = "pretrain"  # see above
    out: str = "runs/tiny"  # the run's folder
    data: str = "toy"  # "toy", or hub ids and folders with weights: NAME,NAME=WEIGHT,...
    text_column: str = ""  # the dataset's column of captions, if it has another name
    target_column: str = ""  # the column of pictures to draw
    sources_column: str = ""  # the column of source pictures
    streaming: bool = False  # read datasets as they are downloaded
    steps: int = 2400  # training steps in all
    batch_size: int = 32  # samples a step, over all processes
    micro_batch_size: int = 0  # samples a forward pass, at most; 0 is a process's share
    lr: float = 1e-3  # the highest learning rate
    warmup: int = 200  # steps to reach it
    weight_decay: float = 0.01  # of matrices, not of biases, norms or queries
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    sigma_shift: float = 1.0  # above 1, high noise levels come more often; 1 is uniform
    seed: int = 0  # of the weights, the data's order and the noise
    save_every: int = 1000  # steps between checkpoints
    keep: int = 2  # checkpoints that are kept
    sample_every: int = 500  # steps between drawings of samples/
    workers: int = 0  # processes that prepare batches; 0 is in the training process
    checkpoint: str = ""  # the model to fine-tune: a folder or hub id
    resume: str = "auto"  # "auto", "none", or a step folder to resume from
    shard: bool = False  # split weights, gradients and optimizer over the processes (FSDP2)
    shard_frozen: bool = False  # with --shard: split the frozen language model too
    cache_latents: str = ""  # a folder that keeps each picture's latents, encoded once
    cache_prompts: bool = False  # keep in memory what the frozen MLLM computes of each text prompt
    gradient_checkpointing: bool = False  # less memory, more time
    compile: bool = False  # compile the connector and the diffusion model
    device: str = ""  # cpu, cuda, ...; by default cuda if there is one


def build_model(config, changes, device):
    """The model on its device, frozen parts in DTYPE, with the kernels that train fastest."""
    if config.checkpoint:
        model = MetaQuery.from_pretrained(config.checkpoint, DTYPE, **changes)
    else:
        model = MetaQuery(MetaQueryConfig.preset(config.size, **changes), DTYPE)
    choose_attention(model.to(device))
    if config.cache_latents:
        model.encode_latents = CachedLatents(model, config.cache_latents)
    if config.cache_prompts:
        model.mllm.base_model.forward = CachedPrompts(model)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    if config.compile:
        for layer in layers_of(model):
            layer.compile()
    return model


def build_optimizer(config, model):
    """AdamW and its schedule: warm-up, then a cosine to MIN_LR."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim > 1 and name != "queries"]
    others = [p for name, p in trained if p.ndim <= 1 or name == "queries"]
    parameters = [{"params": matrices, "weight_decay": config.weight_decay}]
    parameters += [{"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), fused=True)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, config.warmup, config.steps, min_lr_rate=min(1, MIN_LR / config.lr)
    )
    return optimizer, schedule


def micro_step(model, wrapped, micro, device):
    """The loss of a micro-batch, a scalar with gradient."""
    # From pinned memory the copies need not be waited for.
    targets = micro.targets.to(device, non_blocking=True)
    noise = micro.noise.to(device, non_blocking=True)
    sigma = micro.sigma.to(device, non_blocking=True)
    if not model.is_flow:  # an integer timestep of the forward process
        sigma = (sigma * model.scheduler.config.num_train_timesteps).ceil() - 1
    with precision(wrapped, device):
        return wrapped(micro.inputs, targets, noise=noise, sigma=sigma)


def skip_update(optimizer, is_bad):
    """Let the next optimizer step change nothing if `is_bad`, a boolean tensor on the device.

    Fused AdamW reads this flag on the device, so that the host never waits to learn of it; and loss
    and gradients are summed over the processes, so that all of them skip the same steps.
    """
    optimizer.found_inf = is_bad.float()


def next_batch(batches):
    """The loader's next batch; an InputError of one of its workers without their traceback."""
    try:
        return next(batches)
    except InputError as error:
        raise InputError(
            str(error).splitlines()[-1].removeprefix("metaquery.InputError: ")
        ) from None


def draw_samples(model, stage, path, rank):
    """Save a grid of fixed unseen tasks from fixed noise, beside their source pictures, if any.

    Every process draws, since each may hold a share of the weights only; the first saves.
    """
    kinds = list(STAGES[stage])
    kinds = kinds * (8 // len(kinds)) or kinds
    tasks = [task(kind, i, split="test") for i, kind in enumerate(kinds)]
    prompts, images = [t.prompt for t in tasks], [t.images for t in tasks]
    generator = torch.Generator().manual_seed(0)
    pictures = model.generate(prompts, images, num_inference_steps=20, generator=generator)
    shown = []
    for sources, picture in zip(images, pictures, strict=True):
        shown += [*sources[:1], picture]
    if rank == 0:
        save_picture(grid(shown, 8 if any(images) else 4), path)


def train(config, changes):
    """Run a stage from its first step, or from its newest checkpoint, to its last.

    `changes`, a dict, replace fields of the size's MetaQueryConfig, or of the checkpoint's.
    """
    device = device_of(config.device)
    rank, world = open_processes(device)
    check_batch_size(config, world)
    out = Path(config.out)
    rows = STAGES[config.stage] if config.data == "toy" else open_rows(config, config.seed)
    torch.manual_seed(config.seed)
    model = build_model(config, changes, device)
    locked = lock(out) if rank == 0 else None  # until this function returns
    saved = load_weights(model, out, config)
    wrapped = distribute(model, config, world, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = build_optimizer(config, model)
    guard = SpikeGuard(device)
    first = resume(saved, model, optimizer, schedule, guard) if saved else 0
    batches = open_batches(config, rows, Collate(model, config), first, rank, world)
    signals = StopSignals()
    log = Log(out, config, first, rank)
    step, ended = first, False

    with log.bar:
        while not ended and step < config.steps:
            # 1. This process's share of the batch
            signals.waiting_since = time.time()
            batch = next_batch(batches)
            log.waited += time.time() - signals.waiting_since
            signals.waiting_since = None
            log.skipped_samples += batch.skipped

            # 2. Loss and gradient of each micro-batch; the processes' are summed after the last
            loss = torch.zeros((), device=device)
            for number, micro in enumerate(batch.micro_batches, 1):
                sum_gradients(wrapped, number == len(batch.micro_batches))
                micro_loss = micro_step(model, wrapped, micro, device)
                (micro_loss / len(batch.micro_batches)).backward()
                loss += micro_loss.detach() / len(batch.micro_batches) / world

            # 3. What all processes must agree on: the mean loss, and whether one was told to stop
            stop_votes = torch.tensor(float(len(signals.received)), device=device)
            if world > 1:
                dist.all_reduce(loss)
                dist.all_reduce(stop_votes)

            # 4. Update
            grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
            skipped = guard.is_bad(loss, grad_norm)
            skip_update(optimizer, skipped)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step += 1

            # 5. Log, one step late, and decide whether to end
            lr = schedule.get_last_lr()[0]
            told_to_stop = log.push(step, loss, stop_votes, grad_norm, skipped, lr)
            ended = told_to_stop or step == config.steps

            # 6. Save, and draw some samples
            if ended or step % config.save_every == 0:
                log.flush()
                save(model, optimizer, schedule, guard, step, out, config, rank)
            if ended or step % config.sample_every == 0:
                path = out / "samples" / f"step-{step:08d}.png"
                draw_samples(model, config.stage, path, rank)
    if rank == 0:
        locked.close()
        print(f"saved {out} at step {step}")
    if world > 1:
        dist.destroy_process_group()


def main(flags=None):
    settings, changes = flags or parse_flags(__doc__)
    config = TrainConfig(**settings)
    if config.steps <= config.warmup and int(os.environ.get("RANK", 0)) == 0:
        short = f"--steps {config.steps} is no more than --warmup {config.warmup}"
        print(f"warning: {short}: the learning rate never reaches --lr.", file=sys.stderr)
    if not sys.stderr.isatty():  # the bars of loading are for eyes, not for files
        disable_progress_bar()
        disable_progress_bars()
    with errors_in_one_line():
        try:
            train(config, changes)
        except torch.OutOfMemoryError:
            raise InputError(out_of_memory(config)) from None
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader would raise at their end
            for worker in multiprocessing.active_children():
                worker.kill()  # they ignore every other signal


if __name__ == "__main__":
    main(FLAGS)
