"""The number of examples that hypothesis tries for a property: few in `make test`, all in `make test-all`."""

from hypothesis import HealthCheck, settings

THOROUGH = 100  # examples of a property that asks for no other number


def register() -> None:
    """Registers the profiles and loads the quick one; --hypothesis-profile is read later, and wins."""
    for name, count in {"thorough": THOROUGH, "quick": 20}.items():
        settings.register_profile(
            name,
            derandomize=True,  # the same inputs in every run
            deadline=None,
            database=None,
            max_examples=count,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        )
    settings.load_profile("quick")


def examples(count: int) -> settings:
    """Returns settings with `count` examples in the thorough profile, and proportionally fewer in the quick one."""
    return settings(max_examples=max(10, count * settings.default.max_examples // THOROUGH))
