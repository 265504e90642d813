"""Picture files in, grids of pictures out."""

import errno
import math
import warnings
from pathlib import Path

from PIL import Image, PngImagePlugin

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}  # of the picture files in a folder
GAP_COLOR = (190, 190, 190)  # between the pictures of a grid: seen beside white and black


def open_picture(path):
    """The picture in a file, as PIL opens it; raises ValueError with one line if there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path)
            picture.load()
            return picture
    except FileNotFoundError:
        raise ValueError(f"there is no picture {path}: name a file that exists.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
        raise ValueError(f"picture {path} has over {most}: make it smaller.") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture: name a PNG, JPEG or WebP file.") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: name a picture file in it.") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link to itself: name a picture file.") from None
        raise ValueError(f"picture {path} is broken ({error}): save it again.") from None
    except (SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"picture {path} is broken ({error}): save it again.") from None


def grid(pictures, columns=None, gap=2):
    """Pictures of one size in one PIL image, `gap` pixels apart, as square as possible."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = (side + gap for side in pictures[0].size)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), GAP_COLOR)
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def save_picture(picture, path, **notes):
    """Save a PIL image under a path, whole or not at all: a full disk spares the file there.

    Makes the folder. notes: texts that a PNG file carries, such as prompt="a red star".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    kind = Image.registered_extensions()[path.suffix.lower()]
    options = {"quality": 95} if kind == "JPEG" else {}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for name, text in notes.items():
            options["pnginfo"].add_itxt(name, str(text))
    try:
        picture.save(aside, kind, **options)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
