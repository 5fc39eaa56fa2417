"""Peak resident memory of a fresh process that loads the model and answers one image."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitbench.measure.child import in_child, job
from vitbench.measure.value import Value


def peak_rss(path: Path, threads: int) -> Iterator[Value]:
    """The peak, and how much of it the imports alone take."""
    found = in_child("answer_one_image", threads, path=str(path))
    yield Value(
        "peak_rss", found["peak"], "measured: peak of a fresh process that loads the file and answers one image"
    )
    yield Value("import_rss", found["imports"], "measured: peak of the same process after its imports")


@job
def answer_one_image(path: str) -> dict[str, Any]:
    """Peak bytes after the imports and after one answer."""
    import torch

    from vitbench import artifact

    imports = peak_bytes()
    model = artifact.load(path)
    size = model.recipe.preprocess.size
    with torch.inference_mode():
        model(torch.randn(1, 3, size, size))
    return {"imports": imports, "peak": peak_bytes()}


def peak_bytes() -> int:
    """This process's own peak. Linux's VmHWM, because ru_maxrss also holds the peak of the parent it was forked from."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
