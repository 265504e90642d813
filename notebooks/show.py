"""How the notebooks show pictures: a labelled grid. To be imported first: it silences bars."""

import warnings

import matplotlib.pyplot as plt

warnings.filterwarnings("ignore", message="IProgress not found")
from transformers.utils.logging import disable_progress_bar  # noqa: E402

disable_progress_bar()
plt.rcParams["figure.dpi"] = 80


def show(pictures, labels=(), columns=10, side=1.3):
    """Show PIL pictures in rows of `columns`, each with its label, if any, above it."""
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    _, axes = plt.subplots(rows, columns, figsize=(columns * side, rows * side * 1.15))
    axes = [axes] if rows * columns == 1 else axes.flat
    for axis in axes:
        axis.axis("off")
    for number, picture in enumerate(pictures):
        axes[number].imshow(picture)
        if number < len(labels):
            axes[number].set_title(str(labels[number]), fontsize=7)
    plt.tight_layout(pad=0.3)
    plt.show()
