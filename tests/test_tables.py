"""The paper's tables in small: what their arms share, what is measured, and how they resume."""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import check_refused, run

from benchmarks import arms, measures, tables
from extras.tables.variants import Arm
from extras.tables.metrics import MAKERS, measure, other_prompt, save_figure
from extras.tables.__main__ import INSTRUCT, TABLES, Table
from toy.scene import Pair, place_objects, render, score
from toy.tasks import task

SMALL = ["--steps", "2", "--batch-size", "2", "--limit", "2", "--jobs", "1"]


def make_table(name, work, monkeypatch, *flags):
    """Run the command in this process; returns what it wrote."""
    command = ["tables", name, "--work", str(work / "runs"), "--out", str(work), *SMALL, *flags]
    monkeypatch.setattr(tables, "begin", lambda parser: None)  # keep pytest's own signal handlers
    monkeypatch.setattr(sys, "argv", command)
    tables.main()
    return json.loads((work / f"{name}.json").read_text())


def recorded_trainings(name, work, monkeypatch):
    """The flags of each training of a table, in their order; nothing is trained."""
    commands = []
    monkeypatch.setattr(arms, "run", lambda command, log: commands.append(command[1:]))
    args = {
        "work": work,
        "out": work,
        "steps": 20,
        "batch_size": 4,
        "lr": 1e-3,
        "limit": 2,
        "seeds": 2,
    }
    args = SimpleNamespace(**args, jobs=1)
    for part in tables.PARTS:
        monkeypatch.setitem(tables.PARTS, part, lambda folder: None)
    tables.train_all(TABLES[name], args)
    return [dict(zip(flags[::2], flags[1::2], strict=True)) for flags in commands]


@pytest.mark.parametrize("name", TABLES)
def test_arms_differ_in_their_own_fields_alone(name, tmp_path, monkeypatch):
    trainings = recorded_trainings(name, tmp_path, monkeypatch)
    own = {"--out", "--checkpoint", "--stage"}
    for arm in TABLES[name].arms.values():
        own |= {f"--{field.replace('_', '-')}" for field in arm.config | arm.run}
    for seed in (0, 1):
        of_seed = [flags for flags in trainings if flags["--seed"] == seed]
        assert len({str(flags["--out"]) for flags in of_seed}) == len(of_seed), "each once"
        shared = [{n: x for n, x in flags.items() if n not in own} for flags in of_seed]
        assert all(flags == shared[0] for flags in shared)
        assert all("--data" not in flags for flags in of_seed) or name == "flags"


def test_a_second_stage_starts_from_the_first_of_the_same_arm(tmp_path, monkeypatch):
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


def test_tables_share_the_training_of_an_arm(tmp_path):
    args = SimpleNamespace(work=tmp_path, steps=20, batch_size=4, lr=1e-3)
    same = [TABLES["knowledge"].arms["queries"], TABLES["T1"].arms["N = 16"]]
    same += [TABLES["F2"].arms["N = 16"], TABLES["T3"].arms["enc-proj, 3"]]
    assert len({arms.folder_of(arm, 0, args) for arm in same}) == 1
    others = [arm._replace(stages=INSTRUCT) for arm in same]
    assert len({arms.folder_of(arm, 0, args) for arm in same + others}) == 2


def test_a_stopped_table_resumes_with_the_same_figures(tmp_path, monkeypatch, capsys):
    two = {"queries": Arm({"num_queries": 4}, ("reconstruct",)), "random": Arm({}, ("pretrain",))}
    monkeypatch.setitem(TABLES, "T1", Table("a claim", two, ("reconstruction", "five")))
    made = make_table("T1", tmp_path, monkeypatch, "--seeds", "1")
    assert set(made["arms"]) == set(two) and made["seeds"] == [0]
    assert made["made on"] == [arms.made_on(arms.device_of(""))], "one machine made it all"
    losses = [arm["figures"]["training loss"][0] for arm in made["arms"].values()]
    assert losses[0] != losses[1] and made["arms"]["queries"]["mean"]["PSNR in dB"] > 0
    # As if it had been stopped while it trained the second arm and scored the first.
    args = SimpleNamespace(work=tmp_path / "runs", out=tmp_path, steps=2, batch_size=2, limit=2)
    args.lr = 3e-4
    first, second = [arms.folder_of(arm, 0, args) for arm in two.values()]
    scores, others = [arms.scores_of(arm, 0, args) for arm in two.values()]
    kept = json.loads(scores.read_text())
    shutil.rmtree(second)
    others.unlink()
    scores.write_text(json.dumps({name: kept[name] for name in ("five", "training")}))
    trained = (first / "model.safetensors").stat().st_mtime_ns
    again = make_table("T1", tmp_path, monkeypatch, "--seeds", "1")
    for arm in (*made["arms"].values(), *again["arms"].values()):
        for part in ("figures", "mean", "spread"):
            arm[part].pop("samples per second")
    assert again == made
    assert (first / "model.safetensors").stat().st_mtime_ns == trained, "it is not trained again"
    assert "training loss" in capsys.readouterr().out


