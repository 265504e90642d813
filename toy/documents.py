"""Web documents of the toy world, whose right groups are known, and a writer of instructions.

A document shows one to three subjects, each in two to four pictures (now and then in seven), and
strays: pictures of something else. Some of its pictures are broken, too small, or shown twice.
`write_documents` writes them as an mmc4 shard with its pictures, 64 pixels a side, on disk.
"""

import io
import json
import random
import re
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from toy.scene import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZE,
    Goal,
    GoalObject,
    Object,
    place_objects,
    place_of,
    random_pair,
    read,
    render,
    two_coloured,
)
from toy.words import RELATIONS, SIDES, WHERE, describe, name_of, with_article

LINES = {"left": "row", "right": "row", "top": "column", "bottom": "column"}


class Shown(NamedTuple):
    """One picture of a document."""

    scene: object
    subject: int | None  # which group it belongs to; None: a stray
    fate: str  # "kept", or why curation must drop it: "broken", "small", "twice"


def identity(item):
    """What makes two objects the same subject, wherever they are."""
    return item.shape, item.color, item.pattern, item.inner


def random_subject(rng, taken):
    """An object whose colour and shape are not those of one of `taken`, (color, shape) pairs."""
    color, shape = random_pair(rng, taken=taken)
    item = Object(shape, color)
    return two_coloured(rng, item) if rng.random() < 0.6 else item


def subject_scenes(rng, item, number, taken):
    """Different scenes of one subject; the last may show it beside another object.

    Alone on a background, at a side, or twice; the other object is none of `taken`.
    """
    scenes, seen = [], set()
    beside = rng.random() < 0.6
    while len(scenes) < number:
        ground = rng.choice(("white", "white", *BACKGROUNDS))
        case = rng.choice(("alone", "alone", "twice", "side", "side"))
        if beside and len(scenes) == number - 1:
            relation = rng.choice(tuple(SIDES))
            places = SIDES[relation]
            other = random_pair(rng, taken=taken)
            scene = place_objects(rng, [item, other], LINES[places[0]], places, ground)
        elif case == "side":
            place = rng.choice(tuple(LINES))
            scene = place_objects(rng, [item], LINES[place], [place], ground)
        else:
            scene = place_objects(rng, [item] * (2 if case == "twice" else 1), background=ground)
        if describe(scene) not in seen:
            seen.add(describe(scene))
            scenes.append(scene)
    return scenes


def document(rng):
    """The pictures of one document, a list of `Shown`, in the order of its text."""
    subjects, taken = [], []
    for _ in range(rng.choice((1, 2, 2, 3)) + rng.choice((0, 1, 1, 2))):
        subjects.append(random_subject(rng, taken))
        taken.append((subjects[-1].color, subjects[-1].shape))
    strays = min(len(subjects) - 1, rng.choice((0, 1, 2)))
    shown = []
    for i, item in enumerate(subjects):
        is_stray = i < strays
        number = 1 if is_stray else rng.choices((2, 3, 4, 7), (10, 5, 3, 1))[0]
        for scene in subject_scenes(rng, item, number, taken):
            shown.append(Shown(scene, None if is_stray else i, "kept"))
        if rng.random() < 0.15:
            fate = rng.choice(("broken", "small", "twice"))
            scene = scene if fate == "twice" else place_objects(rng, [item])
            shown.append(Shown(scene, None, fate))
    return shown


