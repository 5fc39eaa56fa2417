"""The comparison table, one line a method with every number from a row, and the labels by which tables and figures name models.

A label is the method with the settings in which it differs from the others.
"""

from typing import Any

import numpy as np
import pandas as pd

from vitbench.base.errors import InputError
from vitbench.rows.statistics import Paired, paired, paired_means, unpack_hits

MEGA = 1e6
EAGER = "eager"


def subject(rows: pd.DataFrame) -> pd.DataFrame:
    """The ok rows of one baseline and what was made from it: the baseline of the last row.

    Rows of another model or data set, or of the same model trained in another way (other epochs, another seed), are
    another subject. A column `label` is added: the method's name, with the settings that differ from the first
    that were run. Rows that have it are one subject already.
    """
    if "label" in rows:
        return rows
    good = rows[rows["status"] == "ok"]
    if not len(good):
        raise InputError("the records hold no ok row; run the baseline and a method first")
    good = good[_of_the_last(good)].copy()
    good["label"] = labels_of(good)
    return good


def label_of(rows: pd.DataFrame, measured: pd.DataFrame) -> str:
    """The label, among all rows, of the model whose rows `measure` returned.

    Raises:
        InputError: none of these is an ok row among all.
    """
    rows = subject(rows)
    labels = rows["label"][rows["key"].isin(measured["key"])]
    if not len(labels):
        raise InputError("the rows hold none of what was measured; read them after `measure`, not before")
    return labels.iloc[-1]


def across_seeds(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The values of a metric for the model and images of the last row, of every seed: columns label, seed, value, key.

    A seed is that of the whole way, baseline and method; all other settings are the label's.
    """
    good = rows[(rows["status"] == "ok") & (rows["metric"] == metric)]
    good = good.assign(config=good["config"].map(_seedless))
    good = good[_of_the_last(good)].copy()
    good["label"] = labels_of(good)
    return good.drop_duplicates(["label", "seed"], keep="last")[["label", "seed", "value", "key"]]


def _seedless(config: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config, dict):
        return {key: _seedless(value) for key, value in config.items() if key != "seed"}
    return [_seedless(item) for item in config] if isinstance(config, list) else config


def _of_the_last(rows: pd.DataFrame) -> pd.Series:
    """Which rows have the images, the model and the baseline's origin of the last one."""
    last = rows.iloc[-1]
    same = rows["model"].eq(last["model"]) & rows["data_fingerprint"].eq(last["data_fingerprint"])
    same &= rows["dataset"].eq(last["dataset"])
    origin = last["config"].get("origin")
    same[same] = [config.get("origin") == origin for config in rows["config"][same]]
    return same


def methods(rows: pd.DataFrame) -> list[str]:
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
    own = (rows["backend"] == backend) | rows["backend"].isna()
    return own & (rows["versus_backend"].eq(versus) if versus else rows["versus_backend"].isna())


def value(
    rows: pd.DataFrame, method: str, metric: str, batch: int | None = None, backend: str = EAGER, versus: str = ""
) -> pd.Series | None:
    """The last row of a metric of the method with that label (at a batch size, `in_backend`), or None.

    A row of that very backend goes before one without.
    """
    chosen = (rows["label"] == method) & (rows["metric"] == metric) & in_backend(rows, backend, versus)
    if batch is not None:
        chosen &= rows["batch"] == batch
    exact = chosen & (rows["backend"] == backend)
    places = np.flatnonzero(exact if exact.any() else chosen)
    return rows.iloc[places[-1]] if len(places) else None


def percent(rows: pd.DataFrame, label: str, backend: str = EAGER) -> str:
    """Top-1 in per cent with its 95 % interval, as tables show it; "-" where it was not measured."""
    row = value(subject(rows), label, "top1", backend=backend)
    return "-" if row is None else accuracy_text(row)


def accuracy_text(row: pd.Series) -> str:
    """A row of accuracy in per cent with its 95 % interval."""
    return f"{100 * row['value']:.2f} [{100 * row['low']:.2f}, {100 * row['high']:.2f}]"


def points(rows: pd.DataFrame, first: str, second: str) -> str:
    """`paired_top1` in points with its 95 % interval and p, as tables show it."""
    test = paired_top1(subject(rows), first, second)
    return f"{100 * test.difference:+.2f} [{100 * test.low:+.2f}, {100 * test.high:+.2f}] p = {test.p:.2g}"


def nats(rows: pd.DataFrame, first: str, second: str) -> str:
    """`paired_loss` in nats with its 95 % interval and p, as tables show it."""
    test = paired_loss(subject(rows), first, second)
    return f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}] p = {test.p:.2g}"


