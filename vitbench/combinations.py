"""Which methods, one after the other and how strongly, are the most accurate within a budget: a search, and what an order does.

The optimiser is Optuna's tree-structured Parzen estimator with constraints. A trial is a real model: made, saved, its cost counted, and,
if it is within the budget, scored on the val split; the test split chooses nothing. What a trial came to is noted, so that a
stopped search goes on: the optimiser, whose draws come from the seed, is asked anew, and what is noted is not made again.
"""

import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from vitbench import artifact, progress
from vitbench.base.digest import digest
from vitbench.base.store import Notes, work_key
from vitbench.budget_fit import counter, limit_of, untrained
from vitbench.configs import Config
from vitbench.data import ImageData
from vitbench.errors import InputError
from vitbench.measurement.value import about
from vitbench.methods import METHODS, compress, make_config
from vitbench.paths import writable_folder
from vitbench.records import Row
from vitbench.training import TrainConfig, evaluate, pick_device

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


def search(model: nn.Module, data: ImageData, config: CombinationSearch, folder: str | Path) -> Searched:
    """Search; trials that `folder` holds of the same model, data and config are not made again.

    Raises:
        InputError: an unknown method, one without a ladder among the structures, or no val images.
    """
    import optuna

    _check(config)
    data.needs("val")
    folder = writable_folder(folder, "folder of searches")
    # a longer search of the same kind goes on with what a shorter one found
    facts = {"model": artifact.model_digest(model), "data": data.fingerprint}
    facts["search"] = config.having(trials=1).to_dict()
    key = work_key(__name__, facts, pick_device(), packages=("optuna",))
    notes = Notes(folder / f"{key}.jsonl", "a search of combinations")
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
                notes.add(name, known[name])
            found = Trial(tuple(configs), **known[name])
            trials.append(found)
            trial.set_constraint(config.cost, limit if found.cost is None else found.cost - limit)
            return found.val_top1 or 0.0  # one that cannot be made counts as bad as one of twice the limit

        trials: list[Trial] = []
        for _ in progress.bar(range(config.trials), "searching combinations", unit="model"):
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
        facts = about(recipe, data) | {"method": trial.name, "config": {"origin": recipe.origin, "methods": steps}}
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
