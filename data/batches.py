"""Rows to batches, read and processed by the loader's workers: tokens, pixels and noise."""

import multiprocessing
import random
import re
import signal
import sys
from collections import defaultdict
from multiprocessing.util import Finalize
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.order import MAX_BROKEN, OnDisk, Stream, resume_place, turn
from data.sources import UNREADABLE, Source, decode, parse_data, reason_of
from metaquery import InputError, drop_conditions, to_pixels
from toy.tasks import MIXTURES, task

# What each stage reads of a row; the others read a text and a target.
ROLES = {"reconstruct": ("target",), "edit": ("text", "target", "sources")}
ROLES["instruct"] = ROLES["edit"]


class Row(NamedTuple):
    """One training sample before it is batched."""

    prompt: str
    images: list  # source images, PIL
    target: Image.Image
    index: int  # its place in the whole run, which seeds its noise
    origin: tuple = (0, 0, "")  # number of its source, epoch, name


class MicroBatch(NamedTuple):
    """Inputs of one forward pass, for b samples with K noises each."""

    inputs: dict  # the MLLM's
    targets: torch.Tensor  # (b, 3, H, W) in [-1, 1]
    noise: torch.Tensor  # ε (b·K, C, h, w)
    u: torch.Tensor  # (b·K,) in [0, 1): the model turns it into noise levels


class Batch(NamedTuple):
    """A process's share of one training step."""

    micro_batches: list
    skipped: int  # broken rows


class ToyTasks:
    """The toy world's tasks of some kinds, by weight. Deterministic in the index."""

    def __init__(self, kinds, seed):
        self.kinds, self.weights = list(kinds), list(kinds.values())
        self.seed = seed

    def __getitem__(self, index):
        kind = random.Random(f"{self.seed} {index}").choices(self.kinds, self.weights)[0]
        chosen = task(kind, index, self.seed)
        return Row(chosen.prompt, chosen.images, chosen.target_image, index)


def unseen_toy_tasks(stage, count):
    """(prompts, lists of source images) of toy tasks of a stage that training never has."""
    kinds = list(MIXTURES[stage])
    kinds = (kinds * count)[:count]
    tasks = [task(kind, i, split="test") for i, kind in enumerate(kinds)]
    return [each.prompt for each in tasks], [each.images for each in tasks]


