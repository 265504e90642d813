"""Instruction data from web documents: right groups, no row lost or doubled, nothing does harm."""

import gzip
import io
import json
import multiprocessing
import os
import signal
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import WORDS, noise_image
from PIL import Image
from runs import flags as train_flags
from runs import succeed
from tqdm import tqdm
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

from extras.curation import __main__ as curation
from extras.curation import documents, instructions
from extras.curation.documents import (
    Dropped,
    decode,
    download,
    is_public,
    open_documents,
    open_saved,
    read_document,
)
from extras.curation.instructions import (
    InstructionWriter,
    Siglip,
    choose_target,
    group,
    make_row,
    read_answer,
)
from extras.toy_parts.language import make_tokenizer
from metaquery import MAX_PROMPT_TOKENS, InputError

pytestmark = pytest.mark.usefixtures("handlers_restored")


def as_bytes(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def mmc4(texts, *images):
    """A line of mmc4: images are (URL, index of its text)."""
    infos = [{"raw_url": url, "matched_text_index": index} for url, index in images]
    return json.dumps({"text_list": texts, "image_info": infos})


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


# ---- Groups and targets --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2, 5, 30])
def test_groups_are_mutually_similar(number):
    """Each of 2 to 6 members, every two of them similar; what could join has not been left out."""
    for seed in range(20):
        features = unit(np.random.default_rng(seed).normal(size=(number, 4)).astype(np.float32))
        cosines = features @ features.T
        groups = group(features, 0.5)
        members = [i for part in groups for i in part]
        assert len(set(members)) == len(members)
        assert all(2 <= len(part) <= 6 and part == sorted(part) for part in groups)
        assert all(cosines[i, j] > 0.4999 for part in groups for i in part for j in part)
        alone = sorted(set(range(number)) - set(members))
        assert all(cosines[i, j] < 0.5001 for i in alone for j in alone if i < j)
        noise = np.random.default_rng(1).normal(size=features.shape) * 1e-7
        assert group((features + noise).astype(np.float32), 0.5) == groups


@pytest.mark.parametrize("number, sizes", [(6, [6]), (7, [4, 3]), (13, [5, 4, 4]), (12, [6, 6])])
def test_large_groups_are_split_so_that_no_part_has_one(number, sizes):
    groups = group(np.ones((number, 1), np.float32), 0.5)
    assert [len(part) for part in groups] == sizes and sum(groups, []) == list(range(number))


def test_the_target_is_the_picture_least_like_the_others():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        features = unit(rng.normal(size=(rng.integers(3, 7), 8)).astype(np.float32))
        number = len(features)
        averages = [
            np.mean([features[i] @ features[j] for j in range(number) if j != i])
            for i in range(number)
        ]
        assert choose_target(features) == int(np.argmin(averages))
    assert choose_target(unit(np.float32([[1, 0], [1, 1]]))) == 1  # of two, the later


# ---- Instructions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, caption, prompt",
    [
        ("The same dog\n on a  beach. ", "Our dog Bess", "The same dog on a beach."),
        ('**"This building at night"**', "a house at night", "This building at night"),
        ("This object left of a blue circle", "red star left of a circle", "same"),
        ("The same lighthouse", "lighthouse", "same"),
        ("This red star left of a circle", "red star left of a circle", None),
        ("The same dog as in the target image", "a dog on a beach", None),
        ("this " * 61, "a dog", None),
        ("...", "a dog", None),
        ("", "a dog", None),
    ],
)
def test_answers_are_read(answer, caption, prompt):
    """What says all that the target's caption says, or names the target, is no prompt."""
    if prompt == "same":
        prompt = answer
    assert read_answer(answer, caption) == prompt


@pytest.mark.parametrize("mllm", ["llava", "qwen-vl", "qwen"])
def test_any_mllm_is_asked_in_batches(parts, mllm, recwarn, monkeypatch):
    """Whatever the number of images and the length of captions: no caption is cut off unseen."""
    writer = InstructionWriter(str(parts / mllm), batch_size=2)
    rows = []
    for number in (1, 5, 2):
        images = [noise_image(40, 40, seed) for seed in range(number + 1)]
        captions = ["a red star <|im_end|> " * 100] * number + ["a blue circle " * 100]
        rows.append(make_row(images, captions, np.ones((number + 1, 1), np.float32)))
        question = writer.question(rows[-1])
        assert len(writer.tokenizer(question)["input_ids"]) <= MAX_PROMPT_TOKENS
        assert question.count("red") >= number and "blue circle" in question
    monkeypatch.setattr(instructions, "ANSWER_TOKENS", 6)
    answers = writer.write(rows)
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)
    assert not [w for w in recwarn if "prompt cut" in str(w.message)]
    alone = InstructionWriter(str(parts / mllm), batch_size=1)
    assert alone.write(rows[1:2]) == answers[1:2]


