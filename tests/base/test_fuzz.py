"""300 mutated files of six kinds, seeded: each is read or refused in one line, in time, and nothing beside the results changes."""

import hashlib
import json
import random
import re
import time
import warnings

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ROOT
from vitbench.base.errors import InputError
from vitbench.edge.bundle import SCHEMA_VERSION, Answers, Entry, Manifest, Result, import_answers
from vitbench.figures.report import table_text
from vitbench.model import artifact, vit
from vitbench.rows.records import append_rows, read_rows
from vitbench.rows.row_table import load_records
from vitbench.rows.runs import Run
from vitbench.run.lessons import find_lessons, read_profile
from vitbench.run.suite import preflight
from vitbench.run.sweep.grid import cells, parse_sweep, read_sweep_file

pytestmark = pytest.mark.slow

TIMES = 50  # of each kind
SECONDS = 10
ODD = [
    *(
        "null",
        "true",
        "-1",
        "0",
        "1e999",
        "NaN",
        ".nan",
        "9" * 400,
        "9" * 5000,
        "1.5",
        '""',
        '"x"',
        "[]",
        "{}",
        "[[[[]]]]",
    ),
    *(
        '{"a": 1}',
        "{1: 2}",
        "!!binary aGk=",
        "!!set {a}",
        "2024-01-01",
        "!!python/object/apply:os.getcwd []",
        "*a",
        "&a [*a]",
    ),
    *(
        '"../../../etc/passwd"',
        '"/etc/passwd"',
        '"\\ud800"',
        '"\\u0000"',
        "$(touch harmed)",
        '"' + "x" * 5000 + '"',
        "[" * 2000,
    ),
]


def mutated(rng: random.Random, content: bytes) -> bytes:
    """The content with one to three changes: bits, bytes, pieces, or values that do not belong there."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, length = rng.randrange(len(content) + 1), rng.randrange(1, 40)
        kind = rng.choice(["bit", "bytes", "cut", "drop", "twice", "value", "value", "value", "number"])
        if kind == "bit" and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif kind == "bytes":
            content = content[:at] + rng.randbytes(length) + content[at:]
        elif kind == "cut":
            content = content[:at]
        elif kind == "drop":
            content = content[:at] + content[at + length :]
        elif kind == "twice":
            content = content[: at + length] + content[at:]
        elif places := list(
            re.finditer(rb"(?<=[:,\[] )?[\w.\"-]+(?=[,}\]\n])" if kind == "value" else rb"\d+", content)
        ):
            place = rng.choice(places)
            content = content[: place.start()] + rng.choice(ODD).encode() + content[place.end() :]
    return content


def without_checks(content: bytes) -> bytes:
    """As a forger writes it, so that what is below the checksum is reached."""
    return re.sub(rb',?\s*"check":\s*"[0-9a-f]*"', b"", content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole file of each kind, in the folder that its reader wants."""
    folder = tmp_path_factory.mktemp("whole")
    model = vit.create_model("vit_micro_patch2_8")
    artifact.save(model, folder / "recipe")
    for kind in ("profile", "sweep", "records", "weights", "state", "bundle"):
        (folder / kind).mkdir()
    (folder / "profile" / "a.yaml").write_bytes((ROOT / "notebooks" / "profiles" / "digits.yaml").read_bytes())
    (folder / "sweep" / "a.yaml").write_bytes((ROOT / "benchmarks" / "sweep_digits.yaml").read_bytes())
    append_rows(folder / "records" / "records.jsonl", read_rows(ROOT / "results" / "reference" / "digits-quick")[:12])
    save_file(model.state_dict(), folder / "weights" / "a.safetensors")
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "state" / "a.pth")
    about = {"model": "m", "dataset": "d", "data_fingerprint": "f", "method": "baseline", "config": {}, "seed": 0}
    entry = Entry(
        name="00", backend="onnxruntime", batch=1, about=about, artifact="ab", file="a.onnx", exported_bytes=7
    )
    ones = {key: [1.0, 1.1, 1.2] for key in ("imports", "peak", "load", "cold_start")} | {"times": [1.0] * 40}
    answers = Answers(
        schema_version=SCHEMA_VERSION, bundle="b", device={"cpu": "c"}, threads=1, results=[Result(name="00", **ones)]
    )
    manifest = Manifest(schema_version=SCHEMA_VERSION, id="b", models=[entry], files={})
    (folder / "bundle" / "bundle.json").write_text(json.dumps(manifest.to_dict(), indent=1))
    (folder / "bundle" / "answers.json").write_text(json.dumps(answers.to_dict(), indent=1))
    return folder


LESSONS = find_lessons()


def read_profile_and_check(folder, out):
    values = read_profile(str(folder / "a.yaml"), [], LESSONS)
    if values.get("dataset", "digits") == "digits":
        preflight(values)


def read_records(folder, out):
    read_rows(folder)
    table_text(load_records(folder))


READERS = {  # kind -> the files that are mutated, and what reads their folder and writes below `out`
    "profile": (["a.yaml"], read_profile_and_check),
    "sweep": (["a.yaml"], lambda folder, out: cells(parse_sweep(read_sweep_file(folder / "a.yaml")))),
    "recipe": (["recipe.json"], lambda folder, out: artifact.load(folder)),
    "records": (["records.jsonl"], read_records),
    "weights": (
        ["a.safetensors"],
        lambda folder, out: vit.create_model("vit_micro_patch2_8", checkpoint=folder / "a.safetensors"),
    ),
    "state": (["a.pth"], lambda folder, out: vit.create_model("vit_micro_patch2_8", checkpoint=folder / "a.pth")),
    "bundle": (["bundle.json", "answers.json"], lambda folder, out: import_answers(folder, Run(out).folder)),
}


def tree(folder):
    """Every file below a folder with the hash of its content."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("kind", READERS)
def test_mutated_files_are_read_or_refused_in_one_line(kind, whole, tmp_path, monkeypatch):
    names, read = READERS[kind]
    given, out, beside = tmp_path / "given", tmp_path / "out", tmp_path / "beside"
    given.mkdir()
    beside.mkdir()
    (beside / "thesis.txt").write_text("mine")
    monkeypatch.chdir(beside)
    read(whole / kind, tmp_path / "whole")
    wrong, refused = [], 0
    for seed in range(TIMES // 2 if kind in ("weights", "state") else TIMES):  # the two are checkpoints
        rng = random.Random(f"{kind} {seed}")
        for file in (whole / kind).iterdir():
            if file.is_file():
                (given / file.name).write_bytes(file.read_bytes())
        target = given / rng.choice(names)
        content = target.read_bytes()
        target.write_bytes(mutated(rng, without_checks(content) if seed % 4 else content))
        before, start = tree(given) | tree(beside), time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(given, out / str(seed))
        except InputError as error:
            refused += 1
            if "\n" in str(error) or not str(error) or len(str(error)) > 2000:
                wrong.append(f"{seed}: not one short line: {str(error)[:300]!r}")
        except Exception as error:
            wrong.append(f"{seed}: {type(error).__name__}: {str(error)[:300]}")
        if time.monotonic() - start > SECONDS:
            wrong.append(f"{seed}: took {time.monotonic() - start:.0f} s")
        if tree(given) | tree(beside) != before:
            wrong.append(f"{seed}: something beside the results changed")
    assert not wrong, "\n".join(wrong)
    assert refused > TIMES / 8, "hardly any mutation was refused: the mutations do not reach what is checked"
