"""Tasks: deterministic, kept apart by split, and each solved by its own target alone."""

import pytest

from toy.edits import make_room
from toy.scene import LAYOUTS, PLACES, place_of, render, satisfies, score
from toy.tasks import EDITS, FIRST_EDITS, IMAGE_KINDS, KINDS, SIX_KINDS, TEXT_KINDS, task


@pytest.fixture(scope="module")
def tasks():
    return {kind: [task(kind, i, split="test") for i in range(40)] for kind in KINDS}


def test_scorer_accepts_ground_truth(tasks):
    """At least 99.5% of right pictures are accepted."""
    made = [s for group in tasks.values() for s in group]
    wrong = [s for s in made if not score(s.target_image, s.goal)]
    assert len(wrong) <= 0.005 * len(made), [s.prompt for s in wrong]


def test_scorer_rejects_other_scenes(tasks):
    """At most 0.5% of pictures of scenes that hold something else are accepted."""
    pairs = [
        (s, other)
        for group in tasks.values()
        for s, other in zip(group, group[1:] + group[:1], strict=True)
        if not satisfies(other.target, s.goal)
    ]
    assert len(pairs) > 400
    assert sum(score(other.target_image, s.goal) for s, other in pairs) <= 0.005 * len(pairs)


def test_a_task_is_its_seed_and_index():
    for kind in KINDS:
        first, again = task(kind, 123456789, 5), task(kind, 123456789, 5)
        assert first == again and first.target_image.tobytes() == again.target_image.tobytes()
        assert len({task(kind, i, 5).target for i in range(20)}) > 10


def test_crowded_kinds_have_two_objects_or_more():
    for kind in ("dense", "edit", "reconstruction"):
        few, many = ([task(k, i) for i in range(200)] for k in (kind, f"crowded {kind}"))
        few, many = (
            [len((s.sources or [s.target])[0].objects) for s in all_] for all_ in (few, many)
        )
        assert min(few) == 1 and min(many) == 2 and max(many) == 4


def test_free_dense_captions_put_objects_at_places_of_several_layouts():
    """As free edits leave them; plain dense captions never do."""
    layouts = [set(layout.places) for layout in LAYOUTS.values()]
    shares = {}
    for kind in ("dense", "free dense"):
        scenes = [task(kind, i).target for i in range(200)]
        places = [{place_of(item) for item in scene.objects} for scene in scenes]
        mixed = [not any(some <= layout for layout in layouts) for some in places]
        shares[kind] = sum(mixed) / len(mixed)
    assert shares["dense"] == 0 and shares["free dense"] > 0.3


def test_test_prompts_are_never_trained_on():
    for kind in TEXT_KINDS:
        trained = {task(kind, i).prompt for i in range(400)}
        if kind != "held-out":
            assert trained.isdisjoint(task(kind, i, split="test").prompt for i in range(200))


def test_six_kinds_ask_for_what_their_words_say(tasks):
    for kind in SIX_KINDS:
        for made in tasks[kind]:
            for wanted in made.goal.objects:
                assert wanted.shape in made.prompt
                assert wanted.color is None or wanted.color in made.prompt
            if kind == "counting":
                assert len(made.goal.objects) in (2, 3, 4)


def test_edits_change_what_they_say_and_keep_the_rest(tasks):
    made = [task("edit", i) for i in range(200)]
    assert all(s.sources[0] != s.target for s in made)
    for s in made:
        before, after = set(s.sources[0].objects), set(s.target.objects)
        assert len(before - after) <= 2 and len(after - before) <= 2
    assert len({s.prompt.split()[0] for s in made}) >= len(EDITS)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_picture_kinds_are_scored_exactly(kind):
    """Right pictures pass and those of other tasks of the kind do not."""
    made = [task(kind, i, split="test") for i in range(60)]
    assert sum(score(s.target_image, s.goal) for s in made) >= 0.99 * len(made)
    wrong = [
        score(render(made[i - 1].target), s.goal)
        for i, s in enumerate(made)
        if not satisfies(made[i - 1].target, s.goal)
    ]
    assert len(wrong) > 40 and not any(wrong)
    for s in made:
        assert 1 <= len(s.sources) <= 3 and (kind in ("reconstruction", "painted")) == (
            not s.prompt
        )
        if "subject" in kind:
            subject = s.sources[0].objects[0]
            assert subject.color not in s.prompt or subject.shape not in s.prompt


def test_edits_are_of_every_kind_and_change_something():
    made = [task("edit", i) for i in range(300)]
    assert all(s.sources[0] != s.target for s in made)
    assert len({s.prompt.split()[0] for s in made}) >= 12 and len(EDITS) == 7


@pytest.mark.parametrize("kind", FIRST_EDITS)
def test_first_edits_are_true(kind):
    """They are scored exactly, and what they do not name stays as it is."""
    made = [task(kind, i, split="test") for i in range(60)]
    assert sum(score(s.target_image, s.goal) for s in made) >= 0.99 * len(made)
    for s in made:
        before, after = s.sources[0], s.target
        if kind == "plural edit":
            changed = set(after.objects) - set(before.objects)
            assert len(changed) >= 2 or len(after.objects) <= len(before.objects) - 2
            assert after.background == before.background
        if kind == "add anywhere":
            assert len(after.objects) == len(before.objects) + 1
            stays = [(o.color, o.shape) for o in before.objects]
            assert stays == [(o.color, o.shape) for o in after.objects[:-1]]
            assert f"{after.objects[-1].color} {after.objects[-1].shape}" in s.prompt
        if "bigger" in s.prompt or "rotate" in s.prompt:
            assert not score(s.target_image, s.goal) or after == before


def test_room_is_made_by_moving_as_little_as_can_be():
    assert make_room(("left",), "right") == (("left",), "right")
    assert make_room(("centre",)) == (("left",), "right")
    assert make_room(("left", "right"), "bottom") == (("top left", "top right"), "bottom")
    assert make_room(("top", "top", "top"), "top") is None  # four do not fit so
    for others in ("top left", "bottom right"), ("centre", "top", "left"):
        moved, place = make_room(others)
        spots = [PLACES[spot] for spot in (*moved, place)]
        pairs = [(a, b) for i, a in enumerate(spots) for b in spots[:i]]
        assert all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 30 for a, b in pairs)


def test_what_cannot_be_drawn_falls_on_the_nearest_thing():
    made = [task("nearest", i, split="test") for i in range(600)]
    for s in made:
        colors = [wanted.color for wanted in s.goal.objects]
        if "turquoise" in s.prompt.lower():
            assert colors == ["blue"]
        if "five" in s.prompt.lower():
            assert len(colors) == 4
        if "not red" in s.prompt.lower():
            assert "red" not in colors
        assert s.plain.startswith("nothing") == (not colors)
