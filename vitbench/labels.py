"""What tables and figures call a row's model: its method, with the settings in which it differs."""

from typing import Any

import pandas as pd


def labels_of(rows: pd.DataFrame) -> list[str]:
    """Each row's method, with `key=value` for the settings that are not those of the method's first row."""
    usual: dict[str, dict[str, Any]] = {}
    known: dict[tuple[str, int], str] = {}  # many rows share a config, the object
    labels = []
    for method, config in zip(rows["method"], rows["config"], strict=True):
        label = known.get((method, id(config)))
        if label is None:
            own = _settings(config)
            label = known[method, id(config)] = _label(method, own, usual.setdefault(method, own))
        labels.append(label)
    return labels


def _label(method: str, own: dict[str, Any], usual: dict[str, Any]) -> str:
    """The method with the settings that are not the usual ones."""
    apart = sorted(key for key, value in own.items() if value != usual.get(key, value) and _matters(key, own))
    return method + (f" ({', '.join(f'{key}={_short(own[key])}' for key in apart)})" if apart else "")


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What each of a row's methods was told, as one mapping."""
    steps, settings = config.get("methods", []), {}
    for step in steps:
        _flatten(step["config"], f"{step['method']}." if len(steps) > 1 else "", settings)
    return settings


def _short(setting: Any) -> Any:
    """A setting as labels show it: 0.40625 and not 0.4062499999674."""
    return f"{setting:.6g}" if isinstance(setting, float) else setting


def _matters(key: str, settings: dict[str, Any]) -> bool:
    """Whether a setting does anything: how to train does not where there are 0 epochs of it."""
    group, _, name = key.rpartition(".")
    return name == "epochs" or settings.get(f"{group}.epochs") != 0


def _flatten(config: dict[str, Any], before: str, flat: dict[str, Any]) -> None:
    """Put the settings of nested configs into `flat`, as `train.epochs` and the like."""
    for key, value in config.items():
        if isinstance(value, dict):
            _flatten(value, f"{before}{key}.", flat)
        else:
            flat[before + key] = value
