"""Bodies that are not JSON, or hardly: rows 1 to 4 of rows.md."""

import zlib

import pytest
from hostile import (
    ANY_OR_REFUSED,
    ANYTHING,
    BASE,
    CHAT,
    EMBED,
    GOOD,
    INPUT,
    MODEL,
    PROMPT,
    RERANK,
    RESPONSES,
    TEXT,
    TEXTS,
    TOKENS,
    Case,
    Target,
    as_bytes,
    cases,
    chat,
    check,
    raw,
    slug,
    user,
)

BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "blank": b" \n",
    "open-object": b"{",
    "close-object": b"}",
    "open-list": b"[",
    "null": b"null",
    "true": b"true",
    "number": b"7",
    "string": b'"model"',
    "list": b"[]",
    "list-of-object": b"[" + as_bytes(BASE) + b"]",
    "no-value": b'{"model": }',
    "no-colon": b'{"model" "x"}',
    "single-quotes": b"{'model': 'x'}",
    "bare-keys": b'{model: "x"}',
    "trailing-comma": as_bytes(BASE)[:-1] + b",}",
    "comment": b"/* hello */" + as_bytes(BASE),
    "line-comment": as_bytes(BASE)[:-1] + b"// hello\n}",
    "two-objects": as_bytes(BASE) + as_bytes(BASE),
    "trailing-text": as_bytes(BASE) + b" hello",
    "trailing-nul": as_bytes(BASE) + b"\0",
    "leading-nul": b"\0" + as_bytes(BASE),
    "only-nul": b"\0" * 100,
    "nul-in-string": as_bytes(BASE).replace(b"Hello", b"He\0llo"),
    "newline-in-string": as_bytes(BASE).replace(b"Hello", b"He\nllo"),
    "escape-in-string": as_bytes(BASE).replace(b"Hello", b"He\\xllo"),
    "short-escape": as_bytes(BASE).replace(b"Hello", b"He\\u12"),
    "cut-off": as_bytes(BASE)[:-20],
    "number-with-zero": raw('"n": 01'),
    "number-with-plus": raw('"n": +1'),
    "number-with-point": raw('"temperature": .5'),
    "number-with-end": raw('"temperature": 5.'),
    "hexadecimal": raw('"n": 0x1'),
    "underscore": raw('"n": 1_0'),
    "undefined": raw('"n": undefined'),
    "python-true": raw('"stream": True'),
    "yaml": b"model: x\nmessages: []\n",
    "xml": b"<?xml version='1.0'?><model>x</model>",
    "form": b"model=x&messages=y",
    "gzip": zlib.compress(as_bytes(BASE)),
    "utf8-continuation": as_bytes(BASE).replace(b"Hello", b"\x80"),
    "utf8-overlong": as_bytes(BASE).replace(b"Hello", b"\xc0\xaf"),
    "utf8-cut": as_bytes(BASE).replace(b"Hello", b"\xe4\xb8"),
    "utf8-latin1": as_bytes(BASE).replace(b"Hello", b"caf\xe9"),
    "utf8-surrogate": as_bytes(BASE).replace(b"Hello", b"\xed\xa0\x80"),
    "utf8-surrogate-in-user": raw('"user": "x"').replace(b'"x"', b'"\xed\xa0\x80"'),
    "utf8-surrogate-in-unknown": raw('"foo": "x"').replace(b'"x"', b'"\xed\xa0\x80"'),
    "utf8-too-high": as_bytes(BASE).replace(b"Hello", b"\xf4\x90\x80\x80"),
    "utf8-ff": as_bytes(BASE).replace(b"Hello", b"\xff\xfe"),
    "utf8-in-key": raw('"x": 1').replace(b'"x"', b'"\xff"'),
}
ROW_1 = [Case(1, name, body, seconds=0.1) for name, body in BROKEN.items()]
ROW_1 += [
    Case(1, f"{slug(path)}-{name}", BROKEN[name], path=path, seconds=0.1)
    for path in (TEXT, RESPONSES, EMBED, RERANK, TOKENS, TEXTS, "/chat/completions")
    for name in ("nothing", "list", "cut-off", "utf8-ff", "leading-nul")
]

