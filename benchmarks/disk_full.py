"""Run each command on a full disk: it should print one line, leave nothing, and resume once there is space.

    sudo python benchmarks/disk_full.py --out results/runs/disk-full

Each trial writes into a file system in memory of 4 KB to 1 MB (`mount -t tmpfs`, which needs root): a results or
output folder, or the cache of trainings, searches and calibration statistics. Then the file system grows, and the same
command runs again. The table is printed and written to `table.md`, its data to `found.json`.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import vitbench as vb

SIZES = (4, 16, 64, 256, 1024)  # KB
ENOUGH = "64m"
IMAGES = ["--dataset", "digits", "--splits", "train=400", "val=100", "calibration=64"]
SWEEP = """models: [{name: vit_micro_patch2_8}]
datasets: [{dataset: digits, splits: {train: 200, val: 100}}]
train: {epochs: 1, batch_size: 32}
methods: [baseline, {weight_only: {bits: [4, 8]}}]
measures: {what: [size]}
"""


@dataclass(frozen=True)
class Trial:
    """A command, and the folder that is small: OUT, a results or output folder, or the project's cache."""

    words: str
    small: str = "OUT"


TRIALS = {
    "compress": Trial("compress MODEL --out OUT/small"),
    "measure": Trial("measure MODEL IMAGES --what accuracy size weights --out OUT/results"),
    "report": Trial("report ROWS --out OUT/page"),
    "figure": Trial("figure size --rows ROWS --out OUT/size.png"),
    "bundle": Trial("bundle MODEL IMAGES --out OUT/bundle"),
    "sweep": Trial("run SWEEP --out OUT/sweep"),
    "sweep, its cache": Trial("run SWEEP --out FREE/sweep", "cache"),
    "notebooks": Trial(
        "run quick --only 00 01 --set model=vit_micro_patch2_8 train.epochs=1 threads=1 rounds=10 --out OUT/run"
    ),
    "notebooks, their cache": Trial(
        "run quick --only 01 --set model=vit_micro_patch2_8 train.epochs=1 threads=1 rounds=10 --out FREE/run", "cache"
    ),
    "training": Trial("compress MODEL IMAGES --method distillation --set train.epochs=2 --out FREE/small", "cache"),
    "moments of mixed rank": Trial(
        "compress MODEL IMAGES --method mixed_rank --set keep=0.5 --out FREE/small", "cache"
    ),
    "search of what to cut": Trial(
        "compress MODEL IMAGES --method multidimensional --set keep=0.7 search.evaluations=6 search.first=3 search.pool=100 train.epochs=0 --out FREE/small",
        "cache",
    ),
    "reconstruction": Trial(
        "compress MODEL IMAGES --method weight_only --set reconstruction=8 --out FREE/small", "cache"
    ),
    "search of combinations": Trial(
        "combine MODEL IMAGES --budget bytes=0.6 --trials 2 --set train.epochs=0 --record OUT/record --out OUT/best"
    ),
}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the table")
    parser.add_argument("--only", nargs="+", default=list(TRIALS), metavar="TRIAL", help=f"of {', '.join(TRIALS)}")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), metavar="KB", help="default: 4 to 1024")
    options = parser.parse_args()
    out = vb.base.writable_folder(options.out, "folder").resolve()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        os.environ |= {"VITBENCH_HOME": str(root / "home"), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        torch.set_num_threads(1)  # threads do not survive a fork
        vb.training.loop.CHECKPOINT_SECONDS = 0  # a checkpoint after every epoch
        if reason := mount_error(root):
            print(f"skipped: no file system in memory can be mounted here ({reason}); run it as root", file=sys.stderr)
            return 0
        make_inputs(root)
        results = []
        for name in options.only:
            for size in options.sizes:
                results.append(trial(root, name, size))
                print(line(results[-1]), flush=True)
    bad = sum(result["tracebacks"] + result["left"] + (not result["goes on"]) for result in results)
    summary = {"trials": results, "commit": vb.rows.commit(), "bad": bad}
    vb.base.write_text(out / "found.json", json.dumps(summary, indent=1) + "\n")
    head = "| command | KB | with so little space | tracebacks | left over | goes on |\n|---|---|---|---|---|---|\n"
    vb.base.write_text(out / "table.md", head + "".join(f"{line(result)}\n" for result in results))
    print(f"{len(results)} trials, {bad} bad")
    return 1 if bad else 0


def line(result: dict) -> str:
    """A trial as a line of the table."""
    cells = [result[key] for key in ("command", "KB", "said", "tracebacks", "left", "goes on")]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def mount_error(root: Path) -> str:
    """Why no file system in memory can be mounted; "" if it can."""
    try:
        with mounted(root, "64k"):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return (getattr(error, "stderr", "") or str(error)).strip()


@contextlib.contextmanager
def mounted(root: Path, size: str) -> Iterator[None]:
    """Mount a file system in memory of `size` bytes at `root`."""
    root.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(root)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(root)], check=True, capture_output=True)


