"""Datasets by hub id or folder, read one row at a time by the `datasets` library.

Webdataset tars (cc12m-wds), image folders with metadata.csv or .jsonl, parquet, and the schemas of
OmniEdit and MetaQuery-Instruct; streamed or not; several of them mixed by weight.
"""

import io
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Image, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from cli import parse_data
from metaquery import MAX_PICTURES, InputError

# Known names of each column; train.py's flags name others.
COLUMNS = {
    "text": ("txt", "text", "caption", "prompt", "edited_prompt_list"),
    "target": ("jpg", "png", "webp", "image", "edited_img", "target_image"),
    "sources": ("src_img", "source_images", "source_image"),
}
SHUFFLE_BUFFER = 1000  # rows that a streamed dataset is shuffled among
MAX_BROKEN = 100  # broken rows in a row that end a run
SKIP = 7919  # a prime: how far after a broken row the next one is looked for


class Row(NamedTuple):
    """One training sample before it is batched."""

    prompt: str
    images: list  # source pictures, PIL
    target: PILImage.Image
    skipped: int  # broken rows skipped before this one
    index: int  # its place in the whole run, which seeds its noise


def open_dataset(name, streaming):
    """A dataset by hub id, folder or file: tars, parquet files, or pictures with their metadata."""
    folder = Path(name)
    try:
        if not folder.exists():
            return load_dataset(name, split="train", streaming=streaming)
        for suffix, builder in ((".tar", "webdataset"), (".parquet", "parquet")):
            files = sorted(folder.rglob(f"*{suffix}")) if folder.is_dir() else [folder]
            files = [file for file in files if file.name.startswith("train")] or files
            if files and files[0].suffix == suffix:
                files = {"train": whole_shards(files)}
                return load_dataset(builder, data_files=files, split="train", streaming=streaming)
        if not folder.is_dir():
            raise OSError("it is neither a .tar nor a .parquet file")
        return load_dataset("imagefolder", data_dir=name, split="train", streaming=streaming)
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        advice = "name a hub id, or a folder of .tar or .parquet files or of pictures with captions"
        raise InputError(f"cannot read --data {name} ({reason}): {advice}.") from None


def whole_shards(files):
    """The names of those files that are not cut off; the others are named and counted on stderr.

    A tar ends in 1,024 zero bytes and a parquet file in "PAR1", so that reading the end tells.
    """
    whole = []
    for path in files:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 1024))
            end = file.read()
        is_whole = end.endswith(b"PAR1") if path.suffix == ".parquet" else end == bytes(1024)
        if is_whole:
            whole.append(str(path))
    broken = [path.name for path in files if str(path) not in whole]
    if broken:
        names = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        print(f"skipped {len(broken)} of {len(files)} shards, cut off: {names}", file=sys.stderr)
    if not whole:
        raise InputError(f"every shard of --data is cut off, first {files[0]}: copy it again.")
    return whole


def standardize(dataset, name, columns, roles):
    """A dataset with columns of the given roles, such as "text"; pictures are not decoded yet.

    columns: {role: the column's name, or "" to look for a known one}. Raises InputError if a column
    is missing, or there are no rows.
    """
    available = list(dataset.features or next(iter(dataset), []))
    role_of = {}
    for role in roles:
        wanted = (columns[role],) if columns[role] else COLUMNS[role]
        found = [column for column in wanted if column in available]
        if not found:
            raise InputError(
                f"--data {name} has no column {' or '.join(wanted)} for its {role}; its columns "
                f"are {', '.join(available)}: name one with --{role}-column."
            )
        role_of[found[0]] = role
    dataset = dataset.select_columns(list(role_of))
    for column in role_of:
        feature = dataset.features[column]
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):  # a list of pictures
            dataset = dataset.cast_column(column, type(feature)(Image(decode=False)))
    dataset = dataset.rename_columns({old: new for old, new in role_of.items() if old != new})
    is_streamed = not hasattr(dataset, "__len__")
    if next(iter(dataset), None) is None if is_streamed else len(dataset) == 0:
        raise InputError(f"--data {name} has no rows: check it, or name another.")
    return dataset


# What each stage reads of a row.
ROLES = {"reconstruct": ("target",), "edit": tuple(COLUMNS), "instruct": tuple(COLUMNS)}


def number_of_rows(dataset):
    """How many rows a dataset has, or None if it is streamed and does not tell."""
    if hasattr(dataset, "__len__"):
        return len(dataset)
    splits = dataset.info.splits or {}
    return splits["train"].num_examples or None if "train" in splits else None


def open_rows(config, seed):
    """The rows of config.data, "NAME,NAME=WEIGHT,...", standardized and mixed by weight.

    Without any weight they are mixed by their numbers of rows, as by the paper's authors.
    """
    columns = {role: getattr(config, f"{role}_column") for role in COLUMNS}
    roles = ROLES.get(config.stage, ("text", "target"))
    datasets, weights = [], []
    for name, weight in parse_data(config.data):
        dataset = open_dataset(name, config.streaming)
        datasets.append(standardize(dataset, name, columns, roles))
        weights.append(weight)
    if len(datasets) == 1:
        return datasets[0]
    if not any(weights):
        weights = [number_of_rows(dataset) for dataset in datasets]
        if None in weights:
            raise InputError(f"--data {config.data}: sizes are unknown: give weights, NAME=WEIGHT.")
    weights = [weight or 1 for weight in weights]
    shares = list(np.array(weights) / sum(weights))
    return interleave_datasets(datasets, shares, seed, stopping_strategy="all_exhausted")


