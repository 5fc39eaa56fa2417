"""Rows and tables of the edge: modelled cost on other devices, every backend in one table, and a measured transfer.

The table has bytes, memory, MACs, times over two baselines, and the distance of the fastest from the floor. The transfer streams
bytes over loopback through a rate limiter and times them at the receiving end.
"""

import socket
import threading
import time
from collections.abc import Iterator, Sequence

import pandas as pd

from vitbench.base import progress
from vitbench.base.configs import digest
from vitbench.base.errors import InputError
from vitbench.edge.model import PARTS, Cost, Link, Profiles, Setting, Work, cost, transfer_time
from vitbench.rows.comparison_table import EAGER, MEGA, experiment_rows, find_row, timed_labels
from vitbench.rows.records import KEY_FIELDS, Row

METRICS = {"edge_time": "s", "edge_energy": "J"}
ABOUT = tuple(name for name in KEY_FIELDS if name not in ("metric", "context"))
FROM = "weights from "
NEEDED = ("bytes", "peak_tensors", "macs", "int8_macs")


def works(rows: pd.DataFrame) -> dict[str, Work]:
    """What each model of the comparison brings, by label; those of which something was not measured are left out.

    Raises:
        InputError: none is left.
    """
    rows, found = experiment_rows(rows), {}
    for label in timed_labels(rows):
        have = [find_row(rows, label, metric) for metric in NEEDED]
        if all(row is not None for row in have):
            size, resident, macs, int8 = (row["value"] for row in have)
            found[label] = Work(size, resident, macs - int8, int8)
    if not found:
        raise InputError(
            f"no model of these rows has all of {', '.join(NEEDED)}; run `vitbench measure MODEL --what size memory`"
        )
    return found


def modelled(
    rows: pd.DataFrame,
    profiles: Profiles,
    devices: Sequence[str] = (),
    links: Sequence[str] = (),
    setting: Setting | None = None,
) -> list[Row]:
    """Rows of `edge_time` and `edge_energy` of an answer of each model on each device over each link (all, if none is named).

    The samples are the parts, in the order of `PARTS`.
    """
    setting = setting or Setting()
    rows = experiment_rows(rows)
    made = []
    for label, work in works(rows).items():
        like = find_row(rows, label, "bytes")
        for device in devices or profiles.devices:
            for link in links or profiles.links:
                found = cost(work, profiles.device(device), profiles.link(link), profiles.operations, setting)
                named = {"profile": device, "link": link, "constants": _constants(profiles, device, link)}
                made += _rows(like, found, named | setting.to_dict())
    return made


def _constants(profiles: Profiles, device: str, link: str) -> str:
    """The start of a hash of all that a row rests on, so that other constants under the same names give other rows."""
    used = (profiles.device(device), profiles.link(link), profiles.operations)
    return digest([one.to_dict() for one in used], 12)


def _rows(like: pd.Series, found: Cost, context: dict) -> list[Row]:
    context = context | {"artifact": like["context"].get("artifact", "")}
    how = f"modelled: {FROM}{found.place}; parts {', '.join(PARTS)}"
    values = {"edge_time": (found.seconds, found.time), "edge_energy": (found.joules, found.energy)}
    return [
        Row(
            **{name: like[name] for name in ABOUT},
            metric=metric,
            unit=METRICS[metric],
            value=total,
            samples=list(parts.values()),
            source=how,
            context=context,
        )
        for metric, (total, parts) in values.items()
    ]


def place(source: str) -> str:
    """Where the weights come from, by a modelled row's source."""
    return source.partition(FROM)[2].partition(";")[0]


