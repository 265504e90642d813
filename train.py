r"""Train MetaQuery: every stage, in one process or with torchrun.

    python train.py --size tiny --stage pretrain --out runs/tiny
    torchrun --nproc-per-node=8 train.py --size base --out runs/base
    torchrun --nproc-per-node=8 train.py --size xlarge --shard true \
      --gradient-checkpointing true --out runs/xlarge

Every field of TrainConfig, below, and of MetaQueryConfig in metaquery.py is a flag. The
same command resumes a run. `--out` holds its checkpoints, log.jsonl and samples/, and
`sample.py --checkpoint OUT` works at any time. What fits: python -m extras.sizes SIZE.
"""

import cli

if __name__ == "__main__":
    cli.catch_interrupts()  # also during the slow imports that follow

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from diffusers.utils import make_image_grid
from transformers import HfArgumentParser, get_cosine_with_min_lr_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

import public_weights
from data.batches import Collate, open_batches, unseen_toy_tasks
from metaquery import HERE, InputError, MetaQuery, MetaQueryConfig, portable
from training import attention, distributed
from training.checkpoint import Checkpoints
from training.log import Log

# ---- Recipes: what stands here is what runs, unless a flag says otherwise ------------
TOY = {
    "data": "toy", "streaming": False, "workers": 0,
    "steps": 2400, "batch_size": 32, "micro_batch_size": 0,
    "lr": 1e-3, "warmup": 200, "weight_decay": 0.01, "max_grad_norm": 1.0,
    "sigma_shift": 1.0,
}  # fmt: skip
# §4: 25M images eight times are 48,828 steps of 4,096. The paper does not name all of
# its images; cc12m alone has 11M, of which this is 18 passes. The paper is silent on
# weight decay and the gradient's norm: these are its authors'.
PAPER = {
    "data": "pixparse/cc12m-wds", "streaming": True, "workers": 8,
    "steps": 48_828, "batch_size": 4096, "micro_batch_size": 16,
    "lr": 1e-4, "warmup": 4000, "weight_decay": 0.1, "max_grad_norm": 0.5,
    "sigma_shift": 1.0,
}  # fmt: skip
OMNIEDIT = "TIGER-Lab/OmniEdit-Filtered-1.2M"
INSTRUCT = "xcpan/MetaQuery_Instruct_2.4M_512res"
RECIPES = {
    # What a toy image shows, and where, is decided at high noise levels: train on more.
    # One noise level a sample: at equal cost (2 x 20, 4 x 12, 8 x 6 samples a step)
    # more are worse here, where conditions are cheap: 0.93; 0.91, 0.90, 0.87 of the six
    # kinds (shift 3, three seeds, 360 prompts).
    ("toy", "pretrain"): TOY | {"steps": 520, "lr": 6e-4, "warmup": 50,
                                "sigma_shift": 6.0},
    ("toy", "reconstruct"): TOY,
    ("toy", "mix"): TOY,
    ("toy", "edit"): TOY | {"steps": 1000},
    ("toy", "instruct"): TOY | {"steps": 8000, "batch_size": 64, "micro_batch_size": 16,
                                "lr": 5e-4, "warmup": 100},
    ("paper", "pretrain"): PAPER,
    ("paper", "reconstruct"): PAPER,
    ("paper", "mix"): PAPER,
    # §5.3; the warm-up and the batch size are ours.
    ("paper", "edit"): PAPER | {"data": OMNIEDIT, "steps": 1000, "warmup": 100},
    # §4: 2.4M instructions three times. The paper's 4,000 steps of warm-up would
    # outlast the run: its authors ran 2,000.
    ("paper", "instruct"): PAPER | {"data": INSTRUCT, "steps": 3516, "batch_size": 2048,
                                    "warmup": 2000},
}  # fmt: skip
MIN_LR = 1e-5  # where the cosine ends (§4)
SAMPLE_PROMPTS = ("a photo of a corgi on a beach", "a bowl of ripe bananas",
                  "a red bicycle left of a blue door", "three green glass bottles",
                  "the national animal of Australia")  # fmt: skip


