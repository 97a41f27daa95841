"""Picture files of any kind as pixels, and pixels as pictures.

    x = pixels("photo.jpg")                      # float32 (H, W, 3) in [0, 1]: upright, on white
    as_picture(x).save("photo.png")              # Pillow's, of 8 bit

Copy this file alone: it needs numpy and pillow.
"""
import contextlib
import os
import stat
import warnings

import numpy as np
from PIL import Image, PngImagePlugin

# of what Pillow reads, what people have as pictures
FORMATS = {"AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA",
           "TIFF", "WEBP"}
SUFFIXES = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
TURNS = dict(zip((2, 4, 8, 3, 6, 5, 7), Image.Transpose))        # by the orientation of EXIF
BITS, MEANING, FORMAT = 258, 262, 339            # tags of TIFF
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY   # 64 MiB: a long note is no fault


def pixels(path):
    """A picture file of any mode and orientation: float32 (H, W, 3) in [0, 1].

    EXIF orientation is applied, transparency is laid on white, of an animation the first frame is
    taken, more than 89 megapixels are refused. One channel of 16 or 32 bits keeps its depth: white
    is the most that its bits can say, of floats 1. Raises FileNotFoundError, or ValueError
    naming the file where it is no picture.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no file")    # of a pipe nobody would say the end
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(path, formats=sorted(FORMATS & Image.OPEN.keys()))
        with file:
            file.load()
            turn = None
            with contextlib.suppress(Exception):       # a fault in its EXIF makes it no less one
                turn = TURNS.get(file.getexif().get(0x0112))
            image = file if turn is None else file.transpose(turn)
            if file.mode[0] in "IF":
                return deep(np.asarray(image), file.mode, getattr(file, "tag_v2", {}))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return np.asarray(image.convert("RGB"), np.float32) / 255
    except FileNotFoundError:
        raise
    except Exception as e:                       # of foreign bytes a reader may raise anything
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:100]
        raise ValueError(f"{path} is not a picture that can be read ({reason})") from e


def deep(values, mode, tags):
    """One channel (H, W) of Pillow's modes I* or F, with a TIFF's tags, as three of `pixels`."""
    x = values.astype(np.float64)
    if mode != "F":
        signed = tags.get(FORMAT, (1,))[0] == 2
        if not signed:
            x %= 2 ** 32                         # Pillow knows no 32 bits without a sign
        x /= 2 ** (tags.get(BITS, (16,))[0] - signed) - 1
    if not 0 <= x.min() <= x.max() <= 1:
        raise ValueError(f"its numbers are {x.min():g} to {x.max():g}, expected are 0 to 1")
    if tags.get(MEANING) == 0:                   # white is zero
        x = 1 - x
    return np.repeat(x.astype(np.float32)[..., None], 3, axis=2)


def as_picture(x):
    """(H, W, 3) in [0, 1] -> Pillow's, of 8 bit."""
    return Image.fromarray((np.clip(x, 0, 1) * 255).round().astype(np.uint8))
