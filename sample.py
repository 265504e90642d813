"""Draw with MetaQuery from the command line.

python sample.py "a red star left of a blue circle"     draws with weights/tiny
python sample.py "make the star green" --image a.png    edits (several --image: follows subjects)
python sample.py --image a.png                          reconstructs
python sample.py "how many stars?" --image a.png --ask  answers in text, by the untouched MLLM
python sample.py --prompts FILE --out DIR               one prompt a line, or .jsonl with "prompt"
                                                        (and "images", a list of files)
python sample.py --benchmark shapes --json FILE         draws unseen prompts and scores them
python sample.py --benchmark geneval --data DIR --out DIR   draws others' prompts for their scorers
"""

import argparse
import json
import os
import sys
from pathlib import Path

from data.pictures import grid, open_picture

HERE = Path(__file__).resolve().parent
BATCH = 25
BENCHMARKS = ("shapes", "geneval", "dpg", "wise", "commonsense", "mjhq", "coco", "imagenet",
              "dreambench")  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = stop
    add = parser.add_argument
    add("prompt", nargs="?", help='what to draw; "" draws without a condition')
    add("--image", action="append", default=[], metavar="FILE", help="a source picture; up to 6")
    add("--ask", action="store_true", help="answer the prompt in text; draw nothing")
    add("--prompts", metavar="FILE", help='many prompts: one a line, or .jsonl with "prompt"')
    add("--benchmark", choices=BENCHMARKS, help="shapes is scored too; others need --data")
    add("--data", metavar="DIR", help="where the benchmark's own prompts or pictures are")
    add("--limit", type=int, help="the first N prompts only (shapes: N a kind, default 50)")
    add("--json", metavar="FILE", help="also write the benchmark's table as JSON")
    add("--size", default="tiny", help="tiny (shipped), base, large or xlarge")
    add("--checkpoint", metavar="DIR", help="a folder of train.py (default weights/SIZE)")
    add("--negative-prompt", default="", help="what to steer away from")
    add("--guidance", type=float, default=3.0, help="guidance scale g; 1 is none (default 3)")
    add("--image-guidance", type=float, default=1.5, help="g_img; at most 1 is none (default 1.5)")
    add("--steps", type=int, default=30, help="denoising steps (default 30)")
    add("--seed", type=int, default=0, help="seed of the starting noise (default 0)")
    add("--num-images", type=int, default=1, help="pictures a prompt (default 1)")
    add("--out", help="x.png: that file, a grid if several; else a folder of numbered files")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    if args.ask and not (args.prompt or args.prompts):
        stop('--ask needs a question: sample.py "how many stars?" --image a.png --ask.')
    single = args.prompt is not None or bool(args.image)
    if single + (args.prompts is not None) + (args.benchmark is not None) != 1:
        stop('give a prompt or --image, or --prompts FILE, or --benchmark shapes (see "--help").')
    for name, least in {"steps": 1, "num-images": 1, "limit": 1, "guidance": 0}.items():
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not value >= least:
            stop(f"--{name} is {value}: it must be at least {least}.")
    return args


def stop(message):
    """End on bad input as every command here does, without loading torch to say so."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def read_jobs(path):
    """(prompt, picture files) of each line of a file; a line that cannot be read as a ValueError.

    A .jsonl line is {"prompt": text, "images": [file, ...]}, files as they are found from here or
    else beside the .jsonl.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"cannot read --prompts {path} ({error}): give a text file with one prompt a line.")
    jobs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        job = (line, [])
        if path.endswith(".jsonl"):
            try:
                row = json.loads(line)
                images = (
                    [row["images"]] if isinstance(row.get("images"), str) else row.get("images")
                )
                beside = [Path(path).parent / image for image in images or []]
                found = [b if b.exists() else i for b, i in zip(beside, images or [], strict=True)]
                job = (row.get("prompt") or "", found)
                if not isinstance(job[0], str) or not (found or "prompt" in row):
                    raise TypeError
            except (json.JSONDecodeError, AttributeError, TypeError):
                what = f'{path} line {number} is no JSON object with a "prompt" text'
                job = ValueError(f'{what} and "images" files, or one of them: mend that line.')
        jobs.append(job)
    if not jobs:
        stop(f"--prompts {path} is empty: write one prompt a line.")
    return jobs


def writable(out):
    """The path to write to; ends with a line, before anything is drawn, where one cannot."""
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


