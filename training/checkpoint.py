"""Checkpoints of a training run: saved atomically, verified by SHA-256, resumed bit for bit.

A run's folder holds step-00001000/ folders, the newest `keep` of them, each with

    model.safetensors, config.json   what was trained, for MetaQuery.from_pretrained
    training.pt                      step, optimizer, schedule and random state
    training.json                    the run's settings, and the SHA-256 of the two large files

and links to the newest weights at its top, so that `sample.py --checkpoint OUT` works at any time.
A checkpoint is written to a folder aside, synced and renamed: killed at any moment, a run leaves
complete checkpoints only. The same command resumes from the newest that is not corrupt; on a CPU
the resumed run ends with the same bits. SIGTERM, SIGUSR1 and Ctrl-C let a run finish its step, save
and end well, for example on a SLURM cluster:

    #SBATCH --nodes=4 --gpus-per-node=8 --ntasks-per-node=1 --signal=USR1@300 --requeue
    srun torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d \\
      --rdzv-endpoint=$(scontrol show hostnames | head -1):29500 \\
      --max-restarts=3 train.py --size base --out runs/base
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from metaquery import InputError, portable, save_checkpoint
from training.distributed import whole

VERIFIED = ("model.safetensors", "training.pt")
# The optimizer's state is saved whole, by the parameters' names: any number of processes can read
# it, sharded or not.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# Settings that may differ when a run is resumed. Any other would make it another run.
MAY_CHANGE = {
    "out",
    "micro_batch_size",
    "save_every",
    "keep",
    "sample_every",
    "workers",
    "resume",
    "checkpoint",
    "image_guidance",
    "shard",
    "shard_frozen",
    "cache_latents",
    "device",
    "gradient_checkpointing",
    "compile",
}


def sha256(path):
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


def sync(path):
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def settings_of(config, model):
    """What defines a run, as JSON."""
    return {"train": asdict(config), "model": portable(model.config, config.out)}


def lock(out):
    """Make a run's folder and keep every other run out of it; returns the open lock file.

    Raises InputError if a run is using it. The lock ends with the process, however that ends.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "run.lock", "a")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN) and (out / "run.lock").exists():
            raise InputError(f"a run is using {out}: wait for it, or name another --out.") from None
        raise
    return file


def save(model, optimizer, schedule, guard, step, out, config, rank):
    """Save a step's checkpoint in `out`, link its weights to the top and remove old ones.

    Every process takes part, since each may hold a share only; the first writes. Raises InputError
    if the disk is full; the checkpoints that were there stay complete.
    """
    weights = {}
    for name, weight in model.trained_state_dict().items():
        weight = whole(weight)  # one at a time: all of them may not fit the device
        if rank == 0:
            weights[name] = weight.cpu()
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if rank > 0:
        return
    folder = out / f"step-{step:08d}"
    aside = out / ".step-aside"
    state = {
        "step": step,
        "optimizer": optimizer_state,
        "schedule": schedule.state_dict(),
        "random": torch.get_rng_state(),
        "means": guard.means.cpu(),
    }
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_checkpoint(model.config, weights, aside)
        torch.save(state, aside / "training.pt")
        settings = settings_of(config, model)
        settings["sha256"] = {name: sha256(aside / name) for name in VERIFIED}
        (aside / "training.json").write_text(json.dumps(settings, indent=2) + "\n")
        for path in (*aside.iterdir(), aside):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        for name in ("model.safetensors", "config.json"):
            (out / f".{name}").unlink(missing_ok=True)
            os.link(folder / name, out / f".{name}")
            os.replace(out / f".{name}", out / name)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        complete = ", ".join(path.name for path in sorted(out.glob("step-*"))) or "none"
        raise InputError(
            f"cannot save step {step} in {out} ({error}): free some space and run the same command "
            f"again; complete checkpoints there: {complete}."
        ) from None
    for old in sorted(out.glob("step-*"))[: -config.keep]:
        old.rename(aside)  # so that a kill leaves no half of it among the complete ones
        shutil.rmtree(aside)


def read(folder):
    """(settings, training state, weights) of a step folder; raises if it is corrupt."""
    settings = json.loads((folder / "training.json").read_text())
    if settings["sha256"] != {name: sha256(folder / name) for name in VERIFIED}:
        raise ValueError("its weights are not those that were saved")
    # Mapped, not read: the processes of a machine share the pages, and each needs only its share.
    state = torch.load(folder / "training.pt", weights_only=True, mmap=True)
    return settings, state, load_file(folder / "model.safetensors")


def load_weights(model, out, config):
    """Load the newest complete checkpoint of `out`, or the one of --resume, into a whole model.

    Returns its training state, for `resume`, or None if there is none. Raises InputError if all are
    corrupt, or belong to a run with other settings.
    """
    folders = sorted(out.glob("step-*"), reverse=True)
    if config.resume == "none" and folders:
        raise InputError(f"{out} holds checkpoints: name another --out, or remove them first.")
    if config.resume not in ("auto", "none"):
        folders = [Path(config.resume)]
    if not folders:
        return None
    for folder in folders:
        try:
            settings, state, weights = read(folder)
            break
        except Exception as error:
            print(f"{folder} is corrupt ({str(error).splitlines()[0]})", file=sys.stderr)
    else:
        raise InputError(f"no complete checkpoint in {out}: name another --out to start again.")
    different = {
        name: f"{name} {settings[part].get(name)!r} there, {value!r} here"
        for part, values in settings_of(config, model).items()
        for name, value in values.items()
        if name not in MAY_CHANGE and settings[part].get(name) != value
    }
    if list(different) == ["steps"]:
        raise InputError(
            f"{folder} is of a run planned for {settings['train']['steps']} steps, which its "
            f"learning rate follows: to train on, start a new run: --checkpoint {out} --out OTHER."
        )
    if different:
        reason = f"{folder} is of another run ({'; '.join(different.values())})"
        raise InputError(f"{reason}: choose another --out.")
    model.load_trained_state_dict(weights, folder)
    return state


def resume(state, model, optimizer, schedule, guard):
    """Set the optimizer, schedule, guard and random state from a training state; returns its step.

    Every process takes part, each with the same whole state, of which it keeps its share.
    """
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"])
    guard.means.copy_(state["means"])
    return state["step"]
