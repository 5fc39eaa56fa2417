"""top1 and top5 on the test split, with 95 % Wilson intervals, and the cross-entropy, image by image."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vitbench import artifact, backends
from vitbench.data import ImageData
from vitbench.measurement.value import Value
from vitbench.statistics import mean_interval, pack_hits, wilson
from vitbench.training import SCORING_BATCH, evaluate, pick_device


def accuracy(path: Path, data: ImageData, metrics: Sequence[str], device: str, backend: str) -> Iterator[Value]:
    """Load the model and score it on every test image; `metrics` is top1, or top1 and top5, and cross_entropy."""
    model, device = artifact.load(path), pick_device(device)
    if backend != "eager":
        model, device = backends.Prepared(backend, model, min(SCORING_BATCH, len(data.test))), "cpu"
    found = evaluate(model, data.test, device=device, title="scoring")
    if not np.isfinite(found.loss).all():
        raise RuntimeError(f"{(~np.isfinite(found.loss)).sum()} of {len(found.loss)} answers are not finite numbers")
    for metric in metrics:
        if metric == "cross_entropy":
            mean, low, high = mean_interval(found.loss)
            samples = [float(f"{loss:.3g}") for loss in found.loss]  # in rows no more digits than count
            yield Value(metric, mean, "measured: test images, mean, Student 95 %", low, high, samples=samples)
            continue
        hits = getattr(found, metric)
        low, high = wilson(hits.sum(), len(hits))
        how = "measured: test images, Wilson 95 %"
        yield Value(metric, float(hits.mean()), how, low, high, hits=pack_hits(hits))
