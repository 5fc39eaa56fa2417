"""Labels that a person would write: a model's methods and settings in a few words, for figures, tables and the report.

The label of a row, such as `weight_only (bits=4)`, identifies a model; its display label, "4-bit weights", is for reading.
"""

import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from vitbench.rows.experiment import Experiment, flat_settings, has_effect, step_settings

COMBINATIONS = "combinations"  # the family of models of several methods


@dataclass(frozen=True)
class MethodWords:
    """The words for a method.

    Attributes:
        family: methods of one family have one colour in all figures.
        name: of the method without settings.
        sized: the name with settings that decide the size; "" means the name. It is used if the rows have all of them.
        always: further settings that decide the size, which are always named.
    """

    family: str
    name: str
    sized: str = ""
    always: tuple[str, ...] = ()


METHODS = {
    "baseline": MethodWords("baseline", "baseline"),
    "weight_only": MethodWords("quantization", "weight-only quantization", "{bits:codes} weights"),
    "uct": MethodWords("UCT", "UCT", "UCT, {bits} bits", ("rank", "rank_ratio")),
    "mixed_rank": MethodWords("low rank", "mixed rank", "mixed rank, {keep:percent} kept"),
    "pruning": MethodWords("pruning", "pruning", "", ("neurons", "heads", "head_dims", "tokens")),
    "distillation": MethodWords("distillation", "distillation", "", ("depth", "student")),
    "token_merging": MethodWords(
        "tokens and attention", "token merging", "token merging, {keep:percent} of MACs kept", ("r",)
    ),
    "dynamic_int8": MethodWords("quantization", "dynamic int8"),
    "multidimensional": MethodWords(
        "pruning", "multi-dimensional pruning", "multi-dimensional pruning, {keep:percent} kept"
    ),
    "nystroem": MethodWords("tokens and attention", "Nystroem attention", "", ("landmarks",)),
    "static_int8": MethodWords("quantization", "static int8"),
    "deflate": MethodWords("quantization", "entropy coding"),
    "linear_attention": MethodWords("tokens and attention", "linear attention"),
    "lsq": MethodWords("quantization", "LSQ", "LSQ, W{weight_bits}A{activation_bits}"),
    "diffq": MethodWords("quantization", "DiffQ", "DiffQ, {bits:number} bits"),
    "simulated_integer": MethodWords(
        "quantization", "simulated integers", "simulated integers, W{weight_bits}A{activation_bits}"
    ),
    "search": MethodWords("pruning", "searched policy", "searched policy, {keep:percent} kept"),
    "torch_pruning": MethodWords("pruning", "Torch-Pruning", "Torch-Pruning, {ratio:percent}"),
    "peer_nncf": MethodWords("quantization", "NNCF static int8"),
    "peer_onnxruntime_dynamic": MethodWords("quantization", "ONNX Runtime dynamic int8"),
    "peer_onnxruntime_static": MethodWords("quantization", "ONNX Runtime static int8"),
    "peer_pt2e": MethodWords("quantization", "PyTorch PT2E static int8"),
    "peer_torch_dynamic": MethodWords("quantization", "PyTorch dynamic int8"),
    "peer_torchao_dynamic": MethodWords("quantization", "torchao dynamic int8"),
}
PHRASES = {  # setting -> its phrase; a phrase of a value that is off (`_is_off`) is left out
    "group": "groups of {}",
    "rank": "rank {}",
    "rank_ratio": "rank {:percent} of the width",
    "neurons": "{:percent} of neurons",
    "heads": "{:percent} of heads",
    "head_dims": "{:percent} of head dimensions",
    "tokens": "{:percent} of tokens",
    "depth": "{:plural block}",
    "student": "student {}",
    "r": "{:plural pair} a block",
    "landmarks": "{:plural landmark}",
    "iterations": "{:plural iteration}",
    "token": "distillation token",
    "target_bytes": "bits by sensitivity for {:MB}",
    "reconstruction": "reconstruction",
    "rotate": "rotated",
    "head_bits": "{}-bit head",
    "dense_bits": "{:codes} weights elsewhere",
    "criterion.name": "by {}",
    "search.seed": "search with seed {}",
    "train.seed": "seed {}",
    "images.train": "{} training images",
    "images.calibration": "{} calibration images",
    "images.val": "",
    "train.epochs": "trained {:plural epoch}",
}
VALUE_PHRASES = {  # (setting, value) -> its phrase
    ("rounding", "nearest"): "nearest rounding",
    ("rounding", "second_order"): "second-order rounding",
    ("form", "encoder"): "encoder",
    ("form", "direct"): "",
    ("order", "decode_first"): "decoded first",
    ("order", "reordered"): "",
    ("class_token", "averaged"): "class token averaged",
    ("class_token", "apart"): "class token apart",
    ("teacher", "original"): "",
    ("teacher", "none"): "no teacher",
    ("allocation", "uniform"): "uniform ranks",
    ("decomposition", "svd"): "SVD",
    ("decomposition", "asvd"): "ASVD",
    ("decomposition", "svd_llm"): "SVD-LLM",
    ("compensation", "none"): "no compensation",
    ("compensation", "gradient"): "gradient compensation",
    ("compensation", "ridge"): "ridge compensation",
    ("criterion.name", "hsic"): "by HSIC",
    ("criterion.name", "taylor"): "by Taylor",
    ("start", "activations"): "truncated start",
    ("start", "weights"): "start from weights",
    ("softmax", "log_sqrt2"): "softmax in codes of log √2",
    ("softmax", "log2"): "softmax in codes of log2",
    ("range", "mse"): "ranges of least error",
    ("range", "minmax"): "ranges of minimum and maximum",
    ("schedule", "calibrated"): "calibrated schedule",
    ("schedule", "decreasing"): "decreasing schedule",
    ("schedule", "constant"): "",
    ("matching", "ward"): "Ward's pairs",
    ("matching", "cosine"): "",
    ("search.how", "random"): "random search",
    ("search.how", "one_ratio"): "one ratio",
    ("search.how", "knapsack"): "knapsack",
    ("search.how", "gp"): "",
}
REPLACED_BY = {"rank_ratio": "rank"}  # a setting -> the one that decides in its place, if it is given


