"""The method: two passes are one, the MLLM is untouched, losses and guidance are formulas."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, noise_image, pixels, recorded
from diffusers import DPMSolverMultistepScheduler

from metaquery import SYSTEM_PROMPT, Connector, InputError, MetaQuery, MetaQueryConfig
from notebooks.plain import one_pass

PROMPTS = ["a red star left of a blue circle", "a star", ""]


@pytest.mark.parametrize("mllm", ["llava", "qwen"])
def test_two_passes_equal_one_pass(build, mllm):
    """Same conditions and same query gradients in float64, with left padding."""
    model = build(mllm, dtype=torch.float64)
    assert model.format(PROMPTS)["attention_mask"][1, 0] == 0, "prompts are padded on the left"
    weights = None
    results = []
    for condition in (
        lambda: model.encode_prompts(PROMPTS)[0],
        lambda: model.connector(one_pass(model, model.format(PROMPTS))),
    ):
        made = condition()
        weights = torch.randn_like(made) if weights is None else weights
        (gradient,) = torch.autograd.grad((made * weights).sum(), model.queries)
        results.append((made, gradient))
    (two, two_gradient), (one, one_gradient) = results
    torch.testing.assert_close(two, one, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(two_gradient, one_gradient, atol=1e-10, rtol=1e-9)
    assert two_gradient.abs().max() > 0


@pytest.mark.parametrize("mllm", ["llava", "qwen"])
def test_a_batch_changes_nothing_for_its_prompts(build, mllm):
    model = build(mllm, dtype=torch.float64)
    together = model.encode_prompts(PROMPTS)[0]
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(
            model.encode_prompts([prompt])[0][0], together[row], atol=1e-10, rtol=1e-9
        )


def test_later_query_never_changes_an_earlier_state(build):
    """Everything stays causally masked (§3.1)."""
    model = build(dtype=torch.float64)
    inputs = model.format(PROMPTS)
    with torch.no_grad():
        before = model.run_queries(model.read_prompt(inputs))
        model.queries[3] += 1
        after = model.run_queries(model.read_prompt(inputs))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_training_leaves_the_mllm_bit_identical(build):
    """After training steps, every MLLM parameter and its text logits are what they were."""
    model = build().train()
    before = {k: v.clone() for k, v in model.mllm.state_dict().items()}
    inputs = model.format(PROMPTS)
    logits = model.mllm(**inputs).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    queries, targets = model.queries.detach().clone(), torch.rand(3, 3, 8, 8) * 2 - 1
    for _ in range(3):
        model(PROMPTS, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.queries, queries)
    assert all(torch.equal(v, before[k]) for k, v in model.mllm.state_dict().items())
    assert torch.equal(model.mllm(**inputs).logits, logits)
    assert all(p.grad is None for p in model.mllm.parameters())


@pytest.mark.parametrize(
    "design, layers, millions",
    [("proj-enc", 6, 517), ("proj-enc", 24, 2046), ("enc-proj", 6, 84), ("enc-proj", 24, 316)],
)
def test_table_3(design, layers, millions):
    """The connector's parameter counts of Table 3, d = 896, c = 2304."""
    with torch.device("meta"):
        connector = Connector(896, 2304, layers, design)
    count = sum(p.numel() for p in connector.parameters())
    assert abs(count / 1e6 - millions) < 1, count


@pytest.mark.parametrize("design", ["enc-proj", "proj-enc"])
def test_connector_sees_both_ways_and_passes_over_padding(design):
    torch.manual_seed(0)
    connector = Connector(64, 128, 2, design, gain=5.5**0.5).double()
    x = torch.randn(2, 6, 64, dtype=torch.float64)
    made = connector(x)
    assert made.shape == (2, 6, 128)
    assert (connector.norm.weight.float() == torch.tensor(5.5**0.5)).all()
    changed = x.clone()
    changed[:, 5] += 1
    assert not torch.allclose(connector(changed)[:, 0], made[:, 0])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]] * 2)
    torch.testing.assert_close(connector(changed, mask)[:, :5], connector(x, mask)[:, :5])


