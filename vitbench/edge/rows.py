"""Rows and tables of the edge: modelled cost on other devices, a table of all backends, and a measured transfer.

The table has bytes, memory, MACs, times over those of two baselines, and the ratio of the fastest backend's time to the latency
floor. The transfer streams bytes over loopback through a rate limiter and times them at the receiver.
"""

import functools
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from vitbench.base import progress
from vitbench.base.configs import digest
from vitbench.base.errors import InputError
from vitbench.edge.model import PARTS, Cost, Deployment, Link, Profiles, Workload, cost, transfer_time
from vitbench.rows.experiment import EAGER, MEGA, Experiment
from vitbench.rows.records import KEY_FIELDS, Row

METRICS = {"edge_time": "s", "edge_energy": "J"}
COPIED_FIELDS = tuple(name for name in KEY_FIELDS if name not in ("metric", "context"))
LOCATION_PREFIX = "weights from "
REQUIRED_METRICS = ("bytes", "peak_tensors", "macs", "int8_macs")


def workloads(rows: pd.DataFrame) -> dict[str, Workload]:
    """The workload of each model of the comparison, by label. Models without all of `REQUIRED_METRICS` are left out.

    Raises:
        InputError: no model has all of them.
    """
    experiment, by_label = Experiment.of(rows), {}
    for label in experiment.timed_labels:
        found_rows = [experiment.find(label, metric) for metric in REQUIRED_METRICS]
        values = [row["value"] for row in found_rows if row is not None]
        if len(values) == len(REQUIRED_METRICS):
            size, resident_bytes, macs, int8_macs = values
            by_label[label] = Workload(size, resident_bytes, macs - int8_macs, int8_macs)
    if not by_label:
        raise InputError(
            f"no model of these rows has all of {', '.join(REQUIRED_METRICS)}; run `vitbench measure MODEL --what size memory`"
        )
    return by_label


def modelled(
    measured_rows: pd.DataFrame,
    profiles: Profiles,
    devices: Sequence[str] = (),
    links: Sequence[str] = (),
    deployment: Deployment | None = None,
) -> list[Row]:
    """Rows of `edge_time` and `edge_energy` of one inference: each model on each device over each link (by default all).

    The samples are the parts, in the order of `PARTS`.
    """
    deployment = deployment or Deployment()
    experiment, rows = Experiment.of(measured_rows), []
    for label, workload in workloads(experiment.rows).items():
        template_row = experiment.find(label, "bytes")
        for device in devices or profiles.devices:
            for link in links or profiles.links:
                inference_cost = cost(
                    workload, profiles.device(device), profiles.link(link), profiles.operations, deployment
                )
                profile_context = {"profile": device, "link": link, "constants": _constants(profiles, device, link)}
                rows += _rows(template_row, inference_cost, profile_context | deployment.to_dict())
    return rows


def _constants(profiles: Profiles, device: str, link: str) -> str:
    """The start of a hash of all constants of a row, so that other constants under the same names give other rows."""
    used = (profiles.device(device), profiles.link(link), profiles.operations)
    return digest([profile.to_dict() for profile in used], 12)


def _rows(template_row: pd.Series, inference_cost: Cost, context: dict[str, Any]) -> list[Row]:
    context = context | {"artifact": template_row["context"].get("artifact", "")}
    source = f"modelled: {LOCATION_PREFIX}{inference_cost.weights_location}; parts {', '.join(PARTS)}"
    values = {
        "edge_time": (inference_cost.seconds, inference_cost.time),
        "edge_energy": (inference_cost.joules, inference_cost.energy),
    }
    return [
        Row(
            **{name: template_row[name] for name in COPIED_FIELDS},
            metric=metric,
            unit=METRICS[metric],
            value=total,
            samples=list(parts.values()),
            source=source,
            context=context,
        )
        for metric, (total, parts) in values.items()
    ]


def weights_location_of(source: str) -> str:
    """Where the weights come from, by the source of a modelled row."""
    return source.partition(LOCATION_PREFIX)[2].partition(";")[0]


