"""Kill work and damage its stored files: does it give the result of undisturbed work, or is the damage named?

    python benchmarks/kills_and_flips.py --out results/runs/kills-and-flips

Five kinds of work on a tiny model: a training, a search of policies, the moments of mixed rank, cached models,
and rows. Each is killed (SIGKILL) at a random moment and restarted, and each is restarted after a random bit of its stored
files was flipped. The result is compared bit by bit with that of undisturbed work. Each work runs in a process of its own,
forked from this one.
"""

import argparse
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import vitbench as vb

MODEL = "vit_micro_patch2_8"
EPOCHS = 6
SEARCH = {"search": {"evaluations": 8, "first": 4, "pool": 60}, "keep": 0.7, "tolerance": 0.2, "train": {"epochs": 0}}
STORED = {  # the files of a work below its home
    "training": "run.safetensors",
    "search": "results/cache/searches/*.jsonl",
    "moments": "results/cache/moments/*.safetensors",
    "models": "results/cache/*/*.json results/cache/*/model/*",
    "rows": "records.jsonl",
}


@functools.cache
def images() -> vb.ImageData:
    """A small set of images, so that a work takes a second."""
    return vb.load_data("digits", train=256, test=64, val=64, calibration=64)


def initial_model() -> torch.nn.Module:
    """The model before any work."""
    return vb.create_model(MODEL, num_classes=10, seed=0)


def do_training(home: Path) -> str:
    """Train with a checkpoint after each epoch."""
    vb.training.loop.CHECKPOINT_SECONDS = 0.0
    config = vb.TrainConfig(epochs=EPOCHS, batch_size=64, ema=0.9)
    model, history = vb.train(initial_model(), images(), config, checkpoint=home / STORED["training"])
    return vb.base.digest([vb.model.model_digest(model), history])


def do_search(home: Path) -> str:
    """Search policies, and cut by the best."""
    small = vb.compress(initial_model(), vb.make_config("multidimensional", SEARCH), images())
    return vb.base.digest([vb.model.model_digest(small.model), small.search])


def do_moments(home: Path) -> str:
    """Factor layers by the moments of their inputs and gradients."""
    return vb.model.model_digest(
        vb.compress(initial_model(), vb.make_config("mixed_rank", {"train": {"epochs": 0}}), images()).model
    )


def do_models(home: Path) -> str:
    """Make a baseline and a compressed model, or load them from the cache."""
    vb.training.loop.CHECKPOINT_SECONDS = 0.0
    base = vb.baseline(MODEL, images(), vb.TrainConfig(epochs=3, batch_size=64, warmup_epochs=0))
    small = vb.compress_cached(base, vb.make_config("dynamic_int8"), images())
    return vb.base.digest([vb.model.model_digest(base.model), base.history, vb.model.model_digest(small.model)])


def do_rows(home: Path) -> str:
    """Append rows one by one; a row that exists is skipped."""
    row_fields = {
        "model": MODEL,
        "dataset": "digits",
        "data_fingerprint": "f",
        "method": "baseline",
        "source": "measured: x",
    }
    for number in range(60):
        vb.rows.append_rows(
            home / STORED["rows"], [vb.Row(**row_fields, metric="m", value=number / 7, context={"n": number})]
        )
    return vb.base.digest(sorted([row.key, row.value] for row in vb.rows.read_rows(home / STORED["rows"])))


WORK: dict[str, Callable[[Path], str]] = {
    "training": do_training,
    "search": do_search,
    "moments": do_moments,
    "models": do_models,
    "rows": do_rows,
}


