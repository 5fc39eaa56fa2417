"""Errors that the user can correct: one line with what was given, what is allowed and what to do."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class InputError(ValueError):
    """An input cannot be used. The command line prints only the message and exits with status 2."""


def one_of(kind: str, value: object, allowed: Iterable[str]) -> str:
    """Return `value` if it is in `allowed`; otherwise raise an `InputError` with the allowed names and the nearest one."""
    allowed = list(allowed)
    if value in allowed:
        return value
    matches = difflib.get_close_matches(str(value), allowed, n=1)
    suggestion = f" (did you mean {matches[0]!r}?)" if matches else ""
    names = ", ".join(allowed) if allowed else "none"
    raise InputError(f"unknown {kind} {str(value)!r}{suggestion}; allowed: {names}")


def import_optional(module: str, extra: str) -> ModuleType:
    """Import an optional `module`; if it is missing, raise an `InputError` that names the extra of vitbench with it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{module!r} is needed and not installed; install it with: pip install 'vitbench[{extra}]'"
        ) from error