NO_NUMBERS = {
    "nan": "NaN",
    "infinity": "Infinity",
    "minus-infinity": "-Infinity",
    "1e999": "1e999",
    "minus-1e999": "-1e999",
    "5000-digits": "9" * 5000,
    "minus-5000-digits": "-" + "9" * 5000,
    "5000-decimals": "1" * 5000 + ".5",
}
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "n", "max_tokens", "seed", "top_k", "min_tokens")
ROW_2 = [
    Case(2, f"{name}-{kind}", raw(f'"{name}": {text}'), param=ANYTHING)
    for name in NUMBERS
    for kind, text in NO_NUMBERS.items()
]
ROW_2 += [
    Case(2, f"{place}-{kind}", raw(shape.format(NO_NUMBERS[kind])))
    for place, shape in {
        "logit_bias": '"logit_bias": {{"5": {}}}',
        "stop_token_ids": '"stop_token_ids": [{}]',
        "unknown": '"foo": {}',
        "unknown-deep": '"foo": {{"a": [{}]}}',
        "metadata": '"metadata": {{"a": {}}}',
        "tools": '"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {{"minimum": {}}}}}}}]',
    }.items()
    for kind in ("nan", "infinity", "minus-infinity", "5000-digits")
]
ROW_2 += [
    Case(
        2,
        f"responses-metadata-{kind}",
        as_bytes(INPUT)[:-1] + f', "metadata": {{"a": {text}}}}}'.encode(),
        path=RESPONSES,
    )
    for kind, text in NO_NUMBERS.items()
    if kind in ("nan", "infinity", "5000-digits")
]
ROW_2 += [
    Case(2, f"{slug(path)}-{kind}", as_bytes(GOOD[path])[:-1] + f', "{name}": {NO_NUMBERS[kind]}}}'.encode(), path=path)
    for path, name in ((EMBED, "dimensions"), (RERANK, "top_n"), (TEXT, "logprobs"), (TEXT, "best_of"))
    for kind in ("nan", "1e999", "5000-digits")
]

DEEP = 100_000
NESTED = {
    "lists": "[" * DEEP + "]" * DEEP,
    "objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "mixed": '[{"a":' * DEEP + "1" + "}]" * DEEP,
}
PLACES = (
    *("foo", "messages", "metadata", "tools", "tool_choice", "response_format", "chat_template_kwargs", "logit_bias"),
    *("stop", "stream_options", "guided_json", "structured_outputs", "prediction", "model", "temperature"),
)
ROW_3 = [
    Case(3, "200k-open-lists", b"[" * 200_000),
    Case(3, "200k-open-objects", b'{"a":' * 200_000),
    Case(3, "100k-closed-lists", NESTED["lists"].encode()),
    *(Case(3, f"{place}-{kind}", raw(f'"{place}": {text}')) for place in PLACES[:5] for kind, text in NESTED.items()),
    *(Case(3, f"{place}-lists", raw(f'"{place}": {NESTED["lists"]}')) for place in PLACES[5:]),
    *(
        Case(3, f"{place}-{depth}-levels", raw(f'"{place}": {"[" * depth + "]" * depth}'), ANY_OR_REFUSED)
        for place in PLACES
        for depth in (500, 960)
    ),
    *(
        Case(3, f"{place}-{depth}-objects", raw(f'"{place}": {{"a":' + '{"a":' * depth + "1" + "}" * (depth + 1)),
            ANY_OR_REFUSED)
        for place in ("metadata", "response_format", "guided_json", "logit_bias", "tool_choice")
        for depth in (90, 300, 960)
    ),
    *(
        Case(3, f"{slug(path)}-lists", as_bytes(GOOD[path])[:-1] + f', "foo": {NESTED["lists"]}}}'.encode(), path=path)
        for path in GOOD
    ),
    *(
        Case(3, f"responses-metadata-{depth}",
            as_bytes(INPUT)[:-1] + (', "metadata": {"a":' + "[" * depth + "]" * depth + "}}").encode(), ANY_OR_REFUSED,
            path=RESPONSES)
        for depth in (200, 300, 960)
    ),
    *(
        chat(3, f"calls-arguments-{depth}", ANY_OR_REFUSED,
            messages=[user("x"), {"role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f",
                    "arguments": "[" * depth + "]" * depth}}]}, user("y")])
        for depth in (60, 900, DEEP)
    ),
]  # fmt: skip

