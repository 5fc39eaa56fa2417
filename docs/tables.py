"""The tables of the pages, and what a page calls the models in them: made of rows alone.

A function is known to templates by its name. A table comes without its head, which the template has.
"""

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pandas as pd

from docs.results import BATCHES, Difference, MissingRow, Results, points
from vitbench.edge.rows import backend_table, fastest
from vitbench.figures import attention
from vitbench.figures.ranking import at_budgets
from vitbench.rows.budgets import models_with_cost, winners
from vitbench.rows.comparison_table import accuracy_text, across_seeds, timed_labels
from vitbench.rows.statistics import mean_interval

TABLES: dict[str, Callable[..., Any]] = {}
Cells = Sequence[object]


def known(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function known to templates."""
    TABLES[function.__name__] = function
    return function


def table(function: Callable[..., Iterable[Cells]]) -> Callable[..., str]:
    """Makes a function that gives the cells of each line known to templates, as the text of those lines."""

    @functools.wraps(function)
    def text(*given: Any, **named: Any) -> str:
        lines = [f"| {' | '.join(map(str, cells))} |" for cells in function(*given, **named)]
        if not lines:
            raise MissingRow(f"no row for the table {function.__name__}")
        return "\n".join(lines)

    return known(text)


# Runs


@table
def every_run(runs: Iterable[Results]) -> Iterator[Cells]:
    """A line for each model that was timed in eager mode: run, model, method, top-1, MB, times over the baseline's.

    Runs of several backends have tables of their own.
    """
    for results in runs:
        if not (results.every["metric"] == "bytes").any() or results.name.startswith("edge-deit-"):
            continue
        model = results.rows["model"].iloc[-1]
        labels = timed_labels(results.rows)
        if all(results.find(label, "latency_p50", 1) is None for label in labels):
            continue
        for label in labels:
            if label == "baseline" or results.find(label, "latency_ratio", 1) is not None:
                ratios = "1 | 1" if label == "baseline" else results.times(label, " | ")
                yield results.name, model, label, results.accuracy(label), f"{results.mb(label):.2f}", ratios


@known
def over_seeds(results: Results, label: str, to: str) -> Any:
    """By how many points of top-1 a model is above another one, each seed a pair: mean, 95 % interval, number of seeds."""
    top1 = across_seeds(results.every, "top1").pivot_table(index="seed", columns="label", values="value")
    return _mean(100 * (top1[label] - top1[to]))


class Mean:
    """A mean over seeds with its 95 % Student t interval."""

    def __init__(self, values: Iterable[float]):
        self.values = list(values)
        self.seeds = len(self.values)
        self.mean, self.low, self.high = mean_interval(self.values)


def _mean(values: pd.Series) -> Mean:
    return Mean(values.dropna())


# Budgets


@known
def budgets(results: Results) -> Any:
    """Who is the most accurate within each share of the baseline's bytes."""
    return winners(results.rows)


@known
def how_many_scored(results: Results) -> int:
    """How many compressed models have an accuracy and a size."""
    return int((models_with_cost(results.rows, "bytes")["family"] != "baseline").sum())


@known
def all_are_of(won: Iterable[Any], method: str) -> bool:
    """Whether a method made the most accurate model, alone or among others, within every share that has one."""
    return all(method in each.top1["label"] for each in won if each.count)


@table
def most_accurate(won: Iterable[Any]) -> Iterator[Cells]:
    """A line for each share: how many models are within, the most accurate, its top-1 and MB, how many others are not told apart."""
    for each in won:
        if each.top1 is not None:
            size = f"{each.cost['value'] / 1e6:.2f}"
            yield (
                f"1/{1 / each.share:.0f}",
                each.count,
                each.top1["label"],
                accuracy_text(each.top1),
                size,
                len(each.indistinguishable),
            )


@known
def equal_sizes(results: Results) -> pd.DataFrame:
    """Each method at the setting that fills each share of the baseline's bytes most, the baseline first."""
    return at_budgets(results.every)


@table
def at_equal_sizes(found: pd.DataFrame) -> Iterator[Cells]:
    """A line for each method and share: label, MB, mean top-1 over seeds, points from the baseline."""
    dense = found.iloc[0]
    for line in found.iloc[1:].itertuples():
        accuracy = f"{100 * line.top1:.2f} [{100 * line.low:.2f}, {100 * line.high:.2f}]"
        gained = f"{100 * (line.top1 - dense.top1):+.2f}"
        yield f"1/{1 / line.share:.0f}", line.label, f"{line.cost / 1e6:.2f}", accuracy, gained


@known
def mean_top1(results: Results, method: str) -> float:
    """The mean top-1 over seeds, in per cent, of a method at its first setting."""
    top1 = across_seeds(results.every, "top1")
    return 100 * float(top1.loc[top1["label"] == method, "value"].mean())


# Shapes and backends


@table
def shapes(runs: Sequence[Results]) -> Iterator[Cells]:
    """A line for each method; for each shape MB, multiply-accumulates (G), and the time in eager mode."""
    for method in timed_labels(runs[0].rows):
        cells = [method]
        for results in runs:
            times = "1 / 1" if method == "baseline" else results.times(method)
            cells += [f"{results.mb(method):.1f}", f"{results.value(method, 'macs') / 1e9:.2f}", times]
        yield cells


@known
def all_backends(results: Results) -> str:
    """The table of all models in all backends."""
    return backend_table(results.every)


@table
def logit_distances(runs: Sequence[Results]) -> Iterator[Cells]:
    """A line for each backend and what is allowed there: how many models, and how far the furthest is from eager's logits."""
    rows = pd.concat([results.every for results in runs])
    rows = rows[(rows["metric"] == "logit_distance") & (rows["status"] == "ok")]
    allowed = rows["source"].str.extract(r"; ([\d.]+) is allowed$")[0].astype(float)
    if not (rows["value"] <= allowed).all():
        raise ValueError("a model that is further from eager's logits than it may be has a time")
    for (backend, limit), found in rows.groupby(["backend", allowed]):
        yield backend, f"{limit:g}", len(found), f"{found['value'].max():.1e}"


@known
def largest_distance(results: Results) -> float:
    """How far the logits that are furthest from eager's are, over the largest logit."""
    rows = results.every
    return float(rows["value"][(rows["metric"] == "logit_distance") & (rows["status"] == "ok")].max())


@table
def executorch_times(results: Results) -> Iterator[Cells]:
    """A line for each model that ExecuTorch runs: times over eager fp32's and over fp32's in ExecuTorch."""
    for method in timed_labels(results.rows):
        own = "1 / 1" if method == "baseline" else results.times(method, backend="executorch")
        yield method, results.times(method, backend="executorch", versus="eager"), own


@table
def floors(runs: Sequence[Results]) -> Iterator[Cells]:
    """A line for each shape and batch size: over the floor the fastest fp32, its products, all methods, and the furthest method."""
    for results in runs:
        rows, shape = results.rows, results.name.rpartition("-")[2]
        for batch in BATCHES:
            found = {name: fastest(rows, name, batch) for name in timed_labels(rows)}
            best, least = found["baseline"], results.value("baseline", "latency_floor", batch)
            products = results.value("baseline", "products_time", batch) / least
            worst = max(found, key=lambda name: found[name][1])
            middle = statistics.median(factor for _, factor in found.values())
            cells = f"{best[1]:.2f} ({best[0]})", f"{products:.2f}", f"{middle:.2f}", f"{found[worst][1]:.2f} ({worst})"
            yield f"DeiT-{shape.title()}", batch, *cells


class TimedTwice:
    """How far two runs of one comparison are from each other.

    Attributes:
        count: of ratios.
        apart: columns all (over all rounds) and quiet (over the quietest quarter), by method, backend, batch and baseline.
    """

    def __init__(self, first: Results, again: Results):
        found = [self._values(results) for results in (first, again)]
        self.apart = (found[1] / found[0] - 1).abs()
        self.count = len(self.apart)

    @staticmethod
    def _values(results: Results) -> pd.DataFrame:
        rows = results.rows.fillna({"versus_backend": "same"})
        rows = rows[rows["method"] != "baseline"]
        own = rows[rows["metric"] == "latency_p50"].set_index(["method", "backend", "batch"])["samples"]
        values = {}
        for row in rows[rows["metric"] == "latency_ratio"].itertuples():
            if "quietest quarter" not in row.source:
                raise ValueError(f"{results.name}: {row.method} has a ratio over all rounds")
            times = zip(own.loc[(row.method, row.backend, row.batch)], row.samples, strict=True)
            over_all = statistics.median(x / y for x, y in times)
            values[row.method, row.backend, row.batch, row.versus_backend] = over_all, row.value
        return pd.DataFrame(values, index=["all", "quiet"]).T

    def near(self, rounds: str = "quiet") -> int:
        """How many ratios are within 10 % of each other."""
        return int((self.apart[rounds] <= 0.1).sum())

    def furthest(self, rounds: str = "quiet") -> float:
        """How far the two that are furthest from each other are, in per cent."""
        return 100 * float(self.apart[rounds].max())

    def half(self) -> float:
        """Within how many per cent half of the ratios are."""
        return 100 * float(self.apart["quiet"].median())

    def off(self) -> list[tuple[str, int]]:
        """Backend and batch size of the ratios that are further apart than 10 %, each once."""
        quiet = self.apart["quiet"]
        return sorted({(backend, int(batch)) for _, backend, batch, _ in quiet.index[quiet > 0.1]})

    def in_backend(self, backend: str) -> pd.Series:
        """How far the ratios in one backend are from each other, in per cent."""
        quiet = self.apart["quiet"]
        return 100 * quiet[quiet.index.get_level_values(1) == backend]


@known
def timed_twice(first: Results, again: Results) -> TimedTwice:
    """How far two runs of one comparison are from each other."""
    return TimedTwice(first, again)


@known
def dense_times(results: Results, backend: str, batch: int) -> list[float]:
    """Medians of eager fp32 beside a backend, ms, one for each process."""
    rows = results.every.fillna({"versus_backend": "eager"})
    rows = rows[(rows["metric"] == "latency_ratio") & (rows["backend"] == backend) & (rows["batch"] == batch)]
    last = rows[rows["versus_backend"] == "eager"].iloc[-1]
    times, each = last["samples"], len(last["samples"]) // last["context"]["starts"]
    return [statistics.median(times[k : k + each]) for k in range(0, len(times), each)]


@table
def near_and_far(results: Results) -> Iterator[Cells]:
    """A line for each model, backend and number of threads: time and ratio where the cores are near and where they are far."""
    rows = results.every[results.every["metric"] != "core_journey"]
    rows = rows.join(pd.DataFrame(list(rows["context"]), index=rows.index)[["cores"]])
    for (method, backend, threads), own in rows.groupby(["method", "backend", "threads"]):
        found = own.set_index(["cores", "metric"])["value"]
        times = [f"{found[place, 'latency_p50']:.1f}" for place in ("near", "far")]
        ratios = [f"{found[place, 'latency_ratio']:.2f}" for place in ("near", "far")]
        yield method, backend, f"{threads:.0f}", " / ".join(times), " / ".join(ratios)


@known
def core_journey(results: Results, cores: str) -> Any:
    """The row of how long a byte takes between the two cores, while they are near or far."""
    rows = results.every[results.every["metric"] == "core_journey"]
    return next(row for row in rows.itertuples() if row.context["cores"] == cores)


@known
def outdone(results: Results, backend: str, batch: int) -> float:
    """The share of the methods whose time in eager mode is above that of the dense model in a backend."""
    dense = results.time("baseline", batch, backend, "eager")
    times = [results.time(method, batch) for method in timed_labels(results.rows) if method != "baseline"]
    return sum(time > dense for time in times) / len(times)


# The paper's setting


@known
def edge_ratios(results: Results, profile: str = "raspberry_pi_5") -> Callable[..., float | None]:
    """The dense model's cost over the small one's on a device, by what is free there, the link, and what counts."""
    rows = results.rows[results.rows["metric"].isin(["edge_time", "edge_energy"])]
    about = pd.DataFrame(list(rows["context"]), index=rows.index)[["profile", "link", "memory", "storage", "energy"]]
    rows = rows[["label", "metric", "value"]].join(about).fillna({"memory": -1.0, "storage": -1.0})
    rows = rows[rows["profile"] == profile]
    wide = rows.pivot_table(index=["memory", "storage", "link", "metric", "energy"], columns="label", values="value")
    found = (wide["baseline"] / wide["uct"]).to_dict()
    free = {"memory": (-1.0, -1.0), "card": (1e8, -1.0), "fetched": (1e8, 0.0)}

    def ratio(where: str, link: str, metric: str, energy: str = "board") -> float | None:
        return found.get((*free[where], link, metric, energy))

    return ratio


PLACES = {  # what the page calls the place of the dense model's weights -> where they are, and the link
    "in memory, as the small one's": ("memory", "ethernet"),
    "on its microSD card, read every time": ("card", "ethernet"),
    **{f"fetched every time, {link}": ("fetched", link) for link in ("ethernet", "wifi", "lte", "wifi_slow", "ble")},
}


@table
def transfers(ratio: Callable[..., float | None]) -> Iterator[Cells]:
    """A line for each place of the dense model's weights: its time and energies over the small one's."""
    for name, (where, link) in PLACES.items():
        kinds = ("edge_time", "board"), ("edge_energy", "board"), ("edge_energy", "operations")
        yield name, *(_short(ratio(where, link, *kind)) for kind in kinds)


def _short(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


# The fastest combinations


@table
def fastest_combinations(results: Results, backend: str) -> Iterator[Cells]:
    """A line for each model, scored and timed in a backend: top-1, MB, times over two baselines, points from the baseline."""
    dense = results.row("baseline", "top1", backend=backend)
    for label in results.labels():
        if label != "baseline":
            times = [results.times(label, backend=backend, versus=versus) for versus in ("eager", "")]
            top1 = results.row(label, "top1", backend=backend)
            yield label, accuracy_text(top1), f"{results.mb(label):.2f}", *times, points(top1, dense)


@known
def within(results: Results, backend: str, batch: int, share: float, lost: float) -> list[str]:
    """The labels of the models that take at most a share of eager fp32's time and lose at most so many points."""
    dense, found = results.top1("baseline", backend), []
    for label in results.labels():
        if label != "baseline" and results.time(label, batch, backend, "eager") <= share:
            found += [label] if dense - results.top1(label, backend) <= lost else []
    return found


# Mixed rank

USUAL = {
    "allocation": "greedy",
    "compensation": "closed_form",
    "decomposition": "activation",
    "gradient_weight": 1.0,
    "mean_correction": True,
    "propagate": True,
    "scale": "sensitivity",
    "split_qkv": False,
}
RIVAL = {"gradient_weight": 0.0, "compensation": "none", "allocation": "uniform"}
STAGES: dict[str, dict[str, Any]] = {  # name on the page -> settings that are not the usual ones
    "plain SVD, the same share of each layer": {"decomposition": "svd", "mean_correction": False, **RIVAL},
    "ASVD, likewise": {"decomposition": "asvd", "mean_correction": False, **RIVAL},
    "SVD-LLM, likewise": {"decomposition": "svd_llm", "mean_correction": False, **RIVAL},
    "stage 1: activation-aware, likewise": RIVAL,
    "+ stage 2: greedy ranks": {"gradient_weight": 0.0, "compensation": "none"},
    "+ weighted by the gradient's moments": {"compensation": "none"},
    "+ stage 3: compensation": {},
    "+ ranks by head (`split_qkv`)": {"split_qkv": True},
    "energy": {"scale": "energy", "gradient_weight": 0.0, "compensation": "none"},
    "error": {"scale": "error", "gradient_weight": 0.0, "compensation": "none"},
    "+ short distillation instead": {},
}


@known
def stages(results: Results) -> dict[tuple[str, float], str]:
    """(stage, share kept) -> label of each mixed-rank model that was scored."""
    found: dict[tuple[str, float], str] = {}
    for label, method, steps in results.models():
        if method != "mixed_rank":
            continue
        config = steps[0]["config"]
        for name, own in STAGES.items():
            trained = name == "+ short distillation instead"
            if {**USUAL, **own}.items() <= config.items() and bool(config["train"]["epochs"]) == trained:
                if (name, config["keep"]) in found:
                    raise ValueError(f"{results.name}: two models are {name} at {config['keep']}")
                found[name, config["keep"]] = label
    return found


@table
def stage_by_stage(results: Results, keeps: Sequence[float]) -> Iterator[Cells]:
    """A line for each stage that was run: top-1 for each share of the weights kept."""
    found = stages(results)
    for name in STAGES:
        if all((name, keep) in found for keep in keeps):
            yield name, *(_tenths(results.row(found[name, keep], "top1")) for keep in keeps)


def _tenths(row: Any) -> str:
    return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


# Multi-dimensional pruning

ALL = ("neurons", "head_dims", "tokens")
POLICIES = {  # name on the page -> how the policy was found, and what may go
    "all three, searched": ("gp", ALL),
    "neurons alone, searched": ("gp", ("neurons",)),
    "dimensions of heads alone, searched": ("gp", ("head_dims",)),
    "tokens alone, searched": ("gp", ("tokens",)),
    "all three and whole heads, searched": ("gp", ("neurons", "heads", "head_dims", "tokens")),
    "all three, the same ratio": ("one_ratio", ALL),
}


@known
def policies(results: Results) -> dict[tuple[str, float, str], str]:
    """(policy, share of multiply-accumulates, "free", "labels" or "distilled") -> label of each policy that was scored."""
    names, found = {kind: name for name, kind in POLICIES.items()}, {}
    for label, method, steps in results.models():
        if method != "multidimensional":
            continue
        config = steps[0]["config"]
        tuned = ("distilled" if config["train"]["kd_weight"] else "labels") if config["train"]["epochs"] else "free"
        name = names.get((config["search"]["how"], tuple(config["dimensions"])))
        if name and config["budget"] == "macs" and config["search"]["seed"] == 0:
            found[name, config["keep"], tuned] = label
    return found


@table
def policy_by_policy(results: Results, keeps: Sequence[float]) -> Iterator[Cells]:
    """A line for each budget and policy: share of multiply-accumulates left, top-1 not trained and fine-tuned."""
    found = policies(results)
    for keep in keeps:
        for name in POLICIES:
            free, tuned = (found.get((name, keep, how)) for how in ("free", "distilled"))
            if free and tuned:
                yield name, f"{results.share(free, 'macs'):.3f}", results.accuracy(free), results.accuracy(tuned)


class SearchGain(Mean):
    """What the Gaussian process's best scores have over random search's, a pair for each seed; p of the paired t test."""

    def __init__(self, process: Sequence[float], random: Sequence[float]):
        from scipy.stats import ttest_rel

        super().__init__([one - other for one, other in zip(process, random, strict=True)])
        self.p = float(ttest_rel(process, random).pvalue)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}] (p = {self.p:.2g}, {self.seeds} seeds)"


