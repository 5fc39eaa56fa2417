"""The comparison table, with one line for each method and all numbers from rows, and the labels of models.

A label is the method's name with the settings that differ from those of the method's first row.
"""

from typing import Any

import numpy as np
import pandas as pd

from vitbench.base.errors import InputError
from vitbench.rows.statistics import PairedComparison, compare_hits, compare_means, unpack_hits

MEGA = 1e6
EAGER = "eager"


def experiment_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The ok rows of one experiment, a baseline and the models made from it: that of the last row.

    Rows of another model or data set, or of a baseline that was trained with other settings or another seed, belong to
    another experiment. A column `label` is added (see `row_labels`). Rows that have this column are returned unchanged.

    Raises:
        InputError: there is no ok row.
    """
    if "label" in rows:
        return rows
    ok_rows = rows[rows["status"] == "ok"]
    if not len(ok_rows):
        raise InputError("the records hold no ok row; run the baseline and a method first")
    ok_rows = ok_rows[_same_experiment(ok_rows)].copy()
    ok_rows["label"] = row_labels(ok_rows)
    return ok_rows


def label_of(rows: pd.DataFrame, measured: pd.DataFrame) -> str:
    """The label in `rows` of the model whose rows are `measured`, as `measure` returned them.

    Raises:
        InputError: `rows` has no ok row with one of their keys.
    """
    rows = experiment_rows(rows)
    labels = rows["label"][rows["key"].isin(measured["key"])]
    if not len(labels):
        raise InputError("the rows hold none of the measured rows; read them after `measure`, not before")
    return labels.iloc[-1]


def across_seeds(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The values of a metric for all seeds, for the model and images of the last row: columns label, seed, value, key.

    The seed is that of both baseline and method. All other settings are those of the label.
    """
    ok_rows = rows[(rows["status"] == "ok") & (rows["metric"] == metric)]
    ok_rows = ok_rows.assign(config=ok_rows["config"].map(_seedless))
    ok_rows = ok_rows[_same_experiment(ok_rows)].copy()
    ok_rows["label"] = row_labels(ok_rows)
    return ok_rows.drop_duplicates(["label", "seed"], keep="last")[["label", "seed", "value", "key"]]


def _seedless(config: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config, dict):
        return {key: _seedless(value) for key, value in config.items() if key != "seed"}
    return [_seedless(item) for item in config] if isinstance(config, list) else config


def _same_experiment(rows: pd.DataFrame) -> pd.Series:
    """Whether each row has the images, the model and the origin of the baseline of the last row."""
    last = rows.iloc[-1]
    is_same = rows["model"].eq(last["model"]) & rows["data_fingerprint"].eq(last["data_fingerprint"])
    is_same &= rows["dataset"].eq(last["dataset"])
    trained = _origins_of_files(rows[is_same])
    origin = _origin(last["config"], trained)
    is_same[is_same] = [_origin(config, trained) == origin for config in rows["config"][is_same]]
    return is_same


def _origins_of_files(rows: pd.DataFrame) -> dict[str, Any]:
    """How each baseline's weights were made, by the start of the SHA-256 of its file."""
    baselines = rows[rows["method"] == "baseline"]
    files = (context.get("artifact") for context in baselines["context"])
    return {file: config.get("origin") for file, config in zip(files, baselines["config"], strict=True) if file}


def _origin(config: dict[str, Any], trained: dict[str, Any]) -> Any:
    """How the weights were made; of a model that starts from a baseline's very file, how that one's were made."""
    origin = config.get("origin") or {}
    if origin.get("head") == "same" and "train" not in origin:
        return trained.get(origin.get("start", "").rpartition(":")[2], origin)
    return origin


def timed_labels(rows: pd.DataFrame) -> list[str]:
    """The labels with a latency (all labels, if none has one), the baseline first, the others in the order of their rows.

    Models without a latency, such as the operating points of a sweep, are shown in other figures.
    """
    timed = rows[rows["metric"] == "latency_p50"]
    return sorted(dict.fromkeys((timed if len(timed) else rows)["label"]), key=lambda label: label != "baseline")


def in_backend(rows: pd.DataFrame, backend: str = EAGER, versus: str = "") -> pd.Series:
    """Whether each row was measured in `backend` or has no backend (bytes, eager accuracy).

    `versus` is the backend of the baseline of a latency ratio; "" means the same backend.
    """
    is_in_backend = (rows["backend"] == backend) | rows["backend"].isna()
    return is_in_backend & (rows["versus_backend"].eq(versus) if versus else rows["versus_backend"].isna())


def find_row(
    rows: pd.DataFrame, method: str, metric: str, batch: int | None = None, backend: str = EAGER, versus: str = ""
) -> pd.Series | None:
    """The last row of a metric of the model with the label `method`, at a batch size and `in_backend`; None if there is none.

    A row of this backend is preferred to one without a backend.
    """
    matches = (rows["label"] == method) & (rows["metric"] == metric) & in_backend(rows, backend, versus)
    if batch is not None:
        matches &= rows["batch"] == batch
    exact_matches = matches & (rows["backend"] == backend)
    indices = np.flatnonzero(exact_matches if exact_matches.any() else matches)
    return rows.iloc[indices[-1]] if len(indices) else None


