"""Make the toy MLLM: tokenizer, language model, and LLaVA-OneVision of it and the vision tower."""

import random
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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
    SiglipVisionModel,
)

from extras.toy_parts.conversations import TALKS, talks
from extras.toy_parts.fit import fit
from extras.toy_parts.vision import (
    EYE_WORDS,
    INNER,
    SIDE,
    VISION_PATCH,
    VISION_SIZE,
    patch_words,
    scenes_to_tower,
)
from metaquery import SYSTEM_PROMPT, to_device
from toy.scene import Scene, random_scene, render
from toy.talk import Talk, question
from toy.tasks import FIRST_EDITS, task
from toy.words import describe

SYSTEM = {"role": "system", "content": SYSTEM_PROMPT}
# A user's text begins with a space: the tokenizer knows each word by the space before it, and
# "blue" without one is another token, which is rarely trained.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image>' }}
{%- elif message['role'] == 'user' and part['text'] -%}{{ ' ' + part['text'] }}
{%- else -%}{{ part['text'] }}
{%- endif -%}
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
    """LLaVA-OneVision's processor for square images of `size` pixels, `patch` a side."""
    square = {"height": size, "width": size}
    mean = [0.5, 0.5, 0.5]
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
    sorts = rng.choices(list(TALKS), list(TALKS.values()), k=4000)
    for turn in (turn for sort in sorts for turn in talks(rng, sort)):
        yield f" {turn.user} {turn.assistant}\n{turn.user}\n{turn.assistant}"
    yield from [f"{SYSTEM_PROMPT} system user assistant"] * 100


def language_config(tokenizer, **changes):
    """A toy Qwen2: 6 layers, 192 wide, unless `changes` say otherwise."""
    # Three heads of 64: wide heads look up whole words, and are faster.
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 4096}
    tokens = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, "bos_token_id": None}
    tokens |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2Config(**(sizes | tokens | changes))


def user_turn(prompt, num_images=0):
    """A user's message: so many images, then the text."""
    parts = [{"type": "image"}] * num_images
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def chat(tokenizer, messages, open_end=True):
    """The text of a conversation; with an open end, up to where the assistant speaks."""
    options = {"chat_template": CHAT_TEMPLATE, "tokenize": False}
    return tokenizer.apply_chat_template(messages, add_generation_prompt=open_end, **options)


def talk_texts(tokenizer, conversations, open_end=False):
    """The texts of conversations, and each one's source scenes in turn."""
    texts, scenes = [], []
    for turns in conversations:
        messages = []
        if turns[0].instructed:
            messages.append(SYSTEM)
        for turn in turns:
            messages.append(user_turn(turn.user, len(turn.sources)))
            messages.append({"role": "assistant", "content": turn.assistant})
        if open_end:
            messages.pop()
        texts.append(chat(tokenizer, messages, open_end))
        scenes.append([scene for turn in turns for scene in turn.sources])
    return texts, scenes


def lay_out(processor, texts, scenes, multiple=1, side="right"):
    """Token ids and mask (B, L) with an image token for every state of an image; and its "place".

    An image has 26 states, 25 patches and a newline, laid out as LLaVA-OneVision does; "place"
    (B, L) counts them through all images from 1 and is 0 at words. L is a multiple of `multiple`.
    """
    base = torch.arange(SIDE * SIDE)
    newline = torch.full((SIDE, 1), SIDE * SIDE)
    tile = torch.cat([base.view(SIDE, SIDE), newline], 1).flatten()
    places, number = [], 0
    for i, row in enumerate(scenes):
        end = newline[0]
        if len(row) == 1:  # a single image is seen twice: as a whole and as a tile
            end = tile
        order = torch.cat([base, end])
        texts[i] = texts[i].replace("<image>", "<image>" * len(order))
        for _ in row:
            places.append(1 + (SIDE * SIDE + 1) * number + order)
            number += 1

    options = {"padding_side": side, "pad_to_multiple_of": multiple, "return_tensors": "pt"}
    inputs = dict(processor.tokenizer(texts, padding=True, **options))
    inputs["place"] = torch.zeros_like(inputs["input_ids"])
    if places:
        inputs["place"][inputs["input_ids"] == processor.image_token_id] = torch.cat(places)
    return inputs


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
    return rows @ torch.cat([words, directions.to(words) * embeddings.std().detach()])


