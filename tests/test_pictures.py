"""Pictures in: two passes are one, guidance is its formula, answers are the untouched MLLM's."""

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from test_metaquery import pixels, recorded
from test_sample import check_refused, cli
from torch.func import functional_call
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.pictures import black, rgb
from data.shapes import (
    EDITS,
    PICTURE_KINDS,
    Scene,
    edit_score,
    render,
    sample,
    satisfies,
    score,
    unseen_question,
)
from data.sources import Shapes, collate
from data.stages import STAGES, dropped
from metaquery import InputError, conversation

BACKBONES = ["llava", "qwen-vl"]
PROMPTS = ["a red star left of a blue circle", "a star", "", "a blue circle"]


def noise_picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def some_pictures():
    """Per prompt one, several and no pictures, of several sizes."""
    return [
        [noise_picture(20, 16)],
        [noise_picture(16, 16, 1), noise_picture(30, 10, 2), noise_picture(9, 40, 3)],
        [],
        [noise_picture(5, 5, 4), noise_picture(40, 12, 5)],
    ]


def one_pass(model, prompts, images):
    """Last states at the queries, from the backbone's own single forward over words and queries.

    The queries stand in the embedding table in place of tokens that no prompt has, so positions,
    masks and pictures are all the backbone's own doing.
    """
    inputs, n = dict(model.prepare(prompts, images)), model.config.num_queries
    table = model.mllm.get_input_embeddings().weight
    unused = [i for i in range(len(table)) if i not in inputs["input_ids"]][-n:]
    tokens = torch.tensor(unused).expand(len(prompts), n)
    table = table.detach().index_put((tokens[0],), model.queries)
    extended = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    extended["mm_token_type_ids"] = torch.zeros_like(tokens)
    for name in inputs.keys() & extended.keys():
        inputs[name] = torch.cat([inputs[name], extended[name]], 1)
    if "image_grid_thw" not in inputs:  # by default the padding is counted, exact but for rounding
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    weights = {"language_model.embed_tokens.weight": table}
    made = functional_call(model.mllm.base_model, weights, kwargs=inputs | {"use_cache": False})
    return made.last_hidden_state[:, -n:]


