"""Train MetaQuery: every stage, in one process or with torchrun.

    python train.py --size tiny --stage pretrain --out runs/tiny
    torchrun --nproc-per-node=8 train.py --size base --out runs/base

Every field of MetaQueryConfig is a flag (--num-queries 64 --connector proj-enc ...). `--out` holds
step-00001000/ folders (weights and training state), log.jsonl, samples/step-*.png, and the latest
weights at its top, so that `sample.py --checkpoint OUT` works at any time.
"""

import json
import os
import random
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm
from transformers import HfArgumentParser, get_cosine_with_min_lr_schedule_with_warmup

from data.pictures import grid
from data.shapes import CAPTION_KINDS, sample
from metaquery import InputError, MetaQuery, MetaQueryConfig, black
from sample import stop

# What a stage draws, with weights, and its steps (§4, §5.2, §5.3). The last stage goes over all.
SEEING = {"edit": 8, "one subject": 6, "two subjects": 4, "three subjects": 1, "association": 4}
STAGES = {
    "pretrain": (CAPTION_KINDS, 3600),
    "reconstruct": ({"reconstruction": 1}, 3600),
    "mix": (CAPTION_KINDS | {"reconstruction": sum(CAPTION_KINDS.values())}, 3600),
    "edit": ({"edit": 1}, 1000),
    "instruct": (CAPTION_KINDS | SEEING | {"reconstruction": 4}, 6000),
}
MIN_LR = 1e-5  # where the cosine ends (§4)


@dataclass
class TrainConfig:
    """What defines a run beside the model: the data, the recipe and where it is saved."""

    size: str = "tiny"
    stage: str = "pretrain"
    out: str = "runs/tiny"
    data: str = "shapes"
    steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int = 0
    lr: float = 1e-3
    warmup: int = 200
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    sample_every: int = 500
    workers: int = 0
    checkpoint: str = ""
    resume: str = "auto"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self):
        if self.stage not in STAGES:
            raise InputError(f"unknown stage {self.stage!r}: choose one of {', '.join(STAGES)}.")
        if self.steps is None:
            self.steps = STAGES[self.stage][1]
        if self.stage in ("edit", "instruct") and not self.checkpoint:
            raise InputError(f"--stage {self.stage} goes on from a model: give --checkpoint DIR.")
        for name in ("steps", "batch_size", "save_every", "sample_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1."
                )
        if self.data != "shapes":
            raise InputError(f"unknown data {self.data!r}: the embedded world is 'shapes'.")


def dropped(stage, prompt, images, u):
    """(prompt, images) with the conditions dropped that a uniform u in [0, 1) says (DESIGN §3).

    So that guidance has something to steer from: a tenth of captions, or of pictures; in
    instruction tuning a tenth of texts alone, of both, and of pictures alone.
    """
    if not images:
        return "" if u < 0.1 else prompt, images
    if stage != "instruct" or not prompt:
        return prompt, black([images])[0] if u < 0.1 else images
    return "" if u < 0.2 else prompt, black([images])[0] if 0.1 <= u < 0.3 else images


class Shapes(Dataset):
    """The embedded world's samples of a stage; the index decides what is drawn and dropped."""

    def __init__(self, stage, seed):
        self.kinds, self.weights = zip(*STAGES[stage][0].items(), strict=True)
        self.stage, self.seed = stage, seed

    def __getitem__(self, index):
        """(prompt, source pictures, target (3, 64, 64) in [-1, 1], index)."""
        rng = random.Random(f"{self.seed} {index}")
        made = sample(rng.choices(self.kinds, self.weights)[0], index, self.seed)
        prompt, images = dropped(self.stage, made.prompt, made.images, rng.random())
        return prompt, images, pil_to_tensor(made.picture).float() / 127.5 - 1, index


def collate(rows):
    """Rows of a dataset as a batch: prompts, pictures a prompt, targets (B, 3, H, W), indices."""
    prompts, images, targets, indices = zip(*rows, strict=True)
    return prompts, images, torch.stack(targets), indices


def noise_of(indices, shape, seed):
    """ε (B, C, h, w) and σ (B,) in (0, 1], each from its sample's index, whatever the batching."""
    noise, sigma = [], []
    for index in indices:
        generator = torch.Generator().manual_seed(hash((seed, int(index))) % (1 << 62))
        noise.append(torch.randn(shape, generator=generator))
        sigma.append(1 - torch.rand((), generator=generator))
    return torch.stack(noise), torch.stack(sigma)


