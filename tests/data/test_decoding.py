"""Encoded images become the pixels that they stand for, whatever their format; damaged ones are named."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vitbench.base.errors import InputError
from vitbench.data.decoding import DecodeError, decode, decoding_note
from vitbench.data.sources import FileImages
from vitbench.data.splits import load_data


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width=9, height=7, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 257 k of 65535 is k of 255, exactly


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_eight_by_their_full_range(kind):
    pixels = np.asarray(decode(encoded(Image.fromarray(RAMP), kind)))
    assert (pixels == (RAMP // 257).astype(np.uint8)[..., None]).all(), kind


def test_sixteen_bits_are_rounded_not_cut():
    pixels = np.asarray(decode(encoded(Image.fromarray(np.array([[0, 128, 129, 65535, 65406]], dtype=np.uint16)))))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 255, 254]


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "grey and alpha", "RGBA"])
def test_sixteen_bits_in_several_channels(colour, channels):
    """Pillow writes no such PNG: it is put together here from its chunks."""
    samples = np.arange(16 * channels).reshape(4, 4, channels)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples * 257)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    whole = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    colours = samples[..., :3] if channels > 2 else samples[..., :1]
    assert (np.asarray(decode(whole)) == colours).all()


def test_sixteen_bits_where_white_is_zero_are_inverted():
    whole = encoded(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(whole)).tag_v2[262] == 0
    assert (np.asarray(decode(whole))[..., 0] == 255 - RAMP // 257).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_samples_without_a_range_are_refused(dtype):
    with pytest.raises(DecodeError, match="range is not known"):
        decode(encoded(Image.fromarray(RAMP.astype(dtype)), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(kind, orientation):
    image = Image.fromarray(np.repeat(np.repeat(np.asarray(photo(3, 2)), 16, axis=0), 16, axis=1))
    options = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}[kind]
    pixels = np.asarray(decode(encoded(image, kind, exif=turned(orientation), **options))).astype(int)
    lying = np.asarray(decode(encoded(image, kind, **options))).astype(int)
    # the 0th row and column of what is stored stand at these sides: the EXIF standard, tag 274
    expected = {
        1: lying,
        2: lying[:, ::-1],
        3: lying[::-1, ::-1],
        4: lying[::-1],
        5: lying.transpose(1, 0, 2),
        6: lying[::-1].transpose(1, 0, 2),
        7: lying[::-1, ::-1].transpose(1, 0, 2),
        8: lying.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert (pixels == expected).all(), (kind, orientation)


def test_a_damaged_exif_block_turns_nothing():
    image = photo()
    whole = encoded(image, "JPEG", exif=b"Exif\x00\x00no tags at all")
    assert (np.asarray(decode(whole)) == np.asarray(decode(encoded(image, "JPEG")))).all()


def test_alpha_is_dropped_and_the_colours_below_stay():
    image = photo()
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(np.arange(63, dtype=np.uint8).reshape(7, 9)))
    assert (np.asarray(decode(encoded(alpha))) == np.asarray(image)).all()
    grey = image.convert("L")
    both = Image.merge("LA", (grey, Image.new("L", grey.size, 0)))
    assert (np.asarray(decode(encoded(both))) == np.asarray(grey.convert("RGB"))).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_palettes_with_transparency_keep_their_colours(transparency):
    palette = Image.fromarray(np.arange(3, dtype=np.uint8)[None].repeat(2, axis=0), "P")
    palette.putpalette([250, 10, 20, 30, 240, 40, 50, 60, 230])
    pixels = np.asarray(decode(encoded(palette, transparency=transparency)))
    assert pixels[0].tolist() == [[250, 10, 20], [30, 240, 40], [50, 60, 230]]


def test_other_kinds_of_pixels():
    assert np.asarray(decode(encoded(Image.new("CMYK", (3, 2), (255, 0, 0, 0)), "TIFF")))[0, 0].tolist() == [
        0,
        255,
        255,
    ]
    assert np.asarray(decode(encoded(Image.new("L", (1, 1), 77)))).tolist() == [[[77, 77, 77]]]
    assert np.asarray(decode(encoded(Image.new("1", (2, 1), 1)))).tolist() == [[[255] * 3] * 2]


def test_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    whole = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(whole))[0, 0].tolist() == [255, 0, 0]


def test_what_cannot_be_decoded_says_why(monkeypatch):
    whole = encoded(photo(90, 70))
    for broken, why in ((whole[:200], "."), (b"", "its bytes are none of"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "none of")):
        with pytest.raises(DecodeError, match=why):
            decode(broken)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 70 - 1)
    with pytest.raises(DecodeError, match="more than 6,299 pixels"):
        decode(whole)


def test_a_broken_image_is_named_and_can_be_left_out(image_folder, capsys):
    folder = image_folder(size=(90, 70))
    whole = load_data(folder, test=1.0)
    (folder / "owl" / "9.png").rename(folder.parent / "kept.png")
    without = load_data(folder, test=1.0)
    (folder / "owl" / "9.png").write_bytes((folder.parent / "kept.png").read_bytes()[:300])
    data = load_data(folder, test=1.0, skip_broken=True)
    assert data.fingerprint == without.fingerprint != whole.fingerprint
    assert len(data.test) == 29
    assert "30 images found, 29 used, 1 skipped (1 broken)" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"owl/9\.png: the image cannot be read .*skip_broken"):
        load_data(folder, test=1.0).test[29]
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="nor any other of 30 images"):
        load_data(folder, skip_broken=True)


def test_the_fingerprint_follows_the_pixels_not_the_bytes_alone(image_folder, tmp_path):
    """Images that an earlier decoding would have read in another way have another hash; all others keep theirs."""
    import hashlib

    (tmp_path / "plain.jpg").write_bytes(encoded(photo(), "JPEG"))
    (tmp_path / "turned.jpg").write_bytes(encoded(photo(), "JPEG", exif=turned(6)))
    (tmp_path / "deep.png").write_bytes(encoded(Image.fromarray(RAMP)))
    for name, special in (("plain.jpg", ""), ("turned.jpg", "ROTATE_270"), ("deep.png", "16 bits")):
        content = (tmp_path / name).read_bytes()
        assert decoding_note(content) == special, name
        bare = hashlib.sha256(b"1" + content).hexdigest()
        assert (FileImages([tmp_path / name]).content_hash() == bare) == (special == ""), name


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(InputError, match=r"image\.png.*is not a file"):
        FileImages([tmp_path / "image.png"])[0]
