"""Generate images with MetaQuery from the command line.

python sample.py "a red star left of a blue circle"     generates with weights/tiny
python sample.py "make the star green" --image a.png    edits (several --image: follows subjects)
python sample.py --image a.png                          reconstructs
python sample.py "how many stars?" --image a.png --ask  answers in text, by the untouched MLLM
python sample.py --prompts FILE --out DIR               one prompt a line, or .jsonl or .json rows of
                                                        "prompt", "images" (files), "negative_prompt",
                                                        "seed"

The tiny model knows circles, squares, triangles, stars, crosses and diamonds, in red, green, blue,
yellow, purple, orange, pink and brown; numbers up to four; left of, right of, above, below; white,
grey and black backgrounds; edits; and a few dozen facts, such as the colour of a ripe banana.
"""

import argparse
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, PngImagePlugin

from cli import (
    DTYPES,
    MAX_SEED,
    bounded,
    check_writable,
    choose_dtype,
    device_of,
    errors_in_one_line,
    fail,
    free_name,
    set_up,
)

WEIGHTS = Path(__file__).resolve().parent / "weights"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}  # image files in a folder
GAP_COLOR = (190, 190, 190)  # between the images of a grid: seen beside white and black


# ---- Image files ---------------------------------------------------------------------------------
def open_image(path):
    """The PIL image in a file; raises InputError with one line if there is none."""
    from metaquery import InputError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
            return image
    except Exception as error:  # Pillow raises many kinds
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read image {path} ({reason}): give another file.") from None


def grid(images, columns=None, gap=2):
    """PIL images in one, `gap` pixels apart, as square as possible; cells fit the largest."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width = max(image.width for image in images) + gap
    height = max(image.height for image in images) + gap
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), GAP_COLOR)
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def save_image(image, path, **notes):
    """Save a PIL image under a path, whole or not at all: a full disk spares the file there.

    Makes the folder; follows links. notes: texts that a PNG carries, such as prompt="a star".
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    kind = Image.registered_extensions()[path.suffix.lower()]
    options = {}
    if kind == "JPEG":
        options["quality"] = 95
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for name, text in notes.items():
            options["pnginfo"].add_itxt(name, str(text))
    try:
        image.save(temporary, kind, **options)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- Files of prompts ----------------------------------------------------------------------------
@dataclass
class Job:
    """One prompt and its image files, or why its row cannot be read."""

    prompt: str = ""
    images: list = field(default_factory=list)  # files, then PIL images
    negative_prompt: str | None = None
    seed: int | None = None
    error: str = ""


def open_images(job):
    """Replace a job's files by their images; returns whether it has no error."""
    from metaquery import MAX_IMAGES, InputError

    try:
        if len(job.images) > MAX_IMAGES:
            raise InputError(f"{len(job.images)} images: give at most {MAX_IMAGES}.")
        if not job.error:
            job.images = [open_image(path) for path in job.images]
    except InputError as error:
        job.error = str(error)
    return not job.error


def read_jobs(path):
    """The `Job` of each row of a prompts file; a row that cannot be read has its error set."""
    path = Path(path)
    kind = path.suffix.lower()
    try:
        if kind == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list):
                raise ValueError("it is not a JSON list")
        else:
            rows = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, ValueError, RecursionError) as error:
        fail(f"cannot read --prompts {path} ({error}): give a text file, one prompt a line.")

    jobs = []
    for number, row in enumerate(rows, 1):
        try:
            if isinstance(row, bytes):
                row = row.decode("utf-8").strip()
                if not row:
                    continue
                if kind == ".jsonl":
                    row = json.loads(row)
            jobs.append(job_of(row, path.parent))
        except (ValueError, TypeError, RecursionError) as error:
            jobs.append(Job(error=f"{path} row {number}: {error}: correct it."))
    if not jobs:
        fail(f"--prompts {path} is empty: write one prompt a line.")
    return jobs


def job_of(row, folder):
    """The `Job` of a prompt or an object; raises ValueError. Image files are beside the list."""
    if isinstance(row, str):
        row = {"prompt": row}
    known = {"prompt": str, "images": list, "negative_prompt": str, "seed": int}
    if not isinstance(row, dict) or not row.keys() & {"prompt", "images"}:
        raise ValueError('it is neither a text nor an object with "prompt" or "images"')
    row = {name: value for name, value in row.items() if value is not None}
    if isinstance(row.get("images"), str):
        row["images"] = [row["images"]]
    for name, value in row.items():
        if name not in known:
            raise ValueError(f'unknown key "{name}", the keys are {", ".join(known)}')
        if type(value) is not known[name]:
            raise ValueError(f'"{name}" is not a {known[name].__name__}')
    for name in row.get("images", []):
        if not isinstance(name, str):
            raise ValueError('"images" is not a list of file names')
    job = Job(**row)
    job.prompt = " ".join(job.prompt.split())  # no-break spaces too
    job.images = [find_beside(name, folder) for name in job.images]
    return job


