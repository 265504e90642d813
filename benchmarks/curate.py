r"""Curate documents of the toy world, whose right groups are known, and judge what comes out.

    python -m benchmarks.curate --out DIR [--documents N] [--siglip DIR]
    python -m benchmarks.curate --checkpoint DIR [--limit N]

The first makes documents, trains a tiny SigLIP on the world (ten minutes; DIR/siglip, unless it
is there), curates them with `data.curate` and a writer that reads toy pictures, and prints the
share of true groups that are found exactly, of targets that a plain search over the same features
chooses too, and of kept instructions that the exact scorer finds true. The second scores a model
that was trained on what was made: it draws one or two subjects that only the pictures show.

Do curated rows teach to follow subjects? This measures it, for one seed:

    python train.py --stage pretrain --steps 1200 --lr 1e-3 --sigma-shift 1 --out runs/base
    python -m benchmarks.curate --out runs/curate --documents 3000
    python train.py --stage instruct --data runs/curate/curated --checkpoint runs/base \
      --steps 2000 --warmup 50 --seed 0 --out runs/curated-0
    python -m benchmarks.curate --checkpoint runs/base --limit 64
    python -m benchmarks.curate --checkpoint runs/curated-0 --limit 64

Of 64 cases of one subject 0.125 are right before, and 0.276 ± 0.009 after (seeds 0, 1 and 2); of
two subjects 0.016 and 0.031 ± 0.031. The 3,000 documents gave 6,189 rows. All this is of the frozen
parts that were shipped until 25 November 2026.
"""

import argparse
import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import torch
from PIL import Image

from data.command_line import (
    DRAWING_BOUNDS,
    add_drawing_options,
    begin,
    check_bounds,
    draw,
    errors_in_one_line,
    load_model,
    stop,
    writable,
)
from data.curate import curate, open_run, parse_flags
from data.instructions import Siglip
from toy.documents import ToyWriter, goal_of_instruction, true_groups, write_documents
from toy.pretrain_siglip import train_siglip
from toy.scene import SIZE, score
from toy.tasks import task
from toy.words import describe

SUBJECT_KINDS = ("one subject", "two subjects")
SIGLIP_TRAINING = {"batch_size": 8, "device": "cpu", "workers": 0}
TOLERANCE = 2e-4  # of similarities, which curation rounds to four digits


class Recorder(ToyWriter):
    """A writer that keeps the pairs it is asked about: every group, with the target chosen."""

    def __init__(self):
        self.pairs = []

    def write(self, pairs):
        self.pairs += pairs
        return super().write(pairs)


def group_score(documents, pairs):
    """(share of true groups found exactly, share of found groups that are true)."""
    true = Counter()
    for shown in documents:
        captions = [describe(picture.scene) for picture in shown]
        true.update(frozenset(captions[i] for i in part) for part in true_groups(shown))
    found = Counter(frozenset([*p.source_captions, p.target_caption]) for p in pairs)
    right = sum((true & found).values())
    return right / sum(true.values()), right / max(1, sum(found.values()))


def target_score(pairs, encoder):
    """The share of targets that no other picture of their group is less like the others than.

    By loops over features that are made one by one.
    """
    right = []
    for pair in pairs:
        pictures = [*pair.source_images, pair.target_image]
        features = [encoder.pictures([picture])[0] for picture in pictures]
        averages = []
        for i, one in enumerate(features):
            others = [float(one @ other) for j, other in enumerate(features) if j != i]
            averages.append(sum(others) / len(others))
        right.append(averages[-1] <= min(averages) + TOLERANCE)
    return sum(right) / max(1, len(right))


def instruction_score(documents, folder):
    """(share of the folder's rows whose prompt is true, their number), by the exact scorer.

    The sources' scenes are known; with them a prompt sets a goal, which the target must satisfy.
    """
    scene_of = {describe(p.scene): p.scene for shown in documents for p in shown}
    right = []
    for file in sorted(folder.glob("train-*.parquet")):
        for row in pyarrow.parquet.read_table(file).to_pylist():
            sources = [scene_of[caption] for caption in row["source_captions"]]
            goal = goal_of_instruction(row["prompt"], sources)
            target = Image.open(io.BytesIO(row["target_image"]["bytes"]))
            right.append(goal is not None and score(target, goal))
    return sum(right) / max(1, len(right)), len(right)


def score_subjects(args):
    """Draw unseen tasks with subjects that the prompt never names, and print how many are right."""
    model = load_model(args)
    for kind in SUBJECT_KINDS:
        tasks = [task(kind, i, args.seed, "test") for i in range(args.limit)]
        drawn = draw(model, [(t.prompt, t.images) for t in tasks], args, num_images=1)
        right = [score(pictures[0], t.goal) for t, pictures in zip(tasks, drawn, strict=True)]
        print(f"{kind:>16}  {sum(right) / len(right):.3f}  of {len(right)}")


def train_if_missing(folder, steps):
    """Train a tiny SigLIP into a folder, unless one is there."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        train_siglip(SimpleNamespace(out=folder, steps=steps, **SIGLIP_TRAINING))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    begin(parser)
    add = parser.add_argument
    add("--out", metavar="DIR", help="a new folder for documents, SigLIP and curated rows")
    add("--documents", type=int, default=400, help="how many (400)")
    add("--siglip", metavar="DIR", help="a SigLIP that knows the toy world (DIR/siglip)")
    add("--siglip-steps", type=int, default=1500, help="to train one, if there is none (1500)")
    add("--limit", type=int, default=100, help="drawings of each kind for --checkpoint (100)")
    add_drawing_options(parser)
    args = parser.parse_args()
    bounds = {"documents": (1, 10**6), "siglip_steps": (1, 10**6)}
    check_bounds(vars(args), DRAWING_BOUNDS | bounds)
    if args.checkpoint:
        with errors_in_one_line():
            score_subjects(args)
        return
    if not args.out:
        stop("nothing to do: give --out DIR to curate, or --checkpoint DIR to score.")
    out = writable(args.out, is_folder=True)
    with errors_in_one_line():
        documents = write_documents(out / "documents", args.documents, args.seed)
        siglip = Path(args.siglip or out / "siglip")
        train_if_missing(siglip, args.siglip_steps)
        flags = ["--data", str(out / "documents"), "--out", str(out / "curated")]
        flags += ["--min-size", str(SIZE), "--siglip", str(siglip), "--mllm", "toy writer"]
        flags = parse_flags(flags)
        encoder, writer = Siglip(siglip), Recorder()
        stats = curate(open_run(flags), flags, encoder, writer)
    if not writer.pairs:
        stop(f"--out {out} is curated already: name a new folder.")
    found, right = group_score(documents, writer.pairs)
    true, rows = instruction_score(documents, out / "curated")
    print(f"{len(documents)} documents, {len(writer.pairs)} groups, {rows} rows")
    print(f"true groups found exactly             {found:.4f}")
    print(f"found groups that are true            {right:.4f}")
    print(f"targets least like their group        {target_score(writer.pairs, encoder):.4f}")
    print(f"kept instructions true to their pair  {true:.4f}")
    print(f"dropped pictures: {stats['dropped_pictures']}")
    print(f"instructions: {stats['instructions']}")
    for name, stage in stats["stages"].items():
        rate = stage["documents_per_second"]
        print(f"{name:>14}  {rate or 0:>10.1f} documents/s  {stage['share']:.1%} of the time")


if __name__ == "__main__":
    main()
