"""The comparison table, with one line for each method and all numbers from rows, and paired differences of two models."""

import functools

import pandas as pd

from vitbench.base.errors import InputError
from vitbench.rows.experiment import EAGER, MEGA, Experiment
from vitbench.rows.statistics import PairedComparison, compare_hits, compare_means, unpack_hits
from vitbench.rows.words import display_labels


def experiment_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `Experiment.of`."""
    return Experiment.of(rows).rows


def find_row(
    rows: pd.DataFrame, method: str, metric: str, batch: int | None = None, backend: str = EAGER, versus: str = ""
) -> pd.Series | None:
    """`Experiment.find`, of the model with the label `method`."""
    return Experiment.of(rows).find(method, metric, batch, backend, versus)


def ratios(rows: pd.DataFrame, method: str) -> list[pd.Series]:
    """`Experiment.ratios`, of the model with the label `method`."""
    return Experiment.of(rows).ratios(method)


def label_of(rows: pd.DataFrame, measured: pd.DataFrame) -> str:
    """The label in `rows` of the model whose rows are `measured`, as `measure` returned them.

    Raises:
        InputError: `rows` has no ok row with one of their keys.
    """
    rows = Experiment.of(rows).rows
    labels = rows["label"][rows["key"].isin(measured["key"])]
    if not len(labels):
        raise InputError("the rows hold none of the measured rows; read them after `measure`, not before")
    return labels.iloc[-1]


def top1_text(rows: pd.DataFrame, label: str, backend: str = EAGER) -> str:
    """Top-1 in per cent with its 95 % interval, as text for tables; "-" if it was not measured."""
    row = Experiment.of(rows).find(label, "top1", backend=backend)
    return "-" if row is None else accuracy_text(row)


def accuracy_text(row: pd.Series) -> str:
    """A row of accuracy in per cent with its 95 % interval, as text."""
    return f"{100 * row['value']:.2f} [{100 * row['low']:.2f}, {100 * row['high']:.2f}]"


def top1_difference_text(rows: pd.DataFrame, first: str, second: str) -> str:
    """`paired_top1` in percentage points with its 95 % interval and p, as text for tables."""
    test = paired_top1(rows, first, second)
    return f"{100 * test.difference:+.2f} [{100 * test.low:+.2f}, {100 * test.high:+.2f}] p = {test.p:.2g}"


def loss_difference_text(rows: pd.DataFrame, first: str, second: str) -> str:
    """`paired_loss` in nats with its 95 % interval and p, as text for tables."""
    test = paired_loss(rows, first, second)
    return f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}] p = {test.p:.2g}"


def paired_top1(rows: pd.DataFrame, first: str, second: str) -> PairedComparison:
    """Top-1 of the model labelled `first` minus that of `second`, on the same test images."""
    experiment = Experiment.of(rows)
    return paired_rows(experiment.by_image(first), experiment.by_image(second))


def paired_rows(first: pd.Series, second: pd.Series) -> PairedComparison:
    """Compare two rows of top1 on the same images; both must have hits."""
    return compare_hits(*(unpack_hits(row.hits, row.context["images"]) for row in (first, second)))


def are_paired(first: pd.Series, second: pd.Series) -> bool:
    """Whether two rows of top1 have hits of equally many images, so that `paired_rows` can compare them."""
    return bool(first["hits"] and second["hits"]) and first["context"]["images"] == second["context"]["images"]


def paired_loss(rows: pd.DataFrame, first: str, second: str) -> PairedComparison:
    """The cross-entropy of the model labelled `first` minus that of `second`, in nats, on the same test images.

    It includes the probability of the right class, so it shows differences for which top-1 needs more images.
    """
    experiment = Experiment.of(rows)
    pair = (experiment.by_image(label, "cross_entropy", "samples") for label in (first, second))
    return compare_means(*(row["samples"] for row in pair))


def comparison(rows: pd.DataFrame) -> pd.DataFrame:
    """The comparison table, with one line for each model: first those that were timed, then those that were not.

    Columns: top1, low, high (per cent); bytes (MB) and `x smaller`; MACs (M); for each backend and batch size the median
    latency (ms) and the ratio to the baseline, which was timed alternately in the same backend; for each backend the
    peak RSS (MB). Column names give the backend unless it is eager. A number that was not measured is NaN.
    """
    experiment = Experiment.of(rows)
    latency_rows = experiment.of_metrics("latency_p50")
    latency_rows = latency_rows[latency_rows["versus_backend"].isna()]
    timed = sorted(
        {(row.backend, int(row.batch)) for row in latency_rows.itertuples()}, key=lambda pair: (pair[0] != EAGER, *pair)
    )
    memory_backends = sorted(
        set(experiment.of_metrics("peak_rss")["backend"]), key=lambda backend: (backend != EAGER, backend)
    )
    table = []
    for label in experiment.model_labels:
        number = functools.partial(experiment.number, label)
        line = {
            "method": label,
            "top1 %": 100 * number("top1"),
            "low %": 100 * number("top1", field="low"),
            "high %": 100 * number("top1", field="high"),
            "MB": number("bytes") / MEGA,
            "x smaller": experiment.number("baseline", "bytes") / number("bytes"),
            "M MACs": number("macs") / MEGA,
        }
        for backend, batch in timed:
            name = f"b{batch}" if backend == EAGER else f"b{batch} {backend}"
            line[f"p50 ms {name}"] = number("latency_p50", batch=batch, backend=backend)
            ratio = 1.0 if label == "baseline" else number("latency_ratio", batch=batch, backend=backend)
            line[f"ratio {name}"] = ratio
        for backend in memory_backends:
            name = "peak MB" if backend == EAGER else f"peak MB {backend}"
            line[name] = number("peak_rss", backend=backend) / MEGA
        table.append(line)
    return pd.DataFrame(table).set_index("method")


def progress_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The models that the lessons have made from one baseline so far: for each method the first settings with a latency.

    Methods of which no settings were timed follow, with their first settings and "-" as the time.

    Columns: top-1 (per cent, with its 95 % interval), MB, `x smaller`, and the ratios of multiply-accumulates and of the
    latency at the smallest batch size to the baseline's.
    """
    experiment = Experiment.of(rows)
    first: dict[str, str] = {}
    lines = []
    for label in experiment.model_labels:
        if experiment.find(label, "bytes") is not None:
            first.setdefault(label.partition(" (")[0], label)
    display = display_labels(experiment, first.values())
    for label in first.values():
        size, times = experiment.number(label, "bytes"), experiment.ratios(label)
        lines.append(
            {
                "method": display[label],
                "top-1 %": top1_text(experiment.rows, label),
                "MB": size / MEGA,
                "x smaller": experiment.number("baseline", "bytes") / size,
                "MACs": experiment.number(label, "macs") / experiment.number("baseline", "macs"),
                "time": 1.0 if label == "baseline" else round(times[0]["value"], 2) if times else "-",
            }
        )
    return pd.DataFrame(lines).set_index("method").round(2)


