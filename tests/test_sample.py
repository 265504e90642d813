"""sample.py and the shipped weights, as their user runs them."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys

import commands
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, environment
from PIL import Image

import sample
from extras.toy_parts.language import answers
from metaquery import SYSTEM_PROMPT, to_pixels
from toy.scene import COLORS, SHAPES, Goal, GoalObject, Object, Scene, random_scene, render, score
from toy.talk import Talk, unseen_question
from toy.tasks import SIX_KINDS, task
from toy.words import NUMBERS, describe

call, check_refused = commands.call, commands.check_refused


# ---- The README ----------------------------------------------------------------------------------
def readme(language):
    text = (ROOT / "README.md").read_text()
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", text, re.S))


def test_the_readmes_commands(call, monkeypatch):
    """Those of sample.py run in their order, with few steps; public weights are only parsed."""
    count = 0
    for line in readme("bash").splitlines():
        command = re.search(r"python sample.py ([^#]*)", line)
        if not command:
            continue
        flags = shlex.split(command[1])
        if {"openuni-b-512", "unipic2"} & set(flags):
            monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
            assert sample.parse_arguments().checkpoint in flags
        else:
            if "--ask" not in flags:
                flags += ["--steps", "6"]
            assert call("sample", *flags)[0] == 0, line
        count += 1
    assert count >= 5


def test_the_readmes_python():
    out = subprocess.run(
        [sys.executable, "-c", readme("python")], cwd=ROOT, env=environment(), capture_output=True
    )
    assert out.returncode == 0 and out.stdout.strip(), out.stderr


# ---- The shipped weights -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny():
    return commands.shipped(torch.float32).eval()


def share_right(model, kinds, number):
    """Share of unseen cases of some kinds that the shipped model generates right."""
    tasks = [task(kind, i, split="test") for kind in kinds for i in range(number)]
    generator = torch.Generator().manual_seed(0)
    prompts, images = [t.prompt for t in tasks], [t.images for t in tasks]
    results = model.generate(prompts, images, num_inference_steps=10, generator=generator)
    return sum(score(image, t.goal) for image, t in zip(results, tasks, strict=True)) / len(tasks)


def test_a_sentence_becomes_its_image(tiny):
    """Single objects and colours are right, also pairs that no caption ever named."""
    assert share_right(tiny, ["single object", "colors", "held-out"], 10) >= 0.9


def test_six_kinds_are_right(tiny):
    assert share_right(tiny, SIX_KINDS, 8) >= 0.85


def test_the_readmes_sentence_becomes_its_image(tiny):
    goal = Goal((GoalObject("red", "star"), GoalObject("blue", "circle")), "left of")
    prompt = ["a red star left of a blue circle"]
    assert score(tiny.generate(prompt, generator=torch.Generator().manual_seed(0))[0], goal)


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
def test_images_in_become_right_images(tiny, kind, share):
    """With room for chance: 16 cases of each kind; the README's figures are of more."""
    assert share_right(tiny, [kind], 16) >= share


def test_the_shipped_vae_is_read_after_it(tiny):
    """The scorer still reads 99% of the toy VAE's reconstructions."""
    tasks = [task(kind, i, split="test") for kind in (*SIX_KINDS, "dense") for i in range(30)]
    pixels = to_pixels([t.target_image for t in tasks], tiny.resolution)
    images = tiny.decode_latents(tiny.encode_latents(pixels))
    right = [score(image, t.goal) for image, t in zip(images, tasks, strict=True)]
    assert sum(right) >= 0.99 * len(tasks)


def test_the_shipped_mllm_knows(tiny):
    """Unseen knowledge prompts are restated plainly: 97%."""
    tasks = [task("knowledge", i, split="test") for i in range(200)]
    texts = answers(tiny.mllm, tiny.processor, [Talk(t.prompt, "", (), True) for t in tasks])
    assert sum(a == t.plain for a, t in zip(texts, tasks, strict=True)) >= 0.97 * len(tasks)


def test_the_shipped_mllm_sees(tiny):
    """Captions with the right set of (shape, colour, count): 95%."""
    rng = random.Random("see")
    scenes = [random_scene(rng) for _ in range(100)]
    texts = answers(tiny.mllm, tiny.processor, [Talk("", "", (scene,), True) for scene in scenes])
    right = [objects_in(a) == objects_in(describe(s)) for a, s in zip(texts, scenes, strict=True)]
    assert sum(right) >= 0.95 * len(right)


def test_the_shipped_mllm_answers(tiny):
    """Questions about images, as a user asks them; with room for chance."""
    questions = [unseen_question(i) for i in range(30)]
    right = [tiny.answer(t.user, t.images) == t.assistant for t in questions]
    assert sum(right) >= 0.7 * len(right)


def objects_in(text):
    """A description's {(colour, shape): count}, whatever its places."""
    found = {}
    names = rf"(\w+) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
    for number, color, shape in re.findall(names, text):
        count = NUMBERS.index(number) if number in NUMBERS else 1
        found[color, shape] = found.get((color, shape), 0) + count
    return found


def test_the_shipped_weights_are_small():
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) <= 40e6


# ---- The command ---------------------------------------------------------------------------------
def notes(path):
    return Image.open(path).text


def test_a_seed_means_the_same_image_alone_or_in_a_file(call, tmp_path):
    (tmp_path / "p.txt").write_text("a green square\n\na red star\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a green square"}\n{"prompt": "a red star"}\n')
    few = ("--seed", 4, "--steps", 4)
    assert call("sample", "a red star", *few, "--out", "one.png")[0] == 0
    one = np.asarray(Image.open("one.png"), int)
    for name in ("p.txt", "p.jsonl"):
        assert call("sample", "--prompts", name, *few, "--out", name[2:])[0] == 0
        assert len(list((tmp_path / name[2:]).iterdir())) == 2
        again = np.asarray(Image.open(f"{name[2:]}/00001.png"), int)
        assert np.abs(again - one).max() <= 2