HALF = "\\ud800"
TOOL = '{"type": "function", "function": {"name": "f"}}'
CHOSEN = TOOL.replace('"f"', f'"{HALF}"')
WIDE = as_bytes(BASE).decode()
ROW_4 = [
    *(
        Case(4, f"half-{place}", text, ANY_OR_REFUSED | {401, 404}, path=path)
        for place, path, text in (
            ("content", CHAT, WIDE.replace("Hello", HALF).encode()),
            ("content-low", CHAT, WIDE.replace("Hello", "\\udfff").encode()),
            ("content-reversed", CHAT, WIDE.replace("Hello", "\\udc00\\ud800").encode()),
            ("role", CHAT, WIDE.replace("user", HALF).encode()),
            ("model", CHAT, WIDE.replace(MODEL, HALF).encode()),
            ("model-in-part", CHAT, WIDE.replace(MODEL, MODEL + HALF).encode()),
            ("provider", CHAT, WIDE.replace(MODEL, "openai/" + HALF).encode()),
            ("hub", CHAT, WIDE.replace(MODEL, "huggingface/" + HALF).encode()),
            ("name", CHAT, WIDE.replace('"role"', f'"name": "{HALF}", "role"').encode()),
            ("user", CHAT, raw(f'"user": "{HALF}"')),
            ("unknown-value", CHAT, raw(f'"foo": "{HALF}"')),
            ("unknown-key", CHAT, raw(f'"{HALF}": 1')),
            ("unknown-key-inside", CHAT, WIDE.replace('"role"', f'"{HALF}": 1, "role"').encode()),
            ("stop", CHAT, raw(f'"stop": "{HALF}"')),
            ("stops", CHAT, raw(f'"stop": ["a", "{HALF}"]')),
            ("bias", CHAT, raw(f'"logit_bias": {{"{HALF}": 1}}')),
            ("tool-name", CHAT, raw(f'"tools": [{{"type": "function", "function": {{"name": "{HALF}"}}}}]')),
            ("tool-text", CHAT, raw(f'"tools": [{TOOL[:-2]}, "description": "{HALF}"}}}}]')),
            ("tool-type", CHAT, raw(f'"tools": [{{"type": "{HALF}"}}]')),
            ("tool-choice", CHAT, raw(f'"tools": [{TOOL}], "tool_choice": "{HALF}"')),
            ("chosen-tool", CHAT, raw(f'"tools": [{TOOL}], "tool_choice": {CHOSEN}')),
            ("format", CHAT, raw(f'"response_format": {{"type": "{HALF}"}}')),
            ("schema", CHAT, raw(f'"guided_json": {{"const": "{HALF}"}}')),
            ("schema-key", CHAT, raw(f'"guided_json": {{"properties": {{"{HALF}": {{}}}}}}')),
            ("choice", CHAT, raw(f'"guided_choice": ["{HALF}"]')),
            ("regex", CHAT, raw(f'"guided_regex": "{HALF}"')),
            ("grammar", CHAT, raw(f'"guided_grammar": "start: \\"{HALF}\\""')),
            ("structured", CHAT, raw(f'"structured_outputs": {{"{HALF}": 1}}')),
            ("template", CHAT, raw(f'"chat_template_kwargs": {{"{HALF}": 1}}')),
            ("effort", CHAT, raw(f'"reasoning_effort": "{HALF}"')),
            ("metadata", CHAT, raw(f'"metadata": {{"{HALF}": "{HALF}"}}')),
            ("part-type", CHAT, WIDE.replace('"Hello"', f'[{{"type": "{HALF}"}}]').encode()),
            ("part-text", CHAT, WIDE.replace('"Hello"', f'[{{"type": "text", "text": "{HALF}"}}]').encode()),
            ("image", CHAT, WIDE.replace('"Hello"', f'[{{"type": "image_url", "image_url": "{HALF}"}}]').encode()),
            ("call", CHAT, WIDE.replace('"role": "user"',
                f'"role": "assistant", "tool_calls": [{{"id": "{HALF}", "function": {{"name": "{HALF}"}}}}]').encode()),
            ("prompt", TEXT, as_bytes(PROMPT).replace(b"Hello", HALF.encode())),
            ("prompts", TEXT, as_bytes({**PROMPT, "prompt": ["a", "HALF"]}).replace(b"HALF", HALF.encode())),
            ("suffix", TEXT, as_bytes({**PROMPT, "suffix": "HALF"}).replace(b"HALF", HALF.encode())),
            ("response", RESPONSES, as_bytes(INPUT).replace(b"Hello", HALF.encode())),
            ("response-metadata", RESPONSES, as_bytes({**INPUT, "metadata": {"a": "HALF"}}).replace(b"HALF",
                HALF.encode())),
            ("response-user", RESPONSES, as_bytes({**INPUT, "user": "HALF"}).replace(b"HALF", HALF.encode())),
            ("response-instructions", RESPONSES, as_bytes({**INPUT, "instructions": "HALF"}).replace(b"HALF",
                HALF.encode())),
            ("response-item-type", RESPONSES, as_bytes({**INPUT, "input": [{"type": "HALF"}]}).replace(b"HALF",
                HALF.encode())),
            ("response-tools", RESPONSES,
                as_bytes({**INPUT, "tools": [{"type": "function", "name": "f",
                    "description": "HALF"}]}).replace(b"HALF", HALF.encode())),
            ("tokenize", TOKENS, f'{{"prompt": "{HALF}"}}'.encode()),
            ("tokenize-messages", TOKENS, f'{{"messages": [{{"role": "user", "content": "{HALF}"}}]}}'.encode()),
            ("tokenize-model", TOKENS, f'{{"prompt": "x", "model": "{HALF}"}}'.encode()),
            ("embedding", EMBED, f'{{"model": "{HALF}", "input": "{HALF}"}}'.encode()),
            ("rerank", RERANK, f'{{"model": "{HALF}", "query": "x", "documents": ["{HALF}"]}}'.encode()),
        )
    ),
    *(
        Case(4, name, body, ANY_OR_REFUSED)
        for name, body in {
            "bom": b"\xef\xbb\xbf" + as_bytes(BASE),
            "two-boms": b"\xef\xbb\xbf" * 2 + as_bytes(BASE),
            "utf16": WIDE.encode("utf-16"),
            "utf16-le": WIDE.encode("utf-16-le"),
            "utf16-be": WIDE.encode("utf-16-be"),
            "utf16-cut": WIDE.encode("utf-16")[:-1],
            "utf16-half": WIDE.encode("utf-16-le").replace("e".encode("utf-16-le"), b"\x00\xd8"),
            "utf32": WIDE.encode("utf-32"),
            "utf32-too-high": WIDE.encode("utf-32-le").replace("e".encode("utf-32-le"), b"\xff\xff\xff\x7f"),
            "utf7": WIDE.encode("utf-7"),
            "nul-escaped": WIDE.replace("Hello", "\\u0000").encode(),
            "noncharacters": WIDE.replace("Hello", "\uffff\ufdd0\U0010ffff").encode(),
            "private-use": WIDE.replace("Hello", "\ue000\uf8ff\U000f0000").encode(),
            "directions": WIDE.replace("Hello", "\u202e\u2066\u200f\u200d").encode(),
            "combining": WIDE.replace("Hello", "e" + "\u0301" * 100).encode(),
            "escaped-pair": WIDE.replace("Hello", "\\ud83d\\ude00").encode(),
            "escaped-solidus": WIDE.replace("Hello", "a\\/b").encode(),
            "duplicate-model": raw(f'"model": "{MODEL}"'),
            "duplicate-messages": raw('"messages": []'),
            "duplicate-max-tokens": raw('"max_tokens": 1, "max_tokens": 2'),
            "duplicate-role": WIDE.replace('"role"', '"role": "system", "role"').encode(),
            "1000-duplicates": raw(", ".join(['"foo": 1'] * 1000)),
            "10000-unknown": raw(", ".join(f'"foo{i}": 1' for i in range(10_000))),
            "long-key": raw(f'"{"k" * 10**6}": 1'),
            "unicode-key": raw('"🙈\\u0000\\r\\nSet-Cookie: a=b": 1'),
            "colliding-keys": raw('"logit_bias": {' + ", ".join(f'"{i}": 0' for i in range(150)) + "}"),
            "negative-zero": raw('"temperature": -0.0'),
            "exponent": raw('"top_k": 1e0'),
            "tiny-number": raw('"temperature": 5e-324'),
        }.items()
    ),
    Case(4, "another-model-last", raw('"model": "nobody"'), frozenset({400, 404})),
]  # fmt: skip


@pytest.mark.parametrize("case", cases(ROW_1, ROW_2, ROW_3, ROW_4))
def test_a_hostile_request_gets_the_answer_that_it_must(targets: dict[bool, Target], case: Case) -> None:
    check(targets, case)
