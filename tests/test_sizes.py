"""The paper's sizes on the tiny one's code: real classes, folders as on the hub, real counts."""

import json
import re
import sys
from itertools import accumulate

import diffusers
import pytest
import torch
import torch.distributed as dist
from conftest import losses
from PIL import Image
from torch.profiler import profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from extras import sizes
from extras.architectures import build as build_random
from metaquery import Connector, InputError, MetaQuery, MetaQueryConfig
from train import TrainConfig, train
from training.attention import checkpoint_layers
from training.distributed import precision

PAIRS = [("llava", "sana"), ("qwen-vl", "sana"), ("qwen", "sd")]


@pytest.mark.parametrize("mllm, diffusion", PAIRS)
def test_stages_save_load_and_generate(parts, tmp_path, mllm, diffusion):
    """Three steps of pretrain, then of reconstruct and edit where it sees; then an image."""
    changes = {"mllm": str(parts / mllm), "diffusion": str(parts / diffusion), "num_queries": 4}
    checkpoint = ""
    for stage in ("pretrain", "reconstruct", "edit")[: 1 if mllm == "qwen" else 3]:
        out = tmp_path / stage
        recipe = {"steps": 3, "batch_size": 2, "warmup": 1, "sample_every": 100, "device": "cpu"}
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
    fixed["u"] = torch.tensor([0.3, 0.8]).double()
    kept, results = [], []
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
        results.append((loss.detach(), grads))
        kept.append(sum(bytes_kept))
    assert torch.equal(results[0][0], results[1][0]) and kept[1] < 0.7 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert model.queries.grad.abs().sum() > 0


@pytest.mark.parametrize("diffusion, number", [("sd", 77), ("sana", 256)])
@pytest.mark.parametrize("condition_on", ["queries", "last_layer"])
def test_conditions_of_the_paper_lengths_are_taken(build, diffusion, number, condition_on):
    """77 tokens by SD1.5's UNet and 256 by Sana, and prompts of unlike length with their mask."""
    model = build("qwen", diffusion, num_queries=number, condition_on=condition_on)
    prompts = ["a red star", "a"]
    cond, mask = model.encode_prompts(prompts)
    assert cond.shape[1] == number if mask is None else cond.shape[:2] == mask.shape
    assert torch.isfinite(model(prompts, torch.zeros(2, 3, 8, 8)))


# ---- Parameters ----------------------------------------------------------------------------------
def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    "size, mllm, diffusion",
    [("study", 894, 592), ("base", 894, 1604), ("large", 3755, 1604), ("xlarge", 8292, 1604)],
)
def test_parts_have_their_published_sizes(size, mllm, diffusion):
    model = sizes.meta_model(MetaQueryConfig.preset(size))
    assert abs(millions(model.mllm) - mllm) < 1 and abs(millions(model.diffusion) - diffusion) < 1
    config = MetaQueryConfig.preset(size)
    assert config.connector_layers == 24 and config.num_queries == (64 if size == "study" else 256)


def test_stable_diffusion_has_its_published_size():
    changes = {"diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5", "num_queries": 77}
    model = sizes.meta_model(MetaQueryConfig.preset("base", **changes))
    assert abs(millions(model.diffusion) - 860) < 1 and not model.is_flow


@pytest.mark.parametrize(
    "design, layers, count",
    [("enc-proj", 6, 84), ("enc-proj", 24, 316), ("proj-enc", 6, 517), ("proj-enc", 24, 2046)],
)
def test_connectors_have_the_sizes_of_table_3(design, layers, count):
    with torch.device("meta"):
        assert abs(millions(Connector(896, 2304, layers, design)) - count) < 1


def test_layers_are_cut_alike():
    with torch.device("meta"):
        model = build_random(MetaQueryConfig.preset("base"), sizes.DTYPE, share=0.25)
    assert len(model.mllm.get_decoder().layers) == len(model.connector.layers) == 6
    assert len(model.diffusion.transformer_blocks) == 5


