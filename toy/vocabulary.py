"""The words that a toy MLLM learned from, so that a user can be told which ones it never saw."""

import re

FILE = "vocabulary.txt"  # in the MLLM's folder, written by toy.pretrain


def words_in(text):
    """The words and numbers of a text, in lower case: a set."""
    return set(re.findall(r"\w+", text.lower().replace("'s", "")))


def unknown_words(prompts, vocabulary):
    """The prompts' words that are not in a vocabulary file, sorted."""
    known = set(vocabulary.read_text(encoding="utf-8").split())
    return sorted(words_in(" ".join(prompts)) - known)