def method_name(method: str) -> str:
    """A method's or a combination's name without settings: "mixed rank + weight-only quantization"."""
    return " + ".join(METHODS[part].name if part in METHODS else _spaced(part) for part in method.split("+"))


def family_of(method: str) -> str:
    """The family of a method or of a combination; "" if the method is in no family."""
    if "+" in method:
        return COMBINATIONS
    return METHODS[method].family if method in METHODS else ""


def display_labels(rows: pd.DataFrame | Experiment, labels: Iterable[str] | None = None) -> dict[str, str]:
    """Label -> display label, for the models of one figure or table; no two models have the same.

    A display label names the setting that decides the size, and the settings that differ between the models of the same
    method. What is off, such as a training of 0 epochs, is left out.

    Args:
        labels: of the models that are shown together; None means all models of the rows.
    """
    experiment_rows = Experiment.of(rows).rows
    first_rows = experiment_rows.drop_duplicates("label").set_index("label")
    shown = list(dict.fromkeys(first_rows.index if labels is None else labels))
    models = {
        label: _steps(first_rows.loc[label, "method"], first_rows.loc[label, "config"])
        for label in shown
        if label in first_rows.index
    }
    texts: dict[str, str] = {}
    by_method: dict[tuple[str, ...], list[str]] = {}
    for label, steps in models.items():
        by_method.setdefault(tuple(name for name, _ in steps), []).append(label)
    for method_labels in by_method.values():
        texts |= _texts({label: models[label] for label in method_labels})
    taken: set[str] = set()
    for label in shown:
        text = texts.get(label, label)
        texts[label] = text if text not in taken else label
        taken.add(texts[label])
    return {label: texts[label] for label in shown}


Steps = list[tuple[str, dict[str, Any]]]  # of a model: method and settings, in order


def _steps(method: str, config: dict[str, Any]) -> Steps:
    """The methods of a model with their settings, without those that have no effect."""
    steps = [(step["method"], flat_settings(step_settings(step))) for step in config.get("methods", [])]
    if "+".join(name for name, _ in steps) != method:  # a name of the row's own, such as `search`
        steps = [(method, {key: value for _, settings in steps for key, value in settings.items()})]
    return [
        (name, {key: value for key, value in settings.items() if has_effect(key, settings)}) for name, settings in steps
    ]


