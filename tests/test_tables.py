"""The paper's tables in small: what their variants share, what is measured, how they resume."""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from extras.tables import __main__ as tables
from extras.tables import metrics, variants
from extras.tables.claims import INSTRUCT, TABLES, Table
from extras.tables.metrics import MAKERS, measure, other_prompt, save_figure
from extras.tables.variants import Variant
from toy.scene import Pair, place_objects, render, score
from toy.tasks import task

pytestmark = pytest.mark.usefixtures("handlers_restored")
SMALL = ["--steps", "2", "--batch-size", "2", "--limit", "2", "--jobs", "1"]


def make_table(name, work, monkeypatch, *flags):
    """Run the command in this process; returns what it wrote."""
    command = ["tables", name, "--work", str(work / "runs"), "--out", str(work), *SMALL, *flags]
    monkeypatch.setattr(sys, "argv", command)
    tables.main()
    return json.loads((work / f"{name}.json").read_text())


def recorded_trainings(name, work, monkeypatch):
    """The flags of each training of a table, in their order; nothing is trained."""
    commands = []
    monkeypatch.setattr(variants, "run", lambda command, log: commands.append(command[1:]))
    args = {"steps": 20, "batch_size": 4, "lr": 1e-3, "limit": 2, "seeds": 2, "jobs": 1}
    for part in tables.PARTS:
        monkeypatch.setitem(tables.PARTS, part, lambda folder: None)
    tables.train_all(TABLES[name], SimpleNamespace(work=work, **args))
    return [dict(zip(flags[::2], flags[1::2], strict=True)) for flags in commands]


@pytest.mark.parametrize("name", TABLES)
def test_variants_differ_in_their_own_fields_alone(name, tmp_path, monkeypatch):
    trainings = recorded_trainings(name, tmp_path, monkeypatch)
    own = {"--out", "--checkpoint", "--stage"}
    for variant in TABLES[name].variants.values():
        own |= {f"--{field.replace('_', '-')}" for field in variant.config | variant.run}
    for seed in (0, 1):
        of_seed = [flags for flags in trainings if flags["--seed"] == seed]
        assert len({str(flags["--out"]) for flags in of_seed}) == len(of_seed), "each once"
        shared = [{n: x for n, x in flags.items() if n not in own} for flags in of_seed]
        assert all(flags == shared[0] for flags in shared)
        assert all("--data" not in flags for flags in of_seed) or name == "flags"


def test_a_second_stage_starts_from_the_first_of_the_same_variant(tmp_path, monkeypatch):
    trainings = recorded_trainings("T5", tmp_path, monkeypatch)
    first = {flags["--out"]: flags for flags in trainings if flags["--stage"] == "pretrain"}
    second = [flags for flags in trainings if flags["--stage"] == "instruct"]
    assert len(first) == len(second) == 6 and trainings[6:] == second
    changed = {"--out", "--stage"}
    for flags in second:
        before = first[flags.pop("--checkpoint")]
        assert {n: x for n, x in flags.items() if n not in changed} == {
            n: x for n, x in before.items() if n not in changed
        }


def test_tables_share_the_training_of_a_variant(tmp_path):
    args = SimpleNamespace(work=tmp_path, steps=20, batch_size=4, lr=1e-3)
    same = [TABLES["knowledge"].variants["queries"], TABLES["T1"].variants["N = 16"]]
    same += [TABLES["F2"].variants["N = 16"], TABLES["T3"].variants["enc-proj, 3"]]
    assert len({variants.folder_of(variant, 0, args) for variant in same}) == 1
    others = [variant._replace(stages=INSTRUCT) for variant in same]
    assert len({variants.folder_of(variant, 0, args) for variant in same + others}) == 2


