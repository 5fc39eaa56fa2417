"""Golden files: what users of vitbench rely on and what has to be the same on every CPU, written down once.

    python -m tests.golden.make            writes them all anew
    python -m tests.golden.make recipes    writes one of them

`tests/project/test_golden.py` compares. Of what a machine, a commit or the day decides nothing is written: no time, no version,
no hash of weights. What lies in `old/` was written by earlier versions and has to load for ever, so it is never written
again; a method that has no model there yet gets one.
"""

import argparse
import ast
import importlib
import json
import sys
from pathlib import Path

import nbformat
import torch

from tests.conftest import ROOT
from vitbench.base import configs
from vitbench.base.files import write_text
from vitbench.data.splits import load_data
from vitbench.methods.registry import METHODS, compress, make_config
from vitbench.model import artifact, vit
from vitbench.rows import records
from vitbench.rows.records import Row
from vitbench.rows.runs import commit

FOLDER = Path(__file__).parent
OLD = FOLDER / "old"
NOTEBOOKS = ROOT / "notebooks"

# settings beside `quick` with which a recipe's structure is no close call, which another CPU could decide otherwise
SETTLED = {
    "diffq": {"train": {"epochs": 1, "batch_size": 32, "lr": 1e-9, "warmup_epochs": 0}},
    "distillation": {"depth": 1, "token": True},
    "mixed_rank": {"allocation": "uniform"},
    "multidimensional": {"tolerance": 0.2, "search": {"evaluations": 1, "first": 2, "pool": 10}},
    "nystroem": {"landmarks": 4},
    "token_merging": {"r": 2},
    "uct": {"rank": 8},
}
CALIBRATED = {"input_step", "input_zero"}  # fields of layers
LABELLED = {"model": "vit_micro_patch2_8", "dataset": "digits", "data_fingerprint": "0123456789abcdef"}
PRUNED = {"method": "pruning", "config": {"neurons": 0.4, "heads": 0.25, "criterion": {"name": "hsic", "blend": 1.0}}}
FACTS = {  # rows, of all that a key is made of
    "a baseline": {"method": "baseline", "metric": "top1"},
    "another seed": {"method": "baseline", "metric": "top1", "seed": 3},
    "where the weights are from": {"method": "baseline", "metric": "macs", "config": {"origin": {"start": "random"}}},
    "a method": {
        "method": "pruning",
        "metric": "bytes",
        "config": {"origin": {}, "methods": [PRUNED]},
        "context": {"artifact": "b2e17235172c"},
    },
    "a combination": {
        "method": "pruning+dynamic_int8",
        "metric": "latency_p50",
        "config": {
            "origin": {"seed": 0},
            "methods": [PRUNED, {"method": "dynamic_int8", "config": {"layers": ["qkv"]}}],
        },
        "context": {
            "backend": "eager",
            "batch": 8,
            "threads": 2,
            "device": "cpu: some",
            "versus": "baseline:1c8f45128",
        },
    },
    "other letters and numbers": {
        "method": "baseline",
        "metric": "latency_p50",
        "config": {"ä": [1, 2.5, 1e-7, True, None, "漢"]},
    },
}


def images() -> torch.Tensor:
    """Four images that every machine draws alike."""
    return torch.sin(torch.arange(4 * 3 * 8 * 8, dtype=torch.float64)).reshape(4, 3, 8, 8).float()


def answers(model: torch.nn.Module) -> list[list[float]]:
    """What a model answers to `images`, to four decimals."""
    with torch.inference_mode():
        return [[round(value, 4) for value in row] for row in model(images()).double().tolist()]


def little_data():
    """As many digits as a method needs to run at all."""
    return load_data("digits", train=64, test=32, val=32, calibration=32)


def quick(name: str):
    """A method's defaults without training and with the least search."""

    def shortened(values: dict) -> dict:
        values = {key: shortened(value) if isinstance(value, dict) else value for key, value in values.items()}
        return values | {key: 0 for key in ("epochs", "warm_steps") if key in values}

    values = shortened(make_config(name).to_dict())
    if "criterion" in values:
        values["criterion"] = {"name": "magnitude"}
    return make_config(name, values | SETTLED.get(name, {}))


