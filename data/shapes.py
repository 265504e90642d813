"""The embedded world: 64x64 pictures of a few coloured shapes, their words, and an exact scorer.

Everything the paper claims can be checked on it without a judge model. A `Scene` is a plain
background and one to four objects. `render` draws it, `read` reads a picture back into a scene, and
a `Want` says what a prompt asks of a picture. `Shapes(kinds)[index]` makes a training or benchmark
sample from (seed, index) alone, in O(1), so that a resumed run and every worker see the same data
without any file.
"""

import random
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
COLORS = {
    "red": (225, 20, 25),
    "green": (0, 145, 30),
    "blue": (20, 50, 240),
    "yellow": (255, 225, 0),
    "purple": (130, 10, 150),
    "orange": (255, 140, 0),
    "pink": (255, 105, 180),
    "brown": (130, 70, 20),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (160, 160, 160), "black": (0, 0, 0)}
PATTERNS = ("plain", "halves", "core")
# Never named together in a training caption, so that drawing one shows composition, not memory.
HELD_OUT = {("circle", "orange"), ("star", "purple"), ("square", "pink"), ("triangle", "brown")}
PLACES = {
    "top left": (16, 16), "top": (32, 16), "top right": (48, 16),
    "left": (16, 32), "centre": (32, 32), "right": (48, 32),
    "bottom left": (16, 48), "bottom": (32, 48), "bottom right": (48, 48),
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four")


def _outlines():
    """Unit outlines in [-0.5, 0.5]², each filling its box so that box centre and size place it."""
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.42, 1.0)
    star = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    star = (star - star.min(0)) / (star.max(0) - star.min(0)) - 0.5
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    a, b = 0.5, 0.17
    return {
        "circle": np.stack([np.cos(turn), np.sin(turn)], 1) / 2,
        "square": np.array([(-a, -a), (a, -a), (a, a), (-a, a)]),
        "triangle": np.array([(0, -a), (a, a), (-a, a)]),
        "star": star,
        "cross": np.array([(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                           (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]),
        "diamond": np.array([(0, -a), (a, 0), (0, a), (-a, 0)]),
    }  # fmt: skip


OUTLINES = _outlines()
SHAPES = tuple(OUTLINES)


@dataclass(frozen=True)
class Object:
    """One object: its box centre (x, y) and box side in pixels; `inner` colours half or core."""

    shape: str
    color: str
    x: float = 32
    y: float = 32
    size: float = 34
    pattern: str = "plain"
    inner: str | None = None


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: str = "white"


@lru_cache(maxsize=4096)
def _stencil(shape, x, y, size):
    """A shape drawn about the picture's middle: (64, 64) float32 in [0, 1], antialiased 8x8."""
    canvas = Image.new("L", (SIZE * 8, SIZE * 8))
    points = (OUTLINES[shape] * size + (x, y)) * 8 - 0.5
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points], fill=255)
    return np.asarray(canvas, np.float32).reshape(SIZE, 8, SIZE, 8).mean((1, 3)) / 255


def coverage(shape, x, y, size):
    """Share of each pixel that the shape covers: (64, 64) float32 in [0, 1]."""
    right, down = int(x) - SIZE // 2, int(y) - SIZE // 2
    drawn = np.pad(_stencil(shape, x - right, y - down, size), SIZE)
    return drawn[SIZE - down : 2 * SIZE - down, SIZE - right : 2 * SIZE - right]


def _inner_coverage(item):
    """The part of a two-coloured object that has the `inner` colour: its right half or its core."""
    if item.pattern == "core":
        return coverage(item.shape, item.x, item.y, item.size / 2)
    right = np.clip(np.arange(SIZE) + 1 - item.x, 0, 1)[None]
    return coverage(item.shape, item.x, item.y, item.size) * right


def render(scene):
    """Draw a scene as a 64x64 RGB picture."""
    canvas = np.full((SIZE, SIZE, 3), BACKGROUNDS[scene.background], np.float32)
    for item in scene.objects:
        layers = [(coverage(item.shape, item.x, item.y, item.size), item.color)]
        if item.pattern != "plain":
            layers.append((_inner_coverage(item), item.inner))
        for alpha, color in layers:
            canvas += alpha[..., None] * (np.array(COLORS[color], np.float32) - canvas)
    return Image.fromarray(canvas.round().astype(np.uint8))


