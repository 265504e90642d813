"""Datasets by hub id, folder or file, as rows of one schema: text, target image, source images.

Reads webdataset tars (cc12m-wds), parquet and arrow files, .jsonl, .json, .csv and .tsv tables that
name image files, and folders of images with captions beside them. Of a hub id, `datasets` says
which files a split has.

Nothing ends a run here: a row, a damaged file or a lost connection that cannot be used becomes a
row with an "error", which the reader counts and names. No image is decoded before its row is used.
"""

import base64
import csv
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value, load_dataset, load_dataset_builder
from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from metaquery import MAX_IMAGES, InputError, to_rgb

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")
# Known names of each column, in lower case; train.py's flags name others.
COLUMNS = {
    "text": ("txt", "text", "caption", "prompt", "edited_prompt_list", "instruction"),
    "target": (*IMAGES, "image", "edited_img", "target_image", "target_img", "file_name"),
    "sources": ("src_img", "source_images", "source_image", "source_img"),
}
GROUP = 1000  # rows of a shard that are shuffled together when streaming
# What each stage reads of a row; the others read a text and a target.
ROLES = {"reconstruct": ("target",), "edit": tuple(COLUMNS), "instruct": tuple(COLUMNS)}
# The words in the names of folders and files by which `datasets` tells splits.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
CONNECTION_ERRORS = (*CONNECTION_ERRORS_TO_RETRY, ConnectionError, TimeoutError, HfHubHTTPError)
TABLES = ("parquet", "arrow", "jsonl", "json", "csv", "tsv")
RETRY_SECONDS = (1, 5, 30)  # how long to wait before each new try
UNREADABLE = "unreadable shard"  # how the error of a whole shard begins
PEEK = 1000  # rows in which one must have the columns
FOLDER_SHARD = 100  # images of a folder that are read together

IMAGE = {"bytes": Value("large_binary"), "path": Value("string")}
FEATURES = Features(name=Value("string"), error=Value("string"), text=Value("string"),
                    target=IMAGE, sources=List(IMAGE))  # fmt: skip


class Row(NamedTuple):
    """One training sample before it is batched."""

    prompt: str
    images: list  # source images, PIL
    target: Image.Image
    index: int  # its place in the whole run, which seeds its noise
    origin: tuple = (0, 0, "")  # number of its source, epoch, name


# ---- Which files -----------------------------------------------------------------------------


def parse_data(spec):
    """[(name, weight or None)] of --data, "NAME,NAME=WEIGHT,..."; raises InputError.

    A name is a folder, a file or a hub id, with or without ":CONFIG" and "@SPLIT"."""
    if os.path.exists(spec):
        return [(spec, None)]
    parts = []
    for part in spec.split(","):
        name, equals, weight = part.rpartition("=")
        if not equals or os.path.exists(part):
            name, weight = part, "1"
        try:
            value = float(weight)
        except ValueError:
            value = 0
        if not name or not 0 < value < math.inf:
            fix = "write NAME or NAME=WEIGHT with a weight above 0"
            raise InputError(f"--data {spec}: {part!r} is not clear: {fix}.")
        if name == part:
            value = None
        parts.append((name, value))

    if "toy" in [name for name, _ in parts] and len(parts) > 1:
        raise InputError(f"--data {spec}: the toy world cannot be mixed with datasets: name one.")
    return parts


def split_name(name):
    """(path or hub id, config or None, split) of "NAME:CONFIG@SPLIT"."""
    config, split = None, "train"
    if not os.path.exists(name) and "@" in name:
        name, _, split = name.rpartition("@")
    if not os.path.exists(name) and ":" in name[2:]:  # "C:\data" has no config
        name, _, config = name.rpartition(":")
    if os.path.exists(name):
        name = os.path.abspath(name)
    return name, config, split


