"""The toy world's tasks: what to draw, from which prompt and images, and how to judge it.

    task("position", 7)            a task to train on: prompt "a red star left of a blue circle"
    task("edit", 7, split="test")  a task of the benchmark: prompt "make it green", and an image

A task follows from (seed, split, kind, index) alone, so that a resumed run and every worker see the
same data without any file. MAKERS has one maker per kind: a function of a random generator. Here
are those with source images; toy/captions.py has the others.
"""

import random
import zlib
from dataclasses import replace
from functools import partial

from toy import captions
from toy import scene as world
from toy.captions import draw_as_it_is, pair_name, wrapped
from toy.edits import EDITS, SHORT_EDITS, Choice, add, add_anywhere, change_group, move, replaced
from toy.scene import Object, Pair, place_objects, random_pair
from toy.words import RELATIONS, SIDES, WHERE, describe, one_of, refer, with_article


def reconstruction(rng, least=1):
    """An image and the prompt "": draw it again. `least` is the fewest objects."""
    scene = world.random_scene(rng, patterns=0.1, least=least)
    return draw_as_it_is("", scene, [scene], exact=True)


def painted(rng):
    """An image as a hand paints it and the prompt "": the clean image."""
    scene = world.random_scene(rng)
    return replace(draw_as_it_is("", scene, [scene]), hand=rng.randrange(1 << 30))


def _plain_pairs(scene):
    """(color, shape) of each object of one colour."""
    return {(o.color, o.shape) for o in scene.objects if o.pattern == "plain"}


def edit(rng, least=1):
    """An image and "make the star green": all that is not named stays. `least`: fewest objects."""
    make_edit = rng.choice(EDITS)
    while True:
        scene = world.random_scene(rng, least=least)
        item = rng.choice(scene.objects)
        taken = {world.place_of(other) for other in scene.objects}
        layout = world.LAYOUTS[world.layout_of(scene)]
        free = [place for place in layout.places if place not in taken]
        choice = Choice(scene, item, refer(rng, scene, item), random_pair(rng), free)
        edited = make_edit(rng, choice)
        if edited is not None and not world.HELD_OUT & _plain_pairs(edited[1]):
            return draw_as_it_is(*edited, [scene], exact=True)


def free_edit(rng):
    """An image and "add a green cross at the top": to any place with room, in any layout."""
    make_edit = rng.choice((add, move))
    while True:
        scene = world.random_scene(rng, least=rng.choice((1, 2, 2)))
        item = rng.choice(scene.objects)
        others = scene if make_edit is add else replaced(scene, [item])
        free = [p for p in world.roomy_places(others) if p != world.place_of(item)]
        free = free if len(others.objects) < 4 else []
        choice = Choice(scene, item, refer(rng, scene, item), random_pair(rng), free)
        edited = make_edit(rng, choice)
        if edited is not None:
            made = draw_as_it_is(*edited, [scene], exact=True)
            if world.score(made.target_image, made.goal):  # nothing is hidden behind another object
                return made


def first_edit(rng, makers):
    """An image and an edit that leaves something open: "make both green", "remove a cross".

    As often as not several of the objects are alike, as in images that are drawn from words.
    """
    make_edit = rng.choice(makers)
    while True:
        scene = world.random_scene(rng)
        if rng.random() < 0.4:
            color, shape = random_pair(rng)
            alike = rng.choice(({"color": color, "shape": shape}, {"shape": shape}))
            objects = tuple(replace(item, **alike) for item in scene.objects)
            scene = replace(scene, objects=objects)

        item = rng.choice(scene.objects)
        edited = make_edit(rng, Choice(scene, item, refer(rng, scene, item), random_pair(rng), ()))
        if edited is None or not edited[1].objects:
            continue
        words, target = edited
        if world.HELD_OUT & (_plain_pairs(scene) | _plain_pairs(target)):
            continue

        made = draw_as_it_is(words, target, [scene])
        # Only where none of the objects was to move are they asked for at their places.
        before, after = (sorted((o.x, o.y) for o in s.objects) for s in (scene, target))
        if before == after:
            return made
        objects = tuple(replace(wanted, place=None) for wanted in made.goal.objects)
        return replace(made, goal=replace(made.goal, objects=objects))


