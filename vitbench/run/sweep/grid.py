"""A sweep as data: its file, and its cells, one for each combination of models, data sets, methods and seeds."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from vitbench.base import configs
from vitbench.base.configs import Config, digest
from vitbench.base.errors import InputError, one_of
from vitbench.data.splits import ImageData
from vitbench.measurement.backends import BACKENDS
from vitbench.measurement.measures import Measures
from vitbench.methods.registry import METHODS, make_config
from vitbench.model.recipe import Recipe, Step
from vitbench.training.config import TrainConfig

BASELINE = "baseline"


class ModelChoice(Config):
    """A model by name and the source of its weights; `train` overrides the sweep's."""

    name: str
    pretrained: bool = False
    checkpoint: str = ""
    img_size: int | None = Field(default=None, ge=1)
    train: dict[str, Any] = {}

    def start(self) -> dict[str, Any]:
        """The arguments of `baseline` and `create_initial_model` besides the name."""
        return {"pretrained": self.pretrained, "checkpoint": self.checkpoint, "img_size": self.img_size}


class DataChoice(Config):
    """A data set, its name in rows, and its splits (see `load_data`)."""

    dataset: str
    name: str = ""
    splits: dict[str, Any] = {}


class SweepMeasures(Measures):
    """`Measures` with the defaults of a sweep. `threads` are those of the whole cell."""

    what: tuple[str, ...] = ("accuracy", "size")
    threads: int = Field(default=1, ge=1)


def _from_string(field: str) -> BeforeValidator:
    """A bare string stands for a mapping with that one field."""
    return BeforeValidator(lambda value: {field: value} if isinstance(value, str) else value)


