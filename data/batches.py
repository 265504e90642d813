"""Rows to batches, made in the loader's workers: tokens, pixels and noise."""

import random
import signal
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.sources import OnDisk, Row, Streamed
from metaquery import drop_conditions, resize_and_crop
from toy.tasks import task

# What tells a run to finish its step, save and end.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class MicroBatch(NamedTuple):
    """What one forward pass takes."""

    inputs: dict  # of the MLLM
    targets: torch.Tensor  # (b, 3, H, W) in [-1, 1]
    noise: torch.Tensor  # ε (b, C, h, w)
    sigma: torch.Tensor  # σ (b,) in (0, 1]


class Batch(NamedTuple):
    """A process's share of one training step."""

    micro_batches: list
    skipped: int  # broken rows


class ToyTasks(Dataset):
    """The toy world's tasks of some kinds, by weight: the index alone decides."""

    def __init__(self, kinds, seed):
        self.kinds, self.weights = list(kinds), list(kinds.values())
        self.seed = seed

    def __getitem__(self, index):
        kind = random.Random(f"{self.seed} {index}").choices(self.kinds, self.weights)[0]
        chosen = task(kind, index, self.seed)
        return Row(chosen.prompt, chosen.images, chosen.picture, 0, index)


def noise_of(indices, shape, seed):
    """ε (B, C, h, w), σ (B,) in (0, 1] and u (B,) in [0, 1), of the index, not of the batching."""
    noise, sigma, u = [], [], []
    for index in indices:
        generator = torch.Generator().manual_seed(hash((seed, int(index))) % (1 << 62))
        sigma.append(1 - torch.rand((), generator=generator))
        u.append(torch.rand((), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.stack(sigma), torch.stack(u)


def to_pixels(pictures, resolution):
    """PIL pictures, centre-cropped, as (B, 3, resolution, resolution) float32 in [-1, 1]."""
    size = (resolution, resolution)
    arrays = [np.asarray(resize_and_crop(picture, size)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Collate:
    """Makes a `Batch` of rows, for a model's inputs, latents and resolution."""

    def __init__(self, model, config):
        self.config = config
        self.prepare_inputs = model.prepare_inputs
        self.resolution = resolution_of(model)
        side = model.diffusion.config.sample_size
        self.latent_shape = (model.diffusion.config.in_channels, side, side)

    def __call__(self, rows):
        targets = to_pixels([row.target for row in rows], self.resolution)
        indices = [row.index for row in rows]
        noise, sigma, u = noise_of(indices, self.latent_shape, self.config.seed)
        shift = self.config.sigma_shift
        sigma = shift * sigma / (1 + (shift - 1) * sigma)  # Stable Diffusion 3, equation 23
        conditions = [
            drop_conditions(row.prompt, row.images, chance, self.config.stage)
            for row, chance in zip(rows, u.tolist(), strict=True)
        ]
        # Prompts of similar length go together, so that little is padding.
        lengths = [(len(images), len(prompt)) for prompt, images in conditions]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        size = self.config.micro_batch_size or len(rows)
        micro_batches = []
        for start in range(0, len(rows), size):
            some = order[start : start + size]
            prompts, images = zip(*(conditions[row] for row in some), strict=True)
            inputs = dict(self.prepare_inputs(prompts, images))
            micro_batches.append(MicroBatch(inputs, targets[some], noise[some], sigma[some]))
        return Batch(micro_batches, sum(row.skipped for row in rows))


def ignore_signals(worker):
    """Workers outlive the signals that end a run, so that its last step is complete."""
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def resolution_of(model):
    """Pixels a side of the pictures that a MetaQuery's diffusion model draws."""
    vae = model.vae.config
    levels = vae.get("block_out_channels") or vae.encoder_block_out_channels
    return model.diffusion.config.sample_size * 2 ** (len(levels) - 1)


def open_batches(config, rows, collate, first, rank, world):
    """An iterator over this process's share of each step's rows, collated, from step `first` on.

    rows: a dataset of `open_rows`, or the toy world's kinds of tasks and their weights.
    """
    share = config.batch_size // world
    sampler = (
        step * config.batch_size + rank * share + i
        for step in range(first, config.steps)
        for i in range(share)
    )
    if config.data == "toy":
        dataset = ToyTasks(rows, config.seed)
    elif config.streaming:
        dataset = Streamed(rows, config.stage, config.seed, rank, world, first, share)
        sampler = None
    else:
        dataset = OnDisk(rows, config.stage, config.seed)
    loader = DataLoader(
        dataset,
        share,
        sampler=sampler,
        collate_fn=collate,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_initialized(),
        worker_init_fn=ignore_signals,
    )
    return iter(loader)