def test_what_is_measured_is_not_trained_again(tmp_path, monkeypatch):
    one = {"random": Arm({"condition_on": "random"})}
    monkeypatch.setitem(TABLES, "T1", Table("a claim", one, ("five",)))
    made = make_table("T1", tmp_path, monkeypatch, "--seeds", "2")
    shutil.rmtree(tmp_path / "runs")  # as on another machine
    monkeypatch.setattr(arms, "run", None)
    assert make_table("T1", tmp_path, monkeypatch, "--seeds", "2") == made


def test_spread_is_over_seeds(tmp_path):
    scored = [{"dense": {"dense": share}} for share in (0.2, 0.4, 0.6)]
    made = measures.summary(scored)
    assert made["figures"]["dense"] == [0.2, 0.4, 0.6]
    assert made["mean"]["dense"] == 0.4 and made["spread"]["dense"] == 0.2
    lines = [json.dumps({"loss": loss, "samples_per_s": 5}) for loss in (9.0, 1.0)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    shutil.copy(arms.MetaQueryConfig.preset("tiny").mllm + "/model.safetensors", tmp_path)
    assert measures.training_figures(tmp_path)["training loss"] == 5.0


def drawn_by(measures_name, monkeypatch):
    """The (rows, negative prompt) of each call that a measure makes to draw."""
    calls = []

    def draw(model, rows, args, negative_prompt=None):
        calls.append((rows, negative_prompt))
        return [[render(place_objects(random.Random(0), [Pair("red", "star")]))] for _ in rows]

    monkeypatch.setattr(measures, "draw", draw)
    figures = measure(None, measures_name, 3, 0)
    assert list(figures) == [measures_name]
    return calls


def test_pictures_are_withheld_and_pairs_steer_each_other(monkeypatch):
    ((rows, _),) = drawn_by("one subject, pictures withheld", monkeypatch)
    assert all(np.asarray(picture).max() == 0 for _, images in rows for picture in images)
    assert [prompt for prompt, _ in rows] == [
        task("one subject", i, 0, "test").prompt for i in range(3)
    ]
    for rows, negative_prompt in drawn_by("commonsense, negative prompt", monkeypatch):
        assert negative_prompt != rows[0][0] and other_prompt(negative_prompt) == rows[0][0]


def test_prompts_beyond_training_are_scored():
    rng = random.Random(0)
    for kind in ("diagonal", "two held-out"):
        made = MAKERS[kind](rng)
        pairs = [Pair(wanted.color, wanted.shape) for wanted in made.goal.objects]
        places = ("top left", "bottom right")
        right = render(place_objects(rng, pairs, "corners", places))
        wrong = render(place_objects(rng, pairs[::-1], "corners", places))
        assert score(right, made.goal)
        assert score(wrong, made.goal) == (kind == "two held-out")
    made = MAKERS["five"](rng)
    assert len(made.goal.objects) == 5 and made.prompt.startswith("five ")


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    save_figure({}, tmp_path / "t.png")
    assert "pip install matplotlib" in capsys.readouterr().out


def test_bad_flags_end_in_one_line():
    done = run([sys.executable, "-m", "extras.tables", "T99"])
    check_refused(done, "'knowledge'")
    done = run([sys.executable, "-m", "extras.tables", "T1", "--steps", "0"])
    check_refused(done, "--steps is 0")
