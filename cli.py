"""What every command shares: errors in one line, bounds of numbers, Ctrl-C, device and dtype.

It imports torch only where it is needed, so that --help and bad flags are answered at once.
"""

import argparse
import math
import os
import platform
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

VERSION = "1.0.0"
INTERRUPTED = 130  # exit code after Ctrl-C
MAX_SEED = 2**63 - 1
DTYPES = ("float32", "bfloat16", "float16")


def fail(message):
    """Print one line on stderr and exit with code 2. With torchrun, rank 0 prints it.

    The other ranks wait for torchrun to end them after rank 0; if rank 0 goes on, the error is
    theirs alone and they print it too.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def catch_interrupts():
    """Let Ctrl-C end the program at once, with one line."""

    def interrupted(number, frame):
        print("stopped", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # a library could swallow an exception that interrupts it

    signal.signal(signal.SIGINT, interrupted)


class StopSignals(list):
    """The signals received so far that ask a run to finish its step, save and end."""

    def __init__(self):
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):  # Windows lacks the last
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.receive)

    def receive(self, number, frame):
        now = time.time()
        # torchrun passes the same Ctrl-C on: a second one comes later.
        if number == signal.SIGINT and any(now - before > 1 for _, before in self):
            print("stopped", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        if not self and int(os.environ.get("RANK", 0)) == 0:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        self.append((number, now))


def set_up(parser):
    """Prepare a command: Ctrl-C, bad flags and warnings print one line each; adds --version."""

    def show_warning(message, category, file, *place):
        if "site-packages" not in file:  # hide warnings raised inside libraries
            print("warning: " + " ".join(str(message).split()), file=sys.stderr)

    catch_interrupts()
    warnings.showwarning = show_warning
    parser.error = fail
    parser.add_argument("--version", action="version", version=f"metaquery {VERSION}")


def open_parser(text):
    """An argparse parser, set up, whose --help begins with `text` as it is written."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=text, **options)
    set_up(parser)
    return parser


@contextmanager
def errors_in_one_line():
    """Exit with one line on errors of the input or the machine; bugs keep their traceback."""
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from metaquery import InputError

    # Their reports of missing weights, dozens of lines, would bury the line that we print.
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except InputError as error:
        fail(error)
    except torch.OutOfMemoryError:
        fail("out of memory: try --batch-size 1, --offload or --dtype bfloat16.")
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        fail(f"cannot read or write{name} ({error.strerror or error}): check space and rights.")


def bounded(kind, least, most):
    """An argparse type: a number of a kind, int or float, from `least` to `most`."""

    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and least <= value <= most):
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {least:g} to {most:g}"  # argparse's message names it
    return parse


def device_of(name=""):
    """The torch device of --device, by default the best there is; exits if it is not there."""
    import torch

    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not name:
        name = "cpu"
        if torch.cuda.is_available():
            name = gpu
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        torch.zeros(1, device=name).item()  # also refuses "meta"
    except Exception:  # each backend raises its own
        fail(f"--device {name} is not available on this machine: leave it out, or use cpu.")
    return torch.device(gpu if name == "cuda" else name)


def has_bfloat16_instructions():
    """Whether this CPU, and torch as it is set up here, multiply bfloat16 in hardware."""
    import torch

    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # On x86 the question above is answered yes by AVX-512 alone, which computes in float32.
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_dtype(device, name=""):
    """(dtype of the arithmetic, why) for a torch device; `name`, of --dtype, decides if given.

    bfloat16 where the hardware has instructions for it. A CPU without them computes it in plain
    loops, without a warning: 10 to 36 times slower than float32.
    """
    import torch

    if name:
        return getattr(torch, name), "as --dtype says"
    if device.type == "cpu":
        if has_bfloat16_instructions():
            return torch.bfloat16, "this CPU has bfloat16 instructions"
        return torch.float32, "this CPU has no bfloat16 instructions"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16, "this GPU has no bfloat16"
    try:
        torch.ones(2, 2, dtype=torch.bfloat16, device=device) @ torch.ones(
            2, 2, dtype=torch.bfloat16, device=device
        )
    except (RuntimeError, TypeError):
        return torch.float32, "this device has no bfloat16"
    return torch.bfloat16, "this device has bfloat16"


def free_name(path):
    """Take a name that nobody has: `path`, or "name-1.png", "name-2.png", ...; a new empty file,
    or a new folder where the path has no suffix."""
    path = Path(path)
    for count in range(1_000_000):
        free = path.with_stem(f"{path.stem}-{count}") if count else path
        try:
            if path.suffix:
                free.touch(exist_ok=False)
            else:
                free.mkdir(parents=True)
            return free
        except FileExistsError:
            continue
    raise OSError(f"no free name beside {path}")


def check_writable(out, is_folder=None):
    """The path `out`; exits if it cannot be written. Makes nothing yet.

    is_folder: whether a folder is meant; by default, whether it has no suffix.
    """
    path = Path(out)
    if is_folder is None:
        is_folder = not path.suffix

    try:
        if not str(out).strip():
            raise OSError("its name is empty")
        if path.exists() and path.is_dir() != is_folder:
            raise OSError("it is a file" if is_folder else "it is a folder")
        parent = path
        while not parent.exists():
            parent = parent.parent
        if parent != path and not parent.is_dir():
            raise OSError(f"{parent} is not a folder")
        if not os.access(parent, os.W_OK):
            raise OSError(f"no right to write {parent}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        fail(f"cannot write to --out {out} ({reason}): choose another place.")
    return path
