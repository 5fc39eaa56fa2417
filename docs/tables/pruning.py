"""Tables of multi-dimensional pruning: accuracy by policy, and what the Gaussian process gains."""

from collections.abc import Iterator, Sequence

from docs.results import Results
from docs.tables.common import Cells, Mean, known, table

ALL = ("neurons", "head_dims", "tokens")
POLICIES = {  # name on the page -> how the policy was searched, and what may be removed
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
    names, labels = {kind: name for name, kind in POLICIES.items()}, {}
    for label, method, steps in results.models():
        if method != "multidimensional":
            continue
        config = steps[0]["config"]
        tuned = ("distilled" if config["train"]["kd_weight"] else "labels") if config["train"]["epochs"] else "free"
        name = names.get((config["search"]["how"], tuple(config["dimensions"])))
        if name and config["budget"] == "macs" and config["search"]["seed"] == 0:
            labels[name, config["keep"], tuned] = label
    return labels


@table
def policy_by_policy(results: Results, keeps: Sequence[float]) -> Iterator[Cells]:
    """A line for each budget and policy: share of multiply-accumulates left, top-1 not trained and fine-tuned."""
    labels = policies(results)
    for keep in keeps:
        for name in POLICIES:
            free, tuned = (labels.get((name, keep, training)) for training in ("free", "distilled"))
            if free and tuned:
                yield name, f"{results.share(free, 'macs'):.3f}", results.accuracy(free), results.accuracy(tuned)


class SearchGain(Mean):
    """The gain of the Gaussian process's best scores over random search's, with a pair for each seed; p of the paired t test."""

    def __init__(self, process: Sequence[float], random: Sequence[float]):
        from scipy.stats import ttest_rel

        super().__init__([one - other for one, other in zip(process, random, strict=True)])
        self.p = float(ttest_rel(process, random).pvalue)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}] (p = {self.p:.2g}, {self.seeds} seeds)"


@known
def search_gain(results: Results) -> SearchGain:
    """The gain of the Gaussian process's best scores over random search's."""
    rows, best = results.rows[results.rows["metric"] == "search_score"], {}
    for row in rows.itertuples():
        config = row.config["methods"][0]["config"]
        settings = {key: value for key, value in config.items() if key not in ("search", "train", "teacher")}
        best.setdefault(str(sorted(settings.items())), {}).setdefault(config["search"]["how"], {})[row.seed] = row.value
    (scores,) = [by_search for by_search in best.values() if "random" in by_search]
    return SearchGain([scores["gp"][seed] for seed in scores["random"]], list(scores["random"].values()))


SEARCHES = {"one_ratio": "one ratio", "knapsack": "knapsack", "gp": "Gaussian process"}


@known
def searched_within(results: Results) -> dict[tuple[str, float], dict[str, str]]:
    """(cost, share) -> way to find the policy -> label of the model, in the order of the rows."""
    labels: dict[tuple[str, float], dict[str, str]] = {}
    for label, method, steps in results.models():
        if method == "multidimensional":
            config = steps[0]["config"]
            way = SEARCHES[config["search"]["how"]]
            way += f", {config['search']['evaluations']} policies" if config["search"]["how"] == "gp" else ""
            labels.setdefault((config["budget"], config["keep"]), {})[way] = label
    return labels


@known
def predicted_milliseconds(results: Results, label: str) -> float:
    """What the table of latencies predicts for a model whose budget was latency."""
    rows, config = results.rows[results.rows["metric"] == "search_cost"], results.config(label)
    (seconds,) = [row.value for row in rows.itertuples() if row.config["methods"][0]["config"] == config]
    return 1e3 * seconds


@table
def search_by_search(results: Results) -> Iterator[Cells]:
    """A line for each budget and way: seconds, top-1, the knapsack's points over it, share of multiply-accumulates, time."""
    for (cost, keep), labels in searched_within(results).items():
        for way, label in labels.items():
            over = "" if way == "knapsack" else results.points(labels["knapsack"], label)
            batch = results.config(label)["batch"]
            seconds, time = results.value(label, "compress_seconds"), f"{results.time(label, batch):.2f}"
            if cost == "latency":
                measured = results.value(label, "latency_p50", batch)
                time += f" ({measured:.1f} ms, predicted {predicted_milliseconds(results, label):.1f})"
            share = f"{results.share(label, 'macs'):.3f}"
            yield f"{keep:g} of {cost}", way, f"{seconds:.0f}", results.accuracy(label), over, share, time
