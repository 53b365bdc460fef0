"""Whatever clients send as an image becomes upright, opaque RGB, or a 400 with a fixed text."""

import io
import itertools
import random
import struct
import zlib
from typing import Any

import pytest
from PIL import Image, ImageOps

from errors import InvalidRequest
from serving import image_decoder

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Red, but green at the top left and blue at the bottom right."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (0, 0, size[0] // 4, size[1] // 4))
    image.paste(BLUE, (3 * size[0] // 4, 3 * size[1] // 4, *size))
    return image


def data_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def is_near(one: Any, other: tuple[int, int, int], limit: int = 40) -> bool:
    return all(abs(a - b) <= limit for a, b in zip(one, other, strict=True))


def has_mode(kind: str, mode: str) -> bool:
    """Whether a file of that format can be written so."""
    try:
        return bool(data_of(picture().convert(mode), kind))
    except (OSError, ValueError):
        return False


FORMATS = list(itertools.product(image_decoder.IMAGE_FORMATS, ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "PA"]))


@pytest.mark.parametrize(("kind", "mode"), [pair for pair in FORMATS if has_mode(*pair)])
def test_every_format_and_mode_becomes_rgb(kind: str, mode: str) -> None:
    image = image_decoder.decode(data_of(picture().convert(mode), kind), "p")
    assert image.mode == "RGB" and image.size == (40, 20)
    if mode in ("RGB", "P", "RGBA", "CMYK"):
        assert is_near(image.getpixel((2, 2)), GREEN, 90) and is_near(image.getpixel((38, 18)), BLUE, 90)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright(orientation: int) -> None:
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = picture() if orientation == 1 else picture().transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = image_decoder.decode(data_of(stored, "JPEG", exif=exif, quality=95), "p")
    reference = Image.open(io.BytesIO(data_of(stored, "JPEG", exif=exif, quality=95)))
    assert shown.tobytes() == ImageOps.exif_transpose(reference).convert("RGB").tobytes()
    assert shown.size == (40, 20) and is_near(shown.getpixel((2, 2)), GREEN) and is_near(shown.getpixel((37, 17)), BLUE)


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.putpixel((1, 1), (*BLUE, 255))
    image.putpixel((2, 2), (0, 0, 0, 128))
    shown = image_decoder.decode(data_of(image, "PNG"), "p")
    assert shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((1, 1)) == BLUE
    assert is_near(shown.getpixel((2, 2)), (127, 127, 127), 2)
    indexed = Image.new("P", (4, 4))
    indexed.putpalette([200, 0, 0, 0, 0, 200])
    assert image_decoder.decode(data_of(indexed, "PNG", transparency=0), "p").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_an_image_whose_camera_noted_nonsense_is_an_image(kind: str) -> None:
    assert image_decoder.decode(data_of(picture(), kind, exif=b"garbage!"), "p").size == (40, 20)


def test_a_progressive_photograph_is_an_image() -> None:
    assert image_decoder.decode(data_of(picture((300, 200)), "JPEG", progressive=True), "p").size == (300, 200)


def test_sixteen_bits_keep_their_range() -> None:
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 32768, 65535)):
        image.putpixel((x, 0), value)
    shown = image_decoder.decode(data_of(image, "PNG"), "p")
    assert [shown.getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


def test_one_pixel_and_long_strips_are_images() -> None:
    for size in ((1, 1), (1, 20000), (20000, 1)):
        assert image_decoder.decode(data_of(Image.new("RGB", size, RED), "PNG"), "p").size == size


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("P", (5, 5), number) for number in range(3)]
    for number, frame in enumerate(frames):
        frame.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
        frame.paste(number, (0, 0, 5, 5))
    data = data_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert image_decoder.decode(data, "p").getpixel((2, 2)) == (250, 0, 0)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is as large as that, of a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again; each costs as much as an image."""
    data = data_of(picture((64, 64)).convert("L"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


BAD = {
    "many scans": many_scans(200),
    "nothing": b"",
    "text": b"hello",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "pdf": b"%PDF-1.4\n",
    "bmp": data_of(picture(), "BMP"),
    "tiff": data_of(picture(), "TIFF"),
    "ppm": data_of(picture(), "PPM"),
    "cut png": data_of(picture((400, 400)), "PNG")[:200],
    "cut jpeg": data_of(picture((400, 400)), "JPEG")[:300],
    "50k x 50k": bomb(50_000, 50_000),
    "13k x 13k": bomb(13_000, 13_000),
    "a strip too long": bomb(30_000, 1),
    "too many bytes": b"\x89PNG\r\n\x1a\n" + b"\0" * (image_decoder.MAX_BYTES + 1),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused_with_a_fixed_text(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        image_decoder.decode(BAD[name], "messages[0].content[1]")
    assert refused.value.status == 400 and refused.value.param == "messages[0].content[1]"
    assert "0x" not in refused.value.message and "BytesIO" not in refused.value.message


@pytest.mark.parametrize("seed", range(60))
def test_broken_files_never_raise_anything_else(seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(data_of(picture((64, 64)), rng.choice(["PNG", "JPEG", "WEBP", "GIF"])))
    for _ in range(rng.randrange(1, 20)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        image_decoder.decode(bytes(data), "p")
    except InvalidRequest as refused:
        assert refused.code == "invalid_image"
