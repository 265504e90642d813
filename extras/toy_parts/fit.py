"""The training loop of the toy world's frozen parts."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from metaquery import to_device


@dataclass
class Run:
    """How a part is trained, and where it is saved."""

    out: Path  # the folder of all parts
    steps: int
    batch_size: int  # samples or conversations a step
    device: str = "cpu"
    workers: int = 0  # processes that prepare batches; 0 is in the training process
    start: str = ""  # the folder of a part to train further, instead of a new one


class Batches(Dataset):
    """The batch of each step. It depends on the step's number alone, so workers can make it."""

    def __init__(self, make_batch, name):
        self.make_batch = make_batch
        self.name = name

    def __getitem__(self, step):
        """A dict of tensors."""
        return self.make_batch(random.Random(f"{self.name} {step}"))


def make_optimizers(model, lr):
    """Muon for the matrices of the transformers' layers, AdamW for all other trained weights.

    With Muon, toy models learn to copy and to bind in about half the steps.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.ndim == 2 and "layers." in name:
                matrices.append(parameter)
            else:
                others.append(parameter)
    options = {"lr": lr, "weight_decay": 0.01}
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.98), fused=True, **options)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options))
    return optimizers


def fit(name, modules, make_batch, loss_of, lr, run, evaluate=None, steps=None, encode=None):
    """Train `modules` on run.device: 5% warm-up, then a cosine down to zero.

    make_batch(rng) makes a dict of tensors; encode(batch), run without gradient, may replace it;
    loss_of(batch) is minimized. evaluate() returns a dict for the log. steps: run.steps by
    default. Every 250 steps the state is saved in `run.out/name.resume`, where the next call
    resumes.
    """
    steps = steps or run.steps
    device = torch.device(run.device)

    # On a GPU, cuDNN's attention takes a second to plan for each new length of text.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # On a CPU the plain attention, in bfloat16, is faster than the fused one.
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(device.type == "cpu")

    model = torch.nn.ModuleList(modules).to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:  # gradients laid out as the weights: the shipped parts' bits
            parameter.grad = torch.zeros_like(parameter)
    optimizers = make_optimizers(model, lr)

    resume_file = run.out / f"{name}.resume"
    first_step = 0
    mean_loss = None
    if resume_file.exists():
        state = torch.load(resume_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        first_step = state["step"]

    options = {"num_workers": run.workers, "pin_memory": device.type == "cuda"}
    if run.workers:
        options["multiprocessing_context"] = "fork"
    batches = Batches(make_batch, name)
    loader = DataLoader(batches, None, sampler=range(first_step, steps), **options)
    bar = tqdm(loader, name, initial=first_step, total=steps, mininterval=10)
    for step, batch in enumerate(bar, first_step):
        if step > first_step and step % 250 == 0:
            state = {"step": step, "model": model.state_dict()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, resume_file.with_suffix(".part"))
            resume_file.with_suffix(".part").rename(resume_file)  # never half a file

        warm_up = min(1.0, (step + 1) / (0.05 * steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps))

        batch = to_device(batch, device)
        if encode:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                batch = encode(batch)
        model.zero_grad(set_to_none=False)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

        loss = loss.detach()
        if mean_loss is None:
            mean_loss = loss
        mean_loss = mean_loss.lerp(loss, 0.02)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            log = {"part": name, "step": step + 1, "loss": round(mean_loss.item(), 5)}
            if evaluate and ((step + 1) % 2000 == 0 or step + 1 == steps):
                log |= evaluate()
            tqdm.write(json.dumps(log))
    resume_file.unlink(missing_ok=True)
    model.cpu()
