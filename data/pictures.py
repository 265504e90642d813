"""Picture files in, as they look; grids of pictures out."""

import math
import warnings

import numpy as np
from PIL import Image, ImageOps


def open_picture(path):
    """The picture in a file, as PIL opens it; a ValueError of one line where there is none."""
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
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"picture {path} is broken ({error}): save it anew.") from None


def black(images):
    """Black pictures of the same sizes: the dropped picture condition (§5.2)."""
    return [[Image.new("RGB", picture.size) for picture in row] for row in images]


def grid(pictures, columns=None, gap=2):
    """Pictures side by side in one PIL picture, `gap` pixels apart, as square as they come."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    width, height = width + gap, height + gap
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def rgb(picture):
    """A PIL picture of any mode as RGB: upright, 8 bits, clear parts white, cut to 100 to 1."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    width, height = picture.size
    if max(width, height) > 100 * min(width, height):  # Qwen2.5-VL's processor refuses 200 to 1
        picture = ImageOps.fit(picture, (min(width, 100 * height), min(height, 100 * width)))
    return picture.convert("RGB")
