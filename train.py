"""Train MetaQuery: every stage, in one process or with torchrun.

    python train.py --size tiny --stage pretrain --out runs/tiny
    torchrun --nproc-per-node=8 train.py --size base --out runs/base

Stages: pretrain draws captions; reconstruct draws pictures again; mix does both; edit and instruct
fine-tune a --checkpoint on edits, and on prompts with pictures. Every field of MetaQueryConfig is a
flag too. `--out` holds step-00001000/ folders (weights and training state), log.jsonl,
samples/step-*.png, and the latest weights at its top, so that `sample.py --checkpoint OUT` works at
any time. The same command resumes a run.
"""

from training.flags import parse_flags

if __name__ == "__main__":  # --help and bad flags are answered before the slow imports
    FLAGS = parse_flags(__doc__)

import multiprocessing
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from datasets import disable_progress_bars
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from data.batches import Collate, open_batches
from data.command_line import device_of, errors_in_one_line
from data.pictures import grid, save_picture
from data.sources import open_rows
from data.stages import STAGES
from metaquery import InputError, MetaQuery, MetaQueryConfig
from toy.tasks import task
from training.checkpoint import lock, resume, save
from training.kernels import checkpoint_layers, choose_attention
from training.log import Delayed, Log
from training.signals import StopSignals
from training.spikes import SpikeGuard

MIN_LR = 1e-5  # where the cosine ends (§4)
MAX_BAD_STEPS = 10  # skipped steps in a row that end a run


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
    micro_batch_size: int = 0  # samples a forward pass; 0 is a process's whole share
    lr: float = 1e-3  # the highest learning rate
    warmup: int = 200  # steps to reach it
    weight_decay: float = 0.01  # of matrices, not of biases, norms or queries
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    seed: int = 0  # of the weights, the data's order and the noise
    save_every: int = 1000  # steps between checkpoints
    keep: int = 2  # checkpoints that are kept
    sample_every: int = 500  # steps between drawings of samples/
    workers: int = 0  # processes that prepare batches; 0 is in the training process
    checkpoint: str = ""  # the model to fine-tune: a folder or hub id
    resume: str = "auto"  # "auto", "none", or a step folder to resume from
    zero: bool = False  # shard the optimizer's state over the processes
    gradient_checkpointing: bool = False  # less memory, more time
    compile: bool = False  # compile the connector and the diffusion model
    device: str = ""  # cpu, cuda, ...; by default cuda if there is one


def open_processes(config):
    """(rank, number of processes, device); joins the other processes of torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = device_of(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # After a restart the shared store still holds the dead processes' addresses: use a prefix.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(restarts, next(dist.rendezvous("env://"))[0])
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return rank, world, device


def check_batch_size(config, world):
    """Raise InputError if the batch does not divide into the processes' micro-batches."""
    share, rest = divmod(config.batch_size, world)
    micro = config.micro_batch_size or share
    if rest or share % micro:
        raise InputError(
            f"--batch-size {config.batch_size} does not divide into {world} processes' "
            f"micro-batches of {micro}: choose a multiple of {world * micro}."
        )


def build_model(config, changes, device):
    """The model on its device, frozen parts in bfloat16, with the kernels that train fastest."""
    if config.checkpoint:
        model = MetaQuery.from_pretrained(config.checkpoint, torch.bfloat16, **changes)
    else:
        model = MetaQuery(MetaQueryConfig.preset(config.size, **changes), torch.bfloat16)
    choose_attention(model.to(device))
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    if config.compile:
        model.diffusion.compile()
        model.connector.compile()
    return model


def build_optimizer(config, model, world):
    """AdamW and its schedule: warm-up, then a cosine to MIN_LR."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim > 1 and name != "queries"]
    others = [p for name, p in trained if p.ndim <= 1 or name == "queries"]
    parameters = [{"params": matrices, "weight_decay": config.weight_decay}]
    parameters += [{"params": others, "weight_decay": 0.0}]
    options = {"lr": config.lr, "betas": (0.9, 0.95), "fused": True}
    if config.zero and world > 1:
        optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **options)
    else:
        optimizer = torch.optim.AdamW(parameters, **options)
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
    with torch.autocast(device.type, torch.bfloat16):
        return wrapped(micro.inputs, targets, noise=noise, sigma=sigma)


def skip_update(optimizer, is_bad):
    """Let the next optimizer step change nothing if `is_bad`, a boolean tensor on the device.

    Fused AdamW reads this flag on the device, so that the host never waits to learn of it; and loss
    and gradients are summed over the processes, so that all of them skip the same steps.
    """
    getattr(optimizer, "optim", optimizer).found_inf = is_bad.float()


def next_batch(batches):
    """The loader's next batch; an InputError of one of its workers without their traceback."""
    try:
        return next(batches)
    except InputError as error:
        raise InputError(
            str(error).splitlines()[-1].removeprefix("metaquery.InputError: ")
        ) from None


