"""Groups of similar images, their targets, and instructions that lead from sources to targets.

Paper §4 and Appendix A: images whose captions SigLIP finds similar are a group, the image least
like the others of its group is the target, and a multimodal LLM says how to get from the others
to it. A row is a dict with the columns of MetaQuery-Instruct: "source_images",
"source_captions", "prompt", "target_image", "target_caption".
"""

import re
import textwrap

import numpy as np
import torch
import transformers
from tqdm import tqdm

from metaquery import MAX_IMAGES, InputError, MetaQueryConfig, PromptFormat, load_mllm, loading

DIGITS = 4  # of similarities: the last ones depend on the machine

# Appendix A, in our own words.
SYSTEM = """You see one or more source images, then a target image, and the captions of all. \
Write a short and interesting prompt from which, together with the source images, somebody who \
cannot see the target image could make it.
The prompt must name:
- one thing that the target shares with the sources, in general words only, such as "the same \
building" or "this animal";
- everything that only the target shows.
The prompt must not name:
- details from which the target could be made without the sources;
- the words "target", "source" or "caption".
Answer with the prompt alone, in one sentence, such as: The same dog asleep beside a warm stove."""
ANSWER_TOKENS = 100
MAX_WORDS = 60  # a longer prompt is dropped
MAX_CHARACTERS = 600  # a row's captions are cut here: less than MAX_PROMPT_TOKENS
FORBIDDEN = {"target", "source", "sources", "caption", "captions"}


class Siglip:
    """SigLIP's features of captions and of images: (n, d) float32, each row of norm 1."""

    def __init__(self, name, device="cpu"):
        """name: hub id or folder. Raises InputError if no SigLIP is there."""
        with loading(name, "--siglip"):
            self.model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32)
            if not self.model.config.model_type.startswith("siglip"):
                raise InputError(f"--siglip {name} is another model: name a SigLIP model.")
            self.processor = transformers.AutoProcessor.from_pretrained(name)
        self.model.to(device).eval()

    @torch.no_grad()
    def captions(self, captions):
        """The features of a list of strings; long ones are cut, as SigLIP reads 64 tokens."""
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        tokens = self.processor.tokenizer(captions, return_tensors="pt", **options)

        # Without the attention mask: SigLIP was trained to see its padding.
        ids = tokens["input_ids"].to(self.model.device)  # (n, length)
        return normed(self.model.get_text_features(input_ids=ids))

    @torch.no_grad()
    def images(self, images):
        """The features of a list of PIL images."""
        inputs = self.processor.image_processor(images=images, return_tensors="pt")
        return normed(self.model.get_image_features(**inputs.to(self.model.device)))


def normed(output):
    """SigLIP's output as rows (n, d) of norm 1, a float32 array."""
    features = getattr(output, "pooler_output", output).float()
    return torch.nn.functional.normalize(features, dim=-1).cpu().numpy()


def group(features, threshold):
    """Groups of 2 to MAX_IMAGES rows, every two of a group at least `threshold` similar.

    features (n, d) of norm 1. Returns lists of indices, in order; rows in no group are left out.
    Complete linkage: the two groups whose least similar members are most similar become one, as
    long as these are similar enough. Groups that are too large are split into even parts.
    """
    members = [[i] for i in range(len(features))]
    linkage = np.round(features @ features.T, DIGITS)  # (n, n): cosines of the least similar
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
    totals = np.round((features @ features.T).sum(1), DIGITS)  # (n,): a row is like itself by 1
    return int(np.flatnonzero(totals == totals.min())[-1])


def make_row(images, captions, features):
    """A row, without a prompt, of a group: n images, n captions, features (n, d)."""
    target = choose_target(features)
    sources = [i for i in range(len(images)) if i != target]
    return {
        "source_images": [images[i] for i in sources],
        "source_captions": [captions[i] for i in sources],
        "target_image": images[target],
        "target_caption": captions[target],
    }


class InstructionWriter:
    """Asks a multimodal LLM for instructions; a text-only LLM sees the captions alone."""

    def __init__(self, name, device="cpu", dtype=torch.float32, batch_size=8):
        """name: hub id or folder, as --mllm of train.py. Raises InputError."""
        self.mllm, self.processor = load_mllm(MetaQueryConfig.preset("large", mllm=name), dtype)
        self.mllm.to(device)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.format = PromptFormat(self.processor, self.mllm.config)
        self.batch_size = batch_size

    def question(self, row):
        """The captions of a row, cut so that the MLLM reads some of each."""
        captions = [*row["source_captions"], row["target_caption"]]
        width = MAX_CHARACTERS // len(captions)
        labels = [f"Source {number}" for number in range(1, len(captions))] + ["Target"]
        pairs = zip(labels, captions, strict=True)
        return "\n".join(f"{label}: {textwrap.shorten(text, width)}" for label, text in pairs)

    @torch.no_grad()
    def write(self, rows):
        """The MLLM's answer for each row, a string."""
        answers = []
        for start in tqdm(range(0, len(rows), self.batch_size), "prompts", leave=False):
            batch = rows[start : start + self.batch_size]
            images = None
            if self.format.takes_images:
                images = [[*row["source_images"], row["target_image"]] for row in batch]

            inputs = self.format([self.question(row) for row in batch], images, SYSTEM)
            inputs = inputs.to(self.mllm.device)
            tokens = self.mllm.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)

            new = tokens[:, inputs["input_ids"].shape[1] :]
            answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers


def read_answer(answer, target_caption):
    """The prompt in an answer; None if there is none, or it gives the target away."""
    prompt = " ".join(answer.split()).strip("\"'“”*` ")
    words = set(re.findall(r"\w+", prompt.lower()))
    caption_words = set(re.findall(r"\w+", target_caption.lower()))

    says_all = len(caption_words) > 2 and caption_words <= words
    if not words or len(prompt.split()) > MAX_WORDS or words & FORBIDDEN or says_all:
        return None
    return prompt
