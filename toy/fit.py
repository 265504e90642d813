"""The training loop of the toy world's frozen parts."""

import json
import math
import random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from metaquery import to_device

SAVE_EVERY = 500  # steps


def pictures_to_tensor(pictures):
    """PIL pictures of one size to (B, 3, H, W) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


class Batches(Dataset):
    """The batch of each step. It depends on the step's number alone, so workers can make it."""

    def __init__(self, make_batch, name):
        self.make_batch = make_batch
        self.name = name

    def __getitem__(self, step):
        """A dict of tensors."""
        return self.make_batch(random.Random(f"{self.name} {step}"))


def make_optimizers(modules, lr):
    """Muon for the matrices of the transformers' layers, AdamW for all other trained weights.

    With Muon, toy models learn to copy and to bind in about half the steps.
    """
    matrices, others = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                in_a_layer = parameter.ndim == 2 and "layers." in name
                (matrices if in_a_layer else others).append(parameter)
    options = {"lr": lr, "weight_decay": 0.01}
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.98), fused=True, **options)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options))
    return optimizers


def save_state(file, step, modules, optimizers):
    """Save all that `load_state` needs. The file is written whole or not at all."""
    state = {
        "step": step,
        "modules": [module.state_dict() for module in modules],
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


def load_state(file, modules, optimizers):
    """Restore modules and optimizers; returns the step to resume from, 0 without a file."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    for module, weights in zip(modules, state["modules"], strict=True):
        module.load_state_dict(weights)
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return state["step"]


def fit(name, modules, make_batch, loss_of, lr, args, evaluate=None, steps=None, encode=None):
    """Train `modules` on args.device: 5% warm-up, then a cosine down to zero.

    make_batch(rng) makes a dict of tensors; encode(batch), run without gradient, may replace it;
    loss_of(batch) is minimised. evaluate() returns a dict for the log. steps is args.steps unless
    given. Every SAVE_EVERY steps all is saved in `args.out/name.resume`, where a next call resumes.
    """
    steps = steps or args.steps
    device = torch.device(args.device)
    # On a CPU the fused attention kernel's backward pass is slower than the plain one's;
    # on a GPU cuDNN's would plan for a second at every new length of the texts.
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in modules:
        module.to(device)
    optimizers = make_optimizers(modules, lr)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    resume_file = args.out / f"{name}.resume"
    first_step = load_state(resume_file, modules, optimizers)
    loader = DataLoader(
        Batches(make_batch, name),
        batch_size=None,
        sampler=range(first_step, steps),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if args.workers else None,
    )
    mean_loss = None
    bar = tqdm(loader, name, initial=first_step, total=steps, mininterval=10)
    for step, batch in enumerate(bar, first_step):
        if step > first_step and step % SAVE_EVERY == 0:
            save_state(resume_file, step, modules, optimizers)
        warm_up = min(1.0, (step + 1) / (0.05 * steps))
        for group in groups:
            group["lr"] = lr * warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16):
            if encode:
                with torch.no_grad():
                    batch = encode(batch)
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss = loss.detach()
        mean_loss = loss if mean_loss is None else mean_loss.lerp(loss, 0.02)
        if (step + 1) % 20 == 0:
            bar.set_postfix(loss=f"{mean_loss.item():.4f}", refresh=False)
        is_last = step + 1 == steps
        if (step + 1) % 200 == 0 or is_last:
            log = {"part": name, "step": step + 1, "loss": round(mean_loss.item(), 5)}
            if evaluate and ((step + 1) % 2000 == 0 or is_last):
                log |= evaluate()
            tqdm.write(json.dumps(log))
    resume_file.unlink(missing_ok=True)
    for module in modules:
        module.cpu()
