"""Signals that end a training run: it finishes its step and saves; a second Ctrl-C ends it."""

import multiprocessing
import os
import select
import signal
import sys
import threading
import time

from data.batches import STOP_SIGNALS
from cli import INTERRUPTED

PATIENCE = 60.0  # seconds of waiting for data after which a run says so
SAME_KEY = 0.5  # seconds within which torchrun may pass on the same Ctrl-C again


class StopSignals:
    """Notes the signals that tell a run to end, and how long the run has waited for data.

    Python runs its handlers between two of its own instructions only, so not while a library waits
    for another process. A thread therefore reads the signals too, from a pipe: it ends the process
    at a second Ctrl-C, whatever the run waits for.
    """

    def __init__(self):
        self.received = []
        self.waiting_since = None  # set while the run waits for its next batch
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: self.received.append(number))
        threading.Thread(target=self.watch, args=(reader,), daemon=True).start()

    def watch(self, reader):
        """Wait for signals and, every few seconds, look at how long the run has waited."""
        first_interrupt, said = None, None
        while True:
            for number in os.read(reader, 64) if select.select([reader], [], [], 2)[0] else b"":
                now = time.time()
                if number == signal.SIGINT and first_interrupt is None:
                    first_interrupt = now
                    self.say("stopping after this step; Ctrl-C again stops at once")
                elif number == signal.SIGINT and now - first_interrupt > SAME_KEY:
                    self.say("stopped")
                    for worker in multiprocessing.active_children():
                        worker.kill()
                    os._exit(INTERRUPTED)
            since = self.waiting_since
            if since and since != said and time.time() - since > PATIENCE:
                said = since
                self.say(f"no data for {PATIENCE:.0f} s: is --data reachable? Ctrl-C twice stops")

    def say(self, text):
        """Print a line on stderr, from one of the processes."""
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\n{text}", file=sys.stderr, flush=True)
