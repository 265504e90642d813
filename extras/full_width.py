"""The base size at full width, with random weights: training, drawing and what the VAE takes.

Rows of benchmarks/speed.py, which prints them; made for a GPU, and run at the tiny size anywhere.
"""

import gc
import resource
import tempfile
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import torch
import transformers
from diffusers import DPMSolverMultistepScheduler, SanaPipeline
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from data.batches import resolution_of
from extras.memory import fake
from extras.sizes import DIFFUSIONS, LLAVA, MLLMS, meta_model
from metaquery import SANA, TINY, MetaQuery, MetaQueryConfig, to_device
from training.attention import choose_attention
from training.distributed import layers_of

CACHE = Path(tempfile.gettempdir()) / "metaquery-bench"
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, without sparsity
BATCHES = {"base": (8, 16, 32), "tiny": (2,)}  # micro-batches of the training rows


def now(device):
    """The time in seconds, once the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.time()


def random_base(divisor=1):
    """A folder of the base size's parts with random weights, made on the GPU if there is one.

    Divided by more than 1, its transformers have fewer layers of the same width."""
    folder = CACHE / f"base-{divisor}"
    if not (folder / "sana" / "vae").exists():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            config = MLLMS[LLAVA]()
            config.text_config.num_hidden_layers //= divisor
            del config.text_config.layer_types[config.text_config.num_hidden_layers :]
            mllm = transformers.AutoModelForImageTextToText.from_config(config)
            transformer, vae = DIFFUSIONS[SANA](num_layers=20 // divisor)
        transformers.AutoProcessor.from_pretrained(TINY / "mllm").save_pretrained(folder / "mllm")
        mllm.save_pretrained(folder / "mllm")
        scheduler = DPMSolverMultistepScheduler.from_pretrained(TINY / "diffusion" / "scheduler")
        for name, part in (("scheduler", scheduler), ("transformer", transformer), ("vae", vae)):
            part.save_pretrained(folder / "sana" / name)
        del mllm, transformer, vae
        torch.set_default_dtype(torch.float32)
    return folder


def full_model(size, device, divisor=1):
    """The base size at full width with random weights, or the shipped tiny one, for training."""
    if size == "tiny":
        config = MetaQueryConfig.preset("tiny")
    else:
        folder = random_base(divisor)
        parts = {"mllm": str(folder / "mllm"), "diffusion": str(folder / "sana")}
        config = MetaQueryConfig.preset("base", connector_layers=24 // divisor, **parts)
    return MetaQuery(config, torch.bfloat16).to(device)


def one_loss(size):
    """One text-to-image loss and query gradient, random weights."""
    model = full_model(size, "cpu")
    resolution = resolution_of(model)
    began = time.time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(["a red star left of a blue circle"], torch.zeros(1, 3, *[resolution] * 2))
    loss.backward()
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{size}: loss {loss.item():.4f}, query gradient norm {model.queries.grad.norm():.3g}")
    print(f"{size}: {time.time() - began:.0f} s, peak memory {gigabytes:.1f} GiB")


def multiplications(model, prompt_tokens):
    """Multiplications of a sample's forward pass: {"queries", "connector", "diffusion"}.

    The arithmetic of the method itself, without the prompt's pass and the VAE: each weight times
    the positions that it is applied to, and the products of attention. Of Sana only.
    """

    def weights(*modules):
        named = [pair for module in modules for pair in module.named_parameters()]
        return sum(p.numel() for name, p in named if p.ndim > 1 and "table" not in name)

    n, d = model.queries.shape
    decoder, connector, sana = model.mllm.get_decoder(), model.connector, model.diffusion
    text, fields = decoder.config, sana.config
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    attended = 2 * n * (prompt_tokens + n) * heads * head_dim  # q·kᵀ and P·v
    queries = n * weights(decoder.layers) + len(decoder.layers) * attended
    width = connector.layers[0].out.weight.shape[0]
    mapped = n * weights(connector) + len(connector.layers) * 2 * n * n * width
    tokens = (fields.sample_size // fields.patch_size) ** 2
    on_condition = weights(*[block.attn2.to_k for block in sana.transformer_blocks])
    on_condition += weights(*[block.attn2.to_v for block in sana.transformer_blocks])
    on_tokens = weights(sana.transformer_blocks, sana.patch_embed, sana.proj_out) - on_condition
    on_condition += weights(sana.caption_projection)
    width = fields.num_attention_heads * fields.attention_head_dim
    linear = 2 * tokens * width * (fields.attention_head_dim + 1)  # Sana's own attention is linear
    width = fields.num_cross_attention_heads * fields.cross_attention_head_dim
    attended = linear + 2 * tokens * n * width
    drawn = tokens * on_tokens + n * on_condition + weights(sana.time_embed)
    drawn += len(sana.transformer_blocks) * attended
    return {"queries": queries, "connector": mapped, "diffusion": drawn}


def step_flops(model, prompt_tokens):
    """Floating-point operations of a sample in training, forward and backward, none done twice.

    A backward pass takes two products for each of the forward's: for the gradients of inputs and of
    weights; through the frozen MLLM only the former.
    """
    made = multiplications(model, prompt_tokens)
    return 2 * (2 * made["queries"] + 3 * made["connector"] + 3 * made["diffusion"])


@contextmanager
def one_pass(model):
    """The plain way: prompt and queries in one pass of the MLLM, its layers checkpointed."""
    decoder, n = model.mllm.get_decoder(), model.config.num_queries

    def add_queries(decoder, inputs, options):
        embeds, mask = options["inputs_embeds"], options["attention_mask"]
        queries = model.queries.to(embeds.dtype).expand(len(embeds), -1, -1)
        mask = torch.cat([mask, mask.new_ones(len(mask), n)], 1)
        added = {"inputs_embeds": torch.cat([embeds, queries], 1), "attention_mask": mask}
        added |= {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "use_cache": False}
        return inputs, options | added

    def encode_prompts(inputs, images=None):
        inputs = to_device(inputs, model.queries.device)
        hidden = model.mllm.base_model(**inputs).last_hidden_state[:, -n:]
        return model.connector(hidden.to(model.connector.norm.weight.dtype)), None

    hook = decoder.register_forward_pre_hook(add_queries, with_kwargs=True)
    model.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    decoder.train()
    model.encode_prompts = encode_prompts
    try:
        yield
    finally:
        hook.remove()
        model.mllm.gradient_checkpointing_disable()
        model.mllm.eval()
        del model.encode_prompts


def count_syncs(step):
    """How often the host waits for the GPU in a step, and the first place in our code, if any."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in said if "synchroniz" in str(w.message)]
    ours = [w for w in waits if "site-packages" not in w.filename]
    return len(waits), f"{ours[0].filename}:{ours[0].lineno}" if ours else ""


