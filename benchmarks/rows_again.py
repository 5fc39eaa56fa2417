"""Rebuild the models of a results folder from the configs in its rows, and measure accuracy, size and errors again.

After a fault is mended, older rows stay wrong until they are measured again; this does it for one folder at a time, and
resumes after a stop. Times are kept: they belong to a machine, and most faults do not change them.

    python benchmarks/rows_again.py results/reference/digits-quick --dataset digits --out results/runs/again
    python benchmarks/rows_again.py results/reference/digits-quick --with results/runs/again     # old row, new row
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import vitbench as vb

MEASURES = ("accuracy", "size", "weights", "outputs")
METRICS = ("top1", "top5", "cross_entropy", "weight_error", "output_error")


def steps_of(row: vb.Row) -> dict[str, dict]:
    """The methods of a row's model, with their settings."""
    return {step["method"]: step["config"] for step in row.config.get("methods", ())}


def identity(row: vb.Row) -> str:
    """What a row shares with its replacement: all but the hashes of the models' files, with later settings at their defaults."""
    steps = [
        {**step, "config": vb.make_config(step["method"], step["config"]).to_dict()}
        for step in row.config.get("methods", ())
    ]
    origin = dict(row.config.get("origin", {}))
    if "train" in origin:
        origin["train"] = vb.TrainConfig(**origin["train"]).to_dict()
    config = {"origin": origin, "methods": steps}
    context = {key: value for key, value in row.context.items() if key not in ("artifact", "versus")}
    return json.dumps([row.model, config, row.seed, row.metric, context], sort_keys=True)


def make(options: argparse.Namespace, rows: list[vb.Row], data: vb.ImageData) -> int:
    """Rebuild and measure the selected models; a failure is printed, and the others go on."""
    run, failed = vb.Run(options.out), 0
    models = {}
    for row in rows:
        selected = not options.only or set(options.only) & {*(steps_of(row) or {"baseline": {}})}
        if row.status == "ok" and row.metric == "top1" and selected and row.data_fingerprint == data.fingerprint:
            models.setdefault(json.dumps([row.model, row.config], sort_keys=True), row)
    print(f"{len(models)} models of {options.folder} on {data.name}", flush=True)
    for number, row in enumerate(models.values(), 1):
        label = ", ".join(steps_of(row)) or "baseline"
        try:
            start = {"checkpoint": options.checkpoint, "img_size": options.img_size}
            base = vb.run.remake(row.model, {**row.config, "methods": []}, data, **start)
            cached = vb.run.remake(row.model, row.config, data, **start)
            what = [name for name in MEASURES if name in options.what]
            vb.measure(cached.path, data, run, versus=base.path if cached.path != base.path else "", what=what)
        except Exception as error:  # noqa: BLE001  (one model of many)
            failed += 1
            print(f"[{number}/{len(models)}] {label} failed: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"[{number}/{len(models)}] {label}", flush=True)
    return 1 if failed else 0


def merge(folder: Path, again: Path) -> int:
    """Replace the old rows by the new ones, and print the change of each accuracy and error.

    A new row keeps the old one's config: later settings at their defaults would separate it from the rows of its times.
    """
    new = {identity(row): row for row in vb.rows.read_rows(again) if row.status == "ok"}
    lines, replaced = [], 0
    with tempfile.TemporaryDirectory() as temporary_folder:
        for line in (folder / "records.jsonl").read_bytes().splitlines(keepends=True):
            old = vb.Row.model_validate_json(vb.rows.split_checksum(line)[0])
            replacement = new.pop(identity(old), None)
            if replacement is not None and old.status == "ok":
                replacement = replacement.replace(config=old.config)
                file = Path(temporary_folder, f"{replaced}.jsonl")
                vb.rows.append_rows(file, [replacement.replace(key=replacement.compute_key())])
                line, replaced = file.read_bytes(), replaced + 1
                if old.metric in METRICS:
                    print(
                        f"{old.metric:13} {old.value:.5f} -> {replacement.value:.5f}  {', '.join(steps_of(old)) or 'baseline'}"
                    )
            lines.append(line)
    vb.base.write_bytes(folder / "records.jsonl", b"".join(lines))
    (folder / "environments").mkdir(exist_ok=True)
    for file in (again / "environments").iterdir():
        vb.base.write_bytes(folder / "environments" / file.name, file.read_bytes())
    print(f"{replaced} rows replaced")
    return 0


def main() -> int:
    """Measure rows of a folder again, or, with `--with`, replace the old ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the results folder whose rows are recomputed")
    vb.cli.add_images(parser, "the images of the rows")
    parser.add_argument("--out", type=Path, help="where the new rows go")
    parser.add_argument("--with", dest="again", type=Path, help="replace the old rows by the new ones in this folder")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="models that use one of these methods")
    parser.add_argument("--what", nargs="+", default=MEASURES, choices=MEASURES)
    parser.add_argument("--checkpoint", default="", help="the weights that the rows' baselines start from")
    parser.add_argument("--img-size", type=int)
    options = parser.parse_args()
    if options.again:
        return merge(options.folder, options.again)
    return make(options, vb.rows.read_rows(options.folder), vb.cli.load_option_data(options))


if __name__ == "__main__":
    sys.exit(main())