class Sweep(Config):
    """The content of a sweep's file.

    Attributes:
        models, datasets, seeds: every combination is a cell. A seed sets every training and every random method.
        methods: a name; a mapping of names to settings, applied in that order; or a list of those. A list in place
            of a setting's value makes one cell for each item; where the value is itself a list, give a list of lists.
            `baseline` is the uncompressed model.
        train: how baselines are trained.
        measures: what is measured.
        seconds: a cell that takes longer is stopped, and fails.
        retries: how often a cell whose worker died is tried again.
        resources: what a cell occupies, by name. `memory` in bytes and the number of `GPU` limit the local workers; a
            scheduler gets all of them unchanged.
    """

    models: tuple[Annotated[ModelChoice, _from_string("name")], ...] = Field(min_length=1)
    datasets: tuple[Annotated[DataChoice, _from_string("dataset")], ...] = Field(min_length=1)
    methods: tuple[Any, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    train: dict[str, Any] = {}
    measures: SweepMeasures = SweepMeasures()
    seconds: float = Field(default=24 * 3600, gt=0)
    retries: int = Field(default=3, ge=0)
    resources: dict[str, float] = {}


class Cell(Config):
    """One model, compressed and measured; `start` and `fingerprint` hash the model before training and the images."""

    model: ModelChoice
    data: DataChoice
    train: TrainConfig
    steps: tuple[Step, ...] = ()
    measures: SweepMeasures = SweepMeasures()
    start: str = ""
    fingerprint: str = ""

    @property
    def key(self) -> str:
        """16 hex digits of the hash of all that decides the cell's rows."""
        return digest(self.to_dict())

    @property
    def base(self) -> str:
        """The hash of all that decides the cell's baseline; cells with the same hash share it."""
        return digest(self.replace(steps=(), measures=SweepMeasures(threads=self.measures.threads)).to_dict())

    @property
    def method(self) -> str:
        """`baseline`, or the methods' names joined by +."""
        return "+".join(step.method for step in self.steps) or BASELINE


def read_sweep_file(path: str | Path) -> dict[str, Any] | None:
    """The content of a sweep's YAML file; None for any other file, such as a profile of notebook parameters.

    Raises:
        InputError: a YAML file that cannot be read as plain data.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None
    values = configs.read_yaml(path, "settings")
    return values if isinstance(values, dict) and "methods" in values else None


def parse_sweep(values: Any) -> Sweep:
    """The sweep that the content of a file describes.

    Raises:
        InputError: an unknown key, or a type or value that is not allowed, in the sweep, a method or the training.
    """
    if not isinstance(values, dict):
        raise InputError("a sweep is a mapping with models, datasets and methods")
    configs.check_plain_data(values, "the sweep")
    sweep = Sweep(**values)
    for backend in (sweep.measures.backend, *sweep.measures.versus_backends):
        one_of("backend", backend, BACKENDS)
    for name, amount in sweep.resources.items():
        if not amount > 0:
            raise InputError(f"resources: {name} = {amount}: give an amount above 0")
    return sweep


def cells(sweep: Sweep) -> list[Cell]:
    """All cells in order, each once; without `start` and `fingerprint`, which `with_fingerprints` fills in."""
    cells_by_key: dict[str, Cell] = {}
    for model, data, seed in itertools.product(sweep.models, sweep.datasets, sweep.seeds):
        train = {"seed": seed} | sweep.train | model.train
        if train.get("epochs") == 0:
            train.pop("seed")  # no training, so no random numbers
        baseline = Cell(model=model, data=data, train=TrainConfig(**train), measures=sweep.measures)
        for entry in sweep.methods:
            for steps in _steps(entry, seed):
                cell = baseline.replace(steps=steps)
                cells_by_key.setdefault(cell.key, cell)
    return list(cells_by_key.values())


def with_fingerprints(cell: Cell, data: ImageData, recipe: Recipe) -> Cell:
    """The cell with the hashes of its images and of the recipe of the model before training."""
    return cell.replace(fingerprint=data.fingerprint, start=digest(recipe.to_dict()))


def _steps(entry: Any, seed: int) -> Iterator[tuple[Step, ...]]:
    """The steps of each cell that one entry of `methods` describes."""
    if isinstance(entry, str):
        entry = {entry: {}}
    parts = entry if isinstance(entry, list) else [entry]
    named: list[tuple[str, dict]] = []
    for part in parts:
        part = {part: {}} if isinstance(part, str) else part
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            raise InputError(f"methods: {part!r} is neither a method's name nor a mapping of names to settings")
        named += [(name, values) for name, values in part.items()]
    if [name for name, _ in named] == [BASELINE]:
        yield ()
        return
    choices = []
    for name, values in named:
        one_of("method", name, (*METHODS, BASELINE))
        if name == BASELINE:
            raise InputError(f"methods: {entry!r}: baseline is the uncompressed model; it stands alone")
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise InputError(f"methods: {name}: {values!r} is not a mapping of settings")
        defaults = METHODS[name].config().to_dict()
        choices.append([_step(name, settings, defaults, seed) for settings in _setting_combinations(values, defaults)])
    yield from itertools.product(*choices)


def _step(name: str, values: dict[str, Any], defaults: dict[str, Any], seed: int) -> Step:
    return Step(method=name, config=make_config(name, _with_seed(values, defaults, seed)).to_dict())


def _setting_combinations(values: dict[str, Any], defaults: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values in lists; a setting whose default is a list takes a list of lists."""
    axes = []
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            axes.append(list(_setting_combinations(value, default)))
        elif isinstance(value, list) and (not isinstance(default, list) or (value and isinstance(value[0], list))):
            if not value:
                raise InputError(f"methods: {key} = []: give at least one value")
            axes.append(value)
        else:
            axes.append([value])
    for combination in itertools.product(*axes):
        yield dict(zip(values, combination, strict=True))


def _with_seed(values: dict[str, Any], defaults: dict[str, Any], seed: int) -> dict[str, Any]:
    """`values` with the seed for each field `seed` that they do not set."""
    seeded = dict(values)
    if seeded.get("epochs", defaults.get("epochs")) == 0:
        return seeded  # a training of no epochs uses no random numbers
    for key, default in defaults.items():
        if key == "seed":
            seeded.setdefault(key, seed)
        elif isinstance(default, dict) and (inner := _with_seed(seeded.get(key) or {}, default, seed)):
            seeded[key] = inner
    return seeded
