"""The comparison table, one line a method with every number from a row, and the labels by which tables and figures name models.

A label is the method with the settings in which it differs from the others.
"""

from typing import Any

import numpy as np
import pandas as pd

from vitbench.base.errors import InputError
from vitbench.rows.statistics import PairedComparison, compare_hits, compare_means, unpack_hits

MEGA = 1e6
EAGER = "eager"


def experiment_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The ok rows of one baseline and what was made from it: the baseline of the last row.

    Rows of another model or data set, or of the same model trained in another way (other epochs, another seed), are
    another subject. A column `label` is added: the method's name, with the settings that differ from the first
    that were run. Rows that have it are one subject already.
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
    """The label, among all rows, of the model whose rows `measure` returned.

    Raises:
        InputError: none of these is an ok row among all.
    """
    rows = experiment_rows(rows)
    labels = rows["label"][rows["key"].isin(measured["key"])]
    if not len(labels):
        raise InputError("the rows hold none of what was measured; read them after `measure`, not before")
    return labels.iloc[-1]


def across_seeds(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The values of a metric for the model and images of the last row, of every seed: columns label, seed, value, key.

    A seed is that of the whole way, baseline and method; all other settings are the label's.
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
    """Which rows have the images, the model and the baseline's origin of the last one."""
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
    """The labels that were timed (all, if none was), the baseline first, the others in the order they came.

    Settings of which only accuracy and size were measured, such as the points of a sweep, are left to figures of their
    own.
    """
    timed = rows[rows["metric"] == "latency_p50"]
    return sorted(dict.fromkeys((timed if len(timed) else rows)["label"]), key=lambda label: label != "baseline")


def in_backend(rows: pd.DataFrame, backend: str = EAGER, versus: str = "") -> pd.Series:
    """Which rows were measured in `backend`, or have no backend at all (bytes, eager accuracy).

    `versus` is the backend that a ratio's baseline ran in, by default the same.
    """
    is_in_backend = (rows["backend"] == backend) | rows["backend"].isna()
    return is_in_backend & (rows["versus_backend"].eq(versus) if versus else rows["versus_backend"].isna())


def find_row(
    rows: pd.DataFrame, method: str, metric: str, batch: int | None = None, backend: str = EAGER, versus: str = ""
) -> pd.Series | None:
    """The last row of a metric of the method with that label (at a batch size, `in_backend`), or None.

    A row of that very backend goes before one without.
    """
    matches = (rows["label"] == method) & (rows["metric"] == metric) & in_backend(rows, backend, versus)
    if batch is not None:
        matches &= rows["batch"] == batch
    exact_matches = matches & (rows["backend"] == backend)
    indices = np.flatnonzero(exact_matches if exact_matches.any() else matches)
    return rows.iloc[indices[-1]] if len(indices) else None


def top1_text(rows: pd.DataFrame, label: str, backend: str = EAGER) -> str:
    """Top-1 in per cent with its 95 % interval, as tables show it; "-" where it was not measured."""
    row = find_row(experiment_rows(rows), label, "top1", backend=backend)
    return "-" if row is None else accuracy_text(row)


def accuracy_text(row: pd.Series) -> str:
    """A row of accuracy in per cent with its 95 % interval."""
    return f"{100 * row['value']:.2f} [{100 * row['low']:.2f}, {100 * row['high']:.2f}]"


def top1_difference_text(rows: pd.DataFrame, first: str, second: str) -> str:
    """`paired_top1` in points with its 95 % interval and p, as tables show it."""
    test = paired_top1(experiment_rows(rows), first, second)
    return f"{100 * test.difference:+.2f} [{100 * test.low:+.2f}, {100 * test.high:+.2f}] p = {test.p:.2g}"


def loss_difference_text(rows: pd.DataFrame, first: str, second: str) -> str:
    """`paired_loss` in nats with its 95 % interval and p, as tables show it."""
    test = paired_loss(experiment_rows(rows), first, second)
    return f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}] p = {test.p:.2g}"


def paired_top1(rows: pd.DataFrame, first: str, second: str) -> PairedComparison:
    """By how much the model labelled `first` is right more often than `second` on the same test images."""
    return paired_rows(*_require_both(rows, (first, second), "top1", "hits"))


def _require_both(rows: pd.DataFrame, labels: tuple[str, str], metric: str, field: str) -> list[pd.Series]:
    """The rows of a metric of both models, with their answers image by image in `field`."""
    pair = [find_row(rows, label, metric) for label in labels]
    for label, row in zip(labels, pair, strict=True):
        if row is None or not row[field]:
            raise InputError(f"the rows hold no {metric} of {label!r} image by image; measure its accuracy again")
    return pair


