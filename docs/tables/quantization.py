"""Tables of quantized models: bits, size, accuracy and time."""

from collections.abc import Iterator
from typing import Any

from docs.results import Results
from docs.tables.common import Cells, known, rounded_accuracy, table


@known
def quantized(results: Results) -> dict[tuple[str, str], str]:
    """(quantization, bits) -> label of each quantized model that was scored in eager mode."""
    labels: dict[tuple[str, str], str] = {}
    for label, method, steps in results.models():
        name = _quantized(method, steps[0]["config"]) if len(steps) == 1 else None
        if name:
            labels.setdefault(name, label)
    return labels


def _quantized(method: str, config: dict[str, Any]) -> tuple[str, str] | None:
    """The quantization in the page's words, and its bits; None for a model that is in no table."""
    trained = config.get("train", {}).get("epochs")
    if method == "dynamic_int8":
        return "dynamic int8", "8"
    if method == "static_int8":
        is_default = config["range"] == "mse" and config["equalise"] and config["compensation"]
        return ("static int8", "8") if is_default else None
    if method == "weight_only":
        kind = "trained with the rounding (LSQ)" if trained else config["rounding"].replace("_", " ")
        kind += f", groups of {config['group']}" if config["group"] else ", a step a row"
        kind += ", fitted by block" if config.get("reconstruction") else ""
        if config["target_bytes"]:
            return f"{kind}, bits by layer", "2 to 8"
        return kind, str(config["bits"])
    if method == "lsq":
        rounding = "trained (LSQ)" if trained else "nearest"
        return f"weights and inputs, {rounding}", f"{config['weight_bits']} / {config['activation_bits']}"
    if method == "diffq":
        return "learned bits (DiffQ)", f"{config['bits']:g} on average"
    if method == "simulated_integer":
        bits = " / ".join(str(config[f"{kind}_bits"]) for kind in ("weight", "activation", "attention"))
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
            yield *name, f"{results.mb(label):.2f}", rounded_accuracy(top1), results.points(label)


@table
def rounded_and_timed(results: Results) -> Iterator[Cells]:
    """A line for each quantized model: bits, MB, top-1, points from fp32, and its time in eager mode."""
    for name, label in quantized(results).items():
        yield *name, f"{results.mb(label):.2f}", results.accuracy(label), results.points(label), results.times(label)


@known
def calibrated(results: Results) -> dict[tuple[int, str], str]:
    """Bits, and what was done, of simulated integers by calibration alone -> label."""
    labels = {}
    for label, method, steps in results.models():
        if method == "simulated_integer":
            config = steps[0]["config"]
            what = "rotated" if config["rotate"] else "reparameterised"
            what += ", fitted together" if config["train"]["epochs"] else ", nearest"
            labels[config["weight_bits"], what] = label
    return labels


@table
def calibrated_alone(results: Results) -> Iterator[Cells]:
    """A line for each model of `calibrated`: bits, what was done, MB, top-1, points from fp32, seconds of the cell."""
    labels = calibrated(results)
    for bits, what in sorted(labels, key=lambda key: (-key[0], results.top1(labels[key]))):
        label = labels[bits, what]
        cells = f"{results.mb(label):.2f}", results.accuracy(label), results.points(label)
        yield f"W{bits}A{bits}", what, *cells, f"{results.value(label, 'cell_seconds'):.0f}"


@known
def not_of_one_origin(results: Results, method: str, metric: str) -> Any:
    """The row of a metric in eager mode of a method, whatever baseline the model is made of."""
    rows = results.every
    rows = rows[(rows["status"] == "ok") & rows["backend"].isna() & (rows["method"] == method)]
    return rows[rows["metric"] == metric].iloc[-1]
