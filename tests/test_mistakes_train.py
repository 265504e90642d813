"""Every mistake gets one line and exit code 2, harms no file, and never hangs.

The commands run in this process where they can, so that the whole table takes little time.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, environment
from PIL import Image
from safetensors.torch import load_file, save_file

import benchmarks.official
import sample
import extras.toy_parts.__main__
import train
import extras.sizes
from sample import open_picture, save_picture
from metaquery import InputError, MetaQuery, to_rgb

MODULES = {"sample": sample, "official": benchmarks.official, "sizes": training.sizes}
MODULES |= {"pretrain": toy.pretrain, "train": train}


def contents(folder):
    """{path: bytes} of all files below a folder, and None for folders."""
    files = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    return {str(path): data for path, data in files.items()}


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """call("sample", *flags) runs a command in a folder of its own: (exit code, stderr's lines)."""
    monkeypatch.chdir(tmp_path)
    handler, show = signal.getsignal(signal.SIGINT), warnings.showwarning

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        code = 0
        try:
            MODULES[name].main()
        except SystemExit as stopped:
            code = stopped.code
        return code, capfd.readouterr().err.strip().splitlines()

    yield run
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, handler)
    warnings.showwarning = show


# ---- What the table's commands find in their folder ----------------------------------------------


def copy_tiny(folder, **changes):
    """A copy of the shipped checkpoint with other fields in its config."""
    folder.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    config |= {name: str(TINY / config[name]) for name in ("mllm", "diffusion")}
    shutil.copy(TINY / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def make_world(folder):
    """Files that are there already, and things that are broken in one way each."""
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "log.jsonl").write_text("mine\n")
    copy_tiny(folder / "typed", num_queries="16")
    copy_tiny(folder / "nan")
    state = load_file(folder / "nan" / "model.safetensors")
    save_file({name: x * np.nan for name, x in state.items()}, folder / "nan" / "model.safetensors")
    for name in ("cut", "wordless", "chatless"):
        mllm = shutil.copytree(TINY / "mllm", folder / f"mllm-{name}")
        copy_tiny(folder / name, mllm=str(mllm))
    weights = folder / "mllm-cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    (folder / "mllm-wordless" / "tokenizer.json").write_text("")
    (folder / "mllm-chatless" / "chat_template.jinja").unlink()
    rows = {"image": [Image.new("RGB", (64, 64))] * 2, "caption": ["a star", "a cross"]}
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    for name, number in (("two", 2), ("one", 1), ("none", 0)):
        (folder / name).mkdir()
        rows.select(range(number)).to_parquet(folder / name / "x.parquet")
    (folder / "wise").mkdir()
    (folder / "out").write_text("a file")
    ids = [{"Prompt": "a star", "prompt_id": "../../x"}]
    (folder / "wise" / "a.json").write_text(json.dumps(ids))
    (folder / "twice").mkdir()
    ids = [{"Prompt": "a star", "prompt_id": 1}, {"Prompt": "a cross", "prompt_id": 1}]
    (folder / "twice" / "a.json").write_text(json.dumps(ids))
    (folder / "empty.txt").write_text("\n\n")
    (folder / "text.json").write_text('{"prompt": "a star"}')
    (folder / "bad.jsonl").write_text('{"prompt": "a star"\n{"image": "red.png"}\n{"prompt": null}')


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


