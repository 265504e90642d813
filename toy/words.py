"""The toy world in words: facts, relations and descriptions of scenes."""

from toy.scene import COUNT_LAYOUTS, PLACES, layout_of, place_of, reading_order

NUMBERS = ("zero", "one", "two", "three", "four")
# Facts that the toy MLLM learns as text, and that knowledge prompts call on.
COLOR_FACTS = {
    "red": ("a strawberry", "blood", "a fire engine", "a ripe tomato", "a stop signal", "a ruby"),
    "green": (
        "grass",
        "a frog",
        "a cucumber",
        "an unripe banana",
        "a leaf in spring",
        "a go signal",
    ),
    "blue": ("the sky at noon", "the sea", "a sapphire", "a blueberry", "a pair of jeans"),
    "yellow": ("a ripe banana", "a lemon", "a canary", "a sunflower", "butter"),
    "purple": ("an eggplant", "lavender", "a plum", "an amethyst"),
    "orange": ("a carrot", "a pumpkin", "the sky at sunset", "a basketball", "a tangerine"),
    "pink": ("a flamingo", "a pig", "bubblegum", "cotton candy"),
    "brown": ("chocolate", "coffee", "wood", "a leaf in autumn", "a bear", "a chestnut"),
}
SHAPE_FACTS = {
    "circle": ("a wheel", "a coin", "the full moon", "a plate"),
    "square": ("a chessboard", "a slice of toast", "a face of a die", "a handkerchief"),
    "triangle": ("a slice of pizza", "a pyramid", "a tent", "a party hat"),
    "star": ("a starfish", "the badge of a sheriff", "the top of a christmas tree"),
    "cross": ("a plus sign", "the sign of an ambulance", "the flag of switzerland"),
    "diamond": ("a kite", "a baseball field", "a rhombus"),
}
COUNT_FACTS = {
    2: (("a bicycle", "wheels"), ("a bird", "legs"), ("a person", "eyes"), ("a coin", "sides")),
    3: (("a tricycle", "wheels"), ("a clover", "leaves"), ("a traffic light", "lamps")),
    4: (("a car", "wheels"), ("a dog", "legs"), ("a year", "seasons"), ("a chair", "legs")),
}
# Prompts that differ in a word or two, and so must differ in colour (as in CommonsenseT2I).
COMMONSENSE = (
    ("a ripe banana", "an unripe banana"),
    ("a leaf in spring", "a leaf in autumn"),
    ("the sky at noon", "the sky at sunset"),
    ("a stop signal", "a go signal"),
)
# What to know of each thing; for "count" a thing is (owner, parts): a bicycle's wheels.
FACTS = {
    "color": {thing: color for color, things in COLOR_FACTS.items() for thing in things},
    "shape": {thing: shape for shape, things in SHAPE_FACTS.items() for thing in things},
    "count": {thing: number for number, things in COUNT_FACTS.items() for thing in things},
}
# Colours of things as people name them; no text asks about these as facts.
LOOSE_FACTS = {"a banana": "yellow", "the sky": "blue", "the sun": "yellow", "a leaf": "green"}
LOOSE_FACTS |= {"a tomato": "red", "fire": "red", "an orange": "orange", "a tree trunk": "brown"}
LOOSE_FACTS |= {"an apple": "red", "water": "blue", "a rose": "pink", "a grape": "purple"}
# What cannot be drawn, and the nearest thing that can.
NEAR_COLORS = {"turquoise": "blue", "cyan": "blue", "navy": "blue", "teal": "green"}
NEAR_COLORS |= {"lime": "green", "olive": "green", "violet": "purple", "lilac": "purple"}
NEAR_COLORS |= {"magenta": "pink", "gold": "yellow", "golden": "yellow", "crimson": "red"}
NEAR_COLORS |= {"scarlet": "red", "maroon": "brown", "beige": "brown", "amber": "orange"}
NEAR_COLORS |= {"white": "yellow", "black": "brown", "grey": "brown"}
NEAR_SHAPES = {"ball": "circle", "disc": "circle", "dot": "circle", "oval": "circle"}
NEAR_SHAPES |= {"ellipse": "circle", "ring": "circle", "moon": "circle", "face": "circle"}
NEAR_SHAPES |= {"rectangle": "square", "box": "square", "cube": "square", "house": "square"}
NEAR_SHAPES |= {"car": "square", "book": "square", "pyramid": "triangle", "cone": "triangle"}
NEAR_SHAPES |= {"mountain": "triangle", "roof": "triangle", "tree": "triangle", "boat": "triangle"}
NEAR_SHAPES |= {"flower": "star", "asterisk": "star", "snowflake": "star", "plus": "cross"}
NEAR_SHAPES |= {"airplane": "cross", "bird": "cross", "kite": "diamond", "rhombus": "diamond"}
NEAR_SHAPES |= {"heart": "diamond", "gem": "diamond", "fish": "diamond", "cat": "circle"}
NEAR_SHAPES |= {"dog": "circle", "apple": "circle", "person": "cross", "tower": "triangle"}
MANY = ("five", "six", "seven", "eight", "nine", "ten", "5", "6", "7", "8", "12", "a dozen", "many")
MANY += ("some", "several", "lots of", "eleven", "twenty", "a lot of")
# Ways to put a prompt; a repeated one is more likely.
WRAPPERS = ("{}", "{}", "{}.", "a picture of {}", "a photo of {}", "an image of {}")
WRAPPERS += ("draw {}", "please draw {}", "show me {}", "there is {}", "a drawing of {}")
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
    first = with_article(names[0])
    if len(items) > 1 and len(set(names)) == 1 and layout == COUNT_LAYOUTS[len(items)]:
        return counted(len(items), names[0])
    if layout == "centre":
        return first
    if len(items) == 2 and layout in ("row", "column"):
        relation = "left of" if layout == "row" else "above"
        return f"{first} {relation} {with_article(names[1])}"
    *others, last = [f"{with_article(name_of(item))} {WHERE[place_of(item)]}" for item in items]
    return ", ".join(others) + " and " + last if others else last


def describe(scene):
    """A scene in plain words: how the toy MLLM describes a picture or restates a prompt."""
    ground = "" if scene.background == "white" else f" on a {scene.background} background"
    return _describe_objects(scene) + ground


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
