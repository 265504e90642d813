"""Instruction data from web documents: right groups, no row lost or doubled, ready to train."""

import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import WORDS, noise_image
from runs import flags as train_flags
from runs import succeed
from tqdm import tqdm
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

from extras.curation import instructions
from extras.curation.__main__ import curate, open_run, parse_flags
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
        pictures = [noise_image(40, 40, seed) for seed in range(number + 1)]
        captions = ["a red star <|im_end|> " * 100] * number
        pairs.append(ImagePair(pictures[1:], captions, pictures[0], "a blue circle " * 100))
        question = writer.question(pairs[-1])
        assert len(writer.tokenizer(question)["input_ids"]) <= MAX_PROMPT_TOKENS
        assert question.count("red") >= number and "blue circle" in question
    monkeypatch.setattr(instructions, "ANSWER_TOKENS", 6)
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
    pictures = [noise_image(40, 60, seed) for seed in range(3)]
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
    monkeypatch.setattr(instructions, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install sentencepiece protobuf"):
        Siglip(str(folder))


# ---- The whole command ---------------------------------------------------------------------------
COLOURS = ("red", "green", "blue", "brown")


class Words:
    """An encoder without training: the colour that a caption names; an image's pixels."""

    def captions(self, captions):
        rows = [[float(colour in caption) for colour in COLOURS] for caption in captions]
        return unit(np.array(rows, np.float32).reshape(-1, len(COLOURS)) + 1e-3)

    def pictures(self, images):
        small = [np.asarray(image.resize((8, 8)), np.float32).ravel() for image in images]
        return unit(np.stack(small) - 100) if small else np.zeros((0, 1), np.float32)


class Writer:
    """A writer that gives every pair one answer."""

    def write(self, pairs):
        return ["Think: alike.\nPrompt: The same thing once more."] * len(pairs)


def flags(folder, out, *more):
    models = ["--siglip", "words", "--mllm", "writer", "--block-size", "3", "--min-size", "64"]
    return parse_flags(["--data", str(folder), "--out", str(out), *models, *map(str, more)])


def curated(args, writer=None):
    return curate(open_run(args), args, Words(), writer or Writer())


def rows_in(out):
    """{(target's bytes, sources' bytes)} with how often each is there."""
    rows = Counter()
    for file in out.glob("train-*.parquet"):
        for row in pyarrow.parquet.read_table(file).to_pylist():
            sources = tuple(source["bytes"] for source in row["source_images"])
            rows[row["target_image"]["bytes"], sources] += 1
    return rows


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """(the folder of twelve documents, the curated folder): two red images and a blue one each."""
    folder = tmp_path_factory.mktemp("web")
    rows = {"images": [], "captions": []}
    for i in range(12):
        rows["images"].append([noise_image(80, 80, 3 * i + k) for k in range(3)])
        rows["captions"].append([f"a red star, {i}", f"two red stars, {i}", f"a blue cross, {i}"])
    features = datasets.Features(
        images=datasets.List(datasets.Image()), captions=datasets.List(datasets.Value("string"))
    )
    (folder / "documents").mkdir()
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(folder / "documents" / "a.parquet")
    curated(flags(folder / "documents", folder / "out"))
    return folder / "documents", folder / "out"


def test_each_document_gives_its_pair(web):
    """The two red images of each are one group: a source and a target; the blue one is left."""
    rows = rows_in(web[1])
    assert rows.total() == 12 and set(rows.values()) == {1}
    assert all(len(sources) == 1 for _, sources in rows)
    assert (web[1] / "stats.json").exists()


def test_train_reads_what_was_curated(web, parts, tmp_path):
    argv = train_flags(parts, tmp_path / "first", steps=1, warmup=0)
    succeed(tmp_path, argv)
    changes = {"checkpoint": tmp_path / "first", "stage": "instruct", "data": web[1], "steps": 2}
    succeed(tmp_path, train_flags(parts, tmp_path / "run", **changes))


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


def test_killed_runs_resume_without_losing_or_doubling_rows(web, tmp_path):
    """SIGKILL at each moment between two files, and at random: as if nothing had happened."""
    args, writer = flags(web[0], tmp_path), Writer()
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
    assert rows_in(tmp_path) == rows_in(web[1])
    assert not list(tmp_path.rglob("*.part"))


def test_processes_share_the_blocks_and_may_change_in_number(web, tmp_path):
    args, writer = flags(web[0], tmp_path), Writer()
    first = in_fork(args, writer, RANK="0", WORLD_SIZE="3")
    first.join()
    assert 0 < rows_in(tmp_path).total() < 0.6 * rows_in(web[1]).total()
    both = [in_fork(args, writer, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert rows_in(tmp_path) == rows_in(web[1])
