"""A sweep as data: the file that describes it, and its cells, one for each combination of what the file names."""

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
    """A model by name and where its weights come from; `train` stands over the sweep's."""

    name: str
    pretrained: bool = False
    checkpoint: str = ""
    img_size: int | None = Field(default=None, ge=1)
    train: dict[str, Any] = {}

    def start(self) -> dict[str, Any]:
        """What `baseline` and `prepare` take of it beside the name."""
        return {"pretrained": self.pretrained, "checkpoint": self.checkpoint, "img_size": self.img_size}


class DataChoice(Config):
    """An image set, how rows name it, and how it is cut (`load_data`)."""

    dataset: str
    name: str = ""
    splits: dict[str, Any] = {}


class SweepMeasures(Measures):
    """`Measures` with the defaults of a sweep. `threads` are those of the whole cell."""

    what: tuple[str, ...] = ("accuracy", "size")
    threads: int = Field(default=1, ge=1)


def _named(field: str) -> BeforeValidator:
    """A bare string stands for a mapping with that one field."""
    return BeforeValidator(lambda given: {field: given} if isinstance(given, str) else given)


class Sweep(Config):
    """What a sweep's file says.

    Attributes:
        models, datasets, seeds: all of each are combined. A seed is that of every training and of every method that draws.
        methods: a name; a mapping of names to settings, applied in that order; or a list of those. A list in place of
            a setting's value stands for as many cells; where the value is itself a list, give a list of lists.
            `baseline` is the model as it is.
        train: how baselines are trained.
        measures: what is measured.
        seconds: a cell that takes longer is stopped, and fails.
        retries: how often a cell is tried again whose worker died.
        resources: what a cell occupies, by name: `memory` in bytes and `GPU` in cards bound how many local workers there
            are, and a scheduler gets them as they are.
    """

    models: tuple[Annotated[ModelChoice, _named("name")], ...] = Field(min_length=1)
    datasets: tuple[Annotated[DataChoice, _named("dataset")], ...] = Field(min_length=1)
    methods: tuple[Any, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    train: dict[str, Any] = {}
    measures: SweepMeasures = SweepMeasures()
    seconds: float = Field(default=24 * 3600, gt=0)
    retries: int = Field(default=3, ge=0)
    resources: dict[str, float] = {}


class Cell(Config):
    """One model, compressed and measured. `start` and `fingerprint` are the hashes of where it begins and of the images."""

    model: ModelChoice
    data: DataChoice
    train: TrainConfig
    steps: tuple[Step, ...] = ()
    measures: SweepMeasures = SweepMeasures()
    start: str = ""
    fingerprint: str = ""

    @property
    def key(self) -> str:
        """16 hex digits of the hash of all that decides the cell's rows, and of nothing else."""
        return digest(self.to_dict())

    @property
    def base(self) -> str:
        """Likewise of the model that is compressed; cells with the same one share it."""
        return digest(self.replace(steps=(), measures=SweepMeasures(threads=self.measures.threads)).to_dict())

    @property
    def method(self) -> str:
        """`baseline`, or the methods' names joined by +."""
        return "+".join(step.method for step in self.steps) or BASELINE


def sweep_values(path: str | Path) -> dict[str, Any] | None:
    """What a YAML file of a sweep holds; None of any other file, such as one of notebooks' parameters.

    Raises:
        InputError: a YAML file that cannot be read as plain data.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None
    values = configs.read_yaml(path, "settings")
    return values if isinstance(values, dict) and "methods" in values else None


def sweep_of(values: Any) -> Sweep:
    """A sweep from what its file holds.

    Raises:
        InputError: a key, type or value that is not allowed, in the sweep, in a method or in the training.
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
    """All cells in order, each once; without `start` and `fingerprint`, which `checked` fills in."""
    found: dict[str, Cell] = {}
    for model, data, seed in itertools.product(sweep.models, sweep.datasets, sweep.seeds):
        train = {"seed": seed} | sweep.train | model.train
        if train.get("epochs") == 0:
            train.pop("seed")  # nothing is drawn
        shared = {"model": model, "data": data, "train": TrainConfig(**train), "measures": sweep.measures}
        for given in sweep.methods:
            for steps in _steps(given, seed):
                cell = Cell(**shared, steps=steps)
                found.setdefault(cell.key, cell)
    return list(found.values())


def checked(cell: Cell, data: ImageData, start: Recipe) -> Cell:
    """The cell with the hashes of its images and of the model before training."""
    return cell.replace(fingerprint=data.fingerprint, start=digest(start.to_dict()))


def _steps(given: Any, seed: int) -> Iterator[tuple[Step, ...]]:
    """The methods of the cells that one entry of `methods` stands for."""
    if isinstance(given, str):
        given = {given: {}}
    parts = given if isinstance(given, list) else [given]
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
            raise InputError(f"methods: {given!r}: baseline is the model as it is; it stands alone")
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise InputError(f"methods: {name}: {values!r} is not a mapping of settings")
        usual = METHODS[name].config().to_dict()
        choices.append([_step(name, each, usual, seed) for each in _settings(values, usual)])
    yield from itertools.product(*choices)


def _step(name: str, values: dict[str, Any], usual: dict[str, Any], seed: int) -> Step:
    return Step(method=name, config=make_config(name, _seeded(values, usual, seed)).to_dict())


def _settings(values: dict[str, Any], usual: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values in lists; a setting whose usual value is a list takes one of lists."""
    axes = []
    for key, value in values.items():
        own = usual.get(key)
        if isinstance(value, dict) and isinstance(own, dict):
            axes.append(list(_settings(value, own)))
        elif isinstance(value, list) and (not isinstance(own, list) or (value and isinstance(value[0], list))):
            if not value:
                raise InputError(f"methods: {key} = []: give at least one value")
            axes.append(value)
        else:
            axes.append([value])
    for combination in itertools.product(*axes):
        yield dict(zip(values, combination, strict=True))


def _seeded(values: dict[str, Any], usual: dict[str, Any], seed: int) -> dict[str, Any]:
    """`values` with the seed wherever a method draws and was not given one of its own."""
    found = dict(values)
    if found.get("epochs", usual.get("epochs")) == 0:
        return found  # a training of no epochs draws nothing
    for key, own in usual.items():
        if key == "seed":
            found.setdefault(key, seed)
        elif isinstance(own, dict) and (inner := _seeded(found.get(key) or {}, own, seed)):
            found[key] = inner
    return found