def paired_rows(first: pd.Series, second: pd.Series) -> PairedComparison:
    """Two rows of accuracy, both with their answers image by image, compared on the same images."""
    return compare_hits(*(unpack_hits(row.hits, row.context["images"]) for row in (first, second)))


def paired_loss(rows: pd.DataFrame, first: str, second: str) -> PairedComparison:
    """By how many nats the cross-entropy of the model labelled `first` is above that of `second` on the same test images.

    It sees what top-1 does not, how sure a right or wrong answer is, and so tells apart what top-1 needs more images for.
    """
    return compare_means(*(row["samples"] for row in _require_both(rows, (first, second), "cross_entropy", "samples")))


def ratios(rows: pd.DataFrame, method: str) -> list[pd.Series]:
    """The method's latency ratios in eager mode, one for each batch size, smallest first."""
    ratio_rows = rows[(rows["label"] == method) & (rows["metric"] == "latency_ratio") & in_backend(rows)]
    return [find_row(rows, method, "latency_ratio", batch) for batch in sorted(ratio_rows["batch"].unique())]


def comparison(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a method.

    Columns: top1, low, high (per cent); bytes (MB) and `x smaller`; MACs (M); for each batch size (and each backend
    other than eager, named) the median latency (ms) and its ratio to the baseline timed in turn in the same backend;
    peak RSS (MB), likewise. A number that was not measured is NaN.
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
            selection, name = (
                {"batch": batch, "backend": backend},
                f"b{batch}" if backend == EAGER else f"b{batch} {backend}",
            )
            line[f"p50 ms {name}"] = cell("latency_p50", **selection)
            line[f"ratio {name}"] = 1.0 if method == "baseline" else cell("latency_ratio", **selection)
        for backend in memory_backends:
            name = "peak MB" if backend == EAGER else f"peak MB {backend}"
            line[name] = cell("peak_rss", 1 / MEGA, backend=backend)
        table.append(line)
    return pd.DataFrame(table).set_index("method")


def progress_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What the lessons so far have made of one baseline: a line for each method, in order, at the first of its settings that was timed.

    Columns: top-1 (per cent, 95 %), MB, how many times smaller, multiply-accumulates and time at the smallest batch size over
    the baseline's.
    """
    rows = experiment_rows(rows)

    def number(label: str, metric: str) -> float:
        row = find_row(rows, label, metric)
        return float("nan") if row is None else row["value"]

    first, lines = {}, []
    for label in timed_labels(rows):
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
                "time": 1.0 if label == "baseline" else times[0]["value"] if times else float("nan"),
            }
        )
    return pd.DataFrame(lines).set_index("method").round(2)


def summary_sentences(rows: pd.DataFrame) -> list[str]:
    """One sentence a compressed method: what it saves, what it costs, and whether the accuracies can be told apart."""
    rows, sentences = experiment_rows(rows), []
    base_accuracy, base_bytes = find_row(rows, "baseline", "top1"), find_row(rows, "baseline", "bytes")
    for method in timed_labels(rows):
        accuracy, size = find_row(rows, method, "top1"), find_row(rows, method, "bytes")
        if method == "baseline" or any(row is None for row in (accuracy, size, base_accuracy, base_bytes)):
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
    """Each row's method, with `key=value` for the settings that are not those of the method's first row."""
    default_settings: dict[str, dict[str, Any]] = {}
    label_cache: dict[tuple[str, int], str] = {}  # many rows share a config, the object
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
    """The method with the settings that are not the usual ones."""
    differing = sorted(
        key
        for key, value in settings.items()
        if value != default_settings.get(key, value) and _has_effect(key, settings)
    )
    return method + (f" ({', '.join(f'{key}={_short(settings[key])}' for key in differing)})" if differing else "")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What each of a row's methods was told, as one mapping."""
    steps, settings = config.get("methods", []), {}
    for step in steps:
        _flatten(step["config"], f"{step['method']}." if len(steps) > 1 else "", settings)
    return settings


def _short(setting: Any) -> Any:
    """A setting as labels show it: 0.40625 and not 0.4062499999674."""
    return f"{setting:.6g}" if isinstance(setting, float) else setting


def _has_effect(key: str, settings: dict[str, Any]) -> bool:
    """Whether a setting does anything: how to train does not where there are 0 epochs of it."""
    group, _, name = key.rpartition(".")
    return name == "epochs" or settings.get(f"{group}.epochs") != 0


def _flatten(config: dict[str, Any], prefix: str, target: dict[str, Any]) -> None:
    """Put the settings of nested configs into `target`, as `train.epochs` and the like."""
    for key, value in config.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{key}.", target)
        else:
            target[prefix + key] = value
