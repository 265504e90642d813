"""What a size weighs, and what it takes to generate and to train: without weights or a GPU.

    python -m extras.sizes base
    python -m extras.sizes study --micro-batch-size 16 --gradient-checkpointing true
    python -m extras.sizes xlarge --processes 8 --shard true

The real model generates and trains on fake tensors, which have a shape and a dtype but no values,
and torch's MemTracker follows the bytes of those alive; kernels are the CPU's, and so an estimate.
Any field of MetaQueryConfig is a flag too. GB are 10⁹ bytes; a tenth of each card is spared for
CUDA itself and for fragmentation. Prompts are long texts without images.
"""

import argparse
from dataclasses import fields

import torch
import torch.distributed as dist
import transformers
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.hf_argparser import string_to_bool

from cli import bounded, errors_in_one_line, fail, set_up
from extras.architectures import build
from metaquery import MetaQueryConfig
from training.attention import checkpoint_layers
from training.distributed import precision, shard, sum_gradients

CARDS = (12, 24, 48, 80)  # GB
SPARE = 0.1  # share of a card
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPT_TOKENS = 300  # the system prompt, and a text at its longest
CPU, DTYPE = torch.device("cpu"), torch.bfloat16


class Tracker(MemTracker):
    """MemTracker without its figures of each module: far faster, and for frozen weights too."""

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = lambda *_: None


def peak_of(function, *parts):
    """Bytes at the peak of a function, with these modules and optimizers on the device."""
    tracker = Tracker()
    tracker.track_external(*parts)
    with tracker:
        function()
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


def meta_model(config):
    """A MetaQuery on the meta device, its frozen weights in bfloat16."""
    with torch.device("meta"):
        return build(config, DTYPE)


def text_inputs(samples):
    ids = torch.ones(samples, PROMPT_TOKENS, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def step_peak(config, samples, checkpointed=False, sharded=False, shard_frozen=False):
    """Bytes at the peak of a training step's last micro-batch of so many samples.

    The gradients of earlier micro-batches are there, and AdamW's moments: it updates in place.
    """
    model = meta_model(config)
    if checkpointed:
        checkpoint_layers(model)
    if sharded:
        shard(model, CPU, DTYPE, shard_frozen)

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # fake tensors
        model.mllm.tie_weights()
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(parameters, fused=True)
        optimizer.step()
        targets = torch.zeros(samples, 3, model.resolution, model.resolution)

        def step():
            # Sharded, an earlier micro-batch leaves whole gradients, the last one sums them.
            for is_last in (False, True)[not sharded :]:
                sum_gradients(model, is_last)
                with precision(model, CPU, DTYPE):
                    loss = model(text_inputs(samples), targets)
                loss.backward()

        return peak_of(step, model, optimizer)


def generation_peaks(config):
    """Bytes at the peak of generating an image: (all parts on the GPU, each there in its turn)."""
    model = meta_model(config).to(DTYPE).requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # fake tensors
        model.mllm.tie_weights()
        rows = 2  # of guidance: with the prompt and without
        size = model.latent_size(model.resolution, model.resolution)
        x = torch.zeros(rows, model.diffusion.config.in_channels, *size)
        hidden = torch.zeros(rows, *model.queries.shape, dtype=DTYPE)
        cond = model.connector(hidden)

        turns = {
            "mllm": lambda: model.run_queries(model.read_prompt(text_inputs(rows))),
            "connector": lambda: model.connector(hidden),
            "diffusion": lambda: model.denoise(x, torch.ones(rows), cond, None),
            "vae": lambda: model.vae.decode(x[:1].to(DTYPE)),
        }
        whole = max(peak_of(turn, model) for turn in turns.values())
        return whole, max(peak_of(turn, getattr(model, name)) for name, turn in turns.items())


def main():
    parser = transformers.HfArgumentParser(MetaQueryConfig, description=__doc__)
    set_up(parser)
    names = [field.name for field in fields(MetaQueryConfig)]
    for action in parser._actions:
        action.required = False  # the size names the parts
        action.default = argparse.SUPPRESS
    number, switch = bounded(int, 1, 10**6), {"type": string_to_bool, "nargs": "?", "const": True}
    add = parser.add_argument
    add("size", nargs="?", default="tiny", help="tiny, study, base, large, xlarge")
    add("--micro-batch-size", type=number, help="samples a forward pass (several are tried)")
    add("--gradient-checkpointing", **switch, help="as of train.py")
    add("--processes", type=number, default=1, help="one for each GPU (1)")
    add("--shard", **switch, help="as of train.py")
    add("--shard-frozen", **switch, help="as of train.py")
    args = parser.parse_args()
    if args.shard and args.processes == 1:
        fail("--shard true splits over several processes: give --processes of at least 2.")

    with errors_in_one_line():
        changes = {name: value for name, value in vars(args).items() if name in names}
        config = MetaQueryConfig.preset(args.size, **changes)
        print(f"{args.size}: {config.mllm} x {config.diffusion}")

        model = meta_model(config)
        for name in ("mllm", "connector", "diffusion", "vae"):
            parameters = list(getattr(model, name).parameters())
            count = sum(p.numel() for p in parameters) / 1e6
            trained = ", trained" * parameters[-1].requires_grad
            print(f"{name:>10} {count:7.1f} M, {count / 500:5.2f} GB in bfloat16{trained}")

        whole, in_turn = generation_peaks(config)
        print(f"an image: {whole / 1e9:.1f} GB, with --offload {in_turn / 1e9:.1f} GB", flush=True)
        if args.shard:
            dist.init_process_group("fake", world_size=args.processes, rank=0, store=FakeStore())
        how = (args.gradient_checkpointing, args.shard, args.shard_frozen)
        steps = {}
        for samples in [args.micro_batch_size] if args.micro_batch_size else MICRO_BATCHES:
            steps[samples] = step_peak(config, samples, *how)
            print(f"a micro-batch of {samples}: {steps[samples] / 1e9:.1f} GB", flush=True)
            if steps[samples] > max(CARDS) * 1e9:
                break

        for card in CARDS:
            free = (1 - SPARE) * card * 1e9
            generates = "generates" if whole <= free else "generates with --offload"
            if in_turn > free:
                generates = "generates nothing"
            fitting = [samples for samples, peak in steps.items() if peak <= free]
            trains = f"trains, micro-batch {max(fitting)}" if fitting else "does not train"
            print(f"{card} GB: {generates}; {trains}")


if __name__ == "__main__":
    main()