def ready(jobs, errors, first=0):
    """(number, prompt, PIL pictures) of each job that is well; of the others, (number, error).

    The errors are kept for the end: nothing that can be drawn is lost where one line is bad.
    """
    from metaquery import MAX_PICTURES

    for number, job in enumerate(jobs, first):
        try:
            if isinstance(job, ValueError):
                raise job
            if len(job[1]) > MAX_PICTURES:
                raise ValueError(f"{len(job[1])} pictures: give at most {MAX_PICTURES}.")
            pictures = [open_picture(path) for path in job[1]]
            yield number, job[0], pictures
        except ValueError as error:
            errors.append((number, error))


def draw(model, rows, args, seeds=None):
    """Pictures of (prompt, PIL pictures) rows: for each a list of --num-images.

    Every row's noise is from --seed, as if it were drawn alone, or from its own of `seeds`.
    """
    import torch

    drawn, n = [], args.num_images
    for start in range(0, len(rows), BATCH):
        prompts, images = zip(*rows[start : start + BATCH], strict=True)
        own = (seeds or [args.seed] * len(rows))[start : start + BATCH]
        seeded = [torch.Generator(model.queries.device).manual_seed(seed) for seed in own]
        pictures = model.generate(
            prompts,
            images,
            negative_prompt=args.negative_prompt,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            image_guidance_scale=args.image_guidance,
            num_images_per_prompt=n,
            generator=[generator for generator in seeded for _ in range(n)],
        )
        drawn += [pictures[i : i + n] for i in range(0, len(pictures), n)]
    return drawn


def draw_jobs(model, jobs, args, out, errors):
    """Draw every job that is well and save it at once, or all in one grid; prints where."""
    from tqdm import tqdm

    shown, count = [], 0
    for start in tqdm(range(0, len(jobs), BATCH), "drawing", disable=len(jobs) <= BATCH):
        rows = list(ready(jobs[start : start + BATCH], errors, start))
        drawn = draw(model, [row[1:] for row in rows], args)
        for row, pictures in zip(rows, drawn, strict=True):
            for i, picture in enumerate(pictures):
                if out.suffix:
                    shown.append(picture)
                else:
                    picture.save(out / f"{row[0] * args.num_images + i:05d}.png")
            count += len(pictures)
    if shown:
        (shown[0] if len(shown) == 1 else grid(shown)).save(out)
    if count:
        print(f"saved {out}" if out.suffix else f"saved {count} pictures in {out}")


def answer_jobs(model, jobs, errors):
    """Print the MLLM's answer to every job that is well, as it is made."""
    from transformers import TextStreamer

    for _, prompt, pictures in ready(jobs, errors):
        streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.answer(prompt, pictures, streamer=streamer)


def main():
    args = arguments()
    jobs = read_jobs(args.prompts) if args.prompts else [(args.prompt or "", args.image)]
    official = args.benchmark not in (None, "shapes")
    args.out = args.out or (f"samples-{args.benchmark}" if official else args.out)
    out = writable(args.out or ("samples" if args.prompts else "sample.png"))
    if out.suffix.lower() not in ("", ".png", ".jpg", ".jpeg", ".webp"):
        stop(f"--out {out} is no kind of picture: end it in .png, .jpg or .webp, or name a folder.")
    if args.json:
        writable(args.json)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from metaquery import InputError, MetaQuery, MetaQueryConfig

    disable_progress_bar()
    errors = []
    try:
        MetaQueryConfig.preset(args.size)
        folder = args.checkpoint or HERE / "weights" / args.size
        if not args.checkpoint and not folder.exists():
            stop(f"no weights are shipped for --size {args.size}: give --checkpoint DIR.")
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = args.device or (gpu if torch.cuda.is_available() else "cpu")
        model = MetaQuery.from_pretrained(folder).to(device, getattr(torch, args.dtype)).eval()
        if args.benchmark:
            from data import benchmarks

            run = benchmarks.official if official else benchmarks.shapes
            run(model, draw, args)
        elif args.ask:
            answer_jobs(model, jobs, errors)
        else:
            draw_jobs(model, jobs, args, out, errors)
    except (InputError, RuntimeError, AssertionError, OSError) as error:
        stop(error)
    if errors:
        stop(" ".join(f"prompt {i + 1}: {e}" if len(jobs) > 1 else str(e) for i, e in errors))


if __name__ == "__main__":
    main()
