"""Generate unseen tasks of the toy world and score them exactly.

    python -m benchmarks.toy [--checkpoint NAME] [--limit N] [--json FILE] [--out FILE]

prints, for each kind of task, the share of images that show everything that is asked for and
nothing else; for edits also what was changed and what was kept, for reconstructions the peak
signal-to-noise ratio, and the share of questions that the MLLM answers word for word.

The last rows are what a visitor meets first: a colour and a shape without an article; edits of
images that the model itself generated; and first-contact prompts. An image of those is right, the
nearest that this world has, or misleading: neither of them, and not what the MLLM says it drew.
"""

import json
import random
import re
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
from sample import add_generation_options, generate, grid, load_model, restate, save_image
from toy.scene import COLORS, SHAPES, SIZE, Goal, GoalObject, edit_score, goal_of, score
from toy.talk import unseen_question
from toy.tasks import FIRST_EDITS, IMAGE_KINDS, SIX_KINDS, TEXT_KINDS, task
from toy.words import NUMBERS, describe

SHOWN = 10  # cases of each kind in the grid of --out
FIRST_CONTACT = Path(__file__).with_name("first_contact.txt")


def goals_in(words):
    """The goals that plain words name, alternatives by ", or ": "a red star, or two things"."""
    excluded = re.search(r"non-(\w+)", words)
    if excluded:
        others = [color for color in COLORS if color != excluded[1]]
        words = ", or ".join(words.replace(excluded[0], color) for color in others)

    times = {"a": 1, "an": 1} | {word: number for number, word in enumerate(NUMBERS)}
    numbers, colors, shapes = map("|".join, (times, COLORS, SHAPES))
    named = rf"\b({numbers}) (?:({colors}) )?(?:({shapes})|thing)"
    goals = []
    for way in filter(None, words.split(", or ")):
        pattern = "plain"
        if "half" in way or "core" in way:
            pattern = None
        objects = []
        for number, color, shape in re.findall(named, way):
            objects += [GoalObject(color or None, shape or None, pattern)] * times[number]
        relation = re.search("left of|right of|above|below", way)
        ground = re.search(r"on a (\w+) background", way)
        goals.append(Goal(tuple(objects), relation and relation[0], ground and ground[1]))
    return goals


def scores(kind, pairs):
    """Means over (image, Task) pairs of one kind: {metric: value}."""
    values = {kind: [score(image, task.goal) for image, task in pairs]}
    if kind == "edit":
        parts = [edit_score(image, task) for image, task in pairs]
        values["edit changed"] = [changed for changed, _ in parts]
        values["edit kept"] = [kept for _, kept in parts]
    if kind == "reconstruction":
        off = [np.asarray(p, float) - np.asarray(task.target_image, float) for p, task in pairs]
        values["PSNR in dB"] = [10 * np.log10(255**2 / max(1e-6, (d**2).mean())) for d in off]
    return {name: float(np.mean(value)) for name, value in values.items()}


def answer_share(model, args):
    """The share of --limit unseen questions that the MLLM answers word for word."""
    right = 0
    for i in tqdm(range(args.limit), "answers"):
        talk = unseen_question(i, args.seed)
        right += model.answer(talk.user, talk.images) == talk.assistant
    return right / args.limit


def draw(model, rows, args, **options):
    """A list of images for each (prompt, images) row, which has noise of its own."""
    return generate(model, rows, args, range(args.seed, args.seed + len(rows)), **options)


def share_right(results, goals):
    """The share of the images that show their row's goal."""
    pairs = zip(results, goals, strict=True)
    return float(np.mean([score(image, goal) for images, goal in pairs for image in images]))


def bare_words(model, args):
    """The share of bare words, "blue circle", that are right; from --limit 48 on of all pairs."""
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    names = random.Random(args.seed).sample(names, min(args.limit, len(names)))
    results = draw(model, [(name, []) for name in names], args)
    return share_right(results, [goals_in(f"a {name}")[0] for name in names])


def edits_of_generated(model, kind, args):
    """The share of edits that are right, of source images that the model generates itself.

    Only of those whose source came out right.
    """
    tasks = [task(kind, i, args.seed, "test") for i in range(args.limit)]
    results = draw(model, [(describe(t.sources[0]), []) for t in tasks], args, num_images=1)
    pairs = [(t, source) for t, (source,) in zip(tasks, results, strict=True)]
    pairs = [(t, source) for t, source in pairs if score(source, goal_of(t.sources[0]))]
    if not pairs:
        return 0.0
    results = draw(model, [(t.prompt, [source]) for t, source in pairs], args)
    return share_right(results, [t.goal for t, _ in pairs])


def first_contact(model, args):
    """Shares of first-contact prompts: {"first contact right", "... nearest", "... misleading"}."""
    rows = FIRST_CONTACT.read_text(encoding="utf-8").splitlines()[1:]
    lines = [[cell.strip() for cell in row.split("|")] for row in rows][: args.limit]
    results = draw(model, [(prompt, []) for prompt, _, _ in lines], args, num_images=1)
    counts = {"right": 0, "nearest": 0, "misleading": 0}

    for (prompt, asked, nearest), (image,) in zip(lines, results, strict=True):
        said = restate(model, prompt)
        right, near, as_said = (
            any(score(image, goal) for goal in goals_in(words)) for words in (asked, nearest, said)
        )
        counts["right"] += right
        counts["nearest"] += near and not right
        counts["misleading"] += not (right or near or as_said)
    return {f"first contact {name}": count / len(lines) for name, count in counts.items()}


def run(model, args):
    """Do --limit unseen cases of each kind: ({metric: value}, images for a grid)."""
    table, shown = {}, []
    kinds = TEXT_KINDS
    if model.format.takes_images:
        kinds = (*TEXT_KINDS, *IMAGE_KINDS)

    for kind in tqdm(kinds, "kinds"):
        tasks = [task(kind, i, args.seed, "test") for i in range(args.limit)]
        results = draw(model, [(t.prompt, t.images) for t in tasks], args)
        pairs = [(image, t) for t, images in zip(tasks, results, strict=True) for image in images]
        table |= scores(kind, pairs)
        for t, images in zip(tasks[:SHOWN], results, strict=False):
            shown += [*t.images[:1], images[0]]

    if model.format.takes_images:
        table["answers"] = answer_share(model, args)
        for kind in tqdm(FIRST_EDITS, "edits of generated images"):
            table[kind] = edits_of_generated(model, kind, args)
    table["bare words"] = bare_words(model, args)
    table |= first_contact(model, args)
    table["six-kind overall"] = sum(table[kind] for kind in SIX_KINDS) / len(SIX_KINDS)
    return table, shown


def main():
    parser = cli.open_parser(__doc__)
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
        if model.resolution != SIZE:
            cli.fail(f"{args.checkpoint} does not make {SIZE}-pixel images: name another.")
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
        result = {"scores": table, "images_per_kind": cases} | settings
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    if args.out:
        save_image(grid(shown, 20), args.out)
        print(f"saved {args.out}")


if __name__ == "__main__":
    main()
