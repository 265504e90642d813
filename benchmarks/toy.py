"""Generate unseen tasks of the toy world and score them exactly.

    python -m benchmarks.toy [--checkpoint NAME] [--limit N] [--json FILE] [--out FILE]

prints, for each kind of task, the share of images that show everything that is asked for and
nothing else; for edits also what was changed and what was kept, for reconstructions the peak
signal-to-noise ratio, and the share of questions that the MLLM answers word for word.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
from sample import add_generation_options, generate, grid, load_model, save_image
from toy.scene import edit_score, score
from toy.talk import unseen_question
from toy.tasks import PICTURE_KINDS, SIX_KINDS, TEXT_KINDS, task

SHOWN = 10  # cases of each kind in the grid of --out


def scores(kind, pairs):
    """Means over (image, Task) pairs of one kind: {metric: value}."""
    values = {kind: [score(image, task.goal) for image, task in pairs]}
    if kind == "edit":
        parts = [edit_score(image, task) for image, task in pairs]
        values["edit changed"] = [changed for changed, _ in parts]
        values["edit kept"] = [kept for _, kept in parts]
    if kind == "reconstruction":
        off = [np.asarray(p, float) - np.asarray(task.picture, float) for p, task in pairs]
        values["PSNR in dB"] = [10 * np.log10(255**2 / max(1e-6, (d**2).mean())) for d in off]
    return {name: float(np.mean(value)) for name, value in values.items()}


def answer_share(model, args):
    """The share of --limit unseen questions that the MLLM answers word for word."""
    questions = [unseen_question(i, args.seed) for i in range(args.limit)]
    right = 0
    for talk in tqdm(questions, "answers"):
        right += model.answer(talk.user, talk.images) == talk.assistant
    return right / len(questions)


def run(model, args):
    """Do --limit unseen cases of each kind: ({metric: value}, images for a grid)."""
    table, shown = {}, []
    kinds = TEXT_KINDS
    if model.format.takes_images:
        kinds = (*TEXT_KINDS, *PICTURE_KINDS)

    for kind in tqdm(kinds, "kinds"):
        tasks = [task(kind, i, args.seed, "test") for i in range(args.limit)]
        seeds = [args.seed + i for i in range(args.limit)]  # each case has its own noise
        results = generate(model, [(t.prompt, t.images) for t in tasks], args, seeds)
        pairs = [(image, t) for t, images in zip(tasks, results, strict=True) for image in images]
        table |= scores(kind, pairs)
        for t, images in zip(tasks[:SHOWN], results, strict=False):
            shown += [*t.images[:1], images[0]]

    if model.format.takes_images:
        table["answers"] = answer_share(model, args)
    table["six-kind overall"] = sum(table[kind] for kind in SIX_KINDS) / len(SIX_KINDS)
    return table, shown


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.set_up(parser)
    add = parser.add_argument
    add("--limit", type=cli.bounded(int, 1, 10**6), default=50, help="cases of each kind (50)")
    add("--json", metavar="FILE", help="also write the values as JSON")
    add("--out", metavar="FILE.png", help="also save a grid of the first cases")
    add_generation_options(parser)
    args = parser.parse_args()
    for path in (args.json, args.out):
        if path is not None:
            cli.check_writable(path, is_folder=False)
    if args.out is not None and not args.out.lower().endswith(".png"):
        cli.fail(f"--out {args.out} is no PNG file: end it in .png.")

    start = time.time()
    with cli.errors_in_one_line():
        model = load_model(args)
        print(f"computing in {args.dtype}, {args.why}")
        table, shown = run(model, args)
    for name, value in table.items():
        print(f"{name:>20}  {value:.3f}")
    cases = args.limit * args.num_images
    print(
        f"{cases} unseen cases a kind, seed {args.seed}, {args.steps} steps, guidance "
        f"{args.guidance:g}, image guidance {args.image_guidance:g}, "
        f"{time.time() - start:.0f} s"
    )

    if args.json:
        names = ("seed", "steps", "guidance", "image_guidance", "dtype")
        settings = {name: getattr(args, name) for name in names}
        result = {"scores": table, "pictures_per_kind": cases} | settings
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    if args.out:
        save_image(grid(shown, 20), args.out)
        print(f"saved {args.out}")


if __name__ == "__main__":
    main()
