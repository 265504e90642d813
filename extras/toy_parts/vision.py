"""The eye of the toy MLLM: what each patch of an image shows, and a SigLIP tower taught it."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from extras.toy_parts.fit import fit
from metaquery import to_pixels
from toy.scene import (
    BACKGROUNDS,
    COLORS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIZE,
    coverage,
    place_of,
    random_scene,
    render,
)

VISION_SIZE, VISION_PATCH = 60, 12
SIDE = VISION_SIZE // VISION_PATCH


def centre_patches(scene):
    """The index of the 5x5 patches that holds each object's centre."""
    return [int(o.y * SIDE // 64) * SIDE + int(o.x * SIDE // 64) for o in scene.objects]


def patch_labels(scene):
    """What each patch shows: (25, 8) float: shape, color, inner, pattern, dx, dy, size, centre.

    0 stands for nothing in the first three; dx, dy and size, in units of 32 px, locate the object;
    the last is 1 at the one patch that holds an object's centre.
    """
    shares = [np.full(SIDE * SIDE, 0.06)]
    for item in scene.objects:
        alpha = torch.from_numpy(coverage(item.shape, item.x, item.y, item.size).copy())
        shares.append(F.adaptive_avg_pool2d(alpha[None, None], SIDE).flatten().numpy())
    owners = np.argmax(shares, 0) - 1  # the object that each patch shows, or -1

    labels = np.zeros((SIDE * SIDE, 8), np.float32)
    centres = (np.arange(SIDE) + 0.5) * 64 / SIDE
    points = np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)
    for number, item in enumerate(scene.objects):
        here = owners == number
        labels[here, 0] = 1 + SHAPES.index(item.shape)
        labels[here, 1] = 1 + list(COLORS).index(item.color)
        if item.inner is not None:
            labels[here, 2] = 1 + list(COLORS).index(item.inner)
        labels[here, 3] = PATTERNS.index(item.pattern)
        labels[here, 4:6] = ((item.x, item.y) - points[here]) / 32
        labels[here, 6] = item.size / 32
    labels[centre_patches(scene), 7] = 1
    return labels


PLACE_WORDS = ("top", "bottom", "left", "right", "centre")
INNER = tuple(f"{color}'" for color in COLORS)  # an object's second colour
EYE_WORDS = (*SHAPES, *COLORS, *INNER, *BACKGROUNDS, *PLACE_WORDS, "half", "core", "background")


def patch_words(scene):
    """The words for what each patch shows: (25, words + 3) float32, each row's words of norm 1.

    The patch at an object's centre names the object and its place, all others the background.
    The last three say how far (x, y) is from that place and the size from 28, in pixels / 8.
    """
    rows = np.zeros((SIDE * SIDE, len(EYE_WORDS) + 3), np.float32)
    groups = [("background", scene.background)] * SIDE * SIDE
    for patch, item in zip(centre_patches(scene), scene.objects, strict=True):
        place = place_of(item)
        kind = {"plain": (), "halves": ("half",), "core": ("core",)}[item.pattern]
        second = (f"{item.inner}'",) * (item.inner is not None)
        groups[patch] = (item.color, item.shape, *kind, *second, *place.split())
        x, y = PLACES[place]
        rows[patch, -3:] = (item.x - x) / 8, (item.y - y) / 8, (item.size - 28) / 8

    for row, group in zip(rows, groups, strict=True):
        for word in group:
            row[EYE_WORDS.index(word)] += len(group) ** -0.5
    return rows


def scenes_to_tower(scenes):
    """Scenes as the tower's pixels (B, 3, 60, 60) in [-1, 1]."""
    pixels = to_pixels([render(scene) for scene in scenes], SIZE)
    return F.interpolate(pixels, VISION_SIZE, mode="bicubic", antialias=True)


def train_vision(run):
    """A SigLIP vision transformer, taught shape, colours, pattern and place patch by patch."""
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            image_size=VISION_SIZE,
            patch_size=VISION_PATCH,
            vision_use_head=False,
        )  # fmt: skip
    )
    head = torch.nn.Linear(192, 7 + 9 + 9 + 3 + 3 + 1)
    accuracy = [0.0]  # a running mean

    def make(rng):
        scenes = [random_scene(rng, patterns=0.25) for _ in range(run.batch_size)]
        labels = np.stack([patch_labels(scene) for scene in scenes])
        return {"pixels": scenes_to_tower(scenes), "labels": torch.from_numpy(labels).flatten(0, 1)}

    def loss_of(batch):
        labels = batch["labels"]
        states = tower(batch["pixels"], output_hidden_states=True).hidden_states[-1]
        shape, color, inner, pattern, where, centre = (
            head(states).flatten(0, 1).float().split([7, 9, 9, 3, 3, 1], 1)
        )
        kinds = labels[:, :4].long().unbind(1)
        guesses = (shape, color, inner, pattern)
        loss = sum(F.cross_entropy(g, k) for g, k in zip(guesses, kinds, strict=True))
        something = labels[:, :1] > 0
        loss = loss + 10 * ((where - labels[:, 4:7]) ** 2 * something).mean()
        loss = loss + F.binary_cross_entropy_with_logits(centre, labels[:, 7:])

        right = (shape.argmax(1) == kinds[0])[something[:, 0]].float().mean()
        accuracy[0] = 0.95 * accuracy[0] + 0.05 * right.detach()
        return loss

    def evaluate():
        return {"patch shapes": round(accuracy[0].item(), 4)}

    fit("vision", [tower, head], make, loss_of, 1e-3, run, evaluate)
    tower.to(torch.bfloat16).save_pretrained(run.out / "vision")