@known
def search_gain(results: Results) -> SearchGain:
    """What the Gaussian process's best scores have over random search's."""
    rows, best = results.rows[results.rows["metric"] == "search_score"], {}
    for row in rows.itertuples():
        config = row.config["methods"][0]["config"]
        about = {key: given for key, given in config.items() if key not in ("search", "train", "teacher")}
        best.setdefault(str(sorted(about.items())), {}).setdefault(config["search"]["how"], {})[row.seed] = row.value
    (found,) = [each for each in best.values() if "random" in each]
    return SearchGain([found["gp"][seed] for seed in found["random"]], list(found["random"].values()))


# Quantization


@known
def quantized(results: Results) -> dict[tuple[str, str], str]:
    """(what was done, bits) -> label of each quantized model that was scored in eager mode."""
    found: dict[tuple[str, str], str] = {}
    for label, method, steps in results.models():
        name = _quantized(method, steps[0]["config"]) if len(steps) == 1 else None
        if name:
            found.setdefault(name, label)
    return found


def _quantized(method: str, config: dict[str, Any]) -> tuple[str, str] | None:
    """What was done, in the page's words, and its bits; None for what is in no table."""
    trained = config.get("train", {}).get("epochs")
    if method == "dynamic_int8":
        return "dynamic int8", "8"
    if method == "static_int8":
        usual = config["range"] == "mse" and config["equalise"] and config["compensation"]
        return ("static int8", "8") if usual else None
    if method == "weight_only":
        kind = "trained with the rounding (LSQ)" if trained else config["rounding"].replace("_", " ")
        kind += f", groups of {config['group']}" if config["group"] else ", a step a row"
        kind += ", fitted by block" if config.get("reconstruction") else ""
        if config["target_bytes"]:
            return f"{kind}, bits by layer", "2 to 8"
        return kind, str(config["bits"])
    if method == "lsq":
        how = "trained (LSQ)" if trained else "nearest"
        return f"weights and inputs, {how}", f"{config['weight_bits']} / {config['activation_bits']}"
    if method == "diffq":
        return "learned bits (DiffQ)", f"{config['bits']:g} on average"
    if method == "simulated_integer":
        bits = " / ".join(str(config[f"{what}_bits"]) for what in ("weight", "activation", "attention"))
        weights = ", second order" if config["rounding"] == "second_order" else ""
        return f"simulated integers, norms {config['norms']}, softmax {config['softmax']}{weights}", bits
    return None


