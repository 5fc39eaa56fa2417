"""top1 and top5 on the test split, with 95 % Wilson intervals."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from vitbench import artifact, backends
from vitbench.data import ImageData
from vitbench.measure.value import Value
from vitbench.statistics import pack_hits, wilson
from vitbench.training import evaluate, pick_device


def accuracy(path: Path, data: ImageData, metrics: Sequence[str], device: str, backend: str) -> Iterator[Value]:
    """Load the model and score it on every test image; `metrics` is top1, or top1 and top5."""
    model, device = artifact.load(path), pick_device(device)
    if backend != "eager":
        model, device = backends.Prepared(backend, model), "cpu"
    found = evaluate(model, data.test, device=device, title="scoring")
    for metric in metrics:
        hits = getattr(found, metric)
        low, high = wilson(hits.sum(), len(hits))
        how = "measured: test images, Wilson 95 %"
        yield Value(metric, float(hits.mean()), how, low, high, hits=pack_hits(hits))
