"""The paper's sizes on the tiny one's code: real classes, folders as on the hub, real counts."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, losses
from PIL import Image

from metaquery import PRESETS, Connector, InputError, MetaQuery, MetaQueryConfig
from train import TrainConfig, train
from training.kernels import checkpoint_layers
from training.sizes import DIFFUSIONS, MLLMS, count, meta_diffusion, meta_mllm, table

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


def test_table_of_base_is_the_papers():
    """316M of connector at base (Table 3), 256 queries of 896 for 2304 wide conditions."""
    rows, lengths = table(MetaQueryConfig.preset("base"))
    numbers = {row[0]: row[1] for row in rows}
    assert abs(numbers["connector"] / 1e6 - 316) < 1 and numbers["queries"] == 256 * 896
    assert "256 queries 896 wide -> 256 x 2304" in lengths and "latents 16 x 16" in lengths
    assert "a picture 1485 tokens, one of several 730" in lengths
    trained = {row[0] for row in rows if row[2]}
    assert trained == {"queries", "connector", "diffusion model"}
    assert numbers["in all"] == sum(number for name, number in numbers.items() if name != "in all")


def test_table_on_the_command_line():
    for flags, words in (
        (["base"], "315.8 M"),
        (["large", "--connector-layers", "6"], "trained"),
        (["tiny"], "16 queries"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "training.sizes", *flags],
            cwd=ROOT,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0 and words in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "training.sizes", "--mllm", "nobody/nothing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
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
    import diffusers

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
