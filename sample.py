"""Generate images with MetaQuery from the command line.

python sample.py "a red star left of a blue circle"     generates with weights/tiny
python sample.py "make the star green" --image a.png    edits (several: subjects)
python sample.py --image a.png                          reconstructs
python sample.py "how many stars?" --image a.png --ask  the MLLM answers in text
python sample.py "a corgi" --checkpoint openuni-b-512   a photograph, by public weights
python sample.py --prompts FILE --out DIR               one prompt a line; or .jsonl:
    {"prompt": "a star", "images": ["a.png"], "negative_prompt": "red", "seed": 1,
     "height": 512, "width": 384}

The tiny model knows six shapes, eight colors, numbers to four, sides, backgrounds,
edits, and a few dozen facts, such as the color of a ripe banana.
"""

import argparse
import json
import math
import os
from itertools import groupby
from pathlib import Path

from PIL import Image, PngImagePlugin

import cli

# Functions import metaquery and torch, which takes seconds, so that --help takes none.
HERE = Path(__file__).resolve().parent
TINY = str(HERE / "weights" / "tiny")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}  # image files in a folder
GAP_COLOR = (190, 190, 190)  # between the images of a grid: seen beside white and black
# What --rewrite asks the MLLM. How the paper's prompts were rewritten is not published.
REWRITE = """Write this prompt for an image generator out in detail, in one paragraph: \
what is seen, where it is, its colors and style, and what the prompt only hints at. \
Answer with the new prompt only.\nPrompt: {}"""


# ---- Image files ---------------------------------------------------------------------
def open_image(path, folder=""):
    """The image in a file, in `folder` or else here: a PIL image in RGB.

    Raises InputError if it cannot be read."""
    from metaquery import InputError, to_rgb

    try:
        if Path(folder, path).exists():
            path = Path(folder, path)
        return to_rgb(Image.open(path))
    except Exception as error:  # Pillow raises many kinds
        reason = getattr(error, "strerror", None) or error
        name = str(path)[-200:]
        raise InputError(f"cannot read {name} ({reason}): give an image.") from None


def grid(images, columns=None, gap=2):
    """PIL images in one, `gap` pixels apart, by default as square as possible."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width = max(image.width for image in images) + gap
    height = max(image.height for image in images) + gap
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), GAP_COLOR)
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def save_image(image, path, **notes):
    """Save a PIL image, whole or not at all: a full disk spares the file that is there.

    Makes the folder; follows links. notes: texts for a PNG, such as prompt="a star"."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    info = PngImagePlugin.PngInfo()
    for name, text in notes.items():
        info.add_itxt(name, str(text))
    try:
        image.save(temporary, pnginfo=info, quality=95)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- Files of prompts ----------------------------------------------------------------
KEYS = {"prompt": str, "images": list, "negative_prompt": str, "seed": int,
        "height": int, "width": int}  # fmt: skip


def read_rows(path):
    """For each line of a file of prompts a dict with some of KEYS, or an "error"."""
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
        if b"\0" in data:
            raise OSError("it holds no text")
    except OSError as error:
        cli.fail(f"cannot read --prompts {path} ({error}): give a text file.")

    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            row = line.decode().strip()
            if not row:
                continue
            if path.lower().endswith(".jsonl"):
                row = json.loads(row)
            rows.append(check_row(row))
        except (ValueError, RecursionError) as error:
            rows.append({"error": f"{path} line {number}: {error}."})
    if not rows:
        cli.fail(f"--prompts {path} is empty: write one prompt a line.")
    return rows