def make_inputs(root: Path) -> None:
    """Make a small model, its rows and a sweep, with enough space."""
    vb.save(vb.create_model("vit_micro_patch2_8", num_classes=10, img_size=8), root / "model")
    vb.base.write_text(root / "sweep.yaml", SWEEP)
    done = vitbench(root, "measure MODEL IMAGES --what accuracy size --out ROWS", "")
    if done[0]:
        raise SystemExit(f"the model cannot be measured: {done[1][-300:]}")


def vitbench(root: Path, words: str, out: str) -> tuple[int, str]:
    """Run a command, whose words in capitals stand for paths below `root`; returns its status and its output.

    It runs in a fork of this process, which has done the long imports.
    """
    paths = {"MODEL": "model", "ROWS": "rows", "SWEEP": "sweep.yaml", "OUT": out, "FREE": f"{out}-free"}
    expanded = [part for word in words.split() for part in (IMAGES if word == "IMAGES" else [word])]
    arguments = [re.sub("|".join(paths), lambda match: str(root / paths[match[0]]), word) for word in expanded]
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            status = 99
            try:
                for number in (1, 2):
                    os.dup2(output.fileno(), number)
                os.chdir(root)
                status = vb.cli.main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read().decode(errors="replace").replace(str(root), "")


def trial(root: Path, name: str, size: int) -> dict:
    """Run a command with `size` KB, count what it leaves, and run it again with enough space."""
    command, out = TRIALS[name], f"{name.replace(' ', '-').replace(',', '')}-{size}"
    small = root / out if command.small == "OUT" else root / "home" / "results" / "cache"
    with mounted(small, f"{size}k"):
        first = vitbench(root, command.words, out)
        left = leftovers(small)
        remount = ["mount", "-o", f"remount,size={ENOUGH}", str(small)]
        subprocess.run(remount, check=True, capture_output=True)
        again = vitbench(root, command.words, out)
        left += leftovers(small)
    words = [text for text in re.split("[\r\n]+", first[1]) if re.search("vitbench: |^failed ", text)]
    outcome = "it fits" if first[0] == 0 else (words or [f"status {first[0]} without a word"])[-1]
    return {
        "command": name,
        "KB": size,
        "status": first[0],
        "said": outcome[:200],
        "tracebacks": (first[1] + again[1]).count("Traceback (most recent call last)"),
        "left": len(left),
        "goes on": again[0] == 0,
        "again": "" if again[0] == 0 else again[1][-400:],
    }


def leftovers(folder: Path) -> list[Path]:
    """Temporary files, and copies of notebooks that no longer run."""
    return [
        path
        for path in folder.rglob("*")
        if vb.base.TEMPORARY_NAME.fullmatch(path.name) or path.name.endswith((".running.ipynb", ".part"))
    ]


if __name__ == "__main__":
    sys.exit(main())
