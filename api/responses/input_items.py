"""The input of a stored response as a list of items, in the full form that SDKs read."""

from typing import Any, Literal

from pydantic import BaseModel

from errors import NotFound

Object = dict[str, Any]
MAX_LISTED = 100  # items of a page


class InputItemList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Object]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_of(items: list[Object], *, is_ascending: bool, after: str | None, limit: int) -> InputItemList:
    """Returns the items behind the one with the id `after`. Raises NotFound if there is none."""
    ordered = items if is_ascending else items[::-1]
    ids = [item["id"] for item in ordered]
    if after is not None and after not in ids:
        raise NotFound(f"Item with id '{after[:200]}' not found.", param="after")
    start = 0 if after is None else ids.index(after) + 1
    data = [_in_full(item) for item in ordered[start : start + limit]]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return InputItemList(data=data, first_id=first, last_id=last, has_more=start + limit < len(ordered))


def _in_full(item: Object) -> Object:
    """Adds what clients may leave out of an item."""
    full = {"status": "completed", **item}
    if item["type"] == "message":
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        content = item.get("content") or []
        parts = [{"type": kind, "text": content}] if isinstance(content, str) else content
        full["content"] = [{**_DEFAULTS.get(part["type"], {}), **part} for part in parts]
    if item["type"] == "reasoning":
        full["summary"] = item.get("summary") or []
    return full


_DEFAULTS: dict[str, Object] = {"output_text": {"annotations": []}, "input_image": {"detail": "auto"}}
