"""Training that survives: signals, kills, damaged checkpoints, full disks, numbers gone wrong."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, environment, launcher, losses, run
from safetensors.torch import load_file


def command(parts, out, *flags):
    made = [
        "train.py",
        "--mllm",
        parts / "llava",
        "--diffusion",
        parts / "sana64",
        "--out",
        out,
        "--num-queries",
        4,
        "--connector-layers",
        1,
        "--batch-size",
        4,
        "--warmup",
        2,
        "--steps",
        40,
        "--save-every",
        5,
        "--sample-every",
        1000,
        *flags,
    ]
    return [sys.executable, *map(str, made)]


def start(made, **options):
    return subprocess.Popen(
        made,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(out, steps, running):
    """Until the log holds so many steps, or the process is not `running()` any more."""
    while running():
        if (out / "log.jsonl").exists() and len(losses(out)) >= steps:
            return
        time.sleep(0.02)


def same_end(out, other):
    """Whether two runs ended with the same bits, weights and optimizer."""
    weights = [load_file(path / "model.safetensors") for path in (out, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [torch.load(path / "step-00000040" / "training.pt") for path in (out, other)]
    for key, value in states[0]["optimizer"]["state"].items():
        assert all(
            torch.equal(v, states[1]["optimizer"]["state"][key][n]) for n, v in value.items()
        )


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """A run of 40 steps that nothing broke."""
    out = tmp_path_factory.mktemp("whole")
    done = run(command(parts, out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    "number, workers", [(signal.SIGTERM, 0), (signal.SIGUSR1, 2), (signal.SIGINT, 2)]
)
def test_a_signal_saves_and_ends_well(parts, whole, tmp_path, number, workers):
    """Sent to the loader's workers too, as Ctrl-C, SLURM and systemd send it."""
    made = command(parts, tmp_path, "--workers", workers)
    process = start(made, start_new_session=True)
    wait_for(tmp_path, 7, lambda: process.poll() is None)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    reached = len(losses(tmp_path))
    assert 7 <= reached < 40 and (tmp_path / f"step-{reached:08d}").is_dir()
    assert run(command(parts, tmp_path)).returncode == 0
    assert losses(tmp_path) == losses(whole)
    same_end(tmp_path, whole)


def train_quietly(made):
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.chdir(ROOT)
    sys.argv = made[1:]
    import train

    train.main()


def test_kills_at_any_time_lose_nothing(parts, whole, tmp_path):
    """A soak: killed at random moments, also while saving, a run ends the same, time and again.

    Each start is a fork of a process that has imported all, so that hundreds take minutes.
    """
    rng, kills, ends = random.Random(0), int(os.environ.get("METAQUERY_KILLS", 10)), 0
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["train"])
    killed, out = 0, tmp_path / "out"
    while killed < kills or ends == 0:
        made = command(parts, out, "--save-every", rng.choice((1, 3)))
        process = forks.Process(target=train_quietly, args=(made,))
        process.start()
        there = len(losses(out)) if (out / "log.jsonl").exists() else 0
        if killed < kills:
            wait_for(out, there + rng.randint(1, 5), process.is_alive)
            time.sleep(rng.random() * 0.2)
            process.kill()
        process.join(60)
        if process.exitcode == 0:  # it had come to its end: the soak goes on with a new run
            same_end(out, whole)
            shutil.rmtree(out)
            ends += 1
            continue
        assert process.exitcode == -signal.SIGKILL, "it ended by itself"
        killed += 1
        for folder in out.glob("step-*"):
            assert load_file(folder / "model.safetensors"), "what is there is whole"
    print(f"{killed} kills in {ends} runs, each with the same bits at its end")


IN_SAVE = """
import os, signal, torch, train
plain = torch.save
def save(*rest):
    os.kill(os.getpid(), signal.SIGTERM)
    plain(*rest)
torch.save = save
train.main()
"""


