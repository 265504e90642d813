"""Edits of a scene: an instruction as text, and the scene after it.

EDITS names seven of one object, SHORT_EDITS those that people type first and that leave something
open. Each takes a random generator and a `Choice`, and returns (instruction, edited scene), or None
where it does not suit the scene.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product

from toy import scene as world
from toy.scene import PLACES, Object, Pair, Scene, place_objects
from toy.words import LOOSE_FACTS, RELATIONS, SIDES, WHERE, one_of, plural, refer, with_article

RECOLOUR = "make {} {}|paint {} {}|turn {} {}|change the colour of {} to {}"
RECOLOUR += "|change the color of {} to {}|recolour {} to {}"
RESHAPE = "turn {} into {}|change {} into {}|make {} {}|replace {} with {}"
REMOVE = "remove|delete|take away|erase|get rid of"
GROUND = "make the background {}|change the background to {}|set the background to {}"


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
    words = one_of(rng, RECOLOUR).format(choice.it, color)
    return words, replaced(choice.scene, [item], [replace(item, color=color)])


def reshape(rng, choice):
    """ "turn the red star into a circle"."""
    item, shape = choice.item, choice.new.shape
    if choice.it is None or shape == item.shape:
        return None
    words = one_of(rng, RESHAPE).format(choice.it, with_article(shape))
    return words, replaced(choice.scene, [item], [replace(item, shape=shape)])


def placed(rng, scene, new, place):
    """The scene with one more object near a place, of the size that the others have."""
    layout = world.layout_of(scene)
    if place not in world.LAYOUTS[layout].places:
        layout = "corners"  # of small objects
    return replaced(scene, [], place_objects(rng, [new], layout, [place]).objects)


def add(rng, choice):
    """ "put a blue circle on the left"."""
    if not choice.free:
        return None
    place = rng.choice(choice.free)
    edited = placed(rng, choice.scene, choice.new, place)
    name = with_article(f"{choice.new.color} {choice.new.shape}")
    return f"{one_of(rng, 'add|put|place|draw')} {name} {WHERE[place]}", edited


def remove(rng, choice):
    """ "take away the cross"."""
    if choice.it is None or len(choice.scene.objects) == 1:
        return None
    return f"{one_of(rng, REMOVE)} {choice.it}", replaced(choice.scene, [choice.item])


def move(rng, choice):
    """ "move the star to the top left"."""
    if choice.it is None or not choice.free:
        return None
    place = rng.choice(choice.free)
    verb = one_of(rng, "move|shift|put")
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
    words = one_of(rng, "swap {} and {}|exchange {} and {}|let {} and {} change places")
    swapped = [replace(item, x=other.x, y=other.y), replace(other, x=item.x, y=item.y)]
    return words.format(choice.it, name), replaced(scene, [item, other], swapped)


def background(rng, choice):
    """ "make the background grey"."""
    ground = rng.choice([name for name in world.BACKGROUNDS if name != choice.scene.background])
    words = one_of(rng, GROUND + "|put it all on a {} background").format(ground)
    return words, replace(choice.scene, background=ground)


EDITS = (recolour, reshape, add, remove, move, swap, background)


# ---- Several objects at once ---------------------------------------------------------
def group_words(rng, items, shape):
    """Words for all `items` of a scene, or for all of a shape: "everything", "the stars"."""
    ways = "all|everything|all objects|all of them|all the objects|them all"
    if shape is None and len(items) == 2:
        ways = "both|both objects|both of them|everything|all|them both"
    if shape is not None:
        ways = "the {s}|the {s}|all {s}|all the {s}|all of the {s}"
        if len(items) == 2:
            ways += "|both {s}|the two {s}"
    return one_of(rng, ways).format(s=shape and plural(shape))


def change_group(rng, choice):
    """ "make the crosses red", "turn everything into stars", "remove all circles"."""
    scene, item, new = choice.scene, choice.item, choice.new
    shape = rng.choice((None, item.shape))
    items = [other for other in scene.objects if shape in (None, other.shape)]
    case = one_of(rng, "recolour|recolour|reshape|remove")
    if len(items) < 2 or (case == "remove" and len(items) == len(scene.objects)):
        return None
    words = group_words(rng, items, shape)
    if case == "remove":
        return f"{one_of(rng, REMOVE)} {words}", replaced(scene, items)

    if case == "recolour":
        words = one_of(rng, RECOLOUR).format(words, new.color)
        changed = [replace(other, color=new.color) for other in items]
    else:
        words = one_of(rng, RESHAPE).format(words, plural(new.shape))
        changed = [replace(other, shape=new.shape) for other in items]
    if set(changed) & set(items):  # something would stay as it was
        return None
    return words, replaced(scene, items, changed)


# ---- One object more, whether there is room or not -----------------------------------
@cache
def make_room(places, added=None):
    """Where objects at `places` move, as little as can be, so that one more has room.

    added: the name of its place; by default the one for which the others move least. Returns the
    new places and its own, or None where there is no way.
    """

    def steps(one, other):
        return [abs(a - b) for a, b in zip(PLACES[one], PLACES[other], strict=True)]

    def cost(way):
        pairs = zip(places, way[0], strict=True)
        return sum(step**2 for one, other in pairs for step in steps(one, other))

    wanted = ("right", "bottom", "left", "top", "bottom right", "top right")
    if added:
        wanted = (added,)
    ways = [
        (moved, place)
        for place in wanted
        for moved in product(PLACES, repeat=len(places))
        if all(max(steps(*two)) >= 30 for two in combinations((*moved, place), 2))
    ]
    return min(ways, key=cost, default=None)


def with_one_more(rng, scene, new, place=None):
    """The scene with one more object, near `place` if given; None where there is no way.

    The others stay if the place has room; otherwise they move aside, and large ones shrink.
    """
    if place in world.roomy_places(scene):
        edited = placed(rng, scene, new, place)
        if world.score(world.render(edited), world.goal_of(edited, exact=True)):
            return edited

    places = tuple(map(world.place_of, scene.objects))
    way = make_room(places, place)
    if way is None or len(places) > 3:
        return None
    moved, place = way
    layout = "row" if len(moved) == 1 else "corners"
    kept = []
    for item, old, spot in zip(scene.objects, places, moved, strict=True):
        x = item.x + PLACES[spot][0] - PLACES[old][0]
        y = item.y + PLACES[spot][1] - PLACES[old][1]
        size = min(item.size, world.LAYOUTS[layout].sizes[1])
        kept.append(replace(item, x=x, y=y, size=size))
    added = place_objects(rng, [new], layout, [place]).objects
    return replace(scene, objects=(*kept, *added))


def add_anywhere(rng, choice):
    """ "add a yellow triangle", "put a yellow triangle on the right": room is made for it."""
    place = rng.choice((None, None, None, *(place for place in PLACES if place != "centre")))
    if any(choice.new == (other.color, other.shape) for other in choice.scene.objects):
        return None
    target = with_one_more(rng, choice.scene, choice.new, place)
    name = with_article(f"{choice.new.color} {choice.new.shape}")
    words = f"{one_of(rng, 'add|add|put|place|draw|insert')} {name} {WHERE.get(place)}"
    if place is None:
        ways = "add {}|add {}|add {} too|add another object: {}|add {} to the picture"
        ways += "|put {} next to it|add {} beside it|insert {}|draw {} as well|and {}"
        words = one_of(rng, ways).format(name)
    return target and (words, target)


# ---- What people type first ----------------------------------------------------------
def one_less(rng, choice):
    """ "remove a cross" of three crosses: the last of them."""
    shape = choice.item.shape
    items = [o for o in world.reading_order(choice.scene) if o.shape == shape]
    if len(items) < 2 or len({o.color for o in items}) > 1:
        return None
    verb = one_of(rng, REMOVE)
    words = one_of(rng, "{a}|one {}|one of the {s}|only one {}")
    words = words.format(shape, a=with_article(shape), s=plural(shape))
    return f"{verb} {words}", replaced(choice.scene, [items[-1]])


def one_more(rng, choice):
    """ "add a cross" beside crosses: one of their colour."""
    item = choice.item
    colors = {other.color for other in choice.scene.objects if other.shape == item.shape}
    if len(colors) > 1:
        return None
    target = with_one_more(rng, choice.scene, Pair(item.color, item.shape))
    words = one_of(rng, "add {a}|add another {}|one more {}|add one more {}|draw another {}")
    return target and (words.format(item.shape, a=with_article(item.shape)), target)


def move_beside(rng, choice):
    """ "move the circle to the left of the star"."""
    scene, item = choice.scene, choice.item
    if choice.it is None or len(scene.objects) != 2:
        return None
    other = next(o for o in scene.objects if o != item)
    name = refer(rng, scene, other)
    relation = rng.choice(tuple(RELATIONS))
    target = place_objects(rng, [item, other], None, SIDES[relation], scene.background)
    related = world.satisfies(scene, replace(world.Goal(()), objects=world.goal_of(target).objects))
    if name is None or related:
        return None
    verb = one_of(rng, "move|put|place|shift")
    return f"{verb} {choice.it} {rng.choice(RELATIONS[relation])} {name}", target


def colour_of_a_thing(rng, choice):
    """ "make the star the colour of a banana"."""
    thing, color = rng.choice(tuple(LOOSE_FACTS.items()))
    if choice.it is None or color == choice.item.color:
        return None
    colour = one_of(rng, "colour|color")
    words = one_of(rng, "make {} the {colour} of {}|give {} the {colour} of {}|paint {} like {}")
    words = words.format(choice.it, thing, colour=colour)
    return words, replaced(choice.scene, [choice.item], [replace(choice.item, color=color)])


def coloured_background(rng, choice):
    """ "make the background blue": a background that there is not, so grey."""
    if choice.scene.background == "grey":
        return None
    ways = GROUND + "|{} background|put it on a {} background|paint the background {}"
    words = one_of(rng, ways).format(choice.new.color)
    return words, replace(choice.scene, background="grey")


def terse(rng, choice):
    """ "star green", "green star": the star, which is red, in green."""
    item, color = choice.item, choice.new.color
    alike = [other for other in choice.scene.objects if other.shape == item.shape]
    if len(alike) > 1 or color == item.color:
        return None
    ways = "{0} {1}|{1} {0}|{1} {0} instead|{0} in {1}"
    if len(choice.scene.objects) == 1:
        ways += "|{1}|in {1}"
    words = one_of(rng, ways).format(item.shape, color)
    return words, replaced(choice.scene, [item], [replace(item, color=color)])


def impossible(rng, choice):
    """ "make the star bigger": what this world cannot do, so nothing changes."""
    if choice.it is None:
        return None
    words = one_of(rng, "make {} bigger|make {} smaller|rotate {}|tilt {}|make {} larger|flip {}")
    return words.format(choice.it), choice.scene


SHORT_EDITS = (one_less, one_more, move_beside, colour_of_a_thing, coloured_background, terse)
SHORT_EDITS += (terse, impossible)
