"""Errors that are the user's to mend: one line that says what was given, what is allowed and what to do."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class InputError(ValueError):
    """Something that was given cannot be used. The command line prints the message alone and exits with status 2."""


def one_of(kind: str, value: object, allowed: Iterable[str]) -> str:
    """`value` if it is in `allowed`; otherwise an `InputError` that lists what is allowed and the nearest name."""
    allowed = list(allowed)
    if value in allowed:
        return value
    matches = difflib.get_close_matches(str(value), allowed, n=1)
    suggestion = f" (did you mean {matches[0]!r}?)" if matches else ""
    names = ", ".join(allowed) if allowed else "none"
    raise InputError(f"unknown {kind} {str(value)!r}{suggestion}; allowed: {names}")


def import_optional(module: str, extra: str) -> ModuleType:
    """Import an optional `module`, or say which extra of vitbench installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{module!r} is not installed and this needs it; install it with: pip install 'vitbench[{extra}]'"
        ) from error
