"""Every mistake gets one line and exit code 2, harms no file, and never hangs: the commands that
generate. The commands run in this process where they can, so that the table takes little time."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import numpy as np
import pytest
from commands import contents
from conftest import ROOT, TINY, environment
from PIL import Image
from safetensors.torch import load_file, save_file

from metaquery import to_rgb
from sample import save_image

call, check_refused = commands.call, commands.check_refused


def copy_tiny(folder, **changes):
    """A copy of the shipped checkpoint with other fields in its config."""
    folder.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    config |= {name: str(TINY / config[name]) for name in ("mllm", "diffusion")}
    shutil.copy(TINY / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with files that are there already, and with things broken in one way each."""
    folder = tmp_path_factory.mktemp("world")
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    (folder / "notes.txt").write_text("not an image")
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

    for name, ids in (("wise", ["../../x"]), ("twice", [1, 1])):
        (folder / name).mkdir()
        rows = [{"Prompt": "a star", "prompt_id": i} for i in ids]
        (folder / name / "a.json").write_text(json.dumps(rows))
    (folder / "out").write_text("a file")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "bad.jsonl").write_text('{"prompt": "a star"\n{"prompt": null}\n{"image": "red.png"}')
    return folder


STAR = ["a star", "--steps", 2]
OFFICIAL = "benchmarks.official"
TABLE = [
    ("sample", [], "prompt"),
    ("sample", ["a star", "--prompts", "empty.txt"], "--prompts"),
    ("sample", ["red", "star"], "star"),
    ("sample", ["--ask"], "question"),
    ("sample", ["how many?", "--ask", "--out", "x.png"], "--out has no effect with --ask"),
    ("sample", ["how many?", "--ask", "--num-images", 2], "--num-images has no effect"),
    ("sample", ["how many?", "--ask", "--negative-prompt", "a"], "--negative-prompt has no"),
    ("sample", ["how many?", "--ask", "--steps", 2], "--steps has no effect"),
    ("sample", ["a star", "--checkpoint", "/nowhere"], "/nowhere"),
    ("sample", ["a star", "--checkpoint", ""], "--checkpoint is empty"),
    ("sample", ["a star", "--mllm", ""], "--mllm is empty"),
    ("sample", ["a star", "--steps", "0"], "--steps"),
    ("sample", ["a star", "--steps", "100000"], "--steps"),
    ("sample", ["a star", "--steps", "many"], "--steps"),
    ("sample", ["a star", "--guidance", "-1"], "--guidance"),
    ("sample", ["a star", "--guidance", "nan"], "--guidance"),
    ("sample", ["a star", "--guidance", "inf"], "--guidance"),
    ("sample", ["a star", "--guidance", "1e30"], "--guidance"),
    ("sample", ["a star", "--image-guidance", "nan"], "--image-guidance"),
    ("sample", ["a star", "--seed", 2**64], "--seed"),
    ("sample", ["a star", "--seed", "-1"], "--seed"),
    ("sample", ["a star", "--num-images", "0"], "--num-images"),
    ("sample", ["a star", "--batch-size", "0"], "--batch-size"),
    ("sample", ["a star", "--height", "0"], "--height"),
    ("sample", ["a star", "--height", "65"], "height is 65: give a multiple of"),
    ("sample", ["a star", "--width", "1001"], "width is 1001"),
    ("sample", ["a star", "--device", "abacus"], "--device abacus"),
    ("sample", ["a star", "--device", "mps"], "--device mps"),
    ("sample", ["a star", "--device", "meta"], "--device meta"),
    ("sample", ["a star", "--dtype", "int8"], "--dtype"),
    ("sample", [*STAR, "--out", "/proc/nowhere/x.png"], "/proc/nowhere"),
    ("sample", ["a star", "--out", ""], "--out"),
    ("sample", ["a star", "--out", "out/x.png"], "--out"),
    ("sample", ["a star", "--out", "x.unknown"], ".png"),
    ("sample", ["a star", "--out", "out"], "it is a file"),
    ("sample", ["a \udcff star"], "Unicode"),
    ("sample", ["--prompts", "/nowhere.txt"], "/nowhere.txt"),
    ("sample", ["--prompts", ""], "--prompts"),
    ("sample", ["--prompts", "empty.txt"], "empty"),
    ("sample", ["--prompts", "bad.jsonl"], 'line 2: give "prompt"'),
    ("sample", ["--prompts", "red.png"], "red.png"),
    ("sample", ["--image", "nowhere.png"], "nowhere.png"),
    ("sample", ["--image", "foreign"], "foreign"),
    ("sample", ["--image", "notes.txt"], "cannot identify"),
    ("sample", [*STAR, "--checkpoint", "typed"], "num_queries is '16'"),
    ("sample", [*STAR, "--checkpoint", "nan"], "not finite"),
    ("sample", [*STAR, "--checkpoint", "cut"], "cannot load"),
    ("sample", [*STAR, "--checkpoint", "wordless"], "cannot load"),
    ("sample", [*STAR, "--checkpoint", "chatless"], "chat template"),
    ("sample", [*STAR, "--mllm", "nowhere"], "--mllm"),
    ("sample", [*STAR, "--diffusion", "nowhere"], "--diffusion"),
    ("sample", [*STAR, "--vae", "nowhere"], "--vae"),
    (OFFICIAL, ["geneval", "--data", "foreign"], "geneval expects"),
    (OFFICIAL, ["wise", "--data", "wise", "--out", "new"], "outside --out"),
    (OFFICIAL, ["wise", "--data", "twice", "--out", "new"], "two prompts"),
    (OFFICIAL, ["wise", "--data", "twice", "--limit", "0"], "--limit"),
    (OFFICIAL, ["wise", "--data", "twice", "--out", "out"], "it is a file"),
    (OFFICIAL, ["geneval", "--data", "foreign", "--checkpoint", ""], "geneval expects"),
    ("benchmarks.toy", ["--limit", 0], "--limit"),
    ("benchmarks.toy", ["--limit", 1, "--out", "x.bmp"], ".png"),
    ("benchmarks.toy", ["--limit", 1, "--json", "foreign"], "it is a folder"),
    ("benchmarks.scores", ["foreign", "foreign"], "holds no images"),
    ("benchmarks.scores", ["foreign", "foreign", "--batch-size", 0], "--batch-size"),
]


