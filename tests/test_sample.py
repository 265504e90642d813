"""sample.py and the shipped weights, as their user runs them."""

import json
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, check_refused, cli, environment, run
from PIL import Image

from metaquery import MetaQuery
from extras.toy_parts.fit import pictures_to_tensor
from extras.toy_parts.__main__ import same
from extras.toy_parts.language import answers
from toy.scene import COLORS, SHAPES, Goal, GoalObject, random_scene, render, score
from toy.talk import Talk, unseen_question
from toy.tasks import KINDS, SIX_KINDS, task
from toy.vocabulary import words_in
from toy.words import NUMBERS, describe


@pytest.fixture(scope="module")
def tiny():
    return MetaQuery.from_pretrained(TINY).eval()


COPIED = ("data", "toy", "training", "benchmarks", "weights")
COPIED += ("metaquery.py", "sample.py", "train.py")
FEW_STEPS = {"sample.py": " --steps 6", "train.py": " --steps 2 --warmup 1 --batch-size 4"}


def test_readme_commands(tmp_path):
    """The README's commands run in their order, in a fresh copy, with few steps.

    Left out is what needs the hub or torchrun, and what takes hours.
    """
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    assert "pip install -r requirements.txt && python sample.py" in blocks
    assert "python -m pytest -n 2 --dist loadfile" in text
    for name in COPIED:
        (tmp_path / name).symlink_to(ROOT / name)
    run_too = 0
    for line in blocks.splitlines():
        line = line.split("&&")[-1].split("#")[0].strip()
        command = re.match(r"python (sample.py|train.py|-m training.sizes)", line)
        if not command:
            continue
        line += "" if "--ask" in line else FEW_STEPS.get(command[1], "")
        line = line.replace("python", sys.executable, 1)
        options = {"shell": True, "capture_output": True, "text": True}
        done = subprocess.run(line, cwd=tmp_path, env=environment(), **options)
        assert done.returncode == 0, (line, done.stderr)
        run_too += 1
    assert run_too >= 10