def free_dense(rng):
    """ "a red star in the centre and a blue circle at the bottom left": what a free edit leaves."""
    target = free_edit(rng).target
    return draw_as_it_is(wrapped(rng, describe(target)), target)


def subjects(rng, number):
    """Images of 1 to 3 subjects that the prompt never names (paper section 5.4).

    One: "this object left of a red star", "two copies of it"; two: "the first object above the
    second"; three: "all three objects together".
    """
    items = []
    for _ in range(number):
        pair = random_pair(rng)
        item = Object(pair.shape, pair.color)
        two_colours = rng.random() <= (0.7 if number < 3 else 0)
        items.append(world.two_coloured(rng, item) if two_colours else item)
    grounds = [rng.choice(tuple(world.BACKGROUNDS)) for _ in items]
    sources = []
    for item, ground in zip(items, grounds, strict=True):
        sources.append(place_objects(rng, [item], background=ground))
    it = one_of(rng, "the same object|this object|it")
    other = random_pair(rng, taken=[(item.color, item.shape) for item in items])
    relation = rng.choice(tuple(RELATIONS))
    related = {"places": SIDES[relation]}
    arrangement = {}  # arguments of place_objects: by default the layout of so many objects
    case = rng.randrange(5) if number == 1 else None

    if number == 3:
        words = one_of(rng, "all three objects together|the three objects in one picture")
    elif number == 2:
        words = one_of(rng, "both objects side by side|both objects|the first object {} the second")
        if "{}" in words:
            words = words.format(rng.choice(RELATIONS[relation]))
            arrangement = related
    elif case < 2:
        words = f"{it} {rng.choice(RELATIONS[relation])} {with_article(pair_name(other))}"
        items.append(other)
        arrangement = related
    elif case == 2:
        words = one_of(rng, "two of this object|this object twice|two copies of it")
        items = items * 2
    elif case == 3:
        ground = rng.choice([name for name in world.BACKGROUNDS if name != grounds[0]])
        words = f"{it} on a {ground} background"
        arrangement = {"background": ground}
    else:
        place = one_of(rng, "left|right|top|bottom")
        words = f"{it} {WHERE[place]}"
        arrangement = {"layout": "row", "places": [place]}
    return draw_as_it_is(words, place_objects(rng, items, **arrangement), sources)


def association(rng):
    """An image to reason about and "one more of these", "what is missing here", "the odd one out".

    Paper section 5.4, Figure 8. What is missing: the fourth pair of two colours and two shapes.
    """
    first, second = random_pair(rng), random_pair(rng)
    case = one_of(rng, "more|fewer|missing|odd")
    if case in ("more", "fewer"):
        number = rng.randint(1, 3)
        counts = (number, number + 1) if case == "more" else (number + 1, number)
        source, target = (place_objects(rng, [first] * count) for count in counts)
        words = "one fewer of these|one less|take one away"
        if case == "more":
            words = "one more of these|one more|add another one"
        return draw_as_it_is(one_of(rng, words), target, [source])
    grid = [Pair(c, s) for c in (first.color, second.color) for s in (first.shape, second.shape)]

    if case == "missing":
        if len(set(grid)) < 4 or set(grid) & world.HELD_OUT:
            return association(rng)  # there is no such puzzle with these pairs
        rng.shuffle(grid)
        answer = grid[3]
        source = place_objects(rng, grid[:3], "corners")
        words = "the shape with the missing colour|the missing object|what is missing here"
    else:
        if first == second:
            return association(rng)
        answer = second
        pairs = [first] * (rng.choice((3, 4)) - 1) + [second]
        rng.shuffle(pairs)
        source = place_objects(rng, pairs)
        words = "the odd one out|only the one that is different|the one that does not belong"
    return draw_as_it_is(one_of(rng, words), place_objects(rng, [answer]), [source])


