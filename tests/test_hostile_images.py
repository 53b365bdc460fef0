"""Images from elsewhere, broken ones and bombs: rows 29 to 38 of rows.md."""

import struct
import zlib

import pytest
from hostile import (
    ANY_OR_REFUSED,
    ANYTHING,
    LISTENER,
    RESPONSES,
    SEEING,
    TEXT,
    TOKENS,
    Case,
    Target,
    cases,
    chat,
    check,
    data_url,
    image_part,
    picture,
    png,
    sees,
    slug,
    user,
)
from raw_http import bounded_peak

INSIDE = {
    "loopback": "127.0.0.1", "loopback-other": "127.1.2.3", "localhost": "localhost", "localhost-dot": "localhost.",
    "short": "127.1", "decimal": "2130706433", "hex": "0x7f000001", "octal": "0177.0.0.1", "hex-parts": "0x7f.0.0.1",
    "zero": "0",
    "zeros": "0.0.0.0", "v6": "[::1]", "v6-any": "[::]", "mapped": "[::ffff:127.0.0.1]",
    "mapped-hex": "[::ffff:7f00:1]",
    "private": "10.0.0.1", "private-172": "172.16.0.1", "private-192": "192.168.0.1", "metadata": "169.254.169.254",
    "cgnat": "100.64.0.1",
    "multicast": "224.0.0.1", "ula": "[fd00::1]", "link-local-6": "[fe80::1]", "nat64": "[64:ff9b::7f00:1]",
    "6to4": "[2002:7f00:1::]",
    "broadcast": "255.255.255.255", "benchmark": "198.18.0.1", "documentation": "192.0.2.1",
}  # fmt: skip
TRICKS = {
    "backslash": "http://example.com\\@127.0.0.1:{port}/a.png", "userinfo": "http://example.com@127.0.0.1:{port}/a.png",
    "fragment-at": "http://example.com#@127.0.0.1:{port}/a.png", "tab": "http://127.0.\t0.1:{port}/a.png",
    "newline": "http://127.0.0.1\r\n:{port}/a.png", "leading": " http://127.0.0.1:{port}/a.png",
    "fullwidth": "http://１２７.0.0.1:{port}/a.png", "circled": "http://①②⑦.⓪.⓪.①:{port}/a.png",
    "dots": "http://127。0。0。1:{port}/a.png",
    "zone": "http://[fe80::1%25lo]:{port}/a.png", "nul": "http://127.0.0.1\0.example.com:{port}/a.png",
    "no-slashes": "http:127.0.0.1:{port}/a.png",
    "one-slash": "http:/127.0.0.1:{port}/a.png", "three": "http:///127.0.0.1:{port}/a.png",
    "crlf": "http://127.0.0.1:{port}/a.png\r\nX: y",
    "percent": "http://%31%32%37.0.0.1:{port}/a.png", "port": "http://127.0.0.1:99999/a.png",
    "long": "http://" + "a" * 10**5 + "/",
    "many-dots": "http://" + "a." * 10**4 + "b/", "no-host": "http://", "only-port": "http://:{port}/",
    "capitals": "HTTP://LOCALHOST:{port}/a.png",
}  # fmt: skip
UNKNOWN = ("localhost-dot", "octal")  # names that this machine's resolver may not know
ROW_29 = [
    sees(29, name, f"http://{host}:{{port}}/a.png", code=ANYTHING if name in UNKNOWN else "invalid_image_url")
    for name, host in INSIDE.items()
]
ROW_29 += [sees(29, "https", "https://127.0.0.1:{port}/a.png", code="invalid_image_url")]
ROW_30 = [sees(30, name, url) for name, url in TRICKS.items()]
SCHEMES = (
    *(
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "FILE:///dev/zero",
        "/etc/passwd",
        "/dev/zero",
        "../../etc/passwd",
    ),
    *(
        "gopher://127.0.0.1:{port}/x",
        "ftp://127.0.0.1:{port}/x",
        "unix:///var/run/docker.sock",
        "http+unix://x/",
        "jar:http://x!/",
    ),
    *(
        "javascript:alert(1)",
        "blob:http://127.0.0.1/x",
        "ws://127.0.0.1:{port}/",
        "dict://127.0.0.1:{port}/",
        "ldap://127.0.0.1:{port}/",
    ),
    *(
        "",
        "x",
        ":",
        "://",
        "data",
        "data:",
        "data:,",
        "data:image/png;base64,",
        "data:image/png;base64,!!!",
        "data:text/html,<b>x</b>",
    ),
    *(
        "data:image/png",
        "data:video/jpeg;base64," + "AAAA," * 10_000,
        "about:blank",
        "\0",
        "http",
        "https://",
        "~/x.png",
        "C:\\x.png",
    ),
)
ROW_32 = [sees(32, f"{number}-{slug(url)}", url) for number, url in enumerate(SCHEMES)]
ROW_32 += [sees(32, f"of-{slug(value)}", value) for value in (None, 5, [], {}, True)]