def top1_text(rows: pd.DataFrame, label: str, backend: str = EAGER) -> str:
    """Top-1 in per cent with its 95 % interval, as text for tables; "-" if it was not measured."""
    row = find_row(experiment_rows(rows), label, "top1", backend=backend)
    return "-" if row is None else accuracy_text(row)


def accuracy_text(row: pd.Series) -> str:
    """A row of accuracy in per cent with its 95 % interval, as text."""
    return f"{100 * row['value']:.2f} [{100 * row['low']:.2f}, {100 * row['high']:.2f}]"


def top1_difference_text(rows: pd.DataFrame, first: str, second: str) -> str:
    """`paired_top1` in percentage points with its 95 % interval and p, as text for tables."""
    test = paired_top1(experiment_rows(rows), first, second)
    return f"{100 * test.difference:+.2f} [{100 * test.low:+.2f}, {100 * test.high:+.2f}] p = {test.p:.2g}"


def loss_difference_text(rows: pd.DataFrame, first: str, second: str) -> str:
    """`paired_loss` in nats with its 95 % interval and p, as text for tables."""
    test = paired_loss(experiment_rows(rows), first, second)
    return f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}] p = {test.p:.2g}"


def paired_top1(rows: pd.DataFrame, first: str, second: str) -> PairedComparison:
    """Top-1 of the model labelled `first` minus that of `second`, on the same test images."""
    return paired_rows(*_require_both(rows, (first, second), "top1", "hits"))


def _require_both(rows: pd.DataFrame, labels: tuple[str, str], metric: str, field: str) -> list[pd.Series]:
    """The rows of a metric of both models; `field` has their values for each image.

    Raises:
        InputError: a row is missing, or has no values for each image.
    """
    pair = []
    for label in labels:
        row = find_row(rows, label, metric)
        if row is None or not row[field]:
            raise InputError(f"the rows hold no {metric} of {label!r} image by image; measure its accuracy again")
        pair.append(row)
    return pair


def paired_rows(first: pd.Series, second: pd.Series) -> PairedComparison:
    """Compare two rows of top1 on the same images; both must have hits."""
    return compare_hits(*(unpack_hits(row.hits, row.context["images"]) for row in (first, second)))


def paired_loss(rows: pd.DataFrame, first: str, second: str) -> PairedComparison:
    """The cross-entropy of the model labelled `first` minus that of `second`, in nats, on the same test images.

    It includes the probability of the right class, so it shows differences for which top-1 needs more images.
    """
    return compare_means(*(row["samples"] for row in _require_both(rows, (first, second), "cross_entropy", "samples")))


def ratios(rows: pd.DataFrame, method: str) -> list[pd.Series]:
    """The method's rows of latency ratios in eager mode, one for each batch size, smallest batch first."""
    ratio_rows = rows[(rows["label"] == method) & (rows["metric"] == "latency_ratio") & in_backend(rows)]
    found = [find_row(rows, method, "latency_ratio", batch) for batch in sorted(ratio_rows["batch"].unique())]
    return [row for row in found if row is not None]


def comparison(rows: pd.DataFrame) -> pd.DataFrame:
    """The comparison table, with one line for each method.

    Columns: top1, low, high (per cent); bytes (MB) and `x smaller`; MACs (M); for each backend and batch size the median
    latency (ms) and the ratio to the baseline, which was timed alternately in the same backend; for each backend the
    peak RSS (MB). Column names give the backend unless it is eager. A number that was not measured is NaN.
    """
    rows = experiment_rows(rows)
    latency_rows = rows[(rows["metric"] == "latency_p50") & rows["versus_backend"].isna()]
    timed = sorted(
        {(row.backend, int(row.batch)) for row in latency_rows.itertuples()}, key=lambda pair: (pair[0] != EAGER, *pair)
    )
    memory_backends = sorted(
        set(rows["backend"][rows["metric"] == "peak_rss"]), key=lambda backend: (backend != EAGER, backend)
    )
    base = find_row(rows, "baseline", "bytes")
    table = []
    for method in timed_labels(rows):

        def cell(metric: str, scale: float = 1.0, field: str = "value", method=method, **selection: Any) -> float:
            row = find_row(rows, method, metric, **selection)
            return float("nan") if row is None or row[field] is None else row[field] * scale

        line = {
            "method": method,
            "top1 %": cell("top1", 100),
            "low %": cell("top1", 100, field="low"),
            "high %": cell("top1", 100, field="high"),
            "MB": cell("bytes", 1 / MEGA),
            "x smaller": (base["value"] if base is not None else float("nan")) / cell("bytes"),
            "M MACs": cell("macs", 1 / MEGA),
        }
        for backend, batch in timed:
            selection = {"batch": batch, "backend": backend}
            name = f"b{batch}" if backend == EAGER else f"b{batch} {backend}"
            line[f"p50 ms {name}"] = cell("latency_p50", **selection)
            line[f"ratio {name}"] = 1.0 if method == "baseline" else cell("latency_ratio", **selection)
        for backend in memory_backends:
            name = "peak MB" if backend == EAGER else f"peak MB {backend}"
            line[name] = cell("peak_rss", 1 / MEGA, backend=backend)
        table.append(line)
    return pd.DataFrame(table).set_index("method")


