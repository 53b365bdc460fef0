"""Fields, models and providers that nobody knows: rows 15 to 17 of rows.md."""

from typing import Any

import pytest
from hostile import (
    ANY_OR_REFUSED,
    BASE,
    EMBED,
    GOOD,
    LISTENER,
    MODEL,
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
    slug,
    user,
)

FOREIGN: dict[str, Any] = {
    "n_discard": -1,
    "n_keep": -5,
    "cache_prompt": True,
    "id_slot": -7,
    "slot_id": 10**9,
    "grammar": "root ::= 'x'",
    "json_schema": {"type": "nonsense"},
    "image_data": [{"data": "AAAA", "id": 1}],
    "prompt_logprobs": 10**9,
    "use_beam_search": True,
    "length_penalty": -1e9,
    "early_stopping": True,
    "num_beams": 10**6,
    "num_return_sequences": 10**6,
    "penalty_alpha": 1,
    "max_length": 10**9,
    "max_new_tokens": 10**9,
    "do_sample": True,
    "generation_config": '{"num_beams": 1000000}',
    "logits_processor": "os.system",
    "logits_processors": [{"qualname": "os.system", "args": ["true"]}],
    "trust_remote_code": True,
    "attn_implementation": "nonsense",
    "torch_dtype": "nonsense",
    "lora_path": "/etc/passwd",
    "adapter": "../../x",
    "documents": [{"title": "x", "text": "y"}],
    "mm_processor_kwargs": {"num_crops": 10**9},
    "allowed_token_ids": [10**9],
    "bad_words": ["x"],
    "truncate_prompt_tokens": -5,
    "priority": -(10**9),
    "request_id": "../../x",
    "kv_transfer_params": {"do_remote_decode": True},
    "return_hidden_states": True,
    "custom_params": {"x": 1},
    "typical_p": 0,
    "mirostat": 2,
    "dry_multiplier": -1,
    "xtc_probability": 2,
    "samplers": ["nonsense"],
    "t_max_predict_ms": -1,
    "best_of": 10**9,
    "suffix": "x",
    "echo": True,
    "prompt": "x" * 10_000,
    "images": ["AAAA"],
    "options": {"num_ctx": -1},
    "raw": True,
    "context": [10**9],
    "system": "x",
    "template": "{{ 7*7 }}",
    "self": 1,
    "cls": 1,
    "request": 1,
    "body": 1,
    "__class__": "x",
    "__dict__": {"model": "x"},
    "__init__": 1,
    "__pydantic_extra__": {"a": 1},
    "__proto__": {"stream": True},
    "constructor": {"prototype": {}},
    "model_config": {"extra": "forbid"},
    "model_fields": {},
    "model_extra": {"a": 1},
    "model_fields_set": ["audio"],
    "model_dump": 1,
    "support": 1,
    "stop_strings": ["x"],
    "num_logprobs": 5,
    "num_prompt_logprobs": 5,
    "refused_fields": ["model"],
    "ignored_fields": 5,
    "includes_usage": True,
    "thinks": True,
    "effort": 5,
    "_parts": 1,
    "_sent_fields": [],
    "model_construct": 1,
    "copy": 1,
    "dict": 1,
    "json": 1,
    "X-Ignored\r\nSet-Cookie: a=b": 1,
    "\u2028": 1,
    "": 1,
    " model": "x",
    "Model": "x",
    "ｍｏｄｅｌ": "x",
}
ROW_15 = [
    chat(15, f"{slug(name)}", ANY_OR_REFUSED, is_same=True, **({"messages": BASE["messages"]} | {name: value}))
    for name, value in FOREIGN.items()
    if name not in ("path", "code")
]
ROW_15 += [
    chat(15, f"message-{slug(name)}", ANY_OR_REFUSED, is_same=True, messages=[user("Hello", **{name: value})])
    for name, value in FOREIGN.items()
    if name in ("self", "__class__", "images", "model_extra", "_parts", "", "support")
]
ROW_15 += [
    chat(15, f"together-{slug(path)}", ANY_OR_REFUSED | {404}, path=path, **{"foo": 1, "bar": {"a": [1]},
        "__class__": 1})
    for path in GOOD
]  # fmt: skip