@dataclass
class TrainConfig:
    """What defines a run beside the model. None: the recipe's value."""

    size: Literal["tiny", "study", "base", "large", "xlarge"] = "tiny"
    # Captions to images; images to themselves; both; edits; prompts with several images
    stage: Literal["pretrain", "reconstruct", "mix", "edit", "instruct"] = "pretrain"
    out: str = "runs/tiny"  # the run's folder
    checkpoint: str = ""  # the model to fine-tune: a folder, a hub id or a public name
    resume: str = "auto"  # "auto", "none", or a step folder to resume from

    # "toy", or folders, files and hub ids: A,B=WEIGHT; of a hub id NAME:CONFIG@SPLIT
    data: str | None = None
    # Columns with unusual names; with several datasets a name for each, with commas
    text_column: str = ""  # captions
    target_column: str = ""  # images to learn to generate
    sources_column: str = ""  # source images
    streaming: bool | None = None  # read datasets as they are downloaded
    workers: int | None = None  # loader processes; 0: the training process itself

    steps: int | None = None  # training steps in all
    batch_size: int | None = None  # samples a step, over all processes
    micro_batch_size: int | None = None  # samples a forward pass; 0: a process's share
    noises_per_sample: int = 1  # noise levels that share a condition and latents
    lr: float | None = None  # highest learning rate
    warmup: int | None = None  # linear warm-up steps
    weight_decay: float | None = None  # of matrices, not of biases, norms or queries
    max_grad_norm: float | None = None  # gradients are scaled down to this norm
    seed: int = 0  # seed for new weights, data order and noise

    save_every: int = 1000  # steps between checkpoints
    keep: int = 2  # checkpoints that are kept
    sample_every: int = 500  # steps between images in samples/
    sample_prompts: str = ""  # a text file, one prompt a line, for samples/

    dtype: Literal["", "bfloat16", "float32"] = ""  # "": the fastest of this machine
    device: str = ""  # cpu, cuda, ...; "": the best there is
    shard: bool = False  # split weights, gradients and optimizer over processes (FSDP2)
    shard_frozen: bool = False  # with --shard: split the frozen language model too
    gradient_checkpointing: bool = False  # less memory, more time
    compile: bool = False  # compile the connector and the diffusion model
    cache_latents: str = ""  # a folder that keeps each image's latents, encoded once
    cache_prompts: bool = False  # keep what the frozen MLLM computes of text prompts

    def __post_init__(self):
        if (self.data or self.recipe["data"]) == "toy":
            for name in ("streaming", "text_column", "target_column", "sources_column"):
                if getattr(self, name):
                    flag = name.replace("_", "-")
                    raise InputError(f"--{flag} has no effect on toy data: drop it.")
        for name, value in self.recipe.items():
            if getattr(self, name, 0) is None:
                setattr(self, name, value)

        may_be_zero = ("micro_batch_size", "workers", "warmup", "seed", "weight_decay")
        for name, value in vars(self).items():
            is_number = type(value) in (int, float)
            is_zero = name in may_be_zero and value == 0
            if is_number and not is_zero and not 0 < value <= 10**12:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} is {value}: give a number above 0.")

        if self.stage in ("edit", "instruct") and not self.checkpoint:
            raise InputError(f"--stage {self.stage} fine-tunes: give --checkpoint.")
        if self.shard_frozen and not self.shard:
            raise InputError("--shard-frozen needs --shard true: give both.")
        if self.shard and self.cache_prompts:  # ranks would compute different prompts
            raise InputError("--cache-prompts and --shard exclude each other.")
        places = {Path(self.out).resolve(), Path(self.checkpoint).resolve()}
        if self.checkpoint and len(places) == 1:
            raise InputError(f"--out {self.out} is --checkpoint itself: name another.")
        cli.check_writable(self.out, is_folder=True)

    @property
    def recipe(self):
        """The row of RECIPES for this size and stage."""
        world = "paper"
        if self.size == "tiny":
            world = "toy"
        return RECIPES[world, self.stage]


# ---- Model and optimizer -------------------------------------------------------------
def build_model(config, changes, device, dtype):
    """The model on its device, frozen parts in `dtype`; with other config fields."""
    mixins = []
    if config.cache_prompts:
        mixins.append(attention.KeepsPrompts)
    if config.cache_latents:
        mixins.append(attention.KeepsLatents)

    if config.checkpoint:
        model = public_weights.load(config.checkpoint, dtype, mixins=mixins, **changes)
    else:
        model_class = MetaQuery
        if mixins:
            model_class = type("Model", (*mixins, MetaQuery), {})
        preset = MetaQueryConfig.preset(config.size, **changes)
        model = model_class.from_config(preset, dtype)
        shipped = HERE / "weights" / config.size / "generation_config.json"
        if shipped.exists():  # how images of this size come out best
            model.generation_config |= json.loads(shipped.read_text(encoding="utf-8"))

    if config.cache_latents:
        model.keep_latents_in(config.cache_latents)
    attention.choose_attention(model.to(device))
    if config.gradient_checkpointing:
        attention.checkpoint_layers(model)
    if config.compile:
        for layer in distributed.layers_of(model):
            layer.compile()
    return model


