from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageCms
import PIL.PngImagePlugin
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaleidoscope.content import Image
from kaleidoscope.errors import InputError, TooLargeError
from kaleidoscope.images import check_stored, image_path, store_image


def encoded(format_: str, size: tuple[int, int] = (40, 30), mode: str = "RGB", color: Any = None, **more: Any) -> bytes:
    out = BytesIO()
    PIL.Image.new(mode, size, color if color is not None else (200, 30, 30)).save(out, format_, **more)
    return out.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("format_", "media_type", "suffix"),
    [
        ("PNG", "image/png", ".png"),
        ("JPEG", "image/jpeg", ".jpg"),
        ("WEBP", "image/webp", ".webp"),
        ("GIF", "image/png", ".png"),
    ],
)
def test_keeps_a_picture_under_the_hash_of_its_bytes(
    tmp_path: Path, format_: str, media_type: str, suffix: str
) -> None:
    image = store_image(tmp_path, "acme", encoded(format_), "A red field")
    assert (image.media_type, image.width, image.height, image.alt) == (media_type, 40, 30, "A red field")
    path = image_path(tmp_path, "acme", image)
    assert path == tmp_path / "acme" / image.file[:2] / f"{image.file}{suffix}"
    assert files(tmp_path) == [path]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == image.file
    with PIL.Image.open(path) as stored:
        red, green, blue = stored.convert("RGB").getpixel((20, 15))  # type: ignore[misc]
    assert abs(red - 200) < 6 and abs(green - 30) < 6 and abs(blue - 30) < 6


def test_the_same_upload_twice_is_one_file(tmp_path: Path) -> None:
    first, second = (store_image(tmp_path, "acme", encoded("PNG")) for _ in range(2))
    assert first == second
    assert len(files(tmp_path)) == 1


def test_a_file_that_was_cut_off_on_the_disk_is_written_again(tmp_path: Path) -> None:
    image = store_image(tmp_path, "acme", encoded("PNG"))
    path = image_path(tmp_path, "acme", image)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    store_image(tmp_path, "acme", encoded("PNG"))
    assert path.read_bytes() == whole


def test_businesses_keep_their_files_apart(tmp_path: Path) -> None:
    image = store_image(tmp_path, "acme", encoded("PNG"))
    assert not image_path(tmp_path, "rival", image).exists()


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_metadata_is_gone_and_the_picture_upright(tmp_path: Path, format_: str) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    exif[0x010E] = "SECRET place"
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    more: dict[str, Any] = {"exif": exif, "icc_profile": profile}
    if format_ == "PNG":
        notes = PIL.PngImagePlugin.PngInfo()
        notes.add_text("Comment", "SECRET text", zip=True)
        notes.add_itxt("XML:com.adobe.xmp", "SECRET xmp")
        more["pnginfo"] = notes
    if format_ == "JPEG":
        more["comment"] = "SECRET comment"
    data = encoded(format_, **more)
    assert b"SECRET" in data
    image = store_image(tmp_path, "acme", data)
    assert (image.width, image.height) == (30, 40)
    path = image_path(tmp_path, "acme", image)
    assert b"SECRET" not in path.read_bytes() and b"ICC" not in path.read_bytes() and b"Exif" not in path.read_bytes()
    with PIL.Image.open(path) as stored:
        stored.load()
        assert not stored.getexif()
        assert not {"icc_profile", "exif", "comment", "Comment", "xmp"} & set(stored.info)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 50])
def test_broken_exif_is_no_reason_to_refuse_or_to_warn(tmp_path: Path, exif: bytes) -> None:
    image = store_image(tmp_path, "acme", encoded("JPEG", exif=exif))
    assert (image.width, image.height) == (40, 30)


def test_what_hides_behind_or_in_a_picture_is_not_kept(tmp_path: Path) -> None:
    script = b"<script>alert(1)</script>"
    for data in (
        encoded("PNG") + script,
        encoded("JPEG", comment=script) + b"PK\x03\x04" + script,
        encoded("GIF", comment=script) + script,
    ):
        image = store_image(tmp_path, "acme", data)
        assert b"script" not in image_path(tmp_path, "acme", image).read_bytes()