def _texts(models: dict[str, Steps]) -> dict[str, str]:
    """The texts of models of one method; where two would be the same, with all settings that differ."""
    first = next(iter(models.values()))
    differing = [_differing([steps[index][1] for steps in models.values()]) for index in range(len(first))]
    texts = {
        label: " + ".join(
            _step_text(*step, keys, first_step[1])
            for step, keys, first_step in zip(steps, differing, first, strict=True)
        )
        for label, steps in models.items()
    }
    counts = pd.Series(list(texts.values())).value_counts()
    for label, steps in models.items():
        if counts[texts[label]] > 1:
            texts[label] = " + ".join(
                ", ".join([_step_text(*step, [], step[1]), *(_plain(key, step[1]) for key in keys if key in step[1])])
                for step, keys in zip(steps, differing, strict=True)
            )
    return texts


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    """The settings that have several values among these models, and those of images, which the others used otherwise."""
    values: dict[str, set[str]] = {}
    for each in settings:
        for key, value in each.items():
            values.setdefault(key, set()).add(repr(float(value) if isinstance(value, int) else value))
    return [key for key, known in values.items() if len(known) > 1 or key.startswith("images.")]


def _step_text(method: str, settings: dict[str, Any], differing: Iterable[str], first: dict[str, Any]) -> str:
    """A method with the settings that decide its size, and those of `differing` that are worth a word."""
    words = METHODS.get(method, MethodWords("", _spaced(method)))
    sized_by = [field for _, field, _, _ in string.Formatter().parse(words.sized) if field]
    has_size = bool(sized_by) and all(settings.get(name) is not None for name in sized_by)
    parts = [_WORDS.format(words.sized, **settings) if has_size else words.name]
    named = [key for key in words.always if key in settings]
    named += [key for key in sorted(differing, key=_order) if key not in named and not (has_size and key in sized_by)]
    for key in named:
        if key not in REPLACED_BY or _is_off(settings.get(REPLACED_BY[key])):
            parts.append(_phrase(key, settings, first))
    return ", ".join(filter(None, parts))


def _order(key: str) -> tuple[int, str]:
    """Settings with a phrase come first, in the order of the table, and a training last."""
    known = [*PHRASES, *(name for name, _ in VALUE_PHRASES)]
    if key.startswith("train."):
        return len(known) + 1, key if key != "train.epochs" else ""
    return (known.index(key) if key in known else len(known)), key


def _phrase(key: str, settings: dict[str, Any], first: dict[str, Any]) -> str:
    """The phrase of one setting; "" if it is off, or unknown and as in the method's first model."""
    if key not in settings:
        return ""
    value = settings[key]
    if isinstance(value, str) and (key, value) in VALUE_PHRASES:
        return VALUE_PHRASES[key, value]
    if key in PHRASES:
        return "" if _is_off(value) else _WORDS.format(PHRASES[key], value)
    return "" if value == first.get(key, value) else _plain(key, settings)


def _plain(key: str, settings: dict[str, Any]) -> str:
    """A setting as name and value; of a switch the name, after "no" if it is off."""
    name, value = _spaced(key.removeprefix("train.")), settings[key]
    if isinstance(value, bool) or value is None:
        return name if value else f"no {name}"
    if isinstance(value, list):
        return f"{name} {' and '.join(map(_spaced, map(str, value)))}" if value else f"no {name}"
    return f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {_spaced(str(value))}"


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == "" or (isinstance(value, int | float) and value == 0)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


class _Words(string.Formatter):
    """`str.format` with the units of settings: percent, MB, codes, plural NOUN and number."""

    def format_field(self, value: Any, format_spec: str) -> str:
        unit, _, noun = format_spec.partition(" ")
        if unit == "percent":
            return f"{100 * value:.3g} %"
        if unit == "MB":
            return f"{value / 1e6:.3g} MB"
        if unit == "codes":
            return "ternary" if value == 1.58 else f"{value}-bit"
        if unit == "number":
            return f"{value:g}"
        if unit == "plural":
            return f"{value} {noun}" + ("" if value == 1 else "s")
        return str(super().format_field(value, format_spec))


_WORDS = _Words()
