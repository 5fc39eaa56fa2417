"""Damaged, odd and mislabelled images: each gives the right pixels and labels, or one line that names the file and the row.

The mutations are drawn from a fixed seed. What is right is known without the code that is tested: undamaged bytes, or
values worked out by hand.
"""

import io
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.data.test_decoding import encoded, photo
from vitbench.base.errors import InputError
from vitbench.data.sources import FileImages, open_images

COUNT = 70


def one_line(error, *names):
    text = str(error)
    assert len(text.splitlines()) == 1, text
    for name in names:
        assert name in text, (name, text)


def flipped(whole, rng):
    where = rng.integers(len(whole), size=rng.integers(1, 9))
    bits = bytearray(whole)
    for i in where:
        bits[i] ^= 1 << int(rng.integers(8))
    return bytes(bits)


def cut(whole, rng):
    return whole[: rng.integers(len(whole))]


def spliced(whole, rng):
    start, end = sorted(rng.integers(len(whole), size=2))
    return whole[:start] + rng.bytes(int(rng.integers(64))) + whole[end:]


def huge(whole, rng):
    """A PNG whose header says more pixels than Pillow allows, with a right checksum."""
    at = whole.find(b"IHDR")
    if at < 0:
        return b"\x89PNG\r\n\x1a\n" + rng.bytes(40)
    header = (
        b"IHDR"
        + (60_000).to_bytes(4, "big")
        + (int(rng.integers(2_000, 60_000))).to_bytes(4, "big")
        + whole[at + 12 : at + 17]
    )
    return whole[:at] + header + zlib.crc32(header).to_bytes(4, "big") + whole[at + 21 :]


KINDS = (
    ("PNG", {}),
    ("JPEG", {"quality": 90}),
    ("TIFF", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("BMP", {}),
    ("PPM", {}),
)
MUTATIONS = (flipped, cut, spliced, huge)


@pytest.mark.filterwarnings("ignore:.*(EXIF|Truncated|Metadata|tag).*:UserWarning")
@pytest.mark.parametrize("number", range(COUNT))
def test_damaged_bytes_give_an_image_or_the_files_name(number, tmp_path):
    rng = np.random.default_rng([28, number])
    kind, options = KINDS[number % len(KINDS)]
    width, height = (int(side) for side in rng.integers(1, 40, size=2))
    whole = encoded(photo(width, height, number), kind, **options)
    mutate = MUTATIONS[number // len(KINDS) % len(MUTATIONS)]
    path = tmp_path / f"image{number}.png"
    path.write_bytes(mutate(whole, rng))
    images = FileImages([path])
    try:
        image = images[0]
    except InputError as error:
        one_line(error, str(path), "skip_broken")
        assert images.broken() == [0]
    else:
        assert (image.mode, images.broken()) == ("RGB", []), (kind, mutate)
        if path.read_bytes() == whole:
            assert (np.asarray(image) == np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))).all()
    assert len(images.content_hash()) == 64


def column(rng, number):
    """A label column of 12 rows, the class names that its file gives (or None), and the first wrong row (or None)."""
    names = [None, ("x", "y", "z"), None, ("x", "y", "z")][number % 4]
    kind = [int, int, str, str][number % 4]
    values = [int(value) for value in rng.permutation(np.arange(12) % 3)]
    values = [str("xyz"[value]) for value in values] if kind is str and names is None else values
    wrongs = {
        int: [
            -1,
            -7,
            None,
            1.5,
            float("nan"),
            "x" if names is None else "other",
            [1],
            b"1",
            {"a": 1},
            10**6 if names else -2,
        ],
        str: [None, "", " ", 1.5, float("nan"), ["x"], b"x", -1, {"a": 1}, True],
    }[kind]
    if number % 5 == 0:
        return values, names, None
    rows = sorted(int(row) for row in rng.choice(np.arange(1, 12), size=rng.integers(1, 4), replace=False))
    for row in rows:
        values[row] = wrongs[int(rng.integers(len(wrongs)))]
    return values, names, rows[0]


@pytest.mark.parametrize("number", range(COUNT))
def test_label_columns_give_indices_or_the_files_name_and_row(number):
    from vitbench.data.labels import Column, encode

    rng = np.random.default_rng([29, number])
    values, names, wrong = column(rng, number)
    before = Column("first.parquet", values[:0] or ["x", "y", "z"] if isinstance(values[0], str) else [0, 1, 2], names)
    columns = {"train": [before, Column("folder/second.parquet", values, names)]}
    if wrong is not None:
        with pytest.raises(InputError) as error:
            encode(columns)
        one_line(error.value, f"folder/second.parquet, row {wrong} ", "allowed")
        return
    classes, labels = encode(columns)
    given = [names[value] if names and isinstance(value, int) else str(value) for value in values]
    assert [classes[i] for i in labels["train"][3:]] == given


@pytest.mark.parametrize("number", range(12))
def test_folders_of_odd_files_lose_nothing_without_a_word(number, tmp_path, monkeypatch):
    """Of a folder with damaged and hidden files beside good ones, found = used + skipped, and the good ones are used."""
    monkeypatch.setenv("VITBENCH_HOME", str(tmp_path / "home"))
    rng = np.random.default_rng([30, number])
    good = broken = hidden = 0
    for label in "abc":
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in range(5):
            whole, draw = encoded(photo(8, 8, 5 * number + i)), int(rng.integers(4)) if i else 3
            name = [f"{i}.png", f".{i}.png", f"train-{i}.JPG", f"test {i}.PNG"][draw]
            (tmp_path / "set" / label / name).write_bytes(whole[:40] if draw == 0 else whole)
            good, broken, hidden = good + (draw >= 2), broken + (draw == 0), hidden + (draw == 1)
    if broken and number % 2:
        with pytest.raises(InputError) as error:
            open_images(tmp_path / "set", "")
        one_line(error.value, str(tmp_path / "set"), ".png")
        return
    part = open_images(tmp_path / "set", "", skip_broken=True).parts["train"]
    assert (len(part.labels), part.total) == (good, good + broken + hidden)
    assert part.skipped == {**({"broken": broken} if broken else {}), **({"hidden": hidden} if hidden else {})}


@pytest.mark.parametrize("number", range(8))
def test_tables_with_one_odd_cell_name_its_row(number, tmp_path, monkeypatch):
    monkeypatch.setenv("VITBENCH_HOME", str(tmp_path / "home"))
    rng = np.random.default_rng([31, number])
    cells, labels = [{"bytes": encoded(photo(8, 8, i)), "path": None} for i in range(8)], ["x", "y"] * 4
    row = int(rng.integers(1, 8))
    if number % 2:
        cells[row] = [
            {"bytes": b"", "path": None},
            {"bytes": None, "path": "/nowhere.png"},
            None,
            {"bytes": rng.bytes(50), "path": None},
        ][number // 2]
    else:
        labels[row] = [None, "", "  ", None][number // 2]
    (tmp_path / "set").mkdir()
    pd.DataFrame({"image": cells, "label": labels}).to_parquet(tmp_path / "set" / "pets.parquet")
    with pytest.raises(InputError) as error:
        open_images(tmp_path / "set", "")
    one_line(error.value, "pets.parquet", f"row {row} ")
