"""Decodes images: a file's bytes in, RGB pixels out. It knows neither HTTP nor models.

Sizes are read from the header before anything is decoded; formats are those of the OpenAI API and no others, since
Pillow knows some that run programs.
"""

import io
import warnings

from PIL import Image, ImageOps

from errors import InvalidRequest

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_BYTES = 20 * 2**20  # of one file
MAX_PIXELS = 50_000_000
MAX_SIDE = 20_000  # pixels
MAX_SCANS = 100  # of a progressive JPEG: each costs as much time as a whole image, and ten are usual
DRAFT_SIZE = (4096, 4096)  # pixels; a larger JPEG is decoded at a half, a quarter or an eighth of its size


def decode(data: bytes, param: str) -> Image.Image:
    """Returns the first frame, upright, opaque and in RGB; takes tens of milliseconds for a photograph.

    Raises InvalidRequest, which names `param` and reveals nothing of the process.
    """
    if len(data) > MAX_BYTES:
        raise too_large(param)
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise _invalid(f"The image has more than {MAX_SCANS} scans: save it as a baseline JPEG or as PNG.", param)
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise _invalid(
                    f"The image has more than {MAX_PIXELS} pixels, or a side of more than {MAX_SIDE} pixels.", param
                )
            image.draft("RGB", DRAFT_SIZE)
            image.load()
            return _opaque(_upright(image))
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow's decoders raise errors of any type
        raise _invalid("The image could not be decoded: send PNG, JPEG, WebP or GIF.", param) from error


def _upright(image: Image.Image) -> Image.Image:
    """Applies the camera's orientation."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the Exif data is broken, the image is not
        return image


def _opaque(image: Image.Image) -> Image.Image:
    """Returns the image in RGB, transparent parts on white as a web page shows them."""
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion cuts values off at 255
        return image.convert("I").point(lambda value: value / 257).convert("L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    page = Image.new("RGBA", colours.size, "white")
    page.alpha_composite(colours)
    return page.convert("RGB")


def too_large(param: str) -> InvalidRequest:
    return _invalid(f"The image is larger than {MAX_BYTES // 2**20} MiB: send a smaller one.", param)


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_image")
