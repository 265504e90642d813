"""Tasks from words alone: what a task is, and the makers of those without source pictures.

A maker takes a random generator and returns a `Task`; toy/tasks.py names them all.
"""

from dataclasses import dataclass, field, replace

from toy import scene as world
from toy import wordings
from toy import words as vocabulary
from toy.scene import Goal, GoalObject, Object, Pair, Scene, place_objects, random_pair, render
from toy.words import RELATIONS, SIDES, WHERE, counted, describe, plural, with_article

# The layout that has a place at this side.
LINES = {"left": "row", "right": "row", "top": "column", "bottom": "column"}


@dataclass(frozen=True)
class Task:
    """One thing to draw: `prompt` and source scenes in; a right `target` scene, and what is asked.

    `plain` says in plain words what is to be drawn: the MLLM's own restatement of the prompt.
    """

    kind: str = field(default="", kw_only=True)  # set by `task`, not by the makers
    prompt: str
    target: Scene
    goal: Goal
    plain: str
    sources: tuple[Scene, ...] = ()
    for_test: bool | None = None  # None: by the prompt; see `task`
    hand: int | None = None  # a seed: the source pictures are painted by hand

    @property
    def images(self):
        """The source pictures, PIL."""
        if self.hand is not None:
            return [world.paint(scene, self.hand) for scene in self.sources]
        return [render(scene) for scene in self.sources]

    @property
    def picture(self):
        """The target picture, PIL."""
        return render(self.target)


def draw_as_it_is(prompt, target, sources=(), exact=False):
    """The task whose goal is the whole target; `exact` also asks for its objects' centres."""
    return Task(prompt, target, world.goal_of(target, exact), describe(target), tuple(sources))


def wrapped(rng, words):
    return rng.choice(vocabulary.WRAPPERS).format(words)


def pair_name(pair, coloured=True):
    return f"{pair.color} {pair.shape}" if coloured else pair.shape


def _goal(pairs, coloured=True, relation=None):
    """The goal to show these pairs; not `coloured`: in any colour."""
    objects = [GoalObject(pair.color if coloured else None, pair.shape) for pair in pairs]
    return Goal(tuple(objects), relation)


def one_object(rng, coloured, held_out=False):
    """ "a photo of a star"; coloured: "a red star"; held out: a pair of HELD_OUT."""
    pair = random_pair(rng, held_out=held_out)
    name = pair_name(pair, coloured)
    target = place_objects(rng, [pair])
    plain = words = with_article(name)
    if not plain.startswith("an") and rng.random() < 0.2:
        words = rng.choice(("one ", "a single ")) + name
    return Task(wrapped(rng, words), target, _goal([pair], coloured), plain)


def counting(rng):
    """ "three stars" or "3 red stars"."""
    pair = random_pair(rng)
    number = rng.randint(2, 4)
    coloured = rng.random() < 0.5
    name = pair_name(pair, coloured)
    target = place_objects(rng, [pair] * number)
    plain = counted(number, name)
    words = rng.choice((plain, plain, f"{number} {plural(name)}"))
    return Task(wrapped(rng, words), target, _goal([pair] * number, coloured), plain)


def _different_pairs(rng, coloured):
    """Two pairs that differ in what is named: in the shape, or if coloured in either."""
    first = random_pair(rng)
    taken = [first] if coloured else [Pair(color, first.shape) for color in world.COLORS]
    return first, random_pair(rng, taken)


def two_objects(rng, coloured):
    """ "a star and a cross"; coloured: "a red star next to a blue cross"."""
    pairs = _different_pairs(rng, coloured)
    first, second = (with_article(pair_name(pair, coloured)) for pair in pairs)
    joint = rng.choice(("and", "and", "and", "with", "next to"))
    target = place_objects(rng, pairs)
    words = wrapped(rng, f"{first} {joint} {second}")
    return Task(words, target, _goal(pairs, coloured), f"{first} and {second}")


def position(rng):
    """ "a star left of a cross" or "a blue cross with a red star to its left"."""
    coloured = rng.random() < 0.5
    pairs = _different_pairs(rng, coloured)
    first, second = (with_article(pair_name(pair, coloured)) for pair in pairs)
    relation = rng.choice(tuple(RELATIONS))
    places = SIDES[relation]
    ways = [f"{first} {words} {second}" for words in RELATIONS[relation] * 2]
    ways.append(f"{second} with {first} {vocabulary.ITS_SIDE[relation]}")
    ways.append(f"{first} {WHERE[places[0]]} and {second} {WHERE[places[1]]}")
    words = rng.choice(ways)
    target = place_objects(rng, pairs, LINES[places[0]], places)
    plain = f"{first} {relation} {second}"
    return Task(wrapped(rng, words), target, _goal(pairs, coloured, relation), plain)


