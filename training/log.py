"""The log of a training run: a progress bar, log.jsonl and, if installed, TensorBoard's files."""

import json
import sys
import time
from contextlib import suppress

import torch
from tqdm import tqdm

SMOOTHING = 0.98  # of the loss that the bar shows


def peak_memory_gb():
    """The most memory that this process has used, in GB: a GPU's if there is one; else None where
    the system does not tell (Windows)."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":  # macOS counts bytes, Linux kilobytes
        peak *= 1024
    return round(peak / 1e9, 2)


class Log:
    """Writes each step's figures, in rank 0 only. A context, which ends the bar."""

    def __init__(self, out, first, steps, batch_size, rank=0):
        self.first, self.batch_size, self.rank = first, batch_size, rank
        self.began = time.time()
        self.smooth_loss = None
        self.bar = tqdm(initial=first, total=steps, mininterval=2, disable=rank > 0)
        if rank > 0:
            return

        path = out / "log.jsonl"
        # Steps after the checkpoint that a run resumes from are done, and logged, again.
        kept = []
        if path.exists():
            kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:first]
        self.file = open(path, "w", encoding="utf-8")
        self.file.writelines(kept)

        self.board = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard", purge_step=first)

    def write(self, step, loss, waited, **figures):
        """A line of log.jsonl, the bar and the board. waited: seconds without data so far."""
        if self.rank > 0:
            return
        if loss == loss:  # not NaN
            before = self.smooth_loss or loss
            self.smooth_loss = SMOOTHING * before + (1 - SMOOTHING) * loss
        passed = time.time() - self.began
        rate = (step - self.first) * self.batch_size / passed
        shown = {"loss": f"{self.smooth_loss or loss:.4f}", "samples_s": f"{rate:.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

        entry = {"step": step, "loss": loss, **figures}
        entry |= {"samples_per_s": round(rate, 1), "data_wait": round(waited / passed, 4)}
        entry["memory_gb"] = peak_memory_gb()
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if self.board:
            for name, value in entry.items():
                self.board.add_scalar(name, value or 0, step)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