STAR = ["a star", "--steps", 2]
TRAIN = ["--out", "run", "--steps", 2, "--warmup", 1, "--batch-size", 2]
DATA = [*TRAIN, "--sample-every", 9]
TABLE = [
    ("sizes", ["huge"], "tiny"),
    ("sizes", ["base", "--num-queries", "0"], "num_queries"),
    ("sizes", ["base", "--processes", "0"], "--processes"),
    ("pretrain", ["--part", "mllm", "--out", "new"], "make --part vision first"),
    ("pretrain", ["--part", "diffusion", "--out", "new"], "make --part vae first"),
    ("pretrain", ["--part", "vae", "--steps", "0", "--out", "new"], "--steps is 0"),
    ("pretrain", ["--part", "vae", "--steps", "-3", "--out", "new"], "--steps is -3"),
    ("pretrain", ["--part", "vae", "--batch-size", "-1", "--out", "new"], "--batch-size"),
    ("pretrain", ["--steps", "5", "--out", "new"], "--part"),
    ("pretrain", ["--part", "dream"], "--part"),
    ("train", [*TRAIN, "--size", "huge"], "'tiny', 'base'"),
    ("train", [*TRAIN, "--stage", "dream"], "pretrain"),
    ("train", [*TRAIN, "--stage", "edit"], "--checkpoint"),
    ("train", [*TRAIN, "--flag-that-is-not"], "--flag-that-is-not"),
    ("train", [*TRAIN, "--steps", "0"], "--steps"),
    ("train", [*TRAIN, "--steps", 10**12], "--steps"),
    ("train", [*TRAIN, "--batch-size", "5", "--micro-batch-size", "2"], "multiple of 2"),
    ("train", [*TRAIN, "--micro-batch-size", "-1"], "--micro-batch-size"),
    ("train", [*TRAIN, "--shard-frozen"], "needs --shard"),
    ("train", [*TRAIN, "--lr", "0"], "--lr"),
    ("train", [*TRAIN, "--lr", "-1"], "--lr"),
    ("train", [*TRAIN, "--lr", "nan"], "--lr"),
    ("train", [*TRAIN, "--lr", "inf"], "--lr"),
    ("train", [*TRAIN, "--workers", "-1"], "--workers"),
    ("train", [*TRAIN, "--seed", 2**64], "--seed"),
    ("train", [*TRAIN, "--num-queries", "0"], "--num-queries"),
    ("train", [*TRAIN, "--train-diffusion", "maybe"], "--train-diffusion"),
    ("train", [*TRAIN, "--device", "abacus"], "--device abacus"),
    ("train", [*TRAIN, "--device", "mps"], "--device mps"),
    ("train", [*TRAIN, "--mllm", "/nowhere/mllm"], "--mllm"),
    ("train", [*TRAIN, "--checkpoint", "/nowhere/run"], "/nowhere/run"),
    ("train", [*TRAIN, "--checkpoint", TINY, "--num-queries", "9"], "first queries"),
    ("train", [*TRAIN, "--out", ""], "--out"),
    ("train", [*TRAIN, "--out", "out"], "it is a file"),
    ("train", [*TRAIN, "--out", "out/run"], "is not a folder"),
    ("train", [*TRAIN, "--out", "foreign"], "log.jsonl"),
    ("train", [*TRAIN, "--out", "/proc/nowhere"], "/proc/nowhere"),
    ("train", [*TRAIN, "--checkpoint", "typed", "--out", "typed"], "--checkpoint itself"),
    ("train", [*TRAIN, "--data", "two=0,one=1"], "'two=0'"),
    ("train", [*TRAIN, "--data", "two=x"], "'two=x'"),
    ("train", [*TRAIN, "--data", "two=-1"], "'two=-1'"),
    ("train", [*TRAIN, "--data", "two=nan"], "'two=nan'"),
    ("train", [*TRAIN, "--data", "toy,two"], "cannot be mixed"),
    ("train", [*TRAIN, "--data", "notes.txt"], "neither a .tar"),
    ("train", [*TRAIN, "--data", "nowhere/nothing"], "cannot read --data"),
    ("train", [*TRAIN, "--data", "none"], "--data none"),
    ("train", [*TRAIN, "--data", "none", "--streaming"], "no rows"),
    ("train", [*TRAIN, "--data", "two", "--text-column", "words"], "--text-column"),
]


@pytest.mark.parametrize(
    "name, flags, words", TABLE, ids=[f"{n} {' '.join(map(str, f))[-40:]}" for n, f, _ in TABLE]
)
def test_a_mistake_is_one_line_and_harms_nothing(call, world, monkeypatch, name, flags, words):
    monkeypatch.chdir(world)
    before = contents(world)
    code, lines = call(name, *flags)
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and words in lines[0] and "Traceback" not in lines[0]
    assert contents(world) == before