@table
def rounded(results: Results) -> Iterator[Cells]:
    """A line for each quantized model: bits, MB, top-1 and points from fp32."""
    for label, method, steps in results.models():
        name = _quantized(method, steps[0]["config"]) if len(steps) == 1 else None
        if name:
            top1 = results.row(label, "top1")
            yield *name, f"{results.mb(label):.2f}", _tenths(top1), results.points(label)


@table
def rounded_and_timed(results: Results) -> Iterator[Cells]:
    """A line for each quantized model: bits, MB, top-1, points from fp32, and its time in eager mode."""
    for name, label in quantized(results).items():
        yield *name, f"{results.mb(label):.2f}", results.accuracy(label), results.points(label), results.times(label)


@known
def not_of_one_origin(results: Results, method: str, metric: str) -> Any:
    """The row of a metric in eager mode of a method, whatever baseline the model is made of."""
    rows = results.every
    rows = rows[(rows["status"] == "ok") & rows["backend"].isna() & (rows["method"] == method)]
    return rows[rows["metric"] == metric].iloc[-1]


# Int8 in other backends


@table
def files_in_backends(results: Results) -> Iterator[Cells]:
    """A line for each file and backend: MB, and times over eager fp32's at batch 1 and 8."""
    rows = results.every[results.every["status"] == "ok"]
    timed = rows[rows["metric"] == "latency_ratio"]
    timed, sizes = (part.assign(file=_files(part)) for part in (timed, rows[rows["metric"] == "bytes"]))
    for (file, backend), own in timed.groupby(["file", "backend"], sort=False):
        size = sizes[sizes["file"] == file]["value"].iloc[-1]
        cells = [f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in own.sort_values("batch").itertuples()]
        yield file, backend, f"{size / 1e6:.1f}", *cells