def test_readme_python():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    done = run([sys.executable, "-c", block], OMP_NUM_THREADS="2")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_training_from_the_shipped_frozen_parts(tmp_path):
    done = run(
        [
            sys.executable,
            "train.py",
            "--size",
            "tiny",
            "--stage",
            "pretrain",
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--out",
            str(tmp_path),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples" / "step-00000002.png").exists()


def share_right(model, kinds, number):
    """Share of unseen cases of some kinds that the shipped model draws right."""
    made = [task(kind, i, split="test") for kind in kinds for i in range(number)]
    generator = torch.Generator().manual_seed(0)
    prompts, images = [s.prompt for s in made], [s.images for s in made]
    pictures = model.generate(prompts, images, num_inference_steps=20, generator=generator)
    return sum(score(p, s.goal) for p, s in zip(pictures, made, strict=True)) / len(made)


def test_a_sentence_becomes_its_picture(tiny):
    """Single objects and colours are drawn right, also pairs that no caption ever named."""
    assert share_right(tiny, ["single object", "colors", "held-out"], 10) >= 0.9


def test_six_kinds_are_drawn_right(tiny):
    assert share_right(tiny, SIX_KINDS, 8) >= 0.85


def test_the_readmes_sentence_becomes_its_picture(tiny):
    want = Goal((GoalObject("red", "star"), GoalObject("blue", "circle")), "left of")
    prompt = ["a red star left of a blue circle"]
    assert score(tiny.generate(prompt, generator=torch.Generator().manual_seed(0))[0], want)


@pytest.mark.parametrize(
    "kind, share",
    [
        ("reconstruction", 0.7),
        ("edit", 0.7),
        ("one subject", 0.75),
        ("two subjects", 0.65),
        ("three subjects", 0.8),
        ("association", 0.8),
    ],
)
def test_pictures_in_become_right_pictures(tiny, kind, share):
    """With room for chance: 16 cases of each kind; the README's figures are of more."""
    assert share_right(tiny, [kind], 16) >= share


def test_same_seed_same_picture_alone_or_in_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("a green square\n\na red star\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a green square"}\n{"prompt": "a red star"}\n')
    assert (
        cli("a red star", "--seed", 4, "--steps", 4, "--out", tmp_path / "one.png").returncode == 0
    )
    for name in ("p.txt", "p.jsonl"):
        out = tmp_path / name.replace(".", "-")
        done = cli("--prompts", tmp_path / name, "--seed", 4, "--steps", 4, "--out", out)
        assert done.returncode == 0, done.stderr
        assert len(list(out.glob("*.png"))) == 2
        one, again = (Image.open(p).tobytes() for p in (tmp_path / "one.png", out / "00001.png"))
        assert max(abs(a - b) for a, b in zip(one, again, strict=True)) <= 2


def test_several_pictures_are_a_grid_or_numbered_files(tmp_path):
    assert (
        cli("a star", "--num-images", 4, "--steps", 2, "--out", tmp_path / "g.png").returncode == 0
    )
    assert Image.open(tmp_path / "g.png").size == (130, 130)
    done = cli("", "--num-images", 3, "--steps", 2, "--out", tmp_path / "many")
    assert done.returncode == 0 and str(tmp_path / "many") in done.stdout
    assert [p.name for p in sorted((tmp_path / "many").iterdir())] == [
        "00000.png",
        "00001.png",
        "00002.png",
    ]


def test_the_first_line_says_what_the_tiny_model_knows(tmp_path):
    done = cli("a star", "--steps", 1, "--out", tmp_path / "x.png")
    assert done.returncode == 0 and "6 shapes, 8 colours" in done.stdout.splitlines()[0]
    assert "unknown" not in done.stderr and "warning" not in done.stderr


def test_words_never_seen_are_named_in_one_line(tmp_path):
    done = cli("a cat on a red sofa", "--steps", 1, "--out", tmp_path / "x.png")
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 0 and (tmp_path / "x.png").exists()
    assert len(warnings) == 1 and "cat, sofa" in warnings[0] and "red" not in warnings[0]


def test_no_word_of_the_toy_world_is_unknown():
    known = set((TINY / "mllm" / "vocabulary.txt").read_text().split())
    kinds = [kind for kind in KINDS if kind != "free wordings"]  # which holds typing slips
    prompts = [task(kind, i, split="test").prompt for kind in kinds for i in range(100)]
    assert not words_in(" ".join(prompts)) - known


def test_shipped_vae_is_read_after_it(tiny):
    """The scorer still reads 99% of the toy VAE's reconstructions."""
    made = [task(kind, i, split="test") for kind in (*SIX_KINDS, "dense") for i in range(30)]
    pixels = pictures_to_tensor([s.picture for s in made])
    redrawn = tiny.decode_latents(tiny.encode_latents(pixels))
    assert sum(score(p, s.goal) for p, s in zip(redrawn, made, strict=True)) >= 0.99 * len(made)


def test_shipped_mllm_knows(tiny):
    """Unseen knowledge prompts are restated plainly: 97%."""
    made = [task("knowledge", i, split="test") for i in range(200)]
    said = answers(tiny.mllm, tiny.processor, [Talk(s.prompt, "", (), True) for s in made])
    assert sum(a == s.plain for a, s in zip(said, made, strict=True)) >= 0.97 * len(made)


def test_shipped_mllm_sees(tiny):
    """Captions with the right set of (shape, colour, count): 95%."""
    rng = random.Random("see")
    scenes = [random_scene(rng) for _ in range(100)]
    said = answers(tiny.mllm, tiny.processor, [Talk("", "", (scene,), True) for scene in scenes])
    right = [words_of(a) == words_of(describe(s)) for a, s in zip(said, scenes, strict=True)]
    assert sum(right) >= 0.95 * len(right)


def test_shipped_mllm_answers(tiny):
    """Questions about pictures, as a user asks them; with room for chance."""
    asked = [unseen_question(i) for i in range(30)]
    right = [tiny.answer(t.user, t.images) == t.assistant for t in asked]
    assert sum(right) >= 0.7 * len(right)


def words_of(text):
    """A description's set of (shape, colour, count), whatever its places."""
    found = {}
    for number, color, shape in re.findall(
        rf"(\w+) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", text
    ):
        found[color, shape] = found.get((color, shape), 0) + (
            NUMBERS.index(number) if number in NUMBERS else 1
        )
    return found


def test_shipped_weights_are_small():
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) <= 40e6


def broken(tmp_path, what):
    """A copy of the shipped checkpoint with one thing broken."""
    folder = tmp_path / what
    folder.mkdir()
    if what == "empty":
        return folder
    config = json.loads((TINY / "config.json").read_text())
    config |= {name: str(TINY / config[name]) for name in ("mllm", "diffusion")}
    shutil.copy(TINY / "model.safetensors", folder)
    if what == "truncated":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    if what == "other shape":
        config["num_queries"] += 1
    if what == "other field":
        config["queries"] = 3
    (folder / "config.json").write_text("{" if what == "bad json" else json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "what, words",
    [
        ("empty", "config.json"),
        ("truncated", "corrupt"),
        ("bad json", "corrupt"),
        ("other shape", "incompatible"),
        ("other field", "corrupt"),
    ],
)
def test_broken_checkpoint_is_one_line(tmp_path, what, words):
    done = cli("a star", "--checkpoint", broken(tmp_path, what), "--out", tmp_path / "x.png")
    check_refused(done, words)
    assert not (tmp_path / "x.png").exists()


def test_same_reads_a_right_picture():
    scene = task("attribution", 0).target
    assert same(scene, np.asarray(render(scene)))
