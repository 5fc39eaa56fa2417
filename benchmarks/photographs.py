"""Make what the lessons start from: a small set of photographs, and a small model that was fine-tuned on the whole set.

    python benchmarks/photographs.py images --dataset FOLDER               # data/photographs
    python benchmarks/photographs.py model --dataset FOLDER --checkpoint FILE    # data/deit_tiny_patch16_96

FOLDER is CIFAR-10 with `train` and `test` images, whose JPEG files are copied byte for byte. The small test images are
of the test split. The small val images are of the 2,000 that the model never saw in training.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import vitbench as vb

DATA = Path(__file__).resolve().parents[1] / "data"
COUNTS = {"train": 5_000, "val": 1_000, "test": 3_000}
TRAIN = {"epochs": 8, "batch_size": 128, "lr": 3e-4, "warmup_epochs": 0.5, "augment": "shift-flip", "mixup": 0.0}
MODEL = "deit_tiny_patch16_96"


def open_whole(folder: str) -> vb.ImageData:
    """The whole set: 48,000 train images, 2,000 val images cut from train, and the 10,000 test images."""
    return vb.load_data(folder, name="CIFAR-10 (JPEG)", val=2_000)


def encoded_images(folder: Path, split: str) -> list[bytes]:
    """The JPEG files of a split, in the order of its parquet files."""
    tables = [pq.read_table(file) for file in sorted(folder.glob(f"{split}-*.parquet"))]
    return [image["bytes"] for table in tables for image in table.column("img").to_pylist()]


def write_images(options: argparse.Namespace) -> None:
    """Write as many images of each class to each split, spread evenly over the whole split."""
    data, folder = open_whole(options.dataset), options.out or DATA / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: encoded_images(Path(options.dataset), name) for name in ("train", "test")}
    features = {"label": {"names": list(data.classes), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, count in COUNTS.items():
        whole = getattr(data, split)
        per_class = count // len(data.classes)
        by_class = [np.flatnonzero(whole.labels == label) for label in range(len(data.classes))]
        spread = [indices[np.linspace(0, len(indices), per_class, endpoint=False).astype(int)] for indices in by_class]
        selected = np.random.default_rng(0).permutation(np.concatenate(spread))
        source = files["test" if split == "test" else "train"]
        rows = [{"bytes": source[whole.indices[index]], "path": None} for index in selected]
        columns = {"image": pa.array(rows, image), "label": pa.array(whole.labels[selected])}
        table = pa.table(columns).replace_schema_metadata(metadata)
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd", compression_level=19)
        print(f"{split}: {count} images, {(folder / f'{split}.parquet').stat().st_size:,} bytes")


def write_model(options: argparse.Namespace) -> None:
    """Fine-tune at 96 pixels, keep the weights in 8 bits, and measure that file on all test images."""
    data, out = open_whole(options.dataset), options.out or DATA / MODEL
    train = vb.TrainConfig(**TRAIN | {"epochs": options.epochs}, precision="auto")
    base = vb.baseline("deit_tiny_patch16_224", data, train, checkpoint=options.checkpoint, img_size=96)
    packed = vb.compress(base.model, vb.make_config("weight_only", {"bits": 8}), data).model
    path, run = vb.save(packed, out), vb.Run(options.record)
    vb.measure(base.path, data, run, what=("accuracy", "size"))
    vb.measure(path, data, run, versus=base.path, what=("accuracy", "size"))
    print(vb.rows.comparison(run.rows()).round(2).to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "model"])
    parser.add_argument("--dataset", required=True, help="CIFAR-10: a folder of train-*.parquet and test-*.parquet")
    parser.add_argument("--checkpoint", help="weights of DeiT-Tiny to start from")
    parser.add_argument("--epochs", type=int, default=TRAIN["epochs"])
    parser.add_argument("--record", default="results/runs/photographs", help="folder of the model's rows")
    parser.add_argument("--out", type=Path, help="folder to write (default: in data/)")
    options = parser.parse_args()
    {"images": write_images, "model": write_model}[options.what](options)