def _files(rows: pd.DataFrame) -> list[str]:
    """What the page calls each row's file."""
    too = [
        "attention" if any(step["config"].get("attention") for step in each["methods"]) else ""
        for each in rows["config"]
    ]
    return [f"{method}, {more} too" if more else method for method, more in zip(rows["method"], too)]


@known
def in_backend(results: Results, file: str, backend: str) -> list[float]:
    """Times over eager fp32's at batch 1 and 8 of a file in a backend."""
    rows = results.every[(results.every["status"] == "ok") & (results.every["metric"] == "latency_ratio")]
    rows = rows.assign(file=_files(rows))
    rows = rows[(rows["file"] == file) & (rows["backend"] == backend)].sort_values("batch")
    if list(rows["batch"]) != list(BATCHES):
        raise MissingRow(f"{results.name} has no times of {file} in {backend} at both batch sizes")
    return list(rows["value"])


PEERS = {  # another tool's quantizer and where it runs -> ours of the same kind and where it runs
    ("peer_nncf", "openvino"): ("static_int8", "openvino"),
    ("peer_onnxruntime_static", "onnxruntime"): ("static_int8", "onnxruntime"),
    ("peer_pt2e", "inductor"): ("static_int8", "openvino"),
    ("peer_onnxruntime_dynamic", "onnxruntime"): ("dynamic_int8", "onnxruntime"),
    ("peer_torch_dynamic", "eager"): ("dynamic_int8", "eager"),
    ("peer_torchao_dynamic", "inductor"): ("dynamic_int8", "eager"),
}


