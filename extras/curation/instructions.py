"""Groups of similar pictures, their targets, and instructions that lead from sources to targets.

Paper §4 and Appendix A: captions are grouped by SigLIP, the picture least like the others of its
group is the target, and a multimodal LLM says how to get from the other pictures to it.
"""

import re
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
import transformers
from tqdm import tqdm

from metaquery import (
    MAX_IMAGES,
    MAX_PROMPT_TOKENS,
    InputError,
    MetaQueryConfig,
    PromptFormat,
    load_mllm,
    loading,
    to_device,
)

DIGITS = 4  # of similarities: they then do not depend on what else was in the batch


class ImagePair(NamedTuple):
    """Source pictures and a target picture, PIL, with their captions."""

    source_images: list
    source_captions: list
    target_image: object
    target_caption: str


# ---- 1. Features ---------------------------------------------------------------------------------


class Siglip:
    """SigLIP's features of captions and of pictures: (n, d) float32, each row of norm 1."""

    def __init__(self, name, device="cpu", batch_size=64):
        """name: hub id or folder. Raises InputError if no SigLIP is there."""
        self.batch_size = batch_size
        with loading(name, "--siglip"):
            self.model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32)
            if not self.model.config.model_type.startswith("siglip"):
                kind = self.model.config.model_type
                raise InputError(f"--siglip {name} is a {kind}: name a SigLIP model.")
            try:
                self.processor = transformers.AutoProcessor.from_pretrained(name)
            except Exception:
                if find_spec("sentencepiece"):
                    raise
                todo = "pip install sentencepiece protobuf"
                raise InputError(f"the tokenizer of {name} cannot be loaded: {todo}.") from None
        self.model.to(device).eval()

    def captions(self, captions):
        """The features of a list of strings; a long one is cut, as SigLIP reads 64 tokens."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        options["max_length"] = self.model.config.text_config.max_position_embeddings
        tokenizer = self.processor.tokenizer

        def encode(batch):
            # Without a mask: SigLIP was trained to see its padding.
            ids = tokenizer(batch, **options)["input_ids"].to(self.model.device)
            return self.model.get_text_features(input_ids=ids)

        return self.in_batches(encode, captions)

    def pictures(self, pictures):
        """The features of a list of PIL images."""

        def encode(batch):
            inputs = self.processor.image_processor(images=batch, return_tensors="pt")
            return self.model.get_image_features(**inputs.to(self.model.device))

        return self.in_batches(encode, pictures)

    @torch.no_grad()
    def in_batches(self, encode, items):
        """The normed outputs of `encode` for all items."""
        rows = []
        for start in range(0, len(items), self.batch_size):
            features = encode(list(items[start : start + self.batch_size]))
            features = getattr(features, "pooler_output", features).float()  # (b, d)
            rows.append(torch.nn.functional.normalize(features, dim=-1).cpu().numpy())
        return np.concatenate(rows) if rows else np.zeros((0, 1), np.float32)


# ---- 2. Groups and targets -----------------------------------------------------------------------


def similarities(features):
    """The cosines (n, n) between rows (n, d) of norm 1."""
    return np.round(features @ features.T, DIGITS)


def group(features, threshold):
    """Groups of 2 to MAX_IMAGES rows, every two of a group at least `threshold` similar.

    features (n, d) of norm 1. Returns lists of indices, in order; rows in no group are left out.
    Complete linkage: the two groups whose least similar members are most similar become one, as
    long as these are similar enough. Groups that are too large are split into even parts.
    """
    members = [[i] for i in range(len(features))]
    linkage = similarities(features)  # of two groups: of their least similar members
    np.fill_diagonal(linkage, -np.inf)
    while len(features) and linkage.max() >= threshold:
        first, second = sorted(np.unravel_index(linkage.argmax(), linkage.shape))
        members[first] += members[second]
        members[second] = []
        linkage[first] = np.minimum(linkage[first], linkage[second])
        linkage[:, first] = linkage[first]
        linkage[second] = linkage[:, second] = -np.inf
    groups = []
    for found in members:
        if len(found) > 1:
            parts = -(-len(found) // MAX_IMAGES)
            groups += [part.tolist() for part in np.array_split(sorted(found), parts)]
    return groups


def choose_target(features):
    """The row (n, d) that is least similar to the others on average; among equals the last."""
    cosines = similarities(features)
    np.fill_diagonal(cosines, 0)
    averages = np.round(cosines.sum(1) / (len(features) - 1), DIGITS)
    return int(np.flatnonzero(averages == averages.min())[-1])


def make_pair(pictures, captions, target):
    """The `ImagePair` of a group's pictures and captions."""
    sources = [i for i in range(len(pictures)) if i != target]
    images, texts = [pictures[i] for i in sources], [captions[i] for i in sources]
    return ImagePair(images, texts, pictures[target], captions[target])


# ---- 3. Instructions -----------------------------------------------------------------------------

