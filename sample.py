"""Draw with MetaQuery from the command line.

python sample.py "a red star left of a blue circle"     draws with weights/tiny
python sample.py --prompts FILE --out DIR               one prompt a line, or .jsonl with "prompt"
python sample.py --benchmark shapes --json FILE         draws unseen prompts and scores them
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BATCH = 25


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = stop
    add = parser.add_argument
    add("prompt", nargs="?", help='what to draw; "" draws without a condition')
    add("--prompts", metavar="FILE", help='many prompts: one a line, or .jsonl with "prompt"')
    add(
        "--benchmark", choices=["shapes"], help="draw and score the embedded world's unseen prompts"
    )
    add("--limit", type=int, default=50, help="benchmark prompts a kind (default 50)")
    add("--json", metavar="FILE", help="also write the benchmark's table as JSON")
    add("--size", default="tiny", help="tiny (shipped), base, large or xlarge")
    add(
        "--checkpoint",
        metavar="DIR",
        help="a folder that train.py has saved (default weights/SIZE)",
    )
    add("--negative-prompt", default="", help="what to steer away from")
    add("--guidance", type=float, default=3.0, help="guidance scale g; 1 is none (default 3)")
    add("--steps", type=int, default=30, help="denoising steps (default 30)")
    add("--seed", type=int, default=0, help="seed of the starting noise (default 0)")
    add("--num-images", type=int, default=1, help="pictures a prompt (default 1)")
    add(
        "--out",
        default=None,
        help="x.png: that file, a grid if several; else a folder of numbered files",
    )
    add("--device", default=None, help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    given = [args.prompt is not None, args.prompts is not None, args.benchmark is not None]
    if sum(given) != 1:
        stop('give one prompt, or --prompts FILE, or --benchmark shapes (see "sample.py --help").')
    for name, least in (("steps", 1), ("num_images", 1), ("limit", 1), ("guidance", 0)):
        if not getattr(args, name) >= least:
            stop(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}."
            )
    return args


def stop(message):
    """End on bad input as every command here does, without loading torch to say so."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def read_prompts(path):
    """The prompts of a file: every line that is not blank, or each .jsonl line's "prompt"."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"cannot read --prompts {path} ({error}): give a text file with one prompt a line.")
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.endswith(".jsonl"):
            try:
                line = json.loads(line)["prompt"]
                if not isinstance(line, str):
                    raise TypeError
            except (json.JSONDecodeError, KeyError, TypeError):
                stop(
                    f'{path} line {number} is no JSON object with a "prompt" text: mend that line.'
                )
        prompts.append(line)
    if not prompts:
        stop(f"--prompts {path} is empty: write one prompt a line.")
    return prompts


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


def grid(pictures, columns=None):
    """Pictures side by side in one PIL picture, two pixels apart, as square as they come."""
    from PIL import Image

    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + 2), i // columns * (height + 2)))
    return sheet


def draw(model, prompts, args):
    """Pictures of prompts, batch by batch: --num-images of each, from --seed."""
    import torch
    from tqdm import tqdm

    for start in tqdm(range(0, len(prompts), BATCH), desc="drawing", disable=len(prompts) <= BATCH):
        part = prompts[start : start + BATCH]
        generators = []
        for _ in part:
            generators += [torch.Generator(model.device).manual_seed(args.seed)] * args.num_images
        yield from model.generate(
            part,
            negative_prompt=args.negative_prompt,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            num_images_per_prompt=args.num_images,
            generator=generators,
        )


def benchmark(model, args):
    """Draw --limit unseen prompts of each kind and score them; prints and saves a table."""
    from data.shapes import SIX_KINDS, TEXT_KINDS, sample, score

    samples = {
        kind: [sample(kind, i, args.seed, "test") for i in range(args.limit)] for kind in TEXT_KINDS
    }
    began = time.time()
    pictures = draw(model, [s.prompt for group in samples.values() for s in group], args)
    shares, shown = {}, []
    for kind, group in samples.items():
        drawn = [[next(pictures) for _ in range(args.num_images)] for _ in group]
        right = [score(p, s.want) for row, s in zip(drawn, group, strict=True) for p in row]
        shares[kind] = sum(right) / len(right)
        shown += [row[0] for row in drawn[:10]]
        print(f"{kind:>16}  {shares[kind]:.3f}", flush=True)
    shares["six-kind overall"] = sum(shares[kind] for kind in SIX_KINDS) / len(SIX_KINDS)
    print(f"six-kind overall  {shares['six-kind overall']:.3f}")
    made = args.limit * args.num_images
    print(f"{made} pictures of unseen prompts a kind, seed {args.seed}, {args.steps} steps, "
          f"guidance {args.guidance:g}, {time.time() - began:.0f} s")  # fmt: skip
    if args.json:
        table = {"scores": shares, "pictures_per_kind": made}
        table |= {name: getattr(args, name) for name in ("seed", "steps", "guidance")}
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n")
    if args.out:
        path = Path(args.out)
        path = path if path.suffix else path / "benchmark.png"
        grid(shown, min(10, args.limit)).save(path)
        print(f"saved {path}")


def main():
    args = arguments()
    prompts = read_prompts(args.prompts) if args.prompts else [args.prompt]
    out = writable(args.out or ("samples" if args.prompts else "sample.png"))
    if out.suffix.lower() not in ("", ".png", ".jpg", ".jpeg", ".webp"):
        stop(f"--out {out} is no kind of picture: end it in .png, .jpg or .webp, or name a folder.")
    if args.json:
        writable(args.json)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from metaquery import InputError, MetaQuery, MetaQueryConfig

    disable_progress_bar()
    try:
        MetaQueryConfig.preset(args.size)
        folder = args.checkpoint or HERE / "weights" / args.size
        if not args.checkpoint and not folder.exists():
            stop(
                f"no weights are shipped for --size {args.size}: give --checkpoint DIR of train.py."
            )
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = MetaQuery.from_pretrained(folder).to(device, getattr(torch, args.dtype)).eval()
    except (InputError, RuntimeError, AssertionError) as error:
        stop(error)
    if args.benchmark:
        return benchmark(model, args)
    pictures = draw(model, prompts, args)
    if out.suffix:
        pictures = list(pictures)
        (pictures[0] if len(pictures) == 1 else grid(pictures)).save(out)
        print(f"saved {out}")
    else:
        for number, picture in enumerate(pictures):
            picture.save(out / f"{number:05d}.png")
        print(f"saved {number + 1} pictures in {out}")


if __name__ == "__main__":
    main()
