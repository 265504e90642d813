"""Draw with MetaQuery from the command line.

python sample.py "a red star left of a blue circle"     draws with weights/tiny
python sample.py "make the star green" --image a.png    edits (several --image: follows subjects)
python sample.py --image a.png                          reconstructs
python sample.py "how many stars?" --image a.png --ask  answers in text, by the untouched MLLM
python sample.py --prompts FILE --out DIR               one prompt a line, or .jsonl with "prompt"
                                                        (and "images", a list of files), or a
                                                        .json list of such objects or of prompts

The tiny model knows circles, squares, triangles, stars, crosses and diamonds, in red, green, blue,
yellow, purple, orange, pink and brown; numbers up to four; left of, right of, above, below; white,
grey and black backgrounds; edits; and a few dozen facts, such as the colour of a ripe banana.
"""

import argparse
import difflib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from data.command_line import (
    BATCH,
    DRAWING_BOUNDS,
    add_drawing_options,
    begin,
    check_bounds,
    draw,
    errors_in_one_line,
    load_model,
    not_taken,
    stop,
    writable,
)
from data.pictures import grid, open_picture, save_picture
from toy.vocabulary import FILE, unknown_words

KNOWS = (
    "The tiny model knows 6 shapes, 8 colours, counts to 4, relations, edits, facts: see --help."
)
PICTURE_FILES = ("", ".png", ".jpg", ".jpeg", ".webp")  # "" is a folder


@dataclass
class Job:
    """One thing to draw or to answer: a prompt and picture files, or why it cannot be read."""

    prompt: str = ""
    files: list = field(default_factory=list)
    error: str = ""
    images: list = field(default_factory=list)  # the files' pictures, PIL

    def __post_init__(self):
        self.prompt = " ".join(self.prompt.split())  # no-break spaces too
        if self.prompt != self.prompt.encode(errors="ignore").decode():
            self.error = "the prompt is not valid Unicode text: correct it."

    def open_images(self):
        """Open the picture files; a file that cannot be opened becomes the job's error."""
        from metaquery import MAX_PICTURES

        if len(self.files) > MAX_PICTURES:
            self.error = f"{len(self.files)} pictures: give at most {MAX_PICTURES}."
        if not self.error:
            try:
                self.images = [open_picture(path) for path in self.files]
            except ValueError as error:
                self.error = str(error)
        return self


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    begin(parser)
    add = parser.add_argument
    add("prompt", nargs="?", help='what to draw; "" draws without a condition')
    add("--image", action="append", default=[], metavar="FILE", help="a source picture; up to 6")
    add("--ask", action="store_true", help="answer the prompt in text; draw nothing")
    add("--prompts", metavar="FILE", help='many prompts: one a line, or .jsonl with "prompt"')
    add(
        "--out",
        help="x.png: that file, a grid if several; else a folder of numbered files (sample.png, "
        "or samples with --prompts; with a number if that exists)",
    )
    add_drawing_options(parser)
    args = parser.parse_args()
    if args.ask and not (args.prompt or args.prompts):
        stop('--ask needs a question: sample.py "how many stars?" --image a.png --ask.')
    single = args.prompt is not None or bool(args.image)
    if single == (args.prompts is not None):
        stop('give a prompt or --image, or else --prompts FILE (see "--help").')
    check_bounds(vars(args), DRAWING_BOUNDS)
    return args


def read_jobs(path):
    """The `Job` of each row of a prompts file; a row that cannot be read has its error set."""
    kind = Path(path).suffix.lower()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # without a byte-order mark
        rows = json.loads(text) if kind == ".json" else text.split("\n")
    except (OSError, ValueError) as error:
        stop(f"cannot read --prompts {path} ({error}): give a text file with one prompt a line.")
    if not isinstance(rows, list):
        stop(f"--prompts {path} is not a JSON list: write a list of prompts, or a .jsonl file.")
    jobs = []
    for number, row in enumerate(rows, 1):
        place = f"{path} {'item' if kind == '.json' else 'line'} {number}"
        if kind == ".json":
            jobs.append(Job(row) if isinstance(row, str) else job_of(row, place, Path(path)))
        elif row.strip():
            jobs.append(read_json_line(row, place, Path(path)) if kind == ".jsonl" else Job(row))
    if not jobs:
        stop(f"--prompts {path} is empty: write one prompt a line.")
    return jobs


def read_json_line(line, place, path):
    """The `Job` of a line of a .jsonl file."""
    try:
        return job_of(json.loads(line), place, path)
    except ValueError:
        return Job(error=f"{place} is not JSON: correct that line.")