def test_flow_loss_is_its_formula(build):
    """x_σ = (1 − σ)·x + σ·ε, timestep 1000·σ, target ε − x, mean squared error."""
    model = build(dtype=torch.float64)
    calls = recorded(model, lambda x: 0.25 * x)
    targets = torch.rand(3, 3, 8, 8, dtype=torch.float64) * 2 - 1
    z = model.vae.encode(targets).latent * 0.5
    noise, sigma = torch.randn_like(z), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    s = sigma.view(3, 1, 1, 1)
    x = (1 - s) * z + s * noise
    loss = model(PROMPTS, targets, noise=noise, u=1 - sigma)
    torch.testing.assert_close(loss, ((0.25 * x - (noise - z)) ** 2).mean(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(calls[0][1], 1000 * sigma)


def test_flow_sigma_is_uniform_on_its_interval(build):
    model = build("qwen")
    sigma = model.sigma_of(torch.rand(4000, generator=torch.Generator().manual_seed(0)))
    assert sigma.min() > 0 and sigma.max() <= 1
    assert abs(sigma.mean() - 0.5) < 0.02 and abs(sigma.var() - 1 / 12) < 0.01
    assert model.sigma_of(torch.tensor([0.0, 0.25])).tolist() == [1.0, 0.75]


def test_a_shift_of_sigma_is_its_formula(build):
    """s·σ / (1 + (s − 1)·σ): more high noise levels, the same ends."""
    model = build("qwen", sigma_shift=3.0)
    sigma = model.sigma_of(torch.tensor([0.0, 0.5, 0.75]))
    torch.testing.assert_close(sigma, torch.tensor([1.0, 1.5 / 2.0, 0.75 / 1.5]))


@pytest.mark.parametrize("name", ["sd", "sd-v"])
def test_diffusion_loss_is_its_formula(build, name):
    """x_t = √ᾱ·x + √(1 − ᾱ)·ε; target ε, or v = √ᾱ·ε − √(1 − ᾱ)·x where the config says so."""
    model = build("qwen", name, dtype=torch.float64)
    calls = recorded(model, lambda x: 0.5 * x)
    targets = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    z = model.vae.encode(targets).latent_dist.mode() * model.vae.config.scaling_factor
    noise, timestep = torch.randn_like(z), torch.tensor([0, 700])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = torch.cumprod(1 - betas, 0)[timestep].view(2, 1, 1, 1)
    x = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
    target = noise if name == "sd" else alpha.sqrt() * noise - (1 - alpha).sqrt() * z
    u = 1 - (timestep + 1) / 1000  # timestep t is σ = (t + 1) / 1000
    loss = model(PROMPTS[:2], targets, noise=noise, u=u)
    torch.testing.assert_close(loss, ((0.5 * x - target) ** 2).mean(), atol=1e-5, rtol=1e-5)
    assert torch.equal(calls[0][1], timestep)


@pytest.mark.parametrize("mllm, diffusion", [("llava", "sana"), ("qwen", "sd"), ("qwen", "sana")])
@pytest.mark.parametrize("condition_on", ["queries", "random", "last_layer"])
def test_every_condition_trains_and_draws(build, mllm, diffusion, condition_on):
    model = build(mllm, diffusion, condition_on=condition_on)
    made, mask = model.encode_prompts(PROMPTS)
    if condition_on == "last_layer":
        assert made.shape[:2] == mask.shape and mask.sum(1)[0] > mask.sum(1)[2]
    else:
        assert made.shape == (3, 5, 64) and mask is None
    model(PROMPTS, torch.zeros(3, 3, 8, 8)).backward()
    assert (model.queries.grad is not None) == (condition_on == "queries")
    assert model.connector.norm.weight.grad.abs().sum() > 0
    assert model.generate(PROMPTS[:1], num_inference_steps=2)[0].size == (8, 8)


def test_trained_mllm_gets_gradients_through_both_passes(build):
    model = build(train_mllm=True)
    model(PROMPTS, torch.zeros(3, 3, 8, 8)).backward()
    assert model.mllm.get_input_embeddings().weight.grad.abs().sum() > 0


def by_hand(model, prompts, g, negative, steps, seed):
    """Guided sampling written out with diffusers' scheduler, one branch at a time."""
    text, empty = (
        model.encode_prompts(prompts)[0],
        model.encode_prompts([negative] * len(prompts))[0],
    )
    scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(steps)
    side, channels = model.diffusion.config.sample_size, model.diffusion.config.in_channels
    x = torch.randn(
        len(prompts), channels, side, side, generator=torch.Generator().manual_seed(seed)
    )
    for t in scheduler.timesteps:
        v, free = (model.denoise(x, t.expand(len(x)), c, None) for c in (text, empty))
        x = scheduler.step(free + g * (v - free), t, x).prev_sample
    return model.decode_latents(x)


@pytest.mark.parametrize("diffusion", ["sana", "sd"])
@pytest.mark.parametrize("g, negative", [(3.0, ""), (0.5, "a red star"), (1.0, "")])
def test_guidance_is_its_formula(build, diffusion, g, negative):
    model = build("qwen", diffusion)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        made = model.generate(
            PROMPTS, None, negative, num_inference_steps=4, guidance_scale=g, generator=generator
        )
        expected = by_hand(model, PROMPTS, g, negative, 4, 7)
    for one, other in zip(made, expected, strict=True):
        difference = pixels(one).int() - pixels(other).int()
        assert difference.abs().max() <= 1


def test_guidance_of_one_runs_a_single_branch(build):
    """g = 1 is no guidance: the negative prompt changes nothing and costs nothing."""
    model = build("qwen")
    calls = recorded(model, lambda x: 0.5 * x)
    model.generate(PROMPTS, negative_prompt="a star", guidance_scale=1.0, num_inference_steps=2)
    assert all(len(x) == len(PROMPTS) for x, *_ in calls)


def test_conditions_are_computed_once(build):
    """Once per prompt: not once per step nor per picture."""
    model = build("qwen")
    asked, plain = [], model.encode_prompts
    model.encode_prompts = lambda prompts, *rest: (
        asked.append(len(prompts)) or plain(prompts, *rest)
    )
    pictures = model.generate(PROMPTS, num_images_per_prompt=4, num_inference_steps=3)
    assert len(pictures) == 12 and asked == [6]


@pytest.mark.parametrize("train_diffusion", [True, False])
def test_saved_and_loaded_model_draws_the_same(build, tmp_path, train_diffusion):
    model = build(train_diffusion=train_diffusion)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    model.save_pretrained(tmp_path / "saved")
    again = MetaQuery.from_pretrained(tmp_path / "saved")
    first, second = (
        m.generate(PROMPTS, num_inference_steps=3, generator=torch.Generator().manual_seed(3))
        for m in (model, again)
    )
    assert [p.tobytes() for p in first] == [p.tobytes() for p in second]
    names = set(model.trained_state_dict())
    assert not any(name.startswith(("mllm.", "vae.")) for name in names)
    assert any(name.startswith("diffusion.") for name in names) == train_diffusion


def test_a_trained_diffusion_model_that_is_frozen_later_is_saved_again(build, tmp_path):
    model = build()
    with torch.no_grad():
        for parameter in model.diffusion.parameters():
            parameter += 0.01
    model.save_pretrained(tmp_path / "one")
    frozen = MetaQuery.from_pretrained(tmp_path / "one", train_diffusion=False)
    frozen.save_pretrained(tmp_path / "two")
    again = MetaQuery.from_pretrained(tmp_path / "two")
    for name, weight in model.diffusion.state_dict().items():
        assert torch.equal(weight, again.diffusion.state_dict()[name]), name


def test_folders_inside_a_checkpoint_move_with_it(build, parts, tmp_path):
    """Relative folders resolve beside the checkpoint, so that it can be moved whole."""
    shutil.copytree(parts / "qwen", tmp_path / "one" / "mllm")
    config = MetaQueryConfig(
        str(tmp_path / "one" / "mllm"), str(parts / "sana"), 4, connector_layers=1
    )
    MetaQuery.from_config(config).save_pretrained(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert MetaQuery.from_pretrained(tmp_path / "two").config.mllm == str(tmp_path / "two" / "mllm")


def test_prompt_holds_the_system_prompt_and_ends_where_the_mllm_would_speak(build):
    model = build()
    ids = model.format(["a red star"])["input_ids"][0]
    text = model.processor.tokenizer.decode(ids)
    assert (
        text.startswith("<|im_start|>system\n" + SYSTEM_PROMPT.lower()[:8])
        or SYSTEM_PROMPT[:8] in text
    )
    assert text.endswith("a red star<|im_end|>\n<|im_start|>assistant\n")


def test_long_prompt_is_cut_with_a_warning(build):
    model = build("qwen")
    with pytest.warns(UserWarning, match="256"):
        long = model.format(["star " * 400])["input_ids"].shape[1]
    assert 256 <= long - model.format([""])["input_ids"].shape[1] <= 258


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"connector": "mlp"}, "enc-proj"),
        ({"condition_on": "clip"}, "last_layer"),
        ({"num_queries": 0}, "num_queries is 0"),
        ({"connector_layers": float("nan")}, "connector_layers is nan"),
    ],
)
def test_wrong_config_says_what_is_right(changes, words):
    with pytest.raises(InputError, match=words):
        MetaQueryConfig.preset("tiny", **changes)


