"""Encoded bytes become RGB pixels of 8 bits, or one reason why not.

The rules, for every format: the first frame counts; 16-bit samples are scaled to 8 bits by their full range; the EXIF
orientation is applied; alpha is dropped and the colours below it stay, as in torchvision and timm; everything else is
Pillow's conversion to RGB. Samples without a known range (32-bit integers, floats) are refused.
"""

import io
import warnings

import numpy as np
from PIL import Image

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # others are not even tried
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

_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
_WHITE_IS_ZERO = 0
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURN_MARKS = (b"eXIf", b"Raw profile type", b"adobe.xmp")  # a PNG without these has no orientation


class Undecodable(Exception):
    """Why an image cannot be decoded, in a few words; who knows its file or row makes an `InputError` of it."""


def decode(encoded: bytes) -> Image.Image:
    """The image as RGB.

    Raises:
        Undecodable: bytes of no known format, damaged or cut off, too many pixels, or samples of an unknown range.
    """
    try:
        image = _open(encoded)
        image.load()
        turn = _turn(image)
        rgb = _eight_bits(image) if _is_deep(image) else _rgb(image)
        return rgb.transpose(turn) if turn is not None else rgb
    except Undecodable:
        raise
    except Exception as error:  # Pillow's readers raise many kinds on damaged bytes
        raise Undecodable(_reason(error)) from error


def treatment(encoded: bytes) -> str:
    """What `decode` does to these bytes beyond Pillow's conversion to RGB; "" for most images and for damaged ones.

    A hash of encoded bytes is a hash of the pixels only together with this.
    """
    try:
        image = _open(encoded)
        plain = image.format == "PNG" and not any(mark in encoded for mark in _TURN_MARKS)
        turn = None if plain else _turn(image)  # of a PNG this decodes all pixels, hence the look before
        return " ".join([*(["16 bits"] if _is_deep(image) else []), *([turn.name] if turn is not None else [])])
    except Exception:  # what is wrong with it is said when it is decoded
        return ""


def is_image(encoded: object) -> bool:
    """Whether these are the bytes of an image, by their first ones."""
    if not isinstance(encoded, bytes):
        return False
    try:
        _open(encoded)
    except Exception:  # many kinds, as above
        return False
    return True


def _open(encoded: bytes) -> Image.Image:
    with warnings.catch_warnings():  # one limit, and no warning without a file's name
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(encoded), formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise Undecodable(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, the limit of Pillow") from None


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"its bytes are none of {', '.join(FORMATS)}"
    return " ".join(str(error).split())[:160] or type(error).__name__


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn the pixels upright. Pillow turns TIFF itself; EXIF that cannot be read turns nothing."""
    if image.format == "TIFF":
        return None
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # damaged EXIF is common in photographs whose pixels are whole
        return None


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def _eight_bits(image: Image.Image) -> Image.Image:
    """One channel of more than 8 bits as RGB: 0 stays 0, the largest sample becomes 255, linear between."""
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise Undecodable(f"samples are {kind}, whose range is not known; save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    largest = 2 ** tags.get(_BITS, (16,))[0] - 1
    samples = np.asarray(image).astype(np.float64).clip(0, largest)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        samples = largest - samples
    grey = np.round(samples * (255 / largest)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _rgb(image: Image.Image) -> Image.Image:
    image.info.pop("transparency", None)  # alpha is dropped all the same, and Pillow would warn of it
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha: divide first
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")