def check_row(row):
    """A prompt, or a dict with some of KEYS, as a dict of flags; raises ValueError."""
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict) or "image" in row:
        raise ValueError('give an object with "prompt" or "images"')
    row = {name: row[name] for name in KEYS if row.get(name) is not None}
    if not row.keys() & {"prompt", "images"}:
        raise ValueError('give "prompt" or "images"')
    if isinstance(row.get("images"), str):
        row["images"] = [row["images"]]

    for name, value in row.items():
        if not isinstance(value, KEYS[name]):
            raise ValueError(f'"{name}" cannot be {value!r}')
    if not 0 <= row.get("seed", 0) <= cli.MAX_SEED:
        raise ValueError(f'"seed" is {row["seed"]}: give 0 to {cli.MAX_SEED}')
    row["prompt"] = " ".join(row.get("prompt", "").split())  # no-break spaces too
    json.dumps(row, ensure_ascii=False).encode()  # a ValueError if it is no Unicode
    return row


# ---- Models and flags ----------------------------------------------------------------
def add_generation_options(parser):
    """Add the flags that choose a model and say how it generates."""
    add, bounded = parser.add_argument, cli.bounded
    add("--checkpoint", default=TINY, help="folder, hub id or public name (tiny)")
    add("--mllm", metavar="NAME", help="another place of the checkpoint's frozen MLLM")
    add("--diffusion", metavar="NAME", help="another place of its diffusion model")
    add("--vae", metavar="NAME", help="another place of its VAE")
    add("--negative-prompt", default="", help="what to steer away from")
    add("--guidance", type=bounded(float, 0, 100), help="guidance scale g; 1 is none")
    add("--image-guidance", type=bounded(float, 0, 100), help="g_img; 1 is none")
    add("--steps", type=bounded(int, 1, 1000), help="denoising steps")
    add("--seed", type=bounded(int, 0, cli.MAX_SEED), default=0, help="of noise (0)")
    add("--height", type=bounded(int, 1, 8192), help="in pixels (the model's own)")
    add("--width", type=bounded(int, 1, 8192), help="in pixels (the model's own)")
    add("--num-images", type=bounded(int, 1, 10_000), default=1, help="a prompt (1)")
    add("--batch-size", type=bounded(int, 1, 10_000), default=24, help="at a time (24)")
    add("--offload", action="store_true", help="parts visit the GPU in turn")
    add("--device", default="", help="cpu, cuda, ... (the best there is)")
    add("--dtype", default="", choices=cli.DTYPES, help="(what is fast)")


