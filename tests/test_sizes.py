"""The paper's sizes on the tiny one's code: real classes, folders as on the hub, real counts."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch
import transformers
from conftest import ROOT, WORDS, losses
from PIL import Image

from extras.speed import peak
from data.batches import resolution_of
from metaquery import PRESETS, Connector, InputError, MetaQuery, MetaQueryConfig
from extras.toy_parts.language import language_config, make_tokenizer
from train import TrainConfig, train
from training.attention import checkpoint_layers
from extras.memory import Run, peak_of_step, plan
from extras.sizes import (
    DIFFUSIONS,
    MLLMS,
    QWEN,
    count,
    meta_diffusion,
    meta_mllm,
    meta_model,
    parts_of,
    print_parts,
    text_size,
)

PAIRS = [("llava", "sana"), ("qwen-vl", "sana"), ("qwen", "sd")]


@pytest.mark.parametrize("mllm, diffusion", PAIRS)
def test_stages_save_load_and_draw(parts, tmp_path, mllm, diffusion):
    """Three steps of pretrain, then of reconstruct and edit where it sees; then a picture."""
    changes = {"mllm": str(parts / mllm), "diffusion": str(parts / diffusion), "num_queries": 4}
    checkpoint = ""
    for stage in ("pretrain", "reconstruct", "edit")[: 1 if mllm == "qwen" else 3]:
        out = tmp_path / stage
        recipe = {"steps": 3, "batch_size": 2, "warmup": 1, "sample_every": 100}
        train(TrainConfig(stage=stage, out=str(out), checkpoint=checkpoint, **recipe), changes)
        checkpoint = str(out)
        assert len(losses(out)) == 3 and torch.isfinite(torch.tensor(losses(out))).all()
    model = MetaQuery.from_pretrained(checkpoint)
    assert model.config.num_queries == 4
    images = None if mllm == "qwen" else [[Image.new("RGB", (30, 20), "red")]]
    assert model.generate(["a star"], images, num_inference_steps=2)[0].mode == "RGB"


@pytest.mark.parametrize("mllm, diffusion", PAIRS)
def test_checkpointed_layers_give_the_same_gradients(build, mllm, diffusion):
    """Loss and gradients are those of a step that keeps all; a layer's inside is not kept."""
    model = build(mllm, diffusion).double()
    images = None if mllm == "qwen" else [[Image.new("RGB", (30, 20), "red")], []]
    fixed = {"noise": torch.randn(2, model.diffusion.config.in_channels, 4, 4).double()}
    fixed["sigma"] = torch.tensor([0.3, 0.8] if model.is_flow else [300, 800]).double()
    kept, made = [], []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_layers(model)
        bytes_kept = []
        hooks = (lambda x, to=bytes_kept: to.append(x.nbytes) or x), lambda x: x
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = model(["a red star", "a"], torch.zeros(2, 3, 8, 8).double(), images, **fixed)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        made.append((loss.detach(), model.queries.grad.clone(), grads))
        kept.append(sum(bytes_kept))
    assert torch.equal(made[0][0], made[1][0]) and kept[1] < 0.7 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(made[0][2], made[1][2], strict=True))
    assert made[0][1].abs().sum() > 0


@pytest.mark.parametrize("diffusion, number", [("sd", 77), ("sana", 256)])
@pytest.mark.parametrize("condition_on", ["queries", "last_layer"])
def test_conditions_of_the_paper_lengths_are_taken(build, diffusion, number, condition_on):
    """77 tokens by SD1.5's UNet and 256 by Sana, and prompts of unlike length with their mask."""
    model = build("qwen", diffusion, num_queries=number, condition_on=condition_on)
    prompts = ["a red star", "a"]
    made, mask = model.encode_prompts(prompts)
    assert made.shape[1] == number if mask is None else made.shape[:2] == mask.shape
    assert torch.isfinite(model(prompts, torch.zeros(2, 3, 8, 8)))


@pytest.mark.parametrize(
    "name, millions",
    [
        ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 894),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3755),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8292),
        ("Efficient-Large-Model/Sana_1600M_512px_diffusers", 1604),
        ("Efficient-Large-Model/Sana_600M_512px_diffusers", 592),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 860),
    ],
)
def test_parts_have_their_published_sizes(name, millions):
    model = meta_mllm(name) if name in MLLMS else meta_diffusion(name)[0]
    assert abs(count(model) / 1e6 - millions) < 1


def test_table_of_base_is_the_papers(capsys):
    """316M of connector at base (Table 3), 256 queries of 896 for 2304 wide conditions."""
    model = meta_model(MetaQueryConfig.preset("base"))
    numbers = {part.name: part.parameters for part in parts_of(model)}
    assert abs(numbers["connector"] / 1e6 - 316) < 1 and numbers["queries"] == 256 * 896
    trained = {part.name for part in parts_of(model) if part.is_trained}
    assert trained == {"queries", "connector", "diffusion model"}
    print_parts(model)
    shown = capsys.readouterr().out
    assert "256 queries 896 wide -> 256 x 2304" in shown and "latents 16 x 16" in shown
    assert "a picture 1485 tokens, one of several 730" in shown
    assert f"{sum(numbers.values()) / 1e6:.1f} M" in shown