@pytest.mark.parametrize(
    "name, flags, words", TABLE, ids=[f"{n} {' '.join(map(str, f))[-40:]}" for n, f, _ in TABLE]
)
def test_a_mistake_is_one_line_and_harms_nothing(call, world, monkeypatch, name, flags, words):
    if name == "benchmarks.scores":
        pytest.importorskip("torchmetrics")
    monkeypatch.chdir(world)
    before = contents(world)
    check_refused(call(name, *flags), words)
    assert contents(world) == before


# ---- What is accepted works ----------------------------------------------------------------------
def test_bad_lines_do_not_lose_the_good_ones(call, tmp_path):
    rows = ['{"prompt": "a red star"}', '{"prompt": "a \\ud800 star"}', '{"prompt": null}']
    rows += ['{"image": "x.png"}', "{", '{"prompt": "a blue\u00a0cross", "id": 7}']
    rows += ['{"prompt": "a", "seed": -1}', '{"prompt": "a", "height": "64"}']
    (tmp_path / "a.JSONL").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    code, _, lines = call("sample", "--prompts", "a.JSONL", "--steps", 2)
    assert code == 2 and len(lines) == 1
    assert all(f"prompt {number}:" in lines[0] for number in (2, 3, 4, 5, 7, 8))
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["00000.png", "00005.png"]
    assert Image.open(tmp_path / "samples" / "00005.png").text["prompt"] == "a blue cross"


def test_a_line_that_is_not_utf8_loses_no_other(call, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a red star\r\na \xff cross\na blue\x0bcross\n")
    check_refused(call("sample", "--prompts", "a.txt", "--steps", 1), "a.txt line 2:")
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["00000.png", "00002.png"]


def test_a_byte_order_mark_changes_no_prompt(call, tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa red star\n", encoding="utf-8")
    assert call("sample", "--prompts", "a.txt", "--steps", 2)[::2] == (0, [])
    assert call("sample", "a red star", "--steps", 2)[::2] == (0, [])
    one, other = (Image.open(tmp_path / n) for n in ("samples/00000.png", "sample.png"))
    assert one.tobytes() == other.tobytes()


def test_nothing_is_overwritten_unasked(call, tmp_path):
    for name in ("sample.png", "sample-1.png", "sample-2.png"):
        before = contents(tmp_path)
        assert call("sample", *STAR)[0] == 0
        assert contents(tmp_path).keys() - before.keys() == {str(tmp_path / name)}
        assert before.items() <= contents(tmp_path).items()
    text = Image.open(tmp_path / "sample.png").text
    assert text["prompt"] == "a star" and text["seed"] == "0" and text["guidance"] == "3.0"

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.png").write_text("mine")
    (tmp_path / ".x.png").write_text("mine too")
    assert call("sample", *STAR, "--out", "out")[0] == 0
    assert call("sample", *STAR, "--out", "x.png")[0] == 0
    assert (tmp_path / "out" / "00000.png").read_text() == "mine"
    assert (tmp_path / ".x.png").read_text() == "mine too"
    assert Image.open(tmp_path / "out" / "00000-1.png").text["prompt"] == "a star"


def test_a_full_disk_spares_the_image_there(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_image(Image.new("RGB", (8, 8), "red"), path)
    before = contents(tmp_path)

    def full(self, file, *rest, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError):
        save_image(Image.new("RGB", (8, 8), "blue"), path)
    assert contents(tmp_path) == before


def test_asking_needs_no_writable_folder(call, tmp_path):
    """A file stands where the images' folder would be."""
    (tmp_path / "samples").write_text("")
    (tmp_path / "a.txt").write_text("what colour is a lemon?\n")
    code, out, lines = call("sample", "--prompts", "a.txt", "--ask")
    assert code == 0 and out.strip() and not lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "samples"]


def test_a_float_image_is_seen():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    seen = np.asarray(to_rgb(Image.fromarray(values)))
    assert seen.max() == 255 and np.abs(seen[..., 0] - values * 255).max() <= 1


def test_a_long_prompts_warning_is_one_line(call):
    code, _, lines = call("sample", "a red star " * 200, "--steps", 2)
    assert code == 0 and all(line.startswith("warning: prompt cut from") for line in lines)


@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_ctrl_c_while_starting_is_one_line(tmp_path, seconds):
    command = [sys.executable, "sample.py", "a star", "--steps", "1000", "--out"]
    options = {"cwd": ROOT, "env": environment(), "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, tmp_path / "x.png"], **options) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and error.strip().splitlines()[-1] == "stopped"
    assert "Traceback" not in error and not list(tmp_path.iterdir())
