"""Make a tiny SigLIP that knows which captions and pictures of the toy world are of one subject."""

import random

import torch
import torch.nn.functional as F
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

from toy.documents import random_subject, subject_scenes
from toy.fit import fit, pictures_to_tensor
from toy.pretrain_mllm import make_tokenizer
from toy.scene import SIZE, render
from toy.words import describe

TOKENS = 24  # the longest caption
SUBJECTS = 12  # that are told from each other at once
PICTURED = 2  # documents of a batch whose pictures are drawn: captions cost less
# Fixed, so that the loss parts similar from different just at a cosine of 0.5, the paper's.
SLOPE, MIDDLE = 20.0, 0.5


def samples(rng, subjects=SUBJECTS):
    """Two scenes of each subject, as if from one web page: two lists."""
    items, taken = [], []
    for _ in range(subjects):
        items.append(random_subject(rng, taken))
        taken.append((items[-1].color, items[-1].shape))
    pairs = [rng.sample(subject_scenes(rng, item, 3, taken), 2) for item in items]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def train_siglip(args):
    """Train for args.steps steps, and save it with its processor in args.out, as the hub does.

    In the sigmoid loss a caption's positives are the picture and the caption of another scene of
    its subject, as web captions name a subject in other words than its picture shows it.
    """
    rng = random.Random("siglip words")
    texts = [describe(scene) for _ in range(60) for scenes in samples(rng) for scene in scenes]
    tokenizer = make_tokenizer(texts, 400)
    tokenizer.padding_side = "right"
    width = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, "projection_size": 96}
    text |= {"num_hidden_layers": 2, "pad_token_id": tokenizer.pad_token_id}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": SIZE, "patch_size": 8, "num_hidden_layers": 3}
    model = SiglipModel(SiglipConfig(text_config=text | width, vision_config=vision | width))

    def make(rng):
        captions, pictures = [], []
        for number in range(args.batch_size):
            first, second = samples(rng)
            captions += [describe(scene) for scene in (*first, *second)]
            pictures += [render(scene) for scene in second if number < PICTURED]
        options = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
        ids = tokenizer(captions, truncation=True, **options)["input_ids"]
        return {"ids": ids, "pixels": pictures_to_tensor(pictures)}

    def loss_of(batch):
        texts = model.get_text_features(input_ids=batch["ids"]).pooler_output
        texts = F.normalize(texts.float(), dim=-1).view(-1, 2, SUBJECTS, texts.shape[-1])
        views = model.get_image_features(pixel_values=batch["pixels"]).pooler_output
        views = F.normalize(views.float(), dim=-1).view(-1, SUBJECTS, views.shape[-1])
        signs = 2 * torch.eye(SUBJECTS, device=views.device) - 1  # 1 for the same subject, else −1
        loss = 0
        for captions, others in ((texts[:, 0], texts[:, 1]), (texts[:PICTURED, 0], views)):
            cosines = captions @ others.transpose(1, 2)  # (documents, SUBJECTS, SUBJECTS)
            loss = loss - F.logsigmoid(signs * SLOPE * (cosines - MIDDLE)).mean()
        return loss

    fit("siglip", [model], make, loss_of, 1e-3, args)
    square = {"height": SIZE, "width": SIZE}
    images = SiglipImageProcessor(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model.save_pretrained(args.out)
    SiglipProcessor(images, tokenizer).save_pretrained(args.out)
