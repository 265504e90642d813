"""Web documents of pictures and texts: read them, download their pictures, drop what is unusable.

A document is a list of pictures, each with a caption. Read are mmc4's shards (.jsonl, also zipped
or gzipped), and any dataset with a list of pictures and a list of captions in each row.
"""

import gzip
import io
import json
import sys
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from datasets import load_dataset
from PIL import Image
from tqdm import tqdm

from extras.curation.download import Downloader, Dropped
from metaquery import InputError, to_rgb

# What reading a damaged archive raises.
DAMAGE = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, IndexError)
SHARDS = ("*.jsonl", "*.jsonl.zip", "*.jsonl.gz")
COLUMNS = {"images": ("images", "pictures"), "captions": ("captions", "texts")}
MAX_LINE = 16 * 2**20  # bytes of a shard's line; a longer one is read as several broken ones
MAX_LISTED = 100  # pictures of a document
MAX_NAMED = 5  # broken documents of a block that are named on stderr; all are counted
MAX_CAPTION = 1000  # characters
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # what a file is, whatever its name says
MAX_PIXELS = 50_000_000
MAX_ASPECT = 4  # long side over short side
THUMBNAIL = 16  # pixels a side of the pictures by which near-duplicates are found
DUPLICATE = 2.0  # levels of 255 that the thumbnails of near-duplicates differ by on average


class Block(NamedTuple):
    """Documents that are read, curated and saved together."""

    name: str  # in the names of its files
    source: object  # a shard's path, or a dataset
    offset: int  # where it begins: bytes in the shard
    first: int  # lines or rows before it
    count: int  # its lines or rows


class Listed(NamedTuple):
    """A picture as its document lists it, not read yet."""

    where: object  # a URL, a path below the folder of pictures, or {"bytes": ..., "path": ...}
    caption: str


class Document(NamedTuple):
    """The usable pictures of a document, PIL, RGB, and their captions."""

    pictures: list
    captions: list


# ---- 1. Documents --------------------------------------------------------------------------------