def modelled_table(made: Sequence[Row]) -> str:
    """Modelled rows as text: a line for each model, device and link."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in made:
        key = (row.method, row.context["artifact"][:6], row.context["profile"], row.context["link"])
        line = lines.setdefault(key, {FROM.strip(): place(row.source)})
        line[f"{row.metric.removeprefix('edge_')} {row.unit}"] = f"{row.value:.3g}"
    index = pd.MultiIndex.from_tuples(lines, names=["method", "artifact", "device", "link"])
    return pd.DataFrame(list(lines.values()), index=index).to_string()


def streamed(like: pd.Series, link: Link, name: str, counts: Sequence[int]) -> list[Row]:
    """Stream so many bytes at the link's bandwidth over loopback: rows of `transfer_time`, and of what `model` says it is.

    Args:
        like: a row of the model and data that these rows stand beside.
        name: of the link.
    """
    made = []
    for count in progress.progress_bar(list(counts), f"streaming over {name}", unit="stream"):
        context = {"link": name, "count": int(count), "bandwidth": link.bandwidth.value, "latency": link.latency.value}
        found = {
            "transfer_time": (stream(bytes(int(count)), link), "measured: loopback through a limiter of our own"),
            "transfer_time_modelled": (transfer_time(count, link), "modelled: latency + bytes / bandwidth"),
        }
        made += [
            Row(
                **{name: like[name] for name in ABOUT},
                metric=metric,
                unit="s",
                value=seconds,
                source=how,
                context=context,
            )
            for metric, (seconds, how) in found.items()
        ]
    return made


HALF = ("openvino_bf16",)  # computes in bf16, so that a floor made of fp32 products is none for it


def backend_table(rows: pd.DataFrame) -> str:
    """The table as Markdown, with the reasons for what is not there below.

    A cell of a backend is the median time over eager fp32's at each batch size and, in parentheses, over fp32's in that
    same backend. `floor` is the median of the fastest backend that computes in fp32 or integers over the least time that
    the machine's measured peaks allow (`measure.roofline`).
    """
    good, why = experiment_rows(rows), _reasons(rows)
    timed = good[good["metric"] == "latency_ratio"]
    backends = sorted(dict.fromkeys(timed["backend"]), key=lambda name: name != EAGER)
    batches = sorted(int(batch) for batch in timed["batch"].unique())
    held = sorted(dict.fromkeys(good["backend"][good["metric"] == "peak_rss"]), key=lambda name: name != EAGER)
    head = ["method", "MB", "G MACs", *(f"peak MB {name}" for name in held), *backends]
    lines, notes = [[*head, *(f"floor, batch {batch}" for batch in batches)]], {}
    for label in timed_labels(good):
        cells = [label, _number(good, label, "bytes", MEGA, ".1f"), _number(good, label, "macs", 1e9, ".2f")]
        cells += [_number(good, label, "peak_rss", MEGA, ".0f", backend) for backend in held]
        for backend in backends:
            cell = _times(good, label, backend, batches)
            if "-" in cell and (reason := why.get((_artifact(good, label), backend))):
                cell += f" [{notes.setdefault(reason, len(notes) + 1)}]"
            cells.append(cell)
        cells += [_best(good, label, batch) for batch in batches]
        lines.append(cells)
    rule = ["---"] * len(lines[0])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
    return text + "\n\n" + "".join(f"[{number}] {reason}\n\n" for reason, number in notes.items())


def fastest(rows: pd.DataFrame, label: str, batch: int) -> tuple[str, float] | None:
    """The backend with the smallest median time at a batch size, those in half precision left out, and that time over the floor.

    Args:
        rows: as `subject` gives them.
    """
    floor = find_row(rows, label, "latency_floor", batch)
    own = rows[(rows["label"] == label) & (rows["metric"] == "latency_p50") & (rows["batch"] == batch)]
    own = own[~own["backend"].isin(HALF)].drop_duplicates("backend", keep="last")
    if floor is None or not len(own):
        return None
    first = own.loc[own["value"].idxmin()]
    return first["backend"], first["value"] / floor["value"]


def _best(rows: pd.DataFrame, label: str, batch: int) -> str:
    found = fastest(rows, label, batch)
    return "-" if found is None else f"{found[1]:.1f} ({found[0]})"


def _number(rows: pd.DataFrame, label: str, metric: str, scale: float, form: str, backend: str = EAGER) -> str:
    row = find_row(rows, label, metric, backend=backend)
    elsewhere = row is None or not (pd.isna(row["backend"]) or row["backend"] == backend)
    return "-" if elsewhere else f"{row['value'] / scale:{form}}"


def _times(rows: pd.DataFrame, label: str, backend: str, batches: list[int]) -> str:
    """Times over eager fp32's and, in parentheses, over the same backend's fp32; a baseline's own is 1."""
    versus = "" if backend == EAGER else EAGER
    eager = list(_ratios(rows, label, backend, versus, batches))
    if set(eager) == {"-"}:
        return "-"
    text = " / ".join(eager)
    return text if backend == EAGER else f"{text} ({' / '.join(_ratios(rows, label, backend, '', batches))})"


def _ratios(rows: pd.DataFrame, label: str, backend: str, versus: str, batches: list[int]) -> Iterator[str]:
    for batch in batches:
        itself = label == "baseline" and not versus
        row = find_row(rows, label, "latency_p50" if itself else "latency_ratio", batch, backend, versus)
        yield "-" if row is None or row["backend"] != backend else "1" if itself else f"{row['value']:.2f}"


def _artifact(rows: pd.DataFrame, label: str) -> str:
    return next(row["context"].get("artifact", "") for _, row in rows[rows["label"] == label].iterrows())


def _reasons(rows: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Why a model has no time in a backend, by the start of its file's hash and the backend."""
    lost = rows[(rows["status"] != "ok") & (rows["metric"] == "latency_p50")]
    return {(row["context"].get("artifact", ""), row["backend"]): row["error"] for _, row in lost.iterrows()}


CHUNK = 16 * 1024  # bytes that go out at once


def stream(content: bytes, link: Link) -> float:
    """Send bytes through a socket at the link's latency and bandwidth; seconds from the request to the last byte.

    The receiver asks with one byte; the sender waits for the latency, then sends no faster than the bandwidth.

    Raises:
        InputError: nothing to send, or not everything arrived.
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
            due = begin + (start + len(part)) / link.bandwidth.value  # when the part would have gone through the link
            if (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            connection.sendall(part)