def read_row(row, stage, coin):
    """(prompt, source pictures, target picture) of a standardized row; raises if it is broken.

    `coin` in [0, 1) decides in the stage "mix" whether the picture is reconstructed.
    """
    target = decode(row["target"])
    if stage == "reconstruct" or (stage == "mix" and coin < 0.5):
        return "", [target], target
    text = row["text"]
    text = text[-1] if isinstance(text, list) else text  # OmniEdit's last prompt is the shortest
    if not (isinstance(text, str) and text.strip()):
        raise ValueError("an empty caption")
    sources = row.get("sources") or []
    sources = sources if isinstance(sources, list) else [sources]
    if stage in ("edit", "instruct") and not 1 <= len(sources) <= MAX_PICTURES:
        raise ValueError(f"{len(sources)} source pictures")
    return text, [decode(picture) for picture in sources], target


def decode(value):
    """A picture as `datasets` stores it, {"bytes": ..., "path": ...}, as PIL."""
    data = value["bytes"]
    picture = PILImage.open(io.BytesIO(data) if data else value["path"])
    picture.load()
    return picture


def too_many_broken():
    return InputError(f"{MAX_BROKEN} broken pictures or empty captions in a row: check --data.")


class OnDisk(Dataset):
    """A dataset on disk, in another order each epoch; broken rows are skipped and counted."""

    def __init__(self, rows, stage, seed):
        self.rows, self.stage, self.seed = rows, stage, seed
        self.epoch, self.order = None, None

    def __getitem__(self, index):
        """The `Row` at a place in the whole run."""
        epoch, place = divmod(index, len(self.rows))
        if self.epoch != epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        coin = random.Random(f"{self.seed} {index}").random()
        for skipped in range(MAX_BROKEN):
            row = self.rows[int(self.order[(place + skipped * SKIP) % len(self.rows)])]
            try:
                return Row(*read_row(row, self.stage, coin), skipped, index)
            except Exception:
                continue
        raise too_many_broken()


def share_of(rows, share, shares):
    """One of `shares` parts of a streamed dataset, of whole shards if there are enough of them.

    The library's own split needs shards that divide evenly: otherwise every reader would read all
    of them and keep one row in `shares`.
    """
    if rows.num_shards >= shares:
        return rows.shard(shares, share, contiguous=False)
    return split_dataset_by_node(rows, share, shares)


def until_broken(rows):
    """The rows of an iterator up to one where reading fails, as it does in a damaged shard."""
    try:
        yield from rows
    except Exception as error:
        print(f"skipped the rest of an epoch: cannot read on ({error})", file=sys.stderr)


class Streamed(IterableDataset):
    """A streamed dataset: each process's each worker reads its own share of the rows.

    A resumed run has taken `batches_done` batches of `batch_size` rows a process already. They are
    read again without being yielded, so that it sees what an uninterrupted run would have seen.
    """

    def __init__(self, rows, stage, seed, rank, world, batches_done, batch_size):
        self.rows, self.stage, self.seed = rows, stage, seed
        self.rank, self.world = rank, world
        self.batches_done, self.batch_size = batches_done, batch_size

    def __iter__(self):
        # The loader takes batches from its workers in turn, and starts with worker 0 even when a
        # run resumes. So worker 0 must play the one whose turn it is. For example, with 3 workers
        # and 4 batches done (by workers 0, 1, 2, 0), worker 1 is next: workers 0, 1, 2 now play
        # 1, 2, 0, which had done 1, 1 and 2 batches; their first batches are numbers 4, 5 and 6.
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        played = (worker + self.batches_done) % workers
        rows_done = (self.batches_done - played + workers - 1) // workers * self.batch_size
        share, shares = self.rank * workers + played, self.world * workers
        read, epoch, skipped = 0, 0, 0
        while True:
            read_before = read + skipped
            rows = self.rows.shuffle(seed=self.seed + epoch, buffer_size=SHUFFLE_BUFFER)
            # Unlike `__iter__`, `iter` leaves the splitting among workers to us.
            for columns in until_broken(share_of(rows, share, shares).iter(1)):
                row = {name: values[0] for name, values in columns.items()}
                try:
                    coin = random.Random(f"{self.seed} {(share, shares)} {read}").random()
                    sample = read_row(row, self.stage, coin)
                except Exception:
                    skipped += 1
                    if skipped == MAX_BROKEN:
                        raise too_many_broken() from None
                    continue
                if read >= rows_done:
                    turn, place = divmod(read - rows_done, self.batch_size)
                    batch = self.batches_done + worker + turn * workers
                    index = (batch * self.world + self.rank) * self.batch_size + place
                    yield Row(*sample, skipped, index)
                read += 1
                skipped = 0
            if read + skipped == read_before:
                raise InputError(
                    f"reader {share + 1} of {shares} finds no rows in --data: use fewer --workers "
                    "or processes, or more rows."
                )
            epoch += 1