def noise_of(index, shape, seed, count):
    """(ε (count, C, h, w), u (count,) and a coin for dropped conditions, both in [0, 1)).

    Seeded per sample, so independent of batch size and number of processes."""
    generator = torch.Generator().manual_seed(hash((seed, int(index))) % (1 << 62))
    u = [torch.rand((), generator=generator)]
    coin = torch.rand((), generator=generator).item()
    noise = [torch.randn(shape, generator=generator)]
    for _ in range(count - 1):
        u.append(torch.rand((), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.stack(u), coin


class Collate:
    """Makes a `Batch` of rows. It holds no weights, so that loader workers can have it.

    prompt_format: a PromptFormat. resolution: pixels a side of the targets. latent_shape:
    (C, h, w). micro_batch_size: samples in a micro-batch, 0 for all."""

    def __init__(self, prompt_format, resolution, latent_shape, stage, seed,
                 micro_batch_size=0, noises_per_sample=1):  # fmt: skip
        self.prompt_format, self.resolution = prompt_format, resolution
        self.latent_shape, self.stage, self.seed = latent_shape, stage, seed
        self.micro_batch_size, self.noises_per_sample = micro_batch_size, noises_per_sample

    def __call__(self, rows):
        samples = []
        for row in rows:
            noise, u, coin = noise_of(
                row.index, self.latent_shape, self.seed, self.noises_per_sample
            )
            prompt, images = drop_conditions(row.prompt, row.images, coin, self.stage)
            samples.append((prompt, images, row.target, noise, u))

        # Prompts of similar length go together, so that little is padding.
        samples.sort(key=lambda sample: (len(sample[1]), len(sample[0] or "")))
        size = self.micro_batch_size or len(samples)
        micro_batches = []
        for start in range(0, len(samples), size):
            prompts, images, targets, noise, u = zip(*samples[start : start + size], strict=True)
            inputs = dict(self.prompt_format(prompts, list(images)))
            pixels = to_pixels(targets, self.resolution)
            micro_batches.append(MicroBatch(inputs, pixels, torch.cat(noise), torch.cat(u)))
        return Batch(micro_batches, 0)


def open_sources(data, stage, columns, streaming):
    """([Source or OnDisk of each dataset], [their weights]) of --data; raises InputError.

    columns: {role: a column's name, or names of each dataset in turn with commas between}.
    Without any weight, datasets are mixed by their numbers of rows, as by the paper's authors."""
    parts = parse_data(data)
    sources = []
    for number, (name, _) in enumerate(parts):
        names = {}
        for role in ROLES.get(stage, ("text", "target")):
            each = columns.get(role, "").split(",")
            if len(each) not in (1, len(parts)):
                count = f"{len(each)} names for {len(parts)} datasets"
                raise InputError(f"--{role}-column: {count}: give one, or one for each.")
            names[role] = each[number % len(each)]
        source = Source(name, names)
        sources.append(source if streaming else OnDisk(source))

    weights = [weight or 1 for _, weight in parts]
    if not any(weight for _, weight in parts) and len(parts) > 1:
        weights = [source.num_rows for source in sources]
        if None in weights:
            raise InputError(f"--data {data}: sizes are unknown: give weights, NAME=WEIGHT.")
    return sources, weights


# ---- Readers ----------------------------------------------------------------------------------


def read_row(row, stage, index, seed):
    """(prompt, source images, target image) of a row for a stage; raises if it is broken."""
    if row["error"]:
        raise ValueError(row["error"])
    target = decode(row["target"])
    coin = random.Random(f"{seed} {index}").random()
    if stage == "reconstruct" or stage == "mix" and coin < 0.5:
        return "", [target], target
    return row["text"], [decode(image) for image in row["sources"]], target


class Report:
    """What a reader did for one batch: rows read and skipped, and its place afterwards."""

    def __init__(self):
        self.read = defaultdict(int)  # {(number of the source, epoch): rows}
        self.skipped = []  # (number of the source, epoch, name of the row, reason)
        self.place = None


class Reader(IterableDataset):
    """Reads and collates the batches of one process: (Batch, Report), or an InputError.

    places: where the reader of each worker begins, see `resume_place`; None for the toy world."""

    def __init__(self, sources, weights, collate, steps, share, rank, world, seed, places):
        self.sources, self.weights, self.collate = sources, weights, collate
        self.steps, self.share, self.rank, self.world = steps, share, rank, world
        self.seed, self.places = seed, places
        self.report, self.used = Report(), set()

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.places:
            place = self.places[worker]
            self.taken = place["taken"]
            self.streams = [
                Stream(source, self.seed, place["reader"], place["readers"], stream)
                for source, stream in zip(self.sources, place["streams"], strict=True)
            ]

        try:
            for step in self.steps[worker::workers]:
                self.report = Report()
                first = (step * self.world + self.rank) * self.share
                batch = self.read_batch(range(first, first + self.share))
                if self.places:
                    streams = [stream.place() for stream in self.streams]
                    self.report.place = place | {"taken": self.taken, "streams": streams}
                yield batch._replace(skipped=len(self.report.skipped)), self.report
        except InputError as error:  # raised in the main process, on one line
            yield error

    def read_batch(self, indices):
        """The batch of some sample indices. A row that the processor refuses is skipped too."""
        rows = [self.take(index) for index in indices]
        try:
            batch = self.collate(rows)
        except Exception:
            rows = [row if self.fits(row) else self.take(row.index, self.fits) for row in rows]
            batch = self.collate(rows)
        self.used |= {row.origin[0] for row in rows}
        return batch

    def fits(self, row):
        try:
            self.collate([row])
        except Exception as error:
            self.report.skipped.append((*row.origin, reason_of(error)))
            return False
        return True

    def take(self, index, fits=None):
        """The next usable `Row`, for a sample index; raises InputError if there is none."""
        if not self.places:
            return self.sources[0][index]

        number = turn(self.taken, self.weights)
        self.taken += 1
        stream, name = self.streams[number], self.sources[number].name
        before = len(self.report.skipped)
        for raw in stream.candidates():
            origin = (number, stream.epoch, raw["name"])
            self.report.read[origin[:2]] += 1
            try:
                row = Row(*read_row(raw, self.collate.stage, index, self.seed), index, origin)
                if fits is None or fits(row):
                    return row
            except Exception as error:
                self.report.skipped.append((*origin, reason_of(error)))
            if number not in self.used and len(self.report.skipped) == MAX_BROKEN:
                break

        broken = [*self.report.skipped[before:], (number, 0, name, "it has no rows")]
        _, _, row, reason = broken[0]
        raise InputError(f"--data {name} has no usable row; first {row}: {reason}.")


class Batches:
    """The batches of one process, in order. Says on stderr what is skipped."""

    def __init__(self, loader, sources, left, places, prefix):
        self.loader, self.sources, self.left = iter(loader), sources, left
        self.readers, self.prefix = places, prefix
        self.epochs = [{}] * max(1, loader.num_workers)
        self.read, self.skipped, self.kinds = defaultdict(int), defaultdict(dict), set()

    def __iter__(self):
        return self

    def __next__(self):
        result = next(self.loader)
        if isinstance(result, InputError):
            raise result
        batch, report = result

        # The loader takes from its workers in turn: the one whose turn it was becomes the last.
        if self.readers:
            self.readers = [*self.readers[1:], report.place]
        self.epochs = [*self.epochs[1:], self.epochs[0] | dict(report.read)]
        self.left -= 1
        self.count(report)
        return batch

    def places(self):
        """Where this process's readers are after the last batch, for JSON; None for the toy."""
        return self.readers

    def count(self, report):
        """Name the first skipped row of each kind, and count them at the end of an epoch."""
        for key, rows in report.read.items():
            self.read[key] += rows
        for number, epoch, name, reason in report.skipped:
            self.skipped[number, epoch].setdefault(name, reason)
            kind = re.sub(r"\d+|'.*'", "", reason)
            if reason.startswith(UNREADABLE):
                kind = name  # each is named
            if kind not in self.kinds:
                self.kinds.add(kind)
                self.say(f"{self.sources[number].name}: skipped {name}: {reason}")

        for number, epoch in sorted(self.skipped):
            newest = [max((e for n, e in seen if n == number), default=-1) for seen in self.epochs]
            if min(newest) > epoch or not self.left:
                skipped = self.skipped.pop((number, epoch))
                shards = sum(reason.startswith(UNREADABLE) for reason in skipped.values())
                rows = len(skipped) - shards
                text = f"skipped {rows} of {self.read[number, epoch] - shards} rows"
                if shards:
                    text += f" and {shards} of {len(self.sources[number].shards)} shards"
                name, reason = next(iter(skipped.items()))
                where = f"{self.sources[number].name}: in epoch {epoch + 1}"
                self.say(f"{where} {text}, first {name}: {reason}")

    def say(self, text):
        print(f"{self.prefix}--data {text}", file=sys.stderr, flush=True)


def ignore_signals(worker):
    """Workers outlive the signals that end a run, so that its last step is complete."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows lacks the last
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def stop_workers():
    """End the workers. Python asks them by SIGTERM, which they ignore, and waits forever."""
    if hasattr(signal, "SIGCHLD"):  # torch would report each as failed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def unchanged(item):
    return item


def open_batches(data, stage, collate, *, columns=None, streaming=False, first=0, steps,
                 batch_size, seed=0, rank=0, world=1, workers=0, places=None):  # fmt: skip
    """The `Batches` of one process, from step `first` to `steps`. Raises InputError.

    data: "toy", or datasets, see `parse_data`. batch_size: samples in a step of all processes.
    columns: {role: column}, see `open_sources`. places: all processes' `places()` of the run to
    resume. Toy samples depend on the step alone, not on processes or workers."""
    Finalize(None, stop_workers, exitpriority=1)  # when this process ends, in whatever way
    if data == "toy":
        sources, weights, mine = [ToyTasks(MIXTURES[stage], seed)], [1], None
    else:
        sources, weights = open_sources(data, stage, columns or {}, streaming)
        saved = [place for process in places or [] for place in process]
        readers = max(1, workers)
        mine = [
            resume_place(saved, sources, seed, rank * readers + reader, world * readers)
            for reader in range(readers)
        ]

    share = batch_size // world
    reader = Reader(sources, weights, collate, range(first, steps), share, rank, world, seed, mine)
    loader = DataLoader(
        reader, batch_size=None, collate_fn=unchanged, num_workers=workers,
        pin_memory=torch.cuda.is_initialized(), worker_init_fn=ignore_signals,
    )  # fmt: skip
    prefix = f"process {rank}: " if world > 1 else ""
    return Batches(loader, sources, steps - first, mine, prefix)
