"""Sharded training (FSDP2) in two processes, on gloo and in float32: the curve of one process."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from functools import partialmethod

import pytest
import torch
from conftest import ROOT, losses
from safetensors.torch import load_file

from metaquery import InputError, MetaQuery
from train import TrainConfig
from training.distributed import check_batch_size, distribute, out_of_memory

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])  # each process then starts at once


def command(parts, out, *flags):
    """train.py's flags: six steps of prompts of which some have a picture, each sample alone."""
    names = {"--mllm": parts / "llava", "--diffusion": parts / "sana64", "--out": out}
    names |= {"--num-queries": 4, "--connector-layers": 1, "--batch-size": 4, "--warmup": 2}
    names |= {"--steps": 6, "--stage": "mix", "--sample-every": 100, "--micro-batch-size": 1}
    return [str(part) for pair in names.items() for part in pair] + list(map(str, flags))


def process(flags, rank, world, port, errors, change, draws):
    """What one process of torchrun runs; its lines on stderr go to a file."""
    torch.set_num_threads(1)
    stream = os.open(f"{errors}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.chdir(ROOT)
    sys.argv = ["train.py", *flags]
    import train
    import training.distributed

    train.DTYPE = training.sharding.DTYPE = torch.float32
    warnings.simplefilter("ignore")  # autocast has nothing to do in float32
    if not draws:
        train.draw_samples = lambda *inputs: None
    if change:
        change(rank)
    train.main()


def run(folder, flags, world=1, change=None, draws=False):
    """Train in so many processes: their exit codes and what they printed on stderr.

    change(rank) may break something first; only if it `draws`, which takes time, are samples drawn.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rest = (world, port, folder / "errors", change, draws)
    ranks = [FORKS.Process(target=process, args=(flags, rank, *rest)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(150)
        rank.kill()
    said = [(folder / f"errors-{rank}").read_text() for rank in range(world)]
    return [rank.exitcode for rank in ranks], said


def check_same(out, other, exactly=False):
    """Assert that two runs had the same curve and ended with the same weights and moments."""
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
    if not exactly:
        assert losses(out) == pytest.approx(losses(other), rel=1e-5)
    ends = []
    for folder in (out, other):
        state = torch.load(folder / "step-00000006" / "training.pt", weights_only=True)
        tensors = load_file(folder / "model.safetensors")
        for name, values in state["optimizer"]["state"].items():
            tensors |= {f"{name} {key}": value for key, value in values.items()}
        ends.append(tensors)
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], msg=name, **tolerance)


@pytest.fixture(scope="module")
def one(parts, tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("one")
    assert run(out, command(parts, out / "run"))[0] == [0]
    return out / "run"


def compile_quickly(rank):
    """torch.compile without its code generator, which takes minutes."""
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")


WAYS = [
    ([], None),
    (["--shard", "true"], None),
    (["--shard", "true", "--shard-frozen", "true", "--gradient-checkpointing", "true"], None),
    (["--shard", "true", "--micro-batch-size", "2", "--compile", "true"], compile_quickly),
]


@pytest.mark.parametrize("flags, change", WAYS, ids=["whole", "shard", "frozen", "compile"])
def test_two_processes_have_the_curve_of_one(parts, one, tmp_path, flags, change):
    """Whole or sharded, layers run again or compiled, with prompts with and without pictures."""
    draws = "--shard-frozen" in flags
    codes, said = run(tmp_path, command(parts, tmp_path / "run", *flags), 2, change, draws)
    assert codes == [0, 0], said
    check_same(tmp_path / "run", one)
    assert (tmp_path / "run" / "samples" / "step-00000006.png").exists() == draws


OTHERS = {
    "qwen-vl": ["--mllm", "qwen-vl", "--shard-frozen", "true"],
    "qwen": ["--mllm", "qwen", "--stage", "pretrain", "--shard-frozen", "true"],
    "trained mllm": ["--train-mllm", "true", "--stage", "pretrain"],
    "trained mllm, whole": ["--train-mllm", "true", "--shard", "false"],
}


@pytest.mark.parametrize("model", OTHERS)
def test_other_models_have_the_curve_of_one(parts, tmp_path, model):
    flags = [str(parts / flag) if (parts / flag).is_dir() else flag for flag in OTHERS[model]]
    flags = ["--steps", "3", "--gradient-checkpointing", "true", "--shard", "true", *flags]
    outs = [tmp_path / "one", tmp_path / "two"]
    codes, said = run(tmp_path, command(parts, outs[0], *flags))
    assert codes == [0], said
    codes, said = run(tmp_path, command(parts, outs[1], *flags), 2)
    assert codes == [0, 0], said
    assert losses(outs[1]) == pytest.approx(losses(outs[0]), rel=1e-5)


@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_checkpoint_is_read_sharded_or_not(parts, one, tmp_path, sharded_first):
    """Two sharded processes resume from what one process saved, and the other way round."""
    ways = [(["--shard", "true"], 2), ([], 1)]
    first, second = ways if sharded_first else ways[::-1]
    flags = command(parts, tmp_path / "run", "--save-every", 3)
    codes, said = run(tmp_path, flags + first[0], first[1])
    assert codes == [0] * first[1], said
    (tmp_path / "run" / "step-00000006").rename(tmp_path / "away")
    codes, said = run(tmp_path, flags + second[0], second[1])
    assert codes == [0] * second[1], said
    assert len(losses(tmp_path / "run")) == 6
    check_same(tmp_path / "run", one)


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
    flags = ["--shard", "true", "--shard-frozen", "true"]
    outs = [tmp_path / "whole", tmp_path / "stopped"]
    assert run(tmp_path, command(parts, outs[0], *flags), 2)[0] == [0, 0]
    assert run(tmp_path, command(parts, outs[1], *flags), 2, stop_at_three)[0] == [0, 0]
    assert not (outs[1] / "step-00000006").exists() and len(losses(outs[1])) < 6
    assert run(tmp_path, command(parts, outs[1], *flags), 2)[0] == [0, 0]
    assert losses(outs[0]) == losses(outs[1])
    check_same(*outs, exactly=True)


def poison_third_step(rank):
    """NaN in one process's third step."""
    plain, calls = MetaQuery.forward, []

    def forward(self, *inputs, **options):
        calls.append(1)
        loss = plain(self, *inputs, **options)
        return loss * float("nan") if rank == 1 and len(calls) in (5, 6) else loss

    MetaQuery.forward = forward


def test_a_poisoned_step_is_skipped_by_all_shares(parts, tmp_path):
    out = tmp_path / "run"
    flags = ["--shard", "true", "--steps", "4"]
    codes, said = run(tmp_path, command(parts, out, *flags), 2, poison_third_step)
    assert codes == [0, 0], said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["skipped_steps"] for entry in log] == [0, 0, 1, 1]
    weights = load_file(out / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


# ---- Bad input -----------------------------------------------------------------------------------


def test_shard_in_one_process_is_a_warning(parts, one, tmp_path):
    """The run is unsharded, and the same."""
    codes, said = run(tmp_path, command(parts, tmp_path / "run", "--shard", "true"))
    assert codes == [0] and "--shard has no effect in one process: use torchrun" in said[0]
    check_same(tmp_path / "run", one, exactly=True)


@pytest.mark.parametrize("world, micro, words", [(8, 0, "multiple of 8"), (1, 3, "multiple of 3")])
def test_a_batch_that_does_not_divide_names_one_that_does(world, micro, words):
    with pytest.raises(InputError, match=f"--batch-size 4 .*{words}"):
        check_batch_size(TrainConfig(batch_size=4, micro_batch_size=micro), world)


def test_a_micro_batch_is_at_most_a_process_s_share():
    check_batch_size(TrainConfig(batch_size=4, micro_batch_size=16), 2)


def test_a_trained_mllm_with_pictures_is_not_sharded(build):
    model = build("llava", train_mllm=True)
    config = TrainConfig(shard=True, stage="mix")
    with pytest.raises(InputError, match="without pictures only: use --stage pretrain"):
        distribute(model, config, 2, torch.device("cpu"))


def run_out_of_memory(rank):
    """The second process has no memory left for a forward pass."""

    def forward(self, *inputs, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    if rank == 1:
        MetaQuery.forward = forward


def test_a_process_out_of_memory_names_the_micro_batch_to_try(parts, tmp_path):
    flags = ["--shard", "true", "--micro-batch-size", "2"]
    codes, said = run(tmp_path, command(parts, tmp_path / "run", *flags), 2, run_out_of_memory)
    lines = [line for line in said[1].splitlines() if line.startswith("error")]
    assert codes[1] == 2 and len(lines) == 1 and "Traceback" not in said[1], said[1]
    assert "out of memory in process 1: try --micro-batch-size 1 (now 2)" in lines[0]


@pytest.mark.parametrize(
    "micro, words",
    [(0, "--micro-batch-size 16 (now 32)"), (8, "size 4 (now 8)"), (1, "try --grad")],
)
def test_the_micro_batch_to_try_divides_the_batch(micro, words):
    assert words in out_of_memory(TrainConfig(batch_size=32, micro_batch_size=micro))
