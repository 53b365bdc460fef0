"""A tokenizer's chat template: the text of one, or several by name."""

from typing import Any

DEFAULT_NAMES = ("default", "chat")  # of the template for conversations


def source_of(template: Any) -> str:
    """Returns the text of all templates: a tokenizer can have several."""
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def chosen(template: Any, has_tools: bool) -> str:
    """Returns the template for tools, if there are both, as transformers does; else the default one.

    Raises ValueError where none of them is the default.
    """
    if not isinstance(template, dict):
        return str(template)
    names = [name for name in ("tool_use",) if has_tools and name in template] + [
        name for name in DEFAULT_NAMES if name in template
    ]
    names += template if len(template) == 1 else ()
    if not names:
        raise ValueError(f"its chat templates are named {', '.join(template)}; none of them is the default")
    return str(template[names[0]])
