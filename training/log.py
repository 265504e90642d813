"""The log of a training run: a progress bar, log.jsonl and, if installed, TensorBoard's files."""

import json
import math
import resource
import time
from contextlib import suppress
from typing import NamedTuple

import torch
from tqdm import tqdm

from metaquery import InputError

SMOOTHING = 0.98  # of the loss that the bar shows
MAX_BAD_STEPS = 10  # skipped steps in a row that end a run


class StepResult(NamedTuple):
    """What one training step gave."""

    step: int
    loss: float
    stop_votes: int  # processes that were told to stop
    grad_norm: float
    skipped: bool  # because of a spike, or of numbers that are not finite
    lr: float


class Log:
    """Reads each step's figures and writes them, in the process of rank 0 only.

    It is one step late: a step's numbers are read from the device once the next step is on its way.
    Reading at once would make the device wait for the host at every step.
    """

    def __init__(self, out, config, first, rank):
        self.config, self.out, self.first, self.quiet = config, out, first, rank > 0
        self.pending = None  # the last step's numbers, not read yet
        self.began = time.time()
        self.waited = 0.0  # seconds spent waiting for data
        self.skipped_steps, self.skipped_samples, self.bad_steps = 0, 0, 0
        self.smooth_loss = None
        self.bar = tqdm(initial=first, total=config.steps, disable=self.quiet, mininterval=2)
        self.board = None
        if self.quiet:
            return
        path = out / "log.jsonl"
        # Steps after the checkpoint that a run resumes from are done, and logged, again.
        kept = path.read_text().splitlines(keepends=True)[:first] if path.exists() else []
        self.file = open(path, "w")
        self.file.writelines(kept)
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard", purge_step=first)

    def push(self, step, loss, stop_votes, grad_norm, skipped, lr):
        """Take a step's numbers, scalar tensors, and log the step before it.

        Returns whether a process was told to stop. Raises InputError after too many bad steps.
        """
        votes = self.flush()
        numbers = torch.stack([loss, stop_votes, grad_norm, skipped.to(loss)]).to(
            "cpu", non_blocking=True
        )
        copied = torch.cuda.Event() if loss.is_cuda else None
        if copied:
            copied.record()
        self.pending = (step, numbers, copied, lr)
        return votes > 0

    def flush(self):
        """Log the step that was pushed last, if any; returns its votes to stop."""
        if self.pending is None:
            return 0
        step, numbers, copied, lr = self.pending
        self.pending = None
        if copied:
            copied.synchronize()
        loss, stop_votes, grad_norm, skipped = numbers.tolist()
        result = StepResult(step, loss, int(stop_votes), grad_norm, bool(skipped), lr)
        self.write(result)
        self.bad_steps = self.bad_steps + 1 if result.skipped else 0
        if self.bad_steps == MAX_BAD_STEPS:
            newest = max(self.out.glob("step-*"), default="none")
            raise InputError(
                f"loss or gradient was not finite, or a spike, {self.bad_steps} times in a row, up "
                f"to step {step}: lower --lr or check the data; last checkpoint: {newest}."
            )
        return result.stop_votes

    def write(self, result):
        """A line of log.jsonl, the bar and the board."""
        self.skipped_steps += result.skipped
        if not result.skipped:
            before = self.smooth_loss or result.loss
            self.smooth_loss = SMOOTHING * before + (1 - SMOOTHING) * result.loss
        if self.quiet:
            return
        passed = time.time() - self.began
        rate = (result.step - self.first) * self.config.batch_size / passed
        shown = {"loss": f"{self.smooth_loss or math.nan:.4f}", "samples_s": f"{rate:.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_initialized():
            memory = torch.cuda.max_memory_allocated()
        entry = {
            "step": result.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "samples_per_s": round(rate, 1),
            "data_wait": round(self.waited / passed, 4),
            "skipped_steps": self.skipped_steps,
            "skipped_samples": self.skipped_samples,
            "memory_gb": round(memory / 1e9, 2),
        }
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        for name, value in entry.items() if self.board else ():
            self.board.add_scalar(name, value, result.step)
