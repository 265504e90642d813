"""train.py's and the extras' mistakes: one line, exit code 2, no file harmed; nothing hangs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import pytest
from commands import call, contents  # noqa: F401
from conftest import ROOT, TINY, environment
from PIL import Image
from runs import flags, succeed

from metaquery import MetaQuery


@pytest.fixture(autouse=True)
def signals():
    """train.py takes over signals; they are put back."""
    names = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT")]
    before = {name: signal.getsignal(name) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with files that are there already, and small datasets."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "notes.txt").write_text("not an image")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "log.jsonl").write_text("mine\n")
    (folder / "out").write_text("a file")
    shutil.copytree(TINY, folder / "copy", ignore=shutil.ignore_patterns("*.png"))
    rows = {"image": [Image.new("RGB", (64, 64))] * 2, "caption": ["a star", "a cross"]}
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    for name, number in (("two", 2), ("none", 0)):
        (folder / name).mkdir()
        rows.select(range(number)).to_parquet(folder / name / "x.parquet")
    return folder


TRAIN = ["--out", "run", "--steps", 2, "--warmup", 1, "--batch-size", 2]
TABLE = [
    ("extras.sizes", ["huge"], "tiny"),
    ("extras.sizes", ["base", "--num-queries", "0"], "num_queries"),
    ("train", [*TRAIN, "--size", "huge"], "'tiny', 'study', 'base'"),
    ("train", [*TRAIN, "--stage", "dream"], "pretrain"),
    ("train", [*TRAIN, "--flag-that-is-not"], "--flag-that-is-not"),
    ("train", [*TRAIN, "--steps", 10**13], "--steps"),
    ("train", [*TRAIN, "--steps", "many"], "invalid int value"),
    ("train", [*TRAIN, "--micro-batch-size", "-1"], "--micro-batch-size"),
    ("train", [*TRAIN, "--shard-frozen", "true"], "needs --shard"),
    ("train", [*TRAIN, "--lr", "0"], "--lr"),
    ("train", [*TRAIN, "--lr", "inf"], "--lr"),
    ("train", [*TRAIN, "--workers", "-1"], "--workers"),
    ("train", [*TRAIN, "--seed", 2**64], "--seed"),
    ("train", [*TRAIN, "--train-diffusion", "maybe"], "--train"),
    ("train", [*TRAIN, "--checkpoint", "/nowhere/run"], "/nowhere/run"),
    ("train", [*TRAIN, "--checkpoint", "copy", "--num-queries", "9"], "first queries"),
    ("train", [*TRAIN, "--out", ""], "--out"),
    ("train", [*TRAIN, "--out", "out"], "it is a file"),
    ("train", [*TRAIN, "--out", "out/run"], "is not a folder"),
    ("train", [*TRAIN, "--out", "foreign"], "log.jsonl"),
    ("train", [*TRAIN, "--checkpoint", "copy", "--out", "copy"], "--checkpoint itself"),
    ("train", [*TRAIN, "--data", "two=0,none=1"], "two=0"),
    ("train", [*TRAIN, "--data", "two=x"], "two=x"),
    ("train", [*TRAIN, "--data", "toy,two"], "toy"),
    ("train", [*TRAIN, "--data", "toy", "--streaming", "true"], "--streaming has no effect"),
    ("train", [*TRAIN, "--text-column", "words"], "--text-column has no effect"),
    ("train", [*TRAIN, "--data", "notes.txt"], "notes.txt"),
    ("train", [*TRAIN, "--data", "nowhere/nothing"], "nowhere/nothing"),
    ("train", [*TRAIN, "--data", "none"], "none"),
    ("train", [*TRAIN, "--data", "two", "--text-column", "words"], "words"),
]


@pytest.mark.parametrize(
    "name, argv, words", TABLE, ids=[f"{n} {' '.join(map(str, f))[-40:]}" for n, f, _ in TABLE]
)
def test_a_mistake_is_one_line_and_harms_nothing(call, world, monkeypatch, name, argv, words):  # noqa: F811
    monkeypatch.chdir(world)
    shutil.rmtree(world / "run", ignore_errors=True)
    before = contents(world)
    code, _, lines = call(name, *argv)
    assert code == 2 and lines[-1].startswith("error: ") and words in lines[-1], lines
    assert not any("Traceback" in line for line in lines)
    after = contents(world)
    assert {path: after.get(path) for path in before} == before
    assert not list(world.glob("run/step-*"))


# ---- What is accepted works ----------------------------------------------------------------------
def test_a_checkpoint_can_be_moved(tmp_path):
    """Parts beside metaquery.py are named relative to it, so that any clone finds them."""
    argv = ["--steps", "1", "--warmup", "0", "--batch-size", "2", "--out", str(tmp_path / "run")]
    succeed(tmp_path, argv)
    step = tmp_path / "run" / "step-00000001"
    assert json.loads((step / "config.json").read_text())["mllm"] == "weights/tiny/mllm"
    shutil.move(tmp_path / "run", tmp_path / "moved")
    model = MetaQuery.from_pretrained(tmp_path / "moved")
    assert model.generation_config["image_guidance_scale"] == 3.25


def test_sample_prompts_may_be_a_file(parts, tmp_path):
    (tmp_path / "prompts.txt").write_text("a star\n\na cross\n")
    argv = flags(parts, tmp_path / "run", sample_prompts=tmp_path / "prompts.txt", sample_every=6)
    succeed(tmp_path, argv, samples=True)
    sheet = Image.open(tmp_path / "run" / "samples" / "step-00000006.png")
    assert sheet.size == (2 * 64, 64)


def test_data_that_end_a_run_leave_no_worker_waiting(parts, tmp_path):
    """Workers ignore SIGTERM, by which Python would end them: the run must not wait for them."""
    rows = {"image": [b"broken"] * 3, "caption": ["a star"] * 3}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "x.parquet")
    argv = flags(parts, tmp_path / "run", data=tmp_path / "data", workers=2)
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "train.py", *argv], timeout=60, **options)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "has no usable row; first x.parquet row" in last


# ---- Ctrl-C --------------------------------------------------------------------------------------
def interrupted(command, after, twice=False):
    """(exit code, stderr's lines) of a command that gets Ctrl-C once `after()` holds."""
    began = time.time()
    options = {"cwd": ROOT, "env": environment(), "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, **options) as process:
        while not after() and time.time() - began < 60:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        if twice:
            time.sleep(1.5)
            process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=20)[1]
    return process.returncode, error.strip().splitlines()


@pytest.mark.parametrize("name", ["sample", "train"])
def test_ctrl_c_while_starting_is_one_line(tmp_path, name):
    began = time.time()
    argv = ["a star", "--steps", "1000"] if name == "sample" else []
    command = [sys.executable, f"{name}.py", *argv, "--out", str(tmp_path / "x.png")]
    code, lines = interrupted(command, lambda: time.time() - began > 1)
    assert code == 130 and lines[-1] == "stopped" and "Traceback" not in "".join(lines)


def test_a_second_ctrl_c_ends_a_run_that_waits_for_data(parts, tmp_path):
    """A loader that never gives a batch: its image files are pipes that nobody writes to."""
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "0.png")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\n0.png,a red star\n")
    argv = flags(parts, tmp_path / "run", data=tmp_path / "data", steps=10)
    log = tmp_path / "run" / "log.jsonl"
    code, lines = interrupted([sys.executable, "train.py", *argv], log.exists, twice=True)
    assert code == 130 and lines[-1] == "stopped"