class Pair:
    """A model of another tool's quantizer and ours of the same kind.

    Attributes:
        theirs, ours: name and where it runs, top-1 and bytes (rows).
        gained: ours over theirs, in points.
        larger: by how many per cent our file is larger.
        saves_fp32: whether theirs keeps its weights in fp32.
    """

    def __init__(self, results: Results, theirs: tuple[str, str], ours: tuple[str, str]):
        rows = results.every[results.every["status"] == "ok"]
        rows = rows.assign(file=_files(rows))

        def found(file: str, backend: str, metric: str) -> Any:
            own = rows[(rows["file"] == file) & (rows["metric"] == metric)]
            here = own[own["backend"] == backend]
            return (here if len(here) else own[own["backend"].isna()]).iloc[-1]

        self.theirs, self.ours = (
            (f"{name} ({where})", found(name, where, "top1"), found(name, where, "bytes"))
            for name, where in (theirs, ours)
        )
        self.gained: Difference = points(self.ours[1], self.theirs[1])
        self.saves_fp32 = theirs[0] == "peer_pt2e"
        self.larger = 100 * (self.ours[2]["value"] / self.theirs[2]["value"] - 1)


@known
def peer_pairs(results: Results) -> dict[str, Pair]:
    """Each of the other tools' quantizers beside ours, by its name."""
    return {theirs[0]: Pair(results, theirs, ours) for theirs, ours in PEERS.items()}