def _components(mask):
    """Connected parts (8 neighbours) of a boolean picture, as boolean pictures, largest first."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = np.stack([padded[i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)])
        spread = np.where(mask, around.max(0), 0)
        if (spread == labels).all():
            break
        labels = spread
    parts = [labels == label for label in np.unique(labels) if label]
    return sorted(parts, key=lambda part: -part.sum())


def _read_object(pixels, part, background):
    """The object that best explains one connected part, or None where none explains it well."""
    names, palette = list(COLORS), np.array(list(COLORS.values()), np.float32)
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    nearest, off = distance.argmin(-1), np.linalg.norm(pixels - background, axis=-1)
    inside = np.pad(part, 1)
    inside = part & inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    solid = inside & (distance.min(-1) < 70)
    if solid.sum() < max(8, 0.6 * inside.sum()):
        return None
    shares = np.bincount(nearest[solid], minlength=len(names)) / solid.sum()
    first, second = np.argsort(-shares)[:2]
    two = shares[first] < 0.85
    own = distance[..., [first, second] if two else [first]].min(-1)
    mask = part & (own < off)
    if not mask.any():
        return None
    ys, xs = np.where(mask)
    x, y = (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2
    size = max(np.ptp(xs), np.ptp(ys)) + 1
    best = (0.0,)
    for shape in SHAPES:
        for s in (size - 1, size, size + 1):
            for dx in (-0.5, 0, 0.5):
                for dy in (-0.5, 0, 0.5):
                    drawn = coverage(shape, x + dx, y + dy, s) > 0.5
                    iou = (drawn & mask).sum() / (drawn | mask).sum()
                    best = max(best, (iou, shape, x + dx, y + dy, s))
    if best[0] < 0.75:
        return None
    item = Object(best[1], names[first], *(float(value) for value in best[2:]))
    if not two:
        return item
    fits = [(0.0, None)]
    for color, inner in ((first, second), (second, first)):
        for pattern in ("halves", "core"):
            guess = replace(item, color=names[color], inner=names[inner], pattern=pattern)
            wanted = np.where(_inner_coverage(guess) > 0.5, inner, color)
            fits.append(((wanted == nearest)[solid].mean(), guess))
    fit, guess = max(fits, key=lambda pair: pair[0])
    return guess if fit >= 0.8 else None


def read(picture):
    """Read a picture back into a scene, exactly where it is clear.

    Returns (scene, clear): `clear` is False where something is drawn that is no object of this
    world, or where the background is none of its three. Specks under 20 pixels are passed over.
    """
    picture = picture.convert("RGB")
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(picture, np.float32)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(edge, 0)
    off = {name: np.abs(ground - color).max() for name, color in BACKGROUNDS.items()}
    background = min(off, key=off.get)
    clear = off[background] < 40
    items = []
    for part in _components(np.linalg.norm(pixels - ground, axis=-1) > 60):
        if part.sum() < 20:
            break
        item = _read_object(pixels, part, ground)
        clear = clear and item is not None
        if item is not None:
            items.append(item)
    return Scene(tuple(items), background), clear


# Where objects may stand together, and how large they then are (least, most).
LAYOUTS = {
    "centre": (("centre",), (30, 38)),
    "row": (("left", "right"), (22, 25)),
    "column": (("top", "bottom"), (22, 25)),
    "three": (("top left", "top right", "bottom"), (19, 22)),
    "corners": (("top left", "top right", "bottom left", "bottom right"), (19, 22)),
}


def _put(rng, layout, items, places=None):
    """Give each (color, shape) or Object of `items` a place of the layout, with some jitter."""
    spots, sizes = LAYOUTS[layout]
    placed = []
    for item, place in zip(items, places or spots, strict=False):
        if not isinstance(item, Object):
            item = Object(item[1], item[0])
        x, y = (coordinate + rng.randint(-2, 2) for coordinate in PLACES[place])
        placed.append(replace(item, x=x, y=y, size=rng.randint(*sizes)))
    return tuple(placed)


def _pair(rng, taken=(), held_out=False):
    """A random (color, shape) not in `taken`, from the held-out pairs or from the others."""
    while True:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        if ((shape, color) in HELD_OUT) == held_out and (color, shape) not in taken:
            return color, shape


def _two_coloured(rng, item):
    inner = [c for c in COLORS if c != item.color and (item.shape, c) not in HELD_OUT]
    return replace(item, pattern=rng.choice(PATTERNS[1:]), inner=rng.choice(inner))


def random_scene(rng, patterns=0.0, held_out=0.0, least=1):
    """Any scene: `least` (1 or 2) to 4 objects in some places of one layout, on any background.

    A share `patterns` of the objects has two colours (large ones only), and about a share
    `held_out` is of a held-out pair.
    """
    layout = rng.choices(tuple(LAYOUTS), (3 * (least < 2), 3, 2, 2, 4))[0]
    spots = LAYOUTS[layout][0]
    places = sorted(rng.sample(spots, rng.randint(least, len(spots))), key=spots.index)
    alike = rng.random() < 0.25
    items = []
    for _ in places:
        color, shape = _pair(rng, held_out=rng.random() < held_out)
        item = Object(shape, color)
        if layout in ("centre", "row", "column") and rng.random() < patterns:
            item = _two_coloured(rng, item)
        items.append(items[0] if alike and items else item)
    background = rng.choices(tuple(BACKGROUNDS), (2, 1, 1))[0]
    return Scene(_put(rng, layout, items, places), background)


@dataclass(frozen=True)
class Wanted:
    """One object that a prompt asks for; None leaves a property free.

    `place` is a name of PLACES; `at` (x, y) in pixels asks for a centre within 4 pixels.
    """

    color: str | None = None
    shape: str | None = None
    pattern: str | None = "plain"
    inner: str | None = None
    place: str | None = None
    at: tuple[float, float] | None = None

    def fits(self, item):
        """Whether an `Object` is what is wanted."""
        asked = (self.color, self.shape, self.pattern, self.inner, self.place)
        given = (item.color, item.shape, item.pattern, item.inner, place_of(item))
        near = self.at is None or max(abs(item.x - self.at[0]), abs(item.y - self.at[1])) <= 4
        return near and all(a is None or a == b for a, b in zip(asked, given, strict=True))


@dataclass(frozen=True)
class Want:
    """What a prompt asks of a picture: exactly these objects, and no others.

    `relation` ("left of", "right of", "above" or "below") holds between the first two objects.
    """

    objects: tuple[Wanted, ...]
    relation: str | None = None
    background: str | None = None


def want_scene(scene, exact=False):
    """The `Want` that a scene's own objects and background fulfil; `exact` asks for centres too."""
    return Want(
        tuple(
            Wanted(o.color, o.shape, o.pattern, o.inner, None if exact else place_of(o),
                   (o.x, o.y) if exact else None)
            for o in scene.objects
        ),
        background=scene.background,
    )  # fmt: skip