def save(model, optimizer, schedule, step, out, config):
    """Write out/step-N aside and rename it, link its weights to the top, and prune old steps."""
    folder = out / f"step-{step:08d}"
    aside = out / f".{folder.name}"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    state = {"step": step, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, aside / "training.pt")
    (aside / "training.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    for name in ("model.safetensors", "config.json"):
        (out / f".{name}").unlink(missing_ok=True)
        os.link(folder / name, out / f".{name}")
        os.replace(out / f".{name}", out / name)
    for old in sorted(out.glob("step-*"))[: -config.keep]:
        shutil.rmtree(old)


def resume(model, optimizer, schedule, out, config):
    """Go on from the newest step folder of `out` or the one --resume names; its step, or 0."""
    if config.resume == "none":
        return 0
    folders = sorted(out.glob("step-*")) if config.resume == "auto" else [Path(config.resume)]
    if not folders:
        return 0
    from safetensors.torch import load_file

    try:
        state = torch.load(folders[-1] / "training.pt", weights_only=True)
        weights = load_file(folders[-1] / "model.safetensors")
    except Exception as error:
        raise InputError(
            f"cannot resume from {folders[-1]} ({error}): remove it to use an earlier one."
        ) from None
    model.load_trained(weights, folders[-1])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


def draw_samples(model, stage, path):
    """Save a grid of fixed unseen cases from fixed noise, beside their pictures, if any."""
    kinds = [
        kind for kind in STAGES[stage][0] for _ in range(1 if len(STAGES[stage][0]) > 4 else 8)
    ]
    made = [sample(kind, i, split="test") for i, kind in enumerate(kinds)]
    pictures = model.generate(
        [s.prompt for s in made],
        [s.images for s in made],
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
    )
    shown = []
    for s, picture in zip(made, pictures, strict=True):
        shown += [*s.images[:1], picture]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(shown).save(path)


def train(config, model_config):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    share, rest = divmod(config.batch_size, world)
    micro = config.micro_batch_size or share
    if rest or share % micro:
        raise InputError(
            f"--batch-size {config.batch_size} does not divide into {world} processes' "
            f"micro-batches of {micro}: choose a multiple of {world * micro}."
        )
    torch.manual_seed(config.seed)
    if config.checkpoint:
        model = MetaQuery.from_pretrained(config.checkpoint, torch.bfloat16)
    else:
        model = MetaQuery(model_config, torch.bfloat16)
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, (0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, config.warmup, config.steps, min_lr_rate=min(1, MIN_LR / config.lr)
    )
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    first = resume(model, optimizer, schedule, out, config)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    indices = [
        step * config.batch_size + rank * share + i
        for step in range(first, config.steps)
        for i in range(share)
    ]
    loader = iter(
        DataLoader(
            Shapes(config.stage, config.seed), micro, sampler=indices, num_workers=config.workers,
            pin_memory=device.type == "cuda", collate_fn=collate,
        )
    )  # fmt: skip
    latent = (model.diffusion.config.in_channels, *[model.diffusion.config.sample_size] * 2)
    # On a CPU the backward pass of the fused bf16 attention is slower than the plain one's.
    attention = [SDPBackend.MATH] if device.type == "cpu" else list(SDPBackend.__members__.values())
    stopping = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stopping.append(number))
    log = open(out / "log.jsonl", "a") if rank == 0 else None
    bar = tqdm(
        range(first, config.steps),
        initial=first,
        total=config.steps,
        disable=rank > 0,
        mininterval=2,
    )
    began, mean = time.time(), None
    for step in bar:
        total = torch.zeros((), device=device)
        for part in range(share // micro):
            prompts, images, pixels, index = next(loader)
            noise, sigma = noise_of(index, latent, config.seed)
            last = part == share // micro - 1
            with nullcontext() if last or world == 1 else wrapped.no_sync():
                with sdpa_kernel(attention), torch.autocast(device.type, torch.bfloat16):
                    loss = wrapped(
                        prompts, pixels.to(device), images, noise.to(device), sigma.to(device)
                    )
                (loss * micro / share).backward()
            total += loss.detach() * micro / share
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if world > 1:
            dist.all_reduce(total)
            total /= world
        mean = total.item() if mean is None else 0.98 * mean + 0.02 * total.item()
        if rank == 0:
            rate = (step + 1 - first) * config.batch_size / (time.time() - began)
            bar.set_postfix(loss=f"{mean:.4f}", samples_s=f"{rate:.0f}", refresh=False)
            entry = {"step": step + 1, "loss": total.item(), "grad_norm": norm.item(),
                     "lr": schedule.get_last_lr()[0], "samples_per_s": round(rate, 1)}  # fmt: skip
            log.write(json.dumps(entry) + "\n")
            log.flush()
        ended = step + 1 == config.steps or bool(stopping)
        if rank == 0 and (ended or (step + 1) % config.save_every == 0):
            save(model, optimizer, schedule, step + 1, out, config)
        if rank == 0 and (ended or (step + 1) % config.sample_every == 0):
            draw_samples(model, config.stage, out / "samples" / f"step-{step + 1:08d}.png")
        if stopping:
            break
    if rank == 0:
        print(f"saved {out} at step {step + 1 if first < config.steps else first}")
    if world > 1:
        dist.destroy_process_group()


def main():
    try:
        parser = HfArgumentParser((TrainConfig, MetaQueryConfig), description=__doc__)
        parser.error = stop
        size = parser.parse_known_args()[0].size
        parser.set_defaults(**asdict(MetaQueryConfig.preset(size)))
        config, model_config, rest = parser.parse_args_into_dataclasses(
            return_remaining_strings=True
        )
        if rest:
            raise InputError(f"unknown flag {rest[0]}: see train.py --help.")
        train(config, model_config)
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