@table
def ours_and_theirs(pairs: dict[str, Pair]) -> Iterator[Cells]:
    """A line for each pair: MB and top-1 of theirs and of ours, and ours over theirs."""
    for pair in pairs.values():
        each = pair.theirs, pair.ours
        cells = [
            cell for name, top1, size in each for cell in (name, f"{size['value'] / 1e6:.2f}", accuracy_text(top1))
        ]
        yield *cells, pair.gained


# Distillation


@known
def students(results: Results) -> dict[str, str]:
    """Student and kind of teaching, in the page's words -> label of each model of seed 0."""
    found: dict[str, str] = {}
    for label, method, steps in results.models():
        name = _student(method, steps)
        if name and all(step["config"].get("train", {}).get("seed", 0) == 0 for step in steps):
            found.setdefault(name, label)
    return found


def _student(method: str, steps: list[dict[str, Any]]) -> str | None:
    if method == "baseline":
        return "teacher"
    config = steps[0]["config"]
    if method.startswith("pruning"):
        how = "trained on, labels" if config["teacher"] == "none" else "distilled from the original"
        return f"pruned, {how if config['train']['epochs'] else 'not trained'}"
    if not method.startswith("distillation"):
        return None
    train, student = config["train"], config["student"] or f"{config['depth']} of the teacher's blocks"
    kind = "hard" if train["kd_labels"] == "hard" else "soft"
    for name, on in (
        ("features", train["feature_weight"]),
        ("attention", train["attention_weight"]),
        ("token", config["token"]),
    ):
        kind = name if on else kind
    kind = "alone" if config["teacher"] == "none" else kind
    return f"{student}, {kind}" + (", then int8" if "int8" in method else "")


@table
def student_by_student(results: Results) -> Iterator[Cells]:
    """A line for each student: MB, share of the teacher's bytes, top-1, points from itself alone, and its time."""
    found = students(results)
    for name, label in found.items():
        alone = found.get(f"{name.split(', ')[0]}, alone")
        gained = "" if alone in (None, label) else results.points(label, alone)
        times = "1 / 1" if label == "baseline" else results.times(label)
        yield name, f"{results.mb(label):.2f}", f"{results.share(label):.2f}", results.accuracy(label), gained, times


