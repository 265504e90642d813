"""How the notebooks show pictures, and results of benchmarks.

To be imported first: it silences progress bars and deprecation notes of libraries.
"""

import io
import json
import textwrap
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Image as DisplayedImage
from IPython.display import display
from PIL import Image

warnings.filterwarnings("ignore", message="IProgress not found")
from transformers.utils.logging import disable_progress_bar, set_verbosity_error  # noqa: E402

disable_progress_bar()
set_verbosity_error()
plt.rcParams["figure.dpi"] = 80
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def show(pictures, labels=(), columns=10, side=1.3):
    """Show PIL pictures in rows of `columns`, each with its label, if any, above it.

    `side` is a picture's width in inches. Long labels take several lines.
    """
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    labels = ["\n".join(textwrap.wrap(str(label), int(18 * side))) for label in labels]
    lines = max((label.count("\n") for label in labels), default=0)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * side, rows * (side * 1.15 + 0.12 * lines)), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture in zip(axes.flat, pictures, strict=False):
        axis.imshow(picture)
    for axis, label in zip(axes.flat, labels, strict=False):
        axis.set_title(label, fontsize=7)
    figure.tight_layout(pad=0.3)
    # With 256 colours the notebook's file is a third as large.
    drawn, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256).save(reduced, "PNG", optimize=True)
    display(DisplayedImage(reduced.getvalue()))


def show_results(table, names):
    """Draw some figures of a table of benchmarks.tables as bars, mean ± spread over seeds.

    If the table was not made yet, print the command that makes it.
    """
    path = RESULTS / f"{table}.json"
    command = f"python -m extras.tables {table}"
    if not path.exists():
        print(f"no results yet; to make them: {command}")
        return
    result = json.loads(path.read_text())
    settings = result["settings"]
    command += f" --seeds {len(result['seeds'])}"
    for name in ("steps", "batch_size", "lr", "limit"):
        command += f" --{name.replace('_', '-')} {settings[name]}"
    print(command)
    width = 0.8 / len(result["arms"])
    figure, axis = plt.subplots(figsize=(1.5 + 1.3 * len(names), 2.6))
    for number, (label, arm) in enumerate(result["arms"].items()):
        places = [place + number * width for place in range(len(names))]
        means = [arm["mean"][name] for name in names]
        spreads = [arm["spread"][name] for name in names]
        axis.bar(places, means, width, yerr=spreads, capsize=2, label=label)
    ticks = [place + 0.4 - width / 2 for place in range(len(names))]
    axis.set_xticks(ticks, [name.replace(", ", "\n") for name in names], fontsize=8)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("share right")
    axis.legend(fontsize=7)
    plt.show()