def imagined(scenes):
    """Scenes as the words for what their 26 states show: (P, 26, words + 3) float32."""
    rows = [np.pad(patch_words(scene), ((0, 1), (0, 0))) for scene in scenes]
    if not rows:
        return torch.zeros(0, 26, len(EYE_WORDS) + 3)
    return torch.from_numpy(np.stack(rows))


def imagine(rows, embeddings, tokenizer):
    """Imagined images (P, 26, words + 3) as a language model's input states (P, 26, d)."""
    seen = words_to_vectors(rows, embeddings, tokenizer)
    return seen + 0.1 * embeddings.std() * torch.randn_like(seen)


def put(states, place):
    """Images' states (P, 26, d) at their places (B, L), zeros elsewhere: (B, L, d)."""
    states = states.flatten(0, 1)
    return torch.cat([states.new_zeros(1, states.shape[-1]), states])[place]


def talk_batch(rng, run, processor, to_states):
    """Conversations of one sort: tokens, labels on the assistant's words, and images.

    "images" holds what `to_states` makes of their scenes.
    """
    tokenizer = processor.tokenizer
    multiple = 8
    if run.device == "cuda":  # fewer lengths to plan for
        multiple = 128
    sort = rng.choices(list(TALKS), list(TALKS.values()))[0]
    texts, scenes = talk_texts(tokenizer, [talks(rng, sort) for _ in range(run.batch_size)])
    inputs = lay_out(processor, texts, scenes, multiple)

    ids = inputs["input_ids"]
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
    images = to_states([scene for row in scenes for scene in row])
    return {"input_ids": ids, "labels": labels, "place": inputs["place"], "images": images}


def talk_loss(language, embedding, input_ids, labels, place, seen):
    """Cross-entropy of the labels, given `seen` (B, L, d) where `place` is an image's.

    Padded on the right under a causal mask, so no other mask is needed.
    """
    words = embedding(input_ids)
    states = torch.where(place[..., None] > 0, seen.to(words.dtype), words)
    hidden = language(
        inputs_embeds=states, attention_mask={"full_attention": None}, use_cache=False
    ).last_hidden_state
    wanted = labels[:, 1:]
    spoken = hidden[:, :-1][wanted >= 0]  # (T, d): only the assistant's words need logits
    logits = F.linear(spoken, embedding.weight)
    return F.cross_entropy(logits.float(), wanted[wanted >= 0])


@torch.no_grad()
def answers(model, processor, turns, words_only=False):
    """What the model says, greedily, to each exchange's user turn; of imagined images or real."""
    embeddings = model.get_input_embeddings().weight
    tokenizer = processor.tokenizer
    texts, scenes = talk_texts(tokenizer, [[turn] for turn in turns], open_end=True)
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if words_only:
        inputs = to_device(lay_out(processor, texts, scenes, side="left"), model.device)
        rows = imagined([scene for row in scenes for scene in row]).to(model.device)
        ids, place = inputs.pop("input_ids"), inputs.pop("place")
        seen = put(imagine(rows, embeddings, tokenizer), place)
        inputs["inputs_embeds"] = torch.where(place[..., None] > 0, seen, embeddings[ids])
    elif any(scenes):
        images = [[render(scene) for scene in row] for row in scenes]
        inputs = to_device(processor(text=texts, images=images, **options), model.device)
    else:
        inputs = to_device(tokenizer(texts, **options), model.device)

    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    if "input_ids" in inputs:
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(tokens, skip_special_tokens=True)