@contextmanager
def open_lines(path):
    """A shard as a binary file of lines, unpacked if it is a .zip or .gz file."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
            yield file
    elif path.suffix == ".gz":
        with gzip.open(path) as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


def shard_blocks(path, name, size):
    """The blocks of `size` lines of a shard; a damaged one ends where it cannot be read on."""
    offset, offsets, number = 0, [], 0
    try:
        with open_lines(path) as file:
            while line := file.readline(MAX_LINE):
                if number % size == 0:
                    offsets.append(offset)
                offset += len(line)
                number += 1
    except DAMAGE as error:
        print(f"{path} cannot be read after line {number} ({error})", file=sys.stderr)
    blocks = []
    for i, start in enumerate(offsets):
        lines = min(size, number - i * size)
        blocks.append(Block(f"{quote(name, safe='')}-{i:06d}", path, start, i * size, lines))
    return blocks


def open_blocks(data, size, columns):
    """All blocks of --data: mmc4's shard, a folder of them, or a dataset's hub id, folder or file.

    columns: {"images" or "captions": a dataset's column, or "" to look for a known one}. Raises
    InputError if there is nothing to read.
    """
    path = Path(data)
    files = [path] if path.is_file() else [f for p in SHARDS for f in sorted(path.rglob(p))]
    shards = [file for file in files if any(file.match(pattern) for pattern in SHARDS)]

    if shards:
        root = path if path.is_dir() else path.parent
        names = [str(shard.relative_to(root)) for shard in shards]
        pairs = sorted(zip(names, shards, strict=True))
        blocks = [block for name, shard in pairs for block in shard_blocks(shard, name, size)]
    else:
        dataset = select_columns(open_dataset(data), data, columns)
        starts = range(0, len(dataset), size)
        rows = [min(size, len(dataset) - start) for start in starts]
        parts = enumerate(zip(starts, rows, strict=True))
        blocks = [Block(f"rows-{i:06d}", dataset, 0, start, n) for i, (start, n) in parts]
    if not blocks:
        raise InputError(f"--data {data} holds no documents: check it, or name another.")
    return blocks


def open_dataset(name):
    """A dataset by hub id, parquet file, or folder of parquet files. Raises InputError."""
    path = Path(name)
    files = [str(file) for file in sorted(path.rglob("*.parquet"))]
    if path.is_file():
        files = [name]
    try:
        if not path.exists():
            return load_dataset(name, split="train")
        return load_dataset("parquet", data_files=files, split="train")
    except Exception as error:  # each layout raises its own
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        fix = "name mmc4 shards, parquet files or a hub id"
        raise InputError(f"cannot read --data {name} ({reason}): {fix}.") from None


def select_columns(dataset, name, columns):
    """A dataset with the columns "images", not decoded, and "captions"; raises InputError."""
    for role, known in COLUMNS.items():
        wanted = (columns[role],) if columns[role] else known
        found = [column for column in wanted if column in dataset.column_names]
        if not found:
            raise InputError(
                f"--data {name} has no column {' or '.join(wanted)}; its columns are "
                f"{', '.join(dataset.column_names)}: name one with --{role}-column."
            )
        if found[0] != role:
            dataset = dataset.rename_column(found[0], role)
    dataset = dataset.select_columns(list(COLUMNS))
    feature = dataset.features["images"]
    if hasattr(getattr(feature, "feature", None), "decode"):  # a list of pictures
        pictures = type(feature.feature)(decode=False)
        dataset = dataset.cast_column("images", type(feature)(pictures))
    return dataset


def rows_of(block):
    """(number, row) of a block's documents, from 1; a row is a line's bytes, or a dict."""
    if not isinstance(block.source, Path):
        rows = block.source.select(range(block.first, block.first + block.count))
        yield from enumerate(rows, block.first + 1)
        return
    with open_lines(block.source) as file, suppress(*DAMAGE):  # `shard_blocks` has reported it
        file.seek(block.offset)
        for number in range(block.first + 1, block.first + block.count + 1):
            yield number, file.readline(MAX_LINE)


def fold(text):
    """A text in one line of at most MAX_CAPTION characters, cut at a space; only valid Unicode."""
    text = " ".join(text.encode(errors="ignore").decode().split())
    return text if len(text) <= MAX_CAPTION else text[: MAX_CAPTION + 1].rpartition(" ")[0]


def list_pictures(row, images):
    """[`Listed`, or None for an entry without picture or caption] of a document.

    row: a line of an mmc4 shard, or {"images": [...], "captions": [...]}. images: the folder where
    pictures lie that mmc4 names by `image_name`. Raises an exception if the row is broken.
    """
    if isinstance(row, bytes):
        row = json.loads(row)
        texts, entries = row["text_list"], []
        for info in row["image_info"]:
            name = info.get("image_name")
            on_disk = isinstance(name, str) and is_file_below(images, name)
            index = info.get("matched_text_index")
            has_text = isinstance(index, int) and 0 <= index < len(texts)
            caption = texts[index] if has_text else None
            entries.append((name if on_disk else info.get("raw_url"), caption))
    else:
        entries = zip(row["images"], row["captions"], strict=True)

    listed = []
    for where, caption in entries:
        caption = fold(caption) if isinstance(caption, str) else ""
        listed.append(Listed(where, caption) if where and caption else None)
    return listed


# ---- 2. Pictures ---------------------------------------------------------------------------------


def is_file_below(folder, name):
    """Whether a folder holds a file of this name: it may not lead out of the folder."""
    try:
        path = (folder / name).resolve()
        return path.is_relative_to(folder.resolve()) and path.is_file()
    except (OSError, ValueError):
        return False


def read_bytes(where, images, downloader):
    """The bytes of a listed picture; raises Dropped."""
    if isinstance(where, dict):
        if where.get("bytes"):
            return where["bytes"]
        where = where.get("path")
    elif isinstance(where, str) and not where.lower().startswith(("http://", "https://")):
        if not is_file_below(images, where):
            raise Dropped("missing file")
        where = images / where

    if isinstance(where, str) and where.lower().startswith(("http://", "https://")):
        return downloader.get(where)
    if not isinstance(where, str | Path):
        raise Dropped("bad address")
    try:
        with open(where, "rb") as file:
            data = file.read(downloader.max_bytes + 1)
    except (OSError, ValueError):
        raise Dropped("missing file") from None
    if len(data) > downloader.max_bytes:
        raise Dropped("too large")
    return data


def decode(data, min_size, resolution):
    """A picture file's bytes as a PIL image, RGB, its short side at most `resolution` pixels.

    Its size is checked before it is decoded. Raises Dropped.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if min(picture.size) < min_size:
            raise Dropped("too small")
        if picture.width * picture.height > MAX_PIXELS:
            raise Dropped("too many pixels")
        if max(picture.size) > MAX_ASPECT * min(picture.size):
            raise Dropped("too long")
        picture.draft("RGB", (2 * resolution, 2 * resolution))  # a JPEG is decoded smaller

        picture.load()
        picture = to_rgb(picture)
        scale = min(1, resolution / min(picture.size))
        size = [round(side * scale) for side in picture.size]
        return picture.resize(size, Image.Resampling.LANCZOS)
    except Dropped:
        raise
    except Image.DecompressionBombError:
        raise Dropped("too many pixels") from None
    except Exception:  # each decoder raises its own
        raise Dropped("broken picture") from None


def duplicates(pictures):
    """The indices of pictures that nearly equal one before them."""
    seen, found = [], set()
    for i, picture in enumerate(pictures):
        small = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        small = np.asarray(small, np.float32)
        if any(np.abs(small - other).mean() < DUPLICATE for other in seen):
            found.add(i)
        else:
            seen.append(small)
    return found


def read_documents(block, args):
    """([`Document`], counts, dropped pictures by cause) of a block: what curation starts from."""
    images = Path(args.images or args.data)
    if images.is_file():
        images = images.parent
    counts, dropped, documents = Counter(), Counter(), []
    for number, row in rows_of(block):
        try:
            listed = list_pictures(row, images)
        except Exception as error:  # whatever a broken row makes of Python's types
            counts["broken_documents"] += 1
            if counts["broken_documents"] <= MAX_NAMED:
                reason = (f"{type(error).__name__}: {error}").splitlines()[0][:80]
                place = f"{block.source} line" if isinstance(block.source, Path) else "row"
                tqdm.write(f"skipped {place} {number}: it is broken ({reason})", sys.stderr)
            continue
        counts["documents"] += 1
        counts["pictures"] += len(listed)
        counts["documents_without_pictures"] += not listed
        dropped["no caption or address"] += listed.count(None)
        listed = [entry for entry in listed if entry]
        dropped[f"after the first {MAX_LISTED}"] += len(listed[MAX_LISTED:])
        documents.append(listed[:MAX_LISTED])
    downloader = Downloader(
        args.timeout,
        args.max_megabytes * 10**6,
        args.retries,
        args.pause,
        args.allow_private_addresses,
    )

    def load(entry):
        try:
            data = read_bytes(entry.where, images, downloader)
            return decode(data, args.min_size, args.resolution)
        except Dropped as error:
            return error

    entries = [entry for listed in documents for entry in listed]
    with ThreadPoolExecutor(args.connections) as pool:
        bar = tqdm(pool.map(load, entries), "pictures", len(entries), leave=False, disable=None)
        loaded = iter(list(bar))
    usable = []
    for listed in documents:
        pairs = []
        for entry in listed:
            picture = next(loaded)
            if isinstance(picture, Dropped):
                dropped[str(picture)] += 1
            else:
                pairs.append((picture, entry.caption))
        twice = duplicates([picture for picture, _ in pairs])
        dropped["near-duplicate"] += len(twice)
        kept = [pair for i, pair in enumerate(pairs) if i not in twice]
        usable.append(Document([p for p, _ in kept], [caption for _, caption in kept]))
    return usable, dict(counts), dict(+dropped)