UNKNOWN_MODELS = {
    "empty": "",
    "blank": " ",
    "trailing-blank": MODEL + " ",
    "leading-blank": " " + MODEL,
    "dot": ".",
    "dots": "..",
    "passwd": "/etc/passwd",
    "root": "/",
    "relative": "../../../../etc/passwd",
    "relative-model": f"../{MODEL}",
    "through": f"x/../{MODEL}",
    "inside": f"{MODEL}/config.json",
    "slash": f"{MODEL}/",
    "two-slashes": f"//{MODEL}",
    "backslashes": "..\\..\\windows\\win.ini",
    "home": "~/.ssh/id_rsa",
    "variable": "$HOME",
    "command": "$(touch /tmp/x)",
    "backticks": "`id`",
    "pipe": "|id",
    "file-url": "file:///etc/passwd",
    "url": LISTENER + "/model",
    "url-upper": LISTENER.replace("http", "HTTP") + "/model",
    "s3": "s3://bucket/model",
    "git": "git+https://example.invalid/x",
    "unc": "\\\\127.0.0.1\\share",
    "hf": "hf://owner/name",
    "data": "data:text/plain,x",
    "nul": MODEL + "\0",
    "nul-first": "\0" + MODEL,
    "crlf": MODEL + "\r\nX-Evil: 1",
    "ansi": "\x1b[31mred\x1b[0m",
    "percent": "%2e%2e%2fetc%2fpasswd",
    "percent-n": "%s%s%s%n",
    "braces": "{self.__init__.__globals__}",
    "template": "{{ 7*7 }}",
    "jndi": "${jndi:ldap://127.0.0.1/x}",
    "sql": "' OR 1=1; DROP TABLE models;--",
    "html": "<script>alert(1)</script>",
    "fullwidth": "Ｔｉｎｙ-Ｑｗｅｎ３",
    "dotless": "tıny-qwen3",
    "zero-width": "Tiny\u200b-Qwen3",
    "override": "\u202eTiny-Qwen3",
    "combining": "Tiny-Qwen3\u0301",
    "10k": "m" * 10_000,
    "megabyte": "m" * 10**6,
    "megabyte-of-slashes": "/" * 10**6,
    "megabyte-of-dots": "../" * 300_000,
    "megabyte-of-escapes": "\\" * 10**6,
    "megabyte-of-quotes": '"' * 10**6,
    "emoji": "🤖" * 1000,
    "demo": "demo:nothing",
    "demo-path": "demo:../../x",
    "gguf": "/etc/passwd.gguf",
    "none": "None",
    "null": "null",
    "main": "main",
    "regex": ".*",
    "star": "*",
    "hub-traversal": "huggingface/../../etc/passwd",
    "hub-dots": "huggingface/a/..",
    "hub-nothing": "huggingface/",
    "hub-one-part": "huggingface/a b",
    "hub-three-parts": "huggingface/a/b/c",
    "hub-url": f"huggingface/{LISTENER}/x",
    "hub-at": "huggingface/a@b/c",
    "hub-query": "huggingface/a/b?x=y",
    "hub-fragment": "huggingface/a/b#c",
    "hub-nul": "huggingface/a/b\0",
    "hub-newline": "huggingface/a/b\n",
    "hub-megabyte": "huggingface/a/" + "/" * 10**6,
    "hub-percent": "huggingface/%2e%2e/x",
    "hub-backslash": "huggingface/a\\..\\b",
}
ROW_16 = [
    chat(16, f"{name}", {404}, "model", model=model, code="model_not_found") for name, model in UNKNOWN_MODELS.items()
]
ROW_16 += [
    chat(16, f"{slug(path)}-{name}", {404}, "model", path=path, model=UNKNOWN_MODELS[name], code="model_not_found")
    for path in (TEXT, RESPONSES, EMBED, RERANK, TOKENS, TEXTS)
    for name in (
        "empty",
        "passwd",
        "relative",
        "file-url",
        "url",
        "nul",
        "crlf",
        "megabyte",
        "hub-traversal",
        "hub-dots",
    )
]
ROW_16 += [
    chat(16, f"of-{slug(value)}", param="model", model=value) for value in (None, 5, 1.5, True, [], {}, [MODEL],
        {"id": MODEL})
]  # fmt: skip
ROW_16 += [Case(16, "missing", as_bytes({"messages": [user("x")]}), param="model")]
ROW_16 += [
    Case(16, f"get-{name}", b"", frozenset({404}), "model", "model_not_found", path=f"/v1/models/{quoted}",
        method="GET")
    for name, quoted in {
        "dots": "..%2f..%2fetc%2fpasswd", "plain-dots": "../../etc/passwd", "nul": "%00",
        "bad-utf8": "%ff%fe", "bad-percent": "%zz", "url": "http://127.0.0.1:1/x", "long": "m" * 20_000, "empty": "",
        "double": "%252e%252e%252f", "ansi": "%1b[31m", "half": "%ed%a0%80", "provider": "openai/x",
        "hub": "huggingface/a/b",
    }.items()
]  # fmt: skip

NO_KEY = frozenset({400, 401, 404})  # 401: as the gateway has it, with the name of what is not set
KEYLESS = ("openai/gpt-4", "gpt-4", "o1", "chatgpt-x", "claude/x", "gemini/x", "models/x", "deepseek/x", "minmax/x")
ROW_17 = [
    *(
        chat(17, f"unknown-{slug(model)}", {404}, "model", model=model, code="model_not_found")
        for model in ("mistral/x", "openai2/x", "OpenAI/x", "CLAUDE/x", "foo/bar", "/openai/x", "openai", "claude",
            " openai/x")
    ),
    *(chat(17, f"keyless-{slug(model)}", NO_KEY, model=model) for model in KEYLESS),
    *(chat(17, f"keyless-stream-{slug(model)}", NO_KEY, model=model, stream=True) for model in KEYLESS),
    *(chat(17, f"keyless-text-{slug(model)}", NO_KEY, path=TEXT, model=model) for model in KEYLESS),
    *(chat(17, f"keyless-embedding-{slug(model)}", NO_KEY, path=EMBED, model=model) for model in KEYLESS),
    *(
        chat(17, f"odd-{name}", NO_KEY, model=model)
        for name, model in {
            "nothing": "openai/", "slash": "openai//", "path": "openai/../../x", "url": f"openai/{LISTENER}",
            "at": "openai/@127.0.0.1",
            "crlf": "openai/x\r\nHost: evil", "long": "openai/" + "x" * 10**6, "models": "models/../../x",
            "gemini": "gemini-../x",
            "two": "openai/claude/x", "host": "claude/.evil.invalid", "query": "gemini/x?key=1", "nul": "openai/\0",
        }.items()
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", cases(ROW_15, ROW_16, ROW_17))
def test_a_hostile_request_gets_the_answer_that_it_must(targets: dict[bool, Target], case: Case) -> None:
    check(targets, case)
