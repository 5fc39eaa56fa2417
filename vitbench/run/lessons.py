"""Notebooks as data, with their order, parameters and profiles; and the setup inside a notebook."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from vitbench.base import configs, paths
from vitbench.base.errors import InputError, one_of

STAGES = ("baseline", "method", "comparison")


@dataclass(frozen=True)
class Lesson:
    """A notebook.

    Attributes:
        stage: when it runs, one of `STAGES`.
        minutes: the time of its quick run.
        parameters: name -> name of the type.
        cells: the number of code cells.
        required_splits: the splits of the data that must hold images.
    """

    path: Path
    title: str
    stage: str
    minutes: float
    parameters: dict[str, str]
    cells: int
    required_splits: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem


def lessons_folder(folder: str | Path = "") -> Path:
    """The folder, by default the project's notebooks beside the package; no other folder is searched.

    Raises:
        InputError: no such folder, or an installation without notebooks.
    """
    if folder:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise InputError(f"--notebooks {str(folder)!r} is not a folder; give one that holds notebooks")
        return path
    if (checkout := paths.checkout()) is None:
        raise InputError(
            "this installation of vitbench has no notebooks; get a checkout of the project, or name a folder of "
            "notebooks that you trust with --notebooks DIR"
        )
    return checkout / "notebooks"


def find_lessons(folder: str | Path = "") -> list[Lesson]:
    """All lessons of a folder (see `lessons_folder`), in the order in which they run.

    Raises:
        InputError: no such folder, or a file that is no valid notebook.
    """
    lessons = [_lesson(path) for path in sorted(lessons_folder(folder).glob("[0-9]*.ipynb"))]
    return sorted(lessons, key=lambda lesson: (STAGES.index(lesson.stage), lesson.name))


def _lesson(path: Path) -> Lesson:
    import papermill

    content = configs.read_json(path, "notebook")
    if not isinstance(content, dict) or content.get("nbformat") != 4:
        raise InputError(f"{str(path)!r} is not a notebook of format 4; take it out of the folder")
    try:
        nbformat.validate(content)
    except nbformat.ValidationError as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{str(path)!r} is not a notebook ({reason}); take it out of the folder") from None
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.get("vitbench", {})
    title = notebook.cells[0].source.partition("\n")[0].lstrip("# ") if notebook.cells else path.stem
    return Lesson(
        path=path,
        title=title,
        stage=one_of(f"stage of {path.name}", metadata.get("stage", "method"), STAGES),
        minutes=float(metadata.get("minutes", 1)),
        parameters={name: info["inferred_type_name"] for name, info in papermill.inspect_notebook(path).items()},
        cells=sum(cell.cell_type == "code" for cell in notebook.cells),
        required_splits=tuple(metadata.get("needs", ())),
    )


def choose(lessons: list[Lesson], only: list[str]) -> list[Lesson]:
    """The lessons whose name or number is in `only`; all lessons if it is empty."""
    by_name = {lesson.name: lesson.name for lesson in lessons} | {
        lesson.name.split("_")[0]: lesson.name for lesson in lessons
    }
    selected_names = {by_name[one_of("notebook", name.removesuffix(".ipynb"), by_name)] for name in only}
    return [lesson for lesson in lessons if not only or lesson.name in selected_names]


def profiles(folder: str | Path = "") -> dict[str, Path]:
    """Name -> file of each profile in the folder's `profiles/` (see `lessons_folder`)."""
    paths_by_name = {path.stem: path for path in (lessons_folder(folder) / "profiles").glob("*.yaml")}
    return dict(sorted(paths_by_name.items()))


def read_profile(name: str, settings: list[str], lessons: list[Lesson], folder: str | Path = "") -> dict[str, Any]:
    """The parameters of a profile (a name, or a path to a YAML file) overridden by `key=value` settings.

    A dotted key reaches into a parameter that is a mapping: train.epochs=5.

    Raises:
        InputError: unknown profile or key, or a value of another type than the notebooks declare.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        profile_paths = profiles(folder)
        path = profile_paths[one_of("profile", name, profile_paths)]
    values = configs.read_yaml(path, "profile")
    if not isinstance(values, dict):
        raise InputError(f"profile {path.name!r} is not a mapping of parameter names to values")
    for setting in settings:
        key, value = parse_setting(setting)
        outer, _, inner = key.partition(".")
        if inner:
            current_value = values.get(outer, {})
            if not isinstance(current_value, dict):
                raise InputError(f"--set {key}: {outer} is not a mapping, so it has no {inner!r}")
            values[outer] = {**current_value, inner: value}
        else:
            values[outer] = value
    return _convert_parameters(values, lessons)


def parse_setting(text: str) -> tuple[str, Any]:
    """ "key=value" as the key and the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"setting {text!r}: give key=value, for example train.epochs=5")
    return key, configs.yaml_value(value, f"setting {key}") if value.strip() else ""


def _convert_parameters(values: dict[str, Any], lessons: list[Lesson]) -> dict[str, Any]:
    declared: dict[str, str] = {}
    for lesson in lessons:
        declared |= lesson.parameters
    return {
        key: convert_parameter(key, value, declared[one_of("parameter", key, declared)])
        for key, value in values.items()
    }


KINDS: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "bool": bool,
    "dict": dict,
    "list": list,
}
_BOOLS_BY_TEXT = {"true": True, "false": False}


def setup_notebook(namespace: dict[str, Any]) -> None:
    """Set a notebook up: `vb.setup_notebook(globals())` after its parameters.

    Parameters are converted to their declared types in place: papermill's `-p pretrained false` passes the text 'false',
    which would be true. Figures are drawn inline with matplotlib's defaults, whatever MPLBACKEND and a matplotlibrc say.

    Args:
        namespace: the notebook's global names, with the annotations of its parameters.

    Raises:
        InputError: a parameter of another type than the notebook declares.
    """
    declared = namespace.get("__annotations__") or {}
    if not declared and "__annotate__" in namespace:  # Python 3.14 computes annotations on demand
        declared = namespace["__annotate__"](1)
    for name, kind in declared.items():
        if name in namespace:
            namespace[name] = convert_parameter(name, namespace[name], getattr(kind, "__name__", str(kind)))
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        import matplotlib as mpl

        shell.run_line_magic("matplotlib", "inline")
        mpl.rcdefaults()


def convert_parameter(name: str, value: Any, kind: str) -> Any:
    """The value of a parameter that a notebook declares as `kind`; the texts "true" and "false" become a bool.

    Raises:
        InputError: a value of another type.
    """
    if kind not in KINDS:
        return value
    if kind == "bool" and isinstance(value, str) and value.lower() in _BOOLS_BY_TEXT:
        return _BOOLS_BY_TEXT[value.lower()]
    if isinstance(value, KINDS[kind]) and not (isinstance(value, bool) and kind in ("int", "float")):
        return value
    shown_value = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
    hint = ""
    if isinstance(value, str) and kind in ("dict", "list"):
        example = "{epochs: 1}" if kind == "dict" else "[1, 2]"
        hint = f'; with papermill write -y "{name}: {example}", since -p gives text'
    elif kind == "str" and isinstance(value, bool | int | float):
        hint = f"; with papermill write -r {name} {value}, since -p reads numbers"
    raise InputError(
        f"parameter {name} = {shown_value} is a {type(value).__name__}; the notebooks declare it as {kind}{hint}"
    )