def start(kind: str, home: Path) -> int:
    """Fork a process that does the work; its output and its result go into files beside `home`."""
    child = os.fork()
    if child:
        return child
    output = os.open(f"{home}.output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["VITBENCH_HOME"] = str(home)
    status = 1
    try:
        result = WORK[kind](home)
        Path(f"{home}.result").write_text(result)
        status = 0
    except vb.InputError as error:
        print(error)
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_to_end(kind: str, home: Path) -> tuple[str, str]:
    """Run work to its end; returns its result, "" if it refuses, and its output."""
    Path(f"{home}.result").unlink(missing_ok=True)
    os.waitpid(start(kind, home), 0)
    result = Path(f"{home}.result")
    return result.read_text() if result.exists() else "", Path(f"{home}.output").read_text()


def stored_files(kind: str, home: Path) -> list[Path]:
    """The files of a work that a resume reads."""
    return sorted(file for pattern in STORED[kind].split() for file in home.glob(pattern) if file.stat().st_size)


def start_and_kill(kind: str, home: Path, seconds: float) -> None:
    """Start the work and kill it after `seconds`."""
    child = start(kind, home)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def make_stored_files(kind: str, home: Path) -> list[Path]:
    """The stored files of a work; a training, which stores nothing more at its end, is killed once its checkpoint exists."""
    if kind != "training":
        run_to_end(kind, home)
        return stored_files(kind, home)
    child = start(kind, home)
    while not stored_files(kind, home):
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return stored_files(kind, home)


def flip(file: Path, rng: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def trial(kind: str, harm: str, expected: str, seconds: float, rng: random.Random) -> str:
    """The outcome of a disturbed work: "equal", "equal and named", "refused and named", or a fault."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        home.mkdir()
        names = []
        if harm == "kill":
            start_and_kill(kind, home, rng.uniform(0, seconds))
        else:
            file = rng.choice(make_stored_files(kind, home))
            names = [file.name, file.parent.name, file.parent.parent.name]
            flip(file, rng)
        result, output = run_to_end(kind, home)
    named = any(name in output for name in names if name != "home")
    if result == expected:
        return "equal and named" if named else "equal"
    if not result:
        return "refused and named" if named else "refused without a name"
    return "silent difference"


def main() -> int:
    """Do all trials, print their outcomes, and append rows of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="a results folder for the rows")
    parser.add_argument("--trials", type=int, default=6, help="of each harm to each kind of work (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    vb.rows.commit()  # caches the commit of the source that is loaded now
    torch.set_num_threads(1)  # threads do not survive a fork
    rng, counts = random.Random(options.seed), Counter()
    model = initial_model()
    images()
    for kind in WORK:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder, "home")
            home.mkdir()
            os.environ["VITBENCH_HOME"] = str(home)
            expected = WORK[kind](home)  # in this process, so that late imports are done before it forks
            begin = time.monotonic()
            shutil.rmtree(home)
            home.mkdir()
            again, _ = run_to_end(kind, home)
            seconds = time.monotonic() - begin
        assert again == expected, f"{kind}: two undisturbed works differ"
        for harm in ("kill", "flip"):
            for _ in range(options.trials):
                counts[kind, harm, trial(kind, harm, expected, seconds, rng)] += 1
            print(
                kind, harm, {outcome: n for (k, h, outcome), n in counts.items() if (k, h) == (kind, harm)}, flush=True
            )
    bad = sum(n for (_, _, outcome), n in counts.items() if outcome in ("silent difference", "refused without a name"))
    print(f"{bad} of {sum(counts.values())} trials ended in a silent difference or an unnamed refusal")
    if options.out:
        vb.Run(options.out).append(rows(model, counts, options.trials))
    return int(bad > 0)


def rows(model: torch.nn.Module, counts: Counter, trials: int) -> list[vb.Row]:
    """One row for each kind of work, harm and outcome, and one of the silent differences."""
    row_fields = vb.measurement.model_row_fields(model.recipe, images()) | {
        "method": "baseline",
        "source": "measured: disturbed and compared bit by bit",
    }
    outcome_rows = [
        vb.Row(
            **row_fields,
            metric="trials",
            unit="trials",
            value=float(n),
            context={"work": kind, "harm": harm, "outcome": outcome},
        )
        for (kind, harm, outcome), n in sorted(counts.items())
    ]
    silent = sum(n for (_, _, outcome), n in counts.items() if outcome == "silent difference")
    context = {"trials_of_each": trials, "trials": sum(counts.values())}
    return [
        *outcome_rows,
        vb.Row(**row_fields, metric="silent_differences", unit="trials", value=float(silent), context=context),
    ]


if __name__ == "__main__":
    sys.exit(main())