@pytest.mark.slow
def test_a_stopped_table_resumes_with_the_same_figures(tmp_path, monkeypatch, capsys):
    two = {
        "queries": Variant({"num_queries": 4}, ("reconstruct",)),
        "random": Variant({"condition_on": "random"}),
    }
    monkeypatch.setitem(TABLES, "T1", Table("a claim", two, ("reconstruction", "five")))
    first = make_table("T1", tmp_path, monkeypatch, "--seeds", "1")
    assert set(first["variants"]) == set(two) and first["seeds"] == [0]
    assert len(first["made on"]) == 1, "one machine made it all"
    losses = [v["figures"]["training loss"][0] for v in first["variants"].values()]
    assert losses[0] != losses[1]
    assert first["variants"]["queries"]["mean"]["PSNR in dB"] > 0

    # As if it had been stopped while it trained the second variant and scored the first.
    args = SimpleNamespace(work=tmp_path / "runs", steps=2, batch_size=2, limit=2, lr=3e-4)
    queries, randoms = [variants.folder_of(variant, 0, args) for variant in two.values()]
    path = queries / "scores-2.json"
    scores = json.loads(path.read_text())
    shutil.rmtree(randoms)
    path.write_text(json.dumps({name: scores[name] for name in ("five", "training")}))
    trained = (queries / "latest").stat().st_mtime_ns

    second = make_table("T1", tmp_path, monkeypatch, "--seeds", "1")
    for variant in (*first["variants"].values(), *second["variants"].values()):
        for part in ("figures", "mean", "spread"):
            variant[part].pop("samples per second")
    assert second == first
    assert (queries / "latest").stat().st_mtime_ns == trained, "it is not trained again"
    assert "training loss" in capsys.readouterr().out


def test_spread_is_over_seeds(tmp_path):
    scores = [{"dense": {"dense": share}} for share in (0.2, 0.4, 0.6)]
    summary = metrics.summary(scores)
    assert summary["figures"]["dense"] == [0.2, 0.4, 0.6]
    assert summary["mean"]["dense"] == 0.4 and summary["spread"]["dense"] == 0.2
    lines = [json.dumps({"loss": loss, "samples_per_s": 5}) for loss in (9.0, 1.0)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    figures = metrics.training_figures(tmp_path, SimpleNamespace(trained_state_dict=dict))
    assert figures["training loss"] == 5.0


def generated_by(name, monkeypatch):
    """The (rows, negative prompt) of each call of a metric to generate."""
    calls = []

    def generate(model, rows, args, negative=None):
        calls.append((rows, negative))
        return [[render(place_objects(random.Random(0), [Pair("red", "star")]))] for _ in rows]

    monkeypatch.setattr(metrics, "generate", generate)
    assert list(measure(None, name, 3, 0)) == [name]
    return calls


def test_images_are_withheld_and_pairs_steer_each_other(monkeypatch):
    ((rows, _),) = generated_by("one subject, images withheld", monkeypatch)
    assert all(np.asarray(image).max() == 0 for _, images in rows for image in images)
    prompts = [task("one subject", i, 0, "test").prompt for i in range(3)]
    assert [prompt for prompt, _ in rows] == prompts
    ((rows, negative),) = generated_by("commonsense, negative prompt", monkeypatch)
    for (prompt, _), other in zip(rows, negative, strict=True):
        assert other != prompt and other_prompt(other) == prompt


def test_prompts_beyond_training_are_scored():
    rng = random.Random(0)
    for kind in ("diagonal", "two held-out"):
        case = MAKERS[kind](rng)
        pairs = [Pair(goal.color, goal.shape) for goal in case.goal.objects]
        places = ("top left", "bottom right")
        right = render(place_objects(rng, pairs, "corners", places))
        wrong = render(place_objects(rng, pairs[::-1], "corners", places))
        assert score(right, case.goal)
        assert score(wrong, case.goal) == (kind == "two held-out")
    case = MAKERS["five"](rng)
    assert len(case.goal.objects) == 5 and case.prompt.startswith("five ")


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    save_figure({}, tmp_path / "t.png")
    assert "pip install matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words", [(["T99"], "'knowledge'"), (["T1", "--steps", "0"], "--steps: invalid")]
)
def test_bad_flags_end_in_one_line(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables", *flags])
    with pytest.raises(SystemExit, match="2"):
        tables.main()
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