# "crowded" has two objects or more, "very crowded" three or four: chance makes too few of them.
MAKERS = {
    "single object": partial(captions.one_object, coloured=False),
    "colors": partial(captions.one_object, coloured=True),
    "counting": captions.counting,
    "two objects": partial(captions.two_objects, coloured=False),
    "position": captions.position,
    "attribution": partial(captions.two_objects, coloured=True),
    "dense": captions.dense,
    "knowledge": captions.knowledge,
    "commonsense": partial(captions.knowledge, commonsense=True),
    "reconstruction": reconstruction,
    "edit": edit,
    "one subject": partial(subjects, number=1),
    "two subjects": partial(subjects, number=2),
    "three subjects": partial(subjects, number=3),
    "association": association,
    "crowded dense": partial(captions.dense, least=2),
    "crowded reconstruction": partial(reconstruction, least=2),
    "crowded edit": partial(edit, least=2),
    "very crowded edit": partial(edit, least=3),
    "held-out": partial(captions.one_object, coloured=True, held_out=True),
    "two colours": captions.two_colours,
    "free wordings": captions.free_wording,
    "free edit": free_edit,
    "free dense": free_dense,
    "lists": captions.lists,
    "nearest": captions.nearest,
    "plural edit": partial(first_edit, makers=(change_group,)),
    "add anywhere": partial(first_edit, makers=(add_anywhere,)),
    "short edit": partial(first_edit, makers=SHORT_EDITS),
    "painted": painted,
}
KINDS = tuple(MAKERS)
SIX_KINDS = ("single object", "two objects", "counting", "colors", "position", "attribution")
# The kinds of the benchmark: prompts alone, and prompts with images.
TEXT_KINDS = (*SIX_KINDS, "dense", "knowledge", "commonsense", "held-out")
TEXT_KINDS += ("two colours", "free wordings", "lists", "nearest")
IMAGE_KINDS = ("reconstruction", "edit", "one subject", "two subjects", "three subjects")
IMAGE_KINDS += ("association", "free edit", "painted")
FIRST_EDITS = ("plural edit", "add anywhere", "short edit")
# The kinds that captions are trained on, with weights.
CAPTION_KINDS = {"single object": 2, "colors": 3, "two objects": 2, "counting": 3}
CAPTION_KINDS |= {"position": 4, "attribution": 3, "dense": 4}


def task(kind, index, seed=0, split="train"):
    """The index-th task of a kind. `split` "test" yields only prompts that training never has.

    Tasks with images and "held-out" may repeat a prompt: their images or pairs are unseen.
    Raises KeyError for a kind that is not in KINDS.
    """
    rng = random.Random(f"{split} {seed} {kind} {index}")
    while True:
        made = replace(MAKERS[kind](rng), kind=kind)
        for_test = made.for_test
        if for_test is None:
            for_test = zlib.crc32(made.prompt.encode()) % 8 == 0  # one prompt in eight
        if made.sources or kind == "held-out" or for_test == (split == "test"):
            return made


# The tasks of each training stage of train.py, with weights. The last stage repeats all that came
# before it, so that nothing is forgotten.
MIXTURES = {
    # Which side one object is on is learned last, so most captions say it.
    "pretrain": CAPTION_KINDS | {"colors": 1, "two objects": 1, "counting": 4, "position": 16,
                                 "attribution": 1},
    "reconstruct": {"reconstruction": 1},
    "mix": CAPTION_KINDS | {"reconstruction": sum(CAPTION_KINDS.values())},
    "edit": {"edit": 1},
    "instruct": {"reconstruction": 6, "crowded reconstruction": 10, "single object": 6,
                 "colors": 1, "two objects": 2, "counting": 3, "position": 3, "attribution": 3,
                 "dense": 3, "crowded dense": 8, "edit": 12, "crowded edit": 26, "one subject": 14,
                 "two subjects": 16, "three subjects": 6, "association": 6,
                 "free wordings": 30, "two colours": 8, "free edit": 16, "free dense": 10,
                 "lists": 14, "nearest": 14, "plural edit": 16, "add anywhere": 16,
                 "short edit": 16, "painted": 8},
}  # fmt: skip
