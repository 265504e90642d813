"""Conversations and questions: true, and without a held-out pair."""

import random
from collections import Counter

from extras.toy_parts.conversations import TALKS, talks
from toy.scene import HELD_OUT, random_scene
from toy.talk import question, unseen_question
from toy.tasks import TEXT_KINDS, task
from toy.wordings import UNSEEN_WORDS, made_up_word, words_in


def test_held_out_pairs_are_in_no_training_text():
    """Neither a caption nor what the toy MLLM learns from names one; the held-out kind does."""
    names = [f"{color} {shape}" for color, shape in HELD_OUT]
    rng = random.Random(1)
    texts = [task(kind, i).prompt for kind in TEXT_KINDS if kind != "held-out" for i in range(300)]
    turns = [turn for sort in TALKS for _ in range(150) for turn in talks(rng, sort)]
    texts += [words for turn in turns for words in (turn.user, turn.assistant)]
    assert not [text for text in texts for name in names if name in text]
    for i in range(40):
        made = task("held-out", i, split="test")
        assert (made.target.objects[0].color, made.target.objects[0].shape) in HELD_OUT


def test_ways_to_ask_that_are_unseen_are_in_no_training_text():
    rng = random.Random(1)
    asked = [words_in(task("free wordings", i).prompt) for i in range(3000)]
    assert not {"sketch", "illustrate", "wallpaper", "visualize"} & set().union(*asked)
    counts = Counter(word for words in asked for word in words)
    strange = [words for words in asked if sum(counts[word] < 3 for word in words) >= 2]
    assert 0.1 < len(strange) / len(asked) < 0.4  # made-up words around what is asked for
    assert UNSEEN_WORDS.isdisjoint(made_up_word(rng) for _ in range(20_000))


def test_answers_are_true():
    rng = random.Random(3)
    for _ in range(200):
        scene = random_scene(rng)
        asked, answer = question(rng, scene)
        if asked.startswith("how many objects"):
            assert answer == ("zero", "one", "two", "three", "four")[len(scene.objects)]
        if "background" in asked:
            assert answer == scene.background
        if asked.startswith("is there"):
            named = any(f"{o.color} {o.shape}" in asked for o in scene.objects)
            assert answer == ("yes" if named else "no")


def test_questions_have_answers():
    asked = [unseen_question(i) for i in range(300)]
    assert all(t.user and t.assistant and len(t.images) == 1 for t in asked)
    assert {"how", "what", "where", "is"} <= {t.user.split()[0] for t in asked}
    assert asked[7] == unseen_question(7)