def dense(rng, least=1):
    """ "on a grey background, a red star at the top and a blue cross on the left" (as DPG-Bench).

    Tells every colour, every place and the background. `least` is the fewest objects.
    """
    scene = world.random_scene(rng, patterns=0.3, least=least)
    words = describe(scene)
    if " on a " in words and rng.random() < 0.3:
        words, ground = words.rsplit(" on ", 1)
        words = f"on {ground}, {words}"
    elif scene.background == "white" and rng.random() < 0.2:
        words += " on a white background"
    return draw_as_it_is(wrapped(rng, words), scene)


def two_colours(rng):
    """ "a star with a red core", "a half red half blue star left of a half pink half red cross"."""
    number = rng.choice((1, 1, 2))
    items = [Object(pair.shape, pair.color) for pair in (random_pair(rng) for _ in range(number))]
    items = [world.two_coloured(rng, item) for item in items]
    layout = rng.choice(("row", "column")) if number == 2 else "centre"
    scene = place_objects(rng, items, layout)
    return draw_as_it_is(wrapped(rng, describe(scene)), scene)


def _free_name(rng, pair, number, coloured):
    """ "a big red star", "a pair of stars": so many equal objects, as people name them."""
    name = pair_name(pair, coloured)
    if rng.random() < 0.15:
        name = f"{rng.choice(wordings.DESCRIBING)} {name}"
    if number == 1 and rng.random() < 0.75:
        return with_article(name)
    amount = rng.choice(wordings.AMOUNTS[number])
    return f"{amount} {name if number == 1 else plural(name)}".strip()


def _free_relation(rng, names):
    """Two names in a relation, as people put it: (words, relation)."""
    relation = rng.choice(tuple(RELATIONS))
    first, second = names
    one, other = (WHERE[place] for place in SIDES[relation])
    ways = [f"{first} {words} {second}" for words in RELATIONS[relation]]
    ways += [f"{first} that is {rng.choice(RELATIONS[relation])} {second}"]
    ways += [f"{first} {one} and {second} {other}", f"{one} {first} and {other} {second}"]
    ways += [f"{first} {one}, {second} {other}", f"{second} {other} and {first} {one}"]
    ways += [f"{second} and {vocabulary.ITS_SIDE[relation]} {first}"]
    return rng.choice(ways), relation


def free_wording(rng):
    """ "could you paint two blue stars and a red square on gray for me?": what people may say.

    One to four objects of one to three sorts, at times in a relation, on any background. Ways to
    ask of `wordings.UNSEEN_WAYS` are for tests alone.
    """
    unseen = rng.random() < 0.5
    # How many objects of each sort, the first-named sort first.
    one_sort = [(1,), (1,), (1,), (2,), (3,), (4,)]
    two_sorts = [(1, 1), (1, 1), (2, 1), (1, 2), (2, 2), (3, 1)]
    numbers = rng.choice(one_sort + two_sorts + [(1, 1, 1)])
    coloured = sum(numbers) > 2 and len(numbers) > 1 or rng.random() < 0.7
    pairs = []
    while len(pairs) < len(numbers):
        pair = random_pair(rng, taken=pairs)
        if pair.shape not in [other.shape for other in pairs]:
            pairs.append(pair)
    names = [_free_name(rng, *each, coloured) for each in zip(pairs, numbers, strict=True)]
    joint = rng.choice(wordings.JOINTS)
    relation, layout, places = None, None, None
    phrase = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joint} {names[-1]}"
    plain_names = [counted(n, pair_name(p, coloured)) for p, n in zip(pairs, numbers, strict=True)]
    plain = " and ".join(filter(None, (", ".join(plain_names[:-1]), plain_names[-1])))

    if numbers == (1, 1) and rng.random() < 0.6:
        phrase, relation = _free_relation(rng, names)
        plain = f"{plain_names[0]} {relation} {plain_names[1]}"
        places = SIDES[relation]
        layout = LINES[places[0]]
    others = [shape for shape in world.SHAPES if shape not in {pair.shape for pair in pairs}]
    if rng.random() < 0.08:
        only = rng.choice(wordings.ONLY)
        phrase = only.format(phrase, other=plural(rng.choice(others)))
    ground = rng.choice(("grey", "black")) if rng.random() < 0.2 else "white"
    if ground != "white":
        told = rng.choice((ground, "gray" if ground == "grey" else ground))
        phrase += rng.choice(wordings.GROUNDS).format(told)
        plain += f" on a {ground} background"
    items = [pair for pair, n in zip(pairs, numbers, strict=True) for _ in range(n)]
    placed = items if relation else rng.sample(items, len(items))
    if not unseen:  # in training, in the order of the words: it is learned sooner than any order
        placed = items
    target = place_objects(rng, placed, layout, places, ground)
    goal = replace(_goal(items, coloured, relation), background=ground)
    return Task(wordings.ask(rng, phrase, unseen), target, goal, plain, for_test=unseen)