def examine(model, processor, words_only=False, number=100):
    """Shares of unseen exchanges of several sorts that the model answers word for word."""
    tests = random.Random("mllm test")
    scenes = [random_scene(tests) for _ in range(number)]
    groups = {
        "captions": [Talk("", describe(scene), (scene,), True) for scene in scenes],
        "answers": [Talk(*question(tests, scene), (scene,)) for scene in scenes],
    }
    kinds = ("position", "dense", "knowledge", "edit", "one subject", "two subjects", "association")
    kinds += ("free wordings", "lists", "nearest", "free edit", *FIRST_EDITS)
    for kind in kinds:
        tasks = [task(kind, i, split="test") for i in range(number // 2)]
        groups[kind] = [Talk(each.prompt, each.plain, each.sources, True) for each in tasks]

    shares = {}
    for name, asked in groups.items():
        said = answers(model, processor, asked, words_only)
        right = [text == turn.assistant for text, turn in zip(said, asked, strict=True)]
        shares[name] = round(sum(right) / len(right), 3)
    return shares


def train_llm(run):
    """A toy Qwen2 that restates prompts, knows the world's facts and speaks ChatML.

    It talks of images too, which it is given as words, patch by patch: what it learns so is what
    it needs when a projector gives it real images in the same words.
    """
    processor = make_processor(make_tokenizer(world_texts()), VISION_SIZE, VISION_PATCH)
    processor.save_pretrained(run.out / "mllm")
    processor = AutoProcessor.from_pretrained(run.out / "mllm")
    model = Qwen2ForCausalLM(language_config(processor.tokenizer))
    embedding = model.model.embed_tokens

    def encode(batch):
        states = imagine(batch.pop("images"), embedding.weight, processor.tokenizer)
        return {**batch, "seen": put(states, batch["place"])}

    def loss_of(batch):
        return talk_loss(model.model, embedding, **batch)

    make = partial(talk_batch, run=run, processor=processor, to_states=imagined)
    evaluate = partial(examine, model, processor, True)
    fit("llm", [model], make, loss_of, 3e-3, run, evaluate, encode=encode)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(run.out / "llm")


def align(model, tokenizer, run):
    """Teach tower and projector to give each patch the embedding of the words for what it shows.

    With the tower left as it was, the error stays far larger: the language model then misreads
    objects of two colours, and takes thousands of steps to get used to it.
    """
    embeddings = model.get_input_embeddings().weight.detach().to(run.device)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector

    def make(rng):
        scenes = [random_scene(rng, patterns=0.5) for _ in range(64)]
        rows = torch.from_numpy(np.stack([patch_words(scene) for scene in scenes]))
        return {"pixels": scenes_to_tower(scenes), "rows": rows}

    def loss_of(batch):
        states = tower(batch["pixels"], output_hidden_states=True).hidden_states[-1]
        wanted = words_to_vectors(batch["rows"], embeddings, tokenizer)
        return F.mse_loss(projector(states).float(), wanted) / embeddings.var()

    fit("align", [tower, projector], make, loss_of, 1e-3, run, steps=2400)


def join(run, processor):
    """LLaVA-OneVision of the tower and the language model in run.out, aligned."""
    tower = SiglipVisionModel.from_pretrained(run.out / "vision", dtype=torch.float32)
    language = Qwen2ForCausalLM.from_pretrained(run.out / "llm", dtype=torch.float32)
    tower.config.name_or_path = ""  # not the folder it was read from
    language.config.name_or_path = ""

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
    model = LlavaOnevisionForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    torch.nn.init.zeros_(model.model.image_newline)

    if not (run.out / "mllm.resume").exists():
        align(model, processor.tokenizer, run)
    return model


def train_mllm(run):
    """LLaVA-OneVision of tower and language model, which goes on talking, now of real images.

    Tower and projector learn each patch's words, then stay as they are: a projector that is
    trained on drifts away from the words, and the language model no longer reads it. With
    run.start, a folder of such an MLLM, it is this one that goes on talking.
    """
    processor = AutoProcessor.from_pretrained(run.start or run.out / "mllm")
    if run.start:
        options = {"dtype": torch.float32}
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(run.start, **options)
        model.config.name_or_path = ""
        lr = 1e-3
        processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
        processor.save_pretrained(run.out / "mllm")
    else:
        model = join(run, processor)
        lr = 3e-4

    eye, projector = model.model.vision_tower, model.model.multi_modal_projector
    for part in (eye, projector, model.model.image_newline):
        part.requires_grad_(False)

    def to_states(scenes):
        return scenes_to_tower(scenes or [Scene(())])  # an unused one: the tower takes no none

    def encode(batch):
        states = eye(batch.pop("images"), output_hidden_states=True).hidden_states[-1]
        seen = put(F.pad(projector(states), (0, 0, 0, 1)), batch["place"])
        return {**batch, "seen": seen}

    def loss_of(batch):
        return talk_loss(model.model.language_model, model.get_input_embeddings(), **batch)

    make = partial(talk_batch, run=run, processor=processor, to_states=to_states)
    evaluate = partial(examine, model, processor)
    fit("mllm", [model], make, loss_of, lr, run, evaluate, encode=encode)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id
    model.to(torch.bfloat16).save_pretrained(run.out / "mllm")
