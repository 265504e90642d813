"""The toy world's images: scenes of objects, how to draw them, read them back and score them.

`render` draws a `Scene`, `read` reads an image back into one, and `score` judges exactly, without
another model, whether an image shows what a `Goal` asks for.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

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
# Centres of the named places, (x, y) in pixels from the top left.
PLACES = {"top left": (16, 16), "top": (32, 16), "top right": (48, 16)}
PLACES |= {"left": (16, 32), "centre": (32, 32), "right": (48, 32)}
PLACES |= {"bottom left": (16, 48), "bottom": (32, 48), "bottom right": (48, 48)}


class Pair(NamedTuple):
    """A colour and a shape, not placed anywhere yet."""

    color: str
    shape: str


# (color, shape) that no training caption names: drawing one shows composition, not memory.
HELD_OUT = {("orange", "circle"), ("purple", "star"), ("pink", "square"), ("brown", "triangle")}


def _outlines():
    """Corners (n, 2) of each shape in [-0.5, 0.5]², touching all four sides of that box."""
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.42, 1.0)
    star = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    star = (star - star.min(0)) / (star.max(0) - star.min(0)) - 0.5
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    a, b = 0.5, 0.17  # half the side of the box, half the width of an arm of the cross
    cross_x = [-b, b, b, a, a, b, b, -b, -b, -a, -a, -b]
    cross_y = [-a, -a, -b, -b, b, b, a, a, b, b, -b, -b]
    return {
        "circle": np.stack([np.cos(turn), np.sin(turn)], 1) / 2,
        "square": np.array([(-a, -a), (a, -a), (a, a), (-a, a)]),
        "triangle": np.array([(0, -a), (a, a), (-a, a)]),
        "star": star,
        "cross": np.stack([cross_x, cross_y], 1),
        "diamond": np.array([(0, -a), (a, 0), (0, a), (-a, 0)]),
    }


OUTLINES = _outlines()
SHAPES = tuple(OUTLINES)


@dataclass(frozen=True)
class Object:
    """One object: the centre (x, y) and the side of its box, in pixels.

    `pattern` is one of PATTERNS: "halves" has its right half in the colour `inner`, "core" a small
    copy of itself in the middle.
    """

    shape: str
    color: str
    x: float = 32
    y: float = 32
    size: float = 34
    pattern: str = "plain"
    inner: str | None = None


@dataclass(frozen=True)
class Scene:
    """Up to four objects on a plain background, one of BACKGROUNDS."""

    objects: tuple[Object, ...]
    background: str = "white"


@lru_cache(maxsize=4096)
def _stencil(shape, x, y, size):
    """As `coverage`, for a centre within a pixel of the middle. Averages 8x8 points a pixel."""
    canvas = Image.new("L", (SIZE * 8, SIZE * 8))
    points = (OUTLINES[shape] * size + (x, y)) * 8 - 0.5
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points], fill=255)
    return np.asarray(canvas, np.float32).reshape(SIZE, 8, SIZE, 8).mean((1, 3)) / 255


def coverage(shape, x, y, size):
    """Share of each pixel that a shape covers: (64, 64) float32 in [0, 1]."""
    # Draw it near the middle, where it is in the cache, and shift by whole pixels.
    right, down = int(x) - SIZE // 2, int(y) - SIZE // 2
    drawn = _stencil(shape, x - right, y - down, size)
    kept = drawn[max(-down, 0) : SIZE - down, max(-right, 0) : SIZE - right]
    shifted = np.zeros_like(drawn)
    shifted[max(down, 0) : SIZE + down, max(right, 0) : SIZE + right] = kept
    return shifted


def _inner_coverage(item):
    """The part of a two-coloured object that has the `inner` colour: its right half or its core."""
    if item.pattern == "core":
        return coverage(item.shape, item.x, item.y, item.size / 2)
    right = np.clip(np.arange(SIZE) + 1 - item.x, 0, 1)[None]
    return coverage(item.shape, item.x, item.y, item.size) * right


def render(scene):
    """Draw a scene as a 64x64 RGB image."""
    canvas = np.full((SIZE, SIZE, 3), BACKGROUNDS[scene.background], np.float32)
    for item in scene.objects:
        layers = [(coverage(item.shape, item.x, item.y, item.size), item.color)]
        if item.pattern != "plain":
            layers.append((_inner_coverage(item), item.inner))
        for alpha, color in layers:
            canvas += alpha[..., None] * (np.array(COLORS[color], np.float32) - canvas)
    return Image.fromarray(canvas.round().astype(np.uint8))


def paint(scene, seed):
    """A scene of plain objects as a hand paints it: corners rounded, sides and colours uneven."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene.background])
    for item in scene.objects:
        points = OUTLINES[item.shape] * item.size + (item.x, item.y)
        points = 4 * (points + rng.normal(0, 0.8 / len(points) ** 0.25, points.shape))
        drawn = Image.new("L", (4 * SIZE, 4 * SIZE))
        ImageDraw.Draw(drawn).polygon([tuple(point) for point in points], fill=255)
        drawn = drawn.filter(ImageFilter.GaussianBlur(rng.uniform(3, 9)))
        drawn = drawn.point(lambda level: 255 * (level > 127)).resize((SIZE, SIZE))
        color = np.clip(COLORS[item.color] + rng.integers(-35, 36, 3), 0, 255)
        image.paste(tuple(color.tolist()), mask=drawn)
    return image