# ---- Memory --------------------------------------------------------------------------------------
def measured_peak(model, inputs, targets):
    """Bytes of the most tensors alive in a real step, beside weights, gradients and moments."""
    with profile(profile_memory=True) as profiled:
        with precision(model, sizes.CPU, sizes.DTYPE):
            loss = model(dict(inputs), targets)
        loss.backward()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tracked_peaks_are_what_a_step_takes(checkpointed):
    """Weights, gradients and moments by counting, and the rest within 10% of a real step's."""
    config = MetaQueryConfig.preset("tiny")
    model = build_random(config, sizes.DTYPE)
    fixed = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            fixed += 4 * parameter.nbytes
        else:
            fixed += parameter.nbytes
    if checkpointed:
        checkpoint_layers(model)
    inputs, targets = sizes.text_inputs(4), torch.zeros(4, 3, 64, 64)
    measured_peak(model, inputs, targets)  # the first one also fills caches
    measured = measured_peak(model, inputs, targets)
    assert sizes.step_peak(config, 4, checkpointed) - fixed == pytest.approx(measured, rel=0.1)


def test_processes_share_what_is_sharded():
    """Of four, each holds a quarter of the moments; and of the frozen weights, if asked."""
    config = MetaQueryConfig.preset("tiny")
    model = sizes.meta_model(config)
    trained = 1e6 * (millions(model.connector) + millions(model.diffusion))
    dist.init_process_group("fake", world_size=4, rank=0, store=FakeStore())
    try:
        whole = sizes.step_peak(config, 1)
        split = sizes.step_peak(config, 1, sharded=True)
        both = sizes.step_peak(config, 1, sharded=True, shard_frozen=True)
        assert both < split < whole - 4 * trained
    finally:
        dist.destroy_process_group()


def test_generating_takes_the_sum_or_the_largest_part():
    config = MetaQueryConfig.preset("base", connector_layers=1)
    whole, in_turn = sizes.generation_peaks(config)
    model = sizes.meta_model(config)
    assert 2e6 * millions(model) < whole < 2.4e6 * millions(model)
    assert 2e6 * millions(model.diffusion) < in_turn < 2.4e6 * millions(model.diffusion)


def test_the_command_tells_what_fits(monkeypatch, capsys, handlers_restored):
    flags = ["tiny", "--micro-batch-size", "2", "--connector-layers", "6"]
    monkeypatch.setattr(sys, "argv", ["sizes", *flags])
    sizes.main()
    lines = capsys.readouterr().out.splitlines()
    assert "12 GB: generates; trains, micro-batch 2" in lines
    count = f"{millions(Connector(192, 192, 6)):.1f} M,"
    (line,) = [line for line in lines if "connector" in line]
    assert count in line and line.endswith(", trained")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--mllm", "nobody/nothing"], "nobody/nothing.*--mllm"),
        (["base", "--diffusion", "nobody/nothing"], "nobody/nothing.*--diffusion"),
        (["base", "--processes", "0"], "--processes"),
        (["base", "--shard", "true"], "give --processes of at least 2"),
    ],
)
def test_bad_flags_are_one_line(flags, words, monkeypatch, capsys, handlers_restored):
    monkeypatch.setattr(sys, "argv", ["sizes", *flags])
    with pytest.raises(SystemExit, match="2"):
        sizes.main()
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])


# ---- Parts that do not fit -----------------------------------------------------------------------
def test_a_missing_hub_part_names_the_id_and_the_flag(parts):
    with pytest.raises(InputError, match="nobody/nothing.*--mllm"):
        MetaQuery.from_config(MetaQueryConfig("nobody/nothing", str(parts / "sana")))
    with pytest.raises(InputError, match="nobody/nothing.*--diffusion"):
        MetaQuery.from_config(MetaQueryConfig(str(parts / "qwen"), "nobody/nothing"))


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
    with pytest.raises(InputError, match="do not fit"):
        MetaQuery.from_pretrained(tmp_path, diffusion=str(other))


def test_a_checkpoint_has_a_model_card(build, tmp_path):
    build("qwen").save_pretrained(tmp_path)
    assert "metaquery" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "config.json").exists()