def _plain_students(results: Results) -> list[str]:
    return [label for name, label in students(results).items() if name != "teacher" and "pruned" not in name]


@known
def best_student(results: Results) -> float:
    """The highest top-1 of a student, pruned teachers left out, in per cent."""
    return max(map(results.top1, _plain_students(results)))


@known
def largest_student(results: Results) -> float:
    """The bytes of the largest student, pruned teachers left out, over the teacher's."""
    return max(map(results.share, _plain_students(results)))


class Taught(Mean):
    """A student's top-1 with a teacher over its own without, in points, a pair for each seed; alone and soft are the means."""

    def __init__(self, pairs: pd.DataFrame):
        super().__init__(pairs["soft"] - pairs["alone"])
        self.alone, self.soft = float(pairs["alone"].mean()), float(pairs["soft"].mean())


@known
def taught_over_seeds(results: Results, student: str) -> Taught:
    """A student's top-1 with a teacher's soft labels over its own without."""
    rows = results.every[(results.every["method"] == "distillation") & (results.every["metric"] == "top1")]
    names = rows["config"].map(lambda config: _student("distillation", config["methods"]))
    seeds = rows["config"].map(lambda config: config["methods"][0]["config"]["train"]["seed"])
    top1 = 100 * rows.assign(name=names, own=seeds).pivot_table(index="own", columns="name", values="value")
    pairs = top1[[f"{student}, alone", f"{student}, soft"]].dropna()
    return Taught(pairs.set_axis(["alone", "soft"], axis=1))


# Efficient attention


@table
def merging(results: Results) -> Iterator[Cells]:
    """A line for each r and schedule: share of the multiply-accumulates left, top-1, points from the baseline, time."""
    for label, method, steps in results.models():
        if method == "token_merging":
            config = steps[0]["config"]
            left = f"{results.share(label, 'macs'):.3f}"
            cells = results.accuracy(label), results.points(label), results.times(label)
            yield config["r"], config["schedule"], left, *cells


CONTROL = "full attention, trained as much longer"


@known
def attentions(results: Results) -> dict[str, str]:
    """What stands in the place of attention, in the page's words -> label; trained models are said to be so."""
    found: dict[str, str] = {}
    for label, method, steps in results.models():
        if method in ("nystroem", "linear_attention"):
            config = steps[0]["config"]
            tuned = ", fine-tuned" if config["train"]["epochs"] else ""
            found[CONTROL if config["blocks"] == [] else _attention(method, config) + tuned] = label
    return found


def _attention(method: str, config: dict[str, Any]) -> str:
    if method == "linear_attention":
        return "linear"
    inverse = f"{config['iterations']} iterations" if config["iterations"] else "exact inverse"
    also = ", convolution" if config["residual"] else ""
    return f"Nystroem, m = {config['landmarks']}, {inverse}, class token {config['class_token']}{also}"


@table
def attention_by_attention(results: Results) -> Iterator[Cells]:
    """A line for each kind of attention: top-1, points from the baseline, time."""
    for name, label in attentions(results).items():
        yield name, results.accuracy(label), results.points(label), results.times(label)


@known
def untrained_by_landmarks(results: Results) -> list[float]:
    """Top-1 with 2 iterations and the class token averaged, not trained, from the fewest landmarks to the most."""
    found = {}
    for label, method, steps in results.models():
        if method == "nystroem":
            config = steps[0]["config"]
            if config["class_token"] == "averaged" and not config["train"]["epochs"]:
                found[config["landmarks"]] = results.top1(label)
    return [found[landmarks] for landmarks in sorted(found)]


@known
def in_order(values: Sequence[float], count: int) -> bool:
    """Whether there are so many values, each above the one before."""
    return len(values) == count and all(before < after for before, after in zip(values, values[1:]))


@known
def best_attention(results: Results) -> float:
    """The highest top-1 of a model whose attention was replaced, in per cent."""
    return max(map(results.top1, attentions(results).values()))


@known
def won_back(results: Results) -> dict[str, float]:
    """Share of what was lost against the control that training won back, by name, where a point or more was lost."""
    found = attentions(results)
    control = results.top1(found[CONTROL])
    shares = {}
    for name, label in found.items():
        before = found.get(name.removesuffix(", fine-tuned"))
        if name.endswith(", fine-tuned") and before and control - results.top1(before) > 1:
            shares[name.removesuffix(", fine-tuned")] = 1 - results.lost(label, found[CONTROL]) / results.lost(
                before, found[CONTROL]
            )
    return shares


