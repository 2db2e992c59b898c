"""Uploaded pictures: told by what they hold, decoded and encoded anew, kept under the SHA-256 of their bytes.

Nothing of an upload reaches the disk as it came: no metadata, no second format in the same file, no code.
"""

from __future__ import annotations

import hashlib
import re
import threading
import warnings
from io import BytesIO
from pathlib import Path

import PIL.Image
import PIL.ImageOps

from kaleidoscope.content import MAX_SIDE_PX, Image, parse_content
from kaleidoscope.database import check_id
from kaleidoscope.errors import InputError, TooLargeError
from kaleidoscope.files import make_folder, replacing

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 25_000_000
QUALITY = 90  # of JPEG and lossy WebP

_SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
_STORED_AS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/png"}
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)

# Pillow warns about what it repairs; which warnings are shown is a setting of the whole process, so one at a time.
_quiet = threading.Lock()


def store_image(
    folder: Path,
    business: str,
    data: bytes,
    alt: str = "",
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image:
    """Keep a picture under the folder, and return what a material says of it.

    PNG, JPEG, WebP and GIF (its first frame, as PNG) are taken, whatever their file was called. They are turned as
    their EXIF says and lose all metadata, colour profiles included. The same upload twice is one file.

    Raises TooLargeError beyond `max_bytes` or `max_pixels` (before decoding), InputError for anything that is not such
    a picture or is damaged.
    """
    check_id("business", business)
    if len(data) > max_bytes:
        raise TooLargeError(f"The image has more than {max_bytes:,} bytes, which is the most. Make it smaller.")
    format_ = _format(data)
    picture = _decode(data, format_, max_pixels)
    encoded = _encode(picture, format_, lossless=data[12:16] == b"VP8L")
    image = parse_content(
        {
            "kind": "image",
            "file": hashlib.sha256(encoded).hexdigest(),
            "media_type": _STORED_AS[format_],
            "width": picture.width,
            "height": picture.height,
            "alt": alt,
        }
    )
    assert isinstance(image, Image)
    _write(image_path(folder, business, image), encoded)
    return image


def image_path(folder: Path, business: str, image: Image) -> Path:
    """Where the bytes of an image are; always under the folder. Raises InputError for names that are none of ours."""
    suffix = _SUFFIXES.get(image.media_type)
    if suffix is None or not _HASH.fullmatch(image.file):
        raise InputError("image: this does not name a stored picture. Upload it, and take the name it gets.")
    return folder / check_id("business", business) / image.file[:2] / f"{image.file}{suffix}"


def check_stored(folder: Path, business: str, image: Image) -> None:
    """Raise InputError unless this picture is kept for the business, in the format and of the size that are said."""
    path = image_path(folder, business, image)
    upload = "Upload the picture, and take the content that the upload answers with."
    if not path.is_file():
        other = [
            m for m in _SUFFIXES if image_path(folder, business, image.model_copy(update={"media_type": m})).is_file()
        ]
        if other:
            raise InputError(f"content.media_type: the picture is kept as {other[0]}, not {image.media_type}. {upload}")
        raise InputError(f"content.file: no picture of this name is kept for business {business!r}. {upload}")
    try:
        with _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(path, formats=list(_STORED_AS)) as kept:
                size = kept.size
    except Exception as error:  # as in `_decode`
        raise InputError(
            f"content.file: the file that is kept is damaged ({type(error).__name__}). {upload}"
        ) from error
    if size != (image.width, image.height):
        raise InputError(
            f"content: width and height are said to be {image.width} × {image.height}; the picture that is kept has"
            f" {size[0]} × {size[1]} px. {upload}"
        )


def _format(data: bytes) -> str:
    """Pillow's name of the format; raises InputError naming what else it is."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    raise InputError(f"The file is {_other_format(data)}. Give a PNG, JPEG, WebP or GIF image.")


def _other_format(data: bytes) -> str:
    if not data:
        return "empty"
    start = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(b"<"):
        return "SVG, which can hold code" if b"<svg" in start else "HTML or XML"
    if data[4:8] == b"ftyp":
        return "AVIF or HEIC, or a film"
    for magic, name in (
        (b"%PDF", "a PDF"),
        (b"BM", "a BMP"),
        (b"II*\0", "a TIFF"),
        (b"MM\0*", "a TIFF"),
        (b"PK", "a ZIP archive"),
        (b"\x1f\x8b", "gzip-compressed"),
        (b"\0\0\1\0", "an icon (ICO)"),
        (b"8BPS", "a Photoshop file"),
        (b"RIFF", "a RIFF file that is no WebP"),
    ):
        if data.startswith(magic):
            return name
    return "no image that we know"


def _decode(data: bytes, format_: str, max_pixels: int) -> PIL.Image.Image:
    """The picture in 8 bits: grey, RGB or RGBA, upright, without anything else from the file."""
    try:
        with _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(BytesIO(data), formats=[format_]) as opened:
                _check_size(opened.size, max_pixels)
                opened.load()
                picture = PIL.ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I"):  # 16 bits of grey
            picture = picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        elif picture.mode != "L" or "transparency" in picture.info:
            transparent = picture.has_transparency_data and format_ != "JPEG"
            picture = picture.convert("RGBA" if transparent else "RGB")
        picture.info = {}
        return picture
    except TooLargeError:
        raise
    except PIL.Image.DecompressionBombError:
        raise TooLargeError(f"The image has more than {max_pixels:,} pixels, which is the most.") from None
    except Exception as error:  # hostile bytes make Pillow raise whatever its parsers happen to stumble over
        raise InputError(
            f"The {format_} image is damaged or cut off ({type(error).__name__}). Export it again."
        ) from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels or max(size) > MAX_SIDE_PX:
        raise TooLargeError(
            f"The image is {width} × {height} pixels; the most is {max_pixels:,} in all and {MAX_SIDE_PX:,} on a side."
            " Make it smaller."
        )


def _encode(picture: PIL.Image.Image, format_: str, *, lossless: bool) -> bytes:
    out = BytesIO()
    if format_ == "JPEG":
        picture.save(out, "JPEG", quality=QUALITY, optimize=True, progressive=True)
    elif format_ == "WEBP":
        picture.save(out, "WEBP", quality=QUALITY, lossless=lossless)
    else:
        picture.save(out, "PNG")
    return out.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Put the file there, unless it is there already."""
    if path.is_file() and path.stat().st_size == len(data):
        return
    make_folder(path.parent)
    with replacing(path) as new:
        new.write_bytes(data)
