"""train.py as its user runs it: learns, resumes, and two processes do what one does."""

import subprocess
import sys
import tarfile

import pytest
import torch
from conftest import ROOT, losses, noise_image
from diffusers import AutoencoderDC
from runs import check_same, flags, log_of, newest, refused, succeed

import cli
import train
from metaquery import InputError, MetaQuery
from train import RECIPES, TrainConfig


@pytest.fixture(scope="module")
def one(parts, tmp_path_factory):
    """A run of one process, of prompts of which some have an image."""
    folder = tmp_path_factory.mktemp("one")
    argv = flags(parts, folder / "run", stage="mix", sample_every=6)
    text = succeed(folder, argv, samples=True)
    assert "training in float32 on cpu: as --dtype says" in text
    return folder / "run"


def test_a_run_leaves_what_it_promises(one):
    """Step folders, a log, sample images, and the newest weights for --checkpoint OUT."""
    assert len(losses(one)) == 6
    assert (one / "samples" / "step-00000006.png").exists()
    assert newest(one).name == "step-00000006" and (newest(one) / "training.pt").exists()
    model = MetaQuery.from_pretrained(one)
    again = MetaQuery.from_pretrained(one / "step-00000006")
    assert torch.equal(model.queries, again.queries)
    assert model.config.num_queries == 4


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"workers": 2}])
def test_how_a_batch_is_made_changes_nothing(parts, one, tmp_path, changes):
    succeed(tmp_path, flags(parts, tmp_path / "run", stage="mix", **changes))
    check_same(tmp_path / "run", one)


def test_two_processes_are_one(parts, one, tmp_path):
    """The same global batch gives the same loss curve and the same weights."""
    succeed(tmp_path, flags(parts, tmp_path / "run", stage="mix"), world=2)
    check_same(tmp_path / "run", one)


def test_bfloat16_has_the_curve_of_float32(parts, one, tmp_path):
    argv = flags(parts, tmp_path / "run", stage="mix", dtype="bfloat16")
    succeed(tmp_path, argv)
    assert losses(tmp_path / "run") == pytest.approx(losses(one), rel=2e-2)


def test_resumed_run_equals_an_uninterrupted_one(parts, one, tmp_path):
    argv = flags(parts, tmp_path / "run", stage="mix", save_every=3)
    succeed(tmp_path, argv)
    subprocess.run(["rm", "-r", str(tmp_path / "run" / "step-00000006")], check=True)
    succeed(tmp_path, argv)
    check_same(tmp_path / "run", one, exactly=True)


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_run_on_a_dataset_resumes_bit_for_bit(parts, tmp_path, streaming):
    """Tars of images and captions, read by two workers, on disk and streamed."""
    (tmp_path / "data").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / "data" / f"{shard}.tar", "w") as tar:
            for i in range(4):
                noise_image(40, 32, 4 * shard + i).save(tmp_path / "x.png")
                (tmp_path / "x.txt").write_text(f"a star, number {4 * shard + i}")
                for kind in ("png", "txt"):
                    tar.add(tmp_path / f"x.{kind}", f"{i:03d}.{kind}")
    options = {"data": tmp_path / "data", "streaming": streaming, "workers": 2, "save_every": 3}
    succeed(tmp_path, flags(parts, tmp_path / "whole", **options))
    argv = flags(parts, tmp_path / "run", **options)
    succeed(tmp_path, argv)
    subprocess.run(["rm", "-r", str(tmp_path / "run" / "step-00000006")], check=True)
    succeed(tmp_path, argv)
    check_same(tmp_path / "run", tmp_path / "whole", exactly=True)


def test_learning_lowers_the_loss(parts, tmp_path):
    succeed(tmp_path, flags(parts, tmp_path / "run", steps=40, lr=1e-2))
    curve = losses(tmp_path / "run")
    assert sum(curve[-8:]) < 0.9 * sum(curve[:8])