# Appendix A, in our own words and with our own examples.
SYSTEM = """You write prompts for a model that draws a new picture from source pictures and a \
prompt. You see one or more source pictures, then the target picture, which that model does not \
see, and the captions of all. Write a short and interesting prompt with which the source pictures \
lead to the target picture.
The prompt must name:
- what the target shares with the sources, in general words only, such as "the same building" or \
"this animal";
- everything that only the target shows.
The prompt must not name:
- details of what they share. Nobody may be able to draw the target from the prompt alone;
- the words "target", "source" or "caption".

Answer in two lines and write nothing else:
Think: one sentence on what the pictures share, and one on what only the target shows.
Prompt: the prompt, one sentence.

Example. Source 1: "a red star". Source 2: "two red stars on a grey background". Target: "a red \
star left of a blue circle".
Think: All pictures show red stars. Only the target has a blue circle, to the right of one star.
Prompt: This object to the left of a blue circle.

Example. Source 1: "Our collie Bess at the agility course". Target: "Bess asleep by the stove in \
December".
Think: Both pictures show the same collie. Only in the target does it sleep beside a stove.
Prompt: The same dog asleep on a rug beside a warm stove.

Example. Source 1: "The old lighthouse seen from the harbour". Source 2: "The lighthouse and its \
keeper's cottage". Target: "Postcard of the lighthouse, about 1910".
Think: All pictures show one lighthouse. Only the target is a hand-coloured postcard of it.
Prompt: This building as a hand-coloured postcard from the early twentieth century."""
ANSWER_TOKENS = 160
MAX_WORDS = 60  # of a prompt
# Words by which a prompt refers to pictures that it comes with.
REFERENCES = set(
    "this these that those same similar it its both all them their they another other more fewer "
    "first second third fourth fifth missing".split()
)
FORBIDDEN = set("target source sources caption captions".split())
STOP_WORDS = set(
    "a an and are as at be by for from has have in into is it its of on or our that the their "
    "there these this those to was were with".split()
)
LEAK = 0.8  # share of the target caption's words from which on a prompt gives it away
LEAK_WORDS = 3  # the fewest words of a caption that can be given away


class InstructionWriter:
    """Asks a multimodal LLM for instructions; a text-only LLM sees the captions alone."""

    def __init__(self, name, device="cpu", dtype=torch.float32, batch_size=8):
        """name: hub id or folder, as --mllm of train.py. Raises InputError."""
        self.mllm, self.processor = load_mllm(MetaQueryConfig.preset("large", mllm=name), dtype)
        self.mllm.to(device)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.format = PromptFormat(self.processor, self.mllm.config)
        self.batch_size = batch_size

    def question(self, pair):
        """The captions of a pair, cut so that all of them are read."""
        labels = [f"Source {i + 1}" for i in range(len(pair.source_captions))] + ["Target"]
        frame = self.tokenizer("".join(f'{label}: ""\n' for label in labels))["input_ids"]
        room = (MAX_PROMPT_TOKENS - len(frame)) // len(labels) - 2  # tokens where they join
        lines = []
        for label, caption in zip(
            labels, [*pair.source_captions, pair.target_caption], strict=True
        ):
            ids = self.tokenizer(caption, add_special_tokens=False)["input_ids"]
            if len(ids) > room:
                caption = self.tokenizer.decode(ids[:room])
            lines.append(f'{label}: "{caption}"')
        return "\n".join(lines)

    @torch.no_grad()
    def write(self, pairs):
        """The answer to each `ImagePair`, a string, for `read_answer`."""
        takes_images = self.format.takes_images
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].source_images))
        answers = [""] * len(pairs)
        bar = tqdm(total=len(pairs), desc="instructions", leave=False, disable=None)
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            texts = [self.question(pairs[i]) for i in some]
            images = [[*pairs[i].source_images, pairs[i].target_image] for i in some]
            images = images if takes_images else None
            inputs = self.format(texts, images, SYSTEM)
            inputs = to_device(inputs, self.mllm.device)
            options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
            tokens = self.mllm.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            written = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for i, answer in zip(some, written, strict=True):
                answers[i] = answer
            bar.update(len(some))
        bar.close()
        return answers


def read_answer(answer):
    """The prompt in an answer "Think: ...\\nPrompt: ...", or None if there is not exactly one."""
    found = re.findall(r"^\W*Prompt\W*:\W*(\S.*)$", answer, re.MULTILINE | re.IGNORECASE)
    if len(found) != 1:
        return None
    prompt = " ".join(found[0].split()).strip("\"'“”*` ")
    return prompt if re.search(r"\w", prompt) and len(prompt.split()) <= MAX_WORDS else None


def words_of(text):
    return re.findall(r"\w+", text.lower())


def fault(prompt, target_caption):
    """Why a prompt, or None for no prompt, is dropped; None if it is kept.

    A prompt that refers to no other picture, or says nearly all that the target's caption says,
    could be drawn without the sources.
    """
    if prompt is None:
        return "unparseable"
    words = set(words_of(prompt))
    if words & FORBIDDEN:
        return "names the target"
    if not words & REFERENCES:
        return "refers to no source"
    told = set(words_of(target_caption)) - STOP_WORDS
    if len(told) >= LEAK_WORDS and len(told & words) >= LEAK * len(told):
        return "gives the target away"
    return None
