"""Make the tiny world's frozen, "pre-trained" parts, each as its real counterpart was made.

    python data/pretrain.py --out weights/new        every part that is not there yet, in order

vae        a toy DC-AE (Sana's autoencoder), trained to redraw random scenes
vision     a toy SigLIP tower, taught what each patch shows; it is the MLLM's eye
llm        a toy Qwen2, trained to talk: of facts, of prompts, of pictures given to it as words
mllm       LLaVA-OneVision of the two: the projector learns those words, then all talk of pictures
diffusion  a toy Sana, conditioned on the last-layer embeddings of `llm`, as Sana is on Gemma's

Each part is saved in the hub's own layout, so that `from_pretrained(folder)` loads it like the
real one; vision/ and llm/ are steps on the way. About two hours on one core, less on two.
"""

import argparse
import json
import math
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from diffusers import __version__ as diffusers_version
from PIL import Image
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.pictures import grid
from data.shapes import (
    BACKGROUNDS,
    CAPTION_KINDS,
    COLORS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIX_KINDS,
    Talk,
    coverage,
    describe,
    place_of,
    question,
    random_scene,
    read,
    render,
    sample,
    score,
    talks,
)
from metaquery import SYSTEM_PROMPT, conversation

VISION_SIZE, VISION_PATCH = 60, 12


