"""The tiny world's frozen parts: how the toy MLLM is taught is how it is used."""

import random
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

from extras.toy_parts import __main__ as toy_parts
from extras.toy_parts import diffusion, language
from extras.toy_parts.conversations import TALKS, account, talks
from extras.toy_parts.fit import Run, fit
from extras.toy_parts.language import lay_out, put, talk_loss, talk_texts
from extras.toy_parts.vision import scenes_to_tower
from metaquery import TINY, MetaQuery, MetaQueryConfig
from toy.scene import random_scene, read, render


@pytest.fixture(scope="module")
def tiny():
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(TINY / "mllm").float().eval()
    return AutoProcessor.from_pretrained(TINY / "mllm"), model


@pytest.mark.parametrize("sort", TALKS)
def test_images_are_laid_out_as_the_real_class_does(tiny, sort):
    """The same tokens, and the same loss, as through LLaVA-OneVision's own processor and pass."""
    processor, model = tiny
    rng = random.Random(3)
    texts, scenes = talk_texts(processor.tokenizer, [talks(rng, sort) for _ in range(4)])
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    if any(scenes):
        images = [[render(scene) for scene in row] for row in scenes]
        theirs = processor(text=list(texts), images=images, **options)
    else:
        theirs = processor.tokenizer(texts, **options)
    ours = lay_out(processor, texts, scenes)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    labels = torch.where(theirs["attention_mask"] > 0, theirs["input_ids"], -100)
    with torch.no_grad():
        expected = model(**theirs, labels=labels).loss
        states = torch.zeros(0, 26, 192)
        if any(scenes):
            pixels = scenes_to_tower([scene for row in scenes for scene in row])
            seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
            states = F.pad(model.model.multi_modal_projector(seen), (0, 0, 0, 1))
        language, words = model.model.language_model, model.get_input_embeddings()
        seen = put(states, ours["place"])
        loss = talk_loss(language, words, ours["input_ids"], labels, ours["place"], seen)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


def test_each_step_begins_from_zero_gradients(monkeypatch, tmp_path):
    """A step's gradients are its batch's own, not added to those of the steps before."""
    model = torch.nn.Linear(1, 1, bias=False)
    run = Run(tmp_path, steps=3, batch_size=1)
    expected, found = [], []

    def make_batch(rng):
        return {"x": torch.tensor([1 + rng.random()])}

    def loss_of(batch):
        expected.append(2 * model.weight.item() * batch["x"].item() ** 2)
        return (model.weight * batch["x"]).square().sum()

    def record(parameters, max_norm):
        found.extend(parameter.grad.item() for parameter in parameters)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    fit("line", [model], make_batch, loss_of, 1e-2, run)
    assert len(found) == 3 and found == pytest.approx(expected, rel=0.01)


def test_accounts_tell_each_object_truly():
    """Every object is told of once, and shape, colour and place name the same one."""
    rng = random.Random(0)
    for _ in range(200):
        scene = random_scene(rng, patterns=0.2)
        told = account(rng, scene).split(", ")
        assert len(told) == len(scene.objects) == len(read(render(scene))[0].objects)
        for words in told:
            fits = [o for o in scene.objects if o.shape in words and o.color in words]
            assert fits, words


@pytest.mark.slow
def test_all_parts_are_made_in_order_and_make_a_model(tmp_path, monkeypatch, handlers_restored):
    """A step or two each; what they are saved as loads and generates, and is not made again."""
    parts = {name: part._replace(steps=2, batch_size=2) for name, part in toy_parts.PARTS.items()}
    monkeypatch.setattr(toy_parts, "PARTS", parts)
    monkeypatch.setattr(language, "align", lambda *_: None)
    few = language.examine.__defaults__[:-1] + (2,)
    monkeypatch.setattr(language.examine, "__defaults__", few)
    monkeypatch.setattr(diffusion, "SIX_KINDS", ("counting",))
    out = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["toy_parts", "--out", str(out), "--device", "cpu"])

    toy_parts.main()
    config = MetaQueryConfig(str(out / "mllm"), str(out / "diffusion"), connector_layers=1)
    model = MetaQuery.from_config(config)
    assert model.generate("a red star", num_inference_steps=1)[0].size == (64, 64)

    for name in parts:
        parts[name] = parts[name]._replace(make=None)
    toy_parts.main()


def test_a_part_asks_for_those_it_needs(tmp_path, monkeypatch, capsys, handlers_restored):
    flags = ["--out", str(tmp_path / "new"), "--part", "mllm", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["toy_parts", *flags])
    with pytest.raises(SystemExit, match="2"):
        toy_parts.main()
    assert "make --part vision first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--start", str(TINY / "mllm")], ["--part", "mllm", "--start", "x"]]
)
def test_only_an_mllm_that_is_there_is_trained_further(
    flags, monkeypatch, capsys, tmp_path, handlers_restored
):
    monkeypatch.setattr(sys, "argv", ["toy_parts", "--out", str(tmp_path / "new"), *flags])
    with pytest.raises(SystemExit, match="2"):
        toy_parts.main()
    assert "give it with --part mllm" in capsys.readouterr().err


def test_the_shipped_mllm_is_trained_further(tiny, tmp_path, monkeypatch, handlers_restored):
    """Its language model goes on learning; its eye, which the words were fitted to, stays."""
    monkeypatch.setattr(language, "examine", lambda *_: {})
    flags = ["--part", "mllm", "--start", str(TINY / "mllm"), "--steps", "2", "--batch-size", "2"]
    out = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["toy_parts", "--out", str(out), *flags, "--device", "cpu"])
    toy_parts.main()

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(out / "mllm").float()
    before, after = tiny[1].state_dict(), model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name or "lm_head" in name for name in changed)
    processor = AutoProcessor.from_pretrained(out / "mllm")
    assert processor.tokenizer("a red star") == tiny[0].tokenizer("a red star")


def test_the_first_word_of_a_request_is_the_word_it_is_elsewhere(tiny):
    """With a space before it: "blue" alone is another token, which few texts begin with."""
    processor, _ = tiny
    chat = [{"role": "user", "content": [{"type": "text", "text": "blue circle"}]}]
    text = processor.apply_chat_template(chat, tokenize=False)
    assert {"\u0120blue", "\u0120circle"} < set(processor.tokenizer.tokenize(text))
