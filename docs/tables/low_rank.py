"""Tables of mixed rank: accuracy stage by stage."""

from collections.abc import Iterator, Sequence
from typing import Any

from docs.results import Results
from docs.tables.common import Cells, known, rounded_accuracy, table

DEFAULTS = {
    "allocation": "greedy",
    "compensation": "closed_form",
    "decomposition": "activation",
    "gradient_weight": 1.0,
    "mean_correction": True,
    "propagate": True,
    "scale": "sensitivity",
    "split_qkv": False,
}
PLAIN_RANKS = {"gradient_weight": 0.0, "compensation": "none", "allocation": "uniform"}
STAGES: dict[str, dict[str, Any]] = {  # name on the page -> settings that are not the defaults
    "plain SVD, the same share of each layer": {"decomposition": "svd", "mean_correction": False, **PLAIN_RANKS},
    "ASVD, the same share": {"decomposition": "asvd", "mean_correction": False, **PLAIN_RANKS},
    "SVD-LLM, the same share": {"decomposition": "svd_llm", "mean_correction": False, **PLAIN_RANKS},
    "stage 1: activation-aware, the same share": PLAIN_RANKS,
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
    labels: dict[tuple[str, float], str] = {}
    for label, method, steps in results.models():
        if method != "mixed_rank":
            continue
        config = steps[0]["config"]
        for name, settings in STAGES.items():
            trained = name == "+ short distillation instead"
            if {**DEFAULTS, **settings}.items() <= config.items() and bool(config["train"]["epochs"]) == trained:
                if (name, config["keep"]) in labels:
                    raise ValueError(f"{results.name}: two models are {name} at {config['keep']}")
                labels[name, config["keep"]] = label
    return labels


@table
def stage_by_stage(results: Results, keeps: Sequence[float]) -> Iterator[Cells]:
    """A line for each stage that was run: top-1 for each share of the weights kept."""
    labels = stages(results)
    for name in STAGES:
        if all((name, keep) in labels for keep in keeps):
            yield name, *(rounded_accuracy(results.row(labels[name, keep], "top1")) for keep in keeps)
