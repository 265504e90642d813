"""Datasets by hub id, folder or file, as rows of one schema: text, target image, source images.

Reads webdataset tars (cc12m-wds), parquet and arrow files, JSON and CSV tables that name image
files, and folders of images with captions beside them. `datasets` says which files a hub id has.
Nothing ends a run here: what cannot be used, a row, a damaged file or a lost connection, becomes a
row with an "error", which the reader counts and names. Images are decoded when they are used.
"""

import base64
import csv
import glob
import io
import itertools
import json
import math
import os
import re
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value, load_dataset, load_dataset_builder
from PIL import Image

from metaquery import MAX_IMAGES, InputError, to_rgb

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")
TABLES = ("parquet", "arrow", "jsonl", "json", "csv", "tsv")
# Known names of each column, in lower case; train.py's flags name others.
COLUMNS = {
    "text": ("txt", "text", "caption", "prompt", "edited_prompt_list", "instruction",
             "edit_prompt", "captions", "description", "title"),
    "target": (*IMAGES, "image", "edited_img", "edited_image", "target_image", "target_img", "img",
               "file_name", "filename", "filepath", "file_path", "image_path", "path"),
    "sources": ("src_img", "source_images", "source_image", "source_img", "original_image"),
}  # fmt: skip
# The words in names of folders and files by which `datasets` tells splits.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
NETWORK = {"httpx", "httpx2", "requests", "urllib3", "aiohttp", "huggingface_hub"}
RETRY_SECONDS = (1, 5, 30)  # how long to wait before each new try
UNREADABLE = "unreadable shard"  # how the error of a whole shard begins
GROUP = 1000  # rows of a shard that are shuffled together when streaming
PEEK = 1000  # rows in which one must have the columns
FOLDER_SHARD = 100  # images of a folder that are one shard

IMAGE = {"bytes": Value("large_binary"), "path": Value("string")}
FEATURES = Features(name=Value("string"), error=Value("string"), text=Value("string"),
                    target=IMAGE, sources=List(IMAGE))  # fmt: skip

EMPTY = {"error": "", "text": "", "target": {}, "sources": []}


# ---- Which files -----------------------------------------------------------------------------


def parse_data(spec):
    """[(name, weight or None)] of --data, "NAME,NAME=WEIGHT,..."; raises InputError.

    A name is a folder, a file or a hub id, with or without ":CONFIG" and "@SPLIT"."""
    if os.path.exists(spec):
        return [(spec, None)]
    parts = []

    for part in spec.split(","):
        name, weight = part, None
        if "=" in part and not os.path.exists(part):
            name, _, weight = part.rpartition("=")
            try:
                weight = float(weight)
            except ValueError:
                weight = math.nan
        if not name or weight is not None and not 0 < weight < math.inf:
            fix = "write NAME or NAME=WEIGHT with a weight above 0"
            raise InputError(f"--data {spec}: {part!r} is not clear: {fix}.")
        parts.append((name, weight))
    if len(parts) > 1 and "toy" in [name for name, _ in parts]:
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


def files_of_split(files, split, only_folders):
    """Those of some relative paths that belong to a split; without any split word, all are train.

    Names of folders decide, and names of files if no folder's does and not `only_folders`."""

    def has(text, words):
        word = "|".join(map(re.escape, words))
        return re.search(rf"(^|[-._ 0-9/])({word})([-._ 0-9/]|$)", text, re.IGNORECASE)

    all_words = [split, *itertools.chain(*SPLIT_WORDS.values())]
    parts = {file: os.path.dirname(file) for file in files}
    if not only_folders and not any(has(part, all_words) for part in parts.values()):
        parts = {file: os.path.basename(file) for file in files}
    chosen = [file for file in files if has(parts[file], SPLIT_WORDS.get(split, [split]))]
    if not chosen and split == "train":
        chosen = [file for file in files if not has(parts[file], all_words)]
    return chosen


