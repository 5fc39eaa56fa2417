"""Combinations of methods within a budget: the setting of one method, the most accurate sequence, and all orders.

The optimiser is Optuna's tree-structured Parzen estimator with constraints. A trial compresses and saves a real model
and counts its cost; a model within the budget is scored on the val split, because the test split chooses nothing. Finished
trials are stored. A resumed search starts the optimiser with the same seed and reads the stored scores.
"""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from vitbench.base import progress
from vitbench.base.configs import Config, digest
from vitbench.base.errors import InputError, one_of
from vitbench.base.paths import writable_folder
from vitbench.base.store import Journal, work_key
from vitbench.data.splits import ImageData
from vitbench.measurement.cost import count_macs, model_row_fields
from vitbench.measurement.timing import compare_latency
from vitbench.methods.registry import METHODS, compress, make_config
from vitbench.model import artifact
from vitbench.rows.records import Row
from vitbench.rows.statistics import quiet_latency_ratio
from vitbench.training.config import TrainConfig
from vitbench.training.loop import evaluate, pick_device

NONE = "none"
CostFunction = Callable[[Path], float]


class CombinationSearch(Config):
    """The space and the budget of a search.

    Attributes:
        cost: "bytes" on disk, or "macs" of one image.
        target: a share of the model's own cost if at most 1, else bytes or multiply-accumulates.
        structures: methods for the first step, which remove parts, at an operating point; "none" skips the step.
        codes: methods for the last step, which round to few bits; "none" skips the step.
        settings: method -> the settings that are not its defaults.
        choices: method -> setting -> the values among which the search chooses.
        train: how each step is trained before the next one, where it can be.
        trials: the number of trials, including those of an earlier run.
    """

    cost: Literal["bytes", "macs"] = "bytes"
    target: float = Field(default=0.1, gt=0)
    structures: tuple[str, ...] = (NONE, "distillation", "mixed_rank", "pruning")
    codes: tuple[str, ...] = (NONE, "dynamic_int8", "weight_only")
    settings: dict[str, dict[str, Any]] = {"weight_only": {"rounding": "second_order"}}
    choices: dict[str, dict[str, tuple[Any, ...]]] = {"weight_only": {"group": (None, 32)}}
    train: TrainConfig = TrainConfig(epochs=0, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)
    trials: int = Field(default=40, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """One combination: its configs, its cost, and its top-1 on the val split (None if the cost is above the limit).

    A combination whose steps do not fit together has no cost but an `error`.
    """

    configs: tuple[Config, ...]
    cost: float | None
    val_top1: float | None
    error: str = ""

    @property
    def name(self) -> str:
        """The methods' names, joined by +."""
        return "+".join(_name(config) for config in self.configs) or "baseline"


@dataclass(frozen=True)
class CombinationResult:
    """All trials in order, the limit of the cost, and the best trial within it (None if no trial is)."""

    trials: list[Trial]
    limit: float
    best: Trial | None


def search_combinations(
    model: nn.Module, data: ImageData, config: CombinationSearch, folder: str | Path
) -> CombinationResult:
    """Search for the most accurate combination; finished trials of the same search in `folder` are reused.

    Raises:
        InputError: an unknown method, a structure without operating points, or no val images.
    """
    import optuna

    _check(config)
    data.require_split("val")
    folder = writable_folder(folder, "folder of searches")
    # the number of trials is left out, so that a longer search reuses the trials of a shorter one
    search = config.replace(trials=1).to_dict()
    key_inputs = {"model": artifact.model_digest(model), "data": data.fingerprint, "search": search}
    key = work_key("run", key_inputs, pick_device(), packages=("optuna",))
    journal = Journal(folder / f"{key}.jsonl", "a search of combinations")
    finished_trials = journal.read()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # for an interrupted trial it would print a traceback
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.seed), direction="maximize")
    with tempfile.TemporaryDirectory() as temporary_folder:
        base = artifact.save(model, Path(temporary_folder, "base"))
        cost_of = cost_function(config.cost, base)
        limit = budget_limit(config.cost, config.target, cost_of(base))

        def objective(trial: optuna.Trial) -> float:
            configs = _suggest(trial, model, config)
            trial_key = digest([[_name(step), step.to_dict()] for step in configs])
            if trial_key not in finished_trials:
                trial_folder = Path(temporary_folder, str(trial.number))
                finished_trials[trial_key] = _run_trial(model, configs, data, cost_of, limit, trial_folder)
                journal.append(trial_key, finished_trials[trial_key])
            finished = Trial(tuple(configs), **finished_trials[trial_key])
            trials.append(finished)
            # one that cannot be made counts as bad as one of twice the limit
            trial.set_constraint(config.cost, limit if finished.cost is None else finished.cost - limit)
            return finished.val_top1 or 0.0

        trials: list[Trial] = []
        for _ in progress.progress_bar(range(config.trials), "searching combinations", unit="model"):
            study.optimize(objective, n_trials=1)
    within = [trial for trial in trials if trial.val_top1 is not None]
    return CombinationResult(trials, limit, max(within, key=_rank, default=None))