def find_beside(name, folder):
    """A file in a folder, or else in the working directory."""
    try:
        return folder / name if (folder / name).exists() else Path(name)
    except OSError as error:  # a name that is too long
        raise ValueError(f"{name[:60]} ... ({error.strerror})") from None


# ---- Models and flags ----------------------------------------------------------------------------
def add_generation_options(parser):
    """Add the flags that choose a model and say how it generates."""
    add = parser.add_argument
    add("--size", default="tiny", help="tiny (shipped), study, base, large or xlarge")
    add("--checkpoint", metavar="DIR", help="a folder of train.py or a hub id (weights/SIZE)")
    add("--mllm", metavar="DIR", help="another place of the checkpoint's frozen MLLM")
    add("--diffusion", metavar="DIR", help="another place of its diffusion model")
    add("--vae", metavar="DIR", help="another place of its VAE")
    add("--negative-prompt", default="", help="what to steer away from")
    add("--guidance", type=bounded(float, 0, 100), help="guidance scale g; 1 is none")
    add("--image-guidance", type=bounded(float, 0, 100), help="g_img; at most 1 is none")
    add("--steps", type=bounded(int, 1, 1000), help="denoising steps")
    add("--seed", type=bounded(int, 0, MAX_SEED), default=0, help="of the starting noise (0)")
    add("--num-images", type=bounded(int, 1, 10_000), default=1, help="for each prompt (1)")
    add("--batch-size", type=bounded(int, 1, 10_000), default=24, help="images at a time (24)")
    add("--device", default="", help="cpu, cuda, ... (the best there is)")
    add("--dtype", default="", choices=DTYPES, help="(float32 on a CPU, else what is fast)")