def test_a_gif_named_like_a_script_is_told_by_its_content(tmp_path: Path) -> None:
    polyglot = b"GIF89a/*" + b"\0" * 20 + b"*/=1;alert(1)"
    with pytest.raises(InputError):
        store_image(tmp_path, "acme", polyglot)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "empty"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>', "SVG, which can hold code"),
        (b'\xef\xbb\xbf  <?xml version="1.0"?><!-- x --><svg/>', "SVG"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"%PDF-1.7", "a PDF"),
        (b"BM" + b"\0" * 60, "a BMP"),
        (b"II*\0" + b"\0" * 60, "a TIFF"),
        (b"\0\0\0\x1cftypavif", "AVIF or HEIC"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"RIFF\0\0\0\0WAVE", "RIFF file that is no WebP"),
        (b"hello", "no image that we know"),
        (b" " + b"\x89PNG\r\n\x1a\n", "no image that we know"),
    ],
)
def test_everything_else_is_refused_by_name(tmp_path: Path, data: bytes, name: str) -> None:
    with pytest.raises(InputError, match="Give a PNG, JPEG, WebP or GIF image") as caught:
        store_image(tmp_path, "acme", data)
    assert name in caught.value.message
    assert files(tmp_path) == []


@pytest.mark.parametrize("size", [(5001, 5001), (10_001, 1), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(TooLargeError, match=r"Make it smaller|which is the most"):
        store_image(tmp_path, "acme", png_of(*size))


def test_a_gif_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    data = bytearray(encoded("GIF"))
    data[6:10] = struct.pack("<HH", 65_535, 65_535)
    with pytest.raises(TooLargeError):
        store_image(tmp_path, "acme", bytes(data))


def test_a_compressed_text_bomb_in_a_png_does_not_get_through(tmp_path: Path) -> None:
    body = b"Comment\0\0" + zlib.compress(b"a" * 20_000_000, 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = encoded("PNG")
    with pytest.raises(InputError):
        store_image(tmp_path, "acme", data[:33] + chunk + data[33:])


def test_limits_are_the_callers(tmp_path: Path) -> None:
    data = encoded("PNG")
    with pytest.raises(TooLargeError, match="more than 50 bytes"):
        store_image(tmp_path, "acme", data, max_bytes=50)
    with pytest.raises(TooLargeError, match="40 × 30 pixels"):
        store_image(tmp_path, "acme", data, max_pixels=1199)
    store_image(tmp_path, "acme", data, max_bytes=len(data), max_pixels=1200)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, format_: str) -> None:
    noise = PIL.Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    out = BytesIO()
    noise.save(out, format_)
    with pytest.raises(InputError, match="damaged or cut off"):
        store_image(tmp_path, "acme", out.getvalue()[: len(out.getvalue()) // 2])
    assert files(tmp_path) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format_=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]), at=st.floats(0, 1), junk=st.binary(min_size=1, max_size=9)
)
def test_bytes_changed_anywhere_give_a_picture_or_an_input_error(
    tmp_path: Path, format_: str, at: float, junk: bytes
) -> None:
    data = bytearray(encoded(format_))
    start = int(at * len(data))
    data[start : start + len(junk)] = junk
    try:
        image = store_image(tmp_path, "acme", bytes(data))
    except InputError:
        return
    assert image_path(tmp_path, "acme", image).is_file()


def rgba(format_: str) -> bytes:
    return encoded(format_, mode="RGBA", color=(200, 30, 30, 100))


def palette_with_transparency(_: str) -> bytes:
    out = BytesIO()
    picture = PIL.Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 200, 30, 30])
    picture.save(out, "PNG", transparency=1)
    return out.getvalue()


