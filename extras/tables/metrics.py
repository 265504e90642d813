"""What extras.tables measures of a model, and how it summarizes and plots a table.

A metric is a kind of toy/tasks.py, or one of MAKERS here, which no training has; after a comma,
"images withheld" (black ones in their place), or "negative prompt" (the other prompt of its pair,
as in CommonsenseT2I). "answers" are the MLLM's, in text.
"""

import json
import random
from itertools import zip_longest
from statistics import mean, stdev
from types import SimpleNamespace

from benchmarks.toy import answer_share, scores
from extras.flags.flag_scores import METRICS as FLAG_METRICS
from extras.flags.flag_scores import measure_flags
from metaquery import black_like
from sample import generate
from toy.captions import Task
from toy.scene import Goal, GoalObject, Scene, random_pair
from toy.tasks import SIX_KINDS, task
from toy.words import COMMONSENSE, plural, with_article

GENERATION = {"steps": 20, "guidance": 3.0, "image_guidance": 1.5, "num_images": 1}
GENERATION |= {"negative_prompt": "", "batch_size": 50, "height": None, "width": None}
NOT_PLOTTED = ("training loss", "samples per second", "saved parameters", "PSNR in dB")
LAST_STEPS = 50  # whose mean is the training loss
OTHER_OF_PAIR = {one: other for pair in COMMONSENSE for one, other in (pair, pair[::-1])}


def beyond_training(prompt, pairs, places=()):
    """A task that the toy world does not have: a prompt, the pairs it asks for, and where."""
    goals = zip_longest(pairs, places)
    objects = tuple(GoalObject(pair.color, pair.shape, place=place) for pair, place in goals)
    return Task(prompt, Scene(()), Goal(objects), prompt)


def named(pair):
    return with_article(f"{pair.color} {pair.shape}")


def two_held_out(rng):
    """ "an orange circle and a purple star": two pairs that no caption names."""
    first = random_pair(rng, held_out=True)
    second = random_pair(rng, [first], held_out=True)
    return beyond_training(f"{named(first)} and {named(second)}", [first, second])


def diagonal(rng):
    """ "a red star above and to the left of a blue circle": two relations at once."""
    first = random_pair(rng)
    second = random_pair(rng, [first])
    prompt = f"{named(first)} above and to the left of {named(second)}"
    return beyond_training(prompt, [first, second], ["top left", "bottom right"])


def five(rng):
    """ "five red stars": captions count to four."""
    pair = random_pair(rng)
    return beyond_training(f"five {plural(f'{pair.color} {pair.shape}')}", [pair] * 5)


MAKERS = {"two held-out": two_held_out, "diagonal": diagonal, "five": five}


def unseen_case(kind, index, seed):
    """The index-th unseen task of a kind."""
    if kind in MAKERS:
        return MAKERS[kind](random.Random(f"test {seed} {kind} {index}"))
    return task(kind, index, seed, "test")


def other_prompt(prompt):
    """The other prompt of its pair: of "a star the colour of a ripe banana" the unripe one's."""
    thing = next(thing for thing in OTHER_OF_PAIR if thing in prompt)
    return prompt.replace(thing, OTHER_OF_PAIR[thing])


def measure(model, name, limit, seed, work=None):
    """{name: figure} of one metric, on `limit` unseen cases; an edit's has several.

    work: the folder in which flags/ is, for metrics of flags.
    """
    args = SimpleNamespace(**GENERATION, seed=seed, limit=limit)
    if name in FLAG_METRICS:
        return measure_flags(model, name, args, work / "flags")
    if name == "answers":
        return {name: answer_share(model, args)}

    kind, _, change = name.partition(", ")
    tasks = [unseen_case(kind, index, seed) for index in range(limit)]
    rows = [(t.prompt, t.images) for t in tasks]
    if change == "images withheld":
        rows = [(prompt, black_like(images)) for prompt, images in rows]
    negative = ""
    if change == "negative prompt":
        negative = [other_prompt(prompt) for prompt, _ in rows]
    images = generate(model, rows, args, negative=negative)
    figures = scores(kind, [(row[0], t) for row, t in zip(images, tasks, strict=True)])
    return {name if figure == kind else figure: value for figure, value in figures.items()}


def training_figures(folder, model):
    """{name: figure} of a training: its last loss, its speed, and how much it trained."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "training loss": mean(line["loss"] for line in lines[-LAST_STEPS:]),
        "samples per second": lines[-1]["samples_per_s"],
        "saved parameters": sum(x.numel() for x in model.trained_state_dict().values()),
    }


def summary(scores):
    """A variant's figures for each seed, their mean and their spread.

    scores: for each seed {metric: {name: figure}}.
    """
    figures = {}
    for metrics in scores:
        values = {name: x for group in metrics.values() for name, x in group.items()}
        if set(SIX_KINDS) <= set(values):
            values["six-kind overall"] = mean(values[kind] for kind in SIX_KINDS)
        for name, value in values.items():
            figures.setdefault(name, []).append(round(value, 4))

    means = {name: round(mean(values), 4) for name, values in figures.items()}
    spreads = dict.fromkeys(figures, 0.0)
    if len(scores) > 1:
        spreads = {name: round(stdev(values), 4) for name, values in figures.items()}
    return {"figures": figures, "mean": means, "spread": spreads}


def print_table(result):
    """A line for each figure: its mean and spread for each variant."""
    variants = result["variants"].values()
    print(f"{result['table']}, {len(result['seeds'])} seeds: {', '.join(result['variants'])}")
    for name in next(iter(variants))["mean"]:
        cells = [f"{v['mean'][name]:14.3f} ± {v['spread'][name]:.3f}" for v in variants]
        print(f"{name:>28}{''.join(cells)}")


def save_figure(result, path):
    """Save the means as bars or, for Figure 2, as curves over N, with their spread."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed, so {path} is not plotted: pip install matplotlib.")
        return
    variants = result["variants"]
    measured = next(iter(variants.values()))["mean"]
    summed_up = ()
    if "six-kind overall" in measured:
        summed_up = SIX_KINDS
    names = [name for name in measured if name not in (*NOT_PLOTTED, *summed_up)]
    width = max(5.5, 3 + len(names))  # inches; the title needs as many
    figure = Figure(figsize=(width, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()

    if result["table"].startswith("F2"):
        numbers = [variant["config"]["num_queries"] for variant in variants.values()]
        for name in names:
            means = [variant["mean"][name] for variant in variants.values()]
            spreads = [variant["spread"][name] for variant in variants.values()]
            axes.errorbar(numbers, means, spreads, marker="o", capsize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, numbers)
        axes.set_xlabel("queries N")
    else:
        bar_width = 0.8 / len(variants)
        for number, (label, variant) in enumerate(variants.items()):
            places = [place + (number + 0.5) * bar_width - 0.4 for place in range(len(names))]
            means = [variant["mean"][name] for name in names]
            spreads = [variant["spread"][name] for name in names]
            axes.bar(places, means, bar_width, yerr=spreads, capsize=2, label=label)
        labels = [name.replace(", ", "\n").replace(" ", "\n") for name in names]
        axes.set_xticks(range(len(names)), labels, fontsize=8)

    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share right")
    steps, seeds = result["settings"]["steps"], len(result["seeds"])
    axes.set_title(f"{result['table']}: mean ± spread of {seeds} seeds, {steps} steps")
    axes.legend(fontsize=8)
    figure.savefig(path)