def _rank(trial: Trial) -> tuple[float, float]:
    """A key for `max`: the accuracy of a scored trial, then a smaller cost."""
    assert trial.val_top1 is not None
    assert trial.cost is not None
    return trial.val_top1, -trial.cost


def orders(names: Sequence[str], settings: dict[str, dict[str, Any]] | None = None) -> list[list[Config]]:
    """The methods in every order, as lists of configs."""
    configs = [make_config(name, (settings or {}).get(name)) for name in names]
    return [list(order) for order in itertools.permutations(configs)]


def trial_rows(
    base: Path, data: ImageData, config: CombinationSearch, search_result: CombinationResult
) -> Iterator[Row]:
    """A search as rows of `combination_top1` on the val split, one for each trial within the limit, in order."""
    recipe = artifact.read_manifest(base).recipe
    for number, trial in enumerate(search_result.trials):
        if trial.val_top1 is None:
            continue
        steps = [{"method": _name(step), "config": step.to_dict()} for step in trial.configs]
        row_fields = model_row_fields(recipe, data) | {
            "method": trial.name,
            "config": {"origin": recipe.origin, "methods": steps},
        }
        context = {
            "trial": number,
            config.cost: trial.cost,
            "limit": search_result.limit,
            "split": "val",
            "seed": config.seed,
        }
        yield Row(
            **row_fields,
            metric="combination_top1",
            unit="fraction",
            value=trial.val_top1,
            source="measured: val split, while searching",
            context=context,
        )


def _name(config: Config) -> str:
    return next(name for name, method in METHODS.items() if type(config) is method.config)


def _check(config: CombinationSearch) -> None:
    for name in {*config.structures, *config.codes, *config.settings, *config.choices} - {NONE}:
        first = {key: values[0] for key, values in config.choices.get(name, {}).items() if values}
        make_config(name, config.settings.get(name, {}) | first)
    for name in set(config.structures) - {NONE}:
        if METHODS[name].operating_points is None:
            raise InputError(f"structures = {config.structures}: {name} has no operating points; take it for codes")


def _suggest(trial: Any, model: nn.Module, config: CombinationSearch) -> list[Config]:
    """Let the optimiser choose a combination: a method that removes parts, then one that rounds."""
    configs = []
    for kind, names in (("structure", config.structures), ("codes", config.codes)):
        name = trial.suggest_categorical(kind, list(names))
        if name == NONE:
            continue
        values = dict(config.settings.get(name, {}))
        if (points_of := METHODS[name].operating_points) is not None:
            operating_points = points_of(model)
            values |= operating_points[trial.suggest_int(f"{name} operating point", 0, len(operating_points) - 1)]
        for key, allowed in config.choices.get(name, {}).items():
            values[key] = trial.suggest_categorical(f"{name} {key}", list(allowed))
        if "train" in METHODS[name].config.model_fields:
            values = {"train": config.train.to_dict()} | values
        configs.append(make_config(name, values))
    return configs


def _run_trial(
    model: nn.Module, configs: list[Config], data: ImageData, cost_of: CostFunction, limit: float, folder: Path
) -> dict[str, Any]:
    """Make and score one combination; returns the fields of `Trial`."""
    try:
        cost, small = _compress_within_limit(model, configs, data, cost_of, limit, folder)
    except InputError as error:
        return {"cost": None, "val_top1": None, "error": str(error)}
    return {"cost": cost, "val_top1": None if small is None else float(evaluate(small, data.val).top1.mean())}


def _compress_within_limit(
    model: nn.Module, configs: list[Config], data: ImageData, cost_of: CostFunction, limit: float, folder: Path
) -> tuple[float, nn.Module | None]:
    """The cost, and the trained model (None if the cost is above the limit: nothing is trained then)."""
    untrained_configs = [type(config)(**without_training(type(config), config.to_dict())) for config in configs]
    small = compress(model, untrained_configs, data).model
    cost = cost_of(artifact.save(small, folder))
    shutil.rmtree(folder)
    if cost > limit:
        return cost, None
    return cost, small if untrained_configs == configs else compress(model, configs, data).model


