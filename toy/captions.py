"""Tasks from words alone: what a task is, and the makers of those without source images.

A maker takes a random generator and returns a `Task`; toy/tasks.py names them all.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from toy import scene as world
from toy import wordings
from toy import words as vocabulary
from toy.scene import Goal, GoalObject, Object, Pair, Scene, place_objects, random_pair, render
from toy.words import RELATIONS, SIDES, WHERE, counted, listed, on_a, one_of, plural, with_article


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
    hand: int | None = None  # a seed: the source images are painted by hand

    @property
    def images(self):
        """The source images, PIL."""
        if self.hand is not None:
            return [world.paint(scene, self.hand) for scene in self.sources]
        return [render(scene) for scene in self.sources]

    @property
    def target_image(self):
        """The target image, PIL."""
        return render(self.target)


def draw_as_it_is(prompt, target, sources=(), exact=False):
    """The task whose goal is the whole target; `exact` also asks for its objects' centres."""
    return Task(
        prompt, target, world.goal_of(target, exact), vocabulary.describe(target), tuple(sources)
    )


def wrapped(rng, words):
    return rng.choice(vocabulary.WRAPPERS).format(words)


def pair_name(pair, coloured=True):
    return f"{pair.color} {pair.shape}" if coloured else pair.shape


def draw_pairs(prompt, target, pairs, coloured=True, relation=None, background=None):
    """The task to show these pairs; not `coloured`: in any colour."""
    objects = [GoalObject(pair.color if coloured else None, pair.shape) for pair in pairs]
    goal = Goal(tuple(objects), relation, background)
    counts = Counter(pair_name(pair, coloured) for pair in pairs)
    names = [counted(number, name) for name, number in counts.items()]
    plain = f" {relation} ".join(names) if relation else listed(names)
    return Task(prompt, target, goal, plain + on_a(background))


def _different_pairs(rng, coloured):
    """Two pairs that differ in what is named: in the shape, or if coloured in either."""
    first = random_pair(rng)
    taken = [first] if coloured else [Pair(color, first.shape) for color in world.COLORS]
    return first, random_pair(rng, taken)


def _different_shapes(rng, number):
    """So many pairs, each of another shape."""
    pairs = []
    while len(pairs) < number:
        pair = random_pair(rng, taken=pairs)
        if pair.shape not in [other.shape for other in pairs]:
            pairs.append(pair)
    return pairs


def one_object(rng, coloured, held_out=False):
    """ "a photo of a star"; coloured: "a red star"; held out: a pair of HELD_OUT."""
    pair = random_pair(rng, held_out=held_out)
    name = pair_name(pair, coloured)
    target = place_objects(rng, [pair])
    words = with_article(name)
    if not words.startswith("an") and rng.random() < 0.2:
        words = rng.choice(("one ", "a single ")) + name
    return draw_pairs(wrapped(rng, words), target, [pair], coloured)


def counting(rng):
    """ "three stars" or "3 red stars"."""
    pair = random_pair(rng)
    number = rng.randint(2, 4)
    coloured = rng.random() < 0.5
    name = pair_name(pair, coloured)
    target = place_objects(rng, [pair] * number)
    in_words = counted(number, name)
    words = rng.choice((in_words, in_words, f"{number} {plural(name)}"))
    return draw_pairs(wrapped(rng, words), target, [pair] * number, coloured)


def two_objects(rng, coloured):
    """ "a star and a cross"; coloured: "a red star next to a blue cross"."""
    pairs = _different_pairs(rng, coloured)
    first, second = (with_article(pair_name(pair, coloured)) for pair in pairs)
    joint = rng.choice(("and", "and", "and", "with", "next to"))
    target = place_objects(rng, pairs)
    return draw_pairs(wrapped(rng, f"{first} {joint} {second}"), target, pairs, coloured)


def position(rng):
    """ "a star left of a cross" or "a blue cross with a red star to its left"."""
    coloured = rng.random() < 0.5
    pairs = _different_pairs(rng, coloured)
    first, second = (with_article(pair_name(pair, coloured)) for pair in pairs)
    relation = rng.choice(tuple(RELATIONS))
    one, other = (WHERE[place] for place in SIDES[relation])
    ways = [f"{first} {words} {second}" for words in RELATIONS[relation] * 2]
    ways += [f"{second} with {first} {vocabulary.ITS_SIDE[relation]}"]
    words = rng.choice([*ways, f"{first} {one} and {second} {other}"])
    target = place_objects(rng, pairs, places=SIDES[relation])
    return draw_pairs(wrapped(rng, words), target, pairs, coloured, relation)


