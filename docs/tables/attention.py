"""Tables of efficient attention: merged tokens, and what replaces softmax attention."""

from collections.abc import Iterator, Sequence
from typing import Any

from docs.results import Results
from docs.tables.common import Cells, known, table
from vitbench.figures import attention


@table
def merging(results: Results) -> Iterator[Cells]:
    """A line for each r and schedule: share of the multiply-accumulates left, top-1, points from the baseline, time."""
    for label, method, steps in results.models():
        if method == "token_merging":
            config = steps[0]["config"]
            share = f"{results.share(label, 'macs'):.3f}"
            cells = results.accuracy(label), results.points(label), results.times(label)
            yield config["r"], config["schedule"], share, *cells


SCHEDULES = ("constant", "decreasing", "calibrated")


@known
def merged_to(results: Results) -> dict[tuple[float, str, str], str]:
    """The share of the multiply-accumulates to keep, the schedule and the matching of pairs -> label."""
    return {
        (config["keep"], config["schedule"], config["matching"]): label
        for label, method, steps in results.models()
        if method == "token_merging" and (config := steps[0]["config"]).get("keep")
    }


@table
def merging_forms(results: Results) -> Iterator[Cells]:
    """A line for each share to keep, schedule and matching: share left, top-1, points from the baseline and from ToMe's."""
    labels = merged_to(results)
    for keep, schedule, matching in sorted(labels, key=lambda form: (-form[0], form[2], SCHEDULES.index(form[1]))):
        label = labels[keep, schedule, matching]
        paper = labels[keep, "constant", "cosine"]
        versus = "-" if label == paper else results.points(label, paper)
        share = f"{results.share(label, 'macs'):.3f}"
        yield f"{keep:g}", schedule, matching, share, results.accuracy(label), results.points(label), versus


CONTROL = "full attention, trained as much longer"


@known
def attentions(results: Results) -> dict[str, str]:
    """The kind of attention in the page's words, with the training -> label."""
    labels: dict[str, str] = {}
    for label, method, steps in results.models():
        if method in ("nystroem", "linear_attention"):
            config = steps[0]["config"]
            tuned = ", fine-tuned" if config["train"]["epochs"] else ""
            labels[CONTROL if config["blocks"] == [] else _attention(method, config) + tuned] = label
    return labels


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
    top1_by_landmarks = {}
    for label, method, steps in results.models():
        if method == "nystroem":
            config = steps[0]["config"]
            if config["class_token"] == "averaged" and not config["train"]["epochs"]:
                top1_by_landmarks[config["landmarks"]] = results.top1(label)
    return [top1_by_landmarks[landmarks] for landmarks in sorted(top1_by_landmarks)]


@known
def in_order(values: Sequence[float], count: int) -> bool:
    """Whether there are `count` values in increasing order."""
    return len(values) == count and all(before < after for before, after in zip(values, values[1:]))


@known
def best_attention(results: Results) -> float:
    """The highest top-1 of a model whose attention was replaced, in per cent."""
    return max(map(results.top1, attentions(results).values()))


@known
def regained(results: Results) -> dict[str, float]:
    """Kind of attention -> the share of the loss against the control that training regains, where it is above a point."""
    labels = attentions(results)
    control = results.top1(labels[CONTROL])
    shares = {}
    for name, label in labels.items():
        before = labels.get(name.removesuffix(", fine-tuned"))
        if name.endswith(", fine-tuned") and before and control - results.top1(before) > 1:
            shares[name.removesuffix(", fine-tuned")] = 1 - results.lost(label, labels[CONTROL]) / results.lost(
                before, labels[CONTROL]
            )
    return shares


@known
def attention_times(results: Results, part: str) -> dict[str, dict[int, float]]:
    """Kind of attention -> tokens -> its time over full attention's, of one layer or of the whole model."""
    curves = attention.rows_by_variant(results.every, "latency_ratio", part)
    return {
        name: dict(zip(curve["tokens"], curve["value"])) for name, curve in curves.items() if name != "full attention"
    }


@known
def pays_from(results: Results, part: str) -> dict[str, tuple[float, float]]:
    """Kind of attention -> the number of tokens from which its multiply-accumulates, and its time, are below full attention's."""
    return attention.break_even_by_variant(results.every, part)


@known
def attention_pays(results: Results, tokens: int) -> str:
    """Whether "everything", "nothing" or "something" is faster than full attention at a number of tokens, layer and model."""
    faster = {times[tokens] < 1 for part in ("attention", "model") for times in attention_times(results, part).values()}
    return "something" if len(faster) > 1 else "everything" if faster == {True} else "nothing"


@table
def by_tokens(results: Results) -> Iterator[Cells]:
    """A line for each part and kind of attention: times over full attention's by tokens, and the tokens from which it pays."""
    tokens = sorted({context["tokens"] for context in results.every["context"]})
    for part, part_name in (("attention", "one layer"), ("model", "the whole model")):
        times = attention_times(results, part)
        for name, (macs, time) in pays_from(results, part).items():
            cells = [f"{times[name][count]:.2f}" if count in times[name] else "-" for count in tokens]
            yield part_name, name, *cells, f"{macs:.0f}", f"{time:.0f}"
