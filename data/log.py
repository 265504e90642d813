"""What a training run says of itself: a progress bar, log.jsonl and TensorBoard's files."""

import json
import math
import resource
import time
from contextlib import suppress

import torch
from tqdm import tqdm

from metaquery import InputError

MOST_BAD_STEPS = 10


class Log:
    """What a run says of itself: log.jsonl, a progress bar and TensorBoard's files, by rank 0.

    A step's numbers are read when the next step is on its way, so that no device waits for it.
    """

    def __init__(self, out, config, first, rank):
        self.out, self.config, self.first, self.quiet = out, config, first, rank > 0
        self.began, self.waited, self.mean, self.pending = time.time(), 0.0, None, None
        self.skipped, self.broken, self.bad, self.stop = 0, 0, 0, False
        self.bar = tqdm(initial=first, total=config.steps, disable=self.quiet, mininterval=2)
        self.board = None
        if not self.quiet:  # what was logged after the step that we go on from is done again
            kept = [*open(out / "log.jsonl")][:first] if (out / "log.jsonl").exists() else []
            self.file = open(out / "log.jsonl", "w")
            self.file.writelines(kept)
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(out / "tensorboard", purge_step=first)

    def add(self, step, numbers, lr):
        """Take a step's numbers, read those before it; whether a rank was told to stop by then."""
        self.read()
        on_host = numbers.to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if numbers.is_cuda else None
        if copied:
            copied.record()
        self.pending = (step, on_host, copied, lr)
        return self.stop

    def read(self):
        """Write what was added last; raises InputError where too many steps in a row went wrong."""
        if self.pending is None:
            return
        (step, numbers, copied, lr), self.pending = self.pending, None
        if copied:
            copied.synchronize()
        loss, stop, norm = numbers.tolist()
        self.stop, finite = stop > 0, math.isfinite(loss + norm)
        self.skipped, self.bad = self.skipped + (not finite), 0 if finite else self.bad + 1
        if self.bad == MOST_BAD_STEPS:
            newest = max(self.out.glob("step-*"), default="none")
            raise InputError(
                f"loss or gradient was not finite {self.bad} times in a row, up to step {step}: "
                f"lower --lr or look at the data; the last checkpoint is {newest}."
            )
        if finite:
            self.mean = 0.98 * (self.mean or loss) + 0.02 * loss
        if not self.quiet:
            self.write(step, loss, norm, lr)

    def write(self, step, loss, norm, lr):
        """A line of log.jsonl, the bar and the board."""
        passed = time.time() - self.began
        rate = (step - self.first) * self.config.batch_size / passed
        shown = {"loss": f"{self.mean or math.nan:.4f}", "samples_s": f"{rate:.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.config.device.startswith("cuda"):
            memory = torch.cuda.max_memory_allocated()
        entry = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr,
                 "samples_per_s": round(rate, 1), "data_wait": round(self.waited / passed, 4),
                 "skipped_steps": self.skipped, "skipped_samples": self.broken,
                 "memory_gb": round(memory / 1e9, 2)}  # fmt: skip
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        for name, value in entry.items() if self.board else ():
            self.board.add_scalar(name, value, step)