def progress_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The models that the lessons have made from one baseline so far: for each method the first settings with a latency.

    Methods of which no settings were timed follow, with their first settings and "-" as the time.

    Columns: top-1 (per cent, with its 95 % interval), MB, `x smaller`, and the ratios of multiply-accumulates and of the
    latency at the smallest batch size to the baseline's.
    """
    rows = experiment_rows(rows)

    def number(label: str, metric: str) -> float:
        row = find_row(rows, label, metric)
        return float("nan") if row is None else row["value"]

    first: dict[str, str] = {}
    lines = []
    for label in (*timed_labels(rows), *rows["label"]):
        first.setdefault(label.partition(" (")[0], label)
    for method, label in first.items():
        size, times = number(label, "bytes"), ratios(rows, label)
        lines.append(
            {
                "method": method,
                "top-1 %": top1_text(rows, label),
                "MB": size / MEGA,
                "x smaller": number("baseline", "bytes") / size,
                "MACs": number(label, "macs") / number("baseline", "macs"),
                "time": 1.0 if label == "baseline" else round(times[0]["value"], 2) if times else "-",
            }
        )
    return pd.DataFrame(lines).set_index("method").round(2)


def summary_sentences(rows: pd.DataFrame) -> list[str]:
    """One sentence for each compressed method: its size, its accuracy, whether the intervals overlap, and its latency."""
    rows, sentences = experiment_rows(rows), []
    base_accuracy, base_bytes = find_row(rows, "baseline", "top1"), find_row(rows, "baseline", "bytes")
    for method in timed_labels(rows):
        accuracy, size = find_row(rows, method, "top1"), find_row(rows, method, "bytes")
        if method == "baseline" or accuracy is None or size is None or base_accuracy is None or base_bytes is None:
            continue
        points = 100 * (accuracy["value"] - base_accuracy["value"])
        overlap = accuracy["low"] <= base_accuracy["high"] and base_accuracy["low"] <= accuracy["high"]
        text = (
            f"{method}: {size['value'] / base_bytes['value']:.3f} of the baseline's bytes, top-1 {100 * accuracy['value']:.2f} % "
            f"against {100 * base_accuracy['value']:.2f} % ({points:+.2f} points; the 95 % intervals "
            f"{'overlap' if overlap else 'do not overlap'})"
        )
        for row in ratios(rows, method):
            text += (
                f"; {row['value']:.2f} of its time at batch {int(row['batch'])} [{row['low']:.2f}, {row['high']:.2f}]"
            )
        sentences.append(text + ".")
    return sentences


def row_labels(rows: pd.DataFrame) -> list[str]:
    """The label of each row: the method, with `key=value` for settings that differ from those of the method's first row."""
    default_settings: dict[str, dict[str, Any]] = {}
    label_cache: dict[tuple[str, int], str] = {}  # many rows share one config object
    labels = []
    for method, config in zip(rows["method"], rows["config"], strict=True):
        label = label_cache.get((method, id(config)))
        if label is None:
            settings = _settings(config)
            label = label_cache[method, id(config)] = _label(
                method, settings, default_settings.setdefault(method, settings)
            )
        labels.append(label)
    return labels


def _label(method: str, settings: dict[str, Any], default_settings: dict[str, Any]) -> str:
    """The method with the settings that differ from the default ones."""
    differing = sorted(
        key
        for key, value in settings.items()
        if value != default_settings.get(key, value) and _has_effect(key, settings)
    )
    return method + (f" ({', '.join(f'{key}={_short(settings[key])}' for key in differing)})" if differing else "")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of all methods of a row, in one mapping."""
    steps = config.get("methods", [])
    settings: dict[str, Any] = {}
    for step in steps:
        _flatten(step["config"], f"{step['method']}." if len(steps) > 1 else "", settings)
    return settings


def _short(setting: Any) -> Any:
    """A setting in a label: 0.40625 instead of 0.4062499999674."""
    return f"{setting:.6g}" if isinstance(setting, float) else setting


def _has_effect(key: str, settings: dict[str, Any]) -> bool:
    """Whether a setting has an effect; settings of a training of 0 epochs have none."""
    group, _, name = key.rpartition(".")
    return name == "epochs" or settings.get(f"{group}.epochs") != 0


def _flatten(config: dict[str, Any], prefix: str, target: dict[str, Any]) -> None:
    """Add the settings of nested configs to `target`, under keys such as `train.epochs`."""
    for key, value in config.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{key}.", target)
        else:
            target[prefix + key] = value
