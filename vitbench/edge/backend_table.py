"""Every model in every backend as one table: bytes, memory, MACs, times over two baselines, and how far the best is from the floor."""

from collections.abc import Iterator

import pandas as pd

from vitbench.comparison import EAGER, MEGA, methods, subject, value

HALF = ("openvino_bf16",)  # computes in bf16, so that a floor made of fp32 products is none for it


def table(rows: pd.DataFrame) -> str:
    """The table as Markdown, with the reasons for what is not there below.

    A cell of a backend is the median time over eager fp32's at each batch size and, in parentheses, over fp32's in that
    same backend. `floor` is the median of the fastest backend that computes in fp32 or integers over the least time that
    the machine's measured peaks allow (`measure.roofline`).
    """
    good, why = subject(rows), _reasons(rows)
    timed = good[good["metric"] == "latency_ratio"]
    backends = sorted(dict.fromkeys(timed["backend"]), key=lambda name: name != EAGER)
    batches = sorted(int(batch) for batch in timed["batch"].unique())
    held = sorted(dict.fromkeys(good["backend"][good["metric"] == "peak_rss"]), key=lambda name: name != EAGER)
    head = ["method", "MB", "G MACs", *(f"peak MB {name}" for name in held), *backends]
    lines, notes = [[*head, *(f"floor, batch {batch}" for batch in batches)]], {}
    for label in methods(good):
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
    floor = value(rows, label, "latency_floor", batch)
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
    row = value(rows, label, metric, backend=backend)
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
        row = value(rows, label, "latency_p50" if itself else "latency_ratio", batch, backend, versus)
        yield "-" if row is None or row["backend"] != backend else "1" if itself else f"{row['value']:.2f}"


def _artifact(rows: pd.DataFrame, label: str) -> str:
    return next(row["context"].get("artifact", "") for _, row in rows[rows["label"] == label].iterrows())


def _reasons(rows: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Why a model has no time in a backend, by the start of its file's hash and the backend."""
    lost = rows[(rows["status"] != "ok") & (rows["metric"] == "latency_p50")]
    return {(row["context"].get("artifact", ""), row["backend"]): row["error"] for _, row in lost.iterrows()}
