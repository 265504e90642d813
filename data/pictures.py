"""Picture files in, grids of pictures out."""

import math
import warnings

from PIL import Image


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


def grid(pictures, columns=None):
    """Pictures side by side in one PIL picture, two pixels apart, as square as they come."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + 2), i // columns * (height + 2)))
    return sheet
