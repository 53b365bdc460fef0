"""For schemathesis: what is valid gets the name of the model that is there, and time: a 504 would be right."""

from typing import Any

import schemathesis


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    if not isinstance(case.body, dict):
        return
    if case.meta.generation.mode.is_positive and "model" in case.body:
        case.body["model"] = "Tiny"
    timeout = case.body.get("timeout")
    if isinstance(timeout, int | float) and timeout > 0:
        case.body["timeout"] = 60