def _components(mask):
    """Connected parts (8 neighbours) of a boolean image, as boolean images, largest first."""
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


def _fit_outline(mask):
    """The outline that fits a mask best: (intersection over union, shape, x, y, size)."""
    ys, xs = np.where(mask)
    x, y = (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2
    size = max(np.ptp(xs), np.ptp(ys)) + 1
    fits = []
    shifts = (-0.5, 0, 0.5)
    for shape, grow, dx, dy in product(SHAPES, (-1, 0, 1), shifts, shifts):
        drawn = coverage(shape, x + dx, y + dy, size + grow) > 0.5
        overlap = np.count_nonzero(drawn & mask) / np.count_nonzero(drawn | mask)
        fits.append((overlap, shape, float(x + dx), float(y + dy), float(size + grow)))
    return max(fits)


def _read_object(pixels, part, background):
    """The object that best explains one connected part, or None where none explains it well.

    pixels (64, 64, 3) in [0, 255]; part (64, 64) booleans; background (3,) in [0, 255].
    """
    names = list(COLORS)
    palette = np.array(list(COLORS.values()), np.float32)
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)  # (64, 64, colours)
    nearest = distance.argmin(-1)
    # Colours are read from inside the part, where no pixel is mixed with the background.
    padded = np.pad(part, 1)
    inside = part & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    solid = inside & (distance.min(-1) < 70)
    if solid.sum() < max(8, 0.6 * inside.sum()):
        return None
    shares = np.bincount(nearest[solid], minlength=len(names)) / solid.sum()
    first, second = np.argsort(-shares)[:2]
    two_colours = shares[first] < 0.85
    own_colours = [first, second] if two_colours else [first]
    # A pixel on the edge belongs to the object if it is nearer to its colours than to the ground.
    to_background = np.linalg.norm(pixels - background, axis=-1)
    mask = part & (distance[..., own_colours].min(-1) < to_background)

    if not mask.any():
        return None
    overlap, shape, x, y, size = _fit_outline(mask)
    if overlap < 0.75:
        return None
    item = Object(shape, names[first], x, y, size)
    if not two_colours:
        return item
    best_share, best_guess = 0.0, None
    for (color, inner), pattern in product(permutations((first, second)), ("halves", "core")):
        guess = replace(item, color=names[color], inner=names[inner], pattern=pattern)
        expected = np.where(_inner_coverage(guess) > 0.5, inner, color)
        share = (expected == nearest)[solid].mean()
        if share > best_share:
            best_share, best_guess = share, guess
    return best_guess if best_share >= 0.8 else None