def load_model(args, exact=False):
    """The MetaQuery that the flags name, on its device. Raises InputError.

    Sets --steps and both guidance scales, unless given, to the checkpoint's; --dtype
    to what is chosen, with the reason in `args.why`. exact: on a CPU the shipped model
    computes in float32, so that a seed gives the same image on all of them."""
    from transformers.utils.logging import disable_progress_bar

    import public_weights
    from metaquery import InputError

    disable_progress_bar()
    parts = {name: getattr(args, name) for name in ("mllm", "diffusion", "vae")}
    for name, value in {"checkpoint": args.checkpoint, **parts}.items():
        if value == "":
            raise InputError(f"--{name} is empty: give a name, or leave it out.")

    device = cli.device_of(args.device)
    if exact and not args.dtype and device.type == "cpu" and args.checkpoint == TINY:
        args.dtype = "float32"
    dtype, args.why = cli.choose_dtype(device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    # Parts are loaded in this dtype; buffers, such as rotary frequencies, keep theirs.
    model = public_weights.load(args.checkpoint, dtype, trained_dtype=dtype, **parts)
    for flag, name in (("steps", "num_inference_steps"), ("guidance", "guidance_scale"),
                       ("image_guidance", "image_guidance_scale")):  # fmt: skip
        if getattr(args, flag) is None:
            setattr(args, flag, model.generation_config[name])
    if args.offload:
        return model.offload_to(device).eval()
    return model.to(device).eval()


def generate(model, rows, args, seeds=None, num_images=None, negative=None,
             callback=None):  # fmt: skip
    """Generate from (prompt, PIL images) rows: for each a list of PIL images.

    seeds: each row's noise, as if it were generated alone. negative: a prompt, or one
    for each row. What is None is the flags'. callback: as of model.generate."""
    import torch

    n = num_images or args.num_images
    seeds = seeds or [args.seed] * len(rows)
    if negative is None:
        negative = args.negative_prompt
    if isinstance(negative, str):
        negative = [negative] * len(rows)

    results = []
    step = max(1, args.batch_size // n)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        prompts, images = zip(*rows[part], strict=True)
        generators = []
        for seed in seeds[part]:
            generators += [torch.Generator(model.queries.device).manual_seed(seed)] * n
        batch = model.generate(
            prompts, list(images), negative_prompt=negative[part],
            num_inference_steps=args.steps, guidance_scale=args.guidance,
            image_guidance_scale=args.image_guidance, num_images_per_prompt=n,
            height=args.height, width=args.width, generator=generators,
            callback=callback,
        )  # fmt: skip
        results += [batch[i : i + n] for i in range(0, len(batch), n)]
    return results


def rewrite(model, prompt, images=()):
    """The prompt written out in detail by the model's own MLLM, as REWRITE asks."""
    return " ".join(model.answer(REWRITE.format(prompt), list(images)).split())


def restate(model, prompt, images=()):
    """What the MLLM takes a prompt for, in its own words, such as "a brown circle".

    "" if the checkpoint's generation_config.json does not say that it "restates"."""
    from metaquery import SYSTEM_PROMPT

    if not model.generation_config.get("restates") or not (prompt or images):
        return ""
    return model.answer(prompt, list(images), max_new_tokens=64, system=SYSTEM_PROMPT)


def unchanged(model, prompt, sources, image):
    """A line for the user if an edit changed nothing, as the MLLM sees it; else ""."""
    if not prompt or len(sources) != 1:
        return ""
    before = restate(model, "", sources)
    if not before or before != restate(model, "", [image]):
        return ""
    return "nothing changed: try other words, such as 'make the star green'"


# ---- The command ---------------------------------------------------------------------
def parse_arguments():
    parser = cli.open_parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="?", help='what to generate, in quotes; "" is unconditional')
    add("--image", action="append", default=[], dest="images", metavar="FILE",
        help="a source image; up to 6")  # fmt: skip
    add("--prompts", metavar="FILE", help="many prompts: one a line, or .jsonl")
    add("--ask", action="store_true", help="answer in text; generate nothing")
    add("--rewrite", action="store_true", help="the MLLM writes the prompt out first")
    add("--out", help="x.png: that file, a grid if several; else a folder of numbered "
        "files (a new sample.png; with --prompts a new folder samples)")  # fmt: skip
    add_generation_options(parser)
    parser.set_defaults(error="")
    args = parser.parse_args()

    if args.ask and not (args.prompt or args.prompts):
        cli.fail("--ask needs a question: write it in quotes.")
    single = args.prompt is not None or bool(args.images)
    if single == (args.prompts is not None):
        cli.fail('give a prompt or --image, or else --prompts FILE (see "--help").')
    args.prompt = args.prompt or ""

    generating = ["out", "rewrite", "negative_prompt", "guidance", "image_guidance"]
    generating += ["steps", "seed", "height", "width", "num_images", "batch_size"]
    for name in generating:
        if args.ask and getattr(args, name) != parser.get_default(name):
            flag = name.replace("_", "-")
            cli.fail(f"--{flag} has no effect with --ask: leave it out.")
    if args.out is not None:
        if cli.check_writable(args.out).suffix.lower() not in ("", *SUFFIXES):
            cli.fail(f"--out {args.out} is no image file: end it in .png.")
    return args


def prepare(model, job):
    """((prompt, PIL images), notes for the PNG) of a job. Raises InputError.

    Prints what the MLLM makes of the prompt."""
    from metaquery import MAX_IMAGES, InputError

    if job.error or len(job.images) > MAX_IMAGES:
        raise InputError(job.error or f"too many images: give at most {MAX_IMAGES}.")
    folder = Path(job.prompts or "").parent
    images = [open_image(name, folder) for name in job.images]
    model.latent_size(job.height, job.width, [images])  # refuses some sizes

    notes = {"prompt": job.prompt, "seed": job.seed, "steps": job.steps}
    notes |= {"guidance": job.guidance, "image guidance": job.image_guidance}
    notes |= {"checkpoint": job.checkpoint.removeprefix(f"{HERE}/")}
    prompt = job.prompt
    if job.rewrite:
        prompt = rewrite(model, prompt, images)
        notes["rewritten as"] = prompt
        print(f"rewritten as: {prompt}", flush=True)
    if not job.ask and (restated := restate(model, prompt, images)):
        notes["drawn as"] = restated
        print(f"drawn as: {restated}", flush=True)
    return (prompt, images), notes


def answer_jobs(model, jobs):
    """Print the MLLM's answer to every job, as it comes."""
    from transformers import TextStreamer

    from metaquery import InputError

    options = {"skip_prompt": True, "skip_special_tokens": True}
    for job in jobs:
        try:
            row, _ = prepare(model, job)
            model.answer(*row, streamer=TextStreamer(model.tokenizer, **options))
        except InputError as error:
            job.error = str(error)


def generate_jobs(model, jobs, args):
    """Generate and save, image by image in a folder, or all in a file; print where."""
    from tqdm import tqdm

    from metaquery import InputError

    size = max(1, args.batch_size // args.num_images)
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    out, sheet, count = args.out, [], 0
    # The bar appears where it takes long, and leaves no line behind.
    bar = tqdm(total=args.steps * len(batches), delay=2, leave=False)

    def kind(prepared):  # what is generated at once has one size, and images or none
        job, (_, images), _ = prepared
        return model.latent_size(job.height, job.width, [images]), not images

    for batch in batches:
        ready = []
        for job in batch:
            try:
                ready.append((job, *prepare(model, job)))
            except InputError as error:
                job.error = str(error)

        for _, group in groupby(ready, kind):
            good, rows, notes = zip(*group, strict=True)
            seeds = [job.seed for job in good]
            negative = [job.negative_prompt for job in good]
            step = lambda _: bar.update()  # noqa: E731
            results = generate(model, rows, good[0], seeds, None, negative, step)

            # A new name is taken only now that there is something to save.
            if not out and args.prompts:
                out = cli.free_name("samples")
            out = Path(out or cli.free_name("sample.png"))
            for job, row, texts, images in zip(good, rows, notes, results, strict=True):
                count += len(images)
                if line := unchanged(model, *row, images[0]):
                    texts["note"] = line
                    print(line, flush=True)
                if out.suffix:
                    sheet += images
                    continue
                out.mkdir(parents=True, exist_ok=True)
                for number, image in enumerate(images, job.number * args.num_images):
                    save_image(image, cli.free_name(out / f"{number:05d}.png"), **texts)
    bar.close()

    if sheet:
        texts["prompt"] = "\n".join(job.prompt for job in jobs if not job.error)
        image = sheet[0]
        if len(sheet) > 1:
            image = grid(sheet)
        save_image(image, out, **texts)
        print(f"saved {out}")
    elif count:
        print(f"saved {count} images in {out}")


def main():
    args = parse_arguments()
    rows = [{}]  # what each prompt changes of the flags
    if args.prompts is not None:
        rows = read_rows(args.prompts)
    errors = [row.get("error", "") for row in rows]

    if not all(errors):
        with cli.errors_in_one_line():
            model = load_model(args, exact=True)
            # A job is the flags with what its row changes.
            jobs = []
            for number, row in enumerate(rows):
                jobs.append(argparse.Namespace(**(vars(args) | row), number=number))
            if args.ask:
                answer_jobs(model, jobs)
            else:
                generate_jobs(model, jobs, args)
        errors = [job.error for job in jobs]

    # What could be done is done; what could not is named at the end.
    if len(rows) > 1:
        errors = [f"prompt {n}: {error}" for n, error in enumerate(errors, 1) if error]
    if any(errors):
        cli.fail(" ".join(errors))


if __name__ == "__main__":
    main()
