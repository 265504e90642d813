"""What the commands share: errors in one line, options of drawing, loading a model, batches.

It imports torch only when a model is loaded, so that --help and bad input take no time.
"""

import os
import sys
from pathlib import Path

BATCH = 24  # rows drawn together
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def stop(message):
    """End the program on an error the user can fix: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def add_drawing_options(parser):
    """Add the flags that choose a model and say how it draws."""
    add = parser.add_argument
    add("--size", default="tiny", help="tiny (shipped), base, large or xlarge")
    add("--checkpoint", metavar="DIR", help="a folder of train.py or a hub id (weights/SIZE)")
    add("--negative-prompt", default="", help="what to steer away from")
    add("--guidance", type=float, default=3.0, help="guidance scale g; 1 is none (3.0)")
    add("--image-guidance", type=float, default=1.5, help="g_img; at most 1 is none (1.5)")
    add("--steps", type=int, default=30, help="denoising steps (30)")
    add("--seed", type=int, default=0, help="seed of the starting noise (0)")
    add("--num-images", type=int, default=1, help="pictures for each prompt (1)")
    add("--device", help="cpu, cuda, ... (cuda if there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])


def check_bounds(args, bounds):
    """Stop if a flag is below its least value. bounds: {"steps": 1, ...}; NaN is refused too."""
    for name, least in bounds.items():
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not value >= least:
            stop(f"--{name} is {value}: it must be at least {least}.")


DRAWING_BOUNDS = {"steps": 1, "num-images": 1, "guidance": 0}


def load_model(args):
    """The MetaQuery that the flags name, on its device. Raises InputError."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from metaquery import MetaQuery, MetaQueryConfig

    disable_progress_bar()
    MetaQueryConfig.preset(args.size)  # refuses an unknown size, also with --checkpoint
    folder = args.checkpoint or WEIGHTS / args.size
    if not args.checkpoint and not folder.exists():
        stop(f"no weights are shipped for --size {args.size}: give --checkpoint DIR.")
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = args.device or (gpu if torch.cuda.is_available() else "cpu")
    return MetaQuery.from_pretrained(folder).to(device, getattr(torch, args.dtype)).eval()


def draw(model, rows, args, seeds=None, num_images=None, negative_prompt=None):
    """Draw (prompt, PIL images) rows: for each a list of `num_images` PIL images.

    Each row's noise is from --seed, as if it were drawn alone, or from its own of `seeds`.
    `num_images` and `negative_prompt` are the flags' values unless given.
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
        )
        drawn += [pictures[i : i + n] for i in range(0, len(pictures), n)]
    return drawn


def writable(out):
    """`out` as a path, its folder made; stops if it cannot be written."""
    path = Path(out)
    folder = path.parent if path.suffix else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".metaquery-trial"
        trial.touch()
        trial.unlink()
        if path.suffix and path.is_dir():
            raise OSError("it is a folder")
    except OSError as error:
        stop(f"cannot write to --out {out} ({error.strerror or error}): choose another place.")
    return path