@pytest.mark.parametrize("mllm", BACKBONES)
@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 3], [0, 1, 2, 3]])
def test_two_passes_equal_one_pass_with_pictures(build, mllm, rows):
    """One, several, none and mixed in a batch: same conditions and query gradients in float64."""
    model = build(mllm, dtype=torch.float64)
    prompts, images = [PROMPTS[row] for row in rows], [some_pictures()[row] for row in rows]
    two = model.condition(prompts, images)[0]
    one = model.connector(one_pass(model, prompts, images))
    weights = torch.randn_like(two)
    gradients = [torch.autograd.grad((made * weights).sum(), model.queries) for made in (two, one)]
    torch.testing.assert_close(two, one, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("mllm", BACKBONES)
def test_a_batch_changes_nothing_for_its_pictures(build, mllm):
    model, images = build(mllm, dtype=torch.float64), some_pictures()
    together = model.condition(PROMPTS, images)[0]
    for row, prompt in enumerate(PROMPTS):
        alone = model.condition([prompt], [images[row]])[0][0]
        torch.testing.assert_close(alone, together[row], atol=1e-10, rtol=1e-9)
    images[0] = [noise_picture(20, 16, 9)]
    changed = model.condition(PROMPTS, images)[0]
    assert not torch.allclose(changed[0], together[0]) and torch.equal(changed[2], together[2])


@pytest.mark.parametrize(
    "stage, prompt, rates",
    [
        ("pretrain", "a star", {("", 0): 0.1, ("a star", 0): 0.9}),
        ("reconstruct", "", {("", "black"): 0.1, ("", "seen"): 0.9}),
        ("mix", "", {("", "black"): 0.1, ("", "seen"): 0.9}),
        ("edit", "a star", {("a star", "black"): 0.1, ("a star", "seen"): 0.9}),
        ("instruct", "a star", {("", "seen"): 0.1, ("", "black"): 0.1, ("a star", "black"): 0.1,
                                ("a star", "seen"): 0.7}),
    ],
)  # fmt: skip
def test_conditions_are_dropped_at_their_rates(stage, prompt, rates):
    seen = [noise_picture(3, 5), noise_picture(7, 2)] if "pretrain" != stage else []
    found, number = Counter(), 20000
    for i in range(number):
        text, images = dropped(stage, prompt, seen, (i + 0.5) / number)
        assert [p.size for p in images] == [p.size for p in seen], "black pictures keep their size"
        dark = [not np.asarray(p).any() for p in images]
        assert len(set(dark)) < 2, "pictures of one prompt are dropped together"
        found[text, ("black" if any(dark) else "seen") if seen else 0] += 1 / number
    assert found == pytest.approx(rates, abs=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_yield_their_kinds(stage):
    """Different counts of pictures in one batch; the same index is the same sample."""
    data = Shapes(STAGES[stage], 0)
    prompts, images, targets, *_ = collate([data[i] for i in range(64)], 64)
    assert targets.shape == (64, 3, 64, 64) and targets.min() >= -1 and targets.max() <= 1
    counts = {len(row) for row in images}
    expected = {"pretrain": {0}, "mix": {0, 1}, "instruct": {0, 1, 2}}.get(stage, {1})
    assert expected <= counts <= expected | ({3} if stage == "instruct" else set())
    assert torch.equal(collate([data[5]], 64)[2][0], targets[5]) and data[5][0] == prompts[5]
    if stage in ("reconstruct", "mix"):
        assert all(not prompt for prompt, row in zip(prompts, images, strict=True) if row)


def by_hand(model, prompts, images, g, g_img, negative, steps, seed):
    """v(neg, black) + g_img·(v(neg, pic) − v(neg, black)) + g·(v(text, pic) − v(neg, pic))."""
    dark = [[Image.new("RGB", p.size) for p in row] for row in images]
    branches = [(prompts, images), ([negative] * len(prompts), images)]
    branches.append((branches[1][0], dark))
    text, picture, nothing = (model.condition(*branch)[0] for branch in branches)
    scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(steps)
    side, channels = model.diffusion.config.sample_size, model.diffusion.config.in_channels
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), channels, side, side, generator=generator)
    for t in scheduler.timesteps:
        v, seen, unseen = (
            model.denoise(x, t.expand(len(x)), c, None) for c in (text, picture, nothing)
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
    made = model.generate(PROMPTS, some_pictures(), "a star", num_inference_steps=4, **options)
    expected = by_hand(model, PROMPTS, some_pictures(), g, g_img, "a star", 4, 7)
    for one, other in zip(made, expected, strict=True):
        assert (pixels(one).int() - pixels(other).int()).abs().max() <= 1


@pytest.mark.parametrize("g, g_img, branches", [(3, 1.5, 3), (3, 1, 2), (1, 1, 1), (1, 1.5, 3)])
def test_no_branch_is_run_in_vain(build, g, g_img, branches):
    model = build("llava")
    calls = recorded(model, lambda x: 0.5 * x)
    options = {"guidance_scale": g, "image_guidance_scale": g_img, "num_images_per_prompt": 2}
    made = model.generate(PROMPTS, some_pictures(), num_inference_steps=2, **options)
    assert len(made) == 8 and {len(x) for x, *_ in calls} == {8 * branches}


def test_black_pictures_keep_their_size():
    dark = black(some_pictures())
    assert [[p.size for p in row] for row in dark] == [[p.size for p in r] for r in some_pictures()]
    assert not any(np.asarray(p).any() for row in dark for p in row)


@pytest.mark.parametrize("mllm", BACKBONES)
def test_answers_are_the_untouched_mllms(build, parts, mllm):
    """The same text as the MLLM loaded alone gives, before and after training steps."""
    model, images = build(mllm), some_pictures()[1]
    processor = AutoProcessor.from_pretrained(parts / mllm)
    alone = AutoModelForImageTextToText.from_pretrained(parts / mllm).eval()
    text = processor.apply_chat_template(
        conversation("a star", 3, None, True), add_generation_prompt=True
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


def test_interleaved_output_is_text_then_a_picture(build):
    text, picture = build("llava").interleave("a star", [noise_picture(9, 9)], 4,
                                              num_inference_steps=2)  # fmt: skip
    assert isinstance(text, str) and picture.size == (8, 8)


def saved(folder, mode):
    """A file with a red square on white, in some mode, and how it should look."""
    right = Image.new("RGB", (40, 30), "white")
    right.paste((220, 20, 20), (5, 5, 20, 20))
    path, options, picture = folder / f"{mode}.png", {}, right
    if mode == "palette":
        picture = right.quantize(4)
    elif mode == "grey":
        right = picture = right.convert("L")
    elif mode == "grey with alpha":
        right = right.convert("L")
        picture = right.convert("LA")
    elif mode == "16 bit":
        right = right.convert("L")
        picture = Image.fromarray(np.asarray(right).astype(np.uint16) * 257)
    elif mode == "transparent":
        picture = right.convert("RGBA")
        clear = np.asarray(picture).copy()
        clear[(clear[..., :3] == 255).all(-1)] = (9, 99, 9, 0)
        picture = Image.fromarray(clear)
    elif mode == "exif":
        path, picture = folder / "exif.png", right.rotate(90, expand=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        options["exif"] = exif
    elif mode == "black and white":
        right = picture = right.convert("1")
    elif mode == "CMYK":
        path, picture = folder / "cmyk.tiff", right.convert("CMYK")
    picture.save(path, **options)
    return path, right.convert("RGB")


MODES = ("rgb", "palette", "grey", "grey with alpha", "16 bit", "transparent", "exif",
         "black and white", "CMYK")  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_picture_is_seen_as_it_looks(tmp_path, mode):
    path, right = saved(tmp_path, mode)
    seen = rgb(Image.open(path))
    assert seen.mode == "RGB" and seen.size == right.size
    assert np.abs(np.asarray(seen, int) - np.asarray(right, int)).max() <= 3


@pytest.mark.parametrize("mllm", BACKBONES)
@pytest.mark.parametrize("size", [(1, 1), (5000, 20), (20, 5000)])
def test_odd_sizes_are_drawn_from(build, mllm, size):
    model = build(mllm)
    made = model.generate(["a star"], [[noise_picture(*size)]], num_inference_steps=2)
    assert made[0].size == (8, 8)


def test_a_text_only_backbone_names_those_that_see(build):
    with pytest.raises(InputError, match="LLaVA-OneVision or Qwen2.5-VL"):
        build("qwen").generate(["a star"], [[noise_picture(4, 4)]])
    with pytest.raises(InputError, match="at most 6"):
        build("llava").condition(["a star"], [[noise_picture(4, 4)] * 7])


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_picture_kinds_are_scored_exactly(kind):
    """Right pictures pass and those of other samples of the kind do not."""
    made = [sample(kind, i, split="test") for i in range(60)]
    assert sum(score(s.picture, s.want) for s in made) >= 0.99 * len(made)
    wrong = [
        score(render(made[i - 1].target), s.want)
        for i, s in enumerate(made)
        if not satisfies(made[i - 1].target, s.want)
    ]
    assert len(wrong) > 40 and not any(wrong)
    for s in made:
        assert 1 <= len(s.sources) <= 3 and (kind == "reconstruction") == (not s.prompt)
        if "subject" in kind:
            subject = s.sources[0].objects[0]
            assert subject.color not in s.prompt or subject.shape not in s.prompt


def test_edits_are_of_every_kind_and_change_something():
    made = [sample("edit", i) for i in range(300)]
    assert all(s.sources[0] != s.target for s in made)
    assert len({s.prompt.split()[0] for s in made}) >= 12 and len(EDITS) == 7


def test_edit_score_tells_change_from_what_is_kept():
    made = [sample("edit", i, split="test") for i in range(60)]
    for s in made:
        assert edit_score(s.picture, s) == (True, True)
        changed, kept = edit_score(s.images[0], s)
        assert not changed and kept, (s.prompt, "the untouched picture keeps all, changes nothing")
    loses = [s for s in made if set(s.target.objects) & set(s.sources[0].objects)]
    assert loses
    for s in loses:
        new = [o for o in s.target.objects if o not in s.sources[0].objects]
        if new:
            broken = render(Scene(tuple(new), s.target.background))
            assert edit_score(broken, s)[1] is False


def test_questions_have_answers():
    asked = [unseen_question(i) for i in range(300)]
    assert all(t.user and t.assistant and len(t.images) == 1 for t in asked)
    assert {"how", "what", "where", "is"} <= {t.user.split()[0] for t in asked}
    assert asked[7] == unseen_question(7)


def test_edits_subjects_and_answers_on_the_command_line(tmp_path):
    render(sample("edit", 0).sources[0]).save(tmp_path / "a.png")
    Image.new("L", (90, 50), 128).save(tmp_path / "b.png")
    a, b, out = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "made.png"
    few = ("--steps", 2, "--out", out)
    for flags in (["make it green", "--image", a], ["both objects", "--image", a, "--image", b],
                  ["--image", a, "--num-images", 4, "--image-guidance", 1]):  # fmt: skip
        done = cli(*flags, *few)
        assert done.returncode == 0, done.stderr
        assert out.exists()
        out.unlink()
    done = cli("how many objects?", "--image", a, "--ask")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_one_bad_picture_of_many_loses_nothing(tmp_path):
    """The rest are drawn, the bad ones named, and the exit code is 2."""
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    rows = ['{"prompt": "make it blue", "images": ["a.png"]}'] * 10
    rows[6] = '{"prompt": "make it blue", "images": ["broken.png"]}'
    rows[8] = '{"prompt": '
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    done = cli("--prompts", tmp_path / "p.jsonl", "--steps", 2, "--out", tmp_path / "made")
    check_refused(done, "broken.png")
    assert "prompt 7" in done.stderr and "line 9" in done.stderr
    names = [path.name for path in sorted((tmp_path / "made").iterdir())]
    assert names == [f"{i:05d}.png" for i in range(10) if i not in (6, 8)]


def bomb(path):
    """A PNG of a few bytes that says it is 60,000 pixels a side."""
    import struct
    import zlib

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.mark.parametrize(
    "what, words",
    [("missing", "no picture"), ("truncated", "broken"), ("text", "not a picture"),
     ("bomb", "million pixels"), ("many", "at most 6"), ("folder", "f.png")],
)  # fmt: skip
def test_bad_pictures_are_one_line(tmp_path, what, words):
    path = tmp_path / "f.png"
    if what == "truncated":
        noise_picture(64, 64).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif what == "text":
        path.write_text("no picture at all")
    elif what == "bomb":
        bomb(path)
    elif what == "many":
        noise_picture(9, 9).save(path)
    elif what == "folder":
        path.mkdir()
    flags = ["--image", path] * (7 if what == "many" else 1)
    done = cli("make it green", *flags, "--out", tmp_path / "x.png")
    check_refused(done, words)
    assert not (tmp_path / "x.png").exists()


def test_asking_without_a_question_is_one_line(tmp_path):
    check_refused(cli("--ask", "--image", "a.png"), "question")
