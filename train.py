"""Train MetaQuery: every stage, in one process or with torchrun.

    python train.py --size tiny --stage pretrain --out runs/tiny
    torchrun --nproc-per-node=8 train.py --size base --out runs/base

Every field of MetaQueryConfig is a flag (--num-queries 64 --connector proj-enc ...). `--out` holds
step-00001000/ folders (weights and training state), log.jsonl, samples/step-*.png, and the latest
weights at its top, so that `sample.py --checkpoint OUT` works at any time. The same command resumes
a run.
"""

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser, get_cosine_with_min_lr_schedule_with_warmup

from data.batches import STOP_SIGNALS, Collate, open_batches
from data.command_line import stop
from data.pictures import grid
from data.stages import NEEDS_CHECKPOINT, STAGES, recipe
from metaquery import InputError, MetaQuery, MetaQueryConfig
from toy.tasks import task
from training.checkpoint import resume, save
from training.kernels import checkpoint_layers, choose_attention
from training.log import Delayed, Log

MIN_LR = 1e-5  # where the cosine ends (§4)
MAX_GRAD_NORM = 1.0
MAX_BAD_STEPS = 10  # steps in a row without finite loss or gradient that end a run


@dataclass
class TrainConfig:
    """What defines a run beside the model: the data, the recipe and where it is saved."""

    size: str = "tiny"  # tiny, base, large or xlarge
    stage: str = "pretrain"  # pretrain, reconstruct, mix, edit or instruct
    out: str = "runs/tiny"  # the run's folder
    data: str = "toy"  # "toy", or hub ids and folders with weights: NAME,NAME=WEIGHT,...
    text_column: str = ""  # the dataset's column of captions, if it has another name
    target_column: str = ""  # of pictures to draw
    sources_column: str = ""  # of source pictures
    streaming: bool = False  # read datasets as they are downloaded
    steps: int = 2400
    batch_size: int = 32  # samples a step, over all processes
    micro_batch_size: int = 0  # samples a forward pass; 0 is a process's whole share
    lr: float = 1e-3  # the highest learning rate
    warmup: int = 200  # steps to reach it
    seed: int = 0
    save_every: int = 1000  # steps
    keep: int = 2  # checkpoints that are kept
    sample_every: int = 500  # steps between drawings of samples/
    workers: int = 0  # processes that prepare batches; 0 is in the training process
    checkpoint: str = ""  # the model to fine-tune: a folder or hub id
    resume: str = "auto"  # "auto", "none", or a step folder to resume from
    zero: bool = False  # shard the optimizer's state over the processes
    gradient_checkpointing: bool = False  # less memory, more time
    compile: bool = False  # compile the connector and the diffusion model
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self):
        MetaQueryConfig.preset(self.size)  # refuses an unknown size, also with --checkpoint
        if self.stage not in STAGES:
            raise InputError(f"unknown stage {self.stage!r}: choose one of {', '.join(STAGES)}.")
        if self.stage in NEEDS_CHECKPOINT and not self.checkpoint:
            raise InputError(f"--stage {self.stage} fine-tunes a model: give --checkpoint DIR.")
        for name in ("steps", "batch_size", "save_every", "sample_every", "keep"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} is {getattr(self, name)}: it must be at least 1.")


def open_processes(config):
    """(rank, number of processes, device); joins the other processes of torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
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


def build_optimizer(config, parameters, world):
    """AdamW and its schedule: warm-up, then a cosine to MIN_LR."""
    options = {"lr": config.lr, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}
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
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(shown, 8 if any(images) else 4).save(path)


def train(config, changes):
    """Run a stage from its first step, or from its newest checkpoint, to its last.

    `changes`, a dict, replace fields of the size's MetaQueryConfig, or of the checkpoint's.
    """
    rank, world, device = open_processes(config)
    check_batch_size(config, world)
    torch.manual_seed(config.seed)
    model = build_model(config, changes, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = build_optimizer(config, parameters, world)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    first = resume(model, optimizer, schedule, out, config)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    kinds = STAGES[config.stage]
    batches = open_batches(config, kinds, Collate(model, config), first, rank, world)
    signals = []
    for name in STOP_SIGNALS:
        signal.signal(name, lambda number, frame: signals.append(number))
    log, delayed = Log(out, config, first, rank), Delayed()
    step, ended, bad_steps = first, False, 0

    def finish(result):
        """Log a step's result; whether to end. Raises InputError after too many bad steps."""
        nonlocal bad_steps
        if result is None:
            return False
        log.write(result)
        bad_steps = 0 if result.is_finite else bad_steps + 1
        if bad_steps == MAX_BAD_STEPS:
            newest = max(out.glob("step-*"), default="none")
            raise InputError(
                f"loss or gradient was not finite {bad_steps} times in a row, up to step "
                f"{result.step}: lower --lr or check the data; the last checkpoint is {newest}."
            )
        return result.stop_votes > 0

    with log.bar:
        while not ended and step < config.steps:
            # 1. This process's share of the batch
            asked = time.time()
            batch = next(batches)
            log.waited += time.time() - asked
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
            stop_votes = torch.tensor(float(len(signals)), device=device)
            if world > 1:
                dist.all_reduce(loss)
                dist.all_reduce(stop_votes)

            # 4. Update
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            skip_update(optimizer, ~(loss + grad_norm).isfinite())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step += 1

            # 5. Log, one step late, and decide whether to end
            before = delayed.push(step, loss, stop_votes, grad_norm, schedule.get_last_lr()[0])
            ended = finish(before) or step == config.steps

            # 6. Save, and draw some samples
            if ended or step % config.save_every == 0:
                finish(delayed.pop())
                if config.zero and world > 1:
                    optimizer.consolidate_state_dict(0)
                if rank == 0:
                    save(model, optimizer, schedule, step, out, config)
            if rank == 0 and (ended or step % config.sample_every == 0):
                draw_samples(model, config.stage, out / "samples" / f"step-{step:08d}.png")
    if rank == 0:
        print(f"saved {out} at step {step}")
    if world > 1:
        dist.destroy_process_group()


def parse_flags():
    """(TrainConfig, changed fields of MetaQueryConfig): flags, over the stage's recipe."""
    parser = HfArgumentParser((TrainConfig, MetaQueryConfig), description=__doc__)
    parser.error = stop
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    model_fields = [field.name for field in fields(MetaQueryConfig)]
    for action in parser._actions:
        action.required = False  # the size names the parts
    parser.set_defaults(**dict.fromkeys([*defaults, *model_fields]))
    flags, unknown = parser.parse_known_args()
    if unknown:
        raise InputError(f"unknown flag {unknown[0]}: see train.py --help.")
    given = {name: value for name, value in vars(flags).items() if value is not None}
    changes = {name: value for name, value in given.items() if name in model_fields}
    chosen = {name: value for name, value in given.items() if name in defaults}
    size, stage = chosen.get("size", defaults["size"]), chosen.get("stage", defaults["stage"])
    return TrainConfig(**(recipe(size, stage) | chosen)), changes


def main():
    try:
        train(*parse_flags())
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