def dense(rng, least=1):
    """ "on a grey background, a red star at the top and a blue cross on the left" (as DPG-Bench).

    Tells every colour, every place and the background. `least` is the fewest objects.
    """
    scene = world.random_scene(rng, patterns=0.3, least=least)
    words = vocabulary.describe(scene)
    if " on a " in words and rng.random() < 0.3:
        words, ground = words.rsplit(" on ", 1)
        words = f"on {ground}, {words}"
    elif scene.background == "white" and rng.random() < 0.2:
        words += " on a white background"
    return draw_as_it_is(wrapped(rng, words), scene)


def two_colours(rng):
    """ "a star with a red core", "a half red half blue star left of a half pink half red cross"."""
    pairs = [random_pair(rng) for _ in range(rng.choice((1, 1, 2)))]
    items = [world.two_coloured(rng, Object(pair.shape, pair.color)) for pair in pairs]
    layout = rng.choice(("row", "column")) if len(items) == 2 else "centre"
    scene = place_objects(rng, items, layout)
    return draw_as_it_is(wrapped(rng, vocabulary.describe(scene)), scene)


def _free_name(rng, pair, number, coloured):
    """ "a big red star", "a pair of stars": so many equal objects, as people name them."""
    name = pair_name(pair, coloured)
    if rng.random() < 0.15:
        name = f"{rng.choice(wordings.DESCRIBING)} {name}"
    if number == 1 and rng.random() < 0.75:
        return with_article(name)
    amount = rng.choice(wordings.AMOUNTS[number])
    return f"{amount} {name if number == 1 else plural(name)}".strip()


def _free_relation(rng, first, second):
    """Two names in a relation, as people put it: (words, relation)."""
    relation = rng.choice(tuple(RELATIONS))
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
    sorts = list(zip(_different_shapes(rng, len(numbers)), numbers, strict=True))

    names = [_free_name(rng, pair, number, coloured) for pair, number in sorts]
    phrase, relation = listed(names, rng.choice(wordings.JOINTS)), None
    if numbers == (1, 1) and rng.random() < 0.6:
        phrase, relation = _free_relation(rng, *names)
    if rng.random() < 0.08:
        only = rng.choice(wordings.ONLY)
        named = [pair.shape for pair, _ in sorts]
        other = rng.choice([shape for shape in world.SHAPES if shape not in named])
        phrase = only.format(phrase, other=plural(other))

    ground = rng.choice(("grey", "black")) if rng.random() < 0.2 else "white"
    if ground != "white":
        told = rng.choice((ground, "gray" if ground == "grey" else ground))
        phrase += rng.choice(wordings.GROUNDS).format(told)
    items = [pair for pair, number in sorts for _ in range(number)]
    placed = items if relation else rng.sample(items, len(items))
    if not unseen:  # in training, in the order of the words: it is learned sooner than any order
        placed = items
    target = place_objects(rng, placed, places=SIDES.get(relation), background=ground)
    prompt = wordings.ask(rng, phrase, unseen)
    made = draw_pairs(prompt, target, items, coloured, relation, ground)
    return replace(made, for_test=unseen)


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
        thing = rng.choice(vocabulary.things_with("color", color))
    form = rng.choice(vocabulary.things_with("shape", shape))
    number = 1

    if told == "color":
        words = one_of(rng, "{} the {} of {}|{} in the {} of {}|{} with the same {} as {}")
        words = words.format(with_article(shape), colour, thing)
    elif told == "shape":
        ways = "{a} object shaped like {}|something {c} in the shape of {}"
        ways += "|{a} thing with the shape of {}"
        words = one_of(rng, ways).format(form, c=color, a=with_article(color))
    elif told == "both":
        ways = "something shaped like {} in the {c} of {t}"
        ways += "|an object the {c} of {t} and the shape of {}"
        words = one_of(rng, ways).format(form, c=colour, t=thing)
    else:
        (owner, parts), number = rng.choice(tuple(vocabulary.FACTS["count"].items()))
        words = f"as many {color} {plural(shape)} as {owner} has {parts}"
    pairs = [Pair(color, shape)] * number
    target = place_objects(rng, pairs)
    return draw_pairs(wrapped(rng, words), target, pairs)


def _first_words(rng, words):
    """A prompt as it is first typed: mostly bare, at times as a request."""
    if rng.random() < 0.7:
        return wordings.written(rng, words)
    return wordings.ask(rng, words)