def measure_training(model, way, batch, picture, repeats, device):
    """Print a row: samples/s, utilization, memory and syncs of a training step of one way."""
    pictures = [[Image.new("RGB", (512, 512), "red")]] * batch if picture else None
    inputs = dict(model.prepare_inputs(["a red star left of a blue circle"] * batch, pictures))
    inputs = to_device(inputs, device)
    tokens, resolution = inputs["input_ids"].shape[1], resolution_of(model)
    targets = torch.zeros(batch, 3, resolution, resolution, device=device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-6, fused=True)

    def step():
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = model(dict(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # warms up, and makes the optimizer's state
    times = []
    for _ in range(repeats):
        began = now(device)
        step()
        times.append(now(device) - began)
    rate = batch / median(times)
    flops = rate * step_flops(model, tokens)
    row = f"{'one picture' if picture else 'text':<11} {tokens:5} tokens  batch {batch:3}  {way:<8}"
    row += f" {rate:7.2f} samples/s {flops / 1e12:6.2f} TFLOP/s"
    if device != "cpu":
        name = torch.cuda.get_device_name()
        peaks = [peak for key, peak in PEAK_FLOPS.items() if key in name]
        row += f" {flops / peaks[0]:6.1%} of {name}'s" if peaks else f" on {name}"
        torch.cuda.reset_peak_memory_stats()
        step()
        row += f" {torch.cuda.max_memory_allocated() / 1e9:6.1f} GB"
        waits, place = count_syncs(step)
        row += f" {waits} syncs {place}"
    print(row, flush=True)


def measure_drawing(model, repeats, device):
    """Print the time of a picture in 30 steps, beside diffusers' pipeline on the same parts."""
    dtype = torch.bfloat16
    model = model.to(dtype).eval()
    prompts = ["a red star left of a blue circle", ""]
    schedule = DPMSolverMultistepScheduler.from_config(model.scheduler.config)
    pipe = SanaPipeline(None, None, model.vae, model.diffusion, schedule)
    pipe.set_progress_bar_config(disable=True)
    resolution, ours, encoding, theirs = resolution_of(model), [], [], []
    for _ in range(repeats + 1):
        began = now(device)
        model.generate(prompts[:1], num_inference_steps=30)
        ours.append(now(device) - began)
        began = now(device)
        with torch.no_grad():
            cond, _ = model.encode_prompts(prompts)
        encoding.append(now(device) - began)
        mask = torch.ones(1, cond.shape[1], dtype=torch.long, device=cond.device)
        began = now(device)
        pipe(
            negative_prompt=None,
            prompt_embeds=cond[:1].to(dtype),
            prompt_attention_mask=mask,
            negative_prompt_embeds=cond[1:].to(dtype),
            negative_prompt_attention_mask=mask,
            num_inference_steps=30,
            guidance_scale=3.0,
            height=resolution,
            width=resolution,
            use_resolution_binning=False,
        )
        theirs.append(now(device) - began)
    ours, encoding, theirs = median(ours[1:]), median(encoding[1:]), median(theirs[1:])
    print(
        f"a picture of {resolution} px in 30 steps: {ours:.3f} s, of which {encoding:.3f} s encode "
        f"the prompts; diffusers' SanaPipeline, from the encoded prompts: {theirs:.3f} s; "
        f"we add {(ours - encoding) / theirs - 1:+.1%}"
    )


def training(size, repeats, device):
    """Training steps at each micro-batch, ours, compiled and the plain way; then a picture."""
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads of the CPU")
    for way in ("plain", "ours", "compiled"):
        model = full_model(size, device)
        choose_attention(model)
        if way == "compiled":
            for layer in layers_of(model):
                layer.compile()
        for picture in (False, True):
            for batch in BATCHES[size]:
                try:
                    with one_pass(model) if way == "plain" else nullcontext():
                        measure_training(model, way, batch, picture, repeats, device)
                except torch.OutOfMemoryError:
                    print(f"{way}, batch {batch}: out of memory", flush=True)
                    model.zero_grad()
        if way == "ours":
            measure_drawing(model, repeats, device)
        del model
        gc.collect()


def vae_arithmetic():
    """Print the share of the base size's arithmetic in a step that the VAE's encoding takes."""
    tokens, model = 64, meta_model(MetaQueryConfig.preset("base"))
    step = step_flops(model, tokens)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake(model, torch.bfloat16)
        with FlopCounterMode(display=False) as encoding:
            model.vae.encode(torch.empty(1, 3, 512, 512, dtype=torch.bfloat16))
        with FlopCounterMode(display=False) as prompt:
            words = torch.empty(1, tokens, model.queries.shape[1], dtype=torch.bfloat16)
            model.mllm.get_decoder()(inputs_embeds=words, use_cache=True)
    encoding = encoding.get_total_flops()
    step += encoding + prompt.get_total_flops()
    print(f"(vae) of {step / 1e12:.2f} TFLOP of a sample's step, text prompts, encoding the target")
    print(f"takes {encoding / 1e12:.2f}, a share of {encoding / step:.1%}", flush=True)


def vae_share(batch, repeats):
    """Print the share of the base size's training step that the VAE's encoding takes on a CPU.

    The optimizer is left out. For memory's sake a quarter of the layers are run, and then none, so
    that the time of all of them follows.
    """
    model = full_model("base", "cpu", divisor=4)
    choose_attention(model)
    targets = torch.zeros(batch, 3, 512, 512)
    inputs = dict(model.prepare_inputs(["a red star left of a blue circle"] * batch))

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            model(dict(inputs), targets).backward()
        model.zero_grad()

    def seconds(function):
        times = []
        for _ in range(repeats + 1):
            began = time.time()
            function()
            times.append(time.time() - began)
        return median(times[1:])

    encoding, quarter = seconds(lambda: model.encode_latents(targets)), seconds(step)
    for layers in (model.mllm.get_decoder().layers, model.connector.layers):
        del layers[:]
    del model.diffusion.transformer_blocks[:]
    none = seconds(step)
    full = none + 4 * (quarter - none)
    print(f"(vae) a step of {batch} samples: {quarter:.2f} s with a quarter of the layers,")
    print(
        f"{none:.2f} s with none, so {full:.2f} s with all; encoding the targets {encoding:.2f} s"
    )
    print(f"the share of encoding: {encoding / full:.1%}")