def visible_files(folder):
    """Paths of all files in a folder, relative to it, sorted; hidden ones are no data."""
    files, visited = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(where))
        folders[:] = [
            name for name in folders
            if not name.startswith((".", "__"))
            and os.path.realpath(os.path.join(where, name)) not in visited
        ]  # fmt: skip
        paths = [Path(where, name) for name in names if not name.startswith(".")]
        files += [path.relative_to(folder).as_posix() for path in paths]
    return sorted(files)


def files_of_split(files, split, only_folders):
    """Those of some relative paths that belong to a split; without any split word, all are train.

    Names of folders decide, and names of files if no folder's does and not `only_folders`."""

    def has(text, words):
        return re.search(rf"(^|[-._ 0-9/])({'|'.join(map(re.escape, words))})([-._ 0-9/]|$)", text)

    all_words = [split, *itertools.chain(*SPLIT_WORDS.values())]
    parts = {file: os.path.dirname(file) for file in files}
    if not only_folders and not any(has(part, all_words) for part in parts.values()):
        parts = {file: os.path.basename(file) for file in files}
    chosen = [file for file in files if has(parts[file], SPLIT_WORDS.get(split, [split]))]
    if not chosen and split == "train":
        chosen = [file for file in files if not has(parts[file], all_words)]
    return chosen


def key_of(name, columns=()):
    """("shard/0001", "jpg") of "shard/0001.jpg": the row that a file belongs to, and its column."""
    folder, slash, base = name.rpartition("/")
    stem, _, column = base.partition(".")
    if "." in column and column.lower() not in columns:
        column = column.partition(".")[0]  # "0001.src_img.jpg"
        if column.lower() not in columns:
            stem, _, column = base.rpartition(".")  # "a.big.boat.jpg"
    return folder + slash + stem, column.lower()


def shards_of(files, split="", root=""):
    """Ways to read some files, the likeliest first: lists of shards, each a list of paths.

    With a split, the files are relative to `root`, and their names tell splits."""

    def choose(suffixes, only_folders=False):
        chosen = [file for file in files if file.lower().endswith(suffixes)]
        if split:
            chosen = files_of_split(chosen, split, only_folders)
        return [os.path.join(root, file) for file in chosen]

    images = choose(tuple(f".{suffix}" for suffix in IMAGES), only_folders=True)
    captions = choose((".txt", ".caption", ".json"), only_folders=True)
    beside = [list(group) for _, group in itertools.groupby(
        sorted(images + captions, key=key_of), key=lambda path: key_of(path)[0])]  # fmt: skip
    beside = [group for group in beside if set(group) & set(images)]
    chunks = [beside[i : i + FOLDER_SHARD] for i in range(0, len(beside), FOLDER_SHARD)]
    ways = [
        [[path] for path in choose((".tar", ".tar.gz", ".tgz"))],
        [[path] for path in choose((".parquet", ".arrow"))],
        [[path] for path in choose(("metadata.jsonl", "metadata.csv"))],
        [list(itertools.chain(*chunk)) for chunk in chunks],
        [[path] for path in choose((".jsonl", ".json", ".csv", ".tsv"))],
    ]
    return [shards for shards in ways if shards]


def find_shards(name):
    """(ways to read a dataset as from `shards_of`, the folder, number of rows or None)."""
    path, config, split = split_name(name)
    if os.path.isfile(path):
        return shards_of([path]), os.path.dirname(path), None
    readme = Path(path, "README.md")
    is_described = readme.exists() and "\nconfigs:" in readme.read_text(errors="replace")
    if os.path.isdir(path) and not is_described:
        folder = os.path.join(path, config or "")
        return shards_of(visible_files(folder), split, folder), folder, None

    builder = load_dataset_builder(path, config)
    files, rows = builder.config.data_files, None
    if files is None:  # offline: what load_dataset has left in its cache
        dataset = load_dataset(path, config, split=split)
        return [[[file["filename"]] for file in dataset.cache_files]], "", len(dataset)
    if split not in files:
        names = ", ".join(map(str, files))
        raise OSError(f"it has no split {split}; its splits are {names}: write NAME@SPLIT")
    if split in (builder.info.splits or {}):
        rows = builder.info.splits[split].num_examples
    return shards_of(sorted(map(str, files[split]))), builder.base_path or "", rows