@pytest.mark.parametrize(
    ("make", "format_"), [(rgba, "PNG"), (rgba, "WEBP"), (palette_with_transparency, "PNG")], ids=["png", "webp", "p"]
)
def test_transparency_stays(tmp_path: Path, make: Callable[[str], bytes], format_: str) -> None:
    image = store_image(tmp_path, "acme", make(format_))
    with PIL.Image.open(image_path(tmp_path, "acme", image)) as stored:
        assert stored.mode == "RGBA"
        assert stored.getchannel("A").getpixel((0, 0)) in (0, 100)


@pytest.mark.parametrize(("mode", "color"), [("L", 90), ("1", 1), ("CMYK", (0, 200, 200, 0)), ("I;16", 90 * 256)])
def test_other_kinds_of_colour_become_ours(tmp_path: Path, mode: str, color: Any) -> None:
    format_ = "JPEG" if mode == "CMYK" else "PNG"
    image = store_image(tmp_path, "acme", encoded(format_, mode=mode, color=color))
    with PIL.Image.open(image_path(tmp_path, "acme", image)) as stored:
        assert stored.mode == ("L" if mode in ("L", "I;16") else "RGB")
        if stored.mode == "L":
            assert stored.getpixel((0, 0)) == 90


def test_of_an_animation_the_first_frame_is_kept(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for format_ in ("GIF", "WEBP", "PNG"):
        out = BytesIO()
        frames[0].save(out, format_, save_all=True, append_images=frames[1:], lossless=True)
        image = store_image(tmp_path, "acme", out.getvalue())
        with PIL.Image.open(image_path(tmp_path, "acme", image)) as stored:
            assert getattr(stored, "n_frames", 1) == 1
            red, _, blue = stored.convert("RGB").getpixel((0, 0))  # type: ignore[misc]
            assert red > 240 and blue < 15


def test_nothing_half_written_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        store_image(tmp_path, "acme", encoded("PNG"))
    assert files(tmp_path) == []


@pytest.mark.parametrize("business", ["../rival", "", "a/b", "..", "Acme", "a\0"])
def test_a_business_cannot_lead_out_of_the_folder(tmp_path: Path, business: str) -> None:
    image = store_image(tmp_path / "in", "acme", encoded("PNG"))
    with pytest.raises(InputError):
        image_path(tmp_path / "in", business, image)
    with pytest.raises(InputError):
        store_image(tmp_path / "in", business, encoded("PNG"))


@pytest.mark.parametrize("change", [{"file": "../../../etc/passwd"}, {"file": "a" * 63}, {"media_type": "text/html"}])
def test_an_image_that_was_never_checked_cannot_lead_out_of_the_folder(tmp_path: Path, change: dict[str, str]) -> None:
    image = Image(file="a" * 64, media_type="image/png", width=1, height=1).model_copy(update=change)
    with pytest.raises(InputError):
        image_path(tmp_path, "acme", image)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "GIF"])
def test_what_an_upload_answered_is_what_is_kept(tmp_path: Path, format_: str) -> None:
    check_stored(tmp_path, "acme", store_image(tmp_path, "acme", encoded(format_)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "0" * 64}, "content.file: no picture of this name is kept for business 'acme'. Upload the picture"),
        ({"media_type": "image/webp"}, "content.media_type: the picture is kept as image/png, not image/webp. Upload"),
        ({"width": 41}, "said to be 41 × 30; the picture that is kept has 40 × 30 px. Upload"),
        ({"height": 60}, "said to be 40 × 60; the picture that is kept has 40 × 30 px. Upload"),
    ],
)
def test_what_is_said_of_a_picture_has_to_be_true(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    image = store_image(tmp_path, "acme", encoded("PNG"))
    with pytest.raises(InputError, match=message):
        check_stored(tmp_path, "acme", image.model_copy(update=change))


def test_a_picture_of_another_business_or_a_damaged_one_is_not_kept(tmp_path: Path) -> None:
    image = store_image(tmp_path, "acme", encoded("PNG"))
    with pytest.raises(InputError, match="kept for business 'rival'"):
        check_stored(tmp_path, "rival", image)
    image_path(tmp_path, "acme", image).write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        check_stored(tmp_path, "acme", image)