COSTS = ("bytes", "macs", "latency")
RECIPE_SLACK_BYTES = 512  # by which a trained model's recipe may be longer than that of the untrained model


def fit_budget(
    model: nn.Module,
    name: str,
    data: ImageData | None = None,
    *,
    cost: str = "bytes",
    target: float,
    settings: dict[str, Any] | None = None,
    batch: int = 1,
    threads: int = 2,
    rounds: int = 20,
) -> Config:
    """The config of method `name`, at the operating point that saves least with a cost of at most the target.

    Costs are those of real models, saved and loaded but not trained. The search bisects the operating points.

    Args:
        model: the model to compress; it is not changed.
        cost: "bytes" on disk, "macs" of one image, or "latency", the median time in eager mode, alternating with `model`.
        target: a share of the model's own cost if at most 1, else bytes or multiply-accumulates.
        settings: of the method, without those that an operating point sets.
        batch, threads, rounds: of the timings.

    Raises:
        InputError: a method without operating points (such as int8), a setting that an operating point sets, a target out of
            range, or one below what the method can reach.
    """
    method, settings = METHODS[one_of("method", name, METHODS)], settings or {}
    one_of("cost", cost, COSTS)
    if method.operating_points is None:
        adjustable_methods = ", ".join(other for other in METHODS if METHODS[other].operating_points)
        raise InputError(f"{name} has no setting that a budget could choose; allowed: {adjustable_methods}")
    operating_points = method.operating_points(model)
    if conflicting := settings.keys() & operating_points[0].keys():
        raise InputError(f"{name}: the budget chooses {', '.join(sorted(conflicting))}; leave it out of the settings")
    with tempfile.TemporaryDirectory() as folder:
        base = artifact.save(model, Path(folder, "base"))
        cost_of = cost_function(cost, base, batch, threads, rounds)
        limit = budget_limit(cost, target, 1.0 if cost == "latency" else cost_of(base))

        def cost_at(index: int) -> float:
            values = without_training(method.config, settings | operating_points[index])
            small = compress(model, make_config(name, values), data).model
            path = artifact.save(small, Path(folder, "small"))
            point_cost = cost_of(path)
            shutil.rmtree(path)
            return point_cost

        low, high = 0, len(operating_points) - 1  # the first one within the limit is among these
        if (min_cost := cost_at(high)) > limit:
            raise InputError(
                f"{name} cannot get to {cost} = {limit:.4g}: its smallest setting, {operating_points[high]}, has {min_cost:.4g}"
            )
        with progress.progress_bar(
            range((high - low).bit_length()), f"fitting {name} to {cost}", unit="model"
        ) as steps:
            for _ in steps:  # enough steps to leave one; with one left a step does nothing
                if low == high:
                    continue
                middle = (low + high) // 2
                low, high = (low, middle) if cost_at(middle) <= limit else (middle + 1, high)
    return make_config(name, settings | operating_points[high])


def budget_limit(cost: str, target: float, baseline_cost: float) -> float:
    """The largest cost that is allowed: a target of at most 1 is a share of the baseline's cost."""
    if not target > 0 or (cost == "latency" and target > 1):
        more = "" if cost == "latency" else f", or {cost}"
        raise InputError(f"{cost} = {target}: give a share of the model's own in (0, 1]{more}")
    return target * baseline_cost if target <= 1 else target


def without_training(config: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """The settings without the trainings, which take time and do not change the cost."""
    no_training: dict[str, Any] = {"train": {"epochs": 0}, "reconstruction": 0, "warm_steps": 0}
    return values | {key: value for key, value in no_training.items() if key in config.model_fields}


def cost_function(cost: str, base: Path, batch: int = 1, threads: int = 2, rounds: int = 20) -> CostFunction:
    """The function that gives a saved model's cost; a latency is over that of the model saved at `base`."""
    if cost == "bytes":
        return lambda path: artifact.size_on_disk(path) + (0 if path == base else RECIPE_SLACK_BYTES)
    if cost == "macs":
        return lambda path: count_macs(artifact.load(path))

    def latency(path: Path) -> float:
        (timings,) = compare_latency([(str(path), "eager"), (str(base), "eager")], [batch], threads, rounds)
        times = []
        for timing in timings:
            if isinstance(timing, str):
                raise InputError(f"latency cannot be measured: {timing}")
            times.append(timing.times)
        return quiet_latency_ratio(times[0], times[1])[0]

    return latency