def summary_sentences(rows: pd.DataFrame) -> list[str]:
    """One sentence for each compressed model: its size, its accuracy with the difference from the baseline, its latency."""
    experiment, sentences = Experiment.of(rows), []
    base_accuracy, base_bytes = (experiment.find("baseline", metric) for metric in ("top1", "bytes"))
    display = display_labels(experiment, experiment.model_labels)
    for label in experiment.model_labels:
        accuracy, size = (experiment.find(label, metric) for metric in ("top1", "bytes"))
        if label == "baseline" or accuracy is None or size is None or base_accuracy is None or base_bytes is None:
            continue
        text = (
            f"{display[label]}: {size['value'] / base_bytes['value']:.3f} of the baseline's bytes, "
            f"top-1 {100 * accuracy['value']:.2f} % against {100 * base_accuracy['value']:.2f} % "
            f"({_difference(accuracy, base_accuracy)})"
        )
        for row in experiment.ratios(label):
            text += (
                f"; {row['value']:.2f} of its time at batch {int(row['batch'])} [{row['low']:.2f}, {row['high']:.2f}]"
            )
        sentences.append(text + ".")
    return sentences


def _difference(accuracy: pd.Series, base: pd.Series) -> str:
    """The difference of two rows of top1 in points: with its interval on the same images, or without one if hits are missing."""
    if are_paired(accuracy, base):
        test = paired_rows(accuracy, base)
        points, low, high = (100 * number for number in (test.difference, test.low, test.high))
        return f"{points:+.2f} points [{low:+.2f}, {high:+.2f}] on the same {base['context']['images']:,} images, p = {test.p:.2g}"
    overlap = accuracy["low"] <= base["high"] and base["low"] <= accuracy["high"]
    points = 100 * (accuracy["value"] - base["value"])
    return f"{points:+.2f} points; the 95 % intervals {'overlap' if overlap else 'do not overlap'}"