def paired_top1(rows: pd.DataFrame, first: str, second: str) -> Paired:
    """By how much the model labelled `first` is right more often than `second` on the same test images."""
    return paired_rows(*_both(rows, (first, second), "top1", "hits"))


def _both(rows: pd.DataFrame, labels: tuple[str, str], metric: str, field: str) -> list[pd.Series]:
    """The rows of a metric of both models, with their answers image by image in `field`."""
    found = [value(rows, label, metric) for label in labels]
    for label, row in zip(labels, found, strict=True):
        if row is None or not row[field]:
            raise InputError(f"the rows hold no {metric} of {label!r} image by image; measure its accuracy again")
    return found


def paired_rows(first: pd.Series, second: pd.Series) -> Paired:
    """Two rows of accuracy, both with their answers image by image, compared on the same images."""
    return paired(*(unpack_hits(row.hits, row.context["images"]) for row in (first, second)))


def paired_loss(rows: pd.DataFrame, first: str, second: str) -> Paired:
    """By how many nats the cross-entropy of the model labelled `first` is above that of `second` on the same test images.

    It sees what top-1 does not, how sure a right or wrong answer is, and so tells apart what top-1 needs more images for.
    """
    return paired_means(*(row["samples"] for row in _both(rows, (first, second), "cross_entropy", "samples")))


def ratios(rows: pd.DataFrame, method: str) -> list[pd.Series]:
    """The method's latency ratios in eager mode, one for each batch size, smallest first."""
    own = rows[(rows["label"] == method) & (rows["metric"] == "latency_ratio") & in_backend(rows)]
    return [value(rows, method, "latency_ratio", batch) for batch in sorted(own["batch"].unique())]


