"""What must not change when code moves: samples, conversations, and the shipped weights' pictures.

`PYTHONPATH=. python tests/test_pinned.py` writes the pinned pictures again, for new weights.
"""

import hashlib
import random
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from extras.toy_parts.conversations import TALKS, talks
from metaquery import MetaQuery
from sample import grid
from toy.tasks import FIRST_EDITS, KINDS, TEXT_KINDS, task

PICTURES = Path(__file__).parent / "pinned.png"
TINY = Path(__file__).parent.parent / "weights" / "tiny"


def digest(values):
    """SHA-256 of the text of some values, the first 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(map(repr, values)).encode()).hexdigest()[:16]


def test_two_thousand_samples():
    """Every kind and split: prompt, target, goal, restatement and source scenes."""
    splits = ("train", "test", "talk")
    rows = [task(kind, i, i % 3, split) for kind in KINDS for split in splits for i in range(36)]
    rows = [astuple(row)[:-2] for row in rows]  # without for_test and hand
    assert len(rows) >= 2000
    free = ("two colours", "free wordings", "free edit", "very crowded edit", "free dense")
    first = ("lists", "nearest", *FIRST_EDITS, "painted")
    assert digest(row for row in rows if row[0] not in free + first) == "4df1b8b87dfd34d0"
    assert digest(row for row in rows if row[0] in free) == "c5b756d6396ce2ed"
    assert digest(row for row in rows if row[0] in first) == "0f1cb267fb9fa9c8"


def test_five_hundred_conversations():
    rng, sorts = random.Random("pinned"), list(TALKS)
    turns = [turn for i in range(500) for turn in talks(rng, sorts[i % len(sorts)])]
    assert digest(map(astuple, turns)) == "f55a42099ea361f3"


def drawn():
    """30 fixed prompts and 12 fixed edits, drawn by the shipped weights: a grid of 7 columns."""
    model = MetaQuery.from_pretrained(TINY).eval()
    made = [task(kind, i, split="test") for kind in TEXT_KINDS[:10] for i in range(3)]
    edits = [task("edit", i, split="test") for i in range(12)]
    pictures = []
    for rows in (made, edits):
        generator = torch.Generator().manual_seed(0)
        prompts, images = [row.prompt for row in rows], [row.images for row in rows]
        pictures += model.generate(prompts, images, num_inference_steps=10, generator=generator)
    return grid(pictures, 7)


def test_pictures_of_the_shipped_weights():
    off = np.asarray(drawn(), int) - np.asarray(Image.open(PICTURES), int)
    assert np.abs(off).max() <= 2


if __name__ == "__main__":
    drawn().save(PICTURES)
