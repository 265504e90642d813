"""Questions about images, and their answers."""

import random
from dataclasses import dataclass

from toy import scene as world
from toy.scene import Scene, layout_of, place_of, random_pair, random_scene, render
from toy.words import NUMBERS, WHERE, describe, name_of, one_of, plural, with_article


@dataclass(frozen=True)
class Talk:
    """One turn with the toy MLLM; `instructed` puts MetaQuery's system prompt first."""

    user: str
    assistant: str
    sources: tuple[Scene, ...] = ()
    instructed: bool = False

    @property
    def images(self):
        """The source images, PIL."""
        return [render(scene) for scene in self.sources]


def question(rng, scene):
    """A question about an image and its answer: ("how many stars?", "two")."""
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


def unseen_question(index, seed=0):
    """The index-th question of the benchmark, about an image that training never showed."""
    rng = random.Random(f"test {seed} question {index}")
    scene = random_scene(rng)
    return Talk(*question(rng, scene), (scene,))
