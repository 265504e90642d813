"""The words of the toy world, so that a user can be told which words the tiny model never saw.

python -m toy.vocabulary weights/tiny/mllm      writes vocabulary.txt into that MLLM's folder
"""

import re
import sys
from pathlib import Path

FILE = "vocabulary.txt"


def words_in(text):
    """The words and numbers of a text, in lower case: a set."""
    return set(re.findall(r"\w+", text.lower().replace("'s", "")))


def unknown_words(prompts, vocabulary):
    """The prompts' words that are not in a vocabulary file, sorted."""
    known = set(vocabulary.read_text(encoding="utf-8").split())
    return sorted(words_in(" ".join(prompts)) - known)


def world_words():
    """Every word of the texts and requests that the tiny model learned from, but for the system
    prompt and typing slips."""
    from toy.pretrain_mllm import SYSTEM_PROMPT, world_texts
    from toy.wordings import trained_words

    texts = (text for text in world_texts() if not text.startswith(SYSTEM_PROMPT))
    return set().union(words_in(trained_words()), *map(words_in, texts))


if __name__ == "__main__":
    (Path(sys.argv[1]) / FILE).write_text("\n".join(sorted(world_words())) + "\n")
