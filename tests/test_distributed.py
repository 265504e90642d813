"""Sharded training (FSDP2) in two processes, on gloo and in float32: the curve of one process."""

import os
import signal
from functools import partialmethod

import pytest
import torch
from conftest import losses
from runs import check_same, flags, log_of, newest, succeed, train
from safetensors.torch import load_file

from metaquery import InputError, MetaQuery
from training.distributed import check_batch_size, distribute, out_of_memory


def argv(parts, out, **changes):
    """Six steps of prompts of which some have an image, each sample alone."""
    return flags(parts, out, **({"stage": "mix", "micro_batch_size": 1} | changes))


@pytest.fixture(scope="module")
def one(parts, tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("one")
    succeed(folder, argv(parts, folder / "run"))
    return folder / "run"


def compile_quickly(rank):
    """torch.compile without its code generator, which takes minutes."""
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")


FROZEN_TOO = {"shard_frozen": "true", "gradient_checkpointing": "true"}
WAYS = {
    "shard": ({}, None),
    "frozen": (FROZEN_TOO, None),
    "compile": ({"micro_batch_size": 2, "compile": "true"}, compile_quickly),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_curve_of_one(parts, one, tmp_path, way):
    """Sharded, layers run again or compiled, with prompts with and without images."""
    changes, change = WAYS[way]
    samples = way == "frozen"
    run = argv(parts, tmp_path / "run", shard="true", sample_every=6, **changes)
    succeed(tmp_path, run, world=2, change=change, samples=samples)
    check_same(tmp_path / "run", one)
    assert (tmp_path / "run" / "samples" / "step-00000006.png").exists() == samples


OTHERS = {
    "qwen-vl": {"mllm": "qwen-vl", "shard_frozen": "true"},
    "qwen": {"mllm": "qwen", "stage": "pretrain", "shard_frozen": "true"},
    "trained mllm": {"train_mllm": "true", "stage": "pretrain"},
    "trained mllm, whole": {"train_mllm": "true", "shard": "false"},
}


@pytest.mark.parametrize("model", OTHERS)
def test_other_models_have_the_curve_of_one(parts, tmp_path, model):
    changes = {"steps": 3, "gradient_checkpointing": "true", "shard": "true"} | OTHERS[model]
    if "mllm" in changes:
        changes["mllm"] = parts / changes["mllm"]
    succeed(tmp_path, argv(parts, tmp_path / "one", **changes))
    succeed(tmp_path, argv(parts, tmp_path / "two", **changes), world=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_checkpoint_is_read_sharded_or_not(parts, one, tmp_path, sharded_first):
    """Two sharded processes resume from what one process saved, and the other way round."""
    ways = [("true", 2), ("false", 1)]
    if not sharded_first:
        ways.reverse()
    out = tmp_path / "run"
    for shard, world in ways:
        succeed(tmp_path, argv(parts, out, save_every=3, shard=shard), world=world)
        (out / "step-00000006").rename(tmp_path / f"away-{shard}")
    (tmp_path / f"away-{ways[1][0]}").rename(out / "step-00000006")
    check_same(out, one)


def stop_at_three(rank):
    """A process is told to stop in its third step."""
    plain, calls = MetaQuery.forward, []

    def forward(self, *inputs, **options):
        calls.append(1)
        if rank == 1 and len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *inputs, **options)

    MetaQuery.forward = forward


def test_a_stopped_sharded_run_resumes_bit_for_bit(parts, tmp_path):
    options = {"shard": "true", "shard_frozen": "true"}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    succeed(tmp_path, argv(parts, whole, **options), world=2)
    succeed(tmp_path, argv(parts, stopped, **options), world=2, change=stop_at_three)
    assert not (stopped / "step-00000006").exists() and len(losses(stopped)) < 6
    succeed(tmp_path, argv(parts, stopped, **options), world=2)
    check_same(stopped, whole, exactly=True)


def poison_third_step(rank):
    """NaN in one process's third step."""
    plain, calls = MetaQuery.forward, []

    def forward(self, *inputs, **options):
        calls.append(1)
        loss = plain(self, *inputs, **options)
        if rank == 1 and len(calls) in (5, 6):
            return loss * float("nan")
        return loss

    MetaQuery.forward = forward


def test_a_poisoned_step_is_skipped_by_all_shares(parts, tmp_path):
    out = tmp_path / "run"
    succeed(tmp_path, argv(parts, out, shard="true", steps=4), world=2, change=poison_third_step)
    assert [entry["skipped_steps"] for entry in log_of(out)] == [0, 0, 1, 1]
    weights = load_file(newest(out) / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


# ---- Bad input -----------------------------------------------------------------------------------
def test_shard_in_one_process_is_a_warning(parts, one, tmp_path):
    """The run is unsharded, and the same."""
    text = succeed(tmp_path, argv(parts, tmp_path / "run", shard="true"))
    assert "--shard has no effect in one process: use torchrun" in text
    check_same(tmp_path / "run", one, exactly=True)


@pytest.mark.parametrize("world, micro, words", [(8, 0, "multiple of 8"), (1, 3, "multiple of 3")])
def test_a_batch_that_does_not_divide_names_one_that_does(world, micro, words):
    with pytest.raises(InputError, match=f"--batch-size 4 .*{words}"):
        check_batch_size(4, micro, world)


def test_a_micro_batch_is_at_most_a_processs_share():
    check_batch_size(4, 16, 2)


def test_a_trained_mllm_with_images_is_not_sharded(build):
    model = build("llava", train_mllm=True)
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="without images only: use --stage pretrain"):
        distribute(model, cpu, torch.float32, 2, sharded=True, stage="mix")


def run_out_of_memory(rank):
    """The second process has no memory left for a forward pass."""

    def forward(self, *inputs, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    if rank == 1:
        MetaQuery.forward = forward


def test_a_process_out_of_memory_names_the_micro_batch_to_try(parts, tmp_path):
    run = argv(parts, tmp_path / "run", shard="true", micro_batch_size=2)
    codes, texts = train(tmp_path, run, world=2, change=run_out_of_memory)
    lines = [line for line in texts[1].splitlines() if line.startswith("error")]
    assert codes[1] == 2 and len(lines) == 1 and "Traceback" not in texts[1], texts[1]
    assert "out of memory in process 1: try --micro-batch-size 1 (now 2)" in lines[0]


@pytest.mark.parametrize(
    "micro, words",
    [(0, "--micro-batch-size 16 (now 32)"), (8, "size 4 (now 8)"), (1, "try --grad")],
)
def test_the_micro_batch_to_try_divides_the_batch(micro, words):
    assert words in out_of_memory(32, micro)
