"""Folders and tables of images: what is taken for splits, classes and labels, what is left out, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.data.test_decoding import encoded, photo
from vitbench.base.errors import InputError
from vitbench.data.splits import load_data


def fill(root, counts, size=(9, 7)):
    """Images in folders: {"train/cat": 3}."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            photo(*size, seed=hash_of(folder) + i).save(root / folder / f"{i}.png")
    return root


def hash_of(text):
    return sum(map(ord, text)) * 100


def clear(error):
    assert len(str(error.value).splitlines()) == 1, error.value


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Training", "Testing"), ("TRAIN", "eval"), ("train", "Valid"), ("training", "validation")],
)
def test_folders_with_a_splits_name_in_any_case_are_splits(tmp_path, train, test, capsys):
    fill(tmp_path, {f"{train}/a": 6, f"{train}/b": 6, f"{test}/a": 2, f"{test}/b": 3})
    data = load_data(tmp_path, val=0)
    assert (len(data.train), len(data.test), data.classes) == (12, 5, ("a", "b"))
    assert {data.test.source.location(0), len(data.test.source)} == {"image 0", 5}
    assert f"{train} is train, {test} is {'val' if 'alid' in test else 'test'}" in data.summary
    assert capsys.readouterr().out.strip() == data.summary
    load_data(tmp_path, val=0)
    assert capsys.readouterr().out == ""  # said once


@pytest.mark.parametrize(
    ("counts", "classes"),
    [
        ({"control": 9, "test": 9}, ("control", "test")),
        ({"train": 9, "test": 9}, ("test", "train")),  # without class folders inside
        ({"train/x": 9, "test/x": 9, "horse/x": 9}, ("horse", "test", "train")),
        ({"cat/persian/old": 5, "cat": 4, "dog": 9}, ("cat", "dog")),
        ({"testing-1": 9, "train_set": 9}, ("testing-1", "train_set")),
    ],
)
def test_all_other_folders_are_classes(tmp_path, counts, classes):
    data = load_data(fill(tmp_path, counts), val=0)
    assert data.classes == classes
    assert len(data.train) + len(data.test) == sum(counts.values())


def test_names_of_files_choose_nothing(tmp_path):
    fill(tmp_path, {"a": 4, "b": 4})
    for label in "ab":
        for i, path in enumerate(sorted((tmp_path / label).iterdir())):
            path.rename(path.with_name(f"{'eval' if i % 2 else 'train'}-{i}.png"))
    data = load_data(tmp_path, val=0, test=0.5)
    assert (len(data.train), len(data.test)) == (4, 4)
    assert "8 images found, 8 used, 0 skipped" in data.summary


def test_what_is_skipped_is_counted(tmp_path):
    fill(tmp_path, {"train/a": 4, "train/b": 4, "test/a": 2, "test/c": 2, "train": 1, "train/empty": 0, "docs": 0})
    fill(tmp_path, {"train/a/.ipynb_checkpoints": 3})
    photo().save(tmp_path / "logo.png")
    (tmp_path / "train" / "a" / "phone.HEIC").write_bytes(b"0")
    data = load_data(tmp_path, val=0)
    assert data.classes == ("a", "b", "c")
    assert "train: 13 images found, 8 used, 5 skipped (3 hidden, 2 in no class folder)" in data.summary
    assert "test: 4 images found, 4 used, 0 skipped" in data.summary
    assert "1 files are no images by their endings (.heic)" in data.summary
    assert "without a train image: c" in data.summary


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train/a": 3, "train/b": 3, "test": 3}, "'test' only images"),
        ({"train/a": 3, "Training/a": 3, "test/a": 3}, "are both the train split"),
        ({"data/a": 3, "data/b": 3}, "give '.*/data'"),
        ({"": 3}, "holds no images in sub-folders"),
    ],
)
def test_folders_that_could_mean_two_things_are_refused(tmp_path, counts, message):
    with pytest.raises(InputError, match=message) as error:
        load_data(fill(tmp_path, counts))
    clear(error)


def test_links_are_followed_and_a_loop_ends(tmp_path):
    fill(tmp_path / "all", {"a": 3, "b": 3, "c": 3})
    (tmp_path / "some").mkdir()
    for label in "ab":
        (tmp_path / "some" / label).symlink_to(tmp_path / "all" / label)
    (tmp_path / "all" / "a" / "again").symlink_to(tmp_path / "all" / "a")
    data = load_data(tmp_path / "some", test=1.0)
    assert (data.classes, len(data.test)) == (("a", "b"), 6)


