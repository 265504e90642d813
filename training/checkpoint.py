"""Checkpoints of a training run: saved whole or not at all, resumed bit for bit.

A run's folder holds step-00001000/ folders, the newest `keep` of them, each with

    model.safetensors, config.json,   what was trained, for MetaQuery.from_pretrained
    generation_config.json
    training.pt                       step, optimizer, schedule, random state, readers' places
    training.json                     the run's settings

and `latest`, a file that names the newest, so that `sample.py --checkpoint OUT` works at any time.
A checkpoint is written to a temporary folder, synced and renamed: killed at any moment, a run
leaves complete checkpoints only. The same command resumes from the newest that can be read; on a
CPU the resumed run ends with the same bits. SIGTERM, SIGUSR1 and Ctrl-C let a run finish its step,
save and exit cleanly, for example on a SLURM cluster:

    #SBATCH --nodes=4 --gpus-per-node=8 --ntasks-per-node=1 --signal=USR1@300 --requeue
    srun torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d \\
      --rdzv-endpoint=$(scontrol show hostnames | head -1):29500 \\
      --max-restarts=3 train.py --size base --out runs/base
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from metaquery import InputError, save_checkpoint
from training.distributed import whole

# The optimizer's state is saved whole, by the parameters' names: any number of processes can read
# it, sharded or not.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# Settings that may differ when a run is resumed. Any other would make it another run.
MAY_CHANGE = {"out", "micro_batch_size", "save_every", "keep", "sample_every", "sample_prompts"}
MAY_CHANGE |= {"workers", "resume", "checkpoint", "shard", "shard_frozen", "cache_latents"}
MAY_CHANGE |= {"device", "gradient_checkpointing", "compile"}
# Places, which may move: their last names are compared.
PLACES = {"data", "mllm", "diffusion", "vae", "weights"}


def sync(path):
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def last_names(places):
    """The last names of "data/a=1,b/": ["a=1", "b"]."""
    return [Path(place).name for place in str(places).split(",")]


def write_text(path, text):
    """Write a text file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read(folder):
    """(settings, training state, weights) of a step folder; raises if it is damaged."""
    settings = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if not isinstance(settings["train"], dict) or not isinstance(settings["model"], dict):
        raise ValueError("its training.json has no settings")
    # Mapped, not read: the processes of a machine share the pages, and each needs only its share.
    state = torch.load(folder / "training.pt", weights_only=True, mmap=True)
    return settings, state, load_file(folder / "model.safetensors")


class Checkpoints:
    """The checkpoints of a run in the folder `out`, which is locked while the process lives.

    settings: {"train": {...}, "model": {...}}, what defines the run, as JSON. Raises InputError if
    another run is using the folder, or it holds files that no run wrote.
    """

    def __init__(self, out, settings, keep, resume="auto", rank=0):
        self.out, self.settings, self.keep, self.rank = Path(out), settings, keep, rank
        self.resume_from = resume
        if resume not in ("auto", "none") and not (Path(resume) / "training.json").exists():
            raise InputError(f"--resume {resume} is no step folder: name one that a run saved.")
        if rank > 0:
            return

        names = [path.name for path in self.out.iterdir()] if self.out.is_dir() else []
        if names and "run.lock" not in names and not self.folders():
            first = min(names)
            raise InputError(f"--out {out} holds other files ({first}): name another --out.")
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.out / "run.lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"a run is using {out}: wait for it, or name another --out.") from None

    def folders(self):
        """The run's step folders, oldest first; copies with other names are the user's."""
        found = self.out.glob("step-*")
        return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))

    def load_weights(self, model):
        """Load the newest checkpoint that can be read, or the one of --resume, into a whole model.

        Returns its training state, for `resume`, or None for a new run. Raises InputError if none
        can be read, or it belongs to a run with other settings.
        """
        folders = self.folders()[::-1]
        if self.resume_from == "none" and folders:
            fix = "name another --out, or remove them first"
            raise InputError(f"{self.out} holds checkpoints: {fix}.")
        if self.resume_from not in ("auto", "none"):
            folders = [Path(self.resume_from)]
        if not folders:
            return None

        for folder in folders:
            try:
                settings, state, weights = read(folder)
                break
            except Exception as error:  # a damaged file may raise any
                reason = (str(error) or repr(error)).splitlines()[0]
                if self.rank == 0:
                    print(f"{folder} is damaged ({reason})", file=sys.stderr)
        else:
            raise InputError(f"no complete checkpoint in {self.out}: name another --out.")

        self.check_settings(settings, folder)
        model.load_trained_state_dict(weights, folder)
        return state

    def check_settings(self, saved, folder):
        """Raise InputError if a checkpoint's settings are another run's."""
        different = {}
        for part, values in self.settings.items():
            for name, value in values.items():
                before = saved[part].get(name)
                moved = name in PLACES and last_names(before) == last_names(value)
                if name not in MAY_CHANGE and before != value and not moved:
                    different[name] = (before, value)

        if "dtype" in different:
            before, here = different.pop("dtype")
            reason = f"{folder} was trained in {before}, and this machine's choice is {here}"
            raise InputError(f"{reason}: give --dtype {before} to go on.")
        if list(different) == ["steps"]:
            planned, fix = different["steps"][0], "--checkpoint OLD --out NEW"
            reason = f"{folder} is of a run planned for {planned} steps, as its learning rate is"
            raise InputError(f"{reason}: to train on, start a new run: {fix}.")
        if different:
            changes = "; ".join(f"{n} {a!r} there, {b!r} here" for n, (a, b) in different.items())
            raise InputError(f"{folder} is of another run ({changes}): choose another --out.")

    def resume(self, state, model, optimizer, schedule):
        """Set optimizer, schedule and random state from a training state.

        Every process takes part, each with the same whole state, of which it keeps its share.
        """
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])

    def save(self, model, optimizer, schedule, step, **progress):
        """Save a step's checkpoint and remove old ones; progress: what else the state holds.

        Every process takes part, since each may hold a share only; rank 0 writes. Raises InputError
        if the disk is full; the checkpoints that exist stay complete.
        """
        weights = {}
        for name, weight in model.trained_state_dict().items():
            weight = whole(weight)  # one at a time: all of them may not fit the device
            if self.rank == 0:
                weights[name] = weight.cpu()
        state = {"step": step, "schedule": schedule.state_dict(), **progress}
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=WHOLE)
        state["random"] = torch.get_rng_state()
        if self.rank > 0:
            return

        folder = self.out / f"step-{step:08d}"
        temporary = self.out / ".step.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            save_checkpoint(model, weights, temporary)
            torch.save(state, temporary / "training.pt")
            write_text(temporary / "training.json", json.dumps(self.settings, indent=2) + "\n")
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            write_text(self.out / "latest", folder.name + "\n")
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            complete = ", ".join(path.name for path in self.folders()) or "none"
            raise InputError(
                f"cannot save step {step} in {self.out} ({error}): free some space and run the "
                f"same command again; complete checkpoints there: {complete}."
            ) from None

        for old in self.folders()[: -self.keep]:
            old.rename(temporary)  # a kill leaves no half of it among the complete ones
            shutil.rmtree(temporary)
