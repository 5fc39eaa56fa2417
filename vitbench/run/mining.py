"""Mine a model: try methods on a folder of images within a time limit, and keep the best file within a budget.

Each method is set to the operating point that saves least within the budget (`fit_budget`). Methods that only calibrate come
first, trained ones after them. The val split chooses; the test split only reports. All that is finished is kept, so the same
call goes on where it stopped.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitbench.base import progress
from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.base.files import check_target
from vitbench.base.store import Store, work_key
from vitbench.data.splits import ImageData
from vitbench.measurement.cost import count_macs, model_row_fields
from vitbench.methods.registry import METHODS, make_config
from vitbench.model import artifact
from vitbench.rows.records import Row
from vitbench.rows.runs import Run
from vitbench.rows.statistics import wilson
from vitbench.rows.words import display_labels
from vitbench.run.bench import Bench
from vitbench.run.cache import CachedModel, baseline, compress_cached
from vitbench.run.candidates import Candidate, candidates
from vitbench.run.combinations import fit_budget
from vitbench.run.mined import METRICS, Budget, Mined, MinedModel, model_line, parse_budget
from vitbench.run.suite import open_data
from vitbench.training.config import TrainConfig
from vitbench.training.loop import evaluate

# settings while an operating point is looked for: they take less time and leave the cost as it is
FAST: dict[str, dict[str, Any]] = {
    "mixed_rank": {"compensation": "none"},
    "pruning": {"compensation": "none"},
    "uct": {"start": "weights"},
}
MIN_IMAGES = 30  # of val and of test
VAL_IMAGES = 200  # to choose on, where the folder has no val split and 0.1 of it is less
PASSES = 4  # an image that is trained on, in forward passes: one, two more backward, one of the teacher


def load_images(
    folder: str, name: str = "", splits: Mapping[str, Any] | None = None
) -> tuple[ImageData, dict[str, Any]]:
    """Load images to choose and report on, and return them with the splits' settings that give the same again.

    Of a small folder without a val split, val gets up to a third of what test leaves, since 0.1 of it would choose by luck.

    Raises:
        InputError: fewer than `MIN_IMAGES` val or test images, or what `load_data` raises.
    """
    splits = dict(splits or {})
    data = open_data(folder, name, splits)
    if "val" not in splits and data.origin["val"] == "cut from train" and len(data.val) < VAL_IMAGES:
        splits["val"] = max(1, min(VAL_IMAGES, (len(data.train) + len(data.val)) // 3))
        data = open_data(folder, name, splits)
    for split in ("val", "test"):
        if (count := len(getattr(data, split))) < MIN_IMAGES:
            raise InputError(
                f"{data.name} has {count} {split} images ({data.describe()}), and a score needs at least {MIN_IMAGES}; "
                "give more images: 200 of each class are a good start"
            )
    return data, splits


def mine(
    model: str,
    data: ImageData,
    budget: str,
    run: Run,
    *,
    minutes: float = 10.0,
    epochs: int = 3,
    seed: int = 0,
    checkpoint: str | Path = "",
    pretrained: bool = False,
    img_size: int | None = None,
    threads: int = 2,
    rounds: int = 20,
) -> Mined:
    """Try methods on a model for some minutes, and save the best within a budget to the folder `best` of `run`.

    The model that is at work when the time is up is finished; a training that would not end in time is left out.

    Args:
        model: the folder of a saved model that is uncompressed or has packed weights, or a name for `create_model` with a
            `checkpoint` or `pretrained`.
        data: as `load_images` returns them; train and calibration make the models, val chooses, test reports.
        budget: see `parse_budget`.
        run: the results folder, for the rows, for `base` (the model with dense weights) and for `best`.
        minutes: how long new models are started; finished ones of an earlier call cost nothing.
        epochs: of each training; 0 trains nothing.
        seed: of the trainings.
        threads, rounds: of timings.

    Raises:
        InputError: a budget that cannot be read or that the model is within, a model that is not for these images, or a
            folder with files of others.
    """
    start, wanted = time.monotonic(), parse_budget(budget)
    if not minutes > 0 or epochs < 0:
        raise InputError(f"minutes = {minutes}, epochs = {epochs}: give minutes above 0, and epochs from 0 on")
    for name in ("base", "best"):
        check_target(run.folder / name, artifact.MODEL_FOLDER)
    base = baseline(model, data, TrainConfig(epochs=0), pretrained=pretrained, checkpoint=checkpoint, img_size=img_size)
    miner = _Miner(Bench(base, data, run, threads=threads, rounds=rounds), wanted, seed)
    miner.check_rows()
    own = miner.own_cost(Path(model).expanduser())
    miner.limit = wanted.limit(own)
    seconds_per_image = miner.check_base()
    miner.measure()
    artifact.save(base.model, run.folder / "base")
    models: list[MinedModel] = []
    reasons: dict[str, str] = {}
    left_out: list[str] = []
    bar = progress.progress_bar(candidates(base.model, wanted.cost, epochs), "mining", unit="model")
    for candidate in bar:
        seconds_left = 60 * minutes - (time.monotonic() - start)
        expected = PASSES * seconds_per_image * len(data.train) * candidate.epochs
        if seconds_left <= expected and not miner.is_finished(candidate):
            left_out.append(candidate.name)
            continue
        try:
            models.append(miner.make(candidate))
        except InputError as error:
            if str(error) not in reasons.values():  # the same method with training cannot either
                bar.write(f"{'-':>14}  {'cannot':8}  {candidate.name}: {str(error)[:110]}")
            reasons[candidate.name] = str(error)
            continue
        name = display_labels(miner.bench.rows, [models[-1].label])[models[-1].label]
        bar.write(model_line(models[-1], name, wanted.cost, miner.limit))
    within = [one for one in models if one.cost <= miner.limit]
    best = max(within, key=lambda one: (one.val_top1, -one.val_loss), default=None)
    if best is not None:
        artifact.save(artifact.load(best.path), run.folder / "best")
    else:  # one of another budget would be taken for this one's
        shutil.rmtree(run.folder / "best", ignore_errors=True)
    seconds = time.monotonic() - start
    return Mined(wanted.cost, miner.limit, own, base, models, best, reasons, left_out, seconds)


class _Miner:
    """Makes, measures and scores the models of one call of `mine`."""

    limit: float

    def __init__(self, bench: Bench, budget: Budget, seed: int):
        self.bench, self.budget, self.seed = bench, budget, seed
        facts = {"model": artifact.model_digest(bench.base.model), "data": bench.data.fingerprint, "seed": seed}
        facts |= {"cost": budget.cost, "value": budget.value}
        self.journal = Store("mining").journal(work_key("run", facts))
        self.notes = self.journal.read()

    def measure(self, *configs: Config) -> str:
        """Measure a model and return its label; without configs, the base."""
        return self.bench.measure(*configs, what=("accuracy", "size", "latency"), batches=(1,))

    def cost(self, label: str) -> float:
        """The cost of a measured model.

        Raises:
            InputError: it could not be measured.
        """
        row = self.bench.find_row(label, METRICS[self.budget.cost], 1 if self.budget.cost == "latency" else None)
        if row is None:
            raise InputError(f"{self.budget.cost} of {label} could not be measured")
        return float(row["value"])

    def own_cost(self, given: Path) -> float:
        """The cost of the given model; the bytes of a saved one are those of its own file, which may be packed."""
        base = self.bench.base
        if self.budget.cost == "macs":
            return float(count_macs(base.model))
        if self.budget.cost == "bytes":
            return float(artifact.size_on_disk(given if (given / artifact.RECIPE).is_file() else base.path))
        return self.cost(self.measure())

    def check_rows(self) -> None:
        """Raise `InputError` if the results folder has rows of another model or of other images."""
        bench = self.bench
        if not bench.run.records.exists() or not len(rows := bench.run.rows()):
            return
        fields, last = model_row_fields(bench.base.model.recipe, bench.data), rows.iloc[-1]
        same = all(last[key] == fields[key] for key in ("model", "data_fingerprint"))
        if not same or last["config"].get("origin") != fields["config"]["origin"]:
            raise InputError(
                f"{str(bench.run.folder)!r} holds rows of {last['model']} on {last['dataset']} with other weights or images; "
                "give each model and each set of images a results folder of its own (--out)"
            )

    def check_base(self) -> float:
        """The seconds that one image takes.

        Raises:
            InputError: on the val split the model is not better than guessing.
        """
        data, base, start = self.bench.data, self.bench.base, time.monotonic()
        hits = evaluate(base.model, data.val).top1
        seconds, guessed = time.monotonic() - start, np.bincount(data.val.labels).max()
        if wilson(hits.sum(), len(hits))[0] <= guessed / len(hits):
            raise InputError(
                f"the model is right on {hits.sum()} of {len(hits)} val images of {data.name}, where always the same answer gives "
                f"{guessed}; if its outputs have another order, give it: --splits classes=[NAME,NAME,...]"
            )
        return seconds / len(hits)

    def is_finished(self, candidate: Candidate) -> bool:
        """Whether an earlier call made this model."""
        return candidate.name in self.notes

    def make(self, candidate: Candidate) -> MinedModel:
        """Make, measure and score a model; raises `InputError` if the method cannot."""
        config = self._config(candidate)
        cached = compress_cached(self.bench.base, config, self.bench.data)
        label = self.measure(config)
        top1, loss = self._val_scores(cached)
        self._keep(candidate.name, "made")
        return MinedModel(label, config, cached.path, self.cost(label), top1, loss)

    def _config(self, candidate: Candidate) -> Config:
        settings = dict(candidate.settings)
        if candidate.fitted:
            settings |= self._operating_point(candidate.method)
        if candidate.epochs:
            settings["train"] = {"epochs": candidate.epochs, "seed": self.seed}
        return make_config(candidate.method, settings)

    def _operating_point(self, name: str) -> dict[str, Any]:
        """The settings with which a method saves least within the budget; looked for once."""
        note = f"operating point of {name}"
        if note not in self.notes:
            bench, points_of = self.bench, METHODS[name].operating_points
            assert points_of is not None  # else the candidate would not be fitted
            target = self.limit / self.cost("baseline") if self.budget.cost == "latency" else self.limit
            how: dict[str, Any] = {"cost": self.budget.cost, "target": target, "settings": FAST.get(name)}
            how |= {"threads": bench.measures.threads, "rounds": bench.measures.rounds}
            try:
                config = fit_budget(bench.base.model, name, bench.data, **how).to_dict()
                self._keep(note, {key: config[key] for key in points_of(bench.base.model)[0]})
            except InputError as error:
                self._keep(note, str(error))
        point = self.notes[note]
        if isinstance(point, str):
            raise InputError(point)
        return point

    def _keep(self, name: str, value: Any) -> None:
        if name not in self.notes:
            self.notes[name] = value
            self.journal.append(name, value)

    def _val_scores(self, cached: CachedModel) -> tuple[float, float]:
        """Top-1 and loss on the val split, which are kept as rows."""
        bench, manifest = self.bench, artifact.read_manifest(cached.path)
        context = {"split": "val", "images": len(bench.data.val), "artifact": manifest.sha256[:12]}
        fields = model_row_fields(manifest.recipe, bench.data) | {"context": context}
        fields |= {"source": "measured: val split, which chooses", "value": 0.0}
        units = {"choice_top1": "fraction", "choice_loss": "nats"}
        rows = [Row(**fields, metric=metric, unit=unit) for metric, unit in units.items()]
        known = bench.run.rows().set_index("key")["value"]
        keys = [row.compute_key() for row in rows]
        if not all(key in known.index for key in keys):
            scores = evaluate(cached.model, bench.data.val)
            values = float(scores.top1.mean()), float(scores.loss.mean())
            bench.run.append(row.replace(value=value) for row, value in zip(rows, values, strict=True))
            return values
        return known[keys[0]], known[keys[1]]
