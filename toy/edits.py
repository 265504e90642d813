"""The seven edits of a scene: an instruction as text, and the scene after it.

EDITS names them. Each takes a random generator and a `Choice`, and returns (instruction, edited
scene), or None where it does not suit the scene.
"""

from dataclasses import dataclass, replace

from toy import scene as world
from toy.scene import Object, Pair, Scene, place_objects
from toy.words import WHERE, refer, with_article


@dataclass(frozen=True)
class Choice:
    """What is drawn before an edit, of which it uses what it needs."""

    scene: Scene
    item: Object  # the object to change
    it: str | None  # words for that object and no other of the scene; None where there are none
    new: Pair
    free: tuple[str, ...]  # the places to add or to move an object to


def replaced(scene, old, new=()):
    """The scene without the objects `old`, and with the objects `new`."""
    kept = [item for item in scene.objects if item not in old]
    return replace(scene, objects=(*kept, *new))


def recolour(rng, choice):
    """ "paint the star blue"."""
    item, color = choice.item, choice.new.color
    if choice.it is None or color == item.color:
        return None
    ways = ["make {} {}", "paint {} {}", "turn {} {}", "change the colour of {} to {}"]
    ways += ["change the color of {} to {}", "recolour {} to {}"]
    words = rng.choice(ways).format(choice.it, color)
    return words, replaced(choice.scene, [item], [replace(item, color=color)])


def reshape(rng, choice):
    """ "turn the red star into a circle"."""
    item, shape = choice.item, choice.new.shape
    if choice.it is None or shape == item.shape:
        return None
    ways = ("turn {} into {}", "change {} into {}", "make {} {}", "replace {} with {}")
    words = rng.choice(ways).format(choice.it, with_article(shape))
    return words, replaced(choice.scene, [item], [replace(item, shape=shape)])


def add(rng, choice):
    """ "put a blue circle on the left"."""
    if not choice.free:
        return None
    place = rng.choice(choice.free)
    layout = world.layout_of(choice.scene)
    if place not in world.LAYOUTS[layout].places:
        layout = "corners"  # of small objects
    added = place_objects(rng, [choice.new], layout, [place]).objects
    verb = rng.choice(("add", "put", "place", "draw"))
    words = f"{verb} {with_article(f'{choice.new.color} {choice.new.shape}')} {WHERE[place]}"
    return words, replaced(choice.scene, [], added)


def remove(rng, choice):
    """ "take away the cross"."""
    if choice.it is None or len(choice.scene.objects) == 1:
        return None
    verb = rng.choice(("remove", "delete", "take away", "erase", "get rid of"))
    return f"{verb} {choice.it}", replaced(choice.scene, [choice.item])


def move(rng, choice):
    """ "move the star to the top left"."""
    if choice.it is None or not choice.free:
        return None
    place = rng.choice(choice.free)
    verb = rng.choice(("move", "shift", "put"))
    words = f"{verb} {choice.it} {WHERE[place] if verb == 'put' else f'to the {place}'}"
    x, y = world.near(rng, place)
    return words, replaced(choice.scene, [choice.item], [replace(choice.item, x=x, y=y)])


def swap(rng, choice):
    """ "swap the star and the blue circle"."""
    scene, item = choice.scene, choice.item
    if choice.it is None or len(scene.objects) == 1:
        return None
    other = rng.choice([other for other in scene.objects if other != item])
    name = refer(rng, scene, other)
    if name is None or (other.shape, other.color) == (item.shape, item.color):
        return None
    ways = ("swap {} and {}", "exchange {} and {}", "let {} and {} change places")
    words = rng.choice(ways).format(choice.it, name)
    swapped = [replace(item, x=other.x, y=other.y), replace(other, x=item.x, y=item.y)]
    return words, replaced(scene, [item, other], swapped)


def background(rng, choice):
    """ "make the background grey"."""
    ground = rng.choice([name for name in world.BACKGROUNDS if name != choice.scene.background])
    ways = ["make the background {}", "change the background to {}", "set the background to {}"]
    ways += ["put it all on a {} background"]
    return rng.choice(ways).format(ground), replace(choice.scene, background=ground)


EDITS = {make.__name__: make for make in (recolour, reshape, add, remove, move, swap, background)}