ALONE = """
import sys, torch
from metaquery import MetaQuery, MetaQueryConfig
config = MetaQueryConfig(sys.argv[1], sys.argv[2], num_queries=4, connector_layers=1)
model = MetaQuery.from_config(config)
loss = model(["a red star"], torch.zeros(1, 3, 8, 8))
loss.backward()
assert model.queries.grad.abs().sum() > 0
assert model.generate(["a red star"], num_inference_steps=2)[0].size == (8, 8)
ours = ("cli", "data", "toy", "training")
print(sorted(name for name in sys.modules if name.split(".")[0] in ours))
"""


def test_the_file_alone_is_metaquery(parts, tmp_path):
    """Copied into an empty folder, it is imported there, makes a loss and draws."""
    shutil.copy(ROOT / "metaquery.py", tmp_path)
    command = [sys.executable, "-c", ALONE, str(parts / "llava"), str(parts / "sana")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_an_empty_prompt_keeps_its_text_part(build):
    """The template's line break between picture and text is there although the text is empty."""
    model = build("llava")
    picture = noise_image(16, 16)
    ids = model.format([""], [[picture]])["input_ids"][0]
    assert "<image>\n<|im_end|>" in model.tokenizer.decode(ids)


def test_one_prompt_may_be_a_string(build):
    model = build("qwen")
    assert torch.equal(model.encode_prompts("a star")[0], model.encode_prompts(["a star"])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train_diffusion", [False, True])
@pytest.mark.parametrize("train_mllm", [False, True])
@pytest.mark.parametrize("diffusion", ["sana", "sd"])
def test_every_mix_of_dtypes_trains_and_draws(parts, diffusion, train_mllm, train_diffusion, dtype):
    """Frozen parts in `dtype`, trained ones in float32, without autocast."""
    folders = str(parts / "llava"), str(parts / diffusion)
    trained = {"train_mllm": train_mllm, "train_diffusion": train_diffusion}
    config = MetaQueryConfig(*folders, num_queries=4, connector_layers=1, **trained)
    model = MetaQuery.from_config(config, dtype)
    images = [[noise_image(20, 16)]]
    assert model.generate(["a star"], images, num_inference_steps=2)[0].size == (8, 8)
    model(["a star"], torch.zeros(1, 3, 8, 8), images).backward()
    assert model.queries.grad.isfinite().all()


def test_an_offloaded_model_generates_the_same(build, monkeypatch):
    """Its parts visit the device in turn, one at a time: the largest decides, not the sum."""
    model = build("llava")
    images = [[noise_image(16, 16)]]

    def generated():
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 2, "generator": generator}
        return model.generate(["a star"], images, **options)[0].tobytes()

    expected, answer = generated(), model.answer("a star", images[0], max_new_tokens=3)
    moves = []
    for name in ("mllm", "connector", "diffusion", "vae"):
        part = getattr(model, name)
        plain = part.to

        def to(device, name=name, plain=plain):
            moves.append((name, str(device)))
            return plain("cpu")

        monkeypatch.setattr(part, "to", to)
    model.offload_to("cpu")
    model.queries.data = model.queries.data.to("cpu")
    assert generated() == expected
    assert [name for name, _ in moves] == [
        name for name in ("mllm", "connector", "diffusion", "vae") for _ in ("there", "back")
    ]
    assert model.answer("a star", images[0], max_new_tokens=3) == answer


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"targets": torch.zeros(2, 3, 8, 8)}, r"of shape \(1, 3, 8, 8\)"),
        ({"targets": torch.zeros(1, 3, 16, 16)}, r"of shape \(1, 3, 8, 8\)"),
        ({"targets": torch.zeros(1, 3, 8, 8).byte()}, "floats"),
        ({"targets": torch.zeros(1, 3, 8, 8).numpy()}, "floats"),
        ({"targets": torch.zeros(1, 3, 8, 8), "u": torch.rand(0)}, "u and noise"),
        ({"targets": torch.zeros(1, 3, 8, 8), "u": torch.rand(2), "noise": torch.zeros(1)}, "no"),
    ],
)
def test_targets_that_do_not_fit_are_refused(build, arguments, words):
    with pytest.raises(InputError, match=words):
        build()("a star", **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": None}, {"prompts": []}, {"prompts": [3]}, {"images": "a.png"},
        {"num_inference_steps": 0}, {"num_inference_steps": 2.5}, {"num_inference_steps": "3"},
        {"num_images_per_prompt": 0}, {"num_images_per_prompt": 1.5}, {"guidance_scale": "3"},
        {"guidance_scale": float("nan")}, {"negative_prompt": ["a", "b"]}, {"negative_prompt": 3},
        {"height": 8.0}, {"width": 0},
    ],
)  # fmt: skip
def test_bad_arguments_of_generate_are_refused(build, arguments):
    with pytest.raises(InputError):
        build().generate(**({"prompts": "a star", "num_inference_steps": 1} | arguments))


