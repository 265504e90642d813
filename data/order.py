"""In which order the rows of a dataset come, on disk and streamed, shared by readers and resumed.

The order is a function of seed, epoch and shard alone, so that a run resumes in constant time.
The shuffled streams of `datasets` lose the rows of their buffers when they resume.
"""

import hashlib
import itertools
import os
from contextlib import suppress

import numpy as np
from datasets import Dataset

from data.sources import FEATURES, reason_of
from metaquery import InputError

MAX_BROKEN = 1000  # broken rows in a row, from the first on, that end a run


def turn(taken, weights):
    """The number of the source of a reader's next row, by weight, from the rows it has taken."""
    for number, weight in enumerate(weights[:-1]):
        share = weight / sum(weights[number:])
        before = int(taken * share)
        if int((taken + 1) * share) > before:
            return number
        taken -= before
    return len(weights) - 1


class OnDisk:
    """A source copied once to the cache of `datasets`; each epoch shuffles all of its rows."""

    num_pieces = 1

    def __init__(self, source):
        self.name, self.shards = source.name, source.shards
        identity = [FEATURES, source.columns]
        for path in itertools.chain.from_iterable(source.shards):
            identity.append(path)
            with suppress(OSError):  # remote, or a link to nowhere
                stat = os.stat(path)
                identity.append((stat.st_size, stat.st_mtime_ns))
        try:
            self.rows = Dataset.from_generator(
                source.read_all, FEATURES, writer_batch_size=100,
                fingerprint=hashlib.sha256(repr(identity).encode()).hexdigest()[:32],
            )  # fmt: skip
        except Exception as error:
            reason = reason_of(error.__cause__ or error)
            fix = "free some disk, set HF_DATASETS_CACHE, or add --streaming true"
            raise InputError(f"cannot copy --data {source.name} ({reason}): {fix}.") from None
        self.num_rows = len(self.rows)

    def shuffled(self, piece, seed):
        """Numbers of all rows in the order that a seed decides."""
        return iter(np.random.default_rng(seed).permutation(self.num_rows).tolist())

    def row(self, number):
        return self.rows[number]


class Stream:
    """One reader's rows of a `Source` or an `OnDisk`, read from a place on.

    place: [the epoch to read after the pieces, pieces still to read]. A piece is a shard, or a
    part of one: [epoch, number of the shard, cuts]; see `keep`."""

    def __init__(self, source, seed, reader, readers, place):
        self.source, self.seed = source, seed
        self.reader, self.readers = reader, readers
        self.next_epoch, self.pieces = place
        self.epoch, self.read = self.next_epoch, 0
        self.rows = self.read_on()

    def candidates(self):
        """The next rows, until this reader has had a turn at each part of the source."""
        begun = 0
        while begun <= self.readers:
            row = next(self.rows)
            begun += row is None
            if row is not None:
                yield row

    def read_on(self):
        """Rows without end; None where an epoch begins."""
        while True:
            if not self.pieces:
                yield None
                self.pieces = plan(
                    self.source, self.seed, self.next_epoch, self.reader, self.readers
                )
                self.next_epoch += 1

            while self.pieces:
                self.epoch, shard, cuts = piece = self.pieces[0]
                rows = self.source.shuffled(shard, (self.seed, self.epoch, shard))
                for cut in cuts:
                    rows = keep(rows, *cut)
                row = next(rows, None)
                while row is not None:
                    following = next(rows, None)
                    self.read += 1
                    if following is None:  # a place after the last row is the next piece's
                        self.pieces, self.read = self.pieces[1:], 0
                    yield self.source.row(row)
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


def plan(source, seed, epoch, reader, readers):
    """The pieces of a source that a reader reads in an epoch.

    Readers change places each epoch, so that each has rows at times where there are few."""
    order = np.random.default_rng((seed, epoch)).permutation(source.num_pieces).tolist()
    return deal([[epoch, shard, []] for shard in order], (reader + epoch) % readers, readers)


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
                rest += plan(source, seed, epoch, old["reader"], old["readers"])

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
