"""Draw the diagram of the method: an SVG file that reads on a light and on a dark page.

python -m notebooks.diagram notebooks/method.svg
"""

import sys
from pathlib import Path

FROZEN, TRAINED, LINE = "#5b8def", "#e8833a", "#888888"
STYLE = f"""<style>
text {{ font: 15px sans-serif; fill: #222; text-anchor: middle }}
.small {{ font-size: 12.5px }}
.box {{ rx: 8; stroke-width: 2; fill-opacity: 0.13 }}
.frozen {{ fill: {FROZEN}; stroke: {FROZEN} }}
.trained {{ fill: {TRAINED}; stroke: {TRAINED} }}
.token {{ rx: 3; stroke-width: 1.5; fill-opacity: 0.3 }}
.arrow {{ stroke: {LINE}; stroke-width: 2; fill: none; marker-end: url(#head) }}
.gradient {{ stroke: {TRAINED}; stroke-width: 2; fill: none; stroke-dasharray: 5 4;
  marker-end: url(#gradient-head) }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #eee }} }}
</style>
<defs>
<marker id="head" markerWidth="7" markerHeight="7" refX="5" refY="3" orient="auto">
<path d="M0,0 L6,3 L0,6 z" fill="{LINE}"/></marker>
<marker id="gradient-head" markerWidth="7" markerHeight="7" refX="5" refY="3" orient="auto">
<path d="M0,0 L6,3 L0,6 z" fill="{TRAINED}"/></marker>
</defs>"""


def box(kind, x, y, width, height, *lines):
    """A box with centred lines of text, the first in full size."""
    parts = [f'<rect class="box {kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>']
    top = y + height / 2 + 5 - 9 * (len(lines) - 1)
    for number, line in enumerate(lines):
        size = "" if number == 0 else ' class="small"'
        parts.append(f'<text{size} x="{x + width / 2}" y="{top + 18 * number}">{line}</text>')
    return parts


def label(x, y, text):
    return [f'<text class="small" x="{x}" y="{y}">{text}</text>']


def tokens(kind, x, y, number):
    """A row of small squares: one for each token."""
    square = '<rect class="token {}" x="{}" y="{}" width="18" height="18"/>'
    return [square.format(kind, x + 24 * i, y) for i in range(number)]


def path(kind, *points):
    """A line through points (x, y) with an arrow at its end."""
    return [f'<path class="{kind}" d="M{" L".join(f"{x},{y}" for x, y in points)}"/>']


def draw():
    """The diagram as the text of an SVG file."""
    parts = [STYLE]
    # What goes in: prompt tokens and queries.
    parts += label(160, 30, "system prompt, pictures, text, “assistant:”")
    parts += tokens("frozen", 56, 44, 9)
    parts += label(430, 30, "N learnable queries")
    parts += tokens("trained", 352, 44, 6)
    parts += path("arrow", (160, 68), (160, 98)) + path("arrow", (420, 68), (420, 98))
    # The MLLM and its two passes.
    parts += box("frozen", 30, 102, 500, 116, "")
    parts += ['<text x="280" y="128">multimodal LLM: no weight changes, causal mask</text>']
    parts += box("frozen", 50, 144, 200, 58, "pass 1: the prompt", "without gradient")
    parts += box("frozen", 310, 144, 200, 58, "pass 2: the queries", "with gradient")
    parts += path("arrow", (252, 166), (306, 166)) + label(280, 184, "keys,")
    parts += label(280, 198, "values")
    # What comes out.
    parts += path("arrow", (420, 220), (420, 250)) + label(330, 242, "last hidden states (N, d)")
    parts += box("trained", 310, 254, 220, 50, "connector", "transformer that looks both ways")
    parts += path("arrow", (420, 306), (420, 338)) + label(352, 328, "condition (N, c)")
    parts += box("trained", 310, 342, 220, 50, "diffusion model", "Sana, or Stable Diffusion")
    parts += label(70, 371, "noise") + path("arrow", (100, 366), (304, 366))
    parts += path("arrow", (532, 374), (572, 374))
    parts += box("frozen", 576, 342, 96, 50, "VAE", "decoder")
    parts += path("arrow", (674, 374), (706, 374))
    parts += label(738, 378, "picture")
    # Where gradient goes: back through every part, to the queries.
    for start, end in ((340, 308), (252, 206), (142, 68)):
        parts += path("gradient", (476, start), (476, end))
    parts += label(640, 162, "gradient of the loss:")
    parts += label(640, 180, "through the diffusion model,")
    parts += label(640, 198, "the connector and the frozen")
    parts += label(640, 216, "LLM, to the queries")
    # The key.
    parts += tokens("frozen", 40, 268, 1) + label(114, 282, "weights frozen")
    parts += tokens("trained", 40, 296, 1) + label(94, 310, "trained")
    parts += path("gradient", (34, 330), (62, 330)) + label(98, 334, "gradient")
    size = 'width="790" height="410" viewBox="0 0 790 410"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