def comparison(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a method.

    Columns: top1, low, high (per cent); bytes (MB) and `x smaller`; MACs (M); for each batch size (and each backend
    other than eager, named) the median latency (ms) and its ratio to the baseline timed in turn in the same backend;
    peak RSS (MB), likewise. A number that was not measured is NaN.
    """
    rows = subject(rows)
    found = rows[(rows["metric"] == "latency_p50") & rows["versus_backend"].isna()]
    timed = sorted(
        {(row.backend, int(row.batch)) for row in found.itertuples()}, key=lambda pair: (pair[0] != EAGER, *pair)
    )
    held = sorted(set(rows["backend"][rows["metric"] == "peak_rss"]), key=lambda backend: (backend != EAGER, backend))
    base = value(rows, "baseline", "bytes")
    table = []
    for method in methods(rows):

        def number(metric: str, scale: float = 1.0, field: str = "value", method=method, **where: Any) -> float:
            row = value(rows, method, metric, **where)
            return float("nan") if row is None or row[field] is None else row[field] * scale

        line = {
            "method": method,
            "top1 %": number("top1", 100),
            "low %": number("top1", 100, field="low"),
            "high %": number("top1", 100, field="high"),
            "MB": number("bytes", 1 / MEGA),
            "x smaller": (base["value"] if base is not None else float("nan")) / number("bytes"),
            "M MACs": number("macs", 1 / MEGA),
        }
        for backend, batch in timed:
            where, name = (
                {"batch": batch, "backend": backend},
                f"b{batch}" if backend == EAGER else f"b{batch} {backend}",
            )
            line[f"p50 ms {name}"] = number("latency_p50", **where)
            line[f"ratio {name}"] = 1.0 if method == "baseline" else number("latency_ratio", **where)
        for backend in held:
            name = "peak MB" if backend == EAGER else f"peak MB {backend}"
            line[name] = number("peak_rss", 1 / MEGA, backend=backend)
        table.append(line)
    return pd.DataFrame(table).set_index("method")


def running_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What the lessons so far have made of one baseline: a line for each method, in order, at the first of its settings that was timed.

    Columns: top-1 (per cent, 95 %), MB, how many times smaller, multiply-accumulates and time at the smallest batch size over
    the baseline's.
    """
    rows = subject(rows)

    def number(label: str, metric: str) -> float:
        row = value(rows, label, metric)
        return float("nan") if row is None else row["value"]

    first, lines = {}, []
    for label in methods(rows):
        first.setdefault(label.partition(" (")[0], label)
    for method, label in first.items():
        size, times = number(label, "bytes"), ratios(rows, label)
        lines.append(
            {
                "method": method,
                "top-1 %": percent(rows, label),
                "MB": size / MEGA,
                "x smaller": number("baseline", "bytes") / size,
                "MACs": number(label, "macs") / number("baseline", "macs"),
                "time": 1.0 if label == "baseline" else times[0]["value"] if times else float("nan"),
            }
        )
    return pd.DataFrame(lines).set_index("method").round(2)


def findings(rows: pd.DataFrame) -> list[str]:
    """One sentence a compressed method: what it saves, what it costs, and whether the accuracies can be told apart."""
    rows, sentences = subject(rows), []
    base_accuracy, base_bytes = value(rows, "baseline", "top1"), value(rows, "baseline", "bytes")
    for method in methods(rows):
        accuracy, size = value(rows, method, "top1"), value(rows, method, "bytes")
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


def labels_of(rows: pd.DataFrame) -> list[str]:
    """Each row's method, with `key=value` for the settings that are not those of the method's first row."""
    usual: dict[str, dict[str, Any]] = {}
    known: dict[tuple[str, int], str] = {}  # many rows share a config, the object
    labels = []
    for method, config in zip(rows["method"], rows["config"], strict=True):
        label = known.get((method, id(config)))
        if label is None:
            own = _settings(config)
            label = known[method, id(config)] = _label(method, own, usual.setdefault(method, own))
        labels.append(label)
    return labels


def _label(method: str, own: dict[str, Any], usual: dict[str, Any]) -> str:
    """The method with the settings that are not the usual ones."""
    apart = sorted(key for key, value in own.items() if value != usual.get(key, value) and _matters(key, own))
    return method + (f" ({', '.join(f'{key}={_short(own[key])}' for key in apart)})" if apart else "")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What each of a row's methods was told, as one mapping."""
    steps, settings = config.get("methods", []), {}
    for step in steps:
        _flatten(step["config"], f"{step['method']}." if len(steps) > 1 else "", settings)
    return settings


def _short(setting: Any) -> Any:
    """A setting as labels show it: 0.40625 and not 0.4062499999674."""
    return f"{setting:.6g}" if isinstance(setting, float) else setting


def _matters(key: str, settings: dict[str, Any]) -> bool:
    """Whether a setting does anything: how to train does not where there are 0 epochs of it."""
    group, _, name = key.rpartition(".")
    return name == "epochs" or settings.get(f"{group}.epochs") != 0


def _flatten(config: dict[str, Any], before: str, flat: dict[str, Any]) -> None:
    """Put the settings of nested configs into `flat`, as `train.epochs` and the like."""
    for key, value in config.items():
        if isinstance(value, dict):
            _flatten(value, f"{before}{key}.", flat)
        else:
            flat[before + key] = value