def read(image):
    """Read an image back into a scene: (scene, clear).

    `clear` is False where something is drawn that is no object of this world, or where the
    background is none of its three. Specks under 20 pixels are ignored.
    """
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32)
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
    return Scene(tuple(items), background), bool(clear)


class Layout(NamedTuple):
    """Where objects may stand together, and their smallest and largest size in pixels."""

    places: tuple[str, ...]
    sizes: tuple[int, int]


LAYOUTS = {
    "centre": Layout(("centre",), (30, 38)),
    "row": Layout(("left", "right"), (22, 25)),
    "column": Layout(("top", "bottom"), (22, 25)),
    "three": Layout(("top left", "top right", "bottom"), (19, 22)),
    "corners": Layout(("top left", "top right", "bottom left", "bottom right"), (19, 22)),
}
# The layout of so many equal objects.
COUNT_LAYOUTS = {1: "centre", 2: "row", 3: "three", 4: "corners"}


def place_of(item):
    """The name of the nearest place."""
    return min(PLACES, key=lambda p: (PLACES[p][0] - item.x) ** 2 + (PLACES[p][1] - item.y) ** 2)


def layout_of(scene):
    """The name of the layout that a scene's places and sizes belong to."""
    places = {place_of(item) for item in scene.objects}
    smallest = min(item.size for item in scene.objects)
    for name, layout in LAYOUTS.items():
        if places <= set(layout.places) and smallest >= layout.sizes[0]:
            return name
    return "corners"


def reading_order(scene):
    """A scene's objects by rows from the top, each row from the left."""
    return sorted(scene.objects, key=lambda item: ((item.y > 24) + (item.y > 40), item.x))


def roomy_places(scene):
    """The places, of any layout, at least 22 pixels from every object of a scene."""
    return [
        place
        for place, (x, y) in PLACES.items()
        if all((item.x - x) ** 2 + (item.y - y) ** 2 >= 22**2 for item in scene.objects)
    ]


def near(rng, place):
    """A random point (x, y) within 2 pixels of a named place, along each axis."""
    x, y = PLACES[place]
    return x + rng.randint(-2, 2), y + rng.randint(-2, 2)


def place_objects(rng, items, layout=None, places=None, background="white"):
    """A `Scene` of `items` (Pairs or Objects) near a layout's places, or near the given `places`.

    layout: a name of LAYOUTS, by default the one for so many objects.
    """
    layout_places, sizes = LAYOUTS[layout or COUNT_LAYOUTS[len(items)]]
    placed = []
    for item, place in zip(items, places or layout_places, strict=False):
        if isinstance(item, Pair):
            item = Object(item.shape, item.color)
        x, y = near(rng, place)
        placed.append(replace(item, x=x, y=y, size=rng.randint(*sizes)))
    return Scene(tuple(placed), background)


def random_pair(rng, taken=(), held_out=False):
    """A random Pair not in `taken`, from the held-out pairs or from the others."""
    while True:
        pair = Pair(rng.choice(list(COLORS)), rng.choice(SHAPES))
        if (pair in HELD_OUT) == held_out and pair not in taken:
            return pair


def two_coloured(rng, item):
    """The object with a random second colour, which is not held out for its shape either."""
    allowed = [c for c in COLORS if c != item.color and (c, item.shape) not in HELD_OUT]
    return replace(item, pattern=rng.choice(PATTERNS[1:]), inner=rng.choice(allowed))


