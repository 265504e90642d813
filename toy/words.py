"""The toy world in words: facts, relations and descriptions of scenes."""

from toy.scene import COUNT_LAYOUTS, PLACES, layout_of, place_of, reading_order

NUMBERS = ("zero", "one", "two", "three", "four")


def ways(text):
    """The ways to say something of "one|another", on any number of lines."""
    return text.replace("\n", "").split("|")


def one_of(rng, text):
    """One of the ways of "one|another", at random."""
    return rng.choice(ways(text))


def _things(text):
    """{thing: what it has} of "red: a ruby, blood; green: grass"."""
    groups = [group.split(": ") for group in " ".join(text.split()).split("; ")]
    return {thing: value for value, things in groups for thing in things.split(", ")}


# Facts that the toy MLLM learns as text, and that knowledge prompts call on; for "count" a thing is
# (owner, parts): a bicycle's wheels.
FACTS = {
    "color": _things("""
        red: a strawberry, blood, a fire engine, a ripe tomato, a stop signal, a ruby;
        green: grass, a frog, a cucumber, an unripe banana, a leaf in spring, a go signal;
        blue: the sky at noon, the sea, a sapphire, a blueberry, a pair of jeans;
        yellow: a ripe banana, a lemon, a canary, a sunflower, butter;
        purple: an eggplant, lavender, a plum, an amethyst;
        orange: a carrot, a pumpkin, the sky at sunset, a basketball, a tangerine;
        pink: a flamingo, a pig, bubblegum, cotton candy;
        brown: chocolate, coffee, wood, a leaf in autumn, a bear, a chestnut"""),
    "shape": _things("""
        circle: a wheel, a coin, the full moon, a plate;
        square: a chessboard, a slice of toast, a face of a die, a handkerchief;
        triangle: a slice of pizza, a pyramid, a tent, a party hat;
        star: a starfish, the badge of a sheriff, the top of a christmas tree;
        cross: a plus sign, the sign of an ambulance, the flag of switzerland;
        diamond: a kite, a baseball field, a rhombus"""),
    "count": {("a bicycle", "wheels"): 2, ("a bird", "legs"): 2, ("a person", "eyes"): 2,
              ("a coin", "sides"): 2, ("a tricycle", "wheels"): 3, ("a clover", "leaves"): 3,
              ("a traffic light", "lamps"): 3, ("a car", "wheels"): 4, ("a dog", "legs"): 4,
              ("a year", "seasons"): 4, ("a chair", "legs"): 4},
}  # fmt: skip
# Prompts that differ in a word or two, and so must differ in colour (as in CommonsenseT2I).
COMMONSENSE = (
    ("a ripe banana", "an unripe banana"),
    ("a leaf in spring", "a leaf in autumn"),
    ("the sky at noon", "the sky at sunset"),
    ("a stop signal", "a go signal"),
)
# Colours of things as people name them; no text asks about these as facts.
LOOSE_FACTS = _things("""
    yellow: a banana; blue: the sky; yellow: the sun; green: a leaf; red: a tomato, fire;
    orange: an orange; brown: a tree trunk; red: an apple; blue: water; pink: a rose;
    purple: a grape""")
# What cannot be drawn, and the nearest thing that can.
NEAR_COLORS = _things("""
    blue: turquoise, cyan, navy; green: teal, lime, olive; purple: violet, lilac; pink: magenta;
    yellow: gold, golden; red: crimson, scarlet; brown: maroon, beige; orange: amber;
    yellow: white; brown: black, grey""")
NEAR_SHAPES = _things("""
    circle: ball, disc, dot, oval, ellipse, ring, moon, face;
    square: rectangle, box, cube, house, car, book;
    triangle: pyramid, cone, mountain, roof, tree, boat; star: flower, asterisk, snowflake;
    cross: plus, airplane, bird; diamond: kite, rhombus, heart, gem, fish; circle: cat, dog, apple;
    cross: person; triangle: tower""")
MANY = ways("""five|six|seven|eight|nine|ten|5|6|7|8|12|a dozen|many|some|several|lots of|eleven|
twenty|a lot of""")
# Ways to put a prompt; a repeated one is more likely.
WRAPPERS = ways("""{}|{}|{}.|a picture of {}|a photo of {}|an image of {}|draw {}|please draw {}|
show me {}|there is {}|a drawing of {}""")
RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
ITS_SIDE = {"left of": "to its left", "right of": "to its right"}
ITS_SIDE |= {"above": "above it", "below": "below it"}
# The places of the first and the second object of a relation.
SIDES = {"left of": ("left", "right"), "right of": ("right", "left")}
SIDES |= {"above": ("top", "bottom"), "below": ("bottom", "top")}
WHERE = {place: f"at the {place}" for place in PLACES}
WHERE |= {"centre": "in the centre", "left": "on the left", "right": "on the right"}


def things_with(about, value):
    """The things of FACTS that have this colour or this shape."""
    return [thing for thing, known in FACTS[about].items() if known == value]


def with_article(words):
    """ "a red star", "an orange star"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(name):
    """ "stars", "red crosses", "red stars with a blue core"."""
    head, joint, core = name.partition(" with ")
    return head + ("es" if head.endswith("s") else "s") + joint + core


def counted(number, name):
    """ "a red star", "three red stars"."""
    return with_article(name) if number == 1 else f"{NUMBERS[number]} {plural(name)}"


def listed(names, joint="and"):
    """ "a star, a cross and a square"."""
    *others, last = names
    return f"{', '.join(others)} {joint} {last}" if others else last


def on_a(background):
    """ " on a grey background"; white, which is usual, is not told."""
    return "" if background in (None, "white") else f" on a {background} background"


def colour_words(item):
    """The words for an object's colours, before its shape's and after it."""
    if item.pattern == "halves":
        return f"half {item.color} half {item.inner}", ""
    if item.pattern == "core":
        return item.color, f" with {with_article(item.inner)} core"
    return item.color, ""


def name_of(item):
    """An object's name: "red star", "half red half blue star", "red star with a blue core"."""
    colour, core = colour_words(item)
    return f"{colour} {item.shape}{core}"


def _describe_objects(scene):
    items = reading_order(scene)
    if not items:
        return "nothing"
    layout = layout_of(scene)
    names = [name_of(item) for item in items]
    articles = [with_article(name) for name in names]

    if len(items) > 1 and len(set(names)) == 1 and layout == COUNT_LAYOUTS[len(items)]:
        return counted(len(items), names[0])
    if layout == "centre":
        return articles[0]
    if len(items) == 2 and layout in ("row", "column"):
        return (" left of " if layout == "row" else " above ").join(articles)
    return listed(f"{a} {WHERE[place_of(item)]}" for a, item in zip(articles, items, strict=True))


def describe(scene):
    """A scene in plain words: how the toy MLLM describes an image or restates a prompt."""
    return _describe_objects(scene) + on_a(scene.background)


def refer(rng, scene, item):
    """Words for one object of a scene that fit no other of its objects, or None."""
    if len(scene.objects) == 1 and rng.random() < 0.3:
        return rng.choice(("it", "the object"))
    same_shape = [other for other in scene.objects if other.shape == item.shape]
    if len(same_shape) == 1 and rng.random() < 0.5:
        return f"the {item.shape}"
    if sum(other.color == item.color for other in same_shape) == 1:
        return f"the {item.color} {item.shape}"
    return None
