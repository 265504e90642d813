"""The embedded world: deterministic, held out what it says, and scored exactly."""

import colorsys
import random

import pytest
from PIL import Image, ImageFilter

from data.shapes import (
    COLORS,
    EDITS,
    HELD_OUT,
    KINDS,
    LAYOUTS,
    SHAPES,
    SIX_KINDS,
    TALKS,
    TEXT_KINDS,
    Object,
    Scene,
    Want,
    Wanted,
    question,
    random_scene,
    read,
    render,
    sample,
    satisfies,
    score,
    talks,
)


@pytest.fixture(scope="module")
def samples():
    return {kind: [sample(kind, i, split="test") for i in range(40)] for kind in KINDS}


def test_scorer_accepts_ground_truth(samples):
    """At least 99.5% of right pictures are accepted."""
    made = [s for group in samples.values() for s in group]
    wrong = [s for s in made if not score(s.picture, s.want)]
    assert len(wrong) <= 0.005 * len(made), [s.prompt for s in wrong]


def test_scorer_rejects_other_scenes(samples):
    """At most 0.5% of pictures of scenes that hold something else are accepted."""
    pairs = [
        (s, other)
        for group in samples.values()
        for s, other in zip(group, group[1:] + group[:1], strict=True)
        if not satisfies(other.target, s.want)
    ]
    assert len(pairs) > 400
    assert sum(score(other.picture, s.want) for s, other in pairs) <= 0.005 * len(pairs)


def test_scorer_reads_soft_pictures_and_refuses_smudges():
    """A little blur, as a VAE adds, is read; a picture with something unnameable in it is not."""
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(60)]
    soft = [render(scene).filter(ImageFilter.GaussianBlur(0.6)) for scene in scenes]
    seen = [read(picture) for picture in soft]
    named = [
        clear
        and sorted((o.shape, o.color) for o in s.objects)
        == sorted((o.shape, o.color) for o in scene.objects)
        for (s, clear), scene in zip(seen, scenes, strict=True)
    ]
    assert sum(named) >= 0.97 * len(named)
    want = Want((Wanted("red", "star"),))
    picture = render(Scene((Object("star", "red", size=30),)))
    assert score(picture, want)
    smudged = picture.copy()
    smudged.paste((0, 145, 30), (3, 3, 14, 6))
    assert not score(smudged, want)
    assert not score(Image.new("RGB", (64, 64), (90, 200, 220)), want)


@pytest.mark.parametrize(
    "objects, accepted",
    [
        ([("red", "star", 16, 32), ("blue", "circle", 48, 32)], True),
        ([("blue", "circle", 16, 32), ("red", "star", 48, 32)], False),
        ([("red", "star", 32, 16), ("blue", "circle", 32, 48)], False),
        ([("blue", "star", 16, 32), ("red", "circle", 48, 32)], False),
        ([("red", "star", 16, 32)], False),
        ([("red", "star", 16, 16), ("blue", "circle", 48, 16), ("blue", "circle", 32, 48)], False),
    ],
)
def test_position_is_judged_by_every_word(objects, accepted):
    want = Want((Wanted("red", "star"), Wanted("blue", "circle")), "left of")
    scene = Scene(tuple(Object(s, c, x, y, 22) for c, s, x, y in objects))
    assert score(render(scene), want) == accepted


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_relations(relation):
    place = {"left of": (16, 32), "right of": (48, 32), "above": (32, 16), "below": (32, 48)}
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    a = Object("star", "red", *place[relation], 22)
    b = Object("circle", "blue", *place[opposite[relation]], 22)
    want = Want((Wanted(None, "star"), Wanted(None, "circle")), relation)
    assert satisfies(Scene((b, a)), want)
    assert not satisfies(Scene((a, b)), Want(want.objects, opposite[relation]))


def test_a_sample_is_its_seed_and_index():
    for kind in KINDS:
        first, again = sample(kind, 123456789, 5), sample(kind, 123456789, 5)
        assert first == again and first.picture.tobytes() == again.picture.tobytes()
        assert len({sample(kind, i, 5).target for i in range(20)}) > 10