def lists(rng):
    """ "red star, blue circle", "a star and a square, both red", "a blue star and a red one"."""
    number = rng.choice((1, 2, 2, 2, 2, 2, 3))
    pairs = _different_shapes(rng, number)
    case = rng.choice(("bare", "bare", "bare", "article", "related", "one colour", "one shape"))
    color, shape = pairs[0]
    if case == "one colour":
        pairs = [Pair(color, pair.shape) for pair in pairs]
    elif case == "one shape":
        pairs = [Pair(other, shape) for other in rng.sample(list(world.COLORS), number)]
    if case.startswith("one") and (set(pairs) & world.HELD_OUT or number == 1):
        return lists(rng)
    names = [pair_name(pair) for pair in pairs]
    relation = None
    words = one_of(rng, ", |, | and | and | + | & |; |,| ").join(names)

    if case == "article":
        words = one_of(rng, ", |, |,|; |, and ").join(map(with_article, names))
    elif case == "related" and number == 2:
        relation = rng.choice(tuple(RELATIONS))
        words = f" {rng.choice(RELATIONS[relation])} ".join(names)
    elif case == "one colour":
        shapes = [pair.shape for pair in pairs]
        named = [with_article(name) for name in shapes]
        phrase = rng.choice((" and ".join(named), " and ".join(shapes), ", ".join(named)))
        ways = "{}, both {c}|{}, all {c}|{}, all in {c}|{c}: {}|{} in {c}|{c} {}"
        if number == 3:
            ways = "{}, all {c}|{}, all in {c}|{}, all three {c}|{c}: {}"
        words = one_of(rng, ways).format(phrase, c=color)
    elif case == "one shape":
        colors = [pair.color for pair in pairs]
        ones = f"{with_article(colors[0])} {shape}"
        ones += "".join(f" and {with_article(other)} one" for other in colors[1:])
        ways = (f"{counted(number, shape)}: {listed(colors)}", f"{listed(colors)} {plural(shape)}")
        ways += (ones, f"{counted(number, shape)}, one {' and one '.join(colors)}")
        words = rng.choice(ways)
    target = place_objects(rng, pairs, places=SIDES.get(relation))
    return draw_pairs(_first_words(rng, words), target, pairs, relation=relation)


def nearest(rng):
    """ "a turquoise star", "five circles", "a square that is not red": the nearest thing."""
    pair = random_pair(rng)
    color, shape = pair
    thing, form = rng.choice(tuple(vocabulary.NEAR_SHAPES.items()))
    tint, near_color = rng.choice(tuple(vocabulary.NEAR_COLORS.items()))
    known, known_color = rng.choice(tuple(vocabulary.LOOSE_FACTS.items()))
    made_up = wordings.made_up_word(rng)
    case = one_of(rng, "tint|thing|bare thing|many|not|no|made up|fact|size")
    pairs, coloured = [pair], True

    if case == "tint":
        pairs = [Pair(near_color, shape)]
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
        ways = "{} that is not {}|{}, but not {}|{} that isn't {}|{}, not {}"
        ways += "|{} which is not {}|{} in any colour but {}|non-{1} {0}"
        words = one_of(rng, ways).format(shape, color)
    elif case == "no":
        words = one_of(rng, "no {}|no {s}|nothing|an empty picture|without {s}")
        empty = Scene((), rng.choice(("white", "white", "black")))
        words = words.format(shape, s=plural(shape)) + on_a(empty.background)
        return draw_as_it_is(_first_words(rng, words), empty)
    elif case == "made up":
        pairs, coloured = [Pair(color, "circle")], rng.random() < 0.7
        words = made_up
        if coloured:
            words = rng.choice((f"{color} {made_up}", f"{color} {made_up}", color))
    elif case == "fact":
        pairs = [Pair(known_color, shape)]
        words = one_of(rng, "{} the colour of {}|{} the color of {}|{} as {c} as {}|{} like {}")
        words = words.format(shape, known, c=known_color)
    else:
        pairs = list(_different_pairs(rng, True))
        words = "a big {} and a small {}".format(*map(pair_name, pairs))
        if rng.random() < 0.7:
            joint = one_of(rng, "bigger than|smaller than|inside|behind|in front of|or")
            words = f" {joint} ".join(with_article(pair_name(pair)) for pair in pairs)
    if set(pairs) & world.HELD_OUT:
        return nearest(rng)
    if len(pairs) == 1 and rng.random() < 0.6:
        words = with_article(words)

    ground = rng.choice(("grey", "black")) if rng.random() < 0.1 else "white"
    target = place_objects(rng, pairs, background=ground)
    prompt = _first_words(rng, words + on_a(ground))
    return draw_pairs(prompt, target, pairs, coloured, background=ground)
