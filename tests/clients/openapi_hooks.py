"""For schemathesis: what is valid gets the name of the model that is there, and time: a 504 would be right."""

from typing import Any

import schemathesis


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    if case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        given = {"model": "Tiny", "timeout": 60}
        case.body.update({name: value for name, value in given.items() if name in case.body})
