"""Flags by what a language model knows: the shared parts, and which flag an image is nearest to."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from extras.flags import flag_parts, flag_scores
from extras.flags.flag_parts import (
    caption_states,
    make_flags,
    nearest,
    share_right,
    token_states,
)
from extras.flags.flag_scores import measure_flags
from metaquery import MetaQuery, MetaQueryConfig

COLORS = {"AA": "red", "BB": "green", "CC": "blue", "DD": "blue"}  # two have the same flag
ARGS = {
    "steps": 2,
    "guidance": 1.0,
    "image_guidance": 1.0,
    "num_images": 1,
    "seed": 0,
    "batch_size": 8,
    "height": None,
    "width": None,
}


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """What extras.flags.dataset writes, of four countries, with a random language model."""
    folder = tmp_path_factory.mktemp("flags")
    (folder / "train").mkdir()
    rows = []
    for code, color in COLORS.items():
        Image.new("RGB", (64, 64), color).save(folder / "train" / f"{code}.png")
        common = {"file_name": f"{code}.png", "country": color}
        rows.append({"text": f"the flag of {code}", "relation": "name", "split": "trained"})
        rows.append({"text": f"the flag of {code}'s capital", "relation": "capital"})
        rows[-1]["split"] = "held-out"
        rows[-2:] = [common | row for row in rows[-2:]]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(parts / "qwen", folder / "smollm2")
    return folder


def test_a_caption_is_its_tokens_and_the_end(parts):
    tokenizer, vectors = token_states(parts / "qwen", 8)
    model = AutoModelForCausalLM.from_pretrained(parts / "qwen")
    assert vectors.shape == (model.config.vocab_size, 8)
    assert torch.allclose(vectors.pow(2).mean(-1), torch.tensor(5.5))
    states, mask = caption_states(["the flag of France", ""], tokenizer, vectors)
    number = len(tokenizer("the flag of France")["input_ids"]) + 1
    assert states.shape == (2, number, 8)
    assert mask.tolist() == [[1] * number, [1] + [0] * (number - 1)]
    end = vectors[tokenizer.eos_token_id]
    assert torch.equal(states[0, -1], end) and torch.equal(states[1, 0], end)


def test_an_image_counts_as_the_flag_it_is_nearest_to():
    known = torch.zeros(3, 3, 2, 2)
    known[1], known[2] = 1, 2
    images = torch.full((3, 3, 2, 2), 1.4)
    assert nearest(images, known)[0].tolist() == [1, 2, 0]
    assert share_right(images, known) == pytest.approx(1 / 3)
    known[2] = 1  # the same image as the second
    assert share_right(images, known) == pytest.approx(2 / 3)


def test_shares_count_the_nearest_and_the_nearest_five(folder, monkeypatch):
    colors = {"AA": "red", "BB": "darkred", "CC": "blue", "DD": "navy"}

    def generate(model, rows, args):
        codes = [prompt.split()[3].removesuffix("'s") for prompt, _ in rows]
        return [[Image.new("RGB", (64, 64), colors[code])] for code in codes]

    monkeypatch.setattr(flag_scores, "generate", generate)
    figures = measure_flags(None, "by capital", SimpleNamespace(limit=10), folder)
    assert figures == {"by capital": 0.75, "by capital, top 5": 1.0}  # all but BB
    rows = flag_scores.choose_questions(folder, "by capital", 2)
    assert [row["file_name"] for row in rows] == ["AA.png", "CC.png"]


def test_the_parts_are_made_once_and_generate(folder, monkeypatch):
    monkeypatch.setattr(flag_parts, "VAE_STEPS", 2)
    monkeypatch.setattr(flag_parts, "DIFFUSION_STEPS", 2)
    make_flags(folder)
    first = (folder / "diffusion" / "model_index.json").stat().st_mtime_ns
    make_flags(folder)
    assert (folder / "diffusion" / "model_index.json").stat().st_mtime_ns == first
    llm, shuffled = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).state_dict()
        for name in ("smollm2", "shuffled")
    )
    for name, weight in llm.items():
        assert torch.equal(weight.flatten().sort()[0], shuffled[name].flatten().sort()[0])
        assert weight.unique().numel() < 2 or not torch.equal(weight, shuffled[name])
    parts = [str(folder / name) for name in ("shuffled", "diffusion")]
    config = MetaQueryConfig(*parts, num_queries=2, connector_layers=1)
    model = MetaQuery.from_config(config).eval()
    figures = measure_flags(
        model, "by capital", SimpleNamespace(**ARGS, limit=4, negative_prompt=""), folder
    )
    assert set(figures) == {"by capital", "by capital, top 5"}
    cases, images, right = flag_scores.cases_of(
        model, folder, SimpleNamespace(**ARGS, limit=2, negative_prompt="")
    )
    assert [case["country"] for case in cases] == ["red", "green"] and len(cases[0]["nearest"]) == 4
    assert images[0].size == right[0].size == (64, 64)