def key_of(name, columns=()):
    """("x/0001", "jpg") of the file "x/0001.jpg": its row's name, and its column."""
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

    def choose(*suffixes, only_folders=False):
        chosen = [file for file in files if file.lower().endswith(suffixes)]
        if split:
            chosen = files_of_split(chosen, split, only_folders)
        return [os.path.join(root, file) for file in chosen]

    images = set(choose(*(f".{suffix}" for suffix in IMAGES), only_folders=True))
    beside = choose(".txt", ".caption", ".json", only_folders=True)
    groups = itertools.groupby(sorted([*images, *beside], key=key_of), lambda path: key_of(path)[0])
    groups = [paths for _, group in groups if images.intersection(paths := list(group))]
    folders = range(0, len(groups), FOLDER_SHARD)
    ways = [
        [[path] for path in choose(".tar", ".tar.gz", ".tgz")],
        [[path] for path in choose(".parquet", ".arrow")],
        [[path] for path in choose("metadata.jsonl", "metadata.csv")],
        [list(itertools.chain(*groups[first : first + FOLDER_SHARD])) for first in folders],
        [[path] for path in choose(".jsonl", ".json", ".csv", ".tsv")],
    ]
    return [shards for shards in ways if shards]


def find_shards(name):
    """(ways to read a dataset as from `shards_of`, its folder, number of rows or None)."""
    path, config, split = split_name(name)
    if os.path.isfile(path):
        return shards_of([path]), os.path.dirname(path), None
    readme = Path(path, "README.md")
    is_described = readme.exists() and "\nconfigs:" in readme.read_text(errors="replace")
    if os.path.isdir(path) and not is_described:
        folder = os.path.join(path, config or "")
        files = glob.glob("**", root_dir=folder, recursive=True)  # without hidden ones
        files = sorted(Path(file).as_posix() for file in files)
        first = {}  # a folder that is linked to itself is read once
        for parent in sorted(map(os.path.dirname, files), key=len):
            first.setdefault(os.path.realpath(os.path.join(folder, parent)), parent)
        parents = set(first.values())
        files = [file for file in files if os.path.dirname(file) in parents]
        return shards_of(files, split, folder), folder, None

    builder = load_dataset_builder(path, config)
    files, sizes = builder.config.data_files, builder.info.splits or {}
    if files is None:  # offline: what load_dataset has left in its cache
        dataset = load_dataset(path, config, split=split)
        return [[[file["filename"]] for file in dataset.cache_files]], "", len(dataset)
    if split not in files:
        names = ", ".join(map(str, files))
        raise OSError(f"it has no split {split}; its splits are {names}: write NAME@SPLIT")
    rows = sizes[split].num_examples if split in sizes else None
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
        members, damage = tar, None
        if mode == "r:" and "://" not in path:  # images may lie apart from their captions
            members = []
            try:
                members.extend(tar)
            except tarfile.TarError as error:
                damage = error
            members.sort(key=lambda member: key_of(member.name)[0])
        for member in members:
            if member.isfile() and not os.path.basename(member.name).startswith("."):
                yield member.name, {"bytes": tar.extractfile(member).read()}

        if mode == "r:":  # tarfile takes a damaged header for the end, which is a block of zeros
            file.seek(tar.offset)
            if damage or file.read(512) != bytes(512):
                raise damage or tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")


def grouped(files, columns):
    """(key, {column: file}) of each group of adjacent files with one key."""
    key, group = None, {}
    try:
        for name, value in files:
            found, column = key_of(name, columns)
            if found != key and group:
                yield key, group
                group = {}
            key = found
            group[column] = value
    except Exception as error:
        if group and not is_lost(error):  # otherwise the group is read again
            yield key, group
        raise
    if group:
        yield key, group


def is_lost(error):
    """Whether an error is a lost connection's, of whichever library."""
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(libraries & NETWORK)


