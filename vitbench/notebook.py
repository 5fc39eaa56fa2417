"""What a notebook needs of its kernel: parameters of the declared types, and figures that appear under its cells."""

import sys
from typing import Any

from vitbench.errors import InputError

KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool, "dict": dict, "list": list}
_TEXT_OF_BOOLS = {"true": True, "false": False}


def lesson(names: dict[str, Any]) -> None:
    """Set a notebook up: `vb.lesson(globals())` after its parameters.

    Parameters are given their declared types in place: papermill's `-p pretrained false` gives the text 'false', which
    would count as true. Figures are drawn inline whatever MPLBACKEND says, with matplotlib's defaults whatever a
    matplotlibrc says.

    Args:
        names: the notebook's global names, with the annotations of its parameters.

    Raises:
        InputError: a parameter of another type than the notebook declares.
    """
    declared = names.get("__annotations__") or {}
    if (
        not declared and "__annotate__" in names
    ):  # from Python 3.14 on, annotations are computed when they are asked for
        declared = names["__annotate__"](1)
    for name, kind in declared.items():
        if name in names:
            names[name] = as_declared(name, names[name], getattr(kind, "__name__", str(kind)))
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        import matplotlib as mpl

        shell.run_line_magic("matplotlib", "inline")
        mpl.rcdefaults()


def as_declared(name: str, value: Any, kind: str) -> Any:
    """The value of a parameter that a notebook declares as `kind`; "true" and "false" are read where that is bool.

    Raises:
        InputError: a value of another type.
    """
    if kind not in KINDS:
        return value
    if kind == "bool" and isinstance(value, str) and value.lower() in _TEXT_OF_BOOLS:
        return _TEXT_OF_BOOLS[value.lower()]
    if isinstance(value, KINDS[kind]) and not (isinstance(value, bool) and kind in ("int", "float")):
        return value
    given = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
    hint = ""
    if isinstance(value, str) and kind in ("dict", "list"):
        example = "{epochs: 1}" if kind == "dict" else "[1, 2]"
        hint = f'; with papermill write -y "{name}: {example}", since -p gives text'
    elif kind == "str" and isinstance(value, bool | int | float):
        hint = f"; with papermill write -r {name} {value}, since -p reads numbers"
    raise InputError(
        f"parameter {name} = {given} is a {type(value).__name__}; the notebooks declare it as {kind}{hint}"
    )
