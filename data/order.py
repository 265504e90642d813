"""In which order the rows of a dataset come, on disk and streamed, shared by readers and resumed.

The order is a function of seed, epoch and shard alone, so that a stream resumes in constant time.
The shuffled streams of `datasets` lose the rows of their buffers when they resume.
"""

import hashlib
import itertools
import os
import random

import numpy as np
from datasets import Dataset

from data.sources import FEATURES, reason_of
from metaquery import InputError

GROUP = 1000  # rows of a shard that are shuffled together when streaming
MAX_BROKEN = 1000  # broken rows in a row, from the first on, that end a run


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

        others, tries = range(len(self.rows)), min(len(self.rows), MAX_BROKEN)
        for other in random.Random(f"{self.seed} {index}").sample(others, tries):
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
                self.epoch, shard, cuts = piece = self.pieces[0]
                rows = shuffled(self.source.read(shard), (self.seed, self.epoch, shard))
                for cut in cuts:
                    rows = keep(rows, *cut)
                row = next(rows, None)
                while row:
                    following = next(rows, None)
                    self.read += 1
                    if not following:  # before the last row is used: a place after it is the next's
                        self.pieces, self.read = self.pieces[1:], 0
                    yield row
                    row = following
                if self.pieces and self.pieces[0] is piece:  # it had no rows
                    self.pieces = self.pieces[1:]

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
