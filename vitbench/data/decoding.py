"""Decode encoded images to RGB pixels of 8 bits, or give the reason why that fails.

The same rules hold for all formats. Of several frames the first is used. 16-bit samples are scaled to 8 bits by their
full range. The EXIF orientation is applied. Alpha is dropped, and the colours below it are kept, as in torchvision and
timm. The rest is Pillow's conversion to RGB. Samples without a known range (32-bit integers, floats) are an error.
"""

import io
import warnings

import numpy as np
from PIL import Image

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # Pillow tries no others
SUFFIXES = frozenset(
    f".{end}"
    for end in [
        "avif",
        "bmp",
        "dib",
        "gif",
        "jfif",
        "jp2",
        "jpe",
        "jpeg",
        "jpg",
        "pbm",
        "pgm",
        "png",
        "pnm",
        "ppm",
        "tif",
        "tiff",
        "webp",
    ]
)

_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG = 0x0112, 258, 262  # tags of EXIF and TIFF
_WHITE_IS_ZERO = 0
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_MARKERS = (b"eXIf", b"Raw profile type", b"adobe.xmp")  # a PNG without these has no orientation


class DecodeError(Exception):
    """An image cannot be decoded; the message is the reason. Callers that know the file or row raise an `InputError`."""


def decode(encoded: bytes) -> Image.Image:
    """The image as RGB.

    Raises:
        DecodeError: an unknown format, damaged or incomplete bytes, too many pixels, or samples of an unknown range.
    """
    try:
        image = _open(encoded)
        image.load()
        orientation = _orientation(image)
        rgb = _to_8_bit(image) if _is_high_bit_depth(image) else _to_rgb(image)
        return rgb.transpose(orientation) if orientation is not None else rgb
    except DecodeError:
        raise
    except Exception as error:  # Pillow's readers raise many types on damaged bytes
        raise DecodeError(_reason(error)) from error


def decoding_note(encoded: bytes) -> str:
    """What `decode` does to these bytes beyond Pillow's conversion to RGB; "" for most images and for damaged ones.

    Together with the encoded bytes it determines the pixels, so a hash of the pixels needs both.
    """
    try:
        image = _open(encoded)
        has_no_exif = image.format == "PNG" and not any(mark in encoded for mark in _ORIENTATION_MARKERS)
        # for a PNG, Pillow decodes all pixels to find the orientation
        orientation = None if has_no_exif else _orientation(image)
        depth = ["16 bits"] if _is_high_bit_depth(image) else []
        return " ".join([*depth, *([orientation.name] if orientation is not None else [])])
    except Exception:  # `decode` reports the reason
        return ""


def is_image(encoded: object) -> bool:
    """Whether this is an encoded image, judged by its first bytes."""
    if not isinstance(encoded, bytes):
        return False
    try:
        _open(encoded)
    except Exception:  # many types, as in `decode`
        return False
    return True


def _open(encoded: bytes) -> Image.Image:
    with warnings.catch_warnings():  # Pillow's warning about many pixels does not name the file
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(encoded), formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise DecodeError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, the limit of Pillow") from None


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"its bytes are none of {', '.join(FORMATS)}"
    return " ".join(str(error).split())[:160] or type(error).__name__


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """The transpose that brings the pixels upright; None if there is none or EXIF cannot be read. Pillow turns TIFF itself."""
    if image.format == "TIFF":
        return None
    try:
        return _TRANSPOSES.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF is common in photographs whose pixels are intact
        return None


def _is_high_bit_depth(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale one channel of more than 8 bits linearly, from 0 .. largest sample to 0 .. 255, and convert it to RGB."""
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise DecodeError(f"samples are {kind}, whose range is not known; save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    largest = 2 ** tags.get(_BITS_TAG, (16,))[0] - 1
    samples = np.asarray(image).astype(np.float64).clip(0, largest)
    if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
        samples = largest - samples
    grey = np.round(samples * (255 / largest)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    image.info.pop("transparency", None)  # alpha is dropped anyway, and Pillow would warn
    if image.mode in ("La", "RGBa"):  # colours are premultiplied by alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")
