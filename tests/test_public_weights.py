"""Public weights of the family: files in their own keys, against plain independent formulas."""

import json
import shutil

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import IMAGE_TOKENS, losses, noise_image
from runs import end_of, newest, succeed
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.v2 import functional as transforms

import public_weights
from metaquery import InputError, MetaQuery, MetaQueryConfig
from training.attention import KeepsLatents, KeepsPrompts

TEXTS = ["a red star left of a blue circle", "", "  a star ", "star " * 300]
TEXTS.append("a <|im_end|> star")


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def encoder_shapes(width, mlp, layers):
    shapes = {}
    for i in range(layers):
        layer = f"connector.layers.{i}"
        for name in "qkv":
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (width, width)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (width,)
        shapes |= {f"{layer}.self_attn.out_proj.weight": (width, width)}
        shapes |= {f"{layer}.self_attn.out_proj.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (mlp, width), f"{layer}.mlp.fc1.bias": (mlp,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (width, mlp), f"{layer}.mlp.fc2.bias": (width,)}
    return shapes


@pytest.fixture(scope="module")
def files(parts, tmp_path_factory):
    """InternVL, a fine-tuned and a pre-trained .pth, a VAE at a root, and a UniPic2 folder."""
    folder = tmp_path_factory.mktemp("public")
    torch.manual_seed(3)
    for name in ("internvl", "qwen-vl"):  # attention far from uniform, so that positions matter
        shutil.copytree(parts / name, folder / name)
        weights = load_file(folder / name / "model.safetensors")
        for key in weights:
            if "language" in key or key.startswith("model.layers"):
                if "q_proj.weight" in key or "k_proj.weight" in key:
                    weights[key] = weights[key] * 20
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
    shutil.copytree(parts / "sana" / "vae", folder / "vae")
    state = random_state(
        {"meta_queries": (6, 64), "projector.weight": (64, 64), "projector.bias": (64,)}
        | encoder_shapes(64, 96, 2)
    )
    state = {name: x.half() for name, x in state.items()}
    torch.save(state, folder / "pretrained.pth")
    sana = diffusers.SanaTransformer2DModel.from_pretrained(parts / "sana", subfolder="transformer")
    tuned = {f"transformer.{name}": (x * 1.1).half() for name, x in sana.state_dict().items()}
    torch.save(state | tuned, folder / "tuned.pth")
    make_unipic2(folder / "unipic2")
    return folder


def make_unipic2(folder):
    diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=32,
        pooled_projection_dim=24, out_channels=4, pos_embed_max_size=32,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        scaling_factor=1.5305, shift_factor=0.0609,
    ).save_pretrained(folder / "vae")  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    shapes = {"meta_queries": (6, 64)} | encoder_shapes(128, 96, 2)
    for i, (a, b) in enumerate([(128, 64), (24, 128), (48, 128)], 1):
        shapes |= {f"projector_{i}.weight": (a, b), f"projector_{i}.bias": (a,)}
    (folder / "conditioner").mkdir()
    state = {name: x.bfloat16() for name, x in random_state(shapes, 1).items()}
    save_file(state, folder / "conditioner" / "model.safetensors")


def openuni(files, parts, name="tuned.pth", **options):
    places = {"mllm": files / "internvl", "diffusion": parts / "sana", "vae": files / "vae"}
    return public_weights.load(files / name, **(places | options))


def unipic2(files, **options):
    weights = {"weights": files / "unipic2", "mllm": files / "qwen-vl"}
    return public_weights.load("unipic2", **(weights | options))


# ---- The description, written out ----------------------------------------------------------------


def plain_encoder(state, x, heads):
    """nn.TransformerEncoderLayer, as the description says."""
    count = len({name.split(".")[2] for name in state if name.startswith("connector.")})
    for i in range(count):
        part = {k.removeprefix(f"connector.layers.{i}."): v for k, v in state.items()}
        mlp, width = part["mlp.fc1.weight"].shape
        layer = nn.TransformerEncoderLayer(
            width, heads, mlp, dropout=0, activation=lambda x: F.gelu(x, approximate="tanh"),
            layer_norm_eps=1e-6, batch_first=True, norm_first=True,
        )  # fmt: skip
        packed = {}
        for kind in ("weight", "bias"):
            rows = [part[f"self_attn.{n}_proj.{kind}"] for n in "qkv"]
            packed[f"self_attn.in_proj_{kind}"] = torch.cat(rows)
            packed[f"self_attn.out_proj.{kind}"] = part[f"self_attn.out_proj.{kind}"]
            for a, b in (("linear1", "mlp.fc1"), ("linear2", "mlp.fc2"),
                         ("norm1", "layer_norm1"), ("norm2", "layer_norm2")):  # fmt: skip
                packed[f"{a}.{kind}"] = part[f"{b}.{kind}"]
        layer.load_state_dict(packed)
        x = layer.train()(x)
    return x