def test_table_on_the_command_line():
    flags = ["--processes", "2", "--shard", "true", "--connector-layers", "6"]
    command = [sys.executable, "-m", "extras.sizes", "tiny", *flags]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "16 queries" in done.stdout and "the largest micro-batch is" in done.stdout
    command = [sys.executable, "-m", "extras.sizes", "--mllm", "nobody/nothing"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and "nobody/nothing" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("size", ["base", "large", "xlarge"])
def test_presets_name_known_parts(size):
    assert PRESETS[size]["mllm"] in MLLMS and PRESETS[size]["diffusion"] in DIFFUSIONS
    config = MetaQueryConfig.preset(size)
    assert config.num_queries == 256 and config.connector_layers == 24


def test_connectors_of_the_real_widths_start_as_the_paper_says():
    with torch.device("meta"):
        width = Connector(896, 768, 24).norm.weight.shape[0]
    assert width == 768


def test_a_missing_hub_part_names_the_id_and_the_flag(parts):
    with pytest.raises(InputError, match="nobody/nothing.*--mllm"):
        MetaQuery(MetaQueryConfig("nobody/nothing", str(parts / "sana")))
    with pytest.raises(InputError, match="nobody/nothing.*--diffusion"):
        MetaQuery(MetaQueryConfig(str(parts / "qwen"), "nobody/nothing"))


def test_a_connector_of_another_width_is_refused(parts, tmp_path, build):
    """A diffusion model whose caption width does not fit a loaded connector."""
    build("qwen", "sana", train_diffusion=False).save_pretrained(tmp_path)
    other = parts / "sana-wide"
    other.mkdir(exist_ok=True)
    config = json.loads((parts / "sana" / "transformer" / "config.json").read_text())
    config["caption_channels"] = 128
    model = diffusers.SanaTransformer2DModel.from_config(config)
    model.save_pretrained(other / "transformer")
    for part in ("vae", "scheduler"):
        if not (other / part).exists():
            (other / part).symlink_to(parts / "sana" / part)
    with pytest.raises(InputError, match="incompatible"):
        MetaQuery.from_pretrained(tmp_path, diffusion=str(other))


def test_a_checkpoint_has_a_model_card(build, tmp_path):
    build("qwen").save_pretrained(tmp_path)
    assert "metaquery" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "config.json").exists()


# ---- Memory --------------------------------------------------------------------------------------


def make_wide(folder):
    """Parts of the base size's widths, with two layers each and a small VAE."""
    tokenizer = make_tokenizer(WORDS, 400)
    fields = text_size(QWEN) | {"num_hidden_layers": 2}
    del fields["vocab_size"]
    config = language_config(tokenizer, **fields)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "mllm")
    tokenizer.save_pretrained(folder / "mllm")
    sana = diffusers.SanaTransformer2DModel(
        num_layers=2, in_channels=4, out_channels=4, sample_size=16
    )
    sana.save_pretrained(folder / "sana" / "transformer")
    return folder


@pytest.mark.parametrize("width", ["tiny", "base"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_planned_activations_are_what_a_step_takes(parts, tmp_path, width, checkpointed):
    """Within 15% of what torch's profiler measures of a real step, at the base size's width too."""
    if width == "tiny":
        config = MetaQueryConfig.preset("tiny")
    else:
        make_wide(tmp_path)
        for part in ("vae", "scheduler"):
            (tmp_path / "sana" / part).symlink_to(parts / "sana" / part)
        names = {"mllm": str(tmp_path / "mllm"), "diffusion": str(tmp_path / "sana")}
        config = MetaQueryConfig(**names, connector_layers=2)
    model = MetaQuery(config, torch.bfloat16)
    if checkpointed:
        checkpoint_layers(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    size = resolution_of(model)
    inputs = model.prepare_inputs(["a red star", "a star"])

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs, torch.zeros(2, 3, size, size))

    measured = peak(loss, "cpu")
    run = Run(prompt_tokens=inputs["input_ids"].shape[1])
    planned = meta_model(config)
    if checkpointed:
        checkpoint_layers(planned)
    assert peak_of_step(planned, run, 2) / 1e9 == pytest.approx(measured, rel=0.15)


def test_plan_divides_what_is_sharded():
    """Trained weights and moments by the processes, gradients if nothing adds up, and frozen
    weights when asked; a larger micro-batch takes more, and checkpointed layers less."""
    config = MetaQueryConfig.preset("tiny")
    trained = sum(part.parameters for part in parts_of(meta_model(config)) if part.is_trained)
    whole, split = (plan(meta_model(config), Run(processes=4, shard=s)) for s in (False, True))
    assert whole.trained_weights == 4 * trained == 4 * split.trained_weights
    assert whole.moments == 8 * trained == 4 * split.moments
    assert whole.gradients == split.gradients == 4 * trained
    assert whole.gathered == 0 < split.gathered < whole.trained_weights
    run = Run(processes=4, shard=True, shard_frozen=True, accumulate=False, micro_batch_size=16)
    frozen = plan(meta_model(config), run)
    assert frozen.gradients == trained and frozen.frozen_weights < split.frozen_weights
    assert frozen.activations == pytest.approx(2 * split.activations)
    run.gradient_checkpointing = True
    assert plan(meta_model(config), run).activations < 0.8 * frozen.activations