def test_several_images_are_a_grid_or_numbered_files(call, tmp_path):
    assert call("sample", "a star", "--num-images", 4, "--steps", 2, "--out", "g.png")[0] == 0
    assert Image.open("g.png").size == (130, 130)
    code, out, _ = call("sample", "", "--num-images", 3, "--steps", 2, "--out", "many")
    assert code == 0 and out.endswith("saved 3 images in many\n")
    names = [path.name for path in sorted((tmp_path / "many").iterdir())]
    assert names == ["00000.png", "00001.png", "00002.png"]


def test_each_row_has_its_own_size_seed_and_negative_prompt(call, tmp_path, tiny, monkeypatch):
    rows = [
        {"prompt": "a star", "height": 32, "width": 96, "seed": 5},
        {"prompt": "a star", "negative_prompt": "red"},
        {"prompt": "a star"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen, plain = [], tiny.generate

    def generate(*inputs, **options):
        size = options["height"], options["width"]
        seed = options["generator"][0].initial_seed()
        seen.append((*options["negative_prompt"], *size, seed))
        return plain(*inputs, **options)

    monkeypatch.setattr(tiny, "generate", generate)
    flags = ["--prompts", "p.jsonl", "--steps", 1, "--seed", 3, "--negative-prompt", "blue"]
    assert call("sample", *flags, "--out", "o", "--height", 64)[0] == 0
    assert seen == [("blue", 32, 96, 5), ("red", "blue", 64, None, 3)]
    assert Image.open("o/00000.png").size == (96, 32) and notes("o/00000.png")["seed"] == "5"
    assert Image.open("o/00001.png").size == (64, 64)


def test_what_the_model_understood_is_said(call, tiny, monkeypatch):
    monkeypatch.setitem(tiny.generation_config, "restates", True)
    code, out, _ = call("sample", "a brown circle, please", "--steps", 1)
    assert code == 0 and out.startswith("drawn as: a brown circle\n")
    assert notes("sample.png")["drawn as"] == "a brown circle"
    monkeypatch.setitem(tiny.generation_config, "restates", False)
    assert call("sample", "a brown circle", "--steps", 1)[1] == "saved sample-1.png\n"
    assert "drawn as" not in notes("sample-1.png")


@pytest.mark.parametrize("prompt, changed", [("bake a cake", False), ("make it green", True)])
def test_an_edit_that_changes_nothing_says_so(call, tmp_path, tiny, monkeypatch, prompt, changed):
    monkeypatch.setitem(tiny.generation_config, "restates", True)
    render(Scene((Object("star", "red"),))).save(tmp_path / "a.png")
    source = ("--image", tmp_path / "a.png")
    code, out, _ = call("sample", prompt, *source, "--out", tmp_path / "b.png")
    assert code == 0 and ("nothing changed" in out) != changed
    assert ("note" in notes(tmp_path / "b.png")) != changed


def test_a_prompt_is_rewritten_by_the_untouched_mllm(call, tiny, monkeypatch):
    """It is asked once, without the queries' system prompt; the image is of what it wrote."""
    asked = []

    def answer(prompt, images, system=None, max_new_tokens=256):
        asked.append((prompt, system))
        return "a red\nstar "

    monkeypatch.setattr(tiny, "answer", answer)
    few = ("--steps", 2, "--out")
    code, out, _ = call("sample", "a thing", "--rewrite", *few, "a.png")
    assert code == 0 and "rewritten as: a red star\n" in out
    asked = [text for text, system in asked if system != SYSTEM_PROMPT]
    assert asked == [sample.REWRITE.format("a thing")]
    assert notes("a.png")["prompt"] == "a thing"
    assert notes("a.png")["rewritten as"] == "a red star"
    call("sample", "a red star", *few, "b.png")
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()


def test_the_batch_size_bounds_what_is_generated_at_once(call, tmp_path, tiny, monkeypatch):
    (tmp_path / "p.txt").write_text("a star\n" * 5)
    sizes, plain = [], tiny.generate

    def generate(prompts, *inputs, **options):
        sizes.append(len(prompts))
        return plain(prompts, *inputs, **options)

    monkeypatch.setattr(tiny, "generate", generate)
    few = ("--steps", 1, "--out", "o", "--num-images", 2, "--batch-size", 5)
    assert call("sample", "--prompts", "p.txt", *few)[0] == 0
    assert sizes == [2, 2, 1] and len(list((tmp_path / "o").iterdir())) == 10


def broken(tmp_path, problem):
    """A copy of the shipped checkpoint with one thing broken."""
    folder = tmp_path / problem
    folder.mkdir()
    if problem == "empty":
        return folder
    config = json.loads((TINY / "config.json").read_text())
    config |= {name: str(TINY / config[name]) for name in ("mllm", "diffusion")}
    shutil.copy(TINY / "model.safetensors", folder)
    if problem == "truncated":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    if problem == "other shape":
        config["num_queries"] += 1
    if problem == "other field":
        config["queries"] = 3
    text = "{" if problem == "bad json" else json.dumps(config)
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    "problem, words",
    [
        ("empty", "config.json"),
        ("truncated", "corrupt"),
        ("bad json", "corrupt"),
        ("other shape", "do not fit"),
        ("other field", "corrupt"),
    ],
)
def test_a_broken_checkpoint_is_one_line(call, tmp_path, problem, words):
    checkpoint = broken(tmp_path, problem)
    check_refused(call("sample", "a star", "--checkpoint", checkpoint, "--out", "x.png"), words)
    assert not (tmp_path / "x.png").exists()
