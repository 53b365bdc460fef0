"""Values of any kind for the tests that try anything."""

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from(["\ud800", "\x00", "\n"]), max_size=20)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63, 1e308, -0.0])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)


def json_of(words: str) -> st.SearchStrategy[Any]:
    """JSON whose keys, and many of its texts, are these words."""
    word = st.sampled_from(words.split())
    return st.recursive(
        SCALARS | word,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(word, inner, max_size=6),
        max_leaves=20,
    )


def object_of(words: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(words.split()), json_of(words), max_size=8)


def shaped(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these fields, each as it should be or as anything else."""
    return st.fixed_dictionaries({}, optional={name: value | JSON for name, value in fields.items()})


@st.composite
def splits(draw: st.DrawFn, whole: st.SearchStrategy[Any]) -> list[Any]:
    """A text or bytes in pieces, some of them empty perhaps."""
    text = draw(whole)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def mixed(pieces: Sequence[str], most: int = 12) -> st.SearchStrategy[str]:
    """Texts that a grammar's own marks are a large part of."""
    return st.lists(st.sampled_from(list(pieces)) | st.text(max_size=4), max_size=most).map("".join)


def allows(work: Callable[[], Any], *errors: type[Exception]) -> Any:
    """What it gives; None where it raises what it may."""
    try:
        return work()
    except errors:
        return None
