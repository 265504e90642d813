"""What the queries look at inside the MLLM: attention maps, for the notebooks and for the page."""

import base64
import html
import io

import torch
from PIL import Image, ImageOps

from metaquery import InputError, clean_prompt, to_rgb

STYLE = """<style>.maps table, .maps tr, .maps th, .maps td {border: 0 !important}
.maps table {width: 100%; table-layout: fixed} .maps th {font: 12px system-ui; text-align: center}
.maps th, .maps td {padding: 1px 3px !important} .maps td {background-clip: content-box}
.maps h4 {margin: 14px 0 6px}
.maps div {display: grid; grid-template-columns: repeat(8, 1fr); gap: 6px}
.maps figure {margin: 0; font: 11px system-ui; text-align: center}
.maps img {width: 100%; margin: 0; border-radius: 4px}</style>"""
READING = """<p>Each row is a learnable query. The stronger the color, the more attention it pays to
the word, in the one head of the frozen MLLM whose queries differ most.</p>"""


@torch.no_grad()
def attention_maps(model, prompt, images=()):
    """How much each query takes from each prompt token, in each layer and head of the MLLM.

    images: a list of PIL images. Returns the attention weights (layers, heads, N, T), float32, and
    the prompt's T tokens as strings. A row's weights on the N queries, which this leaves out, make
    up its sum to 1.
    """
    inputs = model.format([prompt], [list(images)])
    tokens = model.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    language = model.mllm.base_model
    language = getattr(language, "language_model", language)  # without the vision tower
    maps, hooks = {}, []

    for number, layer in enumerate(language.layers):

        def keep(module, args, outputs, number=number):
            maps[number] = outputs[1]  # of the last call, which is the queries' pass

        hooks.append(layer.self_attn.register_forward_hook(keep))
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")  # faster kernels never hold the weights
    try:
        model.encode_inputs(inputs)
    finally:
        language.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()

    stacked = torch.cat([maps[number] for number in range(len(maps))])  # (layers, heads, N, T + N)
    return stacked[..., : len(tokens)].float(), tokens


def words_of(model, prompt, maps, tokens):
    """The user's words among the tokens of a chat: maps (layers, heads, N, words), and the words.

    maps, tokens: as of `attention_maps`.
    """
    end = len(tokens) - 1 - tokens[::-1].index("<|im_end|>")
    start = end - len(model.tokenizer.tokenize(prompt))
    string = model.tokenizer.convert_tokens_to_string
    words = [string([token]).strip() for token in tokens[start:end]]
    return maps[..., start:end], words


def information(maps):
    """What a place looked at tells about the query that looked, for each head of each layer.

    maps (layers, heads, N, places). Returns (layers, heads): the mutual information of query and
    place, times N. It is large where queries look at different places, and zero where all look
    at the same.
    """
    maps = maps.clamp(min=1e-9)
    mean = maps.mean(2, keepdim=True)  # over the queries
    return (maps * (maps / mean).log()).sum((2, 3))


