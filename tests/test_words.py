"""Facts and descriptions in words."""

from toy.scene import Object, Scene
from toy.words import COMMONSENSE, FACTS, counted, describe, name_of


def test_names_and_numbers():
    core = Object("star", "red", pattern="core", inner="blue")
    assert name_of(core) == "red star with a blue core"
    assert counted(3, name_of(core)) == "three red stars with a blue core"
    assert counted(2, "cross") == "two crosses" and counted(1, "orange star") == "an orange star"


def test_scenes_are_described_in_reading_order():
    left, right = Object("star", "red", 16, 32, 22), Object("circle", "orange", 48, 32, 22)
    words = "a red star left of an orange circle on a grey background"
    assert describe(Scene((right, left), "grey")) == words
    three = [Object("star", "red", x, y, 20) for x, y in ((16, 16), (48, 16), (32, 48))]
    assert describe(Scene(tuple(three))) == "three red stars"
    corner = Object("cross", "blue", 16, 48, 20)
    words = describe(Scene((*three[:2], corner)))
    assert words.startswith("a red star at the top left, a red star at the top right and a ")
    assert words.endswith("blue cross at the bottom left")
    assert describe(Scene((), "black")) == "nothing on a black background"


def test_commonsense_pairs_differ_in_colour():
    for one, other in COMMONSENSE:
        assert FACTS["color"][one] != FACTS["color"][other]
