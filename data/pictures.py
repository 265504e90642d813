"""Picture files in, grids of pictures out."""

import math
import warnings

from PIL import Image


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
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"picture {path} is broken ({error}): save it again.") from None


def grid(pictures, columns=None, gap=2):
    """Pictures of one size in one PIL image, `gap` pixels apart, as square as possible."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = (side + gap for side in pictures[0].size)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