def pictures_to_tensor(pictures):
    """PIL pictures to (B, 3, H, W) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(name, modules, loss_of_step, steps, lr, out, evaluate=None, log_every=200):
    """Minimise `loss_of_step(step)`, with 5% warm-up and a cosine down to zero.

    Muon for the matrices of the transformers, AdamW for the rest: toy models learn to copy and to
    bind in about half the steps. Every 500 steps all is saved in `out/name.resume`, from which the
    next call goes on.
    """
    named = [item for module in modules for item in module.named_parameters()]
    parameters = [p for _, p in named if p.requires_grad]
    matrices = [p for n, p in named if p.requires_grad and p.ndim == 2 and "layers." in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    if matrices:
        options = {"weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(matrices, lr=lr, **options))
    saved, first, mean = out / f"{name}.resume", 0, None
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        for module, weights in zip(modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first = state["step"]
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=10)
    for step in bar:
        if step > first and step % 500 == 0:
            weights = [module.state_dict() for module in modules]
            state = {"step": step, "modules": weights}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, saved.with_suffix(".part"))
            saved.with_suffix(".part").rename(saved)
        warm = min(1.0, (step + 1) / (0.05 * steps))
        rate = lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            note = {"part": name, "step": step + 1, "loss": round(mean, 5)}
            if evaluate is not None and ((step + 1) % (5 * log_every) == 0 or step + 1 == steps):
                note |= evaluate()
            tqdm.write(json.dumps(note))
    saved.unlink(missing_ok=True)


def train_vae(out, steps):
    """A DC-AE: 64x64x3 to 8x8x8, plain L1 + L2."""
    channels = (32, 32, 64, 128)
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 2, 2, 2),
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
    ).to(memory_format=torch.channels_last)
    rng = random.Random("vae")

    def loss_of_step(step):
        scenes = [random_scene(rng, patterns=0.3, held_out=0.08) for _ in range(32)]
        pixels = pictures_to_tensor([render(scene) for scene in scenes])
        redrawn = vae(pixels.to(memory_format=torch.channels_last)).sample.float()
        return F.l1_loss(redrawn, pixels) + F.mse_loss(redrawn, pixels)

    @torch.no_grad()
    def evaluate():
        scenes = [random_scene(random.Random(f"test {i}"), 0.2, 0.08) for i in range(200)]
        latents = vae.encode(pictures_to_tensor([render(s) for s in scenes])).latent
        pixels = vae.decode(latents).sample.clamp(-1, 1)
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        redrawn = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        right = [same(scene, redraw) for scene, redraw in zip(scenes, redrawn, strict=True)]
        return {"readable": sum(right) / len(right)}

    fit("vae", [vae], loss_of_step, steps, 2e-3, out, evaluate)
    vae.to(torch.bfloat16).save_pretrained(out / "diffusion" / "vae")


def same(scene, array):
    """Whether a picture (H, W, 3) of uint8 reads as exactly the objects of `scene`."""
    seen, clear = read(Image.fromarray(array))
    what = [
        sorted(str((o.shape, o.color, o.pattern, o.inner)) for o in s.objects)
        for s in (scene, seen)
    ]
    return clear and what[0] == what[1] and seen.background == scene.background


SIDE = VISION_SIZE // VISION_PATCH


def centre_patches(scene):
    """The index of the 5x5 patches that holds each object's centre."""
    return [int(o.y * SIDE // 64) * SIDE + int(o.x * SIDE // 64) for o in scene.objects]


def patch_labels(scene):
    """What each patch shows: (25, 8) float: shape, color, inner, pattern, dx, dy, size, centre.

    0 stands for nothing in the first three; dx, dy and size, in units of 32 px, locate the object;
    the last is 1 at the one patch that holds an object's centre.
    """
    shares = [np.full(SIDE * SIDE, 0.06)]
    for item in scene.objects:
        alpha = torch.from_numpy(coverage(item.shape, item.x, item.y, item.size).copy())
        shares.append(F.adaptive_avg_pool2d(alpha[None, None], SIDE).flatten().numpy())
    labels, owners = np.zeros((SIDE * SIDE, 8), np.float32), np.argmax(shares, 0) - 1
    centres = (np.arange(SIDE) + 0.5) * 64 / SIDE
    points = np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)
    for number, item in enumerate(scene.objects):
        here = owners == number
        inner = 0 if item.inner is None else 1 + list(COLORS).index(item.inner)
        what = (1 + SHAPES.index(item.shape), 1 + list(COLORS).index(item.color), inner)
        labels[here, :4] = *what, PATTERNS.index(item.pattern)
        labels[here, 4:6] = ((item.x, item.y) - points[here]) / 32
        labels[here, 6] = item.size / 32
    labels[centre_patches(scene), 7] = 1
    return labels


PLACE_WORDS = ("top", "bottom", "left", "right", "centre")
INNER = tuple(f"{color}'" for color in COLORS)  # an object's second colour
EYE_WORDS = (*SHAPES, *COLORS, *INNER, *BACKGROUNDS, *PLACE_WORDS, "half", "core", "background")


def patch_words(scene):
    """The words for what each patch shows: (25, words + 3) float32, each row's words of norm 1.

    The patch at an object's centre names the object and its place, all others the background.
    The last three say how far (x, y) is from that place and the size from 28, in pixels / 8.
    """
    made = np.zeros((SIDE * SIDE, len(EYE_WORDS) + 3), np.float32)
    groups = [("background", scene.background)] * SIDE * SIDE
    for patch, item in zip(centre_patches(scene), scene.objects, strict=True):
        place = place_of(item)
        kind = {"plain": (), "halves": ("half",), "core": ("core",)}[item.pattern]
        second = (f"{item.inner}'",) * (item.inner is not None)
        groups[patch] = (item.color, item.shape, *kind, *second, *place.split())
        x, y = PLACES[place]
        made[patch, -3:] = (item.x - x) / 8, (item.y - y) / 8, (item.size - 28) / 8
    for row, group in zip(made, groups, strict=True):
        for word in group:
            row[EYE_WORDS.index(word)] += len(group) ** -0.5
    return made


def words_to_vectors(rows, embeddings, tokenizer):
    """Rows (..., words + 3) of `patch_words` in a language model's embedding space (..., d).

    A second colour is its word's embedding turned halfway round, so that it is not the first.
    """
    half, words = embeddings.shape[1] // 2, []
    tokens = tokenizer([" " + word.rstrip("'") for word in EYE_WORDS])["input_ids"]
    for word, ids in zip(EYE_WORDS, tokens, strict=True):
        vector = embeddings[ids].sum(0)
        words.append(vector.roll(half) if word in INNER else vector)
    words = torch.stack(words)
    directions = torch.randn(3, words.shape[1], generator=torch.Generator().manual_seed(0))
    return rows @ torch.cat([words, directions * embeddings.std().detach()])


def scenes_to_tower(scenes):
    """Scenes as the tower's pixels (B, 3, 60, 60) in [-1, 1]."""
    pixels = pictures_to_tensor([render(scene) for scene in scenes])
    return F.interpolate(pixels, VISION_SIZE, mode="bicubic", antialias=True)


def train_vision(out, steps):
    """A SigLIP vision transformer, taught shape, colours, pattern and place patch by patch."""
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            image_size=VISION_SIZE,
            patch_size=VISION_PATCH,
            vision_use_head=False,
        )
    )
    head = torch.nn.Linear(192, 7 + 9 + 9 + 3 + 3 + 1)
    rng = random.Random("vision")

    def loss_of_step(step):
        scenes = [random_scene(rng, patterns=0.25) for _ in range(64)]
        labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes])).flatten(0, 1)
        states = tower(scenes_to_tower(scenes), output_hidden_states=True).hidden_states[-1]
        shape, color, inner, pattern, where, centre = (
            head(states).flatten(0, 1).float().split([7, 9, 9, 3, 3, 1], 1)
        )
        kinds, guesses = labels[:, :4].long().unbind(1), (shape, color, inner, pattern)
        loss = sum(F.cross_entropy(g, k) for g, k in zip(guesses, kinds, strict=True))
        something = labels[:, :1] > 0
        loss = loss + 10 * ((where - labels[:, 4:7]) ** 2 * something).mean()
        loss = loss + F.binary_cross_entropy_with_logits(centre, labels[:, 7:])
        right = (shape.argmax(1) == kinds[0])[something[:, 0]].float().mean()
        accuracy[0] = 0.95 * accuracy[0] + 0.05 * right.item()
        return loss

    accuracy = [0.0]
    fit(
        "vision",
        [tower, head],
        loss_of_step,
        steps,
        1e-3,
        out,
        lambda: {"patch shapes": accuracy[0]},
    )
    tower.save_pretrained(out / "vision")


CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""


def make_tokenizer(words, vocab_size=1024, image="<image>", video="<video>"):
    """A byte-level BPE tokenizer for ChatML, trained on an iterable of texts."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), split])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", image, video],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": image, "video_token": video},
        model_max_length=4096,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def make_processor(tokenizer, size, patch):
    """LLaVA-OneVision's processor for square pictures of `size` pixels, `patch` a side."""
    square, mean = {"height": size, "width": size}, [0.5, 0.5, 0.5]
    images = LlavaOnevisionImageProcessor(
        size=square, image_grid_pinpoints=[[size, size]], image_mean=mean, image_std=mean
    )
    return LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(size=square, image_mean=mean, image_std=mean),
        num_image_tokens=(size // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def world_texts():
    """Texts with every word of the world, to train its tokenizer on."""
    rng = random.Random("words")
    for turn in (turn for _ in range(4000) for turn in talks(rng)):
        yield f" {turn.user} {turn.assistant}\n{turn.user}\n{turn.assistant}"
    yield from [f"{SYSTEM_PROMPT} system user assistant"] * 100


def language_config(tokenizer, **changes):
    """A toy Qwen2: 6 layers, 192 wide, unless `changes` say otherwise."""
    options = dict(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2Config(**(options | changes))


def chat(tokenizer, messages, open_end=True):
    """The text of a conversation, with an open end up to where the assistant is to speak."""
    options = {"chat_template": CHAT_TEMPLATE, "tokenize": False}
    return tokenizer.apply_chat_template(messages, add_generation_prompt=open_end, **options)


def read_talk(processor, conversations, embeddings=None, open_end=False):
    """Conversations as model inputs; with `open_end` the last turn's answer is left to the model.

    Given the language model's `embeddings` (vocabulary, d), its pictures are imagined: each patch
    is the sum of the words for it, in the order in which LLaVA-OneVision lays out its patches.
    """
    tokenizer, texts, scenes = processor.tokenizer, [], []
    for turns in conversations:
        system, messages = SYSTEM_PROMPT if turns[0].instructed else None, []
        for turn in turns:
            messages += conversation(turn.user, len(turn.sources), None if messages else system)
            messages.append({"role": "assistant", "content": turn.assistant})
        texts.append(chat(tokenizer, messages[:-1] if open_end else messages, open_end))
        scenes.append([scene for turn in turns for scene in turn.sources])
    options = {"padding": True, "padding_side": "left" if open_end else "right"}
    if embeddings is None and any(scenes):
        images = [[render(scene) for scene in row] for row in scenes]
        return processor(text=texts, images=images, return_tensors="pt", **options)
    base, patches = torch.arange(SIDE * SIDE), []
    newline = torch.full((SIDE, 1), SIDE * SIDE)
    tile = torch.cat([base.view(SIDE, SIDE), newline], 1).flatten()
    for i, row in enumerate(scenes):
        order = torch.cat([base, tile if len(row) == 1 else newline[0]])
        texts[i] = texts[i].replace("<image>", "<image>" * len(order))
        for scene in row:
            rows = np.pad(patch_words(scene), ((0, 1), (0, 0)))
            patches.append(torch.from_numpy(rows)[order])
    inputs = tokenizer(texts, return_tensors="pt", **options)
    if patches:
        ids = inputs["input_ids"]
        embedded = embeddings[ids]
        seen = words_to_vectors(torch.cat(patches), embeddings, tokenizer)
        seen = seen + 0.1 * embeddings.std().detach() * torch.randn_like(seen)
        embedded[ids == processor.image_token_id] = seen.to(embedded.dtype)
        inputs["inputs_embeds"] = embedded
    return inputs


def talk_batch(processor, conversations, embeddings=None):
    """Model inputs with labels on the assistant's words alone, padded on the right."""
    tokenizer = processor.tokenizer
    inputs = read_talk(processor, conversations, embeddings)
    ids = inputs["input_ids"] if "inputs_embeds" not in inputs else inputs.pop("input_ids")
    before, end = tokenizer("<|im_start|>assistant\n")["input_ids"], tokenizer.eos_token_id
    labels = torch.full_like(ids, -100)
    for row, tokens in enumerate(ids.tolist()):
        start = 0
        while start < len(tokens):
            if tokens[start : start + len(before)] == before:
                start += len(before)
                stop = tokens.index(end, start) + 1
                labels[row, start:stop] = ids[row, start:stop]
            start += 1
    return {**inputs, "labels": labels}


def batches_of_like_length(rng, size):
    """Eight batches of conversations, each with as many pictures, so that little is padding."""
    made = [talks(rng) for _ in range(8 * size)]
    made.sort(key=lambda turns: (sum(len(t.sources) for t in turns), turns[0].instructed))
    batches = [made[i : i + size] for i in range(0, len(made), size)]
    rng.shuffle(batches)
    return batches


@torch.no_grad()
def answers(model, processor, turns, imagined=False):
    """What the model says, greedily, to each exchange's user turn."""
    embeddings, said = model.get_input_embeddings().weight if imagined else None, []
    for start in range(0, len(turns), 50):
        inputs = read_talk(processor, [[t] for t in turns[start : start + 50]], embeddings, True)
        if "inputs_embeds" in inputs:
            inputs.pop("input_ids")
        made = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        before = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        said += processor.batch_decode(made[:, before:], skip_special_tokens=True)
    return said


def examine(model, processor, imagined=False, number=100):
    """Shares of unseen exchanges of several sorts that the model answers word for word."""
    tests = random.Random("mllm test")
    scenes = [random_scene(tests) for _ in range(number)]
    groups = {
        "captions": [Talk("", describe(scene), (scene,), True) for scene in scenes],
        "answers": [Talk(*question(tests, scene), (scene,)) for scene in scenes],
    }
    kinds = ("position", "dense", "knowledge", "edit", "one subject", "two subjects", "association")
    for kind in kinds:
        made = [sample(kind, i, split="test") for i in range(number // 2)]
        groups[kind] = [Talk(s.prompt, s.plain, s.sources, True) for s in made]
    shares = {}
    for name, asked in groups.items():
        said = answers(model, processor, asked, imagined)
        right = [a == t.assistant for a, t in zip(said, asked, strict=True)]
        shares[name] = round(sum(right) / len(right), 3)
    return shares


def train_llm(out, steps):
    """A toy Qwen2 that restates prompts, knows the world's facts and speaks ChatML.

    It talks of pictures too, which it is given as words, patch by patch: what it learns so is what
    it needs when a projector gives it real pictures in the same words.
    """
    processor = make_processor(make_tokenizer(world_texts()), VISION_SIZE, VISION_PATCH)
    processor.save_pretrained(out / "mllm")
    processor = AutoProcessor.from_pretrained(out / "mllm")
    # Eager attention: on a CPU the backward pass of the fused one is slower in bf16.
    config = language_config(processor.tokenizer)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="eager")
    rng = random.Random("llm")
    batches = []

    def loss_of_step(step):
        if not batches:
            batches.extend(batches_of_like_length(rng, 16))
        return model(**talk_batch(processor, batches.pop(), model.model.embed_tokens.weight)).loss

    fit("llm", [model], loss_of_step, steps, 3e-3, out, partial(examine, model, processor, True))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(out / "llm")


def align(model, tokenizer, out, steps=600):
    """Teach the projector to give each patch the embedding of the words for what it shows."""
    embeddings = model.get_input_embeddings().weight.detach()
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    rng = random.Random("align")

    def loss_of_step(step):
        scenes = [random_scene(rng, patterns=0.25) for _ in range(64)]
        with torch.no_grad():
            pixels = scenes_to_tower(scenes)
            states = tower(pixels, output_hidden_states=True).hidden_states[-1]
        rows = torch.from_numpy(np.stack([patch_words(scene) for scene in scenes]))
        wanted = words_to_vectors(rows, embeddings, tokenizer)
        return F.mse_loss(projector(states).float(), wanted) / embeddings.var()

    fit("align", [projector], loss_of_step, steps, 3e-3, out)


def train_mllm(out, steps):
    """LLaVA-OneVision of tower and language model, which goes on talking, now of real pictures.

    The tower stays as it is. The projector learns each patch's words, then stays as it is too:
    trained on, it drifts away from the words and the language model no longer reads it.
    """
    processor = AutoProcessor.from_pretrained(out / "mllm")
    tower = SiglipVisionModel.from_pretrained(out / "vision")
    language = Qwen2ForCausalLM.from_pretrained(out / "llm", attn_implementation="eager")
    config = LlavaOnevisionConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=[[VISION_SIZE, VISION_SIZE]],
        tie_word_embeddings=True,
        eos_token_id=language.config.eos_token_id,
        pad_token_id=language.config.pad_token_id,
    )
    model = LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.load_state_dict(language.model.state_dict())
    torch.nn.init.zeros_(model.model.image_newline)
    if not (out / "mllm.resume").exists():
        align(model, processor.tokenizer, out)
    model.model.multi_modal_projector.requires_grad_(False)
    rng = random.Random("mllm")
    batches = []

    def loss_of_step(step):
        if not batches:
            batches.extend(batches_of_like_length(rng, 16))
        return model(**talk_batch(processor, batches.pop())).loss

    fit("mllm", [model], loss_of_step, steps, 1e-3, out, partial(examine, model, processor))
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.to(torch.bfloat16).save_pretrained(out / "mllm")


@torch.no_grad()
def caption_states(language, tokenizer, prompts):
    """Last-layer states of the prompts' tokens (the system turn left out) and their mask."""
    texts = [chat(tokenizer, conversation(prompt)) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    system = conversation("")[:1]
    skip = len(tokenizer.apply_chat_template(system, chat_template=CHAT_TEMPLATE)["input_ids"])
    states = language.model(**inputs).last_hidden_state
    return states[:, skip:], inputs["attention_mask"][:, skip:]


def train_diffusion(out, steps):
    """A toy Sana on captions alone: 8x8 latents, 6 layers, 192 wide, flow matching."""
    number = min(24000, 32 * steps)  # captions and pictures, encoded once
    tokenizer = AutoProcessor.from_pretrained(out / "mllm").tokenizer
    language = Qwen2ForCausalLM.from_pretrained(out / "llm").eval()
    vae = AutoencoderDC.from_pretrained(out / "diffusion" / "vae").eval()
    sana = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=6,
        attention_head_dim=32,
        num_layers=6,
        num_cross_attention_heads=3,
        cross_attention_head_dim=64,
        cross_attention_dim=192,
        caption_channels=192,
        sample_size=8,
        interpolation_scale=1.0,
    )
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
    )
    rng = random.Random("diffusion")
    kinds = rng.choices(list(CAPTION_KINDS), list(CAPTION_KINDS.values()), k=number)
    cached = []
    for start in tqdm(range(0, number, 64), desc="captions and latents", mininterval=10):
        made = [sample(kind, start + i, "sana") for i, kind in enumerate(kinds[start : start + 64])]
        prompts = ["" if rng.random() < 0.1 else s.prompt for s in made]
        states, mask = caption_states(language, tokenizer, prompts)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(pictures_to_tensor([s.picture for s in made])).latent
        latents = latents.float() * vae.config.scaling_factor
        cached += [
            (z, c[: int(m.sum())].bfloat16()) for z, c, m in zip(latents, states, mask, strict=True)
        ]

    def loss_of_step(step):
        picked = [cached[i] for i in torch.randint(number, (32,)).tolist()]
        z = torch.stack([latent for latent, _ in picked])
        mask = pad_sequence([torch.ones(len(c)) for _, c in picked], batch_first=True)
        states = pad_sequence([c for _, c in picked], batch_first=True).float()
        sigma = torch.randn(32).sigmoid()
        noise = torch.randn_like(z)
        noisy = z + sigma.view(-1, 1, 1, 1) * (noise - z)
        velocity = sana(noisy, states, 1000 * sigma, encoder_attention_mask=mask).sample
        return F.mse_loss(velocity.float(), noise - z)

    @torch.no_grad()
    def evaluate(number=16):
        right, drawn = {}, []
        for kind in (*SIX_KINDS, "dense", "held-out"):
            made = [sample(kind, i, split="test") for i in range(number)]
            states, mask = caption_states(
                language, tokenizer, [""] * number + [s.prompt for s in made]
            )
            scheduler.set_timesteps(20)
            z = torch.randn(number, 8, 8, 8)
            for t in scheduler.timesteps:
                with torch.autocast("cpu", torch.bfloat16):
                    v = sana(
                        z.repeat(2, 1, 1, 1),
                        states,
                        t.expand(2 * number),
                        encoder_attention_mask=mask,
                    ).sample
                free, asked = v.float().chunk(2)
                z = scheduler.step(free + 3 * (asked - free), t, z).prev_sample
            pixels = vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1)
            arrays = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            pictures = [Image.fromarray(array) for array in arrays]
            right[kind] = (
                sum(score(p, s.want) for p, s in zip(pictures, made, strict=True)) / number
            )
            drawn += pictures[:8]
        grid(drawn, columns=8).save(out / "diffusion.png")
        return right

    fit("diffusion", [sana], loss_of_step, steps, 1e-3, out, evaluate)
    sana.to(torch.bfloat16).save_pretrained(out / "diffusion" / "transformer")
    scheduler.save_pretrained(out / "diffusion" / "scheduler")
    parts = {"transformer": sana, "vae": vae, "scheduler": scheduler}
    index = {"_class_name": "SanaPipeline", "_diffusers_version": diffusers_version}
    index |= {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    (out / "diffusion" / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


# Each part's maker, its steps and the file that says that it is there.
PARTS = {
    "vae": (train_vae, 5500, "diffusion/vae/config.json"),
    "vision": (train_vision, 3000, "vision/config.json"),
    "llm": (train_llm, 1800, "llm/config.json"),
    "mllm": (train_mllm, 3000, "mllm/config.json"),
    "diffusion": (train_diffusion, 5500, "diffusion/transformer/config.json"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("weights/new"))
    parser.add_argument("--part", choices=list(PARTS), help="make this part only, anew")
    parser.add_argument("--steps", type=int, help="training steps of --part")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name, (make, steps, made) in PARTS.items():
        if args.part == name or (args.part is None and not (args.out / made).exists()):
            make(args.out, args.steps or steps)


if __name__ == "__main__":
    main()
