"""Draw with MetaQuery from the command line.

python sample.py "a red star left of a blue circle"     draws with weights/tiny
python sample.py "make the star green" --image a.png    edits (several --image: follows subjects)
python sample.py --image a.png                          reconstructs
python sample.py "how many stars?" --image a.png --ask  answers in text, by the untouched MLLM
python sample.py --prompts FILE --out DIR               one prompt a line, or .jsonl with "prompt"
                                                        (and "images", a list of files)

The tiny model knows circles, squares, triangles, stars, crosses and diamonds, in red, green, blue,
yellow, purple, orange, pink and brown; numbers up to four; left of, right of, above, below; white,
grey and black backgrounds; edits; and a few dozen facts, such as the colour of a ripe banana.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from data.command_line import (
    BATCH,
    DRAWING_BOUNDS,
    add_drawing_options,
    check_bounds,
    draw,
    load_model,
    stop,
    writable,
)
from data.pictures import grid, open_picture
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
    parser.error = stop
    add = parser.add_argument
    add("prompt", nargs="?", help='what to draw; "" draws without a condition')
    add("--image", action="append", default=[], metavar="FILE", help="a source picture; up to 6")
    add("--ask", action="store_true", help="answer the prompt in text; draw nothing")
    add("--prompts", metavar="FILE", help='many prompts: one a line, or .jsonl with "prompt"')
    add("--out", help="x.png: that file, a grid if several; else a folder of numbered files")
    add_drawing_options(parser)
    args = parser.parse_args()
    if args.ask and not (args.prompt or args.prompts):
        stop('--ask needs a question: sample.py "how many stars?" --image a.png --ask.')
    single = args.prompt is not None or bool(args.image)
    if single == (args.prompts is not None):
        stop('give a prompt or --image, or else --prompts FILE (see "--help").')
    check_bounds(args, DRAWING_BOUNDS)
    return args


def read_jobs(path):
    """The `Job` of each line of a prompts file; a line that cannot be read has its error set."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"cannot read --prompts {path} ({error}): give a text file with one prompt a line.")
    is_jsonl = path.endswith(".jsonl")
    jobs = [
        read_json_job(line, number, Path(path)) if is_jsonl else Job(line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not jobs:
        stop(f"--prompts {path} is empty: write one prompt a line.")
    return jobs


def read_json_job(line, number, path):
    """The `Job` of a line {"prompt": text, "images": [file, ...]}; files beside `path`, or here."""
    try:
        row = json.loads(line)
        images = row.get("images") or []
        images = [images] if isinstance(images, str) else images
        beside = [path.parent / image for image in images]
        files = [b if b.exists() else i for b, i in zip(beside, images, strict=True)]
        prompt = row.get("prompt") or ""
        if not isinstance(prompt, str) or not (files or "prompt" in row):
            raise TypeError
        return Job(prompt, files)
    except (json.JSONDecodeError, AttributeError, TypeError):
        what = f'{path} line {number} is not a JSON object with a "prompt" text'
        return Job(error=f'{what} and "images" files, or one of them: correct that line.')


def warn_of_unknown_words(jobs, vocabulary):
    """Name, in one line, the prompts' words that the tiny model has never seen."""
    unknown = unknown_words([job.prompt for job in jobs], vocabulary)
    if unknown:
        print(f"warning: the tiny model never saw: {', '.join(unknown)}.", file=sys.stderr)


def draw_jobs(model, jobs, args, out):
    """Draw every job without an error and save it at once, or all in one grid; print where."""
    from tqdm import tqdm

    shown = []  # in the grid
    count = 0
    for start in tqdm(range(0, len(jobs), BATCH), "drawing", disable=len(jobs) <= BATCH):
        batch = {start + i: job.open_images() for i, job in enumerate(jobs[start : start + BATCH])}
        batch = {index: job for index, job in batch.items() if not job.error}
        drawn = draw(model, [(job.prompt, job.images) for job in batch.values()], args)
        for index, pictures in zip(batch, drawn, strict=True):
            count += len(pictures)
            if out.suffix:
                shown += pictures
                continue
            for i, picture in enumerate(pictures):
                picture.save(out / f"{index * args.num_images + i:05d}.png")
    if shown:
        (shown[0] if len(shown) == 1 else grid(shown)).save(out)
    if count:
        print(f"saved {out}" if out.suffix else f"saved {count} pictures in {out}")


def answer_jobs(model, jobs):
    """Print the MLLM's answer to every job without an error, as it comes."""
    from transformers import TextStreamer

    for job in jobs:
        if not job.open_images().error:
            streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
            model.answer(job.prompt, job.images, streamer=streamer)


def main():
    args = parse_arguments()
    jobs = read_jobs(args.prompts) if args.prompts else [Job(args.prompt or "", args.image)]
    out = writable(args.out or ("samples" if args.prompts else "sample.png"))
    if out.suffix.lower() not in PICTURE_FILES:
        stop(f"--out {out} is not a picture file: end it in .png, .jpg or .webp, or name a folder.")

    from metaquery import InputError

    try:
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
    except (InputError, RuntimeError, AssertionError, OSError) as error:
        stop(error)
    errors = [(number, job.error) for number, job in enumerate(jobs, 1) if job.error]
    if errors:
        stop(" ".join(f"prompt {n}: {error}" if len(jobs) > 1 else error for n, error in errors))


if __name__ == "__main__":
    main()