def draw_samples(model, stage, path):
    """Save a grid of fixed unseen tasks from fixed noise, beside their source pictures, if any."""
    kinds = list(STAGES[stage])
    kinds = kinds * (8 // len(kinds)) or kinds
    tasks = [task(kind, i, split="test") for i, kind in enumerate(kinds)]
    prompts, images = [t.prompt for t in tasks], [t.images for t in tasks]
    generator = torch.Generator().manual_seed(0)
    pictures = model.generate(prompts, images, num_inference_steps=20, generator=generator)
    shown = []
    for sources, picture in zip(images, pictures, strict=True):
        shown += [*sources[:1], picture]
    save_picture(grid(shown, 8 if any(images) else 4), path)


def train(config, changes):
    """Run a stage from its first step, or from its newest checkpoint, to its last.

    `changes`, a dict, replace fields of the size's MetaQueryConfig, or of the checkpoint's.
    """
    rank, world, device = open_processes(config)
    check_batch_size(config, world)
    torch.manual_seed(config.seed)
    model = build_model(config, changes, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = build_optimizer(config, model, world)
    guard = SpikeGuard(device)
    is_toy = config.data == "toy"
    rows = STAGES[config.stage] if is_toy else open_rows(config, config.seed)
    out = Path(config.out)
    locked = lock(out) if rank == 0 else None  # until this function returns
    first = resume(model, optimizer, schedule, guard, out, config)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    batches = open_batches(config, rows, Collate(model, config), first, rank, world)
    signals = StopSignals()
    log, delayed = Log(out, config, first, rank), Delayed()
    step, ended, bad_steps = first, False, 0

    def finish(result):
        """Log a step's result; whether to end. Raises InputError after too many bad steps."""
        nonlocal bad_steps
        if result is None:
            return False
        log.write(result)
        bad_steps = bad_steps + 1 if result.skipped else 0
        if bad_steps == MAX_BAD_STEPS:
            newest = max(out.glob("step-*"), default="none")
            raise InputError(
                f"loss or gradient was not finite, or a spike, {bad_steps} times in a row, up to "
                f"step {result.step}: lower --lr or check the data; last checkpoint: {newest}."
            )
        return result.stop_votes > 0

    with log.bar:
        while not ended and step < config.steps:
            # 1. This process's share of the batch
            signals.waiting_since = time.time()
            batch = next_batch(batches)
            log.waited += time.time() - signals.waiting_since
            signals.waiting_since = None
            log.skipped_samples += batch.skipped

            # 2. Loss and gradient, summed over the micro-batches; processes exchange the last sum
            loss = torch.zeros((), device=device)
            for number, micro in enumerate(batch.micro_batches, 1):
                is_last = number == len(batch.micro_batches)
                with nullcontext() if is_last or world == 1 else wrapped.no_sync():
                    micro_loss = micro_step(model, wrapped, micro, device)
                    (micro_loss / len(batch.micro_batches)).backward()
                loss += micro_loss.detach() / len(batch.micro_batches) / world

            # 3. What all processes must agree on: the mean loss, and whether one was told to stop
            stop_votes = torch.tensor(float(len(signals.received)), device=device)
            if world > 1:
                dist.all_reduce(loss)
                dist.all_reduce(stop_votes)

            # 4. Update
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            skipped = guard.is_bad(loss, grad_norm)
            skip_update(optimizer, skipped)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step += 1

            # 5. Log, one step late, and decide whether to end
            lr = schedule.get_last_lr()[0]
            before = delayed.push(step, loss, stop_votes, grad_norm, skipped, lr)
            ended = finish(before) or step == config.steps

            # 6. Save, and draw some samples
            if ended or step % config.save_every == 0:
                finish(delayed.pop())
                if config.zero and world > 1:
                    optimizer.consolidate_state_dict(0)
                if rank == 0:
                    save(model, optimizer, schedule, guard, step, out, config)
            if rank == 0 and (ended or step % config.sample_every == 0):
                draw_samples(model, config.stage, out / "samples" / f"step-{step:08d}.png")
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
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader would raise at their end
            for worker in multiprocessing.active_children():
                worker.kill()  # they ignore every other signal


if __name__ == "__main__":
    main(FLAGS)