# ---- What is accepted works ----------------------------------------------------------------------


def test_the_python_interface_says_what_it_expects(build):
    model = build()
    picture = Image.new("RGB", (16, 16))
    one = model.encode_prompts("a red star")[0]
    assert torch.equal(one, model.encode_prompts(["a red star"])[0])
    flat = model.encode_prompts(["a", "b"], [picture, picture])[0]
    assert torch.equal(flat, model.encode_prompts(["a", "b"], [[picture], [picture]])[0])
    two = model.encode_prompts("a", [picture, picture])[0]
    assert torch.equal(two, model.encode_prompts(["a"], [[picture, picture]])[0])
    for images in (["x.png"], [["x.png"]], [np.zeros((8, 8, 3))], [[picture], [picture]]):
        with pytest.raises(InputError, match="images"):
            model.generate(["a"], images)
    with pytest.raises(InputError, match="Unicode"):
        model.encode_prompts([None])
    with pytest.raises(InputError, match="unknown connector 'x'"):
        MetaQuery.from_pretrained(TINY, connector="x")


def test_a_missing_pad_token_is_the_end_token(parts, tmp_path, build):
    folder = shutil.copytree(parts / "qwen", tmp_path / "qwen")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    end = settings["eos_token"]
    settings |= {"pad_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings))
    model = build(folder)
    assert model.tokenizer.pad_token == end
    assert model.encode_prompts(["a red star", "a"])[0].isfinite().all()


# ---- Training ------------------------------------------------------------------------------------


def start(parts, out, *flags):
    """The command of a short run on tiny random parts."""
    names = {"--mllm": parts / "llava", "--diffusion": parts / "sana64", "--out": out}
    names |= {"--num-queries": 4, "--connector-layers": 1, "--batch-size": 2, "--warmup": 1}
    return [str(part) for pair in names.items() for part in pair] + list(map(str, flags))


def test_frozen_diffusion_trains_saves_and_draws(call, parts, tmp_path):
    flags = ["--steps", 2, "--train-diffusion", "false", "--sample-every", 1, "--save-every", 1]
    code, lines = call("train", *start(parts, "run", *flags))
    assert code == 0 and (tmp_path / "run" / "samples" / "step-00000001.png").exists(), lines
    trained = load_file(tmp_path / "run" / "model.safetensors")
    assert trained and not any(name.startswith("diffusion") for name in trained)


@pytest.mark.parametrize("streaming, workers", [(True, 0), (False, 0)])
def test_one_row_is_enough_for_one_reader(call, parts, world, streaming, workers):
    flags = ["--data", world / "one", "--streaming", str(streaming).lower(), "--steps", 2]
    assert call("train", *start(parts, "run", *flags, "--sample-every", 9))[0] == 0


def test_a_reader_without_rows_is_one_line(parts, world, tmp_path):
    flags = ["--data", world / "one", "--streaming", "true", "--workers", 2, "--steps", 2]
    command = [sys.executable, "train.py", *start(parts, tmp_path / "run", *flags)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith("error: reader") and "--workers" in last


def test_a_single_file_is_a_dataset(call, parts, world):
    flags = ["--data", world / "two" / "x.parquet", "--steps", 2, "--sample-every", 9]
    assert call("train", *start(parts, "run", *flags))[0] == 0


def test_reconstruction_needs_no_captions(call, parts, tmp_path):
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (64, 64))] * 4})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "x.parquet")
    flags = ["--data", "x.parquet", "--stage", "reconstruct", "--steps", 2, "--sample-every", 9]
    assert call("train", *start(parts, "run", *flags))[0] == 0


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_cut_shard_is_skipped_and_named(call, parts, tmp_path, streaming):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.jpg")
    (tmp_path / "0.txt").write_text("a red star")
    (tmp_path / "shards").mkdir()
    for name in ("a", "b"):
        with tarfile.open(tmp_path / "shards" / f"{name}.tar", "w") as tar:
            for i in range(4):
                for kind in ("jpg", "txt"):
                    tar.add(tmp_path / f"0.{kind}", f"{i}.{kind}")
    path = tmp_path / "shards" / "b.tar"
    path.write_bytes(path.read_bytes()[:1500])
    flags = ["--data", "shards", "--streaming", streaming, "--steps", 3, "--sample-every", 9]
    code, lines = call("train", *start(parts, "run", *flags))
    assert code == 0 and "skipped 1 of 2 shards, cut off: b.tar" in lines, lines


