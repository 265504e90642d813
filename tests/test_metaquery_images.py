"""Images in: two passes are one, guidance is its formula, answers are the untouched MLLM's."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import noise_image, pixels, recorded
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoModelForImageTextToText, AutoProcessor

from metaquery import InputError, black_like, drop_conditions, resize_and_crop
from notebooks.plain import one_pass

BACKBONES = ["llava", "qwen-vl", "internvl"]
PROMPTS = ["a red star left of a blue circle", "a star", "", "a blue circle"]


def some_images():
    """Per prompt one, several and no images, of several sizes."""
    return [
        [noise_image(20, 16)],
        [noise_image(16, 16, 1), noise_image(30, 10, 2), noise_image(9, 40, 3)],
        [],
        [noise_image(5, 5, 4), noise_image(40, 12, 5)],
    ]


@pytest.mark.parametrize("mllm", BACKBONES)
@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 3], [0, 1, 2, 3]])
def test_two_passes_equal_one_pass_with_images(build, mllm, rows):
    """One, several, none and mixed in a batch: same conditions and query gradients in float64."""
    model = build(mllm, dtype=torch.float64)
    prompts, images = [PROMPTS[row] for row in rows], [some_images()[row] for row in rows]
    two = model.encode_prompts(prompts, images)[0]
    one = model.connector(one_pass(model, model.format(prompts, images)))
    weights = torch.randn_like(two)
    gradients = [torch.autograd.grad((made * weights).sum(), model.queries) for made in (two, one)]
    torch.testing.assert_close(two, one, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("mllm", BACKBONES)
def test_a_batch_changes_nothing_for_its_images(build, mllm):
    model, images = build(mllm, dtype=torch.float64), some_images()
    together = model.encode_prompts(PROMPTS, images)[0]
    for row, prompt in enumerate(PROMPTS):
        alone = model.encode_prompts([prompt], [images[row]])[0][0]
        torch.testing.assert_close(alone, together[row], atol=1e-10, rtol=1e-9)
    images[0] = [noise_image(20, 16, 9)]
    changed = model.encode_prompts(PROMPTS, images)[0]
    assert not torch.allclose(changed[0], together[0]) and torch.equal(changed[2], together[2])


@pytest.mark.parametrize(
    "stage, prompt, rates",
    [
        ("pretrain", "a star", {(None, 0): 0.1, ("a star", 0): 0.9}),
        ("reconstruct", "", {("", "black"): 0.1, ("", "seen"): 0.9}),
        ("mix", "", {("", "black"): 0.1, ("", "seen"): 0.9}),
        ("edit", "a star", {("a star", "black"): 0.1, ("a star", "seen"): 0.9}),
        (
            "instruct",
            "a star",
            {
                (None, "seen"): 0.1,
                (None, "black"): 0.1,
                ("a star", "black"): 0.1,
                ("a star", "seen"): 0.7,
            },
        ),
    ],
)
def test_conditions_are_dropped_at_their_rates(stage, prompt, rates):
    seen = [noise_image(3, 5), noise_image(7, 2)] if "pretrain" != stage else []
    found, number = Counter(), 20000
    for i in range(number):
        text, images = drop_conditions(prompt, seen, (i + 0.5) / number, stage)
        assert [p.size for p in images] == [p.size for p in seen], "black images keep their size"
        dark = [not np.asarray(p).any() for p in images]
        assert len(set(dark)) < 2, "images of one prompt are dropped together"
        found[text, ("black" if any(dark) else "seen") if seen else 0] += 1 / number
    assert found == pytest.approx(rates, abs=1e-3)


def by_hand(model, prompts, images, g, g_img, negative, steps, seed):
    """v(neg, black) + g_img·(v(neg, pic) − v(neg, black)) + g·(v(text, pic) − v(neg, pic))."""
    dark = [[Image.new("RGB", p.size) for p in row] for row in images]
    branches = [(prompts, images), ([negative] * len(prompts), images)]
    branches.append((branches[1][0], dark))
    text, image, nothing = (model.encode_prompts(*branch)[0] for branch in branches)
    scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(steps)
    side, channels = model.diffusion.config.sample_size, model.diffusion.config.in_channels
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), channels, side, side, generator=generator)
    for t in scheduler.timesteps:
        v, seen, unseen = (
            model.denoise(x, t.expand(len(x)), c, None) for c in (text, image, nothing)
        )
        guided = unseen + g_img * (seen - unseen) if g_img > 1 else seen
        x = scheduler.step(guided + g * (v - seen), t, x).prev_sample
    return model.decode_latents(x)


@pytest.mark.parametrize("g, g_img", [(3.0, 1.5), (1.0, 2.0), (3.0, 1.0), (2.0, 0.0), (1.0, 1.0)])
@torch.no_grad()
def test_three_branch_guidance_is_its_formula(build, g, g_img):
    """g_img ≤ 1 drops the first branch."""
    model, generator = build("llava"), torch.Generator().manual_seed(7)
    options = {"guidance_scale": g, "image_guidance_scale": g_img, "generator": generator}
    made = model.generate(PROMPTS, some_images(), "a star", num_inference_steps=4, **options)
    expected = by_hand(model, PROMPTS, some_images(), g, g_img, "a star", 4, 7)
    for one, other in zip(made, expected, strict=True):
        assert (pixels(one).int() - pixels(other).int()).abs().max() <= 1


def test_image_guidance_is_the_checkpoints_unless_given(build):
    model = build("llava")
    model.generation_config["image_guidance_scale"] = 4.0
    drawn = []
    for given in ({}, {"image_guidance_scale": 4.0}, {"image_guidance_scale": 1.5}):
        given |= {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 4}
        drawn.append(
            np.stack([np.asarray(p) for p in model.generate(PROMPTS, some_images(), **given)])
        )
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


@pytest.mark.parametrize("g, g_img, branches", [(3, 1.5, 3), (3, 1, 2), (1, 1, 1), (1, 1.5, 3)])
def test_no_branch_is_run_in_vain(build, g, g_img, branches):
    model = build("llava")
    calls = recorded(model, lambda x: 0.5 * x)
    options = {"guidance_scale": g, "image_guidance_scale": g_img, "num_images_per_prompt": 2}
    made = model.generate(PROMPTS, some_images(), num_inference_steps=2, **options)
    assert len(made) == 8 and {len(x) for x, *_ in calls} == {8 * branches}


def test_black_images_keep_their_size():
    dark = [black_like(row) for row in some_images()]
    assert [[p.size for p in row] for row in dark] == [[p.size for p in r] for r in some_images()]
    assert not any(np.asarray(p).any() for row in dark for p in row)


@pytest.mark.parametrize("mllm", BACKBONES)
def test_answers_are_the_untouched_mllms(build, parts, mllm):
    """The same text as the MLLM loaded alone gives, before and after training steps."""
    model, images = build(mllm), some_images()[1]
    processor = AutoProcessor.from_pretrained(parts / mllm)
    alone = AutoModelForImageTextToText.from_pretrained(parts / mllm).eval()
    text = processor.apply_chat_template(
        model.format.chat("a star", 3, None), add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[images], return_tensors="pt")
    made = alone.generate(**inputs, max_new_tokens=12, do_sample=False)
    made = made[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(made, skip_special_tokens=True)[0].strip()
    assert model.answer("a star", images, max_new_tokens=12) == expected
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    model.train()(["a star"], torch.zeros(1, 3, 8, 8), [images]).backward()
    optimizer.step()
    assert model.eval().answer("a star", images, max_new_tokens=12) == expected


@pytest.mark.parametrize("mllm", BACKBONES)
@pytest.mark.parametrize("size", [(1, 1), (5000, 20), (20, 5000)])
def test_odd_sizes_are_drawn_from(build, mllm, size):
    model = build(mllm)
    made = model.generate(["a star"], [[noise_image(*size)]], num_inference_steps=2)
    assert made[0].size == (8, 8)


def test_a_text_only_backbone_names_those_that_see(build):
    with pytest.raises(InputError, match="choose one that takes images"):
        build("qwen").generate(["a star"], [[noise_image(4, 4)]])
    with pytest.raises(InputError, match="at most 6"):
        build("llava").encode_prompts(["a star"], [[noise_image(4, 4)] * 7])


@pytest.mark.parametrize("size", [(300, 420), (380, 421), (420, 333), (16, 16), (7, 90)])
def test_images_are_resized_before_they_are_cut(size):
    """torchvision's Resize of the short side, then CenterCrop, as the authors' code has them."""
    image = noise_image(*size)
    expected = v2.Compose([v2.Resize(64), v2.CenterCrop(64)])(image)
    assert np.array_equal(np.asarray(resize_and_crop(image, 64)), np.asarray(expected))
