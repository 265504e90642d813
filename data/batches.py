"""Rows to batches, read and processed by the loader's workers: tokens, pixels and noise."""

import hashlib
import itertools
import os
import random
import re
import signal
import sys
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.sources import FEATURES, UNREADABLE, Source, decode, parse_data, reason_of
from metaquery import InputError, drop_conditions, to_pixels
from toy.tasks import MIXTURES, task

# What each stage reads of a row; the others read a text and a target.
ROLES = {"reconstruct": ("target",), "edit": ("text", "target", "sources")}
ROLES["instruct"] = ROLES["edit"]
GROUP = 1000  # rows of a shard that are shuffled together when streaming
MAX_BROKEN = 1000  # broken rows in a row, from the first on, that end a run


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

    name, epoch = "toy", 0

    def __init__(self, kinds, seed):
        self.kinds, self.weights = list(kinds), list(kinds.values())
        self.seed = seed

    def __getitem__(self, index):
        kind = random.Random(f"{self.seed} {index}").choices(self.kinds, self.weights)[0]
        chosen = task(kind, index, self.seed)
        return Row(chosen.prompt, chosen.images, chosen.picture, index)


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


# ---- In which order ---------------------------------------------------------------------------


def turn(index, weights):
    """(number of the source of sample `index`, how many samples it had before), by weight."""
    for number, weight in enumerate(weights[:-1]):
        share = weight / sum(weights[number:])
        before = int(index * share)
        if int((index + 1) * share) > before:
            return number, before
        index -= before
    return len(weights) - 1, index


class OnDisk:
    """A source copied once to the cache of `datasets`, in another order each epoch."""

    def __init__(self, source, seed):
        self.name, self.shards, self.seed = source.name, source.shards, seed
        self.epoch, self.order = None, None
        identity = [FEATURES, source.columns]
        for path in itertools.chain.from_iterable(source.shards):
            stat = None if "://" in path else os.stat(path)
            identity.append((path, stat and (stat.st_size, stat.st_mtime_ns)))
        try:
            self.rows = Dataset.from_generator(
                source.read_all, FEATURES, writer_batch_size=100,
                fingerprint=hashlib.sha256(repr(identity).encode()).hexdigest()[:32],
            )  # fmt: skip
        except Exception as error:
            reason = reason_of(error.__cause__ or error)
            fix = "free some disk, set HF_DATASETS_CACHE, or add --streaming true"
            raise InputError(f"cannot copy --data {source.name} ({reason}): {fix}.") from None

    def candidates(self, index):
        """The row at a place of the run, then others that may stand for it if it is broken."""
        epoch, place = divmod(index, len(self.rows))
        if self.epoch != epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        yield self.rows[int(self.order[place])]

        others = range(len(self.rows))
        for other in random.Random(f"{self.seed} {index}").sample(
            others, min(len(others), MAX_BROKEN)
        ):
            yield self.rows[other]


class Streamed:
    """One reader's rows of a source, read from a place on.

    place: [the epoch to read after the pieces, pieces still to read]. A piece is a shard, or a
    part of one: [epoch, number of the shard, cuts]; see `keep`. Its rows are shuffled in groups."""

    def __init__(self, source, seed, reader, readers, place):
        self.name, self.source, self.seed = source.name, source, seed
        self.reader, self.readers = reader, readers
        self.next_epoch, self.pieces = place
        self.epoch, self.read = self.next_epoch, 0
        self.rows = self.read_on()

    def candidates(self, index):
        """The next rows, up to the end of the first epoch of which none was used."""
        begun = 0
        while begun < 2:
            row = next(self.rows)
            begun += row is None
            if row is not None:
                yield row

    def read_on(self):
        """Rows without end; None where an epoch begins."""
        while True:
            if not self.pieces:
                yield None
                shards = len(self.source.shards)
                self.pieces = plan(shards, self.seed, self.next_epoch, self.reader, self.readers)
                self.next_epoch += 1

            while self.pieces:
                self.epoch, shard, cuts = self.pieces[0]
                rows = shuffled(self.source.read(shard), (self.seed, self.epoch, shard))
                for cut in cuts:
                    rows = keep(rows, *cut)
                for row in rows:
                    self.read += 1
                    yield row
                self.pieces = self.pieces[1:]
                self.read = 0

    def place(self):
        """Where to read on, as small lists for JSON."""
        pieces = list(self.pieces)
        if self.read:
            epoch, shard, cuts = pieces[0]
            pieces[0] = [epoch, shard, [*cuts, [self.read, 0, 1, 1]]]
        return [self.next_epoch, pieces]


def shuffled(rows, seed):
    """Rows in the order that a seed decides, within groups of GROUP rows."""
    for number in itertools.count():
        group = list(itertools.islice(rows, GROUP))
        for place in np.random.default_rng((*seed, number)).permutation(len(group)):
            yield group[place]
        if len(group) < GROUP:
            return


def keep(rows, first, low, high, parts):
    """From row `first` on, those whose number, counted from there, is `low` to `high` - 1 when
    divided by `parts`."""
    for number, row in enumerate(itertools.islice(rows, first, None)):
        if low <= number % parts < high:
            yield row


def deal(pieces, reader, readers):
    """A reader's equal share of L pieces: on a line, those from reader·L/readers on.

    Only the pieces at its two ends are parts, so that a reader reads no more than 2 in vain."""
    share = []
    for number, (epoch, shard, cuts) in enumerate(pieces):
        low = max(reader * len(pieces) - number * readers, 0)
        high = min((reader + 1) * len(pieces) - number * readers, readers)
        if high - low == readers:
            share.append([epoch, shard, cuts])
        elif low < high:
            share.append([epoch, shard, [*cuts, [0, low, high, readers]]])
    return share