def test_a_second_run_in_the_same_folder_is_refused(call, parts, tmp_path):
    flags = start(parts, tmp_path / "run", "--steps", 10**6, "--sample-every", 10**6)
    command = [sys.executable, "train.py", *flags]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE) as first:
        while not (tmp_path / "run" / "log.jsonl").exists() and first.poll() is None:
            time.sleep(0.2)
        code, lines = call("train", *flags)
        first.kill()
    assert code == 2 and "a run is using" in lines[-1]
    assert call("train", *start(parts, tmp_path / "run", "--steps", 1))[0] == 0  # the lock is gone


def test_a_finished_run_is_not_extended(call, parts, tmp_path):
    assert call("train", *start(parts, "run", "--steps", 2))[0] == 0
    before = contents(tmp_path)
    code, lines = call("train", *start(parts, "run", "--steps", 4))
    assert code == 2 and "--checkpoint run --out OTHER" in lines[-1]
    log = str(tmp_path / "run" / "log.jsonl")
    assert contents(tmp_path)[log] == before[log]


def test_a_run_shorter_than_its_warm_up_says_so(call, parts):
    code, lines = call("train", *start(parts, "run", "--steps", 1))
    assert code == 0 and "no more than --warmup 1" in lines[0]


def test_a_checkpoint_can_be_moved(call, parts, tmp_path):
    """Parts beside metaquery.py are named relative to it, so that any clone finds them."""
    assert call("train", "--steps", 1, "--warmup", 0, "--batch-size", 2, "--out", "run")[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["mllm"] == "weights/tiny/mllm"
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert call("sample", *STAR, "--checkpoint", "moved") == (0, [])


def test_help_is_complete_and_imports_nothing_slow():
    code = "import runpy, sys\nsys.argv = ['train.py', '--help']\n"
    code += "try: runpy.run_path('train.py', run_name='__main__')\n"
    code += "finally: print('slow:', {'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "slow: set()" in done.stdout
    for words in ("--num-queries", "how many learnable queries", "(900)", "{enc-proj,proj-enc}"):
        assert words in done.stdout


def interrupted(command, after, twice=False):
    """(exit code, stderr's lines) of a command that gets Ctrl-C once `after()` holds."""
    began = time.time()
    options = {"cwd": ROOT, "env": environment(), "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, **options) as process:
        while not after() and time.time() - began < 60:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        if twice:
            time.sleep(1)
            process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=20)[1]
    return process.returncode, error.strip().splitlines()


@pytest.mark.parametrize("name", ["sample", "train"])
@pytest.mark.parametrize("seconds", [0.5, 1.5, 3.0])
def test_ctrl_c_while_starting_is_one_line(parts, tmp_path, name, seconds):
    began = time.time()
    flags = ["a star", "--steps", "1000"] if name == "sample" else start(parts, tmp_path / "run")
    flags += ["--out", str(tmp_path / "x.png")] if name == "sample" else []
    command = [sys.executable, f"{name}.py", *flags]
    code, lines = interrupted(command, lambda: time.time() - began > seconds)
    assert code == 130 and lines[-1] == "stopped" and "Traceback" not in "".join(lines)


def test_a_second_ctrl_c_ends_a_run_that_waits_for_data(parts, tmp_path):
    """A loader that never gives a batch: its picture files are pipes that nobody writes to."""
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "0.png")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\n0.png,a red star\n")
    flags = ["--data", tmp_path / "data", "--steps", 10]
    command = [sys.executable, "train.py", *start(parts, tmp_path / "run", *flags)]
    log = tmp_path / "run" / "log.jsonl"
    code, lines = interrupted(command, log.exists, twice=True)
    assert code == 130 and lines[-1] == "stopped"