@known
def attention_times(results: Results, part: str) -> dict[str, dict[int, float]]:
    """Kind of attention -> tokens -> its time over full attention's, of one layer or of the whole model."""
    curves = attention.rows_by_variant(results.every, "latency_ratio", part)
    return {name: dict(zip(own["tokens"], own["value"])) for name, own in curves.items() if name != "full attention"}


@known
def pays_from(results: Results, part: str) -> dict[str, tuple[float, float]]:
    """Kind of attention -> the tokens from which on its multiply-accumulates and its time are below full attention's."""
    return attention.break_even_by_variant(results.every, part)


@known
def attention_pays(results: Results, tokens: int) -> str:
    """Whether "everything", "nothing" or "something" is faster than full attention at a number of tokens, layer and model."""
    faster = {times[tokens] < 1 for part in ("attention", "model") for times in attention_times(results, part).values()}
    return "something" if len(faster) > 1 else "everything" if faster == {True} else "nothing"


@table
def by_tokens(results: Results) -> Iterator[Cells]:
    """A line for each part and kind of attention: times over full attention's by tokens, and from where on it pays."""
    tokens = sorted({context["tokens"] for context in results.every["context"]})
    for part, where in (("attention", "one layer"), ("model", "the whole model")):
        times = attention_times(results, part)
        for name, (macs, time) in pays_from(results, part).items():
            cells = [f"{times[name][count]:.2f}" if count in times[name] else "-" for count in tokens]
            yield where, name, *cells, f"{macs:.0f}", f"{time:.0f}"


# Rows from before a fault was mended

IN_HALF = {"weight_only", "uct", "diffq", "lsq", "simulated_integer"}  # what stores its rest in float16, by default
SCORES = {"top1", "top5", "cross_entropy", "output_error", "weight_error"}
OF_CODES = {"int8_macs", "latency_floor", "edge_time", "edge_energy"}
MENDED = "2026-11-28T20:49"  # rows made later are made without the faults
NEW_KINDS = ("t2t", "_gap_", "so150m2", "miil", "_rpn_", "_reg")  # no bias, post-norm, registers


class Faulty:
    """How many rows from before a fault was mended it touches, by folder, most first."""

    def __init__(self, touched: Sequence[tuple[str, Any]]):
        self.count = len(touched)
        self.folders = dict(Counter(name for name, _ in touched).most_common())
        self.by_folder: dict[str, list[Any]] = {}
        for name, row in touched:
            self.by_folder.setdefault(name, []).append(row)

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.folders.items())

    def in_full(self) -> str:
        """The folders with backends and metrics of their rows."""
        parts = []
        for name, rows in self.by_folder.items():
            which = (f"{row.metric} in {row.context.get('backend', 'eager')}" for row in rows)
            parts.append(f"{name} ({', '.join(which)})")
        return "; ".join(parts)


@known
def faulty(runs: Iterable[Results]) -> dict[str, Faulty]:
    """The rows that each fault touches: "half" (small values in float16), "batches" (of 8), "codes" or "kinds"."""
    found: dict[str, list[tuple[str, Any]]] = {fault: [] for fault in ("half", "batches", "codes", "kinds")}
    for results in runs:
        rows = results.measured[["status", "time", "config", "metric", "context", "model"]]
        for row in rows[(rows["status"] == "ok") & (rows["time"] < MENDED)].itertuples():
            steps = {step["method"]: step["config"] for step in row.config.get("methods", ())}
            for fault, touched in found.items():
                if _touched(results.name, row, steps, fault):
                    touched.append((results.name, row))
    return {fault: Faulty(touched) for fault, touched in found.items()}


def _touched(folder: str, row: Any, steps: dict[str, Any], fault: str) -> bool:
    if fault == "half":
        half = any(method in IN_HALF and config.get("rest") != "float32" for method, config in steps.items())
        return row.metric in SCORES and half
    if fault == "batches":
        other = row.context.get("backend", "eager") != "eager" or folder.startswith("int8-peers")
        return row.metric in ("top1", "top5", "cross_entropy") and "dynamic_int8" in steps and other
    if fault == "codes":
        return steps.get("static_int8", {}).get("attention", False) and row.metric in OF_CODES
    return any(kind in row.model for kind in NEW_KINDS)


@known
def trials(results: Results, harm: str) -> int:
    """How many times work was killed, or bits were flipped."""
    rows = results.every[results.every["metric"] == "trials"]
    return int(sum(row.value for row in rows.itertuples() if row.context["harm"] == harm))


@known
def surely_faster(results: Results) -> list[str]:
    """The labels of the models whose time over the baseline's has an interval below 1."""
    rows = results.rows[results.rows["metric"] == "latency_ratio"]
    return list(dict.fromkeys(rows["label"][rows["high"] < 1]))
