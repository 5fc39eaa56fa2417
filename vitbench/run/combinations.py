"""Combinations of methods and settings within a budget: one method's setting, the search for the most accurate sequence, and orders.

The optimiser is Optuna's tree-structured Parzen estimator with constraints. A trial is a real model: compressed, saved, its cost
counted, and, if it is within the budget, scored on the val split; the test split chooses nothing. Finished trials are stored, so a
stopped search resumes: the optimiser draws from the seed again and takes the stored scores.
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
from vitbench.measurement import timing
from vitbench.measurement.cost import count_macs, model_row_fields
from vitbench.methods.registry import METHODS, compress, make_config
from vitbench.model import artifact
from vitbench.rows.records import Row
from vitbench.rows.statistics import quiet_latency_ratio
from vitbench.training.config import TrainConfig
from vitbench.training.loop import evaluate, pick_device

NONE = "none"


class CombinationSearch(Config):
    """What is searched.

    Attributes:
        cost: "bytes" on disk, or "macs" of one image.
        target: a share of the model's own cost if at most 1, else bytes or multiply-accumulates.
        structures: methods that leave something out, of which one may come first, at a rung of its ladder; "none" is none.
        codes: methods that take bits, of which one may come last.
        settings: of each method, by its name, where they are not its defaults.
        choices: likewise, of each setting the values among which the search chooses.
        train: how every step that can be trained is, before the next one.
        trials: in all, those of an earlier go included.
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
    """One combination: its configs, its cost, and its top-1 on the val split, None where the cost was above the limit.

    One that cannot be made has no cost either, but an `error`: steps that do not fit together.
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
class Searched:
    """All trials in order, the limit, and the best trial within it (None if no trial was)."""

    trials: list[Trial]
    limit: float
    best: Trial | None


def search_combinations(model: nn.Module, data: ImageData, config: CombinationSearch, folder: str | Path) -> Searched:
    """Search; trials that `folder` holds of the same model, data and config are not made again.

    Raises:
        InputError: an unknown method, one without a ladder among the structures, or no val images.
    """
    import optuna

    _check(config)
    data.require_split("val")
    folder = writable_folder(folder, "folder of searches")
    # a longer search of the same kind goes on with what a shorter one found
    facts = {"model": artifact.model_digest(model), "data": data.fingerprint}
    facts["search"] = config.replace(trials=1).to_dict()
    key = work_key("run", facts, pick_device(), packages=("optuna",))
    notes = Journal(folder / f"{key}.jsonl", "a search of combinations")
    known = notes.read()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warning of a trial that was interrupted is a traceback
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.seed), direction="maximize")
    with tempfile.TemporaryDirectory() as scratch:
        base = artifact.save(model, Path(scratch, "base"))
        count = counter(config.cost, base)
        limit = limit_of(config.cost, config.target, count(base))

        def objective(trial: optuna.Trial) -> float:
            configs = _suggest(trial, model, config)
            name = digest([[_name(each), each.to_dict()] for each in configs])
            if name not in known:
                known[name] = _tried(model, configs, data, count, limit, Path(scratch, str(trial.number)))
                notes.append(name, known[name])
            found = Trial(tuple(configs), **known[name])
            trials.append(found)
            trial.set_constraint(config.cost, limit if found.cost is None else found.cost - limit)
            return found.val_top1 or 0.0  # one that cannot be made counts as bad as one of twice the limit

        trials: list[Trial] = []
        for _ in progress.progress_bar(range(config.trials), "searching combinations", unit="model"):
            study.optimize(objective, n_trials=1)
    within = [trial for trial in trials if trial.val_top1 is not None]
    return Searched(trials, limit, max(within, key=lambda trial: (trial.val_top1, -trial.cost), default=None))


def orders(names: Sequence[str], settings: dict[str, dict[str, Any]] | None = None) -> list[list[Config]]:
    """The methods in every order, as lists of configs."""
    configs = [make_config(name, (settings or {}).get(name)) for name in names]
    return [list(order) for order in itertools.permutations(configs)]


def trial_rows(base: Path, data: ImageData, config: CombinationSearch, found: Searched) -> Iterator[Row]:
    """A search as rows of `combination_top1` on the val split, one a trial that was within the limit, in order."""
    recipe = artifact.read_manifest(base).recipe
    for number, trial in enumerate(found.trials):
        if trial.val_top1 is None:
            continue
        steps = [{"method": _name(each), "config": each.to_dict()} for each in trial.configs]
        facts = model_row_fields(recipe, data) | {
            "method": trial.name,
            "config": {"origin": recipe.origin, "methods": steps},
        }
        context = {"trial": number, config.cost: trial.cost, "limit": found.limit, "split": "val", "seed": config.seed}
        yield Row(
            **facts,
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
        if METHODS[name].ladder is None:
            raise InputError(f"structures = {config.structures}: {name} has no ladder of settings; take it for codes")


def _suggest(trial: Any, model: nn.Module, config: CombinationSearch) -> list[Config]:
    """A combination: what is left out, then what is rounded."""
    configs = []
    for kind, names in (("structure", config.structures), ("codes", config.codes)):
        name = trial.suggest_categorical(kind, list(names))
        if name == NONE:
            continue
        values = dict(config.settings.get(name, {}))
        if METHODS[name].ladder is not None:
            rungs = METHODS[name].ladder(model)
            values |= rungs[trial.suggest_int(f"{name} rung", 0, len(rungs) - 1)]
        for key, allowed in config.choices.get(name, {}).items():
            values[key] = trial.suggest_categorical(f"{name} {key}", list(allowed))
        if "train" in METHODS[name].config.model_fields:
            values = {"train": config.train.to_dict()} | values
        configs.append(make_config(name, values))
    return configs


def _tried(
    model: nn.Module, configs: list[Config], data: ImageData, count: Any, limit: float, folder: Path
) -> dict[str, Any]:
    """What a trial came to, as the fields of `Trial`."""
    try:
        cost, small = _made(model, configs, data, count, limit, folder)
    except InputError as error:
        return {"cost": None, "val_top1": None, "error": str(error)}
    return {"cost": cost, "val_top1": None if small is None else float(evaluate(small, data.val).top1.mean())}


def _made(
    model: nn.Module, configs: list[Config], data: ImageData, count: Any, limit: float, folder: Path
) -> tuple[float, nn.Module | None]:
    """The cost, and the model, which is trained only if it is within the limit (None if it is not)."""
    quick = [type(each)(**untrained(type(each), each.to_dict())) for each in configs]
    small = compress(model, quick, data)
    cost = count(artifact.save(small, folder))
    shutil.rmtree(folder)
    if cost > limit:
        return cost, None
    return cost, small if quick == configs else compress(model, configs, data)


COSTS = ("bytes", "macs", "latency")
SLACK = 512  # bytes by which a trained model's recipe may be longer than that of the same model untrained


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
    """The config of method `name` on its ladder that saves least while its cost is at most the target.

    Costs are those of real models, saved and loaded, but not trained; the ladder is halved until one rung is left.

    Args:
        model: what will be compressed; it is not changed.
        cost: "bytes" on disk, "macs" of one image, or "latency", the median time in eager mode in turn with `model` itself.
        target: a share of the model's own cost if at most 1, else bytes or multiply-accumulates.
        settings: of the method, apart from those that its ladder has.
        batch, threads, rounds: of the timings.

    Raises:
        InputError: a method without a ladder (int8 has nothing to turn), a setting that the ladder has, a target that is not
            one, or one below what the method can reach.
    """
    method, settings = METHODS[one_of("method", name, METHODS)], settings or {}
    one_of("cost", cost, COSTS)
    if method.ladder is None:
        able = ", ".join(other for other in METHODS if METHODS[other].ladder)
        raise InputError(f"{name} has no setting that a budget could turn; allowed: {able}")
    rungs = method.ladder(model)
    if both := settings.keys() & rungs[0].keys():
        raise InputError(f"{name}: the budget finds {', '.join(sorted(both))}; leave it out of the settings")
    with tempfile.TemporaryDirectory() as folder:
        base = artifact.save(model, Path(folder, "base"))
        count = counter(cost, base, batch, threads, rounds)
        limit = limit_of(cost, target, 1.0 if cost == "latency" else count(base))

        def spent(place: int) -> float:
            values = untrained(method.config, settings | rungs[place])
            small = compress(model, make_config(name, values), data)
            path = artifact.save(small, Path(folder, "small"))
            found = count(path)
            shutil.rmtree(path)
            return found

        low, high = 0, len(rungs) - 1  # the first rung within the limit is among these
        if (least := spent(high)) > limit:
            raise InputError(
                f"{name} cannot get to {cost} = {limit:.4g}: its smallest setting, {rungs[high]}, has {least:.4g}"
            )
        with progress.progress_bar(
            range((high - low).bit_length()), f"fitting {name} to {cost}", unit="model"
        ) as steps:
            for _ in steps:  # enough to get down to one rung; a step with one left is none
                if low == high:
                    continue
                middle = (low + high) // 2
                low, high = (low, middle) if spent(middle) <= limit else (middle + 1, high)
    return make_config(name, settings | rungs[high])


def limit_of(cost: str, target: float, own: float) -> float:
    """The target as a number: a share of the model's own cost if it is at most 1."""
    if not target > 0 or (cost == "latency" and target > 1):
        more = "" if cost == "latency" else f", or {cost}"
        raise InputError(f"{cost} = {target}: give a share of the model's own in (0, 1]{more}")
    return target * own if target <= 1 else target


def untrained(config: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """The settings without what takes time and does not change the cost."""
    idle: dict[str, Any] = {"train": {"epochs": 0}, "reconstruction": 0, "warm_steps": 0}
    own = {key: value for key, value in idle.items() if key in config.model_fields}
    return values | own


def counter(cost: str, base: Path, batch: int = 1, threads: int = 2, rounds: int = 20) -> Callable[[Path], float]:
    """What a saved model spends."""
    if cost == "bytes":
        return lambda path: artifact.size_on_disk(path) + (0 if path == base else SLACK)
    if cost == "macs":
        return lambda path: count_macs(artifact.load(path))

    def latency(path: Path) -> float:
        ((own, other),) = timing.compare_latency([(str(path), "eager"), (str(base), "eager")], [batch], threads, rounds)
        return quiet_latency_ratio(own.times, other.times)[0]

    return latency