def plan(shards, seed, epoch, reader, readers):
    """The pieces that a reader reads in an epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(shards).tolist()
    return deal([[epoch, shard, []] for shard in order], reader, readers)


def resume_place(saved, sources, seed, reader, readers):
    """The place of a reader of a run, from the places of all its readers that were saved:

        {"reader": its number, "readers": how many there are, "taken": rows taken,
         "streams": [place in each source]}

    With another number of readers, they share what is left of each epoch."""
    if len(saved) == readers:
        return saved[reader]

    streams = []
    for number, source in enumerate(sources):
        latest = max((old["streams"][number][0] for old in saved), default=0)
        rest = []
        for old in saved:
            next_epoch, pieces = old["streams"][number]
            rest += pieces
            for epoch in range(next_epoch, latest):
                rest += plan(len(source.shards), seed, epoch, old["reader"], old["readers"])

        # Pieces of equal lengths are dealt together: so all readers end an epoch together.
        def kind(piece):
            return piece[0], not piece[2]

        groups = itertools.groupby(sorted(rest, key=kind), kind)
        dealt = []
        for _, group in groups:
            group = list(group)
            if group[0][2] and len(group) <= 8:  # parts differ in length: each is dealt to all
                dealt += [piece for part in group for piece in deal([part], reader, readers)]
            else:
                dealt += deal(group, reader, readers)
        streams.append([latest, dealt])
    return {"reader": reader, "readers": readers, "taken": reader, "streams": streams}


def open_sources(data, stage, columns, streaming, seed):
    """([Source or OnDisk of each dataset], [their weights]) of --data; raises InputError.

    columns: {role: a column's name, or names of each dataset in turn with commas between}.
    Without any weight, datasets are mixed by their numbers of rows, as by the paper's authors."""
    parts = parse_data(data)
    sources, sizes = [], []
    for number, (name, _) in enumerate(parts):
        names = {}
        for role in ROLES.get(stage, ("text", "target")):
            each = columns.get(role, "").split(",")
            if len(each) not in (1, len(parts)):
                count = f"{len(each)} names for {len(parts)} datasets"
                raise InputError(f"--{role}-column: {count}: give one, or one for each.")
            names[role] = each[number % len(each)]
        source = Source(name, names)
        sizes.append(source.num_rows)
        if not streaming:
            source = OnDisk(source, seed)
            sizes[-1] = len(source.rows)
        sources.append(source)

    weights = [weight or 1 for _, weight in parts]
    if not any(weight for _, weight in parts) and len(parts) > 1:
        if None in sizes:
            raise InputError(f"--data {data}: sizes are unknown: give weights, NAME=WEIGHT.")
        weights = sizes
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
    """Reads and collates the batches of one process: (Batch, Report), or an InputError."""

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
            self.number, self.readers, self.taken = (
                place["reader"],
                place["readers"],
                place["taken"],
            )
            self.open = [
                Streamed(source, self.seed, self.number, self.readers, stream)
                for source, stream in zip(self.sources, place["streams"], strict=True)
            ]
        else:
            self.open = self.sources
        try:
            for step in self.steps[worker::workers]:
                self.report = Report()
                first = (step * self.world + self.rank) * self.share
                batch = self.read_batch(range(first, first + self.share))
                if self.places:
                    streams = [stream.place() for stream in self.open]
                    self.report.place = {"reader": self.number, "readers": self.readers,
                                         "taken": self.taken, "streams": streams}  # fmt: skip
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
        """The usable `Row` for a sample index; raises InputError if there is none."""
        if isinstance(self.open[0], ToyTasks):
            return self.open[0][index]

        number, place = turn(index, self.weights)
        if self.places:  # each reader counts for itself: otherwise one may always miss a source
            number, _ = turn(self.taken, self.weights)
            self.taken += 1
        source = self.open[number]
        skipped_before = len(self.report.skipped)
        for raw in source.candidates(place):
            origin = (number, source.epoch, raw["name"])
            if self.places or len(self.report.skipped) == skipped_before:  # no substitute
                self.report.read[origin[:2]] += 1
            try:
                row = Row(*read_row(raw, self.collate.stage, index, self.seed), index, origin)
                if fits is None or fits(row):
                    return row
            except Exception as error:
                self.report.skipped.append((*origin, reason_of(error)))
            if number not in self.used and len(self.report.skipped) == MAX_BROKEN:
                break

        broken = self.report.skipped[skipped_before:]
        if not broken:
            reason = f"a reader, one of {self.readers}, finds no rows in --data {source.name}"
            raise InputError(f"{reason}: use fewer --workers or processes, or more rows.")
        _, _, name, reason = broken[0]
        raise InputError(f"--data {source.name} has no usable row; first {name}: {reason}.")


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
        """Where this process's readers are after the last batch, for JSON; None if not streamed."""
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


def unchanged(item):
    return item


def open_batches(data, stage, collate, *, columns=None, streaming=False, first=0, steps,
                 batch_size, seed=0, rank=0, world=1, workers=0, places=None):  # fmt: skip
    """The `Batches` of one process, from step `first` to `steps`. Raises InputError.

    data: "toy", or datasets, see `parse_data`. batch_size: samples in a step of all processes.
    columns: {role: column}, see `open_sources`. places: all processes' `places()` of the run to
    resume. Toy samples and rows on disk depend on the step alone, not on processes or workers."""
    readers, mine = max(1, workers), None
    if data == "toy":
        sources, weights = [ToyTasks(MIXTURES[stage], seed)], [1]
    else:
        sources, weights = open_sources(data, stage, columns or {}, streaming, seed)
    if data != "toy" and streaming:
        saved = [place for process in places or [] for place in process]
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