@pytest.mark.parametrize("change", ["gradient_checkpointing", "cache_prompts"])
def test_saving_memory_or_time_changes_no_figure(parts, tmp_path, change):
    for name, value in (("plain", "false"), ("changed", "true")):
        succeed(tmp_path, flags(parts, tmp_path / name, **{change: value}))
    check_same(tmp_path / "changed", tmp_path / "plain")


def test_latents_are_kept_and_a_cut_file_is_made_again(parts, tmp_path, monkeypatch):
    """Three images, seen twice: six encodings, or three with the cache; the curve is the same."""
    (tmp_path / "data").mkdir()
    for seed in range(3):
        noise_image(32, 32, seed).save(tmp_path / "data" / f"{seed}.png")
    encoded, plain = [], AutoencoderDC.encode

    def encode(self, x):
        encoded.append(len(x))
        return plain(self, x)

    monkeypatch.setattr(AutoencoderDC, "encode", encode)
    monkeypatch.setattr("train.save_samples", lambda *inputs: None)
    changes = {"mllm": str(parts / "llava"), "diffusion": str(parts / "sana"), "num_queries": 4}

    def curve(name, cache):
        encoded.clear()
        config = TrainConfig(
            out=str(tmp_path / name), cache_latents=cache, data=str(tmp_path / "data"),
            stage="reconstruct", steps=6, batch_size=1, warmup=1, dtype="float32",
        )  # fmt: skip
        train.train(config, changes)
        return losses(tmp_path / name), sum(encoded)

    cache = str(tmp_path / "latents")
    plain_curve, count = curve("plain", "")
    assert count == 6
    kept_curve, count = curve("kept", cache)
    assert count == 3 and kept_curve == plain_curve
    for path in (tmp_path / "latents").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    again_curve, count = curve("again", cache)
    assert count == 3 and again_curve == plain_curve


def test_random_latents_are_not_kept(parts, tmp_path):
    """Stable Diffusion's VAE encodes to a distribution: each step takes another sample."""
    changes = {"mllm": str(parts / "qwen"), "diffusion": str(parts / "sd")}
    config = TrainConfig(out=str(tmp_path / "run"), cache_latents=str(tmp_path / "latents"))
    with pytest.raises(InputError, match="--cache-latents needs Sana's VAE"):
        train.train(config, changes)


class OneLevel(MetaQuery):
    """A forker's own noise schedule: every sample at σ = 0.5."""

    levels = []

    def sigma_of(self, u):
        sigma = torch.full_like(u, 0.5)
        self.levels.append(sigma)
        return sigma


def test_a_forkers_noise_schedule_is_what_trains(parts, tmp_path, monkeypatch):
    """The map from u to σ is in one place: a subclass that changes it sees other batches."""
    monkeypatch.setattr("train.save_samples", lambda *inputs: None)
    monkeypatch.setattr("train.MetaQuery", OneLevel)
    seen, denoise = [], MetaQuery.denoise

    def recorded(self, x, timestep, *rest):
        seen.append(timestep)
        return denoise(self, x, timestep, *rest)

    monkeypatch.setattr(MetaQuery, "denoise", recorded)
    changes = {"mllm": str(parts / "llava"), "diffusion": str(parts / "sana64"), "num_queries": 4}
    config = TrainConfig(out=str(tmp_path / "run"), steps=2, batch_size=2, dtype="float32")
    train.train(config, changes)
    assert torch.cat(seen).tolist() == [500.0] * 4


def test_noise_levels_share_a_condition(parts, tmp_path, monkeypatch):
    """K = 3: three times the noisy latents of a batch, one condition and one encoding each."""
    monkeypatch.setattr("train.save_samples", lambda *inputs: None)
    denoised, read = [], []
    denoise, read_prompt = MetaQuery.denoise, MetaQuery.read_prompt

    def count_denoised(self, x, *rest):
        denoised.append(len(x))
        return denoise(self, x, *rest)

    def count_read(self, inputs):
        read.append(len(inputs["input_ids"]))
        return read_prompt(self, inputs)

    monkeypatch.setattr(MetaQuery, "denoise", count_denoised)
    monkeypatch.setattr(MetaQuery, "read_prompt", count_read)
    changes = {"mllm": str(parts / "llava"), "diffusion": str(parts / "sana64"), "num_queries": 4}
    config = TrainConfig(out=str(tmp_path / "run"), steps=1, batch_size=2, noises_per_sample=3)
    train.train(config, changes)
    assert (denoised, read) == ([6], [2])


