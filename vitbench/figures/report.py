"""`report.html`: one self-contained page made from the rows of a results folder."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from vitbench.base import configs
from vitbench.base.errors import InputError
from vitbench.base.files import figure_bytes, write_text
from vitbench.base.paths import writable_folder
from vitbench.figures import drawing
from vitbench.figures.accuracy_cost import tradeoff
from vitbench.rows import budgets
from vitbench.rows.comparison_table import comparison, summary_sentences
from vitbench.rows.experiment import Experiment, in_backend
from vitbench.rows.records import records_file
from vitbench.rows.row_table import load_records
from vitbench.rows.words import display_labels

ENVIRONMENT_FACTS = ("system", "python", "cpu", "cores", "memory_gib", "cpu_capability", "int8_engine", "gpus")
PACKAGES = ("torch", "torchvision", "timm", "numpy")


def write_report(*folders: str | Path, out: str | Path = "") -> Path:
    """Write `report.html` into a results folder; it needs no network and no other file except the linked notebooks.

    Args:
        folders: results folders; their rows are put into one table.
        out: folder of the page; by default the results folder, if it is one.

    Raises:
        InputError: no records there, a damaged records file, or a folder that cannot be written; several folders, and no
            `out`.
    """
    if not out and len(folders) != 1:
        raise InputError(f"a report of {len(folders)} results folders needs a folder of its own; give --out DIR")
    sources = [records_file(folder) for folder in folders]
    _check_own_page((Path(out).expanduser() if out else sources[0].parent) / "report.html")
    rows = pd.concat([load_records(source) for source in sources], ignore_index=True)
    folder = writable_folder(out, "report's folder") if out else sources[0].parent
    templates = jinja2.Environment(loader=jinja2.PackageLoader("vitbench.figures"), autoescape=True)
    content = _content(folder, rows, [source.parent for source in sources])
    page = templates.get_template("report.html").render(**content)
    try:
        write_text(folder / "report.html", page)
    except OSError as error:
        raise InputError(
            f"{str(folder / 'report.html')!r} cannot be written ({error.strerror}); free some space or copy the folder"
        ) from None
    return folder / "report.html"


def _check_own_page(page: Path) -> None:
    """Raise `InputError` if the file exists and is not a report of vitbench."""
    if page.exists() and b"<title>vitbench: " not in page.read_bytes()[:1000]:
        raise InputError(
            f"{str(page)!r} is a page that vitbench did not make, so it is left alone; give another folder"
        )


def table_text(rows: pd.DataFrame) -> str:
    """The comparison table as plain text for a terminal, with display labels."""
    table = comparison(rows)
    return table.rename(index=display_labels(rows, table.index)).map(_cell).to_string()


def _content(folder: Path, rows: pd.DataFrame, sources: list[Path]) -> dict[str, Any]:
    experiment = Experiment.of(rows)
    chosen = experiment.rows
    table = comparison(chosen)
    display = display_labels(experiment, table.index)
    return {
        "title": f"{chosen.iloc[-1]['model']} on {chosen.iloc[-1]['dataset']}",
        "rows": len(rows),
        "findings": summary_sentences(chosen),
        "failures": [
            f"{row.method}, {row.metric}: {row.status}, {row.error}"
            for row in rows[rows["status"] != "ok"].itertuples()
        ],
        "columns": list(table.columns),
        "table": [
            [display[label], *(_cell(cell) for cell in line)]
            for label, line in zip(table.index, table.values, strict=True)
        ],
        "budgets": _budgets(chosen),
        "figures": _figures(experiment),
        "protocol": _protocol(experiment),
        "machines": _machines(sources, chosen),
        "notebooks": sorted(
            path.name for path in (folder / "notebooks").glob("[!.]*.ipynb") if ".running." not in path.name
        ),
    }


def _budgets(rows: pd.DataFrame) -> list[list[str]]:
    """The table of equal budgets, its column names first; empty if no model has an accuracy."""
    try:
        table = budgets.budget_table(rows).reset_index()
    except InputError:
        return []
    return [list(table.columns), *([str(cell) for cell in line] for line in table.values)]


def _cell(number: float) -> str:
    if not isinstance(number, int | float) or math.isnan(number):
        return "-"
    return f"{number:.2f}" if abs(number) < 100 else f"{number:.1f}"


def _figures(experiment: Experiment) -> list[dict[str, str]]:
    # figures show eager times of models with an accuracy; the tables have the other backends
    rows = experiment.rows
    eager = Experiment(rows[in_backend(rows)])
    timed, scored = eager.of_metrics("latency_ratio"), eager.of_metrics("top1")["label"]
    batch = int(timed["batch"].min()) if len(timed) else 0
    figures: list[tuple[str, Figure, pd.DataFrame]] = []
    if eager.of_metrics("bytes")["label"].isin(scored).any():
        figures.append(("Accuracy against size on disk.", *tradeoff(rows, "bytes")))
    if timed["label"].isin(scored).any():
        caption = f"Accuracy against median latency at batch {batch}."
        figures.append((caption, *tradeoff(rows, "latency_ratio", batch)))
    if batch:
        figures.append(
            ("Size and time, predicted by bits and MACs and measured.", *drawing.predicted_beside_measured(rows))
        )
        figures.append(("How long a call takes.", *drawing.latencies(rows)))
    pages = []
    for caption, figure, _ in figures:
        with drawing.style():
            svg = figure_bytes(figure, "svg", metadata={"Date": None})
        plt.close(figure)
        pages.append({"caption": caption, "data": base64.b64encode(svg).decode()})
    return pages


def _protocol(experiment: Experiment) -> list[tuple[str, str]]:
    rows = experiment.rows
    lines = [("data", f"{rows.iloc[-1]['dataset']}, fingerprint {rows.iloc[-1]['data_fingerprint']}")]
    scored = experiment.of_metrics("top1")
    if len(scored):
        context = scored.iloc[-1]["context"]
        lines.append(
            (
                "accuracy",
                f"{context.get('images', '?')} test images ({context.get('cut', '?')}), which chose nothing; Wilson 95 % intervals",
            )
        )
    timed = experiment.of_metrics("latency_p50")
    if len(timed):
        row = timed.iloc[-1]
        lines.append(
            (
                "latency",
                f"{row['source'].removeprefix('measured: ')}; {row['context']['threads']} threads; backend {row['context']['backend']}",
            )
        )
    for metric in ("macs", "bytes", "peak_rss"):
        metric_rows = experiment.of_metrics(metric)
        if len(metric_rows):
            lines.append((metric, metric_rows.iloc[-1]["source"].removeprefix("measured: ")))
    lines.append(("seeds", ", ".join(str(seed) for seed in sorted(rows["seed"].unique()))))
    lines.append(("source", ", ".join(sorted(rows["commit"].unique()))))
    for origin in {
        json.dumps(origin, sort_keys=True): origin for origin in (config.get("origin", {}) for config in rows["config"])
    }.values():
        lines.append(("weights", _words(origin)))
    return lines


def _words(mapping: dict[str, Any]) -> str:
    return "; ".join(f"{key}: {_words(item) if isinstance(item, dict) else item}" for key, item in mapping.items())


def _machines(sources: list[Path], rows: pd.DataFrame) -> list[tuple[str, str]]:
    lines = []
    for env_id in sorted(rows["env_id"].unique()):
        files = [source / "environments" / f"{env_id}.json" for source in sources]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            lines.append((env_id or "unknown", "not kept"))
            continue
        environment = configs.read_json(file, "environment")
        if not isinstance(environment, dict) or not isinstance(environment.get("packages", {}), dict):
            raise InputError(f"environment {str(file)!r} is not a mapping of facts; copy it again, or take it out")
        text = ", ".join(f"{key} {environment[key]}" for key in ENVIRONMENT_FACTS if environment.get(key))
        versions = ", ".join(
            f"{name} {environment['packages'][name]}" for name in PACKAGES if name in environment.get("packages", {})
        )
        lines.append((env_id, f"{text}; {versions}"))
    return lines