def knowledge(rng, commonsense=False):
    """ "something red in the shape of a wheel", "as many red stars as a dog has legs" (as WISE).

    A fact tells the colour, the shape, both or the number. `commonsense`: the colour, from a pair
    of things that are easily confused: "a star the colour of an unripe banana".
    """
    thing = rng.choice(rng.choice(vocabulary.COMMONSENSE)) if commonsense else None
    color, shape = random_pair(rng)
    colour = rng.choice(("colour", "color"))
    told = "color" if commonsense else rng.choice(("color", "shape", "both", "count"))
    if commonsense:
        color = vocabulary.FACTS["color"][thing]
        while (color, shape) in world.HELD_OUT:
            shape = rng.choice(world.SHAPES)
    elif told in ("color", "both"):
        thing = rng.choice(vocabulary.COLOR_FACTS[color])
    form = rng.choice(vocabulary.SHAPE_FACTS[shape])
    number = 1

    if told == "color":
        way = rng.choice(("{} the {} of {}", "{} in the {} of {}", "{} with the same {} as {}"))
        words = way.format(with_article(shape), colour, thing)
    elif told == "shape":
        ways = [f"{with_article(color)} object shaped like {form}"]
        ways += [f"something {color} in the shape of {form}"]
        ways += [f"{with_article(color)} thing with the shape of {form}"]
        words = rng.choice(ways)
    elif told == "both":
        ways = [f"something shaped like {form} in the {colour} of {thing}"]
        ways += [f"an object the {colour} of {thing} and the shape of {form}"]
        words = rng.choice(ways)
    else:
        (owner, parts), number = rng.choice(tuple(vocabulary.FACTS["count"].items()))
        words = f"as many {color} {plural(shape)} as {owner} has {parts}"
    pairs = [Pair(color, shape)] * number
    target = place_objects(rng, pairs)
    return Task(wrapped(rng, words), target, _goal(pairs), counted(number, pair_name(pairs[0])))


def lists(rng):
    """ "red star, blue circle", "a star and a square, both red", "a blue star and a red one"."""
    number = rng.choice((1, 2, 2, 2, 2, 2, 3))
    pairs = []
    while len(pairs) < number:
        pair = random_pair(rng, taken=pairs)
        if pair.shape not in [other.shape for other in pairs]:
            pairs.append(pair)
    case = rng.choice(("bare", "bare", "bare", "article", "related", "one colour", "one shape"))
    if case in ("one colour", "one shape"):
        color, shape = pairs[0]
        same = [Pair(color, pair.shape) for pair in pairs]
        if case == "one shape":
            others = rng.sample(list(world.COLORS), number)
            same = [Pair(color, shape) for color in others]
        if set(same) & world.HELD_OUT or number == 1:
            return lists(rng)
        pairs = same
    names = [pair_name(pair) for pair in pairs]
    articles = [with_article(name) for name in names]
    relation, layout, places = None, None, None
    joint = rng.choice((", ", ", ", " and ", " and ", " + ", " & ", "; ", ",", " "))

    words = joint.join(names)
    if case == "article":
        words = rng.choice((", ", ", ", ",", "; ", ", and ")).join(articles)
    elif case == "related" and number == 2:
        relation = rng.choice(tuple(RELATIONS))
        places = SIDES[relation]
        layout = LINES[places[0]]
        words = f" {rng.choice(RELATIONS[relation])} ".join(names)
    elif case == "one colour":
        shapes = [pair.shape for pair in pairs]
        phrase = " and ".join(map(with_article, shapes))
        phrase = rng.choice((phrase, " and ".join(shapes), ", ".join(map(with_article, shapes))))
        ways = ("{}, both {c}", "{}, all {c}", "{}, all in {c}", "{c}: {}", "{} in {c}", "{c} {}")
        if number == 3:
            ways = ("{}, all {c}", "{}, all in {c}", "{}, all three {c}", "{c}: {}")
        words = rng.choice(ways).format(phrase, c=pairs[0].color)
    elif case == "one shape":
        colors = [pair.color for pair in pairs]
        *first, last = colors
        told = f"{', '.join(first)} and {last}"
        ones = f"{with_article(colors[0])} {shape}"
        ones += "".join(f" and {with_article(color)} one" for color in colors[1:])
        ways = (f"{counted(number, shape)}: {told}", f"{told} {plural(shape)}", ones)
        ways += (f"{counted(number, shape)}, one {' and one '.join(colors)}",)
        words = rng.choice(ways)
    plain = f" {relation} ".join(articles)
    if relation is None:
        plain = " and ".join(filter(None, (", ".join(articles[:-1]), articles[-1])))
    target = place_objects(rng, pairs, layout, places)
    return Task(_first_words(rng, words), target, _goal(pairs, relation=relation), plain)