def test_crowded_kinds_have_two_objects_or_more():
    for kind in ("dense", "edit", "reconstruction"):
        few, many = ([sample(k, i) for i in range(200)] for k in (kind, f"crowded {kind}"))
        few, many = (
            [len((s.sources or [s.target])[0].objects) for s in all_] for all_ in (few, many)
        )
        assert min(few) == 1 and min(many) == 2 and max(many) == 4


def test_test_prompts_are_never_trained_on():
    for kind in TEXT_KINDS:
        trained = {sample(kind, i).prompt for i in range(400)}
        if kind != "held-out":
            assert trained.isdisjoint(sample(kind, i, split="test").prompt for i in range(200))


def test_held_out_pairs_are_in_no_training_text():
    """Neither a caption nor what the toy MLLM learns from names one; the held-out kind does."""
    names = [f"{color} {shape}" for shape, color in HELD_OUT]
    rng = random.Random(1)
    texts = [
        sample(kind, i).prompt for kind in TEXT_KINDS if kind != "held-out" for i in range(300)
    ]
    turns = [turn for sort in TALKS for _ in range(150) for turn in talks(rng, sort)]
    texts += [words for turn in turns for words in (turn.user, turn.assistant)]
    assert not [text for text in texts for name in names if name in text]
    for i in range(40):
        made = sample("held-out", i, split="test")
        assert (made.target.objects[0].shape, made.target.objects[0].color) in HELD_OUT


def test_six_kinds_ask_for_what_their_words_say(samples):
    for kind in SIX_KINDS:
        for made in samples[kind]:
            for wanted in made.want.objects:
                assert wanted.shape in made.prompt
                assert wanted.color is None or wanted.color in made.prompt
            if kind == "counting":
                assert len(made.want.objects) in (2, 3, 4)


def test_colours_have_their_names_hue():
    """Hue in degrees, as a person or another program would judge it."""
    ranges = {"red": (345, 15), "orange": (20, 42), "yellow": (45, 65), "green": (90, 150),
              "blue": (215, 250), "purple": (270, 310), "pink": (310, 345),
              "brown": (15, 40)}  # fmt: skip
    for name, (least, most) in ranges.items():
        hue, _, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in COLORS[name]))
        degrees = hue * 360
        inside = least <= degrees <= most if least < most else degrees >= least or degrees <= most
        assert inside, (name, degrees)
        assert (value < 0.6) == (name in ("brown", "green", "purple"))


def test_objects_are_large_and_inside_the_picture():
    rng = random.Random(2)
    for _ in range(500):
        scene = random_scene(rng, patterns=0.5)
        for item in scene.objects:
            assert 19 <= item.size <= 38
            assert item.size / 2 <= item.x <= 64 - item.size / 2
            assert item.size / 2 <= item.y <= 64 - item.size / 2
    assert {len(spots) for spots, _ in LAYOUTS.values()} == {1, 2, 3, 4} and len(SHAPES) >= 6


def test_edits_change_what_they_say_and_keep_the_rest(samples):
    made = [sample("edit", i) for i in range(200)]
    assert all(s.sources[0] != s.target for s in made)
    for s in made:
        before, after = set(s.sources[0].objects), set(s.target.objects)
        assert len(before - after) <= 2 and len(after - before) <= 2
    assert len({s.prompt.split()[0] for s in made}) >= len(EDITS)


def test_answers_are_true():
    rng = random.Random(3)
    for _ in range(200):
        scene = random_scene(rng)
        asked, answer = question(rng, scene)
        if asked.startswith("how many objects"):
            assert answer == ("zero", "one", "two", "three", "four")[len(scene.objects)]
        if "background" in asked:
            assert answer == scene.background
        if asked.startswith("is there"):
            named = any(f"{o.color} {o.shape}" in asked for o in scene.objects)
            assert answer == ("yes" if named else "no")