def parse_json(text):
    """JSON, its numbers as they are written; an exception if it is none."""
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
            for batch in table.iter_batches(64, columns=used, use_threads=False):
                yield from (dict.fromkeys(names) | row for row in batch.to_pylist())
        elif suffix == "arrow":
            start = file.read(6)
            file.seek(0)
            if start == b"ARROW1":
                table = pa.ipc.open_file(file)
                batches = map(table.get_batch, range(table.num_record_batches))
            else:
                batches = pa.ipc.open_stream(file)
            for batch in batches:
                for row in range(0, len(batch), 64):
                    yield from batch.slice(row, 64).to_pylist()
        elif suffix in ("csv", "tsv"):
            csv.field_size_limit(2**31 - 1)
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            header = re.sub('"[^"]*"', "", text.readline())
            text.seek(0)
            delimiter = max(",;\t", key=header.count)
            yield from csv.DictReader(text, delimiter=delimiter, skipinitialspace=True)
        else:
            lines = (line.removeprefix(b"\xef\xbb\xbf") for line in file)
            lines = (line for line in lines if line.strip())
            first = next(lines, b"")
            if not first.lstrip().startswith(b"["):
                yield from map(parse_json, itertools.chain([first] if first else [], lines))
            elif isinstance(rows := parse_json(first + b"".join(lines)), list):
                yield from rows
            else:
                raise rows


def entries(value):
    """The entries of a list, or a single value, that are not empty."""
    found = []
    for x in value if isinstance(value, list) else [value]:
        is_empty = x is None or x != x or x in ({}, "", b"")
        if isinstance(x, str | bytes):
            is_empty = is_empty or x.isspace()
        elif is_file(x):
            is_empty = not x.get("bytes") and not x.get("path")
        if not is_empty:
            found.append(x)
    return found


def is_file(value):
    return isinstance(value, dict) and bool(value.keys() & {"bytes", "path"})


def bytes_of(image):
    """The bytes of {"bytes": ..., "path": ...}, from its file if need be."""
    if image.get("bytes"):
        return image["bytes"]
    with opened(image["path"]) as file:
        return file.read()


def decode(image):
    """A stored image as upright RGB, PIL."""
    return to_rgb(Image.open(io.BytesIO(bytes_of(image))))


def text_of(value):
    """A caption as it is written; raises ValueError if it is none."""
    if is_file(value):
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


def lower(row):
    """A row with column names as COLUMNS has them."""
    return {re.sub("_file_names?$", "", str(name).lower()): x for name, x in row.items()}


def reason_of(error):
    """The first line of an error's message."""
    lines = re.sub(r" <_io[^>]*>", "", str(error)).strip().splitlines() or [repr(error)]
    return lines[0][:300]