def random_scene(rng, patterns=0.0, held_out=0.0, least=1):
    """Any scene: `least` to 4 objects in some places of one layout, on any background.

    A share `patterns` of the objects has two colours (large ones only), and about a share
    `held_out` is of a held-out pair. In a quarter of the scenes all objects are alike.
    """
    weights = (3, 3, 2, 2, 4)  # in the order of LAYOUTS
    has_room = [len(layout.places) >= least for layout in LAYOUTS.values()]
    weights = [weight * room for weight, room in zip(weights, has_room, strict=True)]
    layout = rng.choices(tuple(LAYOUTS), weights)[0]
    spots = LAYOUTS[layout].places
    places = sorted(rng.sample(spots, rng.randint(least, len(spots))), key=spots.index)
    alike = rng.random() < 0.25
    items = []

    for _ in places:
        pair = random_pair(rng, held_out=rng.random() < held_out)
        item = Object(pair.shape, pair.color)
        if layout in ("centre", "row", "column") and rng.random() < patterns:
            item = two_coloured(rng, item)
        items.append(items[0] if alike and items else item)
    background = rng.choices(tuple(BACKGROUNDS), (2, 1, 1))[0]
    return place_objects(rng, items, layout, places, background)


@dataclass(frozen=True)
class GoalObject:
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
        """Whether an `Object` has every property asked for."""
        if self.at and max(abs(item.x - self.at[0]), abs(item.y - self.at[1])) > 4:
            return False
        asked = (self.color, self.shape, self.pattern, self.inner, self.place)
        given = (item.color, item.shape, item.pattern, item.inner, place_of(item))
        return all(a is None or a == b for a, b in zip(asked, given, strict=True))


@dataclass(frozen=True)
class Goal:
    """What a prompt asks of an image: exactly these objects, and no others.

    `relation` ("left of", "right of", "above" or "below") holds between the first two objects.
    """

    objects: tuple[GoalObject, ...]
    relation: str | None = None
    background: str | None = None


def _wanted(item, exact):
    """The `GoalObject` of an object at its place; `exact` asks for its centre."""
    wanted = GoalObject(item.color, item.shape, item.pattern, item.inner)
    if exact:
        return replace(wanted, at=(item.x, item.y))
    return replace(wanted, place=place_of(item))


def goal_of(scene, exact=False):
    """The `Goal` of a scene's own objects, at their places; `exact` asks for their centres."""
    objects = tuple(_wanted(item, exact) for item in scene.objects)
    return Goal(objects, background=scene.background)


def _related(one, relation, other):
    """Whether `one` is clearly left of (right of, above, below) `other`."""
    right, down = other.x - one.x, other.y - one.y  # the way from `one` to `other`
    ahead = {"left of": right, "right of": -right, "above": down, "below": -down}[relation]
    aside = down if relation in ("left of", "right of") else right
    return ahead >= 8 and ahead > abs(aside)


def satisfies(scene, goal):
    """Whether a scene is what a `Goal` asks for, in some order of its objects."""
    if len(scene.objects) != len(goal.objects) or goal.background not in (None, scene.background):
        return False
    for order in permutations(scene.objects):
        fitting = all(wanted.fits(o) for wanted, o in zip(goal.objects, order, strict=True))
        if fitting and (goal.relation is None or _related(order[0], goal.relation, order[1])):
            return True
    return False


def score(image, goal):
    """Whether an image shows exactly what a `Goal` asks for: the benchmark's judge."""
    scene, clear = read(image)
    return clear and satisfies(scene, goal)


def edit_score(image, edit):
    """(changed, kept) of an image drawn for an "edit" `Task`, two booleans.

    changed: what was to be new is there, what was to go is gone. kept: all else is as it was, and
    nothing was added beside the change.
    """
    seen, clear = read(image)
    before, after = edit.sources[0], edit.target
    old, new = set(before.objects), set(after.objects)
    shown = {
        o for o in old | new if any(_wanted(o, exact=True).fits(item) for item in seen.objects)
    }
    near = [
        any(max(abs(item.x - o.x), abs(item.y - o.y)) <= 8 for o in old | new)
        for item in seen.objects
    ]

    changed = new - old <= shown and not (old - new) & shown
    kept = clear and old & new <= shown and all(near)
    right_background = seen.background == after.background
    if before.background != after.background:
        return changed and right_background, kept
    return changed, kept and right_background
