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
import sys
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
from data.pictures import grid, save_picture
from data.prompts import Job, read_jobs
from toy.vocabulary import FILE, unknown_words

KNOWS = (
    "The tiny model knows 6 shapes, 8 colours, counts to 4, relations, edits, facts: see --help."
)
PICTURE_FILES = ("", ".png", ".jpg", ".jpeg", ".webp")  # "" is a folder


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
            drawn = draw(model, rows, args, callback=lambda _: progress.update())
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
