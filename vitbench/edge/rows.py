"""From the measured rows of models to modelled rows: what an answer costs on other devices, as `model` says it."""

from collections.abc import Sequence

import pandas as pd

from vitbench import progress
from vitbench.base.digest import digest
from vitbench.comparison import methods, subject, value
from vitbench.edge.model import PARTS, Cost, Setting, Work, cost, transfer_time
from vitbench.edge.profiles import Link, Profiles
from vitbench.edge.streaming import stream
from vitbench.errors import InputError
from vitbench.records import IDENTITY, Row

METRICS = {"edge_time": "s", "edge_energy": "J"}
ABOUT = tuple(name for name in IDENTITY if name not in ("metric", "context"))
FROM = "weights from "
NEEDED = ("bytes", "peak_tensors", "macs", "int8_macs")


def works(rows: pd.DataFrame) -> dict[str, Work]:
    """What each model of the comparison brings, by label; those of which something was not measured are left out.

    Raises:
        InputError: none is left.
    """
    rows, found = subject(rows), {}
    for label in methods(rows):
        have = [value(rows, label, metric) for metric in NEEDED]
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
    rows = subject(rows)
    made = []
    for label, work in works(rows).items():
        like = value(rows, label, "bytes")
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


def table(made: Sequence[Row]) -> str:
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
    for count in progress.bar(list(counts), f"streaming over {name}", unit="stream"):
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
