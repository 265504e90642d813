"""What benchmarks.tables measures of a model, and how it summarizes and draws a table.

A measure is a kind of toy/tasks.py, or one of MAKERS here, which no training draws; after a comma,
"pictures withheld" (black ones in their place), or "negative prompt" (the other prompt of its pair,
as in CommonsenseT2I). "answers" are the MLLM's, in text.
"""

import json
import random
from itertools import zip_longest
from statistics import mean, stdev
from types import SimpleNamespace

from safetensors.torch import load_file

from extras.flags.__main__ import MEASURES as FLAG_MEASURES
from extras.flags.__main__ import measure_flags
from benchmarks.toy import answer_share, scores
from sample import draw
from metaquery import black_like
from toy.scene import Goal, GoalObject, Scene, random_pair
from toy.tasks import SIX_KINDS, Task, task
from toy.words import COMMONSENSE, plural, with_article

# Fewer steps than sample.py's 30: the tables draw tens of thousands of pictures.
DRAWING = {"steps": 20, "guidance": 3.0, "image_guidance": 1.5, "num_images": 1}
NOT_DRAWN = ("training loss", "samples per second", "saved parameters", "PSNR in dB")
LAST_STEPS = 50  # whose mean is the training loss
OTHER_OF_PAIR = {one: other for pair in COMMONSENSE for one, other in (pair, pair[::-1])}


def beyond_training(prompt, pairs, places=()):
    """A task that no maker of the toy world makes: a prompt, the pairs it asks for, and where."""
    wanted = zip_longest(pairs, places)
    objects = tuple(GoalObject(pair.color, pair.shape, place=place) for pair, place in wanted)
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
    """{name: figure} of one measure, on `limit` unseen cases; an edit's has several.

    work: the folder in which flags/ is, for measures of flags.
    """
    args = SimpleNamespace(**DRAWING, seed=seed, limit=limit, negative_prompt="")
    if name in FLAG_MEASURES:
        return measure_flags(model, name, args, work / "flags")
    if name == "answers":
        return {name: answer_share(model, args)}
    kind, _, change = name.partition(", ")
    tasks = [unseen_case(kind, index, seed) for index in range(limit)]
    rows = [(t.prompt, t.images) for t in tasks]
    if change == "negative prompt":  # each has its own, so they are drawn one by one
        drawn = [draw(model, [row], args, negative_prompt=other_prompt(row[0]))[0] for row in rows]
    elif change == "pictures withheld":
        drawn = draw(model, [(prompt, black_like(images)) for prompt, images in rows], args)
    else:
        drawn = draw(model, rows, args)
    figures = scores(kind, [(row[0], t) for row, t in zip(drawn, tasks, strict=True)])
    return {name if figure == kind else figure: value for figure, value in figures.items()}


def training_figures(folder):
    """{name: figure} of a training: its last loss, its speed, and how much it trained."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "training loss": mean(line["loss"] for line in lines[-LAST_STEPS:]),
        "samples per second": lines[-1]["samples_per_s"],
        "saved parameters": sum(
            x.numel() for x in load_file(folder / "model.safetensors").values()
        ),
    }


def summary(scored):
    """An arm's figures for each seed, their mean and their spread.

    scored: for each seed {measure: {name: figure}}.
    """
    figures = {}
    for measures in scored:
        values = {name: x for group in measures.values() for name, x in group.items()}
        if set(SIX_KINDS) <= set(values):
            values["six-kind overall"] = mean(values[kind] for kind in SIX_KINDS)
        for name, value in values.items():
            figures.setdefault(name, []).append(round(value, 4))
    one = len(scored) == 1
    means = {name: round(mean(values), 4) for name, values in figures.items()}
    spreads = {name: 0.0 if one else round(stdev(x), 4) for name, x in figures.items()}
    return {"figures": figures, "mean": means, "spread": spreads}


def seeds_in_words(result):
    """ "1 seed" or "3 seeds"."""
    number = len(result["seeds"])
    return f"{number} seed{'s' * (number > 1)}"


def print_table(result):
    """A line for each figure: its mean and spread for each arm."""
    arms = result["arms"].values()
    print(f"{result['table']}, {seeds_in_words(result)}: {', '.join(result['arms'])}")
    for name in next(iter(arms))["mean"]:
        cells = [f"{arm['mean'][name]:14.3f} ± {arm['spread'][name]:.3f}" for arm in arms]
        print(f"{name:>28}{''.join(cells)}")


def save_figure(result, path):
    """Save the means as bars or, for Figure 2, as curves over N, with their spread."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed, so {path} is not drawn: pip install matplotlib.")
        return
    arms = result["arms"]
    measured = next(iter(arms.values()))["mean"]
    summed_up = SIX_KINDS if "six-kind overall" in measured else ()
    names = [name for name in measured if name not in (*NOT_DRAWN, *summed_up)]
    width = max(5.5, 3 + len(names))  # inches; the title needs as many
    figure = Figure(figsize=(width, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    if result["table"].startswith("F2"):
        numbers = [arm["config"]["num_queries"] for arm in arms.values()]
        for name in names:
            means = [arm["mean"][name] for arm in arms.values()]
            spreads = [arm["spread"][name] for arm in arms.values()]
            axes.errorbar(numbers, means, spreads, marker="o", capsize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, numbers)
        axes.set_xlabel("queries N")
    else:
        bar_width = 0.8 / len(arms)
        for number, (label, arm) in enumerate(arms.items()):
            places = [place + (number + 0.5) * bar_width - 0.4 for place in range(len(names))]
            means = [arm["mean"][name] for name in names]
            spreads = [arm["spread"][name] for name in names]
            axes.bar(places, means, bar_width, yerr=spreads, capsize=2, label=label)
        labels = [name.replace(", ", "\n").replace(" ", "\n") for name in names]
        axes.set_xticks(range(len(names)), labels, fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share right")
    steps = result["settings"]["steps"]
    axes.set_title(f"{result['table']}: mean ± spread of {seeds_in_words(result)}, {steps} steps")
    axes.legend(fontsize=8)
    figure.savefig(path)