@pytest.mark.parametrize(
    "part, changes, words",
    [
        ("sd/unet", {"in_channels": 9}, "of 9 input channels"),
        ("sd/unet", {"addition_embed_type": "text_time"}, "with addition_embed_type"),
        ("sana/transformer", {"guidance_embeds": True}, "with guidance_embeds"),
        ("sana/transformer", {"_class_name": "FluxTransformer2DModel"}, "is a Flux"),
        ("llava", {"model_type": "llava"}, "is of type llava"),
    ],
)
def test_parts_that_cannot_work_are_refused(parts, tmp_path, part, changes, words):
    name = part.split("/")[0]
    shutil.copytree(parts / name, tmp_path / name)
    path = tmp_path / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    names = {"llava": parts / "llava", "sana": parts / "sana", name: tmp_path / name}
    diffusion = name if name != "llava" else "sana"
    with pytest.raises(InputError, match=words):
        MetaQuery.from_config(MetaQueryConfig(str(names["llava"]), str(names[diffusion])))


def test_a_template_without_a_system_role(build):
    """Gemma's raises an exception: the user's turn begins with the system text."""
    format = build().format
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    format.processor.chat_template = refuse + format.processor.chat_template
    format.__dict__.pop("takes_system", None)
    text = format.tokenizer.decode(format(["a star"])["input_ids"][0])
    assert text.index(SYSTEM_PROMPT.lower()) < text.index("a star")  # a tokenizer of lower case
    assert "<|im_start|>system" not in text
