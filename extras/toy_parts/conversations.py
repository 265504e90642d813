"""Conversations that the toy MLLM learns from."""

from toy import words as vocabulary
from toy.scene import Scene, place_of, random_scene
from toy.talk import Talk, question
from toy.tasks import FIRST_EDITS, SIX_KINDS, task
from toy.words import NUMBERS, WHERE, describe, name_of, one_of, with_article

# What a conversation is about, with weights.
TALKS = {"an image": 4, "five images": 4, "a question": 2, "five questions": 4}
TALKS |= {"questions of one image": 2, "prompts": 4, "facts": 0.6}
# The kinds of task that the toy MLLM restates in plain words; a repeated kind is more likely.
RESTATED_WITH_IMAGES = ("edit",) * 5 + ("one subject", "two subjects", "three subjects") * 2
RESTATED_WITH_IMAGES += ("association",) * 2 + ("free edit",) * 3 + ("crowded edit",) * 3
RESTATED_WITH_IMAGES += ("very crowded edit",) * 6
RESTATED_WITH_IMAGES += FIRST_EDITS * 4
RESTATED_IN_WORDS = (*SIX_KINDS, *["dense"] * 3, *["knowledge"] * 5, "commonsense")
RESTATED_IN_WORDS += ("free wordings",) * 16 + ("two colours",) * 2 + ("free dense",)
RESTATED_IN_WORDS += ("lists", "nearest") * 6


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


def _about_an_image(rng):
    if rng.random() >= 0.35:
        return _restated(rng, RESTATED_WITH_IMAGES)
    scene = random_scene(rng, patterns=0.25) if rng.random() < 0.97 else Scene((), "black")
    return Talk("", describe(scene), (scene,), instructed=True)


def _about_a_prompt(rng):
    if rng.random() >= 0.01:
        return _restated(rng, RESTATED_IN_WORDS)
    return Talk("", describe(Scene(())), instructed=True)


def _questions(rng, turns, images):
    """Questions of as many images; further turns ask about the last one again."""
    account_share = rng.choice((0, 0.6, 1))
    made = []
    for turn in range(turns):
        shown = ()
        if turn < images:
            scene = random_scene(rng, patterns=0.15)
            shown = (scene,)
        asked, answer = question(rng, scene)
        if rng.random() < account_share:
            asked, answer = "tell me of each object", account(rng, scene)
        made.append(Talk(asked, answer, shown))
    return made


def talks(rng, sort):
    """The turns of one conversation of a sort of TALKS to train the toy MLLM on, a list of `Talk`.

    Images to describe or to change in thought, questions about images, prompts to restate in
    plain words, or facts.
    """
    if sort in ("an image", "five images"):
        return [_about_an_image(rng) for _ in range(1 if sort == "an image" else 5)]
    if sort == "facts":
        return [Talk(*fact(rng)) for _ in range(8)]
    if sort == "prompts":
        return [_about_a_prompt(rng) for _ in range(8)]
    # Mostly an image to each question: asked of one image, it could copy earlier answers.
    if sort == "questions of one image":
        return _questions(rng, turns=8, images=1)
    number = 1 if sort == "a question" else 5
    return _questions(rng, turns=number, images=number)