def gif(width: int, height: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, width, height) + b"\x00\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0\0\0\0\xff\xff\xff" + frame * 50 + b";"


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
BROKEN_IMAGES: dict[str, bytes] = {
    "nothing": b"", "text": b"hello", "html": b"<html><img src=x></html>", "svg": SVG,
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pdf": b"%PDF-1.7\n1 0 obj<<>>endobj", "pickle": b"\x80\x04\x95\x05\0\0\0\0\0\0\0\x8c\x01x\x94.",
    "elf": b"\x7fELF" + b"\0" * 100, "zip": b"PK\x03\x04" + b"\0" * 100,
    "bmp": picture("BMP"), "tiff": picture("TIFF"), "ppm": picture("PPM"), "ico": picture("ICO"),
    "jpeg2000": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 100,
    "psd": b"8BPS\0\x01" + b"\0" * 100, "dds": b"DDS |" + b"\0" * 200, "png-cut": picture("PNG")[:40],
    "png-head": picture("PNG")[:8],
    "jpeg-head": picture("JPEG")[:20], "jpeg-magic": b"\xff\xd8\xff", "gif-cut": picture("GIF")[:20],
    "webp-cut": picture("WEBP")[:20],
    "png-no-pixels": png(10, 10), "png-zero": png(0, 0),
    "png-bad-crc": picture("PNG")[:29] + b"\0\0\0\0" + picture("PNG")[33:],
    "png-trailing-svg": picture("PNG")[:50] + SVG, "jpeg-named-png": b"\xff\xd8\xff\xe0" + picture("PNG"),
    "mp4": b"\0\0\0\x18ftypmp42" + b"\0" * 50,
    "avif": b"\0\0\0\x18ftypavif" + b"\0" * 50, "riff": b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 30,
    "zeros": b"\0" * 10**6, "gif-no-frame": b"GIF89a" + b"\0" * 10,
}  # fmt: skip
BOMB_IMAGES: dict[str, bytes] = {
    "png-50k": png(50_000, 50_000), "png-13k": png(13_000, 13_000), "png-max": png(2**31 - 1, 2**31 - 1),
    "png-thin": png(1, 2**31 - 1),
    "png-negative": png(2**32 - 1, 2**32 - 1), "png-8k-real": png(8000, 8000, pixels=bytes(8000 * 24_001)),
    "gif-65k": gif(65_535, 65_535),
    "webp-16k": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0" + b"\0" * 8,
    "jpeg-65k": picture("JPEG").replace(b"\xff\xc0\x00\x11\x08\x00\x1e\x00\x28",
        b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff"),
    "png-ztxt": png(50_000, 50_000, (b"zTXt", b"x\0\0" + zlib.compress(bytes(50_000_000), 9))),
    "png-iccp": png(50_000, 50_000, (b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000), 9))),
}  # fmt: skip
TEXT_BOMBS = {
    "ztxt": png(4, 4, (b"zTXt", b"x\0\0" + zlib.compress(bytes(50_000_000), 9)), pixels=bytes(52)),
    "iccp": png(4, 4, (b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000), 9)), pixels=bytes(52)),
    "itxt": png(4, 4, (b"iTXt", b"x\0\1\0\0\0" + zlib.compress(bytes(50_000_000), 9)), pixels=bytes(52)),
    "many-ztxt": png(4, 4, *[(b"zTXt", b"x\0\0" + zlib.compress(bytes(900_000), 9))] * 200, pixels=bytes(52)),
}
ROW_34 = [sees(34, name, data_url(data), code="invalid_image") for name, data in BROKEN_IMAGES.items() if data]
ROW_34 += [
    sees(34, f"named-{kind}", data_url(b"hello", kind)) for kind in ("svg+xml", "x-eps", "../../x", "png;x=y", "jpeg")
]
ROW_35 = [sees(35, name, data_url(data), code="invalid_image") for name, data in BOMB_IMAGES.items()]
ROW_35 += [sees(35, f"small-{name}", data_url(data), ANY_OR_REFUSED) for name, data in TEXT_BOMBS.items()]
ODD_SETTINGS = ((1, 1), (1, 20_000), (20_000, 1), (2, 1), (1, 3000), (1, 20_001), (7, 5000))
ROW_36 = [
    *(sees(36, f"{w}x{h}", data_url(picture("PNG", (w, h))), ANY_OR_REFUSED, seconds=10) for w, h in ODD_SETTINGS),
    *(
        sees(36, f"{count}-images", "", param=ANYTHING, messages=image_part(data_url(picture("PNG"))) * count)
        for count in (17, 1000)
    ),
    sees(36, "17-in-one", "", param=ANYTHING,
        messages=[user([image_part(data_url(picture("PNG")))[0]["content"][0]] * 17)]),
]  # fmt: skip
ROW_37 = [
    chat(37, name, param="messages[0].content[0]", messages=image_part(url))
    for name, url in {
        "listener": LISTENER + "/a.png", "data": data_url(picture("PNG")), "file": "file:///etc/passwd", "empty": "",
        "broken": "data:,",
    }.items()
]  # fmt: skip
ROW_37 += [
    chat(37, "string", messages=[user([{"type": "image_url", "image_url": LISTENER + "/a.png"}])]),
    chat(37, "own-key", messages=[user([{"type": "image", "image": LISTENER + "/a.png"}])]),
    chat(37, "url-key", messages=[user([{"type": "image", "url": LISTENER + "/a.png"}])]),
    chat(37, "input-image", messages=[user([{"type": "input_image", "image_url": LISTENER + "/a.png"}])]),
    chat(37, "response", path=RESPONSES, input=[user([{"type": "input_image", "image_url": LISTENER + "/a.png"}])]),
    chat(37, "tool-result", messages=[user("x"), {"role": "tool", "tool_call_id": "1",
        "content": image_part(LISTENER)[0]["content"]}]),
    chat(37, "stream", messages=image_part(LISTENER + "/a.png"), stream=True),
    chat(37, "tokenize", path=TOKENS, prompt=None, messages=image_part(LISTENER + "/a.png")),
]  # fmt: skip
LINKS = (
    "![x]({}/a.png)",
    "![]({}/a.png)What?",
    "<img src='{}/a.png'>",
    "[x]: {}/a.png",
    "{}/a.png",
    "@{}/a.png",
    "<image>{}/a.png</image>",
)
ROW_38 = [
    chat(38, f"link-{number}", {200}, messages=[user(text.format(LISTENER))]) for number, text in enumerate(LINKS)
]
ROW_38 += [chat(38, f"seen-link-{number}", {200}, model=SEEING, sees=True, messages=[user(text.format(LISTENER))])
    for number, text in enumerate(LINKS)]  # fmt: skip
ROW_38 += [chat(38, "text-link", {200}, path=TEXT, prompt=LINKS[0].format(LISTENER))]


@pytest.mark.parametrize("case", cases(ROW_29, ROW_30, ROW_32, ROW_34, ROW_35, ROW_36, ROW_37, ROW_38))
def test_a_hostile_request_gets_the_answer_that_it_must(targets: dict[bool, Target], case: Case) -> None:
    check(targets, case)


def test_pixel_bombs_take_no_memory_row35(targets: dict[bool, Target]) -> None:
    with bounded_peak(targets[True].server, 100 * 2**20):
        for case in ROW_35:
            targets[True].ask(case)
