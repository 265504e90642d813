"""Published benchmarks: their own prompt files in, images where their scorers look for them out."""

import argparse
import json
import sys
from itertools import product

import datasets
import numpy as np
import pytest
from PIL import Image

import sample
from benchmarks import official, scores
from benchmarks.official import OFFICIAL, run
from metaquery import InputError

SEVEN_AND_A_HALF = ("geneval", "dpg", "wise", "wise-rewrite", "commonsense")
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
    """A small copy of a benchmark's files; returns what must be generated, as file names."""
    folder.mkdir()
    for hidden in (".DS_Store", "._x.jpg", "._x.txt", "._x.json", "._x.parquet"):
        (folder / hidden).write_bytes(b"\x00not data")
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
    if name.startswith("wise"):
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


def options(data, out, **changes):
    """The flags of a run of one step, as a namespace."""
    parser = argparse.ArgumentParser()
    sample.add_generation_options(parser)
    args = parser.parse_args(["--steps", "1", "--guidance", "3", "--image-guidance", "1.5"])
    values = {"data": data, "out": str(out), "limit": None, "rewrite": False} | changes
    return argparse.Namespace(**(vars(args) | values))


def share(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_prompt_is_generated_where_its_scorer_looks(build, tmp_path, monkeypatch, name):
    """By two processes, each its share; a second run generates nothing anew."""
    model, expected = build("llava"), make(tmp_path / "data", name)
    seen, sizes, plain = [], [], model.generate

    def generate(prompts, images, negative_prompt, **options):
        for prompt, row, negative in zip(prompts, images, negative_prompt, strict=True):
            seen.append((prompt, len(row), negative))
            sizes.extend(image.size for image in row)
        return plain(prompts, images, negative_prompt, **options)

    monkeypatch.setattr(model, "generate", generate)
    args = options(tmp_path / "data", tmp_path / "out")
    items = OFFICIAL[name].items(args.data)
    for rank in (0, 1):
        share(monkeypatch, rank, 2)
        run(model, items, args)
    files = {str(p.relative_to(args.out)) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == set(expected)

    if name == "dpg":
        assert Image.open(tmp_path / "out" / "12.png").size == (16, 16), "four of 8x8, no gap"
    if name == "commonsense":
        assert ("a0", 0, "") in seen and ("a0", 0, "b0") in seen and ("b1", 0, "a1") in seen
        first = tmp_path / "out" / "metaqueryneg_images" / "prompt2_img" / "original" / "0002-4.jpg"
        assert Image.open(first).format == "JPEG"
    if name == "wise":
        assert sorted(prompt for prompt, *_ in seen) == ["p1", "p2", "p401", "p402"]
    if name == "dreambench":
        assert ("a backpack in the jungle", 1, "") in seen
        assert ("a cat wearing a red hat", 1, "") in seen
    if name == "imagenet":
        assert all(prompt == "" and images == 1 for prompt, images, _ in seen)
        assert set(sizes) == {(384, 384)}

    count = len(seen)
    (tmp_path / "out" / expected[-1]).unlink()
    for rank in (0, 1):
        share(monkeypatch, rank, 2)
        run(model, items, args)
    again = 0 if expected[-1].endswith("metadata.jsonl") else 1
    assert len(seen) - count == again, "images that exist are kept"

    share(monkeypatch, 0, 1)
    run(model, items, options(tmp_path / "data", tmp_path / "alone"))
    for path in (tmp_path / "alone").rglob("*.[pj][np]g"):
        shared = Image.open(tmp_path / "out" / path.relative_to(tmp_path / "alone"))
        off = np.asarray(shared, int) - np.asarray(Image.open(path), int)
        # Batches of other sizes round otherwise, by a level; JPEG's chroma makes it several.
        most = 2
        if path.suffix == ".jpg":
            most = 16
        assert abs(off).max() <= most, "one process generates what two do"


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_wrong_layout_says_what_is_expected(tmp_path, name):
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=f"{name} expects"):
        OFFICIAL[name].items(tmp_path / "data")


def test_the_command(build, tmp_path, monkeypatch, capsys):
    make(tmp_path / "data", "geneval")
    monkeypatch.setattr("public_weights.load", lambda *_, **__: build("llava"))
    command = ["official", "geneval", "--data", str(tmp_path / "data"), "--steps", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--limit", "2", "--out", str(tmp_path / "out")])
    official.main()
    assert len(list((tmp_path / "out").glob("*/samples/*.png"))) == 8
    assert capsys.readouterr().out.startswith("geneval: computing in ")


def refused(monkeypatch, capsys, *flags):
    """The line on stderr of a command that is refused."""
    monkeypatch.setattr(sys, "argv", ["official", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        official.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path):
    for flags, words in (
        (["geneval", "--data", tmp_path / "none"], "geneval expects"),
        (["dpg", "--data", tmp_path, "--rewrite"], "--rewrite is for geneval and wise"),
        (["dpg", "--data", tmp_path, "--num-images", 4], "--num-images has no effect"),
        (["dpg", "--data", tmp_path, "--limit", 0], "--limit"),
    ):
        assert words in refused(monkeypatch, capsys, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_is_no_text_is_named_and_loses_no_other(build, tmp_path):
    lines = ['{"prompt": "a star"}', '{"prompt": 7}', "{", '{"prompt": "a cross"}']
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines))
    captions = datasets.Dataset.from_dict({"caption": ["a star", None, "a cross"]})
    (tmp_path / "coco").mkdir()
    captions.to_parquet(tmp_path / "coco" / "x.parquet")
    for name, data, rows, files in (
        ("geneval", tmp_path, (2, 3), ("00000/grid.png", "00003/grid.png")),
        ("coco", tmp_path / "coco", (2,), ("00000.png", "00002.png")),
    ):
        args = options(data, tmp_path / name)
        with pytest.raises(InputError) as caught:
            run(build("llava"), OFFICIAL[name].items(data), args)
        assert all(f" row {row}: its prompt is no text" in str(caught.value) for row in rows)
        assert "evaluation_metadata.jsonl" in str(caught.value) or "x.parquet" in str(caught.value)
        assert all((tmp_path / name / file).exists() for file in files)


def test_an_image_that_cannot_be_read_is_named_and_loses_no_other(build, tmp_path):
    make(tmp_path / "data", "imagenet")
    (tmp_path / "data" / "n01" / "bad.png").write_text("no image")
    args = options(tmp_path / "data", tmp_path / "out")
    with pytest.raises(InputError, match="n01/bad.png"):
        run(build("llava"), OFFICIAL["imagenet"].items(args.data), args)
    files = {path.name for path in (tmp_path / "out").rglob("*.png")}
    assert files == {"x.png"}


def test_prompts_are_rewritten_by_the_models_own_mllm(build, tmp_path, monkeypatch):
    """Both texts are in the image's notes; without --rewrite the MLLM is not asked."""
    make(tmp_path / "data", "wise")
    model, seen = build("llava"), []
    monkeypatch.setattr(model, "answer", lambda text, images: f"  in detail:\n{text[-2:]} ")
    plain = model.generate

    def generate(prompts, *inputs, **options):
        seen.extend(prompts)
        return plain(prompts, *inputs, **options)

    monkeypatch.setattr(model, "generate", generate)
    items = OFFICIAL["wise"].items(tmp_path / "data")[:1]
    run(model, items, options(tmp_path / "data", tmp_path / "a", rewrite=True))
    run(model, items, options(tmp_path / "data", tmp_path / "b"))
    assert seen == ["in detail: p1", "p1"]
    notes = Image.open(tmp_path / "a" / "1.png").text
    assert notes == {"prompt": "p1", "rewritten as": "in detail: p1"}
    assert Image.open(tmp_path / "b" / "1.png").text == {"prompt": "p1"}


def prompts_of(name, data):
    return [item.prompt for item in OFFICIAL[name].items(data)]


def test_wise_has_three_sets_of_prompts(tmp_path):
    """The paper's, the rewritten ones and those verified later; merge.json repeats the last."""
    make(tmp_path / "wise", "wise")
    assert prompts_of("wise", tmp_path / "wise") == ["p1", "p2", "p401", "p402"]
    rewritten = prompts_of("wise-rewrite", tmp_path / "wise")
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
    args = options(tmp_path / "data", tmp_path / "generated_images")
    run(build("llava"), OFFICIAL["commonsense"].items(args.data), args)
    for use_negative_prompt in (0, 1):
        name = f"metaquery{bool(use_negative_prompt) * 'neg'}_images"
        for prompt, index, j in product(("prompt1", "prompt2"), (1, 2), range(4)):
            file = f"{name}/{prompt}_img/original/{str(index).zfill(4)}-{j + 1}.jpg"
            assert Image.open(tmp_path / "generated_images" / file).size == (8, 8)


def test_colliding_names_are_refused(tmp_path):
    for suffix in ("jpg", "png"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"x.{suffix}")
    with pytest.raises(InputError, match="two prompts are for 'x.png'"):
        OFFICIAL["imagenet"].items(tmp_path)


def test_guidance_is_the_authors_unless_given(build, tmp_path, monkeypatch):
    make(tmp_path / "data", "imagenet")
    seen = []
    monkeypatch.setattr("public_weights.load", lambda *_, **__: build("llava"))
    monkeypatch.setattr(official, "run", lambda model, items, args: seen.append(args))
    for flags in ([], ["--guidance", "5", "--steps", "7"]):
        command = ["official", "imagenet", "--data", str(tmp_path / "data"), *flags]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out")])
        official.main()
    settings = [(args.guidance, args.image_guidance, args.steps) for args in seen]
    assert settings == [(3.0, 3.0, 30), (5.0, 3.0, 7)]
    assert {b.guidance for name, b in OFFICIAL.items() if name in SEVEN_AND_A_HALF} == {7.5}


def test_scores_of_pairs_are_the_closed_forms(tmp_path, capsys):
    """PSNR of a constant difference; images are resized and cropped, also wide ones; one that
    cannot be read is named and left out on both sides, and hidden files are none."""
    pytest.importorskip("torchmetrics")
    for folder, grey in (("a", 100), ("b", 110)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "._0.png").write_text("no image")
        for i in range(3):
            Image.new("RGB", (300 + 50 * i, 280), (grey,) * 3).save(tmp_path / folder / f"{i}.png")
    Image.new("RGB", (300, 300)).save(tmp_path / "a" / "bad.png")
    (tmp_path / "b" / "bad.png").write_text("no image")

    ours, reference = (scores.images_in(tmp_path / folder) for folder in ("a", "b"))
    metrics = scores.paired_scores(ours, reference, 2, "cpu")
    assert len(ours) == len(reference) == 3 and "left out bad" in capsys.readouterr().err
    assert metrics["PSNR in dB"] == pytest.approx(20 * np.log10(255 / 10), abs=1e-3)
    means = 2 * (100 / 255) * (110 / 255) + 1e-4, (100 / 255) ** 2 + (110 / 255) ** 2 + 1e-4
    assert metrics["SSIM"] == pytest.approx(means[0] / means[1], abs=1e-3)
    assert scores.to_square(Image.new("RGB", (600, 300))).shape == (3, 256, 256)


def test_no_row_of_any_kind_loses_another(build, tmp_path):
    """Half a surrogate pair, a file that is not UTF-8, and a row without a prompt."""
    (tmp_path / "geneval").mkdir()
    (tmp_path / "geneval" / "evaluation_metadata.jsonl").write_text(
        '{"prompt": "a star"}\n{"prompt": "\\ud800"}'
    )
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "a.txt").write_text("a star")
    (tmp_path / "dpg" / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "wise").mkdir()
    rows = [{"Prompt": "a star", "prompt_id": 1}, {"prompt_id": 2}]
    (tmp_path / "wise" / "a.json").write_text(json.dumps(rows))
    for name in ("geneval", "dpg", "wise"):
        args = options(tmp_path / name, tmp_path / "out" / name)
        with pytest.raises(InputError, match="its prompt is no text"):
            run(build("llava"), OFFICIAL[name].items(tmp_path / name), args)
        assert list((tmp_path / "out" / name).rglob("*.png"))