def satisfies(scene, want):
    """Whether a scene holds what is wanted, in some order of its objects."""
    if len(scene.objects) != len(want.objects) or want.background not in (None, scene.background):
        return False
    return any(
        all(wanted.fits(item) for wanted, item in zip(want.objects, order, strict=True))
        and (want.relation is None or _related(order[0], want.relation, order[1]))
        for order in permutations(scene.objects)
    )


def score(picture, want):
    """Whether a picture shows exactly what is wanted: the benchmark's judge."""
    scene, clear = read(picture)
    return clear and satisfies(scene, want)


def scores(pairs):
    """The benchmark's figures for (picture, `Sample`) pairs of one kind: a dict of means.

    The share that is right under the kind's name; for edits also what was changed and kept, for
    reconstructions also the peak signal-to-noise ratio in dB.
    """
    kind = pairs[0][1].kind
    values = {kind: [score(picture, s.want) for picture, s in pairs]}
    if kind == "edit":
        parts = [edit_score(picture, s) for picture, s in pairs]
        values["edit changed"], values["edit kept"] = zip(*parts, strict=True)
    if kind == "reconstruction":
        off = [np.asarray(p, float) - np.asarray(s.picture, float) for p, s in pairs]
        values["PSNR in dB"] = [10 * np.log10(255**2 / max(1e-6, (d**2).mean())) for d in off]
    return {name: float(np.mean(value)) for name, value in values.items()}


def edit_score(picture, edit):
    """(changed, kept) of a picture drawn for an "edit" `Sample`, two booleans.

    changed: what was to be new is there, what was to go is gone. kept: all else is as it was, and
    nothing was added beside the change.
    """
    seen, clear = read(picture)
    before, after = edit.sources[0], edit.target
    gone, new = set(before.objects) - set(after.objects), set(after.objects) - set(before.objects)
    ground = after.background if before.background != after.background else None

    def shown(item):
        wanted = Wanted(item.color, item.shape, item.pattern, item.inner, at=(item.x, item.y))
        return any(map(wanted.fits, seen.objects))

    def near(item):
        places = [*before.objects, *after.objects]
        return any(max(abs(item.x - o.x), abs(item.y - o.y)) <= 8 for o in places)

    changed = all(map(shown, new)) and not any(map(shown, gone))
    kept = clear and all(map(shown, set(before.objects) - gone)) and all(map(near, seen.objects))
    return (
        changed and ground in (None, seen.background),
        kept and (ground is not None or seen.background == before.background),
    )


def _related(one, relation, other):
    along, across = other.x - one.x, other.y - one.y
    if relation in ("above", "below"):
        along, across = across, along
    if relation in ("right of", "below"):
        along = -along
    return along >= 8 and along > abs(across)


def place_of(item):
    """The name of the nearest place."""
    return min(PLACES, key=lambda p: (PLACES[p][0] - item.x) ** 2 + (PLACES[p][1] - item.y) ** 2)


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
# Pairs of prompts that differ in one word or two and must differ in colour (CommonsenseT2I).
COMMONSENSE = (
    ("a ripe banana", "an unripe banana"), ("a leaf in spring", "a leaf in autumn"),
    ("the sky at noon", "the sky at sunset"), ("a stop signal", "a go signal"),
)  # fmt: skip
_FACTS = {
    "color": {thing: color for color, things in COLOR_FACTS.items() for thing in things},
    "shape": {thing: shape for shape, things in SHAPE_FACTS.items() for thing in things},
    "count": {fact: number for number, facts in COUNT_FACTS.items() for fact in facts},
}
_WRAPPERS = ("{}", "{}", "{}.", "a picture of {}", "a photo of {}", "an image of {}", "draw {}",
             "please draw {}", "show me {}", "there is {}", "a drawing of {}")  # fmt: skip
_RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
_ITS = {
    "left of": "to its left",
    "right of": "to its right",
    "above": "above it",
    "below": "below it",
}
_WHERE = {place: f"at the {place}" for place in PLACES} | {
    "centre": "in the centre", "left": "on the left", "right": "on the right",
}  # fmt: skip
_SIDES = {"left of": ("left", "right"), "right of": ("right", "left"),
          "above": ("top", "bottom"), "below": ("bottom", "top")}  # fmt: skip
COUNT_LAYOUTS = {1: "centre", 2: "row", 3: "three", 4: "corners"}


def _a(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def _plural(words):
    return words + ("es" if words.endswith("s") else "s")


def _colours(item):
    """The words for an object's colours, before its shape's and after it."""
    core = f" with {_a(item.inner)} core" if item.pattern == "core" else ""
    return f"half {item.color} half {item.inner}" if item.pattern == "halves" else item.color, core


def _name(item):
    """An object's name: "red star", "half red half blue star", "red star with a blue core"."""
    colour, core = _colours(item)
    return f"{colour} {item.shape}{core}"


def _listed(words):
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def layout_of(scene):
    """The layout that a scene's places and sizes belong to."""
    places = {place_of(item) for item in scene.objects}
    for layout, (spots, (least, _)) in LAYOUTS.items():
        if places <= set(spots) and min(item.size for item in scene.objects) >= least:
            return layout
    return "corners"


def _reading_order(scene):
    """A scene's objects by rows from the top, each row from the left."""
    return sorted(scene.objects, key=lambda item: ((item.y > 24) + (item.y > 40), item.x))


def describe(scene):
    """A scene in plain words: how the toy MLLM describes a picture or restates a prompt."""
    ground = "" if scene.background == "white" else f" on a {scene.background} background"
    items = _reading_order(scene)
    names = [_name(item) for item in items]
    layout = layout_of(scene) if items else None
    if not items:
        words = "nothing"
    elif len(items) > 1 and len(set(names)) == 1 and layout == COUNT_LAYOUTS[len(items)]:
        head, *core = names[0].split(" with ")
        words = " with ".join([f"{NUMBERS[len(items)]} {_plural(head)}", *core])
    elif layout == "centre":
        words = _a(names[0])
    elif len(items) == 2 and layout in ("row", "column"):
        words = f"{_a(names[0])} {'left of' if layout == 'row' else 'above'} {_a(names[1])}"
    else:
        words = _listed(
            [f"{_a(n)} {_WHERE[place_of(o)]}" for n, o in zip(names, items, strict=True)]
        )
    return words + ground


@dataclass(frozen=True)
class Sample:
    """One thing to draw: `prompt` and source scenes in; a right `target` scene, and what is asked.

    `plain` says in plain words what is to be drawn: the MLLM's own restatement of the prompt.
    """

    kind: str
    prompt: str
    target: Scene
    want: Want
    plain: str
    sources: tuple[Scene, ...] = ()

    @property
    def images(self):
        """The source pictures, PIL."""
        return [render(scene) for scene in self.sources]

    @property
    def picture(self):
        """The target picture, PIL."""
        return render(self.target)


def _least(kind):
    """The fewest objects of a kind's scenes."""
    return 2 if kind.startswith("crowded") else 1


def _wrapped(rng, words):
    return rng.choice(_WRAPPERS).format(words)


def _sample_pair(rng, kind, held_out):
    """Two objects, by shape ("two objects"), colour too ("attribution"), or either ("position")."""
    coloured = kind == "attribution" or (kind == "position" and rng.random() < 0.5)
    first = _pair(rng)
    second = _pair(rng, taken=[(color, first[1]) for color in COLORS] if not coloured else [first])
    names = [_a(f"{c} {s}" if coloured else s) for c, s in (first, second)]
    wanted = tuple(Wanted(c if coloured else None, s) for c, s in (first, second))
    if kind != "position":
        joint = rng.choice(("{} and {}", "{} and {}", "{} and {}", "{} with {}", "{} next to {}"))
        target = Scene(_put(rng, "row", (first, second)))
        plain = "{} and {}".format(*names)
        return Sample(kind, _wrapped(rng, joint.format(*names)), target, Want(wanted), plain)
    relation = rng.choice(tuple(_RELATIONS))
    sides = _SIDES[relation]
    words = rng.choice((
        *(f"{names[0]} {words} {names[1]}" for words in _RELATIONS[relation] * 2),
        f"{names[1]} with {names[0]} {_ITS[relation]}",
        f"{names[0]} {_WHERE[sides[0]]} and {names[1]} {_WHERE[sides[1]]}",
    ))  # fmt: skip
    layout = "column" if "top" in sides else "row"
    target = Scene(_put(rng, layout, (first, second), sides))
    plain = f"{names[0]} {relation} {names[1]}"
    return Sample(kind, _wrapped(rng, words), target, Want(wanted, relation), plain)


def _sample_plain(rng, kind, held_out):
    """One kind of object: "single object" (shape only), "colors" (with colour), "counting"."""
    color, shape = _pair(rng, held_out=held_out)
    number = rng.randint(2, 4) if kind == "counting" else 1
    coloured = kind == "colors" or (kind == "counting" and rng.random() < 0.5)
    name = f"{color} {shape}" if coloured else shape
    target = Scene(_put(rng, COUNT_LAYOUTS[number], [(color, shape)] * number))
    want = Want((Wanted(color if coloured else None, shape),) * number)
    if number > 1:
        plain = f"{NUMBERS[number]} {_plural(name)}"
        words = rng.choice((plain, plain, f"{number} {_plural(name)}"))
    else:
        plain = words = _a(name)
        if not words.startswith("an") and rng.random() < 0.2:
            words = rng.choice(("one ", "a single ")) + name
    return Sample(kind, _wrapped(rng, words), target, want, plain)


def _sample_dense(rng, kind, held_out):
    """A whole scene told at length, every colour, place and the background (as DPG-Bench)."""
    scene = random_scene(rng, patterns=0.3, least=_least(kind))
    plain = words = describe(scene)
    if " on a " in words and rng.random() < 0.3:
        words, ground = words.rsplit(" on ", 1)
        words = f"on {ground}, {words}"
    elif scene.background == "white" and rng.random() < 0.2:
        words += " on a white background"
    want = replace(want_scene(scene), background=scene.background)
    return Sample(kind, _wrapped(rng, words), scene, want, plain)


def _sample_knowledge(rng, kind, held_out, thing=None):
    """A prompt that takes a fact: a colour, a shape or a number told by a thing (as WISE)."""
    color, shape = _pair(rng)
    number = 1
    colour = rng.choice(("colour", "color"))
    what = "color" if thing else rng.choice(("color", "shape", "both", "count"))
    if what in ("color", "both"):
        thing = thing or rng.choice(COLOR_FACTS[color])
        while (shape, color := _FACTS["color"][thing]) in HELD_OUT:
            shape = rng.choice(SHAPES)
    form = rng.choice(SHAPE_FACTS[shape])
    if what == "color":
        words = rng.choice((f"{_a(shape)} the {colour} of {thing}",
                            f"{_a(shape)} in the {colour} of {thing}",
                            f"{_a(shape)} with the same {colour} as {thing}"))  # fmt: skip
    elif what == "shape":
        words = rng.choice((f"{_a(color)} object shaped like {form}",
                            f"something {color} in the shape of {form}",
                            f"{_a(color)} thing with the shape of {form}"))  # fmt: skip
    elif what == "both":
        words = rng.choice((f"something shaped like {form} in the {colour} of {thing}",
                            f"an object the {colour} of {thing} and the shape of {form}",
                            ))  # fmt: skip
    else:
        (owner, parts), number = rng.choice(tuple(_FACTS["count"].items()))
        words = f"as many {_plural(f'{color} {shape}')} as {owner} has {parts}"
    name = f"{color} {shape}"
    plain = _a(name) if number == 1 else f"{NUMBERS[number]} {_plural(name)}"
    target = Scene(_put(rng, COUNT_LAYOUTS[number], [(color, shape)] * number))
    return Sample(kind, _wrapped(rng, words), target, Want((Wanted(color, shape),) * number), plain)


def _sample_commonsense(rng, kind, held_out):
    """One prompt of a CommonsenseT2I-like pair."""
    return _sample_knowledge(rng, kind, held_out, rng.choice(rng.choice(COMMONSENSE)))


def _refer(rng, scene, item):
    """Words for one object of a scene that fit no other of its objects, or None."""
    if len(scene.objects) == 1 and rng.random() < 0.3:
        return rng.choice(("it", "the object"))
    if sum(o.shape == item.shape for o in scene.objects) == 1 and rng.random() < 0.5:
        return f"the {item.shape}"
    if sum((o.shape, o.color) == (item.shape, item.color) for o in scene.objects) == 1:
        return f"the {item.color} {item.shape}"
    return None


def _edit_once(rng, kind, scene):
    """(instruction, edited scene) of one kind, or None where it does not suit the scene."""
    items, layout = list(scene.objects), layout_of(scene)
    n = rng.randrange(len(items))
    item, rest = items[n], items[:n] + items[n + 1 :]
    it = _refer(rng, scene, item)
    spots, (least, most) = LAYOUTS[layout]
    free = [spot for spot in spots if spot not in {place_of(o) for o in items}]
    color, shape = _pair(rng)
    if kind == "background":
        ground = rng.choice([name for name in BACKGROUNDS if name != scene.background])
        words = rng.choice(("make the background {}", "change the background to {}",
                            "set the background to {}", "put it all on a {} background",
                            ))  # fmt: skip
        return words.format(ground), replace(scene, background=ground)
    if kind == "add":
        if not free:
            return None
        spot = rng.choice(free)
        x, y = PLACES[spot]
        new = Object(
            shape, color, x + rng.randint(-2, 2), y + rng.randint(-2, 2), rng.randint(least, most)
        )
        words = rng.choice(("add {} {}", "put {} {}", "place {} {}", "draw {} {}"))
        return words.format(_a(f"{color} {shape}"), _WHERE[spot]), replace(
            scene, objects=(*items, new)
        )
    if it is None:
        return None
    if kind == "recolour" and color != item.color:
        words = rng.choice(("make {} {}", "paint {} {}", "turn {} {}",
                            "change the colour of {} to {}",
                            "change the color of {} to {}", "recolour {} to {}"))  # fmt: skip
        words, new = words.format(it, color), [replace(item, color=color)]
    elif kind == "reshape" and shape != item.shape:
        words = rng.choice(
            ("turn {} into {}", "change {} into {}", "make {} {}", "replace {} with {}")
        )
        words, new = words.format(it, _a(shape)), [replace(item, shape=shape)]
    elif kind == "remove" and rest:
        words = rng.choice(("remove {}", "delete {}", "take away {}", "erase {}", "get rid of {}"))
        words, new = words.format(it), []
    elif kind == "move" and free:
        spot = rng.choice(free)
        x, y = PLACES[spot]
        to = (
            _WHERE[spot]
            .replace("on the", "to the")
            .replace("at the", "to the")
            .replace("in the", "to the")
        )
        words = rng.choice(("move {} {}", "shift {} {}", "put {} {}"))
        words = words.format(it, _WHERE[spot] if words.startswith("put") else to)
        new = [replace(item, x=x + rng.randint(-2, 2), y=y + rng.randint(-2, 2))]
    elif kind == "swap" and rest:
        other = rng.choice(rest)
        its = _refer(rng, scene, other)
        if its is None or (other.shape, other.color) == (item.shape, item.color):
            return None
        words = rng.choice(("swap {} and {}", "exchange {} and {}", "let {} and {} change places"))
        rest.remove(other)
        new = [replace(item, x=other.x, y=other.y), replace(other, x=item.x, y=item.y)]
        words = words.format(it, its)
    else:
        return None
    return words, replace(scene, objects=(*rest, *new))


EDITS = ("recolour", "reshape", "add", "remove", "move", "swap", "background")


def _named_held_out(scene):
    return any((o.shape, o.color) in HELD_OUT for o in scene.objects if o.pattern == "plain")


def _edited(scene, words, target):
    return Sample("edit", words, target, want_scene(target, exact=True), describe(target), (scene,))


def _sample_edit(rng, kind, held_out):
    """A picture and an instruction; everything that it does not name stays as it was."""
    change = rng.choice(EDITS)
    while True:
        scene = random_scene(rng, least=_least(kind))
        made = _edit_once(rng, change, scene)
        if made is not None and not _named_held_out(made[1]):
            return _edited(scene, *made)


def _subject(rng, patterns):
    color, shape = _pair(rng)
    if rng.random() > patterns:
        return Object(shape, color)
    return _two_coloured(rng, Object(shape, color))


def _drawn(kind, prompt, target, sources):
    return Sample(kind, prompt, target, want_scene(target), describe(target), tuple(sources))


def _sample_subject(rng, kind, held_out):
    """Pictures of 1 to 3 subjects that no word names, to be drawn in a new arrangement (§5.4)."""
    number = {"one subject": 1, "two subjects": 2, "three subjects": 3}[kind]
    subjects = [_subject(rng, 0.7 if number < 3 else 0) for _ in range(number)]
    grounds = [rng.choice(tuple(BACKGROUNDS)) for _ in range(number)]
    sources = [Scene(_put(rng, "centre", [s]), g) for s, g in zip(subjects, grounds, strict=True)]
    this = rng.choice(("the same object", "this object", "it"))
    other, background = _pair(rng, [(s.color, s.shape) for s in subjects]), "white"
    relation = rng.choice(tuple(_RELATIONS))
    sides = _SIDES[relation]
    layout = "row" if "left" in sides else "column"
    if number == 3:
        words = rng.choice(("all three objects together", "the three objects in one picture"))
        items = _put(rng, "three", subjects)
    elif number == 2:
        words = rng.choice(
            ("both objects side by side", "both objects", "the first object {} the second")
        )
        if "{}" in words:
            words = words.format(rng.choice(_RELATIONS[relation]))
            items = _put(rng, layout, subjects, sides)
        else:
            items = _put(rng, "row", subjects)
    else:
        case = rng.randrange(5)
        if case < 2:
            words = f"{this} {rng.choice(_RELATIONS[relation])} {_a(' '.join(other))}"
            items = _put(rng, layout, [subjects[0], other], sides)
        elif case == 2:
            words = rng.choice(("two of this object", "this object twice", "two copies of it"))
            items = _put(rng, "row", subjects * 2)
        elif case == 3:
            background = rng.choice([g for g in BACKGROUNDS if g != grounds[0]])
            words, items = f"{this} on a {background} background", _put(rng, "centre", subjects)
        else:
            place = rng.choice(("left", "right", "top", "bottom"))
            layout = "row" if place in ("left", "right") else "column"
            words, items = f"{this} {_WHERE[place]}", _put(rng, layout, subjects, [place])
    return _drawn(kind, words, Scene(items, background), sources)


def _sample_association(rng, kind, held_out):
    """A picture that must be reasoned over to know what to draw (§5.4, Figure 8, second row)."""
    first, second = _pair(rng), _pair(rng)
    case = rng.choice(("more", "fewer", "missing", "odd"))
    if case in ("more", "fewer"):
        number = rng.randint(1, 3)
        counts = (number, number + 1) if case == "more" else (number + 1, number)
        source, target = (Scene(_put(rng, COUNT_LAYOUTS[n], [first] * n)) for n in counts)
        words = ("one more of these", "one more", "add another one") if case == "more" else \
                ("one fewer of these", "one less", "take one away")  # fmt: skip
        return _drawn(kind, rng.choice(words), target, [source])
    if case == "missing":
        grid = [(c, s) for c in (first[0], second[0]) for s in (first[1], second[1])]
        wrong = len(set(grid)) < 4 or any((s, c) in HELD_OUT for c, s in grid)
        if wrong:
            return _sample_association(rng, kind, held_out)
        rng.shuffle(grid)
        source, answer = Scene(_put(rng, "corners", grid[:3])), grid[3]
        words = ("the shape with the missing colour", "the missing object", "what is missing here")
    else:
        if first == second:
            return _sample_association(rng, kind, held_out)
        number = rng.choice((3, 4))
        items = [first] * (number - 1) + [second]
        rng.shuffle(items)
        source, answer = Scene(_put(rng, COUNT_LAYOUTS[number], items)), second
        words = (
            "the odd one out",
            "only the one that is different",
            "the one that does not belong",
        )
    return _drawn(kind, rng.choice(words), Scene(_put(rng, "centre", [answer])), [source])


def _sample_reconstruct(rng, kind, held_out):
    """A picture and no words: draw it again."""
    scene = random_scene(rng, patterns=0.1, least=_least(kind))
    made = _drawn(kind, "", scene, [scene])
    return replace(made, want=want_scene(scene, exact=True))


def question(rng, scene):
    """A question about a picture and its answer."""
    items = scene.objects
    item, (color, shape) = rng.choice(items), _pair(rng)
    if rng.random() < 0.5:
        shape = item.shape
    number = sum(o.shape == shape for o in items)
    one = sum(o.shape == item.shape for o in items) == 1
    one_color = sum(o.color == item.color for o in items) == 1
    colour = rng.choice(("colour", "color"))
    many = rng.choice(("how many {}?", "how many {} are there?", "count the {}"))
    seen = rng.choice(("what is in the picture?", "what do you see?", "describe the picture"))
    asked = [
        (many.format(_plural(shape)), NUMBERS[number]),
        (rng.choice(("how many objects?", "how many objects are there?")), NUMBERS[len(items)]),
        (f"what {colour} is the background?", scene.background),
        (seen, describe(scene)),
    ]  # fmt: skip
    if rng.random() < 0.5:
        color, shape = item.color, item.shape
    there = any((o.color, o.shape, o.pattern) == (color, shape, "plain") for o in items)
    if (shape, color) not in HELD_OUT:
        asked.append((f"is there {_a(f'{color} {shape}')}?", "yes" if there else "no"))
    if item.pattern == "plain":
        if one:
            asked.append((f"what {colour} is the {item.shape}?", item.color))
        if one_color and not any(o.inner == item.color for o in items):
            asked.append((f"what shape is the {item.color} object?", _a(item.shape)))
    if one:
        asked += [(f"where is the {item.shape}?", _WHERE[place_of(item)])] * 2
    if len(items) == 2 and layout_of(scene) in ("row", "column"):
        a, b = _reading_order(scene)
        relation = "left of" if layout_of(scene) == "row" else "above"
        if a.shape != b.shape:
            asked.append((f"what is {relation} the {b.shape}?", _a(_name(a))))
    return rng.choice(asked)


def account(rng, scene):
    """What a scene holds, object by object in any order, each found by shape, colour or place."""
    told = []
    for item in rng.sample(scene.objects, len(scene.objects)):
        where, ways = _WHERE[place_of(item)], []
        colour, core = _colours(item)
        if sum(o.shape == item.shape for o in scene.objects) == 1:
            ways += [f"the {item.shape} is {colour}{core} {where}",
                     f"the {item.shape} {where} is {colour}{core}"] * 2  # fmt: skip
        if sum(item.color in (o.color, o.inner) for o in scene.objects) == 1:
            ways.append(f"the {colour} object is {_a(item.shape)}{core} {where}")
        told.append(rng.choice(ways or [f"{where} is {_a(_name(item))}"]))
    return ", ".join(told)


def unseen_question(index, seed=0):
    """The index-th question of the benchmark, about a picture that training never showed."""
    rng = random.Random(f"test {seed} question {index}")
    scene = random_scene(rng)
    return Talk(*question(rng, scene), (scene,))


def fact(rng):
    """A fact of the world as a question and its answer, or as a statement: (user, assistant)."""
    what = rng.choice(tuple(_FACTS))
    thing, value = rng.choice(tuple(_FACTS[what].items()))
    if what == "color":
        return rng.choice((f"what colour is {thing}?", f"what color is {thing}?")), value
    if what == "shape":
        return f"what shape is {thing}?", _a(value)
    return f"how many {thing[1]} does {thing[0]} have?", NUMBERS[value]


SIX_KINDS = ("single object", "two objects", "counting", "colors", "position", "attribution")
_MAKERS = {
    "single object": _sample_plain,
    "colors": _sample_plain,
    "counting": _sample_plain,
    "two objects": _sample_pair,
    "position": _sample_pair,
    "attribution": _sample_pair,
    "dense": _sample_dense,
    "knowledge": _sample_knowledge,
    "commonsense": _sample_commonsense,
    "reconstruction": _sample_reconstruct,
    "edit": _sample_edit,
    "one subject": _sample_subject,
    "two subjects": _sample_subject,
    "three subjects": _sample_subject,
    "association": _sample_association,
    "crowded dense": _sample_dense,
    "crowded reconstruction": _sample_reconstruct,
    "crowded edit": _sample_edit,
}
# The kinds that captions are trained on, with weights.
CAPTION_KINDS = {"single object": 2, "colors": 3, "two objects": 2, "counting": 3, "position": 4,
                 "attribution": 3, "dense": 4}  # fmt: skip
TEXT_KINDS = (*SIX_KINDS, "dense", "knowledge", "commonsense", "held-out")
PICTURE_KINDS = (
    "reconstruction",
    "edit",
    "one subject",
    "two subjects",
    "three subjects",
    "association",
)
KINDS = (*_MAKERS, "held-out")


def unseen(prompt):
    """Whether a prompt is kept from training: one in eight, by its own letters."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def sample(kind, index, seed=0, split="train"):
    """The index-th sample of a kind. `split` "test" yields only prompts that training never has.

    "held-out" is "colors" with a (shape, color) pair that no training caption names; a "crowded"
    kind has two objects or more, which training needs more of than they are met with. Raises
    KeyError for a kind that is not in KINDS.
    """
    rng = random.Random(f"{split} {seed} {kind} {index}")
    held_out = kind == "held-out"
    make = _MAKERS["colors" if held_out else kind]
    while True:
        made = make(rng, "colors" if held_out else kind, held_out)
        if held_out or made.sources:
            return replace(made, kind=kind)
        if unseen(made.prompt) == (split == "test"):
            return made


@dataclass(frozen=True)
class Talk:
    """An exchange for the toy MLLM; `instructed` puts MetaQuery's system prompt first."""

    user: str
    assistant: str
    sources: tuple[Scene, ...] = ()
    instructed: bool = False

    @property
    def images(self):
        """The source pictures, PIL."""
        return [render(scene) for scene in self.sources]


_PICTURE_KINDS = (*["edit"] * 5, "one subject", "two subjects", "three subjects", "association")


def _picture_task(rng):
    if rng.random() < 0.35:
        scene = random_scene(rng, patterns=0.25) if rng.random() < 0.97 else Scene((), "black")
        return Talk("", describe(scene), (scene,), True)
    made = sample(rng.choice(_PICTURE_KINDS), rng.randrange(1 << 40), "talk")
    return Talk(made.prompt, made.plain, made.sources, True)


def _word_task(rng):
    if rng.random() < 0.01:
        return Talk("", describe(Scene(())), (), True)
    kind = rng.choice((*SIX_KINDS, "dense", "dense", "dense", *["knowledge"] * 5, "commonsense"))
    made = sample(kind, rng.randrange(1 << 40), "talk")
    return Talk(made.prompt, made.plain, (), True)


# The sorts of conversation that the toy MLLM is trained on, with weights.
TALKS = {"a picture": 4, "five pictures": 4, "a question": 2, "five questions": 4,
         "questions of one picture": 2, "prompts": 4, "facts": 0.6}  # fmt: skip


def talks(rng, sort):
    """The turns of one conversation of a sort of TALKS to train the toy MLLM on, a list of `Talk`.

    Pictures to describe or to change in thought, questions about one picture, prompts to restate,
    or facts.
    """
    if sort in ("a picture", "five pictures"):
        return [_picture_task(rng) for _ in range(1 if sort == "a picture" else 5)]
    if sort == "facts":
        return [Talk(*fact(rng)) for _ in range(8)]
    if sort == "prompts":
        return [_word_task(rng) for _ in range(8)]
    # Mostly a picture to each question: asked of one picture, it could copy earlier answers.
    turns, pictures = {"a question": (1, 1), "five questions": (5, 5)}.get(sort, (8, 1))
    made, scene, accounts = [], None, rng.choice((0, 0.6, 1))
    for turn in range(turns):
        if turn < pictures:
            scene = random_scene(rng, patterns=0.15)
        asked = question(rng, scene)
        if rng.random() < accounts:
            asked = "tell me of each object", account(rng, scene)
        made.append(Talk(*asked, (scene,) * (turn < pictures)))
    return made