def load_model(args):
    """The MetaQuery that the flags name, on its device. Raises InputError.

    Sets --steps, --guidance and --image-guidance to the checkpoint's unless they are given.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from metaquery import InputError, MetaQuery, MetaQueryConfig

    disable_progress_bar()
    MetaQueryConfig.preset(args.size)  # refuses an unknown size, also with --checkpoint
    parts = {"mllm": args.mllm, "diffusion": args.diffusion, "vae": args.vae}
    for name, value in {"checkpoint": args.checkpoint, **parts}.items():
        if value == "":
            raise InputError(f"--{name} is empty: name a folder or hub id, or leave it out.")
    checkpoint = args.checkpoint or WEIGHTS / args.size
    if not args.checkpoint and not checkpoint.exists():
        fail(f"no weights are shipped for --size {args.size}: give --checkpoint DIR.")

    device = device_of(args.device)
    dtype = torch.float32  # images of a CPU are the same on every CPU
    if device.type != "cpu" or args.dtype:
        dtype, _ = choose_dtype(device, args.dtype)
    given = {name: part for name, part in parts.items() if part}
    model = MetaQuery.from_pretrained(checkpoint, dtype, **given)
    defaults = model.generation_config
    for flag, name in (
        ("steps", "num_inference_steps"),
        ("guidance", "guidance_scale"),
        ("image_guidance", "image_guidance_scale"),
    ):
        if getattr(args, flag) is None:
            setattr(args, flag, defaults[name])
    return model.to(device, dtype).eval()


def generate(model, rows, args, seeds=None, num_images=None, negative=None, callback=None):
    """Generate from (prompt, PIL images) rows: for each a list of `num_images` PIL images.

    Each row's noise is from --seed, as if it were generated alone, or from its own of `seeds`.
    `num_images` and `negative`, a prompt, are the flags' unless given; callback: see `generate` of
    MetaQuery.
    """
    import torch

    n = num_images or args.num_images
    if negative is None:
        negative = args.negative_prompt
    seeds = seeds or [args.seed] * len(rows)
    results = []
    size = max(1, args.batch_size // n)
    for start in range(0, len(rows), size):
        prompts, images = zip(*rows[start : start + size], strict=True)
        generators = []
        for seed in seeds[start : start + size]:
            generators += [torch.Generator(model.queries.device).manual_seed(seed)] * n
        batch = model.generate(
            prompts,
            list(images),
            negative_prompt=negative,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            image_guidance_scale=args.image_guidance,
            num_images_per_prompt=n,
            generator=generators,
            callback=callback,
        )
        results += [batch[i : i + n] for i in range(0, len(batch), n)]
    return results


# ---- The command ---------------------------------------------------------------------------------
def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    set_up(parser)
    add = parser.add_argument
    add("prompt", nargs="?", help='what to generate, in quotes; "" is unconditional')
    add("--image", action="append", default=[], metavar="FILE", help="a source image; up to 6")
    add("--ask", action="store_true", help="answer the prompt in text; generate nothing")
    add("--prompts", metavar="FILE", help="many prompts: one a line, .jsonl or .json")
    add(
        "--out",
        help="x.png: that file, a grid if several; else a folder of numbered files (sample.png, "
        "or samples with --prompts; with a number if that exists)",
    )
    add_generation_options(parser)
    args = parser.parse_args()
    if args.ask and not (args.prompt or args.prompts):
        fail('--ask needs a question: sample.py "how many stars?" --image a.png --ask.')
    for flag in ("out", "negative_prompt"):
        if args.ask and getattr(args, flag):
            fail(f"--{flag.replace('_', '-')} has no effect with --ask: leave it out.")
    single = args.prompt is not None or bool(args.image)
    if single == (args.prompts is not None):
        fail('give a prompt or --image, or else --prompts FILE (see "--help").')
    return args


def generate_jobs(model, jobs, args, out):
    """Generate every job without an error and save it at once, or all in a grid; print where."""
    from tqdm import tqdm

    notes = {"steps": args.steps, "guidance": args.guidance}
    notes |= {"image guidance": args.image_guidance, "checkpoint": args.checkpoint or args.size}
    in_grid, prompts, count = [], [], 0
    size = max(1, args.batch_size // args.num_images)
    batches = [range(len(jobs))[start : start + size] for start in range(0, len(jobs), size)]
    # The bar appears where generating takes long, and leaves no line behind.
    with tqdm(total=args.steps * len(batches), desc="generating", delay=2, leave=False) as bar:
        for batch in batches:
            good = [index for index in batch if open_images(jobs[index])]
            if not good:
                continue
            rows = [(jobs[index].prompt, jobs[index].images) for index in good]
            seeds = [args.seed if jobs[i].seed is None else jobs[i].seed for i in good]
            negative = [jobs[i].negative_prompt or args.negative_prompt for i in good]
            results = generate(model, rows, args, seeds, None, negative, lambda _: bar.update())
            for index, seed, images in zip(good, seeds, results, strict=True):
                count += len(images)
                in_grid += images
                prompts.append(jobs[index].prompt)
                for i, image in enumerate(images if not out.suffix else []):
                    path = free_name(out / f"{index * args.num_images + i:05d}.png")
                    save_image(image, path, prompt=jobs[index].prompt, seed=seed, **notes)
    if in_grid and out.suffix:
        image = in_grid[0] if len(in_grid) == 1 else grid(in_grid)
        save_image(image, out, prompt="\n".join(prompts), seed=args.seed, **notes)
    if count:
        saved = out if out.suffix else f"{count} images in {out}"
        print(f"saved {saved} (seed {args.seed})")


def answer_jobs(model, jobs):
    """Print the MLLM's answer to every job without an error, as it comes."""
    from transformers import TextStreamer

    for job in jobs:
        if open_images(job):
            streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
            model.answer(job.prompt, job.images, streamer=streamer)


def main():
    args = parse_arguments()
    jobs = [Job(args.prompt or "", args.image)]
    if args.prompts:
        jobs = read_jobs(args.prompts)
    if all(job.error for job in jobs):
        fail(" ".join(job.error for job in jobs))
    if args.out and not args.ask:
        if check_writable(args.out).suffix.lower() not in ("", *SUFFIXES):
            fail(f"--out {args.out} is no image file: end it in .png, or name a folder.")
    with errors_in_one_line():
        model = load_model(args)
        if args.ask:
            answer_jobs(model, jobs)
        else:
            out = Path(args.out) if args.out else free_name("samples" if args.prompts else "sample.png")
            generate_jobs(model, jobs, args, out)
    errors = [(number, job.error) for number, job in enumerate(jobs, 1) if job.error]
    if errors:
        fail(" ".join(f"prompt {n}: {error}" if len(jobs) > 1 else error for n, error in errors))


if __name__ == "__main__":
    main()