def build_optimizer(config, model):
    """AdamW and its schedule: linear warm-up, then a cosine to MIN_LR."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim > 1 and name != "queries":
            decayed.append(parameter)
        elif parameter.requires_grad:
            others.append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": others, "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)

    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, config.warmup, config.steps, min_lr_rate=min(1, MIN_LR / config.lr)
    )
    return optimizer, schedule


def save_samples(model, config, path, rank):
    """Save a row of images from fixed prompts and noise; of the toy, from unseen tasks.

    Every process generates, since each may hold a share of the weights."""
    prompts, images = list(SAMPLE_PROMPTS), None
    if config.sample_prompts:
        text = Path(config.sample_prompts).read_text(encoding="utf-8")
        prompts = [line for line in text.splitlines() if line.strip()]
    elif config.data == "toy":
        prompts, images = unseen_toy_tasks(config.stage, 8)

    generator = torch.Generator().manual_seed(0)
    row = model.generate(prompts, images, num_inference_steps=20, generator=generator)
    if images and any(images):  # each beside its first source
        pairs = zip(images, row, strict=True)
        row = [image for sources, new in pairs for image in (*sources[:1], new)]
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image_grid(row, 1, len(row)).save(path)


# ---- The run -------------------------------------------------------------------------
def train(config, changes):
    """Run a stage from its first step, or from its newest checkpoint, to its last.

    changes: fields of MetaQueryConfig that replace the size's or the checkpoint's."""
    # 1. Processes, device, dtype. float16's small range would need loss scaling.
    device = cli.device_of(config.device)
    rank, world = distributed.open_processes(device)
    distributed.check_batch_size(config.batch_size, config.micro_batch_size, world)
    dtype, reason = cli.choose_dtype(device, config.dtype)
    if dtype == torch.float16:
        dtype = torch.float32
    config.dtype = str(dtype).removeprefix("torch.")
    if rank == 0:
        print(f"training in {config.dtype} on {device}: {reason}", flush=True)

    # 2. Model: new, or as the newest checkpoint has it. The weights are loaded before
    # they are distributed, the optimizer's state after.
    torch.manual_seed(config.seed)
    model = build_model(config, changes, device, dtype)
    out = Path(config.out)
    settings = {"train": asdict(config), "model": portable(model.config, out)}
    checkpoints = Checkpoints(out, settings, config.keep, config.resume, rank)
    saved = checkpoints.load_weights(model)
    wrapped = distributed.distribute(
        model, device, dtype, world, config.shard, config.shard_frozen, config.stage
    )

    # 3. Optimizer, and where the run is: its step, the place of every reader of a
    # stream, and the running means by which a spike is told.
    optimizer, schedule = build_optimizer(config, model)
    step, places, mean_loss, mean_norm = 0, None, math.inf, math.inf
    if saved:
        checkpoints.resume(saved, model, optimizer, schedule)
        step, places = saved["step"], saved["places"]
        mean_loss, mean_norm = saved["means"]

    # 4. Data: loader workers decode images and tokenize prompts, and draw each sample's
    # noise from a seed of its own, so that no figure depends on who reads it.
    h, w = model.latent_size(model.resolution, model.resolution)
    latent_shape = (model.diffusion.config.in_channels, h, w)
    collate = Collate(
        model.format, model.resolution, latent_shape, config.stage, config.seed,
        config.micro_batch_size, config.noises_per_sample,
    )  # fmt: skip
    batches = open_batches(
        config.data, config.stage, collate,
        columns={"text": config.text_column, "target": config.target_column,
                 "sources": config.sources_column},
        streaming=config.streaming, first=step, steps=config.steps,
        batch_size=config.batch_size, seed=config.seed, rank=rank, world=world,
        workers=config.workers, places=places,
    )  # fmt: skip

    # 5. The loop. Ctrl-C, or a cluster that wants its machine back, ends it after a
    # step.
    parameters = [p for p in model.parameters() if p.requires_grad]
    stop_signals = cli.StopSignals()
    skipped_steps, skipped_samples, waited, bad_steps = 0, 0, 0.0, 0
    ended = step >= config.steps
    with Log(out, step, config.steps, config.batch_size, rank) as log:
        while not ended:
            # This process's share of the batch
            began = time.time()
            batch = next(batches)
            waited += time.time() - began
            skipped_samples += batch.skipped

            # Loss and gradient of each micro-batch. Processes sum theirs at the last
            # one; pinned memory makes the copies to the device asynchronous.
            loss = torch.zeros((), device=device)
            count = len(batch.micro_batches)
            for number, micro in enumerate(batch.micro_batches, 1):
                distributed.sum_gradients(wrapped, number == count)
                targets = micro.targets.to(device, non_blocking=True)  # (b, 3, H, W)
                noise = micro.noise.to(device, non_blocking=True)  # (b·K, C, h, w)
                u = micro.u.to(device, non_blocking=True)  # (b·K,)
                with distributed.precision(wrapped, device, dtype):
                    micro_loss = wrapped(micro.inputs, targets, noise=noise, u=u)
                (micro_loss / count).backward()
                loss += micro_loss.detach() / count / world

            # What all processes must agree on: the loss, and whether one is to stop
            stop = torch.tensor(float(bool(stop_signals)), device=device)
            agreed = torch.stack([loss, stop])
            if world > 1:
                dist.all_reduce(agreed)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            norm = distributed.whole(norm).view(1).to(agreed)
            # The sync point: here the host waits until the device has done the step.
            loss, stop, norm = torch.cat([agreed, norm]).tolist()

            # A step that is not finite, or a spike, would harm the weights: it changes
            # nothing. The paper's authors stop there and go back to a checkpoint.
            is_finite = math.isfinite(loss) and math.isfinite(norm)
            is_spike = loss > 20 * mean_loss or norm > max(1, 25 * mean_norm)
            if is_finite and not is_spike:
                optimizer.step()
                if math.isinf(mean_loss):
                    mean_loss, mean_norm = loss, norm
                mean_loss += 0.01 * (loss - mean_loss)
                mean_norm += 0.01 * (norm - mean_norm)
                bad_steps = 0
            else:
                skipped_steps += 1
                bad_steps += 1
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step += 1
            ended = stop > 0 or step == config.steps

            log.write(
                step, loss, waited, grad_norm=norm, lr=schedule.get_last_lr()[0],
                skipped_steps=skipped_steps, skipped_samples=skipped_samples,
            )  # fmt: skip
            if bad_steps == 10:
                newest = max(checkpoints.folders(), default="none")
                reason = f"loss or gradient not finite or a spike 10 times up to {step}"
                fix = f"lower --lr or check the data; newest checkpoint: {newest}"
                raise InputError(f"{reason}: {fix}.")

            # Save, and generate some samples
            if ended or step % config.save_every == 0:
                places = distributed.gather(batches.places(), world)
                progress = {"places": places, "means": [mean_loss, mean_norm]}
                checkpoints.save(model, optimizer, schedule, step, **progress)
            if ended or step % config.sample_every == 0:
                save_samples(model, config, out / f"samples/step-{step:08d}.png", rank)

    if rank == 0:
        print(f"saved {out} at step {step}")
    if world > 1:
        dist.destroy_process_group()


# ---- The command ---------------------------------------------------------------------
def parse_flags():
    """(TrainConfig, {field of MetaQueryConfig: value}) of flags and RECIPES."""
    parser = HfArgumentParser(
        [TrainConfig, MetaQueryConfig], description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    cli.set_up(parser)
    for action in parser._actions:
        action.required = False  # the size names the parts
        if action.dest == "streaming":  # given alone it is true, as the other switches
            action.nargs, action.const = "?", True
    parser.set_defaults(**{field.name: None for field in fields(MetaQueryConfig)})
    values = vars(parser.parse_args())

    names = [field.name for field in fields(TrainConfig)]
    config = TrainConfig(**{name: values[name] for name in names})
    changes = {"sigma_shift": config.recipe["sigma_shift"]}
    for field in fields(MetaQueryConfig):
        if values[field.name] is not None:
            changes[field.name] = values[field.name]

    if config.steps <= config.warmup and int(os.environ.get("RANK", 0)) == 0:
        short = f"--steps {config.steps} is no more than --warmup {config.warmup}"
        print(f"warning: {short}: --lr is never reached.", file=sys.stderr)
    return config, changes


def main():
    if not sys.stderr.isatty():  # the bars of loading are for eyes, not for files
        disable_progress_bar()
    with cli.errors_in_one_line():
        config, changes = parse_flags()
        try:
            train(config, changes)
        except torch.OutOfMemoryError:
            sizes = (config.batch_size, config.micro_batch_size)
            cli.fail(distributed.out_of_memory(*sizes))


if __name__ == "__main__":
    main()