def job_of(row, place, path):
    """The `Job` of {"prompt": text, "images": [file, ...]}; files are beside `path`, or here."""
    expected = 'give a JSON object with a "prompt" text and "images" files, or one of them'
    for key in set(row) - {"prompt", "images"} if isinstance(row, dict) else ():
        if meant := difflib.get_close_matches(key, ("prompt", "images")):
            return Job(error=f'{place} has "{key}": write "{meant[0]}".')
    if not isinstance(row, dict) or not row.keys() & {"prompt", "images"}:
        return Job(error=f"{place}: {expected}.")
    prompt, images = row.get("prompt", ""), row.get("images", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(prompt, str) or not isinstance(images, list):
        return Job(error=f"{place}: {expected}.")
    if not all(isinstance(image, str) for image in images):
        return Job(error=f"{place}: {expected}.")
    beside = [path.parent / image for image in images]
    return Job(prompt, [b if b.exists() else i for b, i in zip(beside, images, strict=True)])


def warn_of_unknown_words(jobs, vocabulary):
    """Name, in one line, the prompts' words that the tiny model has never seen."""
    unknown = unknown_words([job.prompt for job in jobs], vocabulary)
    if unknown:
        print(f"warning: the tiny model never saw: {', '.join(unknown)}.", file=sys.stderr)


def draw_jobs(model, jobs, args, out):
    """Draw every job without an error and save it at once, or all in one grid; print where."""
    from tqdm import tqdm

    notes = {"seed": args.seed, "steps": args.steps, "guidance": args.guidance}
    notes |= {"image guidance": args.image_guidance, "checkpoint": args.checkpoint or args.size}
    shown, prompts = [], []  # in the grid
    count = 0
    batches = [range(len(jobs))[start : start + BATCH] for start in range(0, len(jobs), BATCH)]
    # A bar appears where drawing takes long, and leaves no line behind.
    with tqdm(total=args.steps * len(batches), desc="drawing", delay=2, leave=False) as progress:
        for places in batches:
            batch = {i: jobs[i].open_images() for i in places}
            batch = {i: job for i, job in batch.items() if not job.error}
            rows = [(job.prompt, job.images) for job in batch.values()]
            drawn = draw(model, rows, args, callback=progress.update)
            for (index, job), pictures in zip(batch.items(), drawn, strict=True):
                count += len(pictures)
                if out.suffix:
                    shown += pictures
                    prompts.append(job.prompt)
                    continue
                for i, picture in enumerate(pictures):
                    name = f"{index * args.num_images + i:05d}.png"
                    save_picture(picture, out / name, prompt=job.prompt, **notes)
    if shown:
        picture = shown[0] if len(shown) == 1 else grid(shown)
        save_picture(picture, out, prompt="\n".join(prompts), **notes)
    if count:
        what = out if out.suffix else f"{count} pictures in {out}"
        print(f"saved {what} (seed {args.seed})")


def answer_jobs(model, jobs):
    """Print the MLLM's answer to every job without an error, as it comes."""
    from transformers import TextStreamer

    for job in jobs:
        if not job.open_images().error:
            streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
            model.answer(job.prompt, job.images, streamer=streamer)


def main():
    args = parse_arguments()
    one = args.prompts is None
    jobs = [Job(args.prompt or "", args.image)] if one else read_jobs(args.prompts)
    if all(job.error for job in jobs):
        stop(" ".join(job.error for job in jobs))
    out = not_taken(Path("sample.png" if one else "samples")) if args.out is None else args.out
    if not args.ask:
        out = writable(out)
        if out.suffix.lower() not in PICTURE_FILES:
            advice = "end it in .png, .jpg or .webp, or name a folder"
            stop(f"--out {out} is not a picture file: {advice}.")
    with errors_in_one_line():
        model = load_model(args)
        vocabulary = Path(model.config.mllm) / FILE  # only the toy world's MLLM has one
        if vocabulary.exists():
            if not args.ask:  # whose output is the answer alone
                print(KNOWS, flush=True)
            warn_of_unknown_words(jobs, vocabulary)
        if args.ask:
            answer_jobs(model, jobs)
        else:
            draw_jobs(model, jobs, args, out)
    errors = [(number, job.error) for number, job in enumerate(jobs, 1) if job.error]
    if errors:
        stop(" ".join(f"prompt {n}: {error}" if len(jobs) > 1 else error for n, error in errors))


if __name__ == "__main__":
    main()