def compressed(name: str, data) -> torch.nn.Module:
    """The smallest model, with weights that are drawn alike everywhere, compressed by the method's quick settings."""
    model = vit.create_model("vit_micro_patch2_8", num_classes=10, seed=0, depth=2)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return compress(model, quick(name), data).model


def recipes() -> dict:
    """The recipe of every method, as it stands in recipe.json; the numbers that come of images are left out."""
    data, threads = little_data(), torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for a second one
    found = {name: artifact.recipe_of(compressed(name, data)).to_dict() for name in METHODS}
    torch.set_num_threads(threads)
    for recipe in found.values():
        for spec in recipe["layers"].values():
            spec.update((key, "calibrated") for key in CALIBRATED & spec.keys())
    return found


def rows() -> dict:
    """The schema of rows, what a key is made of, the groups of metrics, and the keys of `FACTS`."""
    fields = {
        name: {"type": _type(field.annotation), "default": "none" if field.is_required() else repr(field.default)}
        for name, field in Row.model_fields.items()
    }
    made = {name: Row(**LABELLED, **facts, value=1.0, source="measured").compute_key() for name, facts in FACTS.items()}
    return {
        "version": records.SCHEMA_VERSION,
        "fields": fields,
        "identity": list(records.KEY_FIELDS),
        "sources": list(records.SOURCES),
        "groups": [*records.GROUPS, *records.DEVICE_GROUPS],
        "keys": made,
    }


def _type(annotation) -> str:
    name = annotation.__name__ if annotation in (str, int, float, bool) else str(annotation)
    return name.replace("typing.", "")


def notebooks() -> dict:
    """Each notebook's parameters with their types, at the values of the quick run; and the other profiles."""
    profiles = {file.stem: configs.read_yaml(file, "profile") for file in sorted(NOTEBOOKS.glob("profiles/*.yaml"))}
    lessons = {}
    for file in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        lessons[file.stem] = {
            node.target.id: f"{ast.unparse(node.annotation)} = "
            f"{profiles['quick'].get(node.target.id, ast.literal_eval(node.value))!r}"
            for node in ast.parse(cell.source).body
        }
    return {"quick": lessons, "profiles": profiles}


def commands() -> dict:
    """What `--help` says of every command: its arguments, with their defaults, choices and explanations."""
    return {" ".join(("vitbench", *words)): _arguments(parser) for words, parser in parsers()}


def parsers() -> list[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Each command's words, none for `vitbench` alone, and its parser."""
    from vitbench.cli.program import _parser

    def inside(parser, words=()):
        yield words, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    yield from inside(child, (*words, name))

    return list(inside(_parser()))


def _arguments(parser: argparse.ArgumentParser) -> dict:
    """Not the text as it is printed, which each version of Python wraps and abbreviates in its own way."""
    said = {}
    for action in parser._actions:
        facts = {
            "value": action.metavar,
            "how many": action.nargs,
            "default": None if action.default == argparse.SUPPRESS else action.default,
            "choices": sorted(action.choices) if action.choices else None,
            "required": action.required or None,
            "help": action.help,
        }
        said[", ".join(action.option_strings) or action.metavar or action.dest] = {
            name: fact for name, fact in facts.items() if fact is not None
        }
    return said


def names() -> dict:
    """The public names of vitbench and of its rooms."""
    rooms = sorted(file.parent.name for file in (ROOT / "vitbench").glob("*/__init__.pyi"))
    fronts = ["vitbench", *(f"vitbench.{room}" for room in rooms)]
    return {front: sorted(dir(importlib.import_module(front))) for front in fronts}


def logits() -> dict:
    """What the models in `old/` answered when they were made, and with which commit that was."""
    known = configs.read_json(OLD / "logits.json", "golden file")
    missing = [name for name in METHODS if name not in known]
    for name in missing:
        path = artifact.save(compressed(name, little_data()), OLD / name)
        known[name] = {"made": commit(), "logits": answers(artifact.load(path))}
    return known


FILES = {
    "recipes": recipes,
    "rows": rows,
    "notebooks": notebooks,
    "commands": commands,
    "names": names,
    "old/logits": logits,
}


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def main(wanted: list[str]) -> None:
    """Write the files that are named, or all."""
    for name in wanted or FILES:
        write_text(path_of(name), json.dumps(FILES[name](), indent=1, ensure_ascii=False) + "\n")
        print(f"{path_of(name).relative_to(ROOT)}: {path_of(name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
