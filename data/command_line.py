"""What the commands share: errors in one line, options of drawing, loading a model, batches.

It imports torch only when a model is loaded, so that --help and bad input take no time.
"""

import math
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

VERSION = "1.0.0"
BATCH = 24  # rows drawn together
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
INTERRUPTED = 130  # the exit code after Ctrl-C
MAX_SEED = 2**63 - 1


def stop(message):
    """End the program on an error the user can fix: one line on stderr, exit code 2.

    Of several processes the first speaks. The others wait: torchrun ends them once the first has
    stopped, and if it has not, the error is theirs alone.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def begin(parser):
    """Set up a command: Ctrl-C, bad flags and warnings each print one line; adds --version."""

    def interrupted(number, frame):
        print("stopped", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # an exception could be swallowed by the library that it interrupts

    def show_warning(message, category, file, *place):
        if "site-packages" not in file:  # a library's warnings are for us, not for its user
            print("warning: " + " ".join(str(message).split()), file=sys.stderr)

    signal.signal(signal.SIGINT, interrupted)
    warnings.showwarning = show_warning
    parser.error = stop
    parser.add_argument("--version", action="version", version=f"metaquery {VERSION}")


@contextmanager
def errors_in_one_line():
    """Stop with one line on errors of the input or the machine; others keep their traceback."""
    import torch

    from metaquery import InputError

    try:
        yield
    except InputError as error:
        stop(error)
    except torch.OutOfMemoryError:
        stop("out of memory: use smaller batches, --dtype bfloat16 or another --device.")
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        stop(f"cannot read or write{name} ({error.strerror or error}): free space or check rights.")


def add_drawing_options(parser):
    """Add the flags that choose a model and say how it draws."""
    add = parser.add_argument
    add("--size", default="tiny", help="tiny (shipped), base, large or xlarge")
    add("--checkpoint", metavar="DIR", help="a folder of train.py or a hub id (weights/SIZE)")
    add("--mllm", metavar="DIR", help="another place of the checkpoint's frozen MLLM")
    add("--diffusion", metavar="DIR", help="another place of its diffusion model")
    add("--negative-prompt", default="", help="what to steer away from")
    add("--guidance", type=float, default=3.0, help="guidance scale g; 1 is none (3.0)")
    add("--image-guidance", type=float, help="g_img; at most 1 is none (the checkpoint's)")
    add("--steps", type=int, default=30, help="denoising steps (30)")
    add("--seed", type=int, default=0, help="seed of the starting noise (0)")
    add("--num-images", type=int, default=1, help="pictures for each prompt (1)")
    add("--device", help="cpu, cuda, ... (cuda if there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])


def check_bounds(values, bounds):
    """Stop if a flag is out of its bounds, {"steps": (1, 1000), ...}, or is not a number."""
    for name, (least, most) in bounds.items():
        value = values.get(name)
        if value is not None and not least <= value <= most:
            flag = name.replace("_", "-")
            stop(f"--{flag} is {value}: it must be at least {least:g} and at most {most:g}.")


def number(text):
    """A finite number."""
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def parse_data(spec):
    """[(name, weight or None)] of --data, "NAME,NAME=WEIGHT,..."; stops if a weight is not > 0."""
    parts = []
    for part in spec.split(","):
        name, equals, weight = part.rpartition("=")
        name = name if equals else part
        try:
            weight = number(weight) if equals else None
        except ValueError:
            weight = 0
        if not name or (weight is not None and weight <= 0):
            stop(f"--data {spec}: {part!r} is not NAME or NAME=WEIGHT with a weight above 0.")
        parts.append((name, weight))
    if "toy" in [name for name, _ in parts] and len(parts) > 1:
        stop(f"--data {spec}: the toy world cannot be mixed with datasets; name either.")
    return parts


DRAWING_BOUNDS = {
    "steps": (1, 1000),
    "num_images": (1, 10_000),
    "guidance": (0, 100),
    "image_guidance": (0, 100),
    "seed": (0, MAX_SEED),
    "limit": (1, 10**9),
}


def device_of(name):
    """The torch device that --device names, or the best there is; stops if it is not there."""
    import torch

    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = name or (gpu if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # also refuses "meta"
        return torch.device(gpu if name == "cuda" else name)
    except Exception:  # each backend raises its own
        stop(f"--device {name} is not available on this machine: leave it out, or use cpu.")


def load_model(args):
    """The MetaQuery that the flags name, on its device. Raises InputError.

    Sets --image-guidance to the checkpoint's unless it is given.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from metaquery import MetaQuery, MetaQueryConfig

    disable_progress_bar()
    MetaQueryConfig.preset(args.size)  # refuses an unknown size, also with --checkpoint
    folder = args.checkpoint or WEIGHTS / args.size
    if not args.checkpoint and not folder.exists():
        stop(f"no weights are shipped for --size {args.size}: give --checkpoint DIR.")
    device = device_of(args.device)
    given = {"mllm": args.mllm, "diffusion": args.diffusion}
    parts = {name: part for name, part in given.items() if part}
    model = MetaQuery.from_pretrained(folder, **parts)
    if args.image_guidance is None:
        args.image_guidance = model.config.image_guidance
    return model.to(device, getattr(torch, args.dtype)).eval()


def draw(model, rows, args, seeds=None, num_images=None, negative_prompt=None, callback=None):
    """Draw (prompt, PIL images) rows: for each a list of `num_images` PIL images.

    Each row's noise is from --seed, as if it were drawn alone, or from its own of `seeds`.
    `num_images` and `negative_prompt` are the flags' values unless given. `callback` is called
    as in `generate`.
    """
    import torch

    n = num_images or args.num_images
    negative_prompt = args.negative_prompt if negative_prompt is None else negative_prompt
    seeds = seeds or [args.seed] * len(rows)
    drawn = []
    for start in range(0, len(rows), BATCH):
        prompts, images = zip(*rows[start : start + BATCH], strict=True)
        generators = []
        for seed in seeds[start : start + BATCH]:
            generators += [torch.Generator(model.queries.device).manual_seed(seed)] * n
        pictures = model.generate(
            prompts,
            images,
            negative_prompt=negative_prompt,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            image_guidance_scale=args.image_guidance,
            num_images_per_prompt=n,
            generator=generators,
            callback=callback,
        )
        drawn += [pictures[i : i + n] for i in range(0, len(pictures), n)]
    return drawn


def writable(out, is_folder=None):
    """`out` as a path; stops if it cannot be written. Makes nothing yet.

    is_folder: whether a folder is meant; by default, whether it has no suffix.
    """
    path = Path(out)
    is_folder = not path.suffix if is_folder is None else is_folder
    try:
        if not str(out).strip():
            raise OSError("its name is empty")
        if path.exists() and path.is_dir() != is_folder:
            raise OSError("it is a file" if is_folder else "it is a folder")
        there = path
        while not there.exists():
            there = there.parent
        if there != path and not there.is_dir():
            raise OSError(f"{there} is not a folder")
        if not os.access(there, os.W_OK):
            raise OSError(f"no right to write {there}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        stop(f"cannot write to --out {out} ({reason}): choose another place.")
    return path


def not_taken(path):
    """The path, or if it exists "name-1.png", "name-2.png", ...: the first that does not."""
    free, count = path, 0
    while free.exists():
        count += 1
        free = path.with_stem(f"{path.stem}-{count}")
    return free
