"""Image sets: splits, fingerprints, column finding, and what is refused."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vitbench.base.errors import InputError
from vitbench.data.splits import load_data


def members(data, split):
    return set(getattr(data, split).indices.tolist())


def test_digits_are_cut_into_stratified_parts_that_do_not_meet(digits):
    train, val, test = (members(digits, split) for split in ("train", "val", "test"))
    assert len(train) + len(val) + len(test) == 1797
    assert not train & val
    assert not train & test
    assert not val & test
    assert members(digits, "calibration") <= train
    assert len(digits.test) == 359
    shares = np.bincount(digits.test.labels) / len(digits.test)
    assert np.abs(shares - 0.1).max() < 0.01
    assert digits.origin["test"] == "cut from the only split"


def test_the_cut_is_fixed_and_the_fingerprint_says_when_it_is_not(digits):
    again, other, smaller = load_data("digits"), load_data("digits", seed=1), load_data("digits", train=500)
    assert again.fingerprint == digits.fingerprint
    assert (again.test.indices == digits.test.indices).all()
    assert len({digits.fingerprint, other.fingerprint, smaller.fingerprint}) == 3
    assert (smaller.test.indices == digits.test.indices).all()


def test_a_set_can_be_cut_again_in_other_parts(image_folder):
    data = load_data(image_folder(), name="pets", val=0.2, seed=3)
    assert data.reload().fingerprint == data.fingerprint
    few = data.reload(train=8)
    assert (few.name, len(few.train) + len(few.val), len(few.test)) == ("pets", 8, len(data.test))
    assert few.fingerprint != data.fingerprint
    assert few.identity() == {"fingerprint": few.fingerprint, "name": "pets", "val": 0.2, "train": 8, "seed": 3}


def test_fingerprint_follows_one_pixel(image_folder):
    folder = image_folder()
    before = load_data(folder).fingerprint
    path = folder / "cat" / "3.png"
    image = Image.open(path).copy()
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)
    assert load_data(folder).fingerprint != before


def test_small_images_are_held_in_memory_and_large_ones_are_not(image_folder):
    small = load_data(image_folder(name="small"))
    large = load_data(image_folder(name="large", size=(90, 70)))
    assert small.test.array.shape[1:] == (10, 12, 3)
    assert large.test.array is None
    assert large.test[0][0].size == (90, 70)


def test_grey_images_become_rgb(image_folder):
    data = load_data(image_folder(mode="L"))
    assert data.train[0][0].mode == "RGB"


def test_a_given_test_split_is_kept_and_val_is_cut_from_train(image_folder):
    data = load_data(image_folder(splits=("train", "test")), val=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (24, 6, 30)
    assert data.origin["test"] == "given"
    assert data.origin["val"] == "cut from train"


def test_a_lone_validation_split_serves_as_test(image_folder):
    data = load_data(image_folder(splits=("train", "validation")))
    assert len(data.test) == 30
    assert data.origin["test"] == "the set's validation split"


def test_a_given_test_split_can_be_made_smaller(image_folder):
    data = load_data(image_folder(splits=("train", "test")), test=12)
    assert len(data.test) == 12
    assert (np.bincount(data.test.labels) == 4).all()


def test_every_image_can_be_a_test_image(image_folder):
    data = load_data(image_folder(), test=1.0)
    assert len(data.test) == 30
    with pytest.raises(InputError, match="no train images"):
        data.require_split("train")


def test_parquet_with_the_finer_of_two_labels_and_withheld_test_labels(image_folder, tmp_path):
    import datasets

    folder = image_folder(splits=("train",), classes=("a", "b"), count=6)
    table = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    table = table.add_column("fine", list(range(4)) * 3).cast_column("fine", datasets.ClassLabel(num_classes=4))
    (tmp_path / "pq").mkdir()
    table.to_parquet(tmp_path / "pq" / "train-00000-of-00001.parquet")
    table.select(range(4)).map(lambda row: {"fine": -1}).to_parquet(tmp_path / "pq" / "test-00000-of-00001.parquet")
    data = load_data(tmp_path / "pq", test=4)
    assert len(data.classes) == 4
    assert data.origin["test"] == "cut from the only split"
    assert len(load_data(tmp_path / "pq", label="label", test=4).classes) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test": 1.5}, "fraction from 0.0 to 1.0"),
        ({"val": -1}, "whole number"),
        ({"train": "many"}, "train = 'many'"),
        ({"test": 0}, "leaves no test image"),
    ],
)
def test_wrong_amounts(arguments, message):
    with pytest.raises(InputError, match=message):
        load_data("digits", **arguments)


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"train": 64, "val": 64}, "val = 64: there are 64 training images .*at most 63"),
        ({"train": 64, "val": 100}, "val = 100: there are 64 training images"),
        ({"test": 2000}, "test = 2000: there are 1797 images"),
        ({"train": 1439}, "train = 1439: there are 1438 images that the test split leaves"),
        ({"val": 1.0}, r"val = 1\.0: there are 1438 training images"),
        ({"train": 64, "calibration": 100}, "calibration = 100: there are 58 training images"),
        ({"test": 1.0, "val": 10}, "val = 10: there are 0 training images"),
        ({"train": 0.0001}, r"train = 0\.0001 of so few images leaves no training image"),
        ({"seed": -1}, "seed = -1"),
        ({"skip_broken": "yes"}, "skip_broken = 'yes'"),
        ({"test": float("nan")}, "test = nan"),
    ],
)
def test_more_images_than_there_are_is_refused_with_the_numbers(amounts, message):
    with pytest.raises(InputError, match=message) as error:
        load_data("digits", **amounts)
    assert len(str(error.value).splitlines()) == 1


def test_a_given_validation_split_can_be_made_smaller(image_folder):
    folder = image_folder(splits=("train", "val", "test"))
    assert len(load_data(folder).val) == 30
    data = load_data(folder, val=9)
    assert (len(data.val), len(data.train)) == (9, 30)
    with pytest.raises(InputError, match="val = 31: there are 30 validation images"):
        load_data(folder, val=31)


def test_unknown_names_and_folders(tmp_path, image_folder):
    with pytest.raises(InputError, match="does not exist"):
        load_data(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="holds no images"):
        load_data(tmp_path / "empty")
    with pytest.raises(InputError, match="1 class"):
        load_data(image_folder(classes=("only",)))
    with pytest.raises(InputError, match="unknown label column 'colour'.*allowed"):
        load_data(image_folder(name="labels"), label="colour")


def test_a_hub_name_without_a_network(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(InputError, match="unknown dataset 'someone/pictures'.*check the name and the network"):
        load_data("someone/pictures")


def test_a_broken_image_is_named(image_folder):
    folder = image_folder(size=(90, 70))
    (folder / "owl" / "9.png").write_bytes(b"not a picture")
    data = load_data(folder, test=1.0)
    with pytest.raises(InputError, match="owl/9.png: the image cannot be read"):
        list(map(data.test.__getitem__, range(len(data.test))))


def test_images_without_labels(tmp_path):
    import datasets

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    table = datasets.Dataset.from_pandas(pd.DataFrame({"picture": [str(tmp_path / "a.png")] * 4, "size": [1, 2, 3, 4]}))
    (tmp_path / "pq").mkdir()
    table.cast_column("picture", datasets.Image()).to_parquet(tmp_path / "pq" / "train.parquet")
    with pytest.raises(InputError, match="no label column; its columns are picture, size"):
        load_data(tmp_path / "pq")