class Source:
    """A dataset whose shards can be read one by one. Small and picklable, for loader workers.

    columns: {role: a column's name, or "" for the known ones} of the roles that a stage reads.
    Raises InputError if none of the first rows has them."""

    def __init__(self, name, columns):
        self.name = name
        self.columns = {
            role: (column.lower(),) if column else COLUMNS[role] for role, column in columns.items()
        }
        known = itertools.chain(*self.columns.values())
        ends = ("", "_file_name", "_file_names")
        self.known = {"json", *(column + end for column in known for end in ends)}
        try:
            ways, self.folder, self.num_rows = find_shards(name)
            if not ways:
                raise OSError("there is no data in it")
        except Exception as error:
            advice = "name a hub id, or a folder of tars, parquet files or images with captions"
            raise InputError(f"cannot read --data {name} ({reason_of(error)}): {advice}.") from None

        reasons = {}  # the first of each way
        for self.shards in ways:
            for row in itertools.islice(self.read_all(), PEEK):
                if not row["error"]:
                    return
                reasons.setdefault(self.shards[0][0], f"first {row['name']}: {row['error']}")
        reason = "; ".join(reasons.values()) or "it has no rows"
        raise InputError(f"--data {name} has no usable row; {reason}.")

    def read_all(self):
        for number in range(len(self.shards)):
            yield from self.read(number)

    def read(self, number):
        """The rows of a shard, as FEATURES. If it cannot be read on, the last one says why."""
        read, paths = 0, self.shards[number]
        for wait in (*RETRY_SECONDS, None):
            try:
                for name, raw in itertools.islice(self.read_raw(paths), read, None):
                    read += 1
                    yield self.standardize(name, raw)
                return
            except Exception as caught:
                error = caught
                if wait is None or not is_lost(error):
                    break
                time.sleep(wait)

        reason = f"{UNREADABLE} after {read} rows ({reason_of(error)})"
        yield EMPTY | {"name": self.short(paths[0]), "error": reason}

    def shuffled(self, number, seed):
        """The rows of a shard in the order that a seed decides, within groups of GROUP rows."""
        rows = self.read(number)
        for count in itertools.count():
            group = list(itertools.islice(rows, GROUP))
            for place in np.random.default_rng((*seed, count)).permutation(len(group)):
                yield group[place]
            if len(group) < GROUP:
                return

    def row(self, row):
        return row

    @property
    def num_pieces(self):
        return len(self.shards)

    def short(self, path):
        return path.removeprefix(self.folder).lstrip("/\\")

    def read_raw(self, paths):
        """(name, {column: value}) of each row of a shard."""
        name, suffix = self.short(paths[0]), paths[0].lower().rpartition(".")[2]
        if suffix in ("tar", "gz", "tgz"):
            for key, row in grouped(read_tar(paths[0]), self.known):
                yield f"{name}/{key}", row
        elif len(paths) == 1 and suffix in TABLES:
            for number, row in enumerate(read_table(paths[0], self.known)):
                yield f"{name} row {number}", row
        else:
            for key, row in grouped(((path, {"path": path}) for path in paths), self.known):
                images = [column for column in row if column in IMAGES]  # 0.jpg and 0.png are two
                for column in images or [""]:
                    others = set(images) - {column}
                    yield self.short(key), {n: row[n] for n in row if n not in others}

    def standardize(self, name, raw):
        """A row of FEATURES; its "error" says why it cannot be used."""
        row = EMPTY | {"name": name}
        try:
            if isinstance(raw, Exception):
                raise raw
            if None in raw:  # csv's key for fields beyond the last column
                raise ValueError("more fields than columns: quote captions that have commas")
            values = lower(raw)
            if "json" in values and not all(self.find(values, role) for role in self.columns):
                inside = values["json"]
                if is_file(inside):
                    inside = parse_json(bytes_of(inside))
                if isinstance(inside, dict):
                    values = lower(inside) | values

            base = os.path.join(self.folder, os.path.dirname(name))
            for role, names in self.columns.items():
                found = self.find(values, role)
                if not found and not values.keys() & set(names):
                    missing = f"no {role} column"
                    if len(names) == 1:
                        missing = f"no column {names[0]}"
                    if "url" in values:
                        missing += ", only a URL: download the images first"
                    have = f"its columns are {', '.join(map(str, raw))}"
                    raise ValueError(f"{missing}; {have}: name one with --{role}-column")
                if not found and role != "sources":
                    raise ValueError({"text": "an empty caption", "target": "no image"}[role])
                if role == "text":
                    while isinstance(found[0], list):  # lists of lists
                        found = entries(found[0]) or [""]
                    row["text"] = text_of(found[0])
                elif role == "target" and len(found) > 1:
                    raise ValueError(f"{len(found)} target images")
                elif role == "target":
                    row["target"] = self.image_of(found[0], base)
                else:
                    row["sources"] = [self.image_of(image, base) for image in found]
                    if not 1 <= len(found) <= MAX_IMAGES:
                        raise ValueError(f"{len(found)} source images")
        except Exception as error:
            row["error"] = reason_of(error)
        return row

    def find(self, values, role):
        """The entries of the first column of a role that is not empty."""
        for column in self.columns[role]:
            found = entries(values.get(column))
            if column == "edited_prompt_list":  # OmniEdit's last prompt is the shortest (§5.3)
                found.reverse()
            if found:
                return found
        return []

    def image_of(self, value, base):
        """{"bytes": ..., "path": ...} of an image in any usual form, not decoded."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return {"bytes": value}
        if not isinstance(value, str):
            raise ValueError(f"an image that is a {type(value).__name__}")
        if value.startswith(("http:", "https:")):
            raise ValueError("the URL of an image: download the images first")
        if len(value) > 100 and "." not in value:
            return {"bytes": base64.b64decode(value.rpartition(",")[2])}
        if "://" in value:
            return {"path": value}
        paths = [os.path.join(folder, value.replace("\\", "/")) for folder in (base, self.folder)]
        return {"path": next(filter(os.path.exists, paths), paths[0])}