def patch_maps(model, images, inputs, maps):
    """For each image the attention to its patches, (layers, heads, N, rows, columns).

    maps: the attention weights (layers, heads, N, T) to the prompt that `inputs` holds. Empty for
    MLLMs other than LLaVA-OneVision and Qwen2.5-VL, which lay patches out in other ways.
    """
    config = model.mllm.config
    vision = config.vision_config
    if "image_grid_thw" in inputs:  # Qwen2.5-VL makes one token of several patches
        grids = (inputs["image_grid_thw"][:, 1:] // vision.spatial_merge_size).tolist()
        gap = 0
    elif config.model_type == "llava_onevision":
        # A line break follows each image, and closer views a single one.
        grids = [[vision.image_size // vision.patch_size] * 2] * len(images)
        gap = 1
    else:
        return []

    is_patch = inputs["input_ids"][0] == config.image_token_id
    rest = maps[..., is_patch.to(maps.device)]
    found = []
    for rows, columns in grids:
        found.append(rest[..., : rows * columns].unflatten(-1, (rows, columns)))
        rest = rest[..., rows * columns + gap :]
    return found


def light_up(image, weights):
    """A PIL image, dark but for the patches with much weight (rows, columns)."""
    rows, columns = weights.shape
    size = (160, 160 * rows // columns)
    image = ImageOps.fit(to_rgb(image), size, Image.Resampling.NEAREST)  # as the MLLM crops it
    dark = Image.blend(image, Image.new("RGB", size, (30, 30, 60)), 0.85)
    light = Image.fromarray((255 * weights / weights.max()).byte().cpu().numpy())
    mask = light.resize(size, Image.Resampling.NEAREST)
    return Image.composite(image, dark, mask)


def best_head(scores):
    """(layer, head) of the largest of the scores (layers, heads)."""
    return divmod(scores.argmax().item(), scores.shape[1])


def word_table(maps, words, most):
    """HTML: the first `most` queries' attention to the words; maps (layers, heads, N, words)."""
    layer, head = best_head(information(maps))
    weights = maps[layer, head, :most]  # (queries, words)

    style = ""
    if len(words) > 8:
        style = "writing-mode: vertical-rl"
    cells = "".join(f"<th>{html.escape(word)}</th>" for word in words)
    page = f"<h4>Words that each query looks at (layer {layer}, head {head})</h4>{READING}"
    page += f'<table><tr style="{style}"><th></th>{cells}</tr>'
    for number, row in enumerate((weights / weights.max()).tolist()):
        cells = ""
        for word, weight in zip(words, row, strict=True):
            color = f"background-color: rgba(234, 88, 12, {weight:.2f})"
            cells += f'<td style="{color}" title="{html.escape(word)}: {weight:.2f}"></td>'
        page += f"<tr><th>query {number}</th>{cells}</tr>"
    return page + "</table>"


def look_inside(model, prompt, images=(), most=16):
    """HTML that shows what each of the first `most` queries looks at: words, and patches.

    It shows the heads whose queries look at the most different places. Raises InputError if the
    model has no queries.
    """
    if model.config.condition_on == "last_layer":
        raise InputError("this model has no queries: its condition is the MLLM's last layer.")
    prompt = clean_prompt(model.tokenizer, prompt)
    maps, tokens = attention_maps(model, prompt, images)  # (layers, heads, N, T)
    page = STYLE
    if prompt:
        page += word_table(*words_of(model, prompt, maps, tokens), most)

    found = []
    if images:
        inputs = model.format([prompt], [list(images)])
        found = patch_maps(model, images, inputs, maps)
    for image, patches in zip(images, found, strict=False):
        layer, head = best_head(information(patches.flatten(3)))
        page += f"<h4>Patches that each query looks at (layer {layer}, head {head})</h4><div>"
        for number, weights in enumerate(patches[layer, head, :most]):
            file = io.BytesIO()
            light_up(image, weights).save(file, "PNG")
            data = base64.b64encode(file.getvalue()).decode()
            image_tag = f'<img alt="" src="data:image/png;base64,{data}">'
            page += f"<figure>{image_tag}query {number}</figure>"
        page += "</div>"
    return f'<section class="maps">{page}</section>'


def read_out(states, labels, train):
    """How well labels can be read from states by a linear map: the share right on unseen rows.

    states (B, n); labels, B values of any kind. The first `train` rows fit the map, by least
    squares with a small penalty on its weights (ridge regression); the rest test it.
    """
    values = sorted(set(labels), key=str)
    classes = torch.tensor([values.index(label) for label in labels])  # (B,)
    wanted = torch.nn.functional.one_hot(classes).double()  # (B, values)
    x = states.double()
    x = (x - x[:train].mean(0)) / (x[:train].std(0) + 1e-6)  # (B, n)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # and a constant
    known, unseen = x[:train], x[train:]
    # The weights are Xᵀ(XXᵀ + λ)⁻¹Y: with fewer rows than columns this inverts the smaller matrix.
    penalty = 0.1 * train * torch.eye(train, dtype=x.dtype)
    solved = torch.linalg.solve(known @ known.T + penalty, wanted[:train])  # (train, values)
    guessed = (unseen @ (known.T @ solved)).argmax(-1)
    return (guessed == classes[train:]).double().mean().item()