# ---- From files to rows ----------------------------------------------------------------------


def opened(path):
    """A file or a remote file, open to read bytes."""
    if "://" in path:
        return fsspec.open(path, "rb").open()
    return open(path, "rb")


def read_tar(path):
    """(name, bytes) of each file in a tar; raises if it is damaged or cut off."""
    mode = "r:" if path.endswith(".tar") else "r|*"
    with opened(path) as file, tarfile.open(fileobj=file, mode=mode) as tar:
        for member in tar:
            if member.isfile() and not os.path.basename(member.name).startswith("."):
                yield member.name, {"bytes": tar.extractfile(member).read(), "path": None}

        if mode == "r:":  # tarfile takes a damaged header for the end, which is a block of zeros
            file.seek(tar.offset)
            if any(file.read(512)) or file.seek(0, 2) < tar.offset + 512:
                raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")


def grouped(files, columns):
    """(key, {column: file}) of each group of adjacent files with one key."""
    parts = ((*key_of(name, columns), value) for name, value in files)
    for key, group in itertools.groupby(parts, key=lambda part: part[0]):
        yield key, {column: value for _, column, value in group}


def parse_json(text):
    """JSON, with its numbers as they are written; an error if it is none."""
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except Exception as error:  # also RecursionError
        return error


def read_table(path, columns):
    """The rows of a parquet, arrow, JSON, CSV or TSV file as dicts; all columns are keys."""
    suffix = path.lower().rpartition(".")[2]
    with opened(path) as file:
        if suffix == "parquet":
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            used = [name for name in names if name.lower() in columns]
            for batch in table.iter_batches(64, columns=used):
                for row in batch.to_pylist():
                    yield dict.fromkeys(names) | row
        elif suffix == "arrow":
            magic = file.read(6)
            file.seek(0)
            if magic == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = pa.ipc.open_stream(file)
            for batch in batches:
                for start in range(0, len(batch), 64):
                    yield from batch.slice(start, 64).to_pylist()
        elif suffix in ("csv", "tsv"):
            csv.field_size_limit(2**31 - 1)
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            yield from csv.DictReader(text, delimiter={"csv": ",", "tsv": "\t"}[suffix])
        elif file.read(64).lstrip(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            file.seek(0)
            rows = parse_json(file.read().decode("utf-8-sig"))
            if isinstance(rows, Exception):
                raise rows
            yield from rows
        else:
            file.seek(0)
            for line in file:
                if line.strip():
                    yield parse_json(line.removeprefix(b"\xef\xbb\xbf"))


def entries(value):
    """The entries of a list, or a single value, that are not empty."""
    values = value if isinstance(value, list) else [value]
    found = []
    for x in values:
        if isinstance(x, dict) and x.keys() & {"bytes", "path"}:
            is_empty = not x.get("bytes") and not x.get("path")
        elif isinstance(x, str | bytes):
            is_empty = not x or x.isspace()
        else:
            is_empty = x is None or x != x or x == {}
        if not is_empty:
            found.append(x)
    return found


def bytes_of(image):
    """The bytes of {"bytes": ..., "path": ...}, from its file if need be."""
    if image.get("bytes"):
        return image["bytes"]
    with opened(image["path"]) as file:
        return file.read()


def text_of(value):
    """A caption as it is written; raises ValueError if it is none."""
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        value = bytes_of(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig")
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, dict | list):
        raise ValueError(f"a caption that is a {type(value).__name__}, not text")
    value = str(value).strip()
    value.encode()  # raises on half a surrogate pair, which no tokenizer takes
    if not value:
        raise ValueError("an empty caption")
    return value


class Source:
    """A dataset whose shards can be read one by one. Small and picklable, for loader workers.

    columns: {role: a column's name, or "" for the known ones}. Raises InputError if none of the
    first rows has them."""

    def __init__(self, name, columns, roles):
        self.name, self.roles = name, roles
        self.columns = {role: COLUMNS[role] for role in roles}
        for role in roles:
            if columns.get(role):
                self.columns[role] = (columns[role].lower(),)
        known = [column for names in self.columns.values() for column in names]
        self.known = {x + end for x in known for end in ("", "_file_name", "_file_names")} | {"json"}

        try:
            ways, self.folder, self.num_rows = find_shards(name)
            if not ways:
                raise OSError("there is no data in it")
        except Exception as error:
            advice = "name a hub id, or a folder of tars, parquet files or images with captions"
            raise InputError(f"cannot read --data {name} ({reason_of(error)}): {advice}.") from None

        reasons = []
        for self.shards in ways:
            rows = itertools.chain.from_iterable(map(self.read, range(len(self.shards))))
            for row in itertools.islice(rows, PEEK):
                if not row["error"]:
                    return
                reasons.append(f"first {row['name']}: {row['error']}")
        reason = (reasons or ["it has no rows"])[0]
        raise InputError(f"--data {name} has no usable row; {reason}.")

    def read(self, number):
        """The rows of a shard, as FEATURES. If it cannot be read on, the last one says why."""
        read, error = 0, None
        for wait in (*RETRY_SECONDS, None):
            try:
                for name, raw in itertools.islice(self.read_raw(self.shards[number]), read, None):
                    read += 1
                    yield self.standardize(name, raw)
                return
            except CONNECTION_ERRORS as lost:
                error = lost
                if wait is not None:
                    time.sleep(wait)
            except Exception as damage:
                error = damage
                break
        shard = os.path.relpath(self.shards[number][0], self.folder or None)
        yield empty_row(shard, f"{UNREADABLE} after {read} rows ({reason_of(error)})")

    def read_all(self):
        for number in range(len(self.shards)):
            yield from self.read(number)

    def read_raw(self, paths):
        """(name, {column: value}) of each row of a shard."""
        name = paths[0].removeprefix(self.folder).lstrip("/\\")
        suffix = paths[0].lower().rpartition(".")[2]
        if suffix in ("tar", "gz", "tgz"):
            for key, row in grouped(read_tar(paths[0]), self.known):
                yield f"{name}/{key}", row
        elif len(paths) == 1 and suffix in TABLES:
            for number, row in enumerate(read_table(paths[0], self.known)):
                yield f"{name} row {number}", row
        else:
            files = ((path, {"bytes": None, "path": path}) for path in paths)
            for key, row in grouped(files, self.known):
                yield key.removeprefix(self.folder).lstrip("/\\"), row

    def standardize(self, name, raw):
        """A row of FEATURES; its "error" says why it cannot be used."""
        row = empty_row(name)
        try:
            if isinstance(raw, Exception):
                raise raw
            if None in raw:  # csv's key for fields beyond the last column
                raise ValueError("more fields than columns: quote captions that have commas")
            values = lower(raw)
            if "json" in values and not all(self.find(values, role) for role in self.roles):
                inside = values["json"]
                if isinstance(inside, dict) and inside.keys() & {"bytes", "path"}:
                    inside = parse_json(bytes_of(inside))
                if isinstance(inside, dict):
                    values = lower(inside) | values

            base = os.path.join(self.folder, os.path.dirname(name))
            for role, names in self.columns.items():
                found = self.find(values, role)
                if not found and not values.keys() & set(names):
                    have = f"its columns are {', '.join(map(str, raw))}"
                    fix = f"name one with --{role}-column"
                    raise ValueError(f"no column {' or '.join(names)}; {have}: {fix}")
                if not found and role != "sources":
                    raise ValueError({"text": "an empty caption", "target": "no image"}[role])
                if role == "text":
                    row["text"] = text_of(found[0])
                elif role == "target":
                    row["target"] = self.image_of(found[0], base)
                else:
                    row["sources"] = [self.image_of(x, base) for x in found]
        except Exception as error:
            row["error"] = reason_of(error)
        return row

    def find(self, values, role):
        """The entries of the first column of a role that is not empty."""
        for column in self.columns[role]:
            if found := entries(values.get(column)):
                # OmniEdit's last prompt is the shortest (§5.3)
                return found[::-1] if column == "edited_prompt_list" else found
        return []

    def image_of(self, value, base):
        """{"bytes": ..., "path": ...} of an image in any usual form, not decoded."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        if not isinstance(value, str):
            raise ValueError(f"an image that is a {type(value).__name__}")
        if value.startswith(("http:", "https:")):
            raise ValueError("the URL of an image: download the images first")
        if len(value) > 100 and "." not in value:
            return {"bytes": base64.b64decode(value.rpartition(",")[2]), "path": None}
        paths = [os.path.join(folder, value.replace("\\", "/")) for folder in (base, self.folder)]
        return {"bytes": None, "path": next(filter(os.path.exists, paths), paths[0])}


def lower(row):
    """A row with column names as COLUMNS has them."""
    names = {name: str(name).lower() for name in row}
    ends = ("_file_names", "_file_name")
    return {names[n].removesuffix(ends[0]).removesuffix(ends[1]): x for n, x in row.items()}


def empty_row(name, error=""):
    return {"name": name, "error": error, "text": "", "sources": [],
            "target": {"bytes": None, "path": None}}  # fmt: skip


def reason_of(error):
    """The first line of an error's message."""
    lines = re.sub(r" <_io[^>]*>", "", str(error)).strip().splitlines() or [repr(error)]
    return lines[0][:300]


def decode(image):
    """A stored image as upright RGB, PIL."""
    return to_rgb(Image.open(io.BytesIO(bytes_of(image))))


def read_row(row, stage, index, seed):
    """(prompt, source images, target image) of a row for a stage; raises if it is broken."""
    if row["error"]:
        raise ValueError(row["error"])
    target = decode(row["target"])
    coin = random.Random(f"{seed} {index}").random()
    if stage == "reconstruct" or stage == "mix" and coin < 0.5:
        return "", [target], target
    if stage in ("edit", "instruct") and not 1 <= len(row["sources"]) <= MAX_IMAGES:
        raise ValueError(f"{len(row['sources'])} source images")
    return row["text"], [decode(image) for image in row["sources"]], target


# ---- In which order --------------------------------------------------------------------------


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
        for other in random.Random(f"{self.seed} {index}").sample(others, min(len(others), PEEK)):
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
        shares = [deal(list(group), reader, readers) for _, group in groups]
        streams.append([latest, list(itertools.chain.from_iterable(shares))])
    return {"reader": reader, "readers": readers, "taken": reader, "streams": streams}


def open_sources(data, stage, columns, streaming, seed):
    """([Source or OnDisk of each dataset], [their weights]) of --data; raises InputError.

    columns: {role: a column's name, or names of each dataset in turn with commas between}.
    Without any weight, datasets are mixed by their numbers of rows, as by the paper's authors."""
    parts = parse_data(data)
    sources, sizes = [], []
    for number, (name, _) in enumerate(parts):
        names = {}
        for role, given in columns.items():
            each = given.split(",")
            if len(each) not in (1, len(parts)):
                count = f"{len(each)} names for {len(parts)} datasets"
                raise InputError(f"--{role}-column {given}: {count}: give one, or one for each.")
            names[role] = each[number % len(each)]
        source = Source(name, names, ROLES.get(stage, ("text", "target")))
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
