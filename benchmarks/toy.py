"""Draw unseen tasks of the toy world and score them exactly.

    python -m benchmarks.toy [--checkpoint DIR] [--limit N] [--json FILE] [--out FILE]

prints, for each kind of task, the share of pictures that show everything that is asked for and
nothing else; for edits also what was changed and what was kept, for reconstructions the peak
signal-to-noise ratio, and the share of questions that the MLLM answers word for word.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import begin, check_bounds, errors_in_one_line, writable
from sample import DRAWING_BOUNDS, add_drawing_options, draw, load_model
from sample import grid, save_picture
from toy.scene import edit_score, score
from toy.talk import unseen_question
from toy.tasks import PICTURE_KINDS, SIX_KINDS, TEXT_KINDS, task

SHOWN = 10  # cases of each kind in the grid of --out


def scores(kind, pairs):
    """Means over (picture, Task) pairs of one kind: {name: figure}."""
    values = {kind: [score(picture, task.goal) for picture, task in pairs]}
    if kind == "edit":
        parts = [edit_score(picture, task) for picture, task in pairs]
        values["edit changed"] = [changed for changed, _ in parts]
        values["edit kept"] = [kept for _, kept in parts]
    if kind == "reconstruction":
        off = [np.asarray(p, float) - np.asarray(task.picture, float) for p, task in pairs]
        values["PSNR in dB"] = [10 * np.log10(255**2 / max(1e-6, (d**2).mean())) for d in off]
    return {name: float(np.mean(value)) for name, value in values.items()}


def answer_share(model, args):
    """The share of --limit unseen questions that the MLLM answers word for word."""
    asked = [unseen_question(i, args.seed) for i in tqdm(range(args.limit), "answers")]
    right = [model.answer(talk.user, talk.images) == talk.assistant for talk in asked]
    return sum(right) / len(right)


def run(model, args):
    """Draw and answer --limit unseen cases of each kind: ({name: figure}, pictures for a grid)."""
    table, shown = {}, []
    kinds = (*TEXT_KINDS, *PICTURE_KINDS) if model.takes_images else TEXT_KINDS
    for kind in tqdm(kinds, "kinds"):
        tasks = [task(kind, i, args.seed, "test") for i in range(args.limit)]
        seeds = [args.seed + i for i in range(args.limit)]  # each case has its own noise
        drawn = draw(model, [(t.prompt, t.images) for t in tasks], args, seeds)
        cases = list(zip(tasks, drawn, strict=True))
        table |= scores(kind, [(picture, t) for t, pictures in cases for picture in pictures])
        for t, pictures in cases[:SHOWN]:
            shown += [*t.images[:1], pictures[0]]
    if model.takes_images:
        table["answers"] = answer_share(model, args)
    table["six-kind overall"] = sum(table[kind] for kind in SIX_KINDS) / len(SIX_KINDS)
    return table, shown


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    begin(parser)
    parser.add_argument("--limit", type=int, default=50, help="cases of each kind (50)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--out", metavar="FILE.png", help="also save a grid of the first cases")
    add_drawing_options(parser)
    args = parser.parse_args()
    check_bounds(vars(args), DRAWING_BOUNDS)
    for path in filter(None, (args.json, args.out)):
        writable(path, is_folder=False)
    began = time.time()
    with errors_in_one_line():
        table, shown = run(load_model(args), args)
    for name, value in table.items():
        print(f"{name:>20}  {value:.3f}")
    cases = args.limit * args.num_images
    print(
        f"{cases} unseen cases a kind, seed {args.seed}, {args.steps} steps, guidance "
        f"{args.guidance:g}, image guidance {args.image_guidance:g}, "
        f"{time.time() - began:.0f} s"
    )
    if args.json:
        names = ("seed", "steps", "guidance", "image_guidance")
        settings = {name: getattr(args, name) for name in names}
        written = {"scores": table, "pictures_per_kind": cases} | settings
        Path(args.json).write_text(json.dumps(written, indent=2) + "\n")
    if args.out:
        save_picture(grid(shown, 20), args.out)
        print(f"saved {args.out}")


if __name__ == "__main__":
    main()