def true_groups(shown, most=6):
    """The groups that curation should find: sets of indices of `shown`.

    Subjects shown more than `most` times are split evenly, in the order of the document.
    """
    groups = []
    for subject in sorted({s.subject for s in shown if s.subject is not None}):
        own = [i for i, s in enumerate(shown) if s.subject == subject]
        parts = -(-len(own) // most)
        for part in range(parts):  # the first parts have one more, if they are uneven
            sizes = [len(own) // parts + (p < len(own) % parts) for p in range(part + 1)]
            groups.append(frozenset(own[sum(sizes[:-1]) : sum(sizes)]))
    return groups


def picture_file(shown):
    """The bytes of a picture's PNG file, or what stands in its place."""
    picture = render(shown.scene)
    if shown.fate == "small":
        picture = picture.resize((SIZE // 2, SIZE // 2), Image.Resampling.BOX)
    if shown.fate == "twice":  # as another site shows it
        picture = picture.resize((SIZE + 16, SIZE + 16), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()[:100] if shown.fate == "broken" else file.getvalue()


def write_documents(folder, number, seed=0):
    """Write documents as an mmc4 shard, folder/documents.jsonl, with pictures on disk.

    Returns what they show, a list of lists of `Shown`. Their text has a sentence between any two
    captions, and every caption has line breaks in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents, lines = [], []
    for i in range(number):
        shown = document(random.Random(f"document {seed} {i}"))
        texts, entries = [], []
        for j, picture in enumerate(shown):
            name = f"{i:05d}-{j:02d}.png"
            (folder / name).write_bytes(picture_file(picture))
            texts += [f"Here is picture {j}.", describe(picture.scene).replace(" ", " \n ", 1)]
            entry = {"image_name": name, "raw_url": f"http://toy.invalid/{name}"}
            entries.append(entry | {"matched_text_index": len(texts) - 1})
        documents.append(shown)
        lines.append(json.dumps({"text_list": texts, "image_info": entries}))
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return documents


# ---- Instructions --------------------------------------------------------------------------------


def common_subject(scenes):
    """The one object that each of the scenes shows alone, once or several times; None if none."""
    kinds = {identity(item) for scene in scenes for item in scene.objects}
    return scenes[0].objects[0] if len(kinds) == 1 else None


class ToyWriter:
    """Writes instructions for pictures of the toy world, from what it reads in the pixels.

    It stands in for an MLLM: the shipped one was never taught to compare pictures.
    """

    def write(self, pairs):
        """An answer "Think: ...\\nPrompt: ..." for each pair of source pictures and a target."""
        answers = []
        for pair in pairs:
            sources = [read(picture)[0] for picture in pair.source_images]
            answers.append(instruct(sources, read(pair.target_image)[0]))
        return answers


def instruct(sources, target):
    """The answer for source scenes and a target scene; without a prompt if none is possible."""
    subject = common_subject(sources)
    if subject is None or not target.objects:
        return "Think: the sources show different objects."
    own = [item for item in target.objects if identity(item) == identity(subject)]
    others = [item for item in target.objects if identity(item) != identity(subject)]
    ground = f" on a {target.background} background" if target.background != "white" else ""
    if len(own) == 2 and not others:
        words = "two of this object"
    elif len(own) == 1 and len(others) == 1:
        right, down = others[0].x - own[0].x, others[0].y - own[0].y
        if abs(right) > abs(down):
            relation = "left of" if right > 0 else "right of"
        else:
            relation = "above" if down > 0 else "below"
        words = f"this object {relation} {with_article(name_of(others[0]))}"
    elif len(own) == 1 and not others:
        place = place_of(own[0])
        words = "this object" if place == "centre" else f"this object {WHERE[place]}"
    else:
        return "Think: the target does not show what the sources share."
    return f"Think: all pictures show {with_article(name_of(subject))}.\nPrompt: {words}{ground}"


def goal_of_instruction(prompt, sources):
    """The `Goal` that a prompt of `ToyWriter` sets for source scenes, read from its words alone."""
    subject = common_subject(sources)
    if subject is None:
        return None
    own = GoalObject(subject.color, subject.shape, subject.pattern, subject.inner)
    ground = re.search(r"on an? (\w+) background", prompt)
    ground = ground[1] if ground else "white"
    words = re.sub(r" on an? \w+ background", "", prompt)
    if words == "two of this object":
        return Goal((own, own), background=ground)
    sides = {f"this object {where}": place for place, where in WHERE.items()}
    if words in sides or words == "this object":
        return Goal((replace(own, place=sides.get(words, "centre")),), background=ground)
    colors, shapes, relations = "|".join(COLORS), "|".join(SHAPES), "|".join(RELATIONS)
    found = re.fullmatch(rf"this object ({relations}) an? ({colors}) ({shapes})", words)
    if not found:
        return None
    return Goal((own, GoalObject(found[2], found[3])), found[1], ground)