def _first_words(rng, words):
    """A prompt as it is first typed: mostly bare, at times as a request."""
    if rng.random() < 0.7:
        return wordings.written(rng, words)
    return wordings.ask(rng, words)


def nearest(rng):
    """ "a turquoise star", "five circles", "a square that is not red": the nearest thing."""
    pair = random_pair(rng)
    color, shape = pair
    thing, form = rng.choice(tuple(vocabulary.NEAR_SHAPES.items()))
    tint, near_color = rng.choice(tuple(vocabulary.NEAR_COLORS.items()))
    known, known_color = rng.choice(tuple(vocabulary.LOOSE_FACTS.items()))
    made_up = wordings.made_up_word(rng)
    cases = ("tint", "thing", "bare thing", "many", "not", "no", "made up", "fact", "size")
    case = rng.choice(cases)
    color_case = {"tint": near_color, "fact": known_color}.get(case, color)
    pairs, coloured = [Pair(color_case, shape)], True

    if case == "tint":
        words = f"{tint} {shape}"
    elif case == "thing":
        pairs = [Pair(color, form)] * rng.choice((1, 1, 1, 2, 3))
        words = f"{color} {thing}"
        if len(pairs) > 1:
            words = counted(len(pairs), words)
    elif case == "bare thing":
        pairs, coloured = [Pair(color, form)], False
        words = thing
    elif case == "many":
        pairs, coloured = [pair] * 4, rng.random() < 0.7
        words = f"{rng.choice(vocabulary.MANY)} {plural(pair_name(pair, coloured))}"
    elif case == "not":
        allowed = [c for c in world.COLORS if c != color and (c, shape) not in world.HELD_OUT]
        pairs = [Pair(allowed[0], shape)]
        ways = ("{} that is not {}", "{}, but not {}", "{} that isn't {}", "{}, not {}")
        ways += ("{} which is not {}", "{} in any colour but {}", "non-{1} {0}")
        words = rng.choice(ways).format(shape, color)
    elif case == "no":
        words = rng.choice(("no {}", "no {s}", "nothing", "an empty picture", "without {s}"))
        empty = Scene((), rng.choice(("white", "white", "black")))
        words = words.format(shape, s=plural(shape))
        if empty.background != "white":
            words += f" on a {empty.background} background"
        return draw_as_it_is(_first_words(rng, words), empty)
    elif case == "made up":
        pairs, coloured = [Pair(color, "circle")], rng.random() < 0.7
        words = made_up
        if coloured:
            words = rng.choice((f"{color} {made_up}", f"{color} {made_up}", color))
    elif case == "fact":
        ways = ("{} the colour of {}", "{} the color of {}", "{} as {color} as {}", "{} like {}")
        words = rng.choice(ways).format(shape, known, color=known_color)
    else:
        pairs = list(_different_pairs(rng, True))
        first, second = map(pair_name, pairs)
        words = f"a big {first} and a small {second}"
        if rng.random() < 0.7:
            joints = ("bigger than", "smaller than", "inside", "behind", "in front of", "or")
            words = f" {rng.choice(joints)} ".join(map(with_article, (first, second)))
    if set(pairs) & world.HELD_OUT:
        return nearest(rng)
    if len(pairs) == 1 and rng.random() < 0.6:
        words = with_article(words)

    ground = "white"
    if rng.random() < 0.1:
        ground = rng.choice(("grey", "black"))
        words += f" on a {ground} background"
    plain = counted(len(pairs), pair_name(pairs[0], coloured))
    if case == "size":
        plain = f"{with_article(first)} and {with_article(second)}"
    if ground != "white":
        plain += f" on a {ground} background"
    target = place_objects(rng, pairs, background=ground)
    goal = replace(_goal(pairs, coloured), background=ground)
    return Task(_first_words(rng, words), target, goal, plain)
