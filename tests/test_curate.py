"""Instruction data from web documents: right groups, no row lost or doubled, ready to train."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from benchmarks.curate import Recorder, group_score, instruction_score, target_score
from conftest import WORDS, launcher, losses, noise_picture, run
from toy.documents import ToyWriter, write_documents
from tqdm import tqdm
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

from extras.curation.__main__ import contact_sheet, curate, open_run, parse_flags
from extras.curation.instructions import (
    ImagePair,
    InstructionWriter,
    Siglip,
    choose_target,
    fault,
    group,
    read_answer,
)
from extras.toy_parts.language import make_tokenizer
from metaquery import MAX_PROMPT_TOKENS, InputError
from toy.scene import COLORS, SHAPES

pytestmark = pytest.mark.usefixtures("handlers_restored")


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
    "answer, prompt",
    {
        "Think: a dog.\nPrompt: The same dog on a beach.": "The same dog on a beach.",
        'think: x\n**Prompt:** "This  building at night"\n': "This building at night",
        "The same dog on a beach.": None,
        "Prompt:": None,
        "Prompt: ...": None,
        "Prompt: this\nPrompt: that": None,
        "Prompt: " + "this " * 61: None,
        "": None,
    }.items(),
)
def test_answers_are_parsed(answer, prompt):
    assert read_answer(answer) == prompt


@pytest.mark.parametrize(
    "prompt, caption, expected",
    [
        (None, "a dog on a beach", "unparseable"),
        ("The same dog on a beach", "Our dog Bess runs on the beach of Dover", None),
        ("This object left of a blue circle", "a red star left of a blue circle", None),
        ("The same lighthouse", "lighthouse", None),
        ("A red star left of a circle", "a red star", "refers to no source"),
        (
            "This red star left of a blue circle",
            "a red star left of a blue circle",
            "gives the target away",
        ),
        ("The same dog as in the target image", "a dog on a beach", "names the target"),
    ],
)
def test_leaking_prompts_are_found(prompt, caption, expected):
    assert fault(prompt, caption) == expected


@pytest.mark.parametrize("mllm", ["llava", "qwen-vl", "qwen"])
def test_any_mllm_is_asked_in_batches(parts, mllm, recwarn, monkeypatch):
    """Whatever the number of pictures and the length of captions: no caption is cut off unseen."""
    writer = InstructionWriter(str(parts / mllm), batch_size=2)
    pairs = []
    for number in (1, 5, 2):
        pictures = [noise_picture(40, 40, seed) for seed in range(number + 1)]
        captions = ["a red star <|im_end|> " * 100] * number
        pairs.append(ImagePair(pictures[1:], captions, pictures[0], "a blue circle " * 100))
        question = writer.question(pairs[-1])
        assert len(writer.tokenizer(question)["input_ids"]) <= MAX_PROMPT_TOKENS
        assert question.count("red") >= number and "blue circle" in question
    monkeypatch.setattr(data.instructions, "ANSWER_TOKENS", 6)
    answers = writer.write(pairs)
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)
    assert not [w for w in recwarn if "prompt cut" in str(w.message)]
    alone = InstructionWriter(str(parts / mllm), batch_size=1)
    assert alone.write(pairs[1:2]) == answers[1:2]


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


def test_features_do_not_depend_on_the_batch(siglip, parts):
    one, many = Siglip(str(siglip), batch_size=1), Siglip(str(siglip), batch_size=64)
    captions = ["a red star", "blue", "a circle " * 200]
    pictures = [noise_picture(40, 60, seed) for seed in range(3)]
    for name, items in (("captions", captions), ("pictures", pictures)):
        features = getattr(many, name)(items)
        np.testing.assert_allclose(getattr(one, name)(items), features, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
        assert features.dtype == np.float32 and features[0] @ features[1] < 0.9999
        assert len(getattr(many, name)([])) == 0
    with pytest.raises(InputError, match="name a SigLIP model"):
        Siglip(str(parts / "qwen"))


def test_a_missing_tokenizer_package_is_named(siglip, tmp_path, monkeypatch):
    """The hub's SigLIP, unlike SigLIP 2, has a tokenizer that needs packages of its own."""
    folder = shutil.copytree(siglip, tmp_path / "siglip")
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(data.instructions, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install sentencepiece protobuf"):
        Siglip(str(folder))


# ---- The whole command ---------------------------------------------------------------------------


class Words:
    """An encoder without training: the objects that a caption names; a picture's pixels."""

    def captions(self, captions):
        rows = np.zeros((len(captions), 256), np.float32)
        for row, caption in zip(rows, captions, strict=True):
            colors, shapes = "|".join(COLORS), "|".join(SHAPES)
            for color, shape in re.findall(rf"\b({colors}) ({shapes})", caption):
                row[list(COLORS).index(color) * 16 + SHAPES.index(shape)] = 1
            row[255] += not row.any()
        return unit(rows) if len(rows) else rows

    def pictures(self, pictures):
        small = [np.asarray(picture.resize((8, 8)), np.float32).ravel() for picture in pictures]
        return unit(np.stack(small) - 100) if small else np.zeros((0, 1), np.float32)


class Remembered:
    """A writer that knows the answers for these pairs, and so takes no time."""

    def __init__(self, pairs):
        answers = ToyWriter().write(pairs)
        self.answers = {self.key(p): answer for p, answer in zip(pairs, answers, strict=True)}

    def key(self, pair):
        return *pair.source_captions, pair.target_caption, pair.target_image.tobytes()

    def write(self, pairs):
        return [self.answers[self.key(pair)] for pair in pairs]


def flags(folder, out, *more):
    models = ["--siglip", "words", "--mllm", "toy writer", "--block-size", "3", "--min-size", "64"]
    return parse_flags(["--data", str(folder), "--out", str(out), *models, *map(str, more)])


def curated(args, encoder=None, writer=None):
    return curate(open_run(args), args, encoder or Words(), writer or ToyWriter())


def rows_in(out):
    """{(prompt, target's file, sources' files)} with how often each is there."""
    rows = Counter()
    for file in out.glob("train-*.parquet"):
        for row in pyarrow.parquet.read_table(file).to_pylist():
            sources = tuple(source["bytes"] for source in row["source_images"])
            rows[row["prompt"], row["target_image"]["bytes"], sources] += 1
    return rows


def without_times(out):
    stats = json.loads((out / "stats.json").read_text())
    return {
        name: value
        for name, value in stats.items()
        if name not in ("stages", "documents_per_second")
    }


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(what 30 toy documents show, their folder, the curated folder, the pairs, the statistics)."""
    folder = tmp_path_factory.mktemp("toy")
    documents = write_documents(folder / "documents", 30)
    with open(folder / "documents" / "documents.jsonl", "a") as file:
        file.write("{broken\n")
    writer = Recorder()
    stats = curated(flags(folder / "documents", folder / "out"), writer=writer)
    return documents, folder / "documents", folder / "out", writer.pairs, stats


@pytest.fixture(scope="module")
def remembered(toy):
    return Remembered(toy[3])


def test_the_toy_world_is_curated_right(toy):
    documents, _, out, pairs, stats = toy
    found, right = group_score(documents, pairs)
    true, rows = instruction_score(documents, out)
    assert found >= 0.95 and right >= 0.95
    assert target_score(pairs, Words()) >= 0.99
    assert true >= 0.9 and rows > 0.7 * len(pairs)


def test_statistics_add_up(toy):
    documents, _, out, pairs, stats = toy
    fates = Counter(picture.fate for shown in documents for picture in shown)
    assert stats == json.loads((out / "stats.json").read_text())
    assert stats["documents"] == 30 and stats["broken_documents"] == 1 and stats["blocks"] == 11
    assert stats["pictures"] == fates.total()
    dropped = stats["dropped_pictures"]
    assert dropped["broken picture"] == fates["broken"]
    assert dropped["too small"] == fates["small"]
    assert dropped["near-duplicate"] == fates["twice"]
    in_groups = sum(int(size) * number for size, number in stats["groups_by_size"].items())
    assert in_groups + sum(dropped.values()) == fates.total()
    assert sum(stats["instructions"].values()) == len(pairs)
    assert stats["instructions"]["kept"] == rows_in(out).total()
    assert abs(sum(stage["share"] for stage in stats["stages"].values()) - 1) < 0.01
    assert stats["stages"]["captions"]["documents_per_second"] > 0


def test_the_contact_sheet_shows_24_rows_and_trusts_no_text(toy):
    page = (toy[2] / "sheet.html").read_text()
    assert page.count("<section>") == 24 and page.count("<img") >= 48
    stored = {"bytes": next(iter(rows_in(toy[2])))[1]}
    bad = "<script>alert(1)</script>"
    row = {"source_images": [stored], "source_captions": [bad], "prompt": bad}
    page = contact_sheet([row | {"target_image": stored, "target_caption": bad}])
    assert "<script" not in page and page.count("&lt;script") == 3


def test_unusable_answers_are_dropped_and_counted(toy, tmp_path):
    class Bad:
        def write(self, pairs):
            made = [f"Prompt: this {pair.target_caption}" for pair in pairs]
            return [answer if i % 2 else "no idea" for i, answer in enumerate(made)]

    stats = curated(flags(toy[1], tmp_path / "out"), writer=Bad())
    assert stats["instructions"].keys() >= {"unparseable", "gives the target away"}
    assert sum(stats["instructions"].values()) == len(toy[3])
    assert stats["instructions"].get("kept", 0) == rows_in(tmp_path / "out").total()


def in_fork(args, writer, replaces=None, **environment):
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
        curated(args, writer=writer)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_killed_runs_resume_without_losing_or_doubling_rows(toy, remembered, tmp_path):
    """SIGKILL at each moment between two files, and at random: as if nothing had happened."""
    args, writer = flags(toy[1], tmp_path), remembered
    for point in [(n, when) for n in (1, 2, 3) for when in ("before", "after")] * 2:
        process = in_fork(args, writer, point)
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
    kills, rng = 0, np.random.default_rng(0)
    while True:
        process = in_fork(args, writer)
        process.join(rng.uniform(0.02, 0.3) * (1 + kills / 5))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert rows_in(tmp_path) == rows_in(toy[2])
    assert without_times(tmp_path) == without_times(toy[2])
    assert not list(tmp_path.rglob("*.part"))


def test_processes_share_the_blocks_and_may_change_in_number(toy, remembered, tmp_path):
    args, writer = flags(toy[1], tmp_path), remembered
    first = in_fork(args, writer, RANK="0", WORLD_SIZE="3")
    first.join()
    assert 0 < rows_in(tmp_path).total() < 0.6 * rows_in(toy[2]).total()
    both = [in_fork(args, writer, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert rows_in(tmp_path) == rows_in(toy[2])
    assert without_times(tmp_path) == without_times(toy[2])


def test_a_block_that_is_done_again_replaces_its_rows(toy, tmp_path):
    """Killed between the rows and the note that they are done, and now the pictures are gone."""
    shutil.copytree(toy[2], tmp_path, dirs_exist_ok=True)
    args = flags(toy[1], tmp_path)
    name = next(tmp_path.glob("train-*.parquet")).stem.removeprefix("train-")
    (tmp_path / "blocks" / f"{name}.json").unlink()

    class Nothing(ToyWriter):
        def write(self, pairs):
            return [""] * len(pairs)

    before = rows_in(tmp_path).total()
    curated(args, writer=Nothing())
    assert rows_in(tmp_path).total() < before
    assert (
        json.loads((tmp_path / "stats.json").read_text())["instructions"]["kept"]
        == rows_in(tmp_path).total()
    )


def test_other_settings_are_refused(toy, tmp_path):
    open_run(flags(toy[1], tmp_path))
    with pytest.raises(InputError, match="made with --threshold 0.5, not 0.6"):
        open_run(flags(toy[1], tmp_path, "--threshold", 0.6))


def test_train_takes_the_curated_folder(toy, build, tmp_path):
    build().save_pretrained(tmp_path / "checkpoint")
    command = [sys.executable, "train.py", "--stage", "instruct", "--data", str(toy[2])]
    command += ["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "run")]
    done = run([*command, "--steps", "2", "--warmup", "1", "--batch-size", "4"])
    assert done.returncode == 0, done.stderr
    assert np.isfinite(losses(tmp_path / "run")).all() and len(losses(tmp_path / "run")) == 2


def command(processes, folder, out, *more):
    module = ["-m", "extras.curation"]
    return run([*launcher(processes), *module, "--data", str(folder), "--out", str(out), *more])


def test_the_command_runs_with_models_of_the_real_classes(parts, siglip, tmp_path):
    """A random SigLIP and MLLM under torchrun: groups are found, no answer can be parsed."""
    write_documents(tmp_path / "documents", 4)
    models = ["--siglip", str(siglip), "--mllm", str(parts / "llava"), "--threshold", "-1"]
    models += ["--block-size", "2", "--dtype", "float32", "--min-size", "64"]
    done = command(2, tmp_path / "documents", tmp_path / "out", *models)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept 0 instructions") == 1
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["documents"] == 4 and stats["blocks"] == 2
    assert stats["instructions"] == {"unparseable": sum(stats["groups_by_size"].values())}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"--data": "missing"}, "cannot read --data"),
        ({"--siglip": "missing"}, "cannot load missing"),
        ({"--threshold": "2"}, "--threshold is 2.0: it must be"),
        ({"--out": "documents"}, "holds files that no run of this command wrote"),
        ({"--device": "nonsense"}, "is not available"),
    ],
)
def test_mistakes_are_one_line(siglip, tmp_path, change, words, monkeypatch, capfd):
    write_documents(tmp_path / "documents", 1)
    options = {"--data": "documents", "--out": "out", "--siglip": str(siglip), "--mllm": "x"}
    argv = [part for pair in (options | change).items() for part in pair]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["curate", *argv])
    with pytest.raises(SystemExit) as stopped:
        data.curate.main()
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and lines[-1].startswith("error: ") and words in lines[-1]
