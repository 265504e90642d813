"""How the notebooks show images and the results of extras.tables.

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
RESULTS = Path(__file__).parent.parent / "extras" / "tables" / "results"
SETTINGS = ("steps", "batch_size", "lr", "limit")  # flags of a table's command


def show(images, labels=(), columns=10, side=1.3):
    """Show PIL images in rows of `columns`, each with its label, if any, above it.

    side: an image's width in inches. Long labels take several lines.
    """
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    labels = ["\n".join(textwrap.wrap(str(label), int(18 * side))) for label in labels]
    lines = max((label.count("\n") for label in labels), default=0)
    size = (columns * side, rows * (side * 1.15 + 0.12 * lines))

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image)
    for axis, label in zip(axes.flat, labels, strict=False):
        axis.set_title(label, fontsize=7)
    figure.tight_layout(pad=0.3)

    # With 256 colours the notebook's file is a third as large.
    full, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(full, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
    Image.open(full).convert("RGB").quantize(256).save(reduced, "PNG", optimize=True)
    display(DisplayedImage(reduced.getvalue()))


def print_results(table, metrics):
    """Print some metrics of a table of extras.tables: mean ± spread over its seeds.

    The spread is the standard deviation over the seeds. Returns the table's variants, a dict,
    which is empty if there are no results; then the command that makes them is printed.
    """
    path = RESULTS / f"{table}.json"
    command = f"python -m extras.tables {table}"
    if not path.exists():
        print(f"no results yet; to make them: {command}")
        return {}

    result = json.loads(path.read_text())
    command += f" --seeds {len(result['seeds'])}"
    for name in SETTINGS:
        command += f" --{name.replace('_', '-')} {result['settings'][name]}"
    print(command)

    width = max(len(metric) for metric in metrics)
    width = max(width, len("0.00 ± 0.00"))
    print(" " * 16, *[f"{metric:>{width}}" for metric in metrics], sep="  ")
    for label, variant in result["variants"].items():
        cells = [f"{variant['mean'][m]:.2f} ± {variant['spread'][m]:.2f}" for m in metrics]
        print(f"{label:16}", *[f"{cell:>{width}}" for cell in cells], sep="  ")
    return result["variants"]


def show_results(table, metrics):
    """Print some metrics of a table of extras.tables, and show them as bars with their spread."""
    variants = print_results(table, metrics)
    if not variants:
        return

    width = 0.8 / len(variants)
    figure, axis = plt.subplots(figsize=(1.5 + 1.3 * len(metrics), 2.6))
    for number, (label, variant) in enumerate(variants.items()):
        places = [place + number * width for place in range(len(metrics))]
        means = [variant["mean"][metric] for metric in metrics]
        spreads = [variant["spread"][metric] for metric in metrics]
        axis.bar(places, means, width, yerr=spreads, capsize=2, label=label)

    ticks = [place + 0.4 - width / 2 for place in range(len(metrics))]
    axis.set_xticks(ticks, [metric.replace(", ", "\n") for metric in metrics], fontsize=8)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("share right")
    axis.legend(fontsize=7)
    plt.show()
