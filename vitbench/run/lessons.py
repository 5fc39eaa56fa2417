"""Notebooks as data, with their order, parameters and profiles; and the setup inside a notebook."""

import ast
import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from vitbench.base import configs, paths
from vitbench.base.errors import InputError, one_of

STAGES = ("baseline", "method", "comparison")
LESSONS = "lessons"  # the key of a profile under which single lessons have values of their own
# what makes the images and the baseline, and the folder: one for all lessons of a run
SHARED = ("dataset", "dataset_name", "splits", "model", "checkpoint", "pretrained", "img_size", "train", "out")


@dataclass(frozen=True)
class Lesson:
    """A notebook.

    Attributes:
        stage: when it runs, one of `STAGES`.
        minutes: the time of its quick run.
        parameters: name -> name of the type.
        defaults: name -> value; a default that is not written as a literal is left out.
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
    defaults: dict[str, Any] = field(default_factory=dict)

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
    declared = papermill.inspect_notebook(path)
    return Lesson(
        path=path,
        title=title,
        stage=one_of(f"stage of {path.name}", metadata.get("stage", "method"), STAGES),
        minutes=float(metadata.get("minutes", 1)),
        parameters={name: info["inferred_type_name"] for name, info in declared.items()},
        defaults=_literals({name: info["default"] for name, info in declared.items()}),
        cells=sum(cell.cell_type == "code" for cell in notebook.cells),
        required_splits=tuple(metadata.get("needs", ())),
    )


def _by_name_or_number(lessons: list[Lesson]) -> dict[str, Lesson]:
    return {lesson.name: lesson for lesson in lessons} | {lesson.name.split("_")[0]: lesson for lesson in lessons}


def _literals(texts: dict[str, str]) -> dict[str, Any]:
    """The values of Python literals, by name; other expressions are left out."""
    values = {}
    for name, text in texts.items():
        with contextlib.suppress(ValueError, SyntaxError):
            values[name] = ast.literal_eval(text)
    return values


def choose(lessons: list[Lesson], only: list[str]) -> list[Lesson]:
    """The lessons whose name or number is in `only`; all lessons if it is empty."""
    by_name = _by_name_or_number(lessons)
    selected_names = {by_name[one_of("notebook", name.removesuffix(".ipynb"), by_name)].name for name in only}
    return [lesson for lesson in lessons if not only or lesson.name in selected_names]


def profiles(folder: str | Path = "") -> dict[str, Path]:
    """Name -> file of each profile in the folder's `profiles/` (see `lessons_folder`)."""
    paths_by_name = {path.stem: path for path in (lessons_folder(folder) / "profiles").glob("*.yaml")}
    return dict(sorted(paths_by_name.items()))


def read_profile(name: str, settings: list[str], lessons: list[Lesson], folder: str | Path = "") -> dict[str, Any]:
    """The parameters of a profile (a name, or a path to a YAML file) overridden by `key=value` settings.

    A dotted key reaches into a parameter that is a mapping: train.epochs=5. One that begins with a lesson's name or number sets the
    parameter of that lesson alone, as the profile's mapping `lessons` does: 04.tuned.epochs=5. A setting of all lessons
    also replaces what the profile has for single ones.

    Returns:
        The values by parameter; below `lessons`, if there are any, those of single lessons by the lesson's name and the parameter.

    Raises:
        InputError: unknown profile, lesson or key, or a value of another type than the notebooks declare.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        profile_paths = profiles(folder)
        path = profile_paths[one_of("profile", name, profile_paths)]
    values = configs.read_yaml(path, "profile")
    if not isinstance(values, dict):
        raise InputError(f"profile {path.name!r} is not a mapping of parameter names to values")
    values_by_lesson = _values_by_lesson(values.pop(LESSONS, {}), lessons, path.name)
    by_name = _by_name_or_number(lessons)
    for setting in settings:
        key, value = parse_setting(setting)
        first, _, rest = key.partition(".")
        if rest and first in by_name:
            own_values = values_by_lesson.setdefault(by_name[first].name, {})
            _set_value(own_values, rest, value, key, default=values)
            continue
        for own_values in values_by_lesson.values():
            if first in own_values:
                _set_value(own_values, key, value, key)
        _set_value(values, key, value, key)
    for lesson in lessons:
        if lesson.name in values_by_lesson:
            values_by_lesson[lesson.name] = _convert_own(values_by_lesson[lesson.name], lesson)
    return _convert_parameters(values, lessons) | ({LESSONS: values_by_lesson} if values_by_lesson else {})


def values_of(lesson: Lesson, values: dict[str, Any]) -> dict[str, Any]:
    """What the values of `read_profile` give a lesson's parameters; its own go before those of all lessons."""
    for_all = {name: value for name, value in values.items() if name in lesson.parameters}
    return for_all | values.get(LESSONS, {}).get(lesson.name, {})


def _values_by_lesson(found: Any, lessons: list[Lesson], source: str) -> dict[str, dict[str, Any]]:
    """A profile's `lessons` by the lessons' names."""
    if not isinstance(found, dict):
        raise InputError(f"{LESSONS} of profile {source!r} is not a mapping of lessons to their parameters")
    by_name = _by_name_or_number(lessons)
    values_by_lesson: dict[str, dict[str, Any]] = {}
    for key, own_values in found.items():
        name = by_name[one_of(f"lesson of profile {source!r}", key, by_name)].name
        if not isinstance(own_values, dict):
            raise InputError(f"{LESSONS}: {key} of profile {source!r} is not a mapping of parameter names to values")
        if name in values_by_lesson:
            raise InputError(f"profile {source!r} has lesson {name} twice, by its name and its number; join the two")
        values_by_lesson[name] = dict(own_values)
    return values_by_lesson


def _set_value(
    values: dict[str, Any], key: str, value: Any, setting: str, default: dict[str, Any] | None = None
) -> None:
    """Set a key of `values`; a dotted one changes the mapping that it reaches into, which `default` has if `values` does not."""
    outer, _, inner = key.partition(".")
    if inner:
        current_value = values.get(outer, (default or {}).get(outer, {}))
        if not isinstance(current_value, dict):
            raise InputError(f"--set {setting}: {outer} is not a mapping, so it has no {inner!r}")
        value = {**current_value, inner: value}
    values[outer] = value


def parse_setting(text: str) -> tuple[str, Any]:
    """ "key=value" as the key and the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"setting {text!r}: give key=value, for example train.epochs=5")
    return key, configs.yaml_value(value, f"setting {key}") if value.strip() else ""


def _convert_own(own_values: dict[str, Any], lesson: Lesson) -> dict[str, Any]:
    """The values of one lesson at its declared types."""
    for name in SHARED:
        if name in own_values:
            raise InputError(f"{name} is one for all lessons; set it outside of {lesson.name}")
    kinds = {name: kind for name, kind in lesson.parameters.items() if name not in SHARED}
    return {
        key: convert_parameter(key, value, kinds[one_of(f"parameter of {lesson.name}", key, kinds)])
        for key, value in own_values.items()
    }


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