def modelled_table(rows: Sequence[Row]) -> str:
    """Modelled rows as text, with a line for each model, device and link."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = (row.method, row.context["artifact"][:6], row.context["profile"], row.context["link"])
        line = lines.setdefault(key, {LOCATION_PREFIX.strip(): weights_location_of(row.source)})
        line[f"{row.metric.removeprefix('edge_')} {row.unit}"] = f"{row.value:.3g}"
    index = pd.MultiIndex.from_tuples(lines, names=["method", "artifact", "device", "link"])
    return pd.DataFrame(list(lines.values()), index=index).to_string()


def streamed(template_row: pd.Series, link: Link, name: str, counts: Sequence[int]) -> list[Row]:
    """Stream bytes over loopback at the link's bandwidth: rows of `transfer_time`, measured and modelled (`transfer_time_modelled`).

    Args:
        template_row: a row whose model, data and configs the new rows have.
        name: of the link.
        counts: the bytes of each stream.
    """
    rows = []
    for count in progress.progress_bar(list(counts), f"streaming over {name}", unit="stream"):
        context = {"link": name, "count": int(count), "bandwidth": link.bandwidth.value, "latency": link.latency.value}
        results = {
            "transfer_time": (stream(bytes(int(count)), link), "measured: loopback through a limiter of our own"),
            "transfer_time_modelled": (transfer_time(count, link), "modelled: latency + bytes / bandwidth"),
        }
        rows += [
            Row(
                **{name: template_row[name] for name in COPIED_FIELDS},
                metric=metric,
                unit="s",
                value=seconds,
                source=source,
                context=context,
            )
            for metric, (seconds, source) in results.items()
        ]
    return rows


BF16_BACKENDS = ("openvino_bf16",)  # bf16 products can be faster than the latency floor, which is of fp32 products


def backend_table(rows: pd.DataFrame) -> str:
    """The table of all backends in Markdown, with the reasons for missing values below.

    A cell of a backend is the ratio of the median time to that of eager fp32 at each batch size and, in parentheses, to that
    of fp32 in the same backend. `floor` is the ratio of the fastest backend's median to the latency floor, without bf16
    (`measurement.roofline`).
    """
    experiment, reasons = Experiment.of(rows), _reasons(rows)
    timed = experiment.of_metrics("latency_ratio")
    backends = sorted(dict.fromkeys(timed["backend"]), key=lambda name: name != EAGER)
    batches = sorted(int(batch) for batch in timed["batch"].unique())
    memory_backends = sorted(
        dict.fromkeys(experiment.of_metrics("peak_rss")["backend"]), key=lambda name: name != EAGER
    )
    header = ["method", "MB", "G MACs", *(f"peak MB {name}" for name in memory_backends), *backends]
    lines = [[*header, *(f"floor, batch {batch}" for batch in batches)]]
    footnotes: dict[str, int] = {}
    for label in experiment.timed_labels:
        number = functools.partial(_number, experiment, label)
        cells = [label, number("bytes", MEGA, ".1f"), number("macs", 1e9, ".2f")]
        cells += [number("peak_rss", MEGA, ".0f", backend) for backend in memory_backends]
        for backend in backends:
            cell = _times(experiment, label, backend, batches)
            if "-" in cell and (reason := reasons.get((_artifact(experiment.rows, label), backend))):
                cell += f" [{footnotes.setdefault(reason, len(footnotes) + 1)}]"
            cells.append(cell)
        cells += [_best(experiment.rows, label, batch) for batch in batches]
        lines.append(cells)
    rule = ["---"] * len(lines[0])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
    return text + "\n\n" + "".join(f"[{number}] {reason}\n\n" for reason, number in footnotes.items())


def fastest(rows: pd.DataFrame, label: str, batch: int) -> tuple[str, float] | None:
    """The backend with the smallest median time at a batch size, without bf16, and the ratio of that time to the latency floor."""
    experiment = Experiment.of(rows)
    floor_row = experiment.find(label, "latency_floor", batch)
    latency_rows = experiment.of_metrics("latency_p50")
    latency_rows = latency_rows[(latency_rows["label"] == label) & (latency_rows["batch"] == batch)]
    latency_rows = latency_rows[~latency_rows["backend"].isin(BF16_BACKENDS)].drop_duplicates("backend", keep="last")
    if floor_row is None or not len(latency_rows):
        return None
    fastest_row = latency_rows.loc[latency_rows["value"].idxmin()]
    return fastest_row["backend"], fastest_row["value"] / floor_row["value"]


def _best(rows: pd.DataFrame, label: str, batch: int) -> str:
    fastest_backend = fastest(rows, label, batch)
    return "-" if fastest_backend is None else f"{fastest_backend[1]:.1f} ({fastest_backend[0]})"


def _number(
    experiment: Experiment, label: str, metric: str, scale: float, format_spec: str, backend: str = EAGER
) -> str:
    row = experiment.find(label, metric, backend=backend)
    return "-" if row is None else f"{row['value'] / scale:{format_spec}}"


def _times(experiment: Experiment, label: str, backend: str, batches: list[int]) -> str:
    """Ratios to the times of eager fp32 and, in parentheses, of fp32 in the same backend; 1 for the baseline itself."""
    versus = "" if backend == EAGER else EAGER
    eager = list(_ratios(experiment, label, backend, versus, batches))
    if set(eager) == {"-"}:
        return "-"
    text = " / ".join(eager)
    return text if backend == EAGER else f"{text} ({' / '.join(_ratios(experiment, label, backend, '', batches))})"


def _ratios(experiment: Experiment, label: str, backend: str, versus: str, batches: list[int]) -> Iterator[str]:
    for batch in batches:
        is_baseline = label == "baseline" and not versus
        row = experiment.find(label, "latency_p50" if is_baseline else "latency_ratio", batch, backend, versus)
        yield "-" if row is None or row["backend"] != backend else "1" if is_baseline else f"{row['value']:.2f}"


def _artifact(rows: pd.DataFrame, label: str) -> str:
    return next(row["context"].get("artifact", "") for _, row in rows[rows["label"] == label].iterrows())


def _reasons(rows: pd.DataFrame) -> dict[tuple[str, str], str]:
    """The reason why a model has no time in a backend, by (the start of its file's hash, backend)."""
    failed_rows = rows[(rows["status"] != "ok") & (rows["metric"] == "latency_p50")]
    return {(row["context"].get("artifact", ""), row["backend"]): row["error"] for _, row in failed_rows.iterrows()}


CHUNK = 16 * 1024  # bytes that are sent at once


def stream(content: bytes, link: Link) -> float:
    """Send bytes through a socket at the link's latency and bandwidth; the seconds from the request to the last byte.

    The receiver requests with one byte. The sender waits for the latency, then sends at most at the bandwidth.

    Raises:
        InputError: no bytes to send, or not all bytes arrived.
    """
    if not content:
        raise InputError("nothing to stream: there are no bytes")
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = threading.Thread(target=_serve, args=(server, content, link), daemon=True)
        sender.start()
        with socket.create_connection(server.getsockname()) as receiver:
            start = time.perf_counter()
            receiver.sendall(b"?")
            count = 0
            while part := receiver.recv(1 << 20):
                count += len(part)
            seconds = time.perf_counter() - start
        sender.join()
    if count != len(content):
        raise InputError(
            f"{count:,} of {len(content):,} bytes arrived; something on this machine cuts local connections"
        )
    return seconds


def _serve(server: socket.socket, content: bytes, link: Link) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(1)
        begin = time.perf_counter() + link.latency.value
        for start in range(0, len(content), CHUNK):
            part = content[start : start + CHUNK]
            due = begin + (start + len(part)) / link.bandwidth.value  # when the link would have delivered the part
            if (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            connection.sendall(part)
