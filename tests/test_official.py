"""Others' benchmarks: their own prompt files in, pictures where their scorers look for them out."""

import json
import sys
from itertools import product
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from conftest import check_refused
from conftest import run as run_command
from PIL import Image

from benchmarks import official, scores
from benchmarks.official import OFFICIAL, run
from metaquery import InputError

SEVEN_AND_A_HALF = ("geneval", "dpg", "wise", "commonsense")
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
        legacy, verified = folder / "WISE_legacy" / "data", folder / "data_verified"
        for place, suffix in ((legacy, ""), (legacy, "_rewrite"), (verified, "_verified")):
            place.mkdir(parents=True, exist_ok=True)
            for first, part in ((1, "cultural_common_sense"), (401, "natural_science")):
                rows = [{"Prompt": f"p{i}{suffix}", "prompt_id": i} for i in (first, first + 1)]
                (place / f"{part}{suffix}.json").write_text(json.dumps(rows))
        (verified / "merge.json").write_text(json.dumps(rows * 2))
        return ["1.png", "2.png", "401.png", "402.png"]
    if name == "commonsense":
        rows = [{"prompt1": f"a{i}", "prompt2": f"b{i}", "description1": "é"} for i in range(2)]
        text = json.dumps(rows, ensure_ascii=False)
        (folder / "data.json").write_text(text, encoding="utf-8")
        return [
            f"metaquery{way}_images/prompt{j}_img/{name}.jpg"
            for way in ("", "neg")
            for i in (1, 2)
            for j in (1, 2)
            for name in (f"{i:04d}", *(f"original/{i:04d}-{k}" for k in (1, 2, 3, 4)))
        ]
    if name == "mjhq":
        rows = {f"id{i}": {"category": "food", "prompt": f"p{i}"} for i in range(3)}
        (folder / "meta_data.json").write_text(json.dumps(rows))
        return [f"food/id{i}.png" for i in range(3)]
    if name == "coco":
        rows = {"image": [Image.new("RGB", (30, 20))] * 3, "caption": ["c0", "c1", "c2"]}
        rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        (folder / "data").mkdir()
        rows.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        return [f"{i:05d}.png" for i in range(3)]
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
    names = [f"backpack_dog/{i:02d}_{k}" for i in range(2) for k in range(4)]
    names += [f"cat2/00_{k}" for k in range(4)]
    return [f"{name}{suffix}" for name in names for suffix in (".txt", ".png")]


def options(name, data, out, **changes):
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
    asked, sizes, plain = [], [], model.generate

    def generate(prompts, images, **rest):
        for prompt, row in zip(prompts, images, strict=True):
            asked.append((prompt, len(row), rest["negative_prompt"]))
            sizes.extend(picture.size for picture in row)
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
        first = tmp_path / "out" / "metaqueryneg_images" / "prompt2_img" / "original" / "0002-4.jpg"
        assert Image.open(first).format == "JPEG"
    if name == "wise":
        assert sorted(prompt for prompt, *_ in asked) == ["p1", "p2", "p401", "p402"]
    if name == "dreambench":
        assert ("a backpack in the jungle", 1, "") in asked
        assert ("a cat wearing a red hat", 1, "") in asked
    if name == "imagenet":
        assert all(prompt == "" and pictures == 1 for prompt, pictures, _ in asked)
        assert set(sizes) == {(384, 384)}
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
    for path in (tmp_path / "alone").rglob("*.[pj][np]g"):
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


def prompts_of(name, data, **options):
    return [item.prompt for item in OFFICIAL[name].items(data, **options)]


def test_wise_has_three_sets_of_prompts(tmp_path):
    """The paper's, the rewritten ones and those verified later; merge.json repeats the last."""
    make(tmp_path / "wise", "wise")
    assert prompts_of("wise", tmp_path / "wise") == ["p1", "p2", "p401", "p402"]
    rewritten = prompts_of("wise", tmp_path / "wise", rewrite=True)
    assert rewritten == ["p1_rewrite", "p2_rewrite", "p401_rewrite", "p402_rewrite"]
    verified = prompts_of("wise", tmp_path / "wise" / "data_verified")
    assert verified == ["p1_verified", "p2_verified", "p401_verified", "p402_verified"]


def test_commonsense_reads_lines_too(tmp_path):
    rows = [{"prompt1": "a", "prompt2": "b"}] * 2
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    assert prompts_of("commonsense", tmp_path) == ["a", "b"] * 4


def test_commonsense_is_read_back_as_its_scorer_reads(build, tmp_path):
    """As evaluate.py of zeyofu/Commonsense-T2I builds its paths, from ./generated_images."""
    make(tmp_path / "data", "commonsense")
    args = options("commonsense", tmp_path / "data", tmp_path / "generated_images")
    run(build("llava"), OFFICIAL["commonsense"].items(args.data), args)
    for use_negative_prompt in (0, 1):
        name = f"metaquery{bool(use_negative_prompt) * 'neg'}_images"
        for prompt, index, j in product(("prompt1", "prompt2"), (1, 2), range(4)):
            file = f"{name}/{prompt}_img/original/{str(index).zfill(4)}-{j + 1}.jpg"
            assert Image.open(tmp_path / "generated_images" / file).size == (8, 8)


def test_colliding_pictures_are_refused(tmp_path):
    for suffix in ("jpg", "png"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"x.{suffix}")
    with pytest.raises(InputError, match="two prompts are drawn to 'x.png'"):
        OFFICIAL["imagenet"].items(tmp_path)


def test_guidance_is_the_authors_unless_given(tmp_path, monkeypatch):
    make(tmp_path / "data", "imagenet")
    seen = []
    monkeypatch.setattr(official, "load_model", lambda args: None)
    monkeypatch.setattr(official, "run", lambda model, items, args: seen.append(args))
    for name, flags in (("imagenet", []), ("imagenet", ["--guidance", "5"])):
        command = ["official", name, "--data", str(tmp_path / "data"), *flags]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out")])
        official.main()
    settings = [(a.guidance, a.image_guidance, a.steps, a.dtype) for a in seen]
    assert settings == [(3.0, 3.0, 30, "bfloat16"), (5.0, 3.0, 30, "bfloat16")]
    assert {b.guidance for name, b in OFFICIAL.items() if name in SEVEN_AND_A_HALF} == {7.5}


def test_scores_of_pairs_are_the_closed_forms(tmp_path):
    """PSNR of a constant difference; pictures are resized and cropped, also wide ones."""
    pytest.importorskip("torchmetrics")
    for folder, grey in (("a", 100), ("b", 110)):
        (tmp_path / folder).mkdir()
        for i in range(3):
            Image.new("RGB", (300 + 50 * i, 280), (grey,) * 3).save(tmp_path / folder / f"{i}.png")
    drawn, reference = (scores.pictures_in(tmp_path / folder) for folder in ("a", "b"))
    figures = scores.paired_scores(drawn, reference, 2, "cpu")
    assert figures["PSNR in dB"] == pytest.approx(20 * np.log10(255 / 10), abs=1e-3)
    means = 2 * (100 / 255) * (110 / 255) + 1e-4, (100 / 255) ** 2 + (110 / 255) ** 2 + 1e-4
    assert figures["SSIM"] == pytest.approx(means[0] / means[1], abs=1e-3)
    assert scores.to_square(Image.new("RGB", (600, 300))).shape == (3, 256, 256)
