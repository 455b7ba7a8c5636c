"""How parameter classes refuse a value: with its name, a short picture of it, and what is allowed."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

Params = TypeVar("Params")


def naming_unknown_fields(remedies: Mapping[str, str]) -> Callable[[type[Params]], type[Params]]:
    """Make a dataclass answer unknown keywords with a ValueError that names the remedy, not with a bare TypeError.

    Args:
        remedies: What to use instead of names that other engines have.
    """

    def decorate(cls: type[Params]) -> type[Params]:
        init: Callable[..., None] = cls.__init__

        @functools.wraps(init)
        def checked(self: Params, *arguments: Any, **values: Any) -> None:
            known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
            for name in values:
                if name not in known:
                    remedy = remedies.get(name, f"choose among {', '.join(known)}")
                    raise ValueError(f"{name}={shown(values[name])} is no field of {cls.__name__}: {remedy}")
            init(self, *arguments, **values)

        cls.__init__ = checked  # type: ignore[assignment]
        return cls

    return decorate


def refuse(name: str, value: object, allowed: str) -> ValueError:
    """The error to raise for a value that is not allowed."""
    return ValueError(f"{name}={shown(value)} is not allowed: it must be {allowed}")


def shown(value: object) -> str:
    """A short picture of any value; Python itself refuses to print integers of thousands of digits."""
    if isinstance(value, int) and abs(value) > 10**30:
        return f"(an integer of {value.bit_length()} bits)"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return f"({type(value).__name__} of length {len(value)})"
    shown = repr(value[:80] if isinstance(value, (str, bytes)) else value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
