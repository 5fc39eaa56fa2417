"""Kill work and damage what it keeps: does it end as work that nothing disturbed, or is the damage named?

    python benchmarks/kills_and_flips.py --out results/runs/kills-and-flips

Five kinds of work on a tiny model: a training, a search of policies, the moments of mixed rank, cached models,
and rows. Each is killed (SIGKILL) at moments drawn at random and started again, and each has one bit of what it keeps
flipped, at a place drawn at random, before it is started again. What it then comes to is compared bit by bit with the
result of undisturbed work. Every piece of work runs in a process of its own, forked from this one.
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
KEPT = {  # what a work keeps below its home
    "training": "run.safetensors",
    "search": "results/cache/searches/*.jsonl",
    "moments": "results/cache/moments/*.safetensors",
    "models": "results/cache/*/*.json results/cache/*/model/*",
    "rows": "records.jsonl",
}


@functools.cache
def images() -> vb.ImageData:
    """Few images, so that a work takes a second."""
    return vb.load_data("digits", train=256, test=64, val=64, calibration=64)


def plain() -> torch.nn.Module:
    """The model before any work."""
    return vb.create_model(MODEL, num_classes=10, seed=0)


def do_training(home: Path) -> str:
    """Train with a checkpoint after each epoch."""
    vb.training.loop.CHECKPOINT_SECONDS = 0.0
    config = vb.TrainConfig(epochs=EPOCHS, batch_size=64, ema=0.9)
    model, history = vb.train(plain(), images(), config, checkpoint=home / KEPT["training"])
    return vb.base.digest([vb.model.model_digest(model), history])


def do_search(home: Path) -> str:
    """Search policies, and cut by the best."""
    small = vb.compress(plain(), vb.make_config("multidimensional", SEARCH), images())
    return vb.base.digest([vb.model.model_digest(small), small.search])


def do_moments(home: Path) -> str:
    """Factor layers by the moments of their inputs and gradients."""
    return vb.model.model_digest(vb.compress(plain(), vb.make_config("mixed_rank", {"train": {"epochs": 0}}), images()))


def do_models(home: Path) -> str:
    """A baseline and a compressed model, made or taken from the cache."""
    vb.training.loop.CHECKPOINT_SECONDS = 0.0
    base = vb.baseline(MODEL, images(), vb.TrainConfig(epochs=3, batch_size=64, warmup_epochs=0))
    small = vb.compress_cached(base, vb.make_config("dynamic_int8"), images())
    return vb.base.digest([vb.model.model_digest(base.model), base.history, vb.model.model_digest(small.model)])


def do_rows(home: Path) -> str:
    """Add rows one by one; a row that is there is left out."""
    facts = {
        "model": MODEL,
        "dataset": "digits",
        "data_fingerprint": "f",
        "method": "baseline",
        "source": "measured: x",
    }
    for number in range(60):
        vb.rows.append_rows(home / KEPT["rows"], [vb.Row(**facts, metric="m", value=number / 7, context={"n": number})])
    return vb.base.digest(sorted([row.key, row.value] for row in vb.rows.read_rows(home / KEPT["rows"])))


WORK: dict[str, Callable[[Path], str]] = {
    "training": do_training,
    "search": do_search,
    "moments": do_moments,
    "models": do_models,
    "rows": do_rows,
}


def start(kind: str, home: Path) -> int:
    """Fork a process that does the work; what it says and its result go into files beside `home`."""
    child = os.fork()
    if child:
        return child
    said = os.open(f"{home}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
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


def finished(kind: str, home: Path) -> tuple[str, str]:
    """The result of work that runs to its end, "" if it refuses, and what it said."""
    Path(f"{home}.result").unlink(missing_ok=True)
    os.waitpid(start(kind, home), 0)
    result = Path(f"{home}.result")
    return result.read_text() if result.exists() else "", Path(f"{home}.said").read_text()


def kept(kind: str, home: Path) -> list[Path]:
    """The files of a work that a resume reads."""
    return sorted(file for pattern in KEPT[kind].split() for file in home.glob(pattern) if file.stat().st_size)


def killed(kind: str, home: Path, seconds: float) -> None:
    """Start the work and kill it after so long."""
    child = start(kind, home)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def prepared(kind: str, home: Path) -> list[Path]:
    """What the work keeps; a training, whose whole run keeps nothing new, is killed once its checkpoint is there."""
    if kind != "training":
        finished(kind, home)
        return kept(kind, home)
    child = start(kind, home)
    while not kept(kind, home):
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return kept(kind, home)


def flip(file: Path, rng: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def trial(kind: str, harm: str, wanted: str, whole: float, rng: random.Random) -> str:
    """What becomes of a work that was disturbed: "equal", "equal and named", "refused and named", or what must not be."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        home.mkdir()
        names = []
        if harm == "kill":
            killed(kind, home, rng.uniform(0, whole))
        else:
            file = rng.choice(prepared(kind, home))
            names = [file.name, file.parent.name, file.parent.parent.name]
            flip(file, rng)
        result, said = finished(kind, home)
    named = any(name in said for name in names if name != "home")
    if result == wanted:
        return "equal and named" if named else "equal"
    if not result:
        return "refused and named" if named else "refused without a name"
    return "silent difference"


def main() -> int:
    """Do all trials, print what became of them, and keep it as rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="a results folder for the rows")
    parser.add_argument("--trials", type=int, default=6, help="of each harm to each kind of work (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    vb.rows.commit()  # of the source that is loaded now
    torch.set_num_threads(1)  # a process that forks has no threads of its own
    rng, counts = random.Random(options.seed), Counter()
    model = plain()
    images()
    for kind in WORK:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder, "home")
            home.mkdir()
            os.environ["VITBENCH_HOME"] = str(home)
            wanted = WORK[kind](home)  # here, so that what is imported late is there when it forks
            begin = time.monotonic()
            shutil.rmtree(home)
            home.mkdir()
            again, _ = finished(kind, home)
            whole = time.monotonic() - begin
        assert again == wanted, f"{kind}: two undisturbed works differ"
        for harm in ("kill", "flip"):
            for _ in range(options.trials):
                counts[kind, harm, trial(kind, harm, wanted, whole, rng)] += 1
            print(kind, harm, {end: n for (k, h, end), n in counts.items() if (k, h) == (kind, harm)}, flush=True)
    bad = sum(n for (_, _, end), n in counts.items() if end in ("silent difference", "refused without a name"))
    print(f"{bad} of {sum(counts.values())} trials ended in a silent difference or an unnamed refusal")
    if options.out:
        vb.Run(options.out).append(rows(model, counts, options.trials))
    return int(bad > 0)


def rows(model: torch.nn.Module, counts: Counter, trials: int) -> list[vb.Row]:
    """One row for each kind of work, harm and outcome, and one of the differences that nothing said."""
    facts = vb.measurement.model_row_fields(model.recipe, images()) | {
        "method": "baseline",
        "source": "measured: disturbed and compared bit by bit",
    }
    found = [
        vb.Row(
            **facts,
            metric="trials",
            unit="trials",
            value=float(n),
            context={"work": kind, "harm": harm, "outcome": end},
        )
        for (kind, harm, end), n in sorted(counts.items())
    ]
    silent = sum(n for (_, _, end), n in counts.items() if end == "silent difference")
    context = {"trials_of_each": trials, "trials": sum(counts.values())}
    return [*found, vb.Row(**facts, metric="silent_differences", unit="trials", value=float(silent), context=context)]


if __name__ == "__main__":
    sys.exit(main())