def hidden_states(mllm, tokenizer, text, queries, rounded=False, positions=None, **images):
    """One prompt and the queries in one pass, positions 0, 1, 2, ... unless given."""
    if rounded:
        for name, buffer in mllm.named_buffers():
            if name.endswith("inv_freq"):
                buffer.copy_(buffer.bfloat16().float())
    ids = tokenizer(text, return_tensors="pt").input_ids
    words = mllm.get_input_embeddings()(ids)
    if images:
        seen = mllm.get_image_features(**images).pooler_output
        if isinstance(seen, tuple | list):
            seen = torch.cat(list(seen))
        words = words.clone()
        words[ids == mllm.config.image_token_id] = seen.flatten(0, -2)
    x = torch.cat([words, queries[None]], 1)
    if positions is None:
        positions = torch.arange(x.shape[1])[None]
    out = mllm.base_model.language_model(inputs_embeds=x, position_ids=positions)
    return out.last_hidden_state[:, -len(queries) :]


def openuni_frame(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<img>"


def load_internvl(files):
    mllm = transformers.InternVLForConditionalGeneration.from_pretrained(files / "internvl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "internvl")
    return mllm.eval(), tokenizer


def float_state(path):
    return {name: x.float() for name, x in torch.load(path).items()}


def openuni_condition(files, text, state=None, **images):
    mllm, tokenizer = load_internvl(files)
    state = state or float_state(files / "tuned.pth")
    hidden = hidden_states(mllm, tokenizer, text, state["meta_queries"], True, **images)
    encoded = plain_encoder(state, hidden, 1)
    return F.linear(encoded, state["projector.weight"], state["projector.bias"])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.detach().abs().max().item())


# ---- OpenUni -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [*TEXTS, None])
@torch.no_grad()
def test_openunis_condition(files, parts, prompt):
    model = openuni(files, parts)
    text = "Generate an image."
    if prompt is not None:
        text = f"Generate an image: {prompt.strip()}"
    ids = model.format([prompt])["input_ids"][0]
    assert ids.tolist() == model.tokenizer(openuni_frame(text)).input_ids
    close(model.encode_prompts([prompt])[0], openuni_condition(files, openuni_frame(text)))


@pytest.mark.parametrize("prompt", [" a star ", None])
@torch.no_grad()
def test_openunis_image(files, parts, prompt):
    """Stretched to the image's size, then to one tile without antialiasing."""
    model = openuni(files, parts)
    image = noise_image(40, 24)
    stretched = image.resize((48, 64), 3)
    tile = transforms.to_dtype(transforms.to_image(stretched), torch.float32, scale=True)
    tile = F.interpolate(tile[None], (28, 28), mode="bilinear", antialias=False)
    tile = transforms.normalize(tile, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    words = "Keep the image as it is." if prompt is None else prompt
    text = openuni_frame(f"<img>{'<IMG_CONTEXT>' * IMAGE_TOKENS}</img>\n{words}")
    expected = openuni_condition(files, text, pixel_values=tile)
    close(model.encode_prompts([prompt], [[image]], (64, 48))[0], expected)


@pytest.mark.parametrize("negative", ["", "a blue circle"])
@torch.no_grad()
def test_openunis_images(files, parts, negative):
    """The hub folder's DPM-Solver with guidance, the fine-tuned transformer and the other VAE."""
    model = openuni(files, parts)
    text = openuni_frame("Generate an image: a star")
    other = f"Generate an image: {negative}" if negative else "Generate an image."
    conds = [openuni_condition(files, t) for t in (text, openuni_frame(other))]
    sana = diffusers.SanaTransformer2DModel.from_pretrained(parts / "sana", subfolder="transformer")
    state = float_state(files / "tuned.pth")
    sana.load_state_dict(
        {k.removeprefix("transformer."): v for k, v in state.items() if "transformer." in k}
    )
    sana.eval()
    solver = diffusers.DPMSolverMultistepScheduler.from_pretrained(
        parts / "sana", subfolder="scheduler"
    )
    solver.set_timesteps(4)
    x = torch.randn(1, 4, 8, 4, generator=torch.Generator().manual_seed(5))
    for t in solver.timesteps:
        v, free = (sana(x, encoder_hidden_states=c, timestep=t[None]).sample for c in conds)
        x = solver.step(free + 4.5 * (v - free), t, x).prev_sample
    latents = []
    decode, model.decode_latents = model.decode_latents, lambda z: latents.append(z) or decode(z)
    images = model.generate("a star", negative_prompt=negative, num_inference_steps=4, height=16,
                            width=8, generator=torch.Generator().manual_seed(5))  # fmt: skip
    close(latents[0], x)
    vae = diffusers.AutoencoderDC.from_pretrained(files / "vae")
    pixels = vae.decode(x / 0.5).sample.clamp(-1, 1)[0].permute(1, 2, 0)
    expected = ((pixels + 1) * 127.5).round().int()
    found = torch.tensor(list(images[0].tobytes())).view(16, 8, 3)
    assert (found - expected).abs().max() <= 1 and images[0].size == (8, 16)


def test_openunis_loss(files, parts):
    model = openuni(files, parts)
    targets = torch.rand(2, 3, 8, 8) * 2 - 1
    z = model.vae.encode(targets).latent * 0.5
    noise, u = torch.randn_like(z), torch.tensor([0.0004, 0.2507])
    sigma = torch.tensor([1.0, 0.75]).view(2, 1, 1, 1)
    texts = [openuni_frame("Generate an image: a star"), openuni_frame("Generate an image.")]
    state = float_state(files / "tuned.pth")
    for name in ("meta_queries", "projector.weight"):
        state[name].requires_grad_()
    cond = torch.cat([openuni_condition(files, text, state) for text in texts])
    x = (1 - sigma) * z + sigma * noise
    timestep = 1000 * sigma.flatten()
    v = model.diffusion(x, encoder_hidden_states=cond, timestep=timestep).sample
    loss = model(["a star", None], targets, noise=noise, u=u)
    expected = ((v - (noise - z)) ** 2).mean()
    close(loss, expected)
    expected.backward()
    model.zero_grad()
    loss.backward()
    assert model.queries.grad.abs().sum() > 0
    close(model.queries.grad, state["meta_queries"].grad)
    close(model.connector.projector.weight.grad, state["projector.weight"].grad)


# ---- UniPic2 -------------------------------------------------------------------------------------


def unipic2_condition(files, text, **images):
    mllm = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(files / "qwen-vl").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "qwen-vl")
    state = load_file(files / "unipic2" / "conditioner" / "model.safetensors")
    state = {name: x.float() for name, x in state.items()}
    hidden = hidden_states(mllm, tokenizer, text, state["meta_queries"], **images)

    def project(i, x):
        return F.linear(x, state[f"projector_{i}.weight"], state[f"projector_{i}.bias"])

    encoded = plain_encoder(state, project(1, hidden), 2)
    return project(3, encoded), project(2, encoded.mean(1))


def unipic2_frame(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("prompt", [*TEXTS, None])
@torch.no_grad()
def test_unipic2s_condition(files, prompt):
    model = unipic2(files)
    expected = unipic2_condition(files, unipic2_frame(f"Generate an image: {prompt or ''}"))
    for found, plain in zip(model.encode_prompts([prompt]), expected, strict=True):
        close(found, plain)


@pytest.mark.parametrize("edits", [False, True])
@torch.no_grad()
def test_unipic2s_images(files, edits):
    """Euler steps with guidance; a source's tokens before the noisy ones, in both branches."""
    model = unipic2(files)
    image, options, source = noise_image(60, 40), {}, None
    texts = ["Generate an image: a star", "Generate an image: "]
    if edits:
        resized = image.resize((96, 64), 3)
        processor = transformers.AutoProcessor.from_pretrained(files / "qwen-vl")
        area = 56 * 84
        options = processor.image_processor(
            resized, size={"shortest_edge": area, "longest_edge": area}, return_tensors="pt"
        )
        assert options["image_grid_thw"].tolist() == [[1, 4, 6]]
        seen = f"<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>"
        texts = [seen + "a star", seen]
        vae = model.vae
        values = transforms.to_dtype(transforms.to_image(resized), torch.float32, scale=True)
        mode = vae.encode(values[None] * 2 - 1).latent_dist.mode()
        source = (mode - 0.0609) * 1.5305
    conds = [unipic2_condition(files, unipic2_frame(text), **options) for text in texts]
    solver = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    solver.set_timesteps(3)
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    for t in solver.timesteps:
        v, free = (plain_sd3(model.diffusion, x, t, *cond, source) for cond in conds)
        x = solver.step(free + 3.5 * (v - free), t, x).prev_sample
    latents = []
    decode, model.decode_latents = model.decode_latents, lambda z: latents.append(z) or decode(z)
    images = model.generate(
        "a star", [image] if edits else None, num_inference_steps=3, height=64, width=96,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    close(latents[0], x)
    vae = diffusers.AutoencoderKL.from_pretrained(files / "unipic2", subfolder="vae")
    pixels = vae.decode(x / 1.5305 + 0.0609).sample.clamp(-1, 1)[0].permute(1, 2, 0)
    expected = ((pixels + 1) * 127.5).round().int()
    found = torch.tensor(list(images[0].tobytes())).view(64, 96, 3)
    assert (found - expected).abs().max() <= 1 and images[0].size == (96, 64)


def plain_sd3(model, x, t, cond, pooled, source):
    """SD3's forward pass, written out with a source's tokens."""
    tokens = model.pos_embed(x)
    count = tokens.shape[1]
    if source is not None:
        tokens = torch.cat([model.pos_embed(source), tokens], 1)
    temb = model.time_text_embed(t[None], pooled)
    text = model.context_embedder(cond)
    for block in model.transformer_blocks:
        text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=temb)
    tokens = model.proj_out(model.norm_out(tokens[:, -count:], temb))
    h, w = x.shape[2] // 2, x.shape[3] // 2
    return tokens.view(1, h, w, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(1, 4, 2 * h, 2 * w)


@torch.no_grad()
def test_unipic2_counts_an_images_positions_both_ways(files):
    image, states = [[noise_image(60, 40)]], []
    for positions in ("1d", "3d"):
        model = unipic2(files, picture_positions=positions)
        inputs = model.format(["a star"], image, size=(64, 96))
        inputs.pop("sources")
        states.append(model.read_prompt(inputs).positions)
    assert states[0].ndim == 2 and states[0][0].tolist() == list(range(states[0].shape[1]))
    assert states[1].ndim == 3 and states[1].max() < states[0].max()


@torch.no_grad()
def test_unipic2s_three_dimensional_positions(files):
    """An image of 2 x 3 tokens at 4 counts in height and width; text goes on after 3."""
    resized = noise_image(60, 40).resize((96, 64), 3)
    processor = transformers.AutoProcessor.from_pretrained(files / "qwen-vl")
    size = {"shortest_edge": 56 * 84, "longest_edge": 56 * 84}
    seen = processor.image_processor(resized, size=size, return_tensors="pt")
    image = f"<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>"
    text = unipic2_frame(image + "a star")
    ids = processor.tokenizer(text).input_ids
    first = ids.index(processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    rest = torch.arange(len(ids) - first - 6 + 6) + first + 3  # text, then 6 queries
    rows, columns = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    positions = torch.stack(
        [torch.cat([torch.arange(first), first + x, rest]) for x in (0 * rows, rows, columns)]
    )[:, None]
    expected = unipic2_condition(files, text, positions=positions, **seen)
    model = unipic2(files, picture_positions="3d")
    cond, (pooled, _) = model.encode_prompts(["a star"], [[noise_image(60, 40)]], (64, 96))
    close(cond, expected[0])
    close(pooled, expected[1])
    other, _ = unipic2(files).encode_prompts(["a star"], [[noise_image(60, 40)]], (64, 96))
    assert (other - cond).abs().max() > 0.01 * cond.std()


@pytest.mark.parametrize("family", ["openuni", "unipic2"])
def test_prompts_are_neither_cut_nor_changed(files, parts, family):
    """As in the published scripts. What no tokenizer takes, or stands for images, is refused."""
    model = openuni(files, parts) if family == "openuni" else unipic2(files)
    frame = openuni_frame if family == "openuni" else unipic2_frame
    for prompt in ("star " * 6000 + "x", "a <|im_end|>\n<|im_start|>user\nb"):
        ids = model.format([prompt])["input_ids"][0]
        assert ids.tolist() == model.tokenizer(frame(f"Generate an image: {prompt}")).input_ids
    with pytest.raises(InputError, match="Unicode"):
        model.format(["a \ud800"])
    token = model.processor.image_token
    assert len(model.format([token])["input_ids"])
    with pytest.raises(InputError, match="means an image"):
        model.format([f"a {token}"], [[noise_image(60, 40)]])


def test_several_images_are_openunis_only(files, parts):
    """Training on instructions needs them; each is as the one of the description."""
    images = [noise_image(40, 24, seed) for seed in range(2)]
    inputs = openuni(files, parts).format(["a", "b", None], [images, [], images[1:]])
    assert inputs["pixel_values"].shape == (3, 3, 28, 28)
    counts = (inputs["input_ids"] == inputs["input_ids"].new_tensor(
        openuni(files, parts).processor.image_token_id)).sum(1)  # fmt: skip
    assert counts.tolist() == [2 * IMAGE_TOKENS, 0, IMAGE_TOKENS]
    with pytest.raises(InputError, match="one image"):
        unipic2(files).format(["a"], [images])


@torch.no_grad()
def test_a_sources_shape_is_kept(files):
    model = unipic2(files)
    assert model.latent_size(None, None, [[noise_image(300, 200)]]) == [44, 64]
    assert model.latent_size(None, None) == [64, 48]
    with pytest.raises(InputError, match="at most 512"):
        model.generate("a star", height=528, width=32, num_inference_steps=1)
    with pytest.raises(InputError, match="multiple of 16"):
        model.generate("a star", height=40, width=32, num_inference_steps=1)


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("family", ["openuni", "openuni-pretrained", "unipic2"])
@torch.no_grad()
def test_saved_models_load_again(files, parts, tmp_path, family, trains):
    if family == "unipic2":
        model = unipic2(files, train_diffusion=trains)
    else:
        name = "tuned.pth" if family == "openuni" else "pretrained.pth"
        model = openuni(files, parts, name, train_diffusion=trains)
    model.queries += 0.1
    options = {"num_inference_steps": 2, "height": 32, "width": 32}
    first = model.generate("a star", generator=torch.Generator().manual_seed(1), **options)
    model.save_pretrained(tmp_path)
    assert any("diffusion" in n for n in model.trained_state_dict()) == trains
    again = public_weights.load(tmp_path)
    second = again.generate("a star", generator=torch.Generator().manual_seed(1), **options)
    assert type(again) is type(model) and again.generation_config == model.generation_config
    assert first[0].tobytes() == second[0].tobytes()


@pytest.mark.parametrize("family", ["openuni", "unipic2"])
def test_a_frozen_fine_tuning_stores_queries_and_connector(files, parts, tmp_path, family):
    """It loads from a run's folder."""
    if family == "openuni":
        model = openuni(files, parts, train_diffusion=False)
    else:
        model = unipic2(files, train_diffusion=False)
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    side = model.resolution
    inputs = {"prompts": ["a star"], "targets": torch.zeros(1, 3, side, side),
              "noise": None, "u": torch.tensor([0.5])}  # fmt: skip
    inputs["noise"] = torch.randn_like(model.encode_latents(inputs["targets"]))
    loss = model(**inputs)
    loss.backward()
    optimizer.step()
    run = tmp_path / "step-1"
    run.mkdir()
    model.save_pretrained(run)
    (tmp_path / "latest").write_text("step-1")
    names = {name.split(".")[0] for name in load_file(run / "model.safetensors")}
    assert names == {"queries", "connector"}
    again = public_weights.load(tmp_path)
    assert type(again) is type(model)
    with torch.no_grad():
        model.eval()
        assert again(**inputs) == model(**inputs) != loss


@torch.no_grad()
def test_what_was_chosen_at_loading_is_saved_and_may_change(files, parts, tmp_path):
    image = [[noise_image(60, 40)]]
    rounded, plain = openuni(files, parts), openuni(files, parts, round_rotary=False)
    conds = [model.encode_prompts(["a star " * 20])[0] for model in (rounded, plain)]
    assert not torch.equal(*conds)
    plain.save_pretrained(tmp_path / "openuni")
    again = public_weights.load(tmp_path / "openuni")
    assert torch.equal(again.encode_prompts(["a star " * 20])[0], conds[1])
    again = public_weights.load(tmp_path / "openuni", round_rotary=True)
    assert torch.equal(again.encode_prompts(["a star " * 20])[0], conds[0])

    for saved, other in (("1d", "3d"), ("3d", "1d")):
        model = unipic2(files, picture_positions=saved)
        expected = model.encode_prompts(["a star"], image, (64, 96))[0]
        model.save_pretrained(tmp_path / "unipic2")
        again = public_weights.load(tmp_path / "unipic2")
        assert torch.equal(again.encode_prompts(["a star"], image, (64, 96))[0], expected)
        again = public_weights.load(tmp_path / "unipic2", picture_positions=other)
        assert not torch.equal(again.encode_prompts(["a star"], image, (64, 96))[0], expected)


def test_parts_that_are_gone_are_one_line(files, parts, tmp_path):
    """A frozen fine-tuning on another machine, of files that only its maker had."""
    for name, model in (("unipic2", unipic2(files, train_diffusion=False)),
                        ("openuni", openuni(files, parts, train_diffusion=False))):  # fmt: skip
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config |= {"weights": config["weights"] and "/gone/x.pth"}
        config |= {"diffusion": "/gone/x"} if name == "unipic2" else {}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="--diffusion"):
        public_weights.load(tmp_path / "unipic2")
    again = public_weights.load(tmp_path / "unipic2", diffusion=files / "unipic2")
    assert type(again).__name__ == "UniPic2"
    with pytest.raises(InputError, match=r"/gone/x\.pth.*config\.json"):
        public_weights.load(tmp_path / "openuni")
    again = public_weights.load(tmp_path / "openuni", weights=files / "tuned.pth")
    assert type(again).__name__ == "OpenUni"


# ---- Training ------------------------------------------------------------------------------------


def train_flags(files, parts, family, out, **changes):
    values = {"mllm": files / "internvl", "diffusion": parts / "sana", "vae": files / "vae"}
    values |= {"checkpoint": files / "tuned.pth", "num_queries": 6}
    if family == "unipic2":
        values = {"mllm": files / "qwen-vl", "checkpoint": files / "unipic2"}
    values |= {"out": out, "stage": "edit", "batch_size": 2, "warmup": 1, "steps": 4, "lr": 1e-3}
    values |= {"sample_every": 1000, "save_every": 2, "dtype": "float32"} | changes
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize("trains", ["true", "false"])
@pytest.mark.parametrize("family", ["openuni", "unipic2"])
def test_training_goes_on_from_public_weights(files, parts, tmp_path, family, trains):
    """It trains, saves, resumes bit for bit, and is trained on from what it saved."""
    argv = train_flags(files, parts, family, tmp_path / "run", train_diffusion=trains)
    succeed(tmp_path, argv)
    whole = end_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    succeed(tmp_path, argv)
    assert all(torch.equal(x, whole[name]) for name, x in end_of(tmp_path / "run").items())

    state = load_file(newest(tmp_path / "run") / "model.safetensors")
    assert any(name.startswith("diffusion") for name in state) == (trains == "true")
    model = public_weights.load(tmp_path / "run")
    assert torch.equal(model.queries, state["queries"])
    start = public_weights.read_weights(argv[argv.index("--checkpoint") + 1] + (
        "/conditioner" if family == "unipic2" else ""))  # fmt: skip
    assert not torch.equal(model.queries, start["queries"].float())
    model.generate("a star", [noise_image(60, 40)], num_inference_steps=1, height=32, width=32)
    again = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "next", "--steps", 1]
    again += ["--stage", "edit", "--batch-size", 2, "--warmup", 1, "--dtype", "float32"]
    again += ["--train-diffusion", trains]
    succeed(tmp_path, list(map(str, again)))


def test_what_saves_memory_or_time_works_with_public_weights(files, parts, tmp_path):
    argv = [train_flags(files, parts, "openuni", tmp_path / name) for name in ("a", "b")]
    succeed(tmp_path, argv[0])
    succeed(tmp_path, [*argv[1], "--gradient_checkpointing", "true", "--micro_batch_size", "1"])
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
    succeed(tmp_path, train_flags(files, parts, "unipic2", tmp_path / "c", steps=1,
                                  gradient_checkpointing="true"))  # fmt: skip
    succeed(
        tmp_path, train_flags(files, parts, "openuni", tmp_path / "d", stage="instruct", steps=1)
    )


@torch.no_grad()
def test_caches_are_mixed_in(files, parts, tmp_path):
    """As train.py's --cache-prompts and --cache-latents do."""
    mixins = [KeepsPrompts, KeepsLatents]
    plain, model = openuni(files, parts), openuni(files, parts, mixins=mixins)
    model.keep_latents_in(tmp_path / "latents")
    for _ in range(2):
        close(model.encode_prompts(["a star"])[0], plain.encode_prompts(["a star"])[0])
    assert len(model.kept_prompts) == 1 and isinstance(model, public_weights.OpenUni)
    pixels = torch.rand(1, 3, 8, 8)
    close(model.encode_latents(pixels), plain.encode_latents(pixels))
    assert len(list((tmp_path / "latents").rglob("*/*/*"))) == 1
    model.save_pretrained(tmp_path / "saved")
    again = public_weights.load(tmp_path / "saved", mixins=mixins)
    assert isinstance(again, KeepsPrompts) and isinstance(again, public_weights.OpenUni)
    model = unipic2(files, mixins=mixins)
    close(model.encode_prompts(["a star"])[0], unipic2(files).encode_prompts(["a star"])[0])
    with pytest.raises(InputError, match="--cache-latents needs Sana's VAE"):
        model.keep_latents_in(tmp_path)


def test_a_connector_of_our_own_conditions_an_sd3_type_transformer(files, parts):
    """Trained from nothing: its own pooled condition beside the other."""
    torch.manual_seed(0)
    config = MetaQueryConfig(
        str(parts / "llava"), str(files / "unipic2"), num_queries=4, connector_layers=1
    )
    model = MetaQuery.from_config(config)
    cond, pooled = model.encode_prompts(["a star", "a circle"])
    assert cond.shape == (2, 4, 48) and pooled.shape == (2, 24)
    loss = model(["a star", None], torch.rand(2, 3, 128, 128) * 2 - 1)
    loss.backward()
    for weight in (model.queries, model.connector.pool.weight, model.diffusion.proj_out.weight):
        assert weight.grad.abs().sum() > 0
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], 1e-3)
    optimizer.step()
    (image,) = model.eval().generate("a star", num_inference_steps=2, height=32, width=48)
    assert image.size == (48, 32)


# ---- Bad input -----------------------------------------------------------------------------------


def test_bad_files_are_one_line(files, parts, tmp_path):
    broken = tmp_path / "cut.pth"
    broken.write_bytes((files / "tuned.pth").read_bytes()[:5000])
    code = tmp_path / "code.pth"
    torch.save({"meta_queries": print}, code)
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, other)
    wide = tmp_path / "wide.pth"
    state = torch.load(files / "tuned.pth")
    torch.save(state | {"meta_queries": torch.zeros(6, 128)}, wide)
    words = ["cannot read", "cannot read", "another model", "do not fit"]
    for path, word in zip((broken, code, other, wide), words, strict=True):
        with pytest.raises(InputError, match=word) as caught:
            openuni(files, parts, path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="--mllm"):
        openuni(files, parts, mllm=tmp_path / "nothing")
    with pytest.raises(InputError, match=r"blip3o60k\.pth .*huggingface"):
        public_weights.load("openuni-b-512")


def test_an_ordinary_folder_is_a_metaquery(build, tmp_path):
    build().save_pretrained(tmp_path)
    assert type(public_weights.load(tmp_path)).__name__ == "MetaQuery"
    assert "family" not in json.loads((tmp_path / "config.json").read_text())
