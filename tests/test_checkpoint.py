"""Training that survives: signals, kills, damaged checkpoints, full disks, numbers gone wrong."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import launcher, losses, run
from runs import (
    ROOT,
    Running,
    check_same,
    flags,
    log_of,
    newest,
    refused,
    succeed,
)
from safetensors.torch import load_file

STEPS = 20


def argv(parts, out, **changes):
    return flags(parts, out, **({"steps": STEPS, "save_every": 5} | changes))


def wait_for(out, steps, running):
    """Until the log holds so many steps, or the process is not `running()` any more."""
    while running():
        if (out / "log.jsonl").exists() and len(losses(out)) >= steps:
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """A run that nothing broke."""
    folder = tmp_path_factory.mktemp("whole")
    succeed(folder, argv(parts, folder / "run"))
    return folder / "run"


@pytest.mark.parametrize(
    "number, workers", [(signal.SIGTERM, 0), (signal.SIGUSR1, 2), (signal.SIGINT, 2)]
)
def test_a_signal_saves_and_ends_well(parts, whole, tmp_path, number, workers):
    """Sent to the loader's workers too, as Ctrl-C, SLURM and systemd send it."""
    out = tmp_path / "run"
    running = Running(tmp_path, argv(parts, out, workers=workers))
    wait_for(out, 4, running.processes[0].is_alive)
    os.killpg(running.processes[0].pid, number)
    codes, texts = running.end()
    assert codes == [0], texts
    reached = len(losses(out))
    assert 4 <= reached < STEPS and newest(out).name == f"step-{reached:08d}"
    assert "Traceback" not in texts[0] and "stopping after this step" in texts[0]
    succeed(tmp_path, argv(parts, out))
    check_same(out, whole, exactly=True)


def test_kills_at_any_time_lose_nothing(parts, whole, tmp_path):
    """A soak: killed at random moments, also while saving, a run ends the same, time and again."""
    rng, kills, ends = random.Random(0), int(os.environ.get("METAQUERY_KILLS", 6)), 0
    killed, out = 0, tmp_path / "run"
    while killed < kills or ends == 0:
        running = Running(tmp_path, argv(parts, out, save_every=rng.choice((1, 3))))
        start = 0
        if (out / "log.jsonl").exists():
            start = len(losses(out))
        if killed < kills:
            wait_for(out, start + rng.randint(1, 5), running.processes[0].is_alive)
            time.sleep(rng.random() * 0.2)
            running.processes[0].kill()
        codes, texts = running.end()
        if codes == [0]:  # complete: the soak continues with a new run
            check_same(out, whole, exactly=True)
            shutil.rmtree(out)
            ends += 1
            continue
        assert codes == [-signal.SIGKILL], texts
        killed += 1
        for folder in out.glob("step-*"):
            assert load_file(folder / "model.safetensors"), "every checkpoint is complete"


