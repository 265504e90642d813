"""Conversations that the toy MLLM learns from, and questions about pictures."""

import random
from dataclasses import dataclass

from toy import scene as world
from toy import words as vocabulary
from toy.scene import Scene, layout_of, place_of, random_pair, random_scene, render
from toy.tasks import FIRST_EDITS, SIX_KINDS, task
from toy.words import NUMBERS, WHERE, describe, name_of, one_of, plural, with_article

# What a conversation is about, with weights.
TALKS = {"a picture": 4, "five pictures": 4, "a question": 2, "five questions": 4}
TALKS |= {"questions of one picture": 2, "prompts": 4, "facts": 0.6}
# The kinds of task that the toy MLLM restates in plain words; a repeated kind is more likely.
RESTATED_WITH_PICTURES = ("edit",) * 5 + ("one subject", "two subjects", "three subjects")
RESTATED_WITH_PICTURES += ("association",) * 2 + ("free edit",) * 3 + ("crowded edit",) * 3
RESTATED_WITH_PICTURES += ("very crowded edit",) * 6
RESTATED_WITH_PICTURES += FIRST_EDITS * 4
RESTATED_IN_WORDS = (*SIX_KINDS, *["dense"] * 3, *["knowledge"] * 5, "commonsense")
RESTATED_IN_WORDS += ("free wordings",) * 8 + ("two colours",) * 2 + ("free dense",)
RESTATED_IN_WORDS += ("lists", "nearest") * 6


@dataclass(frozen=True)
class Talk:
    """One turn with the toy MLLM; `instructed` puts MetaQuery's system prompt first."""

    user: str
    assistant: str
    sources: tuple[Scene, ...] = ()
    instructed: bool = False

    @property
    def images(self):
        """The source pictures, PIL."""
        return [render(scene) for scene in self.sources]


def question(rng, scene):
    """A question about a picture and its answer: ("how many stars?", "two")."""
    items = scene.objects
    item = rng.choice(items)
    color, shape = random_pair(rng)
    if rng.random() < 0.5:
        shape = item.shape
    number = sum(other.shape == shape for other in items)
    only_of_shape = sum(other.shape == item.shape for other in items) == 1
    only_of_color = sum(item.color in (other.color, other.inner) for other in items) == 1
    colour = one_of(rng, "colour|color")
    how_many = one_of(rng, "how many {}?|how many {} are there?|count the {}")
    what = one_of(rng, "what is in the picture?|what do you see?|describe the picture")
    how_many_objects = one_of(rng, "how many objects?|how many objects are there?")
    asked = [(how_many.format(plural(shape)), NUMBERS[number])]
    asked += [(how_many_objects, NUMBERS[len(items)])]
    asked += [(f"what {colour} is the background?", scene.background), (what, describe(scene))]

    if rng.random() < 0.5:
        color, shape = item.color, item.shape
    if (color, shape) not in world.HELD_OUT:
        there = any((o.color, o.shape, o.pattern) == (color, shape, "plain") for o in items)
        asked.append((f"is there {with_article(f'{color} {shape}')}?", "yes" if there else "no"))
    if item.pattern == "plain" and only_of_shape:
        asked.append((f"what {colour} is the {item.shape}?", item.color))
    if item.pattern == "plain" and only_of_color:
        asked.append((f"what shape is the {item.color} object?", with_article(item.shape)))
    if only_of_shape:
        asked += [(f"where is the {item.shape}?", WHERE[place_of(item)])] * 2
    layout = layout_of(scene)
    if len(items) == 2 and layout in ("row", "column"):
        first, second = world.reading_order(scene)
        relation = "left of" if layout == "row" else "above"
        if first.shape != second.shape:
            asked.append((f"what is {relation} the {second.shape}?", with_article(name_of(first))))
    return rng.choice(asked)


def account(rng, scene):
    """What a scene holds, object by object in any order: "the star is red at the top, ...".

    Each object is told by its shape, its colour or its place, whichever only it has.
    """
    told = []
    for item in rng.sample(scene.objects, len(scene.objects)):
        where = WHERE[place_of(item)]
        colour, core = vocabulary.colour_words(item)
        ways = []
        if sum(other.shape == item.shape for other in scene.objects) == 1:
            name = f"the {item.shape}"
            ways += [f"{name} is {colour}{core} {where}", f"{name} {where} is {colour}{core}"] * 2
        if sum(item.color in (other.color, other.inner) for other in scene.objects) == 1:
            ways.append(f"the {colour} object is {with_article(item.shape)}{core} {where}")
        told.append(rng.choice(ways or [f"{where} is {with_article(name_of(item))}"]))
    return ", ".join(told)


def unseen_question(index, seed=0):
    """The index-th question of the benchmark, about a picture that training never showed."""
    rng = random.Random(f"test {seed} question {index}")
    scene = random_scene(rng)
    return Talk(*question(rng, scene), (scene,))


def fact(rng):
    """A fact as a question and its answer: ("what colour is a lemon?", "yellow")."""
    about = rng.choice(tuple(vocabulary.FACTS))
    thing, value = rng.choice(tuple(vocabulary.FACTS[about].items()))
    if about == "color":
        return f"what {one_of(rng, 'colour|color')} is {thing}?", value
    if about == "shape":
        return f"what shape is {thing}?", with_article(value)
    owner, parts = thing
    return f"how many {parts} does {owner} have?", NUMBERS[value]


def _restated(rng, kinds):
    made = task(rng.choice(kinds), rng.randrange(1 << 40), seed="talk")  # no diffusion task's seed
    return Talk(made.prompt, made.plain, made.sources, instructed=True)


def _about_a_picture(rng):
    if rng.random() >= 0.35:
        return _restated(rng, RESTATED_WITH_PICTURES)
    scene = random_scene(rng, patterns=0.25) if rng.random() < 0.97 else Scene((), "black")
    return Talk("", describe(scene), (scene,), instructed=True)


def _about_a_prompt(rng):
    if rng.random() >= 0.01:
        return _restated(rng, RESTATED_IN_WORDS)
    return Talk("", describe(Scene(())), instructed=True)


def _questions(rng, turns, pictures):
    """Questions of as many pictures; further turns ask about the last one again."""
    account_share = rng.choice((0, 0.6, 1))
    made = []
    for turn in range(turns):
        shown = ()
        if turn < pictures:
            scene = random_scene(rng, patterns=0.15)
            shown = (scene,)
        asked, answer = question(rng, scene)
        if rng.random() < account_share:
            asked, answer = "tell me of each object", account(rng, scene)
        made.append(Talk(asked, answer, shown))
    return made


def talks(rng, sort):
    """The turns of one conversation of a sort of TALKS to train the toy MLLM on, a list of `Talk`.

    Pictures to describe or to change in thought, questions about pictures, prompts to restate in
    plain words, or facts.
    """
    if sort in ("a picture", "five pictures"):
        return [_about_a_picture(rng) for _ in range(1 if sort == "a picture" else 5)]
    if sort == "facts":
        return [Talk(*fact(rng)) for _ in range(8)]
    if sort == "prompts":
        return [_about_a_prompt(rng) for _ in range(8)]
    # Mostly a picture to each question: asked of one picture, it could copy earlier answers.
    if sort == "questions of one picture":
        return _questions(rng, turns=8, pictures=1)
    number = 1 if sort == "a question" else 5
    return _questions(rng, turns=number, pictures=number)
