"""Web documents: mmc4 shards and datasets are read, and nothing that they name does harm."""

import gzip
import io
import json
import socket
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
from conftest import noise_image
from PIL import Image

from extras.curation import download
from extras.curation.__main__ import parse_flags
from extras.curation.documents import MAX_CAPTION, duplicates, open_blocks, read_documents
from extras.curation.download import Downloader, Dropped, is_public
from metaquery import InputError

pytestmark = pytest.mark.usefixtures("handlers_restored")


def as_bytes(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def mmc4(texts, *pictures):
    """A line of mmc4: pictures are (field, name, index of their text)."""
    infos = [{field: name, "matched_text_index": index} for field, name, index in pictures]
    return json.dumps({"text_list": texts, "image_info": infos})


def read(folder, *flags, blocks=None):
    """All documents of a folder, their counts and the pictures dropped, by cause."""
    args = parse_flags(["--data", str(folder), "--out", str(folder / "out"), *map(str, flags)])
    columns = {"images": args.images_column, "captions": args.captions_column}
    found = open_blocks(args.data, args.block_size, columns)
    documents, counts, dropped = [], {}, {}
    for block in found:
        some, more_counts, more_dropped = read_documents(block, args)
        documents += some
        for total, part in ((counts, more_counts), (dropped, more_dropped)):
            for name, value in part.items():
                total[name] = total.get(name, 0) + value
    return documents, counts, dropped


def captions(documents):
    return [document.captions for document in documents]


def write_pictures(folder, *names):
    for i, name in enumerate(names):
        noise_image(260, 256 + i, seed=i).save(folder / name)


# ---- Documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zip", ".jsonl.gz"])
def test_shards_are_read_in_any_blocks(tmp_path, suffix):
    write_pictures(tmp_path, "a.png", "b.png")
    lines = [
        mmc4([f"a  {i}\n", "b"], ("image_name", "a.png", 0), ("image_name", "b.png", 1))
        for i in range(7)
    ]
    data = "\n".join(lines).encode()
    path = tmp_path / f"shard{suffix}"
    if suffix.endswith("zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("shard.jsonl", data)
    else:
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    for size in (3, 100):
        documents, counts, _ = read(tmp_path, "--block-size", size)
        assert captions(documents) == [[f"a {i}", "b"] for i in range(7)]
        assert counts["documents"] == 7 and counts["pictures"] == 14


def test_broken_lines_are_numbered_skipped_and_counted(tmp_path, capfd):
    write_pictures(tmp_path, "a.png")
    good = mmc4(["a"], ("image_name", "a.png", 0))
    broken = [
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"null",
        b'{"text_list": []}',
        b"",
        b"[" * 10**5,
        b'{"text_list": ["a"], "image_info": [7]}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good.encode(), *broken, good.encode()]))
    documents, counts, _ = read(tmp_path, "--block-size", 4)
    assert captions(documents) == [["a"], ["a"]]
    assert counts["broken_documents"] == len(broken) and counts["documents"] == 2
    assert "x.jsonl line 2: it is broken" in capfd.readouterr().err


def test_a_damaged_shard_is_read_as_far_as_possible(tmp_path, capfd):
    write_pictures(tmp_path, "a.png")
    lines = "\n".join([mmc4(["a"], ("image_name", "a.png", 0))] * 3 + ["x" * 10**5])
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-20])
    (tmp_path / "y.jsonl.zip").write_bytes(b"not a zip")
    documents, _, _ = read(tmp_path, "--block-size", 1)
    assert len(documents) == 3
    assert "y.jsonl.zip cannot be read" in capfd.readouterr().err


def test_strange_documents_lose_only_what_is_wrong(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png")
    long = "word " * 2000
    lines = [
        mmc4([]),
        mmc4([long, "\ud800 ok \x00"], ("image_name", "a.png", 0), ("image_name", "b.png", 1)),
        mmc4(
            ["a", " \n"],
            ("image_name", "a.png", 0),
            ("image_name", "b.png", 1),
            ("image_name", "a.png", 9),
            ("image_name", "a.png", -1),
            ("image_name", None, 0),
            ("raw_url", None, 0),
            ("raw_url", 7, 0),
        ),
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    documents, counts, dropped = read(tmp_path)
    assert counts["documents_without_pictures"] == 1
    assert len(documents[1].captions[0]) <= MAX_CAPTION
    assert documents[1].captions[0].split() == ["word"] * (MAX_CAPTION // 5)
    assert "ok" in documents[1].captions[1]
    "".join(documents[1].captions).encode()  # valid Unicode
    assert documents[2].captions == ["a"]
    assert dropped == {"no caption or address": 5, "bad address": 1}


def test_names_do_not_lead_out_of_the_folder(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    write_pictures(tmp_path, "secret.png")
    write_pictures(inside, "a.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "a.png"]
    line = mmc4(["a"], *[("image_name", name, 0) for name in names])
    line2 = mmc4(["a"], *[("raw_url", name, 0) for name in names])
    (inside / "x.jsonl").write_text(f"{line}\n{line2}\n")
    documents, _, dropped = read(inside)
    assert [len(document.pictures) for document in documents] == [1, 1]
    assert dropped == {"no caption or address": 3, "missing file": 3}


@pytest.mark.parametrize("kind", ["files", "addresses"])
def test_datasets_are_read(tmp_path, kind):
    write_pictures(tmp_path, "a.png", "b.png")
    files = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    if kind == "files":
        pictures = [{"bytes": data, "path": None} for data in files]
        feature = datasets.List(datasets.Image())
    else:
        pictures, feature = ["a.png", "b.png"], datasets.List(datasets.Value("string"))
    columns = {"pics": [pictures, [], pictures], "texts": [["a", " b\n"], [], ["only one"]]}
    features = {"pics": feature, "texts": datasets.List(datasets.Value("string"))}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    (tmp_path / "rows").mkdir()
    rows.to_parquet(tmp_path / "rows" / "x.parquet")
    flags = ["--images-column", "pics", "--images", tmp_path, "--block-size", 2]
    documents, counts, _ = read(tmp_path / "rows", *flags)
    assert captions(documents) == [["a", "b"], []]
    assert counts["broken_documents"] == 1 and counts["documents_without_pictures"] == 1
    with pytest.raises(InputError, match="its columns are pics, texts: name one with --images-c"):
        read(tmp_path / "rows")


def test_nothing_to_read_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot read --data"):
        read(tmp_path)
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no documents"):
        read(tmp_path)


# ---- Pictures ------------------------------------------------------------------------------------


def test_unusable_pictures_are_dropped_by_cause(tmp_path):
    """Small, broken, huge, long, or no picture at all; what a file is tells, not its name."""
    good = noise_image(300, 256)
    files = {
        "good.jpg": as_bytes(good),  # a PNG that says it is a JPEG
        "grey.png": as_bytes(noise_image(1500, 900, 1).convert("L"), "JPEG"),
        "small.png": as_bytes(noise_image(255, 300)),
        "page.jpg": b"<html>not found</html>",
        "cut.png": as_bytes(noise_image(300, 300, 2))[:5000],
        "empty.png": b"",
        "100 megapixels.png": as_bytes(Image.new("1", (10_000, 10_000))),
        "400 megapixels.png": as_bytes(Image.new("1", (20_000, 20_000))),
        "long.png": as_bytes(noise_image(256, 1100)),
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n",
        "heavy.png": bytes(2_000_000),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    names = [("image_name", name, 0) for name in files]
    (tmp_path / "x.jsonl").write_text(mmc4(["a"], *names, ("raw_url", "missing.png", 0)))
    documents, _, dropped = read(tmp_path, "--max-megabytes", 1, "--resolution", 300)
    assert [picture.size for picture in documents[0].pictures] == [(300, 256), (500, 300)]
    assert {picture.mode for picture in documents[0].pictures} == {"RGB"}
    assert dropped == {
        "too small": 1,
        "broken picture": 4,
        "too many pixels": 2,
        "too long": 1,
        "too large": 1,
        "missing file": 1,
    }


def test_near_duplicates_are_found_and_others_are_not():
    picture = noise_image(40, 40).resize((400, 400), Image.Resampling.BICUBIC)
    again = Image.open(io.BytesIO(as_bytes(picture, "JPEG", quality=60)))
    smaller = picture.resize((300, 310))
    other = noise_image(40, 40, seed=1).resize((400, 400), Image.Resampling.BICUBIC)
    assert duplicates([picture, other, again, smaller]) == {2, 3}


# ---- Downloads -----------------------------------------------------------------------------------

PICTURE = as_bytes(noise_image(300, 256))


class Handler(BaseHTTPRequestHandler):
    """A server with every fault; `asked` counts the requests for each path."""

    asked = []

    def log_message(self, *args):
        pass

    def answer(self, status=200, data=PICTURE, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.asked.append((self.path, self.headers["Host"], time.monotonic()))
        port = self.server.server_address[1]
        try:
            if self.path.startswith("/good"):
                self.answer(Content_Length=len(PICTURE))
            elif self.path == "/missing":
                self.answer(404)
            elif self.path == "/busy":  # at first
                self.answer(503 if len(paths()) < 3 else 200)
            elif self.path == "/silent":
                self.server.ended.wait()
            elif self.path == "/drip":
                self.answer(data=b"", Content_Length=1000)
                while not self.server.ended.wait(0.1):
                    self.wfile.write(b"x")
            elif self.path == "/drip-headers":
                while not self.server.ended.wait(0.1):
                    self.wfile.write(b"H")
            elif self.path == "/endless":
                self.answer(data=b"")
                while not self.server.ended.is_set():
                    self.wfile.write(bytes(65_536))
            elif self.path == "/10GB":
                self.answer(data=bytes(1000), Content_Length=10**10)
            elif self.path == "/cut":
                self.answer(data=PICTURE[:1000], Content_Length=len(PICTURE))
            elif self.path == "/loop":
                self.answer(302, b"", Location="/loop")
            elif self.path == "/there":
                self.answer(301, b"", Location="good?a=b c")
            elif self.path == "/inside":
                self.answer(302, b"", Location=f"http://127.0.0.2:{port}/good")
            elif self.path == "/file":
                self.answer(302, b"", Location="file:///etc/passwd")
            elif self.path == "/nowhere":
                self.answer(302, b"", Location="http://[")
            elif self.path == "/no-ai":
                self.answer(X_Robots_Tag="noai, noimageai")
        except OSError:  # the downloader hung up
            pass


def paths():
    return [path for path, _, _ in Handler.asked]


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    made.daemon_threads = True
    made.ended = threading.Event()
    Handler.asked.clear()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_address[1]}"
    made.ended.set()
    made.shutdown()
    made.server_close()


def downloader(timeout=5.0, retries=0, pause=0.0, allow_private=True):
    return Downloader(timeout, 10**6, retries, pause, allow_private)


def cause(url, **options):
    with pytest.raises(Dropped) as dropped:
        downloader(**options).get(url)
    return str(dropped.value)


def test_pictures_are_downloaded(server, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    assert downloader().get(f"{server}/good.png") == PICTURE
    assert downloader().get(f"{server}/there") == PICTURE
    assert paths()[-1] == "/good?a=b%20c"
    Handler.asked.clear()
    assert downloader(retries=2).get(f"{server}/busy") == PICTURE and len(paths()) == 3


@pytest.mark.parametrize(
    "path, expected",
    {
        "/missing": "not found",
        "/10GB": "too large",
        "/endless": "too large",
        "/cut": "network error",
        "/loop": "too many redirects",
        "/file": "bad address",
        "/nowhere": "bad address",
        "/no-ai": "owner allows no training",
    }.items(),
)
def test_bad_answers_are_dropped(server, path, expected):
    assert cause(server + path) == expected


@pytest.mark.parametrize("path", ["/silent", "/drip", "/drip-headers"])
def test_no_server_can_hold_a_download_up(server, path):
    assert cause(server + path, timeout=0.5) == "timeout"


@pytest.mark.parametrize(
    "url", ["http://", "http:///a", "http://[", "http://a:99999/", "ftp://a/", "http://" + "a" * 80]
)
def test_bad_addresses_are_dropped(url):
    assert cause(url) in ("bad address", "network error")


def test_private_addresses_are_never_asked(server, monkeypatch):
    """Neither at once, nor by another name, nor after a redirect."""
    for url in (server, server.replace("127.0.0.1", "localhost"), server.replace("127.0.0.1", "0")):
        assert cause(url + "/good", allow_private=False) == "private address"
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")
    assert cause(server + "/inside", allow_private=False) == "private address"
    assert paths() == ["/inside"]


def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch):
    """A name that resolves to another address the second time gains nothing."""
    answers = iter(["93.184.216.34", "127.0.0.1"])
    connected = []

    def resolve(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(address, timeout):
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert cause("http://rebinding.test/a", allow_private=False) == "network error"
    assert connected == [("93.184.216.34", 80)]


def test_which_addresses_are_public():
    private = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
    private += ["224.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1"]
    private += ["2002:7f00:1::", "ff02::1", "64:ff9b::7f00:1"]
    assert not [address for address in private if is_public(address)]
    assert all(map(is_public, ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"]))


def test_a_host_is_asked_at_a_pause_and_given_up_when_dead(server):
    polite = downloader(pause=0.1)
    threads = [threading.Thread(target=polite.get, args=(f"{server}/good",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(moment for _, _, moment in Handler.asked)
    assert times[-1] - times[0] > 0.25
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    tired, causes = downloader(), []
    for i in range(8):
        with pytest.raises(Dropped) as dropped:
            tired.get(f"{dead}{i}")
        causes.append(str(dropped.value))
    assert causes == ["network error"] * 5 + ["host that does not answer"] * 3


def test_documents_are_downloaded_and_their_losses_counted(server, tmp_path):
    urls = [f"{server}/good.png", f"{server}/missing", f"{server}/10GB", "http://[", "nonsense"]
    lines = mmc4(["a"], *[("raw_url", url, 0) for url in urls])
    (tmp_path / "x.jsonl").write_text(lines)
    documents, _, dropped = read(tmp_path, "--allow-private-addresses", "--retries", 0)
    assert len(documents[0].pictures) == 1
    causes = {"not found": 1, "too large": 1, "bad address": 1, "missing file": 1}
    assert dropped == causes
    _, _, dropped = read(tmp_path, "--retries", 0)
    assert dropped["private address"] == 3
