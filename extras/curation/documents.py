"""Web documents of images and captions: read them, get their images, drop what is unusable.

A document is a line of an mmc4 shard. Nothing in it, and no server of its images, can end a run.
"""

import io
import ipaddress
import json
import socket
import textwrap
import threading
from collections import Counter
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path

import certifi
import pyarrow.parquet
import urllib3
from datasets import load_dataset
from PIL import Image

from cli import VERSION
from metaquery import InputError, to_rgb

SHARDS = (".jsonl", ".jsonl.gz", ".jsonl.zip")
MAX_LISTED = 100  # images of a document; those after them are left out
MAX_CAPTION = 1000  # characters

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # EPS, say, would run a program
MIN_SIDE = 256  # pixels of the short side
MAX_SIDE = 512  # pixels of the short side that are kept, as in MetaQuery-Instruct
MAX_PIXELS = 50_000_000
MAX_ASPECT = 4  # long side over short side

TIMEOUT = 20  # seconds to open a connection, and seconds until it is cut off
MAX_BYTES = 20_000_000  # of an image file
MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Dropped(Exception):
    """An image that is not used; its text is the cause, as counted in stats.json."""


# ---- 1. Documents ----------------------------------------------------------------


def open_documents(data):
    """The lines of an mmc4 shard, or of all in a folder: a dataset with the column "text".

    Raises InputError if there are none.
    """
    files = [Path(data), *sorted(Path(data).rglob("*"))]
    shards = [str(file) for file in files if file.is_file() and file.name.endswith(SHARDS)]
    try:
        if not shards:
            raise FileNotFoundError("there is no shard")
        # As lines: one that is broken, or has other fields, would end a JSON reader.
        return load_dataset("text", data_files=shards, split="train", encoding_errors="replace")
    except Exception as error:  # each kind of damage raises its own
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        fix = "name a shard of mmc4 (.jsonl, .jsonl.gz, .jsonl.zip) or a folder of them"
        raise InputError(f"cannot read --data {data} ({reason}): {fix}.") from None


def read_document(line, get):
    """(images, captions, counts of documents and of dropped images by cause) of a line.

    Images are PIL, RGB. get: the bytes of an image by its URL, such as `download`.
    """
    try:
        document = json.loads(line)
        texts = [textwrap.shorten(x, MAX_CAPTION, placeholder="") for x in document["text_list"]]
        " ".join(texts).encode()  # raises on half a surrogate pair, which no tokenizer takes
        texts = dict(enumerate(texts))
        infos = document["image_info"]
        listed = [(x.get("raw_url"), texts.get(x.get("matched_text_index"))) for x in infos]
    except Exception:  # whatever a broken line makes of Python's types
        return [], [], Counter({"broken documents": 1})

    images, captions = [], []
    counts = Counter({"documents": 1, "images": len(listed)})
    for url, caption in listed[:MAX_LISTED]:
        try:
            if not isinstance(url, str) or not caption:
                raise Dropped("no caption or address")
            images.append(decode(get(url)))
            captions.append(caption)
        except Dropped as dropped:
            counts[f"dropped: {dropped}"] += 1
    return images, captions, counts


# ---- 2. Images -------------------------------------------------------------------


def decode(data):
    """An image file's bytes as RGB, PIL, its short side at most MAX_SIDE pixels.

    Its size is checked before it is decoded. Raises Dropped.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        short, long = sorted(image.size)
        if short < MIN_SIDE or long > MAX_ASPECT * short or short * long > MAX_PIXELS:
            raise Dropped("too small, too long or too many pixels")

        image.draft("RGB", (2 * MAX_SIDE, 2 * MAX_SIDE))  # a JPEG is decoded smaller
        image = to_rgb(image)
        scale = min(1, MAX_SIDE / min(image.size))
        size = [round(side * scale) for side in image.size]
        return image.resize(size, Image.Resampling.LANCZOS)
    except Dropped:
        raise
    except Exception:  # each decoder raises its own
        raise Dropped("broken image") from None


def open_saved(folder):
    """A function as `download`, of the images that img2dataset saved in a folder.

    Raises InputError if it holds none.
    """
    paths = {}
    for table in sorted(Path(folder).rglob("*.parquet")):
        options = {"columns": ["url", "key"], "filters": [("status", "=", "success")]}
        for row in pyarrow.parquet.read_table(table, **options).to_pylist():
            paths[row["url"]] = table.with_suffix("") / f"{row['key']}.jpg"
    if not paths:
        raise InputError(f"--images {folder} holds no images of img2dataset: name another.")

    def get(url):
        try:
            return paths[url].read_bytes()
        except (KeyError, OSError):
            raise Dropped("not on disk") from None

    return get


# ---- 3. Downloads ----------------------------------------------------------------


def is_public(address):
    """Whether an IP address belongs to the public internet."""
    address = ipaddress.ip_address(address)
    if address in NAT64:  # an IPv4 address is inside
        address = ipaddress.ip_address(int(address) % 2**32)
    is_tunnel = getattr(address, "sixtofour", None)
    return address.is_global and not address.is_multicast and not is_tunnel


class Guard:
    """A connection to a public address only, which is cut off after TIMEOUT seconds.

    It asks for the address at its other end: no second look-up of a name can change it.
    """

    thread = threading.local()  # .stack: what to do when this thread's download has ended

    def _new_conn(self):
        sock = super()._new_conn()
        if not is_public(sock.getpeername()[0]):
            sock.close()
            raise Dropped("private address")

        # urllib3's timeout is that of each read: a server could send a byte now and then.
        twin = self.thread.stack.enter_context(sock.dup())  # TLS takes over the first
        timer = threading.Timer(TIMEOUT, cut_off, [twin])
        timer.start()
        self.thread.stack.callback(cut_off, twin)  # nor is it used again, without a timer
        self.thread.stack.callback(timer.cancel)
        return sock


class HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = type("Guarded", (Guard, urllib3.connection.HTTPConnection), {})


class HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = type("Guarded", (Guard, urllib3.connection.HTTPSConnection), {})


def cut_off(sock):
    """Wake the thread that waits for a socket."""
    with suppress(OSError):  # the server was faster
        sock.shutdown(socket.SHUT_RDWR)


HEADERS = {"User-Agent": f"metaquery/{VERSION}"}
POOLS = urllib3.PoolManager(headers=HEADERS, timeout=TIMEOUT, ca_certs=certifi.where())
POOLS.pool_classes_by_scheme = {"http": HTTPPool, "https": HTTPSPool}


def download(url):
    """The bytes behind a URL and its redirects; raises Dropped."""
    if not url.lower().startswith(("http://", "https://")):
        raise Dropped("bad address")
    retries = urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=MAX_REDIRECTS)

    with ExitStack() as Guard.thread.stack:
        try:
            response = POOLS.request("GET", url, retries=retries, preload_content=False)
            Guard.thread.stack.enter_context(response)
            data = response.read(MAX_BYTES + 1, decode_content=False)
        except ValueError:
            raise Dropped("bad address") from None
        except (urllib3.exceptions.HTTPError, HTTPException, OSError):
            raise Dropped("network error") from None

    if response.status != 200:
        raise Dropped(f"HTTP status {response.status}")
    if "noai" in response.headers.get("X-Robots-Tag", "").lower():
        raise Dropped("owner allows no training")
    if len(data) > MAX_BYTES:
        raise Dropped("too large")
    if response.length_remaining:
        raise Dropped("network error")
    return data
