"""What the variants of the flags table share: language models, a VAE and a diffusion model.

The toy VAE and the toy diffusion model are fine-tuned to generate the flags by name. The diffusion
model reads a caption by the language model's input embeddings of its tokens, before any layer: it
knows the countries by name alone.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from extras.flags import dataset
from extras.flags.dataset import LLM, SIDE, code_of
from extras.toy_parts import diffusion
from extras.toy_parts.fit import Run, fit
from metaquery import SANA_GAIN, TINY, to_pixels

SHUFFLED = "shuffled"  # the folder of the language model with shuffled weights
VAE_STEPS, DIFFUSION_STEPS = 600, 2000


def shuffle_llm(source, folder):
    """The language model with the numbers of each weight matrix in random order."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel())
        parameter.data = parameter.data.flatten()[order].view_as(parameter)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    model.save_pretrained(folder)


def token_states(llm, width):
    """A language model's tokenizer, and a state of `width` numbers for each of its V tokens.

    A token's state is its input embedding, less the mean, in a fixed random projection; all are as
    long as a connector's first conditions. Returns (tokenizer, (V, width)).
    """
    tokenizer = AutoTokenizer.from_pretrained(llm)
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    words = model.get_input_embeddings().weight.detach()  # (V, d)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(words.shape[1], width, generator=generator)
    projected = (words - words.mean(0)) @ projection  # (V, width)
    return tokenizer, SANA_GAIN * width**0.5 * F.normalize(projected, dim=-1)


def caption_states(captions, tokenizer, vectors):
    """States (B, L, width) of the captions' tokens, of `vectors` (V, width), and their mask (B, L).

    Every caption ends with the end token, so that an empty one has a state too.
    """
    texts = [caption + tokenizer.eos_token for caption in captions]
    rows = [vectors[ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)


def nearest(images, known):
    """The indices of `known` (F, 3, H, W), the nearest first, for each of `images` (B, 3, H, W).

    Returns (B, F). Images are near if the mean squared difference of their pixels is small;
    conditions, (F, c) and (B, c), likewise.
    """
    return torch.cdist(images.flatten(1), known.flatten(1)).argsort(1)


def share_right(images, known):
    """The share of images whose nearest of as many known ones is the one at their index.

    Flags that are the same image, as Chad's and Romania's are here, count as each other.
    """
    first = nearest(images, known)[:, 0]
    return (known[first] == known).flatten(1).all(1).float().mean().item()


def train_flag_vae(folder, pixels):
    """The toy VAE, fine-tuned to redraw flags (F, 3, H, W)."""
    vae = AutoencoderDC.from_pretrained(TINY / "diffusion" / "vae", torch_dtype=torch.float32)
    vae = vae.to(memory_format=torch.channels_last)
    run = Run(folder, VAE_STEPS, batch_size=32)

    def make(rng):
        return {"pixels": pixels[rng.choices(range(len(pixels)), k=run.batch_size)]}

    def loss_of(batch):
        return diffusion.redraw_loss(vae, batch["pixels"])

    def evaluate():
        redrawn = diffusion.redraw(vae, pixels)
        return {"redrawn flags nearest to themselves": share_right(redrawn, pixels)}

    fit("vae", [vae], make, loss_of, 1e-3, run, evaluate)
    return vae


def train_flag_diffusion(folder, vae, pixels):
    """The toy diffusion model, fine-tuned to generate flags by captions that name them.

    pixels: {country code: (3, H, W)}. Returns (diffusion model, VAE, scheduler).
    """
    sana = SanaTransformer2DModel.from_pretrained(
        TINY / "diffusion" / "transformer", torch_dtype=torch.float32
    )
    scheduler = DPMSolverMultistepScheduler.from_pretrained(TINY / "diffusion" / "scheduler")
    rows = dataset.questions(folder, "trained", "name")
    tokenizer, vectors = token_states(folder / LLM, sana.config.caption_channels)
    run = Run(folder, DIFFUSION_STEPS, batch_size=32)

    def make(rng):
        chosen = rng.choices(rows, k=run.batch_size)
        captions = ["" if rng.random() < 0.1 else row["text"] for row in chosen]
        states, mask = caption_states(captions, tokenizer, vectors)
        targets = torch.stack([pixels[code_of(row)] for row in chosen])
        return {"pixels": targets, "states": states, "mask": mask}

    def loss_of(batch):
        return diffusion.velocity_loss(sana, vae, batch["pixels"], batch["states"], batch["mask"])

    def evaluate():
        one_each = {code_of(row): row["text"] for row in rows}
        captions = [""] * len(pixels) + [one_each[code] for code in pixels]
        states, mask = caption_states(captions, tokenizer, vectors)
        images = to_pixels(diffusion.images_of_states(sana, vae, scheduler, states, mask), SIDE)
        return {"flags generated by name": share_right(images, torch.stack([*pixels.values()]))}

    fit("diffusion", [sana], make, loss_of, 1e-3, run, evaluate)
    return sana, vae, scheduler


def make_flags(folder):
    """Make all that the variants share in a folder, but for what is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / LLM / "config.json").exists():
        dataset.check_packages()
        dataset.write_flags(folder)
        dataset.write_llm(folder / LLM)
    if not (folder / SHUFFLED / "config.json").exists():
        shuffle_llm(folder / LLM, folder / SHUFFLED)

    images = dataset.flags(folder)
    pixels = dict(zip(images, to_pixels(images.values(), SIDE), strict=True))
    pipeline = folder / "diffusion"
    torch.manual_seed(0)
    if not (pipeline / "vae" / "config.json").exists():
        vae = train_flag_vae(folder, torch.stack([*pixels.values()]))
        vae.save_pretrained(pipeline / "vae")
    if not (pipeline / "model_index.json").exists():
        vae = AutoencoderDC.from_pretrained(pipeline / "vae").eval()
        diffusion.save_pipeline(pipeline, *train_flag_diffusion(folder, vae, pixels))