# ---- The command line ----------------------------------------------------------------------------
def test_recipes_are_what_runs():
    """What stands in RECIPES is each run's default, the paper's at its sizes; flags replace it."""
    for stage in ("pretrain", "reconstruct", "mix"):
        for world, size in (("toy", "tiny"), ("paper", "base"), ("paper", "study")):
            config = TrainConfig(size=size, stage=stage)
            for name, value in RECIPES[world, stage].items():
                assert getattr(config, name, value) == value
    assert TrainConfig(size="base", lr=0.5, data="here").lr == 0.5
    pretrain, instruct = RECIPES["paper", "pretrain"], RECIPES["paper", "instruct"]
    assert (pretrain["steps"], pretrain["batch_size"], pretrain["warmup"]) == (48_828, 4096, 4000)
    assert (instruct["steps"], instruct["batch_size"], instruct["warmup"]) == (3516, 2048, 2000)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 0}, "--steps is 0: give a number above 0"),
        ({"lr": "nan"}, "--lr is nan"),
        ({"stage": "edit"}, "--stage edit fine-tunes: give --checkpoint"),
        ({"shard_frozen": "true"}, "--shard-frozen needs --shard"),
        ({"shard": "true", "cache_prompts": "true"}, "exclude each other"),
        ({"batch_size": 5, "micro_batch_size": 2}, "choose a multiple of 2"),
        ({"connector": "other"}, "invalid choice: 'other'"),
        ({"num_queries": 0}, "num_queries is 0"),
        ({"mllm": "/nowhere"}, "cannot load /nowhere"),
        ({"resume": "nope"}, "--resume nope is no step folder"),
        ({"device": "nope"}, "--device nope is not available"),
        ({"dtype": "float16"}, "invalid choice: 'float16'"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(parts, tmp_path, changes, words):
    refused(tmp_path, flags(parts, tmp_path / "run", **changes), words)
    assert not (tmp_path / "run").exists()


def test_a_run_shorter_than_its_warm_up_says_so(parts, tmp_path):
    text = succeed(tmp_path, flags(parts, tmp_path / "run", steps=1))
    assert "warning: --steps 1 is no more than --warmup 2" in text


def test_a_foreign_folder_is_not_written_to(parts, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    words = "holds other files (thesis.txt): name another --out"
    refused(tmp_path, flags(parts, tmp_path / "run"), words)


def test_frozen_diffusion_trains_and_stores_little(parts, tmp_path):
    succeed(tmp_path, flags(parts, tmp_path / "run", train_diffusion="false"))
    names = MetaQuery.from_pretrained(tmp_path / "run").trained_state_dict()
    assert not any(name.startswith("diffusion") for name in names)
    assert log_of(tmp_path / "run")[-1]["skipped_steps"] == 0


def test_help_names_every_flag():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for flag in ("--size", "--micro-batch-size", "--connector-layers", "--dtype", "--sigma-shift"):
        assert flag in done.stdout


@pytest.mark.parametrize("hidden", ["SIGUSR1", "resource"])
def test_what_windows_lacks_is_not_needed(hidden, monkeypatch):
    """No SIGUSR1, no `resource` module: signals and the log do without."""
    import signal

    from training.log import peak_memory_gb

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    if hidden == "SIGUSR1":
        monkeypatch.delattr(signal, "SIGUSR1")
        assert cli.StopSignals() == []
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    else:
        monkeypatch.setitem(sys.modules, "resource", None)
        assert peak_memory_gb() is None