# ---- SigLIP --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A folder with a random SigLIP in the hub's layout."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS, 400)
    tokenizer.padding_side = "right"
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    width |= {"num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 32, "patch_size": 16}
    config = SiglipConfig(text_config=text | width, vision_config=vision | width)
    SiglipModel(config).save_pretrained(folder)
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_features_do_not_depend_on_the_others(siglip, parts):
    encoder = Siglip(str(siglip))
    captions = ["a red star", "blue", "a circle " * 200]
    images = [noise_image(40, 60, seed) for seed in range(3)]
    for encode, items in ((encoder.captions, captions), (encoder.images, images)):
        features = encode(items)
        np.testing.assert_allclose(encode(items[1:2]), features[1:2], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
        assert features.dtype == np.float32 and features[0] @ features[1] < 0.9999
    with pytest.raises(InputError, match="name a SigLIP model"):
        Siglip(str(parts / "qwen"))


# ---- Documents -----------------------------------------------------------------------------------
PNG = as_bytes(noise_image(300, 256))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zip", ".jsonl.gz"])
def test_shards_are_read(tmp_path, suffix):
    """In whatever package; a broken line costs itself alone, and is counted."""
    good = mmc4(["a  1\n", "b"], ("http://a", 0), ("http://b", 1)).encode()
    broken = [b"{", b"[1]", b"null", b'{"text_list": []}', b"", b"[" * 10**5]
    broken += [b'{"text_list": ["a"], "image_info": [7]}', mmc4(["\ud800"]).encode()]
    if suffix == ".jsonl":  # `datasets` refuses a packed shard that is not UTF-8
        broken.append(b"\xff\xfe")
    data = b"\n".join([good, *broken, good])
    path = tmp_path / f"shard{suffix}"
    if suffix.endswith("zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("shard.jsonl", data)
    else:
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)

    read = [read_document(line, lambda url: PNG) for line in open_documents(tmp_path)["text"]]
    assert [captions for _, captions, _ in read if captions] == [["a 1", "b"]] * 2
    counts = sum((found for _, _, found in read), Counter())
    assert counts == {"documents": 2, "images": 4, "broken documents": len(broken)}


def test_nothing_to_read_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot read --data"):
        open_documents(tmp_path)
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(InputError, match="cannot read --data"):
        open_documents(tmp_path)
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "x.jsonl.zip").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(InputError, match="cannot read --data"):
        open_documents(tmp_path)
    with pytest.raises(InputError, match="holds no images of img2dataset"):
        open_saved(tmp_path)


def test_strange_entries_lose_only_themselves():
    entries = [("http://a", 1), ("http://a", 9), ("http://a", -1), ("http://a", None), (None, 0)]
    line = mmc4(["word " * 2000, " \n"], ("http://a", 0), *entries, (7, 0))
    images, captions, counts = read_document(line, lambda url: PNG)
    assert len(images) == 1 and counts["dropped: no caption or address"] == 6
    assert captions[0].split() == ["word"] * (documents.MAX_CAPTION // 5)


def test_unusable_images_are_dropped_by_cause(monkeypatch):
    """Small, broken, huge, long, or no image at all; what a file is tells, not its name."""
    monkeypatch.setattr(documents, "MAX_SIDE", 300)
    assert decode(PNG).size == (300, 256)
    grey = decode(as_bytes(noise_image(1500, 900, 1).convert("L"), "JPEG"))
    assert grey.size == (500, 300) and grey.mode == "RGB"
    unusable = {
        as_bytes(noise_image(255, 300)): "too small",
        as_bytes(noise_image(256, 1100)): "too long",
        as_bytes(Image.new("1", (10_000, 10_000))): "too many pixels",
        as_bytes(Image.new("1", (20_000, 20_000))): "broken image",  # Pillow's own bound
        b"<html>not found</html>": "broken image",
        as_bytes(noise_image(300, 300, 2))[:5000]: "broken image",
        b"": "broken image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n": "broken image",
    }
    for data, cause in unusable.items():
        with pytest.raises(Dropped, match=cause):
            decode(data)


# ---- Downloads -----------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """A server with every fault; `asked` holds the paths of its requests."""

    asked = []

    def log_message(self, *args):
        pass

    def answer(self, status=200, data=PNG, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.asked.append(self.path)
        port = self.server.server_address[1]
        try:
            if self.path.startswith("/good"):
                self.answer(Content_Length=len(PNG))
            elif self.path == "/missing":
                self.answer(404)
            elif self.path == "/busy":
                self.answer(503, Retry_After="1000")
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
            elif self.path == "/cut":
                self.answer(data=PNG[:1000], Content_Length=len(PNG))
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
        except OSError:  # the client hung up
            pass


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


@pytest.fixture
def trusted(server, monkeypatch):
    """The server, as if it were on the public internet."""
    monkeypatch.setattr(documents, "is_public", lambda address: address == "127.0.0.1")
    return server


def cause(url):
    with pytest.raises(Dropped) as dropped:
        download(url)
    return str(dropped.value)


def test_images_are_downloaded(trusted):
    assert download(f"{trusted}/good.png") == PNG
    assert download(f"{trusted}/there") == PNG
    assert Handler.asked[-1] == "/good?a=b%20c"


@pytest.mark.parametrize(
    "path, expected",
    {
        "/missing": "HTTP status 404",
        "/busy": "network error",
        "/endless": "too large",
        "/cut": "network error",
        "/loop": "network error",
        "/file": "bad address",
        "/nowhere": "bad address",
        "/no-ai": "owner allows no training",
    }.items(),
)
def test_bad_answers_are_dropped(trusted, path, expected, monkeypatch):
    monkeypatch.setattr(documents, "MAX_BYTES", 10**6)
    assert cause(trusted + path) == expected


@pytest.mark.parametrize("path", ["/silent", "/drip", "/drip-headers"])
def test_no_server_can_hold_a_download_up(trusted, path, monkeypatch):
    monkeypatch.setattr(documents, "TIMEOUT", 0.5)
    began = time.monotonic()
    assert cause(trusted + path) == "network error"
    assert time.monotonic() - began < 10  # where it would last for ever


@pytest.mark.parametrize(
    "url", ["", "a.png", "http://", "http:///a", "http://[", "http://a:99999/", "ftp://a/"]
)
def test_bad_addresses_are_dropped(url):
    assert cause(url) == "bad address"


def test_private_addresses_are_never_asked(server, monkeypatch):
    """Neither at once, nor by another name, nor after a redirect."""
    for host in ("127.0.0.1", "localhost", "0"):
        assert cause(server.replace("127.0.0.1", host) + "/good") == "private address"
    monkeypatch.setattr(documents, "is_public", lambda address: address == "127.0.0.1")
    assert cause(server + "/inside") == "private address"
    assert Handler.asked == ["/inside"]


def test_which_addresses_are_public():
    private = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
    private += ["224.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1"]
    private += ["2002:7f00:1::", "ff02::1", "64:ff9b::7f00:1"]
    assert not [address for address in private if is_public(address)]
    assert all(map(is_public, ["8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"]))


# ---- The whole command ---------------------------------------------------------------------------
COLOURS = ("red", "green", "blue", "brown")


class Words:
    """An encoder without training: the colour that a caption names; an image's pixels."""

    def captions(self, captions):
        rows = [[float(colour in caption) for colour in COLOURS] for caption in captions]
        return unit(np.array(rows, np.float32).reshape(-1, len(COLOURS)) + 1e-3)

    def images(self, images):
        small = [np.asarray(image.resize((8, 8)), np.float32).ravel() for image in images]
        return unit(np.stack(small) - 100)


class Writer:
    """A writer that gives every row one answer."""

    def write(self, rows):
        return ["The same thing once more."] * len(rows)


def flags(folder, out, *more):
    images = ["--images", str(folder / "images"), "--siglip", "words", "--mllm", "writer"]
    return curation.parse_flags(["--data", str(folder), "--out", str(out), *images, *more])


def curated(args):
    lines = open_documents(args.data)
    curation.check_settings(args, len(lines))
    return curation.curate(lines, open_saved(args.images), Words(), Writer(), args)


def rows_in(out):
    """{(target's bytes, sources' bytes)} with how often each is there."""
    rows = Counter()
    for file in out.glob("train-*.parquet"):
        for row in pyarrow.parquet.read_table(file).to_pylist():
            sources = tuple(source["bytes"] for source in row["source_images"])
            rows[row["target_image"]["bytes"], sources] += 1
    return rows


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(curation, "BLOCK", 3)
        yield


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """(the folder of twelve documents, the curated folder): two red images and a blue one each,
    as img2dataset leaves them. The last document names an image that was not downloaded."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "images" / "00000").mkdir(parents=True)
    lines, saved = [], []
    for i in range(12):
        texts = [f"a red star, {i}", f"two red stars, {i}", f"a blue cross, {i}"]
        lines.append(mmc4(texts, *[(f"http://a.org/{i}/{k}", k) for k in range(3)]))
        for k in range(3):
            key = f"{3 * i + k:09d}"
            saved.append({"url": f"http://a.org/{i}/{k}", "key": key, "status": "success"})
            noise_image(256, 256, 3 * i + k).save(folder / "images" / "00000" / f"{key}.jpg")
    lines[-1] = mmc4(
        ["gone", *texts], ("http://b.org", 0), *[(s["url"], k) for k, s in enumerate(saved[-3:], 1)]
    )
    saved.append({"url": "http://b.org", "key": "000000036", "status": "failed_to_download"})
    (folder / "shard.jsonl").write_text("\n".join(lines))
    pyarrow.parquet.write_table(pa.Table.from_pylist(saved), folder / "images" / "00000.parquet")
    curated(flags(folder, folder / "out"))
    return folder, folder / "out"


def test_each_document_gives_its_pair(web):
    """The two red images of each are one group: a source and a target; the blue one is left."""
    rows = rows_in(web[1])
    assert rows.total() == 12 and set(rows.values()) == {1}
    assert all(len(sources) == 1 for _, sources in rows)
    counts = json.loads((web[1] / "stats.json").read_text())
    expected = {"documents": 12, "images": 37, "dropped: not on disk": 1, "groups of 2": 12}
    assert counts == expected | {"rows": 12}
    with Image.open(web[1] / "sheet.jpg") as sheet:
        assert sheet.height == 12 * (curation.CELL + curation.LINE)


def test_the_command_runs(web, siglip, parts, tmp_path, monkeypatch):
    """With models of the real classes; random ones, whose prompts are seldom kept."""
    models = ["--siglip", siglip, "--mllm", parts / "qwen-vl", "--threshold", -1]
    argv = ["--data", web[0], "--images", web[0] / "images", "--out", tmp_path, *models]
    monkeypatch.setattr("sys.argv", ["curation", *map(str, argv), "--dtype", "float32"])
    monkeypatch.setattr(instructions, "ANSWER_TOKENS", 6)
    curation.main()
    counts = json.loads((tmp_path / "stats.json").read_text())
    assert counts["documents"] == 12 and counts["groups of 3"] == 12


def test_a_folder_of_other_flags_is_refused(web, capsys):
    with pytest.raises(SystemExit):
        curated(flags(*web, "--threshold", "0.7"))
    assert "with other flags" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        flags(*web, "--threshold", "7")
    assert "float from -1 to 1" in capsys.readouterr().err


def test_train_reads_what_was_curated(web, parts, tmp_path):
    argv = train_flags(parts, tmp_path / "first", steps=1, warmup=0)
    succeed(tmp_path, argv)
    changes = {"checkpoint": tmp_path / "first", "stage": "instruct", "data": web[1], "steps": 2}
    succeed(tmp_path, train_flags(parts, tmp_path / "run", **changes))


def in_fork(args, replaces=None, **environment):
    """A process that curates; it is forked, so that it starts at once.

    replaces: (n, "before" or "after"): it is killed as it moves its n-th file to its place.
    """

    def work():
        os.environ.update(environment)
        tqdm.set_lock(threading.RLock())  # the usual one is shared: a killed process may hold it
        replace, calls = Path.replace, []

        def killed_replace(path, target):
            calls.append(target)
            if replaces == (len(calls), "before"):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(path, target)
            if replaces == (len(calls), "after"):
                os.kill(os.getpid(), signal.SIGKILL)

        Path.replace = killed_replace
        curated(args)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_killed_runs_resume_without_losing_or_doubling_rows(web, tmp_path):
    """SIGKILL at each moment between two files, and at random: as if nothing had happened."""
    args = flags(web[0], tmp_path)
    for point in [(n, when) for n in (1, 2, 3) for when in ("before", "after")] * 2:
        process = in_fork(args, point)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    kills, rng = 0, np.random.default_rng(0)
    while True:
        process = in_fork(args)
        process.join(rng.uniform(0.02, 0.3) * (1 + kills / 5))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert rows_in(tmp_path) == rows_in(web[1])
    assert not list(tmp_path.rglob("*.part"))


def test_processes_share_the_blocks_and_may_change_in_number(web, tmp_path):
    args = flags(web[0], tmp_path)
    first = in_fork(args, RANK="0", WORLD_SIZE="3")
    first.join()
    assert 0 < rows_in(tmp_path).total() < 0.6 * rows_in(web[1]).total()
    both = [in_fork(args, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert rows_in(tmp_path) == rows_in(web[1])
