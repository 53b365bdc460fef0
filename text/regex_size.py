"""How large a regular expression is once its counts are written out: `(a{1000}){1000}` is 15 characters, and a million.

An automaton is about that large, and takes a few hundred bytes for each of them.
"""

import re

MAX_ADDED = 50_000  # characters that counts may add
_PART = re.compile(r"\\.|\[(?:[^\]\\]|\\.){0,64}+\]|\{(\d{1,18})(?:,(\d{0,18}))?\}|.", re.DOTALL)


def expanded_size(text: str) -> int:
    """Returns the size in characters of a regular expression, or a grammar, which repeats in the same way."""
    sizes, last = [0], 0  # of the groups that are open, and of what a count would repeat
    for match in _PART.finditer(text):
        part = match[0]
        if match[1]:
            times = max(int(match[1]), int(match[2] or 0), 1)
            sizes[-1] += last * (times - 1)
            last *= times
        elif part == "(":
            sizes.append(0)
            last = 0
        elif part == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif part not in "*+?":
            last = 1
            sizes[-1] += 1
    return sum(sizes)


def is_too_large(text: str) -> bool:
    return expanded_size(text) > MAX_ADDED + len(text)