def signal_in_save(rank):
    """SIGTERM arrives while a checkpoint is written."""
    plain = torch.save

    def save(*inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        plain(*inputs)

    torch.save = save


def test_a_signal_during_a_save_leaves_it_whole(parts, whole, tmp_path):
    out = tmp_path / "run"
    succeed(tmp_path, argv(parts, out), change=signal_in_save)
    assert len(losses(out)) < 10 and (out / "step-00000005").is_dir()
    succeed(tmp_path, argv(parts, out))
    check_same(out, whole, exactly=True)


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt", "training.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(parts, whole, tmp_path, file):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    path = newest(out) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = succeed(tmp_path, argv(parts, out))
    assert f"step-{STEPS:08d} is damaged" in text
    assert [entry["step"] for entry in log_of(out)] == list(range(1, STEPS + 1))
    check_same(out, whole, exactly=True)


def test_without_a_complete_checkpoint_a_run_is_refused(parts, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for folder in out.glob("step-*"):
        (folder / "training.json").write_text('{"train": 1}')
    refused(tmp_path, argv(parts, out), "no complete checkpoint")


def test_another_run_is_refused(parts, whole, tmp_path):
    """With the fields that differ; how it is saved or split may change."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    words = "lr 0.0006 there, 0.5 here"
    refused(tmp_path, argv(parts, out, lr=0.5, num_queries=5), words)
    succeed(tmp_path, argv(parts, out, keep=1, micro_batch_size=2))
    refused(tmp_path, argv(parts, out, resume="none"), "name another --out")
    refused(tmp_path, argv(parts, out, steps=99), "to train on, start a new run")


def test_parts_that_moved_are_the_same_run(parts, whole, tmp_path):
    """Another scratch folder holds the same MLLM and diffusion model under the same names."""
    out, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(whole, out)
    moved.mkdir()
    for name in ("llava", "sana64"):
        (moved / name).symlink_to(parts / name)
    shutil.rmtree(newest(out))
    succeed(tmp_path, argv(parts, out, mllm=f"{moved / 'llava'}/", diffusion=moved / "sana64"))
    check_same(out, whole, exactly=True)


def test_a_resumed_run_keeps_its_dtype(parts, whole, tmp_path):
    """On another kind of processor it says so and asks for --dtype; given, it goes on."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    words = "was trained in float32, and this machine's choice is bfloat16: give --dtype float32"
    refused(tmp_path, argv(parts, out, dtype="bfloat16"), words)


def test_what_is_the_users_is_kept(parts, whole, tmp_path):
    """--keep removes only the run's own step folders, and others do not count as checkpoints."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(newest(out))
    shutil.copytree(out / "step-00000015", out / "step-00000001-best")
    (out / "step-zz").mkdir()
    succeed(tmp_path, argv(parts, out, keep=1))
    assert (out / "step-00000001-best" / "training.pt").exists() and (out / "step-zz").is_dir()
    assert sorted(path.name for path in out.glob("step-000000[12]?")) == [f"step-{STEPS:08d}"]


def test_a_second_run_in_the_same_folder_is_refused(parts, tmp_path):
    out = tmp_path / "run"
    running = Running(tmp_path, argv(parts, out, steps=5000))
    wait_for(out, 1, running.processes[0].is_alive)
    (tmp_path / "second").mkdir()
    refused(tmp_path / "second", argv(parts, out, steps=5000), "a run is using")
    running.processes[0].kill()
    running.end()


def small_files(rank):
    """The limit on a file's size stands for the full disk: no larger file can be written."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_one_line_and_harms_nothing(parts, tmp_path):
    out = tmp_path / "run"
    running = Running(tmp_path, argv(parts, out))
    wait_for(out, 7, running.processes[0].is_alive)
    running.processes[0].kill()
    running.end()
    before = load_file(out / "step-00000005" / "model.safetensors")
    refused(tmp_path, argv(parts, out), "free some space", change=small_files)
    assert not list(out.glob(".step*"))
    after = load_file(out / "step-00000005" / "model.safetensors")
    assert all(torch.equal(after[name], weights) for name, weights in before.items())


def poison(factor, steps, bad_rank=0):
    """Make the loss of some steps wrong on one rank."""
    from metaquery import MetaQuery

    plain, calls = MetaQuery.forward, []

    def forward(self, *inputs, **options):
        calls.append(1)
        loss = plain(self, *inputs, **options)
        if len(calls) in steps and int(os.environ.get("RANK", 0)) == bad_rank:
            return loss * factor
        return loss

    MetaQuery.forward = forward


def nan_on_rank_0(rank):
    poison(float("nan"), (3, 4))


def nan_on_rank_1(rank):
    poison(float("nan"), (3, 4), bad_rank=1)


def spike(rank):
    poison(1e6, (3, 4))


def nan_from_step_8(rank):
    poison(float("nan"), range(8, 99))


@pytest.mark.parametrize("world, change", [(1, nan_on_rank_0), (2, nan_on_rank_1), (1, spike)])
def test_a_poisoned_step_is_skipped_by_all(parts, tmp_path, world, change):
    """NaN or a spike on one rank skips the step everywhere alike, is counted and logged."""
    out = tmp_path / "run"
    succeed(tmp_path, argv(parts, out, steps=6), world=world, change=change)
    assert [entry["skipped_steps"] for entry in log_of(out)] == [0, 0, 1, 2, 2, 2]
    weights = load_file(newest(out) / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_many_wrong_steps_stop_the_run(parts, tmp_path):
    out = tmp_path / "run"
    refused(tmp_path, argv(parts, out), "not finite", change=nan_from_step_8)
    assert torch.isfinite(load_file(newest(out) / "model.safetensors")["queries"]).all()


DIES = """
import os, sys, metaquery, train
plain, calls, once = metaquery.MetaQuery.forward, [], sys.argv.pop(1)
def forward(self, *inputs, **options):
    calls.append(1)
    if len(calls) == 8 and os.environ["RANK"] == "1" and not os.path.exists(once):
        open(once, "x")
        os._exit(7)
    return plain(self, *inputs, **options)
metaquery.MetaQuery.forward = forward
train.main()
"""


def test_torchrun_starts_a_dead_rank_again(parts, tmp_path):
    """A rank that dies takes the job down; restarted, it resumes and ends as planned."""
    script, once, out = tmp_path / "dies.py", tmp_path / "once", tmp_path / "run"
    script.write_text(DIES)
    command = [str(script), str(once), *argv(parts, out, steps=12, shard="true")]
    done = run([*launcher(2), "--max-restarts=1", *command], PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and once.exists(), done.stderr
    assert len(losses(out)) == 12
    once.unlink()
    shutil.rmtree(out)
    done = run([*launcher(2), *command], PYTHONPATH=str(ROOT))
    assert done.returncode != 0 and "exitcode" in done.stderr


def test_two_processes_go_on_where_one_was(parts, whole, tmp_path):
    """The number of processes may change between the runs of one job, and whether it is sharded."""
    out = tmp_path / "run"
    running = Running(tmp_path, argv(parts, out))
    wait_for(out, 6, running.processes[0].is_alive)
    running.processes[0].terminate()
    assert running.end()[0] == [0]
    succeed(tmp_path, argv(parts, out, shard="true"), world=2)
    assert losses(out) == pytest.approx(losses(whole), rel=1e-3)


def test_settings_are_in_the_checkpoint(whole):
    settings = json.loads((newest(whole) / "training.json").read_text())
    assert settings["train"]["dtype"] == "float32" and settings["model"]["num_queries"] == 4
