"""Images: a file's bytes in, pixels that any model can take out. It knows neither HTTP nor models.

Sizes are read from the header before anything is decoded; formats are those of the OpenAI API and no others, since
Pillow knows some that run programs.
"""

import io
import warnings

from PIL import Image, ImageOps

from errors import InvalidRequest

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_BYTES = 20 * 2**20  # of a file
MAX_PIXELS = 50_000_000
MAX_SIDE = 20_000
MAX_SCANS = 100  # of a progressive JPEG, each of which costs as much as an image: the customary ones have ten
ENOUGH = (4096, 4096)  # a JPEG is decoded no larger than it has to be for these


def decode(data: bytes, param: str) -> Image.Image:
    """The first frame, upright, opaque and in RGB; tens of milliseconds for a photograph.

    Raises InvalidRequest with a text that tells nothing of the process.
    """
    if len(data) > MAX_BYTES:
        raise too_large(param)
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise _invalid(f"The image has more than {MAX_SCANS} scans.", param)
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise _invalid(
                    f"The image has more than {MAX_PIXELS} pixels, or a side of more than {MAX_SIDE} pixels.", param
                )
            image.draft("RGB", ENOUGH)
            image.load()
            return _opaque(_upright(image))
    except InvalidRequest:
        raise
    except Exception as error:  # decoders raise whatever they meet
        raise _invalid("The image could not be decoded: send PNG, JPEG, WebP or GIF.", param) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # what the camera noted is broken, the image is not
        return image


def _opaque(image: Image.Image) -> Image.Image:
    """On white, as a page shows it."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
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
