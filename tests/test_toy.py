"""The toy benchmark, as its user runs it."""

import json

import commands
from PIL import Image

from benchmarks.toy import FIRST_CONTACT, goals_in
from toy.scene import Object, Scene, satisfies
from toy.tasks import FIRST_EDITS, KINDS, SIX_KINDS, task

call = commands.call


def test_it_prints_a_table_and_writes_it(call, tmp_path):
    flags = ["--limit", 2, "--steps", 3, "--dtype", "float32", "--json", "t.json", "--out", "t.png"]
    code, out, _ = call("benchmarks.toy", *flags)
    assert code == 0 and out.startswith("computing in float32, as --dtype says\n")
    table = json.loads((tmp_path / "t.json").read_text())
    assert set(SIX_KINDS) < set(table["scores"]) and "six-kind overall" in table["scores"]
    visitors = ("bare words", "first contact right", "first contact misleading", *FIRST_EDITS)
    assert set(visitors) < set(table["scores"])
    assert table["steps"] == 3 and table["dtype"] == "float32"
    assert all(kind in out for kind in table["scores"])
    assert Image.open(tmp_path / "t.png").width > 64 * 10


def test_first_contact_prompts_are_in_no_training_text():
    lines = [line.split("|") for line in FIRST_CONTACT.read_text().splitlines()[1:]]
    asked = {line[0].strip().lower() for line in lines}
    assert len(asked) == len(lines) == 60
    kinds = [kind for kind in KINDS if kind != "held-out"]
    trained = {task(kind, i).prompt.lower() for kind in kinds for i in range(400)}
    trained |= {task(kind, i).prompt.lower() for kind in ("lists", "nearest") for i in range(5000)}
    assert asked.isdisjoint(trained)
    for _, right, nearest in lines:
        assert goals_in(right.strip()) or goals_in(nearest.strip())


def test_plain_words_are_read_as_goals():
    star, disc = Object("star", "red", 16, 32, 22), Object("circle", "blue", 48, 32, 22)
    scene = Scene((star, disc), "grey")
    for words, right in {
        "a red star left of a blue circle": True,
        "a blue circle left of a red star": False,
        "a star and a thing on a grey background": True,
        "a star and a thing on a black background": False,
        "two stars, or two things": True,
        "a red star": False,
        "a non-blue star and a circle": True,
        "a non-red star and a circle": False,
        "nothing": False,
        "": False,
    }.items():
        assert any(satisfies(scene, goal) for goal in goals_in(words)) == right, words
    assert satisfies(Scene(()), goals_in("nothing")[0])
