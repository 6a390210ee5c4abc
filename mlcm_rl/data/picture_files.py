"""Reading picture files, always the same way: upright, 8 bits a channel, RGB, transparency on white.

All pictures are read here: captioned folders, real pictures, pair tables, `mlcm score`.
"""

import os
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..storage.untrusted import brief, path_inside, read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # decoded in this process; Pillow runs Ghostscript for some others
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MAX_PICTURE_BYTES = 2**28
MAX_PIXELS = 2**26  # 8192 x 8192; 200 MB as RGB
# Raised by Pillow's decoders for damaged files: UnidentifiedImageError is an OSError, a PNG's chunks raise SyntaxError.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def picture_in(folder: Path, name: str, where: str) -> Path:
    """Return the path of the picture `name` of a record at `where`. Raise ValueError if `folder` has no such file."""
    path = path_inside(folder, name, where)
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name too long for the file system
        raise ValueError(f"{where}: there is no picture {path if len(name) < 256 else brief(name)}")
    return path


def pictures_of(folder: Path) -> list[Path]:
    """Return the picture files in `folder`, sorted by name, without hidden ones: macOS writes `._x.png`.

    Dangling links and pipes are included, so that reading them raises an error instead of skipping them silently.
    """
    files = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in files if not path.is_dir())


def read_picture(source: Path | bytes, what: str) -> Image.Image:
    """Return the picture in a file or in bytes as 8-bit RGB, rotated by its EXIF and laid on white.

    An animation gives its first frame; 16-bit greys are scaled to 8 bits. Raise ValueError that begins with `what` if
    the picture cannot be read, has another format than FORMATS, or has more than MAX_PICTURE_BYTES or MAX_PIXELS: a
    file of a few bytes may need all of a machine's memory.
    """
    try:
        data = source if isinstance(source, bytes) else read_bytes(source, MAX_PICTURE_BYTES)
        with warnings.catch_warnings(
            action="ignore", category=Image.DecompressionBombWarning
        ):  # the limit here is lower
            image = Image.open(BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, over {MAX_PIXELS:,}")
        clear = _clear(image)  # before the pixels are decoded, which loses the depth of the file
        image.load()
        image.info |= {} if clear is None else {"transparency": clear}
        return _on_white(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{what} is not read: over {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:  # its own message is the address of an object
        raise ValueError(f"{what} is not a readable picture (none of {', '.join(FORMATS)}, or damaged)") from error
    except DECODING_ERRORS as error:
        raise ValueError(f"{what} is not a readable picture ({error})") from error


def pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as (3, H, W) uint8."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def square(image: Image.Image, side: int) -> Tensor:
    """Return the central square of an RGB image, resized (Lanczos), as (3, side, side) uint8."""
    return pixels(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))


def _clear(image: ImageFile.ImageFile) -> Any:
    """Return the transparent value of an opened image, on the scale of its decoded pixels.

    A PNG stores it at its own depth: greys of 2 and 4 bits are scaled to 8, and a colour of 16 bits has its upper 8.
    """
    clear, layout = image.info.get("transparency"), image.tile[0][3] if image.tile else ""
    if isinstance(clear, int) and layout in ("L;2", "L;4"):
        return clear * 255 // (2 ** int(layout[-1]) - 1)
    if isinstance(clear, tuple) and layout == "RGB;16B":
        return tuple(value >> 8 for value in clear)
    return clear


def _on_white(image: Image.Image) -> Image.Image:
    """Return a decoded image of any mode as RGB."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a 16-bit grey image as L, or as LA if one grey is transparent. Pillow would clip it at 255."""
    values = numpy.asarray(image).astype(numpy.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(numpy.uint8))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(numpy.where(values == clear, 0, 255).astype(numpy.uint8)))
    return grey
