"""One arm of a table: where it is kept, how it is trained, and what is measured of it."""

import json
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from extras.tables.frozen import frozen_digest, run
from extras.tables.metrics import measure, training_figures
from cli import device_of
from metaquery import MetaQuery, MetaQueryConfig

IN_WORK = ("mllm", "diffusion", "data")  # fields that name folders in --work


class Arm(NamedTuple):
    """Fields of MetaQueryConfig that differ from the tiny preset's, and the stages of training."""

    config: dict  # "mllm" and "diffusion" are folders in --work that PARTS make
    stages: tuple = ("pretrain",)
    run: dict = {}  # fields of TrainConfig that differ; "data" is a folder in --work


def name_of(arm, seed):
    """A training's name: its stages, the fields that differ from the preset's, and its seed."""
    preset = asdict(MetaQueryConfig.preset("tiny"))
    fields = arm.config | arm.run
    changes = sorted(f"{name}={x}" for name, x in fields.items() if x != preset.get(name))
    return Path(",".join(["+".join(arm.stages), *changes]).replace("/", "-")) / f"{seed}"


def settings_of(args):
    """What all arms have in common, as a folder's name: "dacefb37-1200x32-lr0.0003"."""
    return f"{frozen_digest()}-{args.steps}x{args.batch_size}-lr{args.lr}"


def folder_of(arm, seed, args):
    """Where an arm's training for a seed is kept; arms that are the same share it."""
    return args.work / settings_of(args) / name_of(arm, seed)


def scores_of(arm, seed, args):
    """The file of what was measured of a training."""
    settings = f"{settings_of(args)}-{args.limit}cases"
    return args.out / "arms" / settings / name_of(arm, seed).with_suffix(".json")


def read_scores(arm, seed, args):
    """What was measured of a training, {measure: {name: figure}}, and its own under "training"."""
    path = scores_of(arm, seed, args)
    return json.loads(path.read_text()) if path.exists() else {}


def train(arm, seed, args):
    """Train an arm's last stage, from the stage before if there is one, unless that is done."""
    out = folder_of(arm, seed, args)
    if (out / f"step-{args.steps:08d}").exists():
        return
    given = {"size": "tiny", "stage": arm.stages[-1], "seed": seed, "out": out, "keep": 1}
    given |= {"steps": args.steps, "batch_size": args.batch_size, "warmup": args.steps // 10}
    given |= {"lr": args.lr, "save_every": 100, "sample_every": args.steps}
    given |= {"sigma_shift": 1.0}  # uniform noise levels, unless the arm has others
    given |= arm.config | arm.run
    given |= {name: args.work / given[name] for name in IN_WORK if name in given}
    if len(arm.stages) > 1:
        given["checkpoint"] = folder_of(arm._replace(stages=arm.stages[:-1]), seed, args)
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in given.items())
    run(["train.py", *chain.from_iterable(pairs)], out.with_suffix(".log"))


def made_on(device):
    """The device that trains and draws here, and the versions of what it runs."""
    made = {name: version(name) for name in ("torch", "transformers", "diffusers")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name} | made


def score_arm(arm, measures, seed, args):
    """Measure what is not measured yet of a trained model: {measure: {name: figure}}."""
    folder, path = folder_of(arm, seed, args), scores_of(arm, seed, args)
    kept = read_scores(arm, seed, args)
    missing = [name for name in measures if name not in kept]
    if missing:
        device = device_of("")
        model = MetaQuery.from_pretrained(folder).to(device, torch.bfloat16).eval()
        path.parent.mkdir(parents=True, exist_ok=True)
        kept["training"] = training_figures(folder)
        kept["made on"] = made_on(device)
        for name in missing:
            kept[name] = measure(model, name, args.limit, seed, args.work)
            path.write_text(json.dumps(kept, indent=2) + "\n")
    return {name: kept[name] for name in (*measures, "training")}
