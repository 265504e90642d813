"""Others' benchmarks: their own prompt files in, pictures where their scorers look for them out."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import check_refused
from conftest import run as run_command
from PIL import Image

from benchmarks.official import OFFICIAL, run
from metaquery import InputError

DREAMBOOTH = """Classes

subject_name,class
backpack_dog,backpack
cat2,cat

Prompts

Object Prompts
prompt_list = [
 'a {0} {1} in the jungle'.format(unique_token, class_token),
 'a {0} {1} on top of a wooden floor'.format(unique_token, class_token)
]

Live Subject Prompts
prompt_list = [
 'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def make(folder, name):
    """A small copy of a benchmark's files; returns what must be drawn, as file names."""
    folder.mkdir()
    if name == "geneval":
        rows = [{"tag": "colors", "include": [], "prompt": f"a photo of {n}"} for n in "abc"]
        (folder / "prompts").mkdir()
        path = folder / "prompts" / "evaluation_metadata.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        names = ("metadata.jsonl", "grid.png", *(f"samples/{k:04d}.png" for k in range(4)))
        return [f"{i:05d}/{name}" for i in range(3) for name in names]
    if name == "dpg":
        for n in ("12", "COCOval2014000000000073"):
            (folder / f"{n}.txt").write_text(f"a dense prompt {n}\n")
        return ["12.png", "COCOval2014000000000073.png"]
    if name == "wise":
        for start, part in ((1, "cultural_common_sense"), (401, "natural_science")):
            rows = [{"Prompt": f"p{i}", "prompt_id": i} for i in range(start, start + 2)]
            (folder / f"{part}.json").write_text(json.dumps(rows))
        return ["1.png", "2.png", "401.png", "402.png"]
    if name == "commonsense":
        rows = [{"prompt1": f"a{i}", "prompt2": f"b{i}"} for i in range(2)]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return [
            f"{way}/{i:03d}/prompt{j}_{k}.png"
            for way in ("plain", "negative")
            for i in range(2)
            for j in (1, 2)
            for k in range(4)
        ]
    if name == "mjhq":
        rows = {f"id{i}": {"category": "food", "prompt": f"p{i}"} for i in range(3)}
        (folder / "meta_data.json").write_text(json.dumps(rows))
        return [f"food/id{i}.png" for i in range(3)]
    if name == "coco":
        rows = [{"image_id": i // 2, "caption": f"c{i}", "id": i} for i in range(6)]
        (folder / "captions_val2014.json").write_text(json.dumps({"annotations": rows}))
        return [f"{i:012d}.png" for i in range(3)]
    if name == "imagenet":
        for part in ("n01", "n02"):
            (folder / part).mkdir()
            Image.new("RGB", (30, 20), "red").save(folder / part / "x.JPEG")
        return ["n01/x.png", "n02/x.png"]
    (folder / "dataset").mkdir()
    for subject in ("backpack_dog", "cat2"):
        (folder / "dataset" / subject).mkdir()
        Image.new("RGB", (30, 20), "red").save(folder / "dataset" / subject / "00.jpg")
    (folder / "dataset" / "prompts_and_classes.txt").write_text(DREAMBOOTH)
    objects = [f"backpack_dog/{i:02d}_{k}.png" for i in range(2) for k in range(4)]
    return objects + [f"cat2/00_{k}.png" for k in range(4)]


def options(name, data, out, **changes):
    data = data / "pairs.jsonl" if name == "commonsense" else data
    defaults = dict(
        data=str(data),
        out=str(out),
        limit=None,
        steps=1,
        seed=0,
        guidance=3.0,
        image_guidance=1.5,
        num_images=1,
        negative_prompt="",
    )
    return SimpleNamespace(**(defaults | changes))


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_prompt_is_drawn_where_its_scorer_looks(build, tmp_path, monkeypatch, name, capsys):
    """By two processes, each its share; a second run draws nothing anew."""
    model, expected = build("llava"), make(tmp_path / "data", name)
    asked, plain = [], model.generate

    def generate(prompts, images, **rest):
        for prompt, row in zip(prompts, images, strict=True):
            asked.append((prompt, len(row), rest["negative_prompt"]))
        return plain(prompts, images, **rest)

    model.generate = generate
    args = options(name, tmp_path / "data", tmp_path / "out")
    items = OFFICIAL[name].items(args.data)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(model, items, args)
    there = {str(p.relative_to(args.out)) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(expected) == {path for path in there if not path.startswith(".")}
    if name == "dpg":
        assert Image.open(tmp_path / "out" / "12.png").size == (16, 16), "four of 8x8, no gap"
    if name == "commonsense":
        assert ("a0", 0, "") in asked and ("a0", 0, "b0") in asked and ("b1", 0, "a1") in asked
    if name == "dreambench":
        assert ("a backpack in the jungle", 1, "") in asked
        assert ("a cat wearing a red hat", 1, "") in asked
    if name == "imagenet":
        assert all(prompt == "" and pictures == 1 for prompt, pictures, _ in asked)
    number = len(asked)
    (tmp_path / "out" / expected[-1]).unlink()
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        run(model, items, args)
    redrawn = 0 if expected[-1].endswith("metadata.jsonl") else 1
    assert len(asked) - number == redrawn, "pictures that exist are kept"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    run(model, items, options(name, tmp_path / "data", tmp_path / "alone"))
    for path in (tmp_path / "alone").rglob("*.png"):
        shared = Image.open(tmp_path / "out" / path.relative_to(tmp_path / "alone"))
        off = np.asarray(shared, int) - np.asarray(Image.open(path), int)
        assert abs(off).max() <= 2, "one process draws what two do"


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_wrong_layout_says_what_is_expected(tmp_path, name):
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=f"{name} expects"):
        OFFICIAL[name].items(tmp_path / "data")


def test_benchmarks_on_the_command_line(tmp_path):
    make(tmp_path / "data", "geneval")
    command = [sys.executable, "-m", "benchmarks.official", "geneval", "--data"]
    few = ["--steps", "1", "--limit", "2", "--out", str(tmp_path / "out")]
    done = run_command([*command, str(tmp_path / "data"), *few])
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*/samples/*.png"))) == 8
    check_refused(run_command([*command, str(tmp_path / "none")]), "geneval expects")