def test_images_listed_in_a_table(tmp_path):
    fill(tmp_path, {"train": 6, "test": 4})
    names = [f"train/{i}.png" for i in range(6)] + [f"test/{i}.png" for i in range(3)]
    pd.DataFrame({"file_name": names, "label": ["x", "y"] * 4 + ["x"]}).to_csv(tmp_path / "metadata.csv", index=False)
    data = load_data(tmp_path, val=0)
    assert (data.classes, len(data.train), len(data.test)) == (("x", "y"), 6, 3)
    assert "1 skipped (1 not in metadata.csv)" in data.summary
    for name, row in (("../outside.png", 0), ("/etc/passwd", 0), ("train/9.png", 0)):
        pd.DataFrame({"file_name": [name], "label": ["x"]}).to_csv(tmp_path / "metadata.csv", index=False)
        with pytest.raises(InputError, match=rf"metadata\.csv, row {row}") as error:
            load_data(tmp_path)
        clear(error)


def write(path, images, labels, names=None, column="image", image_type=None):
    """A parquet file as `datasets` (with `names`) or as pandas (without) writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if names is None:
        pd.DataFrame({column: images, "label": labels}).to_parquet(path)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({column: images, "label": labels})
    label = {"_type": "ClassLabel", "names": list(names)}
    info = {"info": {"features": {column: {"_type": "Image"}, "label": label}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)


PNGS = [encoded(photo(9, 7, seed)) for seed in range(12)]
CELLS = [{"bytes": png, "path": None} for png in PNGS]


@pytest.mark.parametrize("images", [PNGS, CELLS, [{"path": f"{i}.png", "bytes": png} for i, png in enumerate(PNGS)]])
@pytest.mark.parametrize("labels", [[0, 1] * 6, ["x", "y"] * 6, pd.Categorical(["x", "y"] * 6), [True, False] * 6])
def test_parquet_of_pandas(tmp_path, images, labels):
    write(tmp_path / "pets.parquet", images, labels, column="picture")
    data = load_data(tmp_path, test=1.0)
    classes = sorted({str(label) for label in labels})
    assert list(data.classes) == classes
    for i in range(12):
        image, label = data.test[i]
        assert (np.asarray(image) == np.asarray(photo(9, 7, i))).all()
        assert data.classes[label] == str(labels[i])


def test_several_parquet_files_and_what_their_names_say(tmp_path):
    folder = tmp_path / "a [b] * set"
    write(folder / "data" / "train-00000-of-00002.parquet", CELLS[:4], [0, 1, 0, 1])
    write(folder / "data" / "train-00001-of-00002.parquet", CELLS[4:8], [0, 1, 0, 1])
    write(folder / "Testing" / "part.parquet", CELLS[8:], [0, 1, 0, 1])
    write(folder / "scores.parquet", CELLS[8:], [0, 1, 0, 1])
    data = load_data(folder, val=0)
    assert (len(data.train), len(data.test)) == (8, 4)
    assert "not read, as their names say no split: scores.parquet" in data.summary
    write(folder / "train-or-test.parquet", CELLS[8:], [0, 1, 0, 1])
    with pytest.raises(InputError, match="has words of two splits, test and train"):
        load_data(folder)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: big\n  data_files: x\n- config_name: small\n---\n")
    with pytest.raises(InputError, match="several sets, big, small"):
        load_data(folder)


def test_class_names_in_another_order_are_matched_by_name(tmp_path):
    write(tmp_path / "train-0.parquet", CELLS[:4], [0, 0, 1, 1], ("cat", "dog"))
    write(tmp_path / "train-1.parquet", CELLS[4:8], [0, 0, 1, 1], ("dog", "cat"))
    write(tmp_path / "Test.parquet", CELLS[8:], [0, 1, 2, 0], ("dog", "owl", "cat"))
    data = load_data(tmp_path, val=0)
    assert data.classes == ("cat", "dog", "owl")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert data.test.labels.tolist() == [1, 2, 0, 1]
    assert "without a train image: owl" in data.summary
    write(tmp_path / "train-2.parquet", CELLS[:2], [0, 1])
    with pytest.raises(InputError, match=r"train-2\.parquet has no class names") as error:
        load_data(tmp_path)
    clear(error)


def test_saved_tables_with_class_names_in_another_order(tmp_path):
    import datasets

    def part(order):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=order)})
        return datasets.Dataset.from_dict({"image": CELLS[:4], "label": [0, 0, 1, 1]}, features=features)

    datasets.DatasetDict({"train": part(["cat", "dog"]), "test": part(["dog", "cat"])}).save_to_disk(tmp_path / "set")
    data = load_data(tmp_path / "set", val=0)
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 0, 1, 1], [1, 1, 0, 0])


@pytest.mark.parametrize("bad", [-1, None, float("nan"), 2, 1.0, [0], "z", b"x", {"a": 1}], ids=repr)
@pytest.mark.parametrize("named", [True, False])
def test_a_label_that_is_no_class_is_named_with_its_file_and_row(tmp_path, bad, named):
    from vitbench.data.labels import Column, encode

    if not named and bad in (2, "z"):
        bad = -2 if bad == 2 else " "
    column = Column("train.parquet", [0, 1, 0, bad, 1], ("x", "y") if named else None)
    with pytest.raises(InputError, match=r"train\.parquet, row 3 .*allowed: whole numbers from 0") as error:
        encode({"train": [column]})
    clear(error)


@pytest.mark.parametrize(
    ("labels", "names", "shown"),
    [
        ([0, 1, -1, 1], ("x", "y"), "row 2.*label -1"),
        ([0, 1, None, 1], ("x", "y"), "row 2.*missing"),
        ([0, 1, None, 1], None, "row 0.*label 0.0"),  # pandas makes floats of whole numbers with gaps
        ([0, 1, 2, 1], ("x", "y"), "row 2.*label 2"),
        ([0.5, 1.0, 0.5, 1.0], None, "row 0.*label 0.5"),
        ([[0], [1], [0], [1]], None, r"row 0.*label \[0\]"),
        (["x", "y", "", "y"], None, "row 2.*label ''"),
    ],
)
def test_labels_of_a_file_that_are_no_classes(tmp_path, labels, names, shown):
    write(tmp_path / "train.parquet", CELLS[:4], labels, names)
    with pytest.raises(InputError, match=rf"train\.parquet, {shown}.*allowed: ") as error:
        load_data(tmp_path)
    clear(error)


def test_an_empty_or_broken_cell_is_named(tmp_path):
    images = [{"bytes": encoded(photo(90, 70, seed)), "path": None} for seed in range(6)]
    images[4] = {"bytes": images[4]["bytes"][:500], "path": None}
    images[5] = {"bytes": None, "path": None}
    write(tmp_path / "train-0.parquet", images[:3], [0, 1, 0])
    write(tmp_path / "train-1.parquet", images[3:], [1, 0, 1])
    with pytest.raises(InputError, match=r"train-1\.parquet, row 2 .*the cell is empty"):
        load_data(tmp_path)
    data = load_data(tmp_path, skip_broken=True, test=1.0)
    assert len(data.test) == 4
    write(tmp_path / "train-1.parquet", images[3:5], [1, 0])
    with pytest.raises(InputError, match=r"train-1\.parquet, row 1 .*cannot be read"):
        load_data(tmp_path, test=1.0).test[4]


def test_damaged_and_foreign_parquet_files_are_named(tmp_path):
    write(tmp_path / "train.parquet", CELLS, [0, 1] * 6)
    (tmp_path / "test.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"test\.parquet cannot be read as parquet") as error:
        load_data(tmp_path)
    clear(error)
    pd.DataFrame({"x": [1.0], "label": [1]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(InputError, match=r"test\.parquet.*image"):
        load_data(tmp_path)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(InputError, match="no image column; its columns are x, label; allowed: encoded images"):
        load_data(tmp_path)


def test_a_long_thin_image_is_refused_by_name(tmp_path):
    from vitbench.data.batches import eval_batches
    from vitbench.model.recipe import Preprocess

    fill(tmp_path, {"a": 2, "b": 2}, size=(90, 70))
    Image.new("RGB", (2, 500)).save(tmp_path / "b" / "1.png")
    data = load_data(tmp_path, test=1.0)
    with pytest.raises(InputError, match=r"b/1\.png: the image is 2 x 500 pixels") as error:
        list(eval_batches(data.test, Preprocess(size=32, mean=(0.5,) * 3, std=(0.5,) * 3), batch_size=2))
    clear(error)
