"""The notebooks as data: their order, their parameters, and the profiles that set them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from vitbench import paths
from vitbench.errors import InputError, one_of

STAGES = ("baseline", "method", "comparison")
KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool, "dict": dict, "list": list}


@dataclass(frozen=True)
class Lesson:
    """A notebook.

    `stage` says when it runs, `minutes` how long its quick run takes, `parameters` name -> type name, and `needs` which
    splits of the data must hold images.
    """

    path: Path
    title: str
    stage: str
    minutes: float
    parameters: dict[str, str]
    cells: int
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem


def lessons_folder() -> Path:
    """The project's `notebooks/` folder."""
    folder = paths.home() / "notebooks"
    if not folder.is_dir():
        raise InputError(
            f"no notebooks at {str(folder)!r}; run from a checkout of vitbench or set VITBENCH_HOME to one"
        )
    return folder


def find_lessons(folder: Path | None = None) -> list[Lesson]:
    """All lessons of a folder, in the order in which they run."""
    import papermill

    found = []
    for path in sorted((folder or lessons_folder()).glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        about = notebook.metadata.get("vitbench", {})
        first = notebook.cells[0].source.splitlines()[0].lstrip("# ") if notebook.cells else path.stem
        found.append(
            Lesson(
                path=path,
                title=first,
                stage=about.get("stage", "method"),
                minutes=float(about.get("minutes", 1)),
                parameters={
                    name: known["inferred_type_name"] for name, known in papermill.inspect_notebook(path).items()
                },
                cells=sum(cell.cell_type == "code" for cell in notebook.cells),
                needs=tuple(about.get("needs", ())),
            )
        )
    return sorted(found, key=lambda lesson: (STAGES.index(lesson.stage), lesson.name))


def choose(lessons: list[Lesson], only: list[str]) -> list[Lesson]:
    """The lessons named in `only`, by name or number; all of them if it is empty."""
    by_name = {lesson.name: lesson.name for lesson in lessons} | {
        lesson.name.split("_")[0]: lesson.name for lesson in lessons
    }
    wanted = {by_name[one_of("notebook", name.removesuffix(".ipynb"), by_name)] for name in only}
    return [lesson for lesson in lessons if not only or lesson.name in wanted]


def profiles(folder: Path | None = None) -> dict[str, Path]:
    """Profile name -> papermill parameter file."""
    found = {path.stem: path for path in ((folder or lessons_folder()) / "profiles").glob("*.yaml")}
    return dict(sorted(found.items()))


def read_profile(name: str, settings: list[str], lessons: list[Lesson]) -> dict[str, Any]:
    """The parameters of a profile (a name, or a path to a YAML file) with `key=value` settings on top.

    A dotted key reaches into a parameter that is a mapping: train.epochs=5.

    Raises:
        InputError: unknown profile or key, or a value of another type than the notebooks declare.
    """
    known = profiles()
    path = Path(name) if name.endswith((".yaml", ".yml")) else known[one_of("profile", name, known)]
    if not path.is_file():
        raise InputError(f"profile file {name!r} does not exist; allowed: {', '.join(known)} or a path to a YAML file")
    values = _yaml(path.read_text(encoding="utf-8"), path.name)
    if not isinstance(values, dict):
        raise InputError(f"profile {path.name!r} is not a mapping of parameter names to values")
    for setting in settings:
        key, value = parse_setting(setting)
        outer, _, inner = key.partition(".")
        if inner:
            held = values.get(outer, {})
            if not isinstance(held, dict):
                raise InputError(f"--set {key}: {outer} is not a mapping, so it has no {inner!r}")
            values[outer] = {**held, inner: value}
        else:
            values[outer] = value
    _check_types(values, lessons)
    return values


def parse_setting(text: str) -> tuple[str, Any]:
    """ "key=value" as the key and the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"setting {text!r}: give key=value, for example train.epochs=5")
    return key, _yaml(value, key)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML ({' '.join(str(error).split())[:120]})") from None


def _check_types(values: dict[str, Any], lessons: list[Lesson]) -> None:
    declared: dict[str, str] = {}
    for lesson in lessons:
        declared |= lesson.parameters
    for key, value in values.items():
        kind = declared[one_of("parameter", key, declared)]
        wanted = KINDS.get(kind, object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind in ("int", "float")):
            raise InputError(
                f"parameter {key} = {value!r} is a {type(value).__name__}; the notebooks declare it as {kind}"
            )
