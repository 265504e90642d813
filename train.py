"""Train MetaQuery: every stage, in one process or with torchrun.

    python train.py --size tiny --stage pretrain --out runs/tiny
    torchrun --nproc-per-node=8 train.py --size base --out runs/base

Every field of MetaQueryConfig is a flag (--num-queries 64 --connector proj-enc ...). `--out` holds
step-00001000/ folders (weights and training state), log.jsonl, samples/step-*.png, and the latest
weights at its top, so that `sample.py --checkpoint OUT` works at any time.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser, get_cosine_with_min_lr_schedule_with_warmup

from data.layers import checkpoint_layers, choose_attention
from data.log import Log
from data.pictures import grid
from data.shapes import sample
from data.sources import (
    STOPS,
    cache_folder,
    cache_latents,
    micro_batches,
    open_batches,
    resolution_of,
)
from data.stages import STAGES, recipe
from metaquery import InputError, MetaQuery, MetaQueryConfig
from sample import stop

MIN_LR = 1e-5  # where the cosine ends (§4)
WEIGHED = ("model.safetensors", "training.pt")
# What may differ between a run and its going on; the rest would make it another run.
MAY_CHANGE = {"out", "micro_batch_size", "save_every", "keep", "sample_every", "workers", "resume",
              "checkpoint", "zero", "device", "gradient_checkpointing", "compile",
              "cache_latents"}  # fmt: skip


@dataclass
class TrainConfig:
    """What defines a run beside the model: the data, the recipe and where it is saved."""

    size: str = "tiny"
    stage: str = "pretrain"
    out: str = "runs/tiny"
    data: str = "shapes"
    text_column: str = ""
    target_column: str = ""
    sources_column: str = ""
    streaming: bool = False
    cache_latents: str = ""
    steps: int = 2400
    batch_size: int = 32
    micro_batch_size: int = 0
    lr: float = 1e-3
    warmup: int = 200
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    sample_every: int = 500
    workers: int = 0
    checkpoint: str = ""
    resume: str = "auto"
    zero: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self):
        MetaQueryConfig.preset(self.size)  # a size that is not is refused with a checkpoint too
        if self.stage not in STAGES:
            raise InputError(f"unknown stage {self.stage!r}: choose one of {', '.join(STAGES)}.")
        if self.stage in ("edit", "instruct") and not self.checkpoint:
            raise InputError(f"--stage {self.stage} goes on from a model: give --checkpoint DIR.")
        for name in ("steps", "batch_size", "save_every", "sample_every", "keep"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} is {getattr(self, name)}: it must be at least 1.")


def digest(path):
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


def save(model, optimizer, schedule, step, out, config):
    """Write out/step-N aside, sync and rename it, link its weights to the top, prune old steps.

    Raises InputError where the disk is full; the checkpoints that were there stay whole.
    """
    folder = out / f"step-{step:08d}"
    aside = out / ".step-aside"
    about = {"train": asdict(config), "model": asdict(model.config)}
    state = {"step": step, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        torch.save(state | {"random": torch.get_rng_state()}, aside / "training.pt")
        about["sha256"] = {name: digest(aside / name) for name in WEIGHED}
        (aside / "training.json").write_text(json.dumps(about, indent=2) + "\n")
        for path in (*aside.iterdir(), aside):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        for name in ("model.safetensors", "config.json"):
            (out / f".{name}").unlink(missing_ok=True)
            os.link(folder / name, out / f".{name}")
            os.replace(out / f".{name}", out / name)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        whole = ", ".join(path.name for path in sorted(out.glob("step-*"))) or "none"
        raise InputError(
            f"cannot save step {step} in {out} ({error}): free some space and run the same command "
            f"again; whole checkpoints there: {whole}."
        ) from None
    for old in sorted(out.glob("step-*"))[: -config.keep]:
        old.rename(aside)  # killed while removing it, no half of it is left among the whole ones
        shutil.rmtree(aside)


def resume(model, optimizer, schedule, out, config):
    """Go on from the newest whole step folder of `out` or the one --resume names; its step, or 0.

    Raises InputError where none of them is whole, or where the run there is another.
    """
    folders = sorted(out.glob("step-*"), reverse=True)
    if config.resume == "none" and folders:
        raise InputError(f"{out} holds checkpoints: name another --out, or remove them first.")
    if config.resume not in ("auto", "none"):
        folders = [Path(config.resume)]
    for folder in folders:
        try:
            about = json.loads((folder / "training.json").read_text())
            if about["sha256"] != {name: digest(folder / name) for name in WEIGHED}:
                raise ValueError("its weights are not those that were saved")
            state = torch.load(folder / "training.pt", weights_only=True)
            weights = load_file(folder / "model.safetensors")
            break
        except Exception as error:
            print(f"{folder} is damaged ({str(error).splitlines()[0]})", file=sys.stderr)
    else:
        if folders:
            raise InputError(f"no whole checkpoint in {out}: name another --out to start anew.")
        return 0
    now = {"train": asdict(config), "model": asdict(model.config)}
    differ = [
        f"{name} {about[part].get(name)!r} there, {value!r} here"
        for part, fields in now.items()
        for name, value in fields.items()
        if name not in MAY_CHANGE and about[part].get(name) != value
    ]
    if differ:
        raise InputError(f"{folder} is of another run ({'; '.join(differ)}): choose another --out.")
    model.load_trained(weights, folder)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"])
    return state["step"]


def draw_samples(model, stage, path):
    """Save a grid of fixed unseen cases from fixed noise, beside their pictures, if any."""
    kinds = list(STAGES[stage])
    kinds = kinds * (8 // len(kinds)) or kinds
    made = [sample(kind, i, split="test") for i, kind in enumerate(kinds)]
    prompts, images = [s.prompt for s in made], [s.images for s in made]
    generator = torch.Generator().manual_seed(0)
    pictures = model.generate(prompts, images, num_inference_steps=20, generator=generator)
    rows = zip(images, pictures, strict=True)
    shown = [picture for row, drawn in rows for picture in (*row[:1], drawn)]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(shown, 8 if any(images) else 4).save(path)


def train(config, changes):
    """Run a stage from its first step, or from where it was left, to its last.

    `changes`, a dict, replace fields of the size's MetaQueryConfig, or of the checkpoint's.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        # Started again by torchrun, a rank would find the dead ones' addresses in the shared store.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
                                 next(dist.rendezvous("env://"))[0])  # fmt: skip
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    share, rest = divmod(config.batch_size, world)
    micro = config.micro_batch_size or share
    if rest or share % micro:
        raise InputError(
            f"--batch-size {config.batch_size} does not divide into {world} processes' "
            f"micro-batches of {micro}: choose a multiple of {world * micro}."
        )
    torch.manual_seed(config.seed)
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
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": config.lr, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}
    if config.zero and world > 1:
        optimizer = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, **options)
    else:
        optimizer = torch.optim.AdamW(trained, **options)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, config.warmup, config.steps, min_lr_rate=min(1, MIN_LR / config.lr)
    )
    (out := Path(config.out)).mkdir(parents=True, exist_ok=True)
    first = resume(model, optimizer, schedule, out, config)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    side = model.diffusion.config.sample_size
    latent, kinds = (model.diffusion.config.in_channels, side, side), STAGES[config.stage]
    resolution, cache = resolution_of(model), None
    if config.cache_latents:
        cache = cache_folder(config.cache_latents, model, resolution)
    ready = partial(micro_batches, config=config, prepare=model.prepare, latent=latent,
                    resolution=resolution, cache=cache)  # fmt: skip
    loader = open_batches(config, kinds, ready, first, rank, world)
    stopping = []
    for name in STOPS:
        signal.signal(name, lambda number, frame: stopping.append(number))
    log, step, ended = Log(out, config, first, rank), first, False
    with log.bar:
        while not ended and step < config.steps:
            asked = time.time()
            batch, broken = next(loader)
            log.waited, log.broken = log.waited + time.time() - asked, log.broken + broken
            numbers = torch.zeros(3, device=device)  # loss, ranks told to stop, gradient norm
            for number, (inputs, *tensors, files) in enumerate(batch, 1):
                # From pinned memory the copies need not be waited for.
                targets, noise, sigma = (x.to(device, non_blocking=True) for x in tensors)
                if files:
                    targets = model.encode_latents(targets).contiguous()
                    cache_latents(targets, files)
                if not model.is_flow:
                    sigma = (sigma * model.scheduler.config.num_train_timesteps).ceil() - 1
                with nullcontext() if number == len(batch) or world == 1 else wrapped.no_sync():
                    with torch.autocast(device.type, torch.bfloat16):
                        loss = wrapped(inputs, targets, noise=noise, sigma=sigma)
                    (loss / len(batch)).backward()
                numbers[0] += loss.detach() / len(batch) / world
            numbers[1] = len(stopping)
            if world > 1:
                dist.all_reduce(numbers)
            numbers[2] = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            # Gradients and losses are summed over the ranks, so all skip the same steps. The fused
            # AdamW leaves all as it is where found_inf is 1; the host need not know of it yet.
            finite = numbers[::2].sum().isfinite()
            getattr(optimizer, "optim", optimizer).found_inf = (~finite).float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step += 1
            ended = log.add(step, numbers, schedule.get_last_lr()[0]) or step == config.steps
            if ended or step % config.save_every == 0:
                log.read()
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


def main():
    try:
        parser = HfArgumentParser((TrainConfig, MetaQueryConfig), description=__doc__)
        parser.error = stop
        names = [field.name for field in fields(MetaQueryConfig)]
        parser.set_defaults(**dict.fromkeys(names))
        known, rest = parser.parse_known_args()
        if rest:
            raise InputError(f"unknown flag {rest[0]}: see train.py --help.")
        changes = {name: value for name in names if (value := getattr(known, name)) is not None}
        parser.set_defaults(**recipe(known.size, known.stage))
        args = parser.parse_args()
        train(TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)}), changes)
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
