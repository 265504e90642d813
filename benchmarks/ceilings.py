"""Where an edit or a subject is lost: in the MLLM, in the condition, or in the diffusion model.

    python -m benchmarks.ceilings [--checkpoint DIR] [--limit N] [--samples N]

asks for the same unseen cases in four ways, and prints by the number of objects in the source
pictures the share

- restated: that the frozen MLLM, asked to describe what is to be drawn, does in the right words;
- read out: whose objects are all read from the condition, right and in place, by a linear map that
  is fitted to --samples cases of training: does the condition hold the scene?
- drawn from words: drawn right when the scene is described in plain words instead;
- drawn: drawn right from the picture and the instruction.

What the first or the third loses, the fourth can hardly draw. The second is a lower bound on what
the condition holds: the diffusion model may read more from it than a linear map does.
"""

import argparse

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.command_line import (
    DRAWING_BOUNDS,
    add_drawing_options,
    begin,
    check_bounds,
    draw,
    errors_in_one_line,
    load_model,
)
from toy.pretrain_mllm import answers
from toy.scene import COLORS, PATTERNS, PLACES, SHAPES, goal_of, place_of, score
from toy.talk import Talk
from toy.tasks import task

# The numbers of objects in a case's source pictures. A scene of four has no room for a free fifth.
NUMBERS = {
    "edit": (1, 2, 3, 4),
    "free edit": (1, 2, 3),
    "one subject": (1,),
    "two subjects": (2,),
    "three subjects": (3,),
}
BATCH = 64  # conditions computed at a time
RIDGE = 1.0  # λ of the linear map
# What the map tells of each place: all "none" where nothing stands, and `inner` of plain objects.
LABELS = {
    "color": ("none", *COLORS),
    "shape": ("none", *SHAPES),
    "pattern": ("none", *PATTERNS),
    "inner": ("none", *COLORS),
}


def cases_by_number(kind, limit, seed):
    """{number of objects in the source pictures: `limit` unseen tasks of a kind}."""
    cases = {number: [] for number in NUMBERS[kind]}
    index = 0
    while min(map(len, cases.values())) < limit:
        made = task(kind, index, seed, "test")
        index += 1
        number = sum(len(source.objects) for source in made.sources)
        if number in cases and len(cases[number]) < limit:
            cases[number].append(made)
    return cases


# ---- The linear map from a condition to a scene --------------------------------------------------


@torch.no_grad()
def conditions(model, tasks):
    """The conditions of tasks as rows, with a 1 at their ends: (tasks, L·c + 1)."""
    rows = []
    for start in tqdm(range(0, len(tasks), BATCH), "conditions", leave=False):
        some = tasks[start : start + BATCH]
        cond, _ = model.encode_prompts([t.prompt for t in some], [t.images for t in some])
        rows.append(F.pad(cond.flatten(1).float().cpu(), (0, 1), value=1.0))
    return torch.cat(rows)


def scene_labels(scene):
    """For each of PLACES the index of what LABELS tells of it: (4, 9)."""
    found = {place_of(item): item for item in scene.objects}
    labels = torch.zeros(len(LABELS), len(PLACES), dtype=torch.long)
    for row, (field, names) in enumerate(LABELS.items()):
        for column, place in enumerate(PLACES):
            if place in found:
                value = getattr(found[place], field)
                labels[row, column] = names.index(value or "none")
    return labels


def fit_readout(x, scenes):
    """W of the ridge regression x·W ≈ one-hot labels: W = (xᵀx + λ·1)⁻¹·xᵀy."""
    labels = torch.stack([scene_labels(scene) for scene in scenes])  # (S, 4, 9)
    sizes = [len(names) for names in LABELS.values()]
    y = [F.one_hot(labels[:, i], size).flatten(1) for i, size in enumerate(sizes)]
    y = torch.cat(y, 1).double()  # (S, 9·9 + 9·7 + 9·4 + 9·9)
    x = x.double()
    gram = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=torch.double)
    return torch.linalg.solve(gram, x.T @ y)


def read_scenes(x, w):
    """The labels of each row of x that the map w gives most: (rows, 4, 9)."""
    sizes = [len(PLACES) * len(names) for names in LABELS.values()]
    parts = (x.double() @ w).split(sizes, 1)
    return torch.stack([part.unflatten(1, (len(PLACES), -1)).argmax(-1) for part in parts], 1)


# ---- The table -----------------------------------------------------------------------------------


def shares(model, made, w, args):
    """{column: share of the tasks `made` that are right}."""
    turns = [Talk(t.prompt, t.plain, t.sources, instructed=True) for t in made]
    said = answers(model.mllm, model.processor, turns)
    wanted = torch.stack([scene_labels(t.target) for t in made])
    read = (read_scenes(conditions(model, made), w) == wanted).flatten(1).all(1).tolist()
    seeds = [args.seed + i for i in range(len(made))]  # each case has its own noise
    from_words = draw(model, [(t.plain, []) for t in made], args, seeds)
    drawn = draw(model, [(t.prompt, t.images) for t in made], args, seeds)
    pairs = list(zip(made, from_words, drawn, strict=True))
    right = {
        "restated": [words == t.plain for words, t in zip(said, made, strict=True)],
        "read out": read,
        "drawn from words": [score(row[0], goal_of(t.target)) for t, row, _ in pairs],
        "drawn": [score(row[0], t.goal) for t, _, row in pairs],
    }
    return {column: sum(values) / len(values) for column, values in right.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    begin(parser)
    add = parser.add_argument
    add("--limit", type=int, default=50, help="cases of each kind and number of objects (50)")
    add("--samples", type=int, default=6000, help="cases that the linear map is fitted to (6000)")
    add_drawing_options(parser)
    args = parser.parse_args()
    check_bounds(vars(args), DRAWING_BOUNDS | {"samples": (1, 10**6)})
    with errors_in_one_line():
        model = load_model(args)
        columns = ("restated", "read out", "drawn from words", "drawn")
        print(f"{'':>14} {'objects':>8}  {'  '.join(columns)}")
        for kind in NUMBERS:
            trained = [task(kind, i, args.seed) for i in range(args.samples)]
            w = fit_readout(conditions(model, trained), [t.target for t in trained])
            for number, made in cases_by_number(kind, args.limit, args.seed).items():
                found = shares(model, made, w, args)
                cells = [f"{found[column]:>{len(column)}.2f}" for column in columns]
                print(f"{kind:>14} {number:>8}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