def test_a_signal_during_a_save_leaves_it_whole(parts, whole, tmp_path):
    script = tmp_path / "in_save.py"
    script.write_text(IN_SAVE)
    made = command(parts, tmp_path / "out")[2:]
    done = run([sys.executable, str(script), *made], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) < 10 and (tmp_path / "out" / "step-00000005").is_dir()
    assert run(command(parts, tmp_path / "out")).returncode == 0
    same_end(tmp_path / "out", whole)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_said_and_passed_over(parts, whole, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    newest = out / "step-00000040"
    path = newest / "model.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[-9] ^= 4
        path.write_bytes(content)
    done = run(command(parts, out))
    assert done.returncode == 0 and "step-00000040 is corrupt" in done.stderr
    assert [
        entry["step"] for entry in map(json.loads, (out / "log.jsonl").read_text().splitlines())
    ][-5:] == [36, 37, 38, 39, 40]
    same_end(out, whole)
    for folder in out.glob("step-*"):
        (folder / "training.json").write_text("{")
    done = run(command(parts, out))
    assert done.returncode == 2 and "no complete checkpoint" in done.stderr.splitlines()[-1]


def test_another_run_is_refused(parts, whole, tmp_path):
    """With the fields that differ; how it is saved or split may change."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    done = run(command(parts, out, "--lr", "0.5", "--num-queries", "5"))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "lr 0.0003 there, 0.5 here" in last
    assert "num_queries 4 there, 5 here" in last
    assert run(command(parts, out, "--keep", "1", "--micro-batch-size", "2")).returncode == 0
    done = run(command(parts, out, "--resume", "none"))
    assert done.returncode == 2 and "another --out" in done.stderr.splitlines()[-1]


def test_a_full_disk_is_one_line_and_harms_nothing(parts, tmp_path):
    assert run(command(parts, tmp_path, "--steps", 5)).returncode == 0
    before = load_file(tmp_path / "step-00000005" / "model.safetensors")
    # The limit on a file's size stands for the full disk: no larger file can be written.
    limit = (tmp_path / "model.safetensors").stat().st_size // 2
    (tmp_path / "step-00000005" / "training.json").write_text(
        (tmp_path / "step-00000005" / "training.json")
        .read_text()
        .replace('"steps": 5', '"steps": 40')
    )
    process = start(
        command(parts, tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, errors = process.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 2 and "free some space" in last and "step-00000005" in last
    assert "Traceback" not in errors and not list(tmp_path.glob(".step-*"))
    after = load_file(tmp_path / "step-00000005" / "model.safetensors")
    assert all(torch.equal(after[name], weights) for name, weights in before.items())


WRONG = """
import os, sys, train, metaquery
plain, calls = metaquery.MetaQuery.forward, [0]
def forward(self, *rest, **named):
    calls[0] += 1
    loss = plain(self, *rest, **named)
    wrong = calls[0] in {steps} and os.environ.get("RANK", "0") == "{rank}"
    return loss * float("{factor}") if wrong else loss
metaquery.MetaQuery.forward = forward
train.main()
"""


@pytest.mark.parametrize("world, factor", [(1, "nan"), (2, "nan"), (1, "1e6")])
def test_a_poisoned_step_is_skipped_by_all(parts, tmp_path, world, factor):
    """NaN or a spike on one rank skips the step everywhere alike, is counted and logged."""
    script = tmp_path / "wrong.py"
    text = WRONG.replace("{steps}", "(3, 4)").replace("{rank}", str(world - 1))
    script.write_text(text.replace("{factor}", factor))
    made = command(parts, tmp_path / "out", "--steps", 6)[2:]
    done = run([*launcher(world), str(script), *made], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["skipped_steps"] for entry in log] == [0, 0, 1, 2, 2, 2]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_many_wrong_steps_stop_the_run(parts, tmp_path):
    script = tmp_path / "wrong.py"
    text = WRONG.replace("{steps}", "range(8, 99)").replace("{rank}", "0")
    script.write_text(text.replace("{factor}", "nan"))
    made = command(parts, tmp_path / "out")[2:]
    done = run([sys.executable, str(script), *made], PYTHONPATH=str(ROOT))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "not finite" in last and "step-00000015" in last
    assert torch.isfinite(load_file(tmp_path / "out" / "model.safetensors")["queries"]).all()


def test_a_rank_that_dies_takes_the_job_down(parts, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        WRONG.replace('float("{factor}")', "os._exit(7)")
        .replace("{steps}", "(3,)")
        .replace("{rank}", "1")
    )
    made = command(parts, tmp_path / "out")[2:]
    began = time.time()
    done = run([*launcher(2), str(script), *made], PYTHONPATH=str(ROOT))
    assert done.returncode != 0 and time.time() - began < 120
    assert "exitcode" in done.stderr and "7" in done.stderr


@pytest.mark.parametrize("flags", [(), ("--shard", "true")], ids=["whole", "shard"])
def test_torchrun_starts_a_dead_rank_again(parts, tmp_path, flags):
    """After its restart the job resumes from its last checkpoint and ends as planned."""
    script, once = tmp_path / "dies.py", tmp_path / "once"
    dying = f"(os.path.exists({str(once)!r}) or open({str(once)!r}, 'x') and os._exit(7))"
    script.write_text(
        WRONG.replace('float("{factor}")', dying).replace("{steps}", "(8,)").replace("{rank}", "1")
    )
    made = command(parts, tmp_path / "out", "--steps", 12, *flags)[2:]
    done = run([*launcher(2), "--max-restarts=1", str(script), *made], PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and once.exists(), done.stderr
    assert len(losses(tmp_path / "out")) == 12


def test_two_processes_go_on_where_one_was(parts, whole, tmp_path):
    """The number of processes may change between the runs of one job, and whether it is sharded."""
    process = start(command(parts, tmp_path))
    wait_for(tmp_path, 6, lambda: process.poll() is None)
    process.terminate()
    process.communicate()
    done = run([*launcher(2), *command(parts, tmp_path, "--shard", "true")[1:]])
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=5e-2)
