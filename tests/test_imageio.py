"""Pictures from files and back: what folders really hold, what is kept, what is refused, nothing half-written."""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import ExifTags, Image, ImageCms

from uplift_core.errors import InputError, OutOfMemory
from uplift_core.imageio import (
    Picture,
    check_output,
    fill_transparent,
    find_pictures,
    output_format,
    read_picture,
    read_settings,
    write_picture,
)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, depth: int, colour_type: int, extra: bytes = b"", size=None) -> bytes:
    """A PNG made by hand, for the kinds Pillow does not write."""
    height, width = size or values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def given_file(tmp_path):
    def make(name: str, data: bytes | Image.Image, kind: str = "PNG", **options) -> Path:
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else saved(data, kind, **options))
        return path
    return make


def pixels(picture: Picture) -> np.ndarray:
    return np.rint(picture.rgb.permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def colour_picture(height=4, width=5, **fields) -> Picture:
    return Picture(torch.from_numpy(RNG.random((3, height, width), dtype=np.float32)), **fields)


# -- reading: kinds of pictures ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, name", [("PNG", "a.png"), ("BMP", "a.bmp"), ("TIFF", "a.tif")])
def test_a_plain_picture_is_read_exactly(given_file, kind, name):
    picture = read_picture(given_file(name, Image.fromarray(COLOURS), kind))
    assert (pixels(picture) == COLOURS).all()
    assert picture.rgb.dtype == torch.float32 and picture.rgb.shape == (3, 6, 9)
    assert (picture.alpha, picture.exif, picture.bits, picture.gray, picture.notes) == (None, None, 8, False, [])


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix, kind", [(".png", "PNG"), (".webp", "WEBP"), (".tif", "TIFF")])
def test_the_orientation_is_applied_once(given_file, tmp_path, turn, suffix, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = turn, "Maker"
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = read_picture(given_file(f"a{suffix}", Image.fromarray(COLOURS), kind, exif=exif, **options))
    upright = {1: COLOURS, 2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1],
               5: COLOURS.transpose(1, 0, 2), 6: np.rot90(COLOURS, -1), 7: np.rot90(COLOURS, 2).transpose(1, 0, 2),
               8: np.rot90(COLOURS)}[turn]
    assert (pixels(picture) == upright).all()
    write_picture(picture, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert ExifTags.Base.Orientation not in image.getexif()
        assert image.getexif()[ExifTags.Base.Make] == "Maker"
    assert (pixels(read_picture(tmp_path / "out.png")) == upright).all()


def test_a_deep_gray_picture_is_turned_too(given_file):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    values = RNG.integers(0, 65536, (3, 5), dtype=np.uint16)
    picture = read_picture(given_file("a.png", Image.fromarray(values), exif=exif))
    assert (np.rint(picture.rgb[0].numpy() * 65535) == np.rot90(values, -1)).all()


def test_one_bit_gray_and_palette(given_file):
    bits = Image.fromarray(COLOURS).convert("1")
    picture = read_picture(given_file("1.png", bits))
    assert picture.gray and (pixels(picture)[..., 0] == np.asarray(bits) * 255).all()
    gray = read_picture(given_file("l.png", Image.fromarray(COLOURS[..., 0])))
    assert gray.gray and gray.rgb.shape[0] == 3 and (pixels(gray) == COLOURS[..., :1]).all()
    palette = Image.fromarray(COLOURS).quantize(16)
    picture = read_picture(given_file("p.png", palette))
    assert not picture.gray and (pixels(picture) == np.asarray(palette.convert("RGB"))).all()


@pytest.mark.parametrize("mode, gray", [("LA", True), ("RGBA", False)])
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_alpha_is_read_and_written(given_file, tmp_path, mode, gray, suffix):
    image = Image.fromarray(COLOURS).convert(mode)
    alpha = RNG.integers(1, 256, (6, 9), dtype=np.uint8)
    image.putalpha(Image.fromarray(alpha))
    picture = read_picture(given_file("a.png", image))
    assert picture.gray == gray and (np.rint(picture.alpha[0].numpy() * 255) == alpha).all()
    assert (pixels(picture) == np.asarray(image.convert("RGBA"))[..., :3]).all()
    write_picture(picture, tmp_path / f"out{suffix}")
    with Image.open(tmp_path / f"out{suffix}") as out:
        assert out.mode == (mode if suffix == ".png" else "RGBA")
        assert (np.asarray(out.getchannel("A")) == alpha).all()


@pytest.mark.parametrize("values, depth, colour_type, key", [
    (np.repeat(np.arange(6, dtype=">u1")[:, None], 6, 1)[..., None].repeat(3, 2), 8, 2, struct.pack(">HHH", 2, 2, 2)),
    (np.repeat(np.arange(6, dtype=">u1")[:, None], 6, 1), 8, 0, struct.pack(">H", 2)),
    (np.repeat(np.arange(6, dtype=">u2")[:, None], 6, 1), 16, 0, struct.pack(">H", 2)),
])
def test_a_transparent_colour_becomes_alpha(given_file, values, depth, colour_type, key):
    picture = read_picture(given_file("a.png", png(values, depth, colour_type, chunk(b"tRNS", key))))
    assert picture.alpha is not None
    assert picture.alpha[0, :, 0].tolist() == [1, 1, 0, 1, 1, 1]
    assert picture.gray == (colour_type == 0)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_transparency(given_file, kind):
    image = Image.new("P", (4, 3), 1)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putpixel((2, 1), 0)
    picture = read_picture(given_file("a." + kind.lower(), image, kind, transparency=0))
    expected = np.ones((3, 4))
    expected[1, 2] = 0
    assert (picture.alpha[0].numpy() == expected).all()
    assert (pixels(picture) == [0, 255, 0]).all()  # the red was invisible and must not bleed


def test_gray_of_16_bits_keeps_them(given_file, tmp_path):
    values = RNG.integers(0, 65536, (40, 30), dtype=np.uint16)
    picture = read_picture(given_file("a.png", png(values.astype(">u2"), 16, 0)))
    assert picture.bits == 16 and picture.gray and not picture.notes
    write_picture(picture, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode.startswith("I") and (np.asarray(image) == values).all()
    write_picture(picture, tmp_path / "out.webp")  # eight bits are all it holds
    write_picture(picture, tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.mode == "L"


def test_the_same_gray_in_32_bit_storage_is_as_bright(given_file):
    values = RNG.integers(0, 65536, (4, 3))
    picture = read_picture(given_file("a.tif", Image.fromarray(values.astype(np.int32)), "TIFF"))
    assert (np.rint(picture.rgb[1].numpy() * 65535) == values).all() and not picture.notes
    deep = read_picture(given_file("b.tif", Image.fromarray((values * 1000 - 5).astype(np.int32)), "TIFF"))
    assert float(deep.rgb.max()) == 1 and float(deep.rgb.std()) > 0.1  # not clipped to white
    assert any("32 bits" in note for note in deep.notes)


def test_a_deep_gray_picture_with_alpha_keeps_its_alpha(tmp_path, caplog):
    alpha = torch.linspace(0, 1, 20).view(1, 4, 5)
    write_picture(colour_picture(alpha=alpha, bits=16, gray=True), tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png").alpha - alpha).abs().max() < 1 / 255
    assert "8 bits" in caplog.text


@pytest.mark.parametrize("channels, colour_type", [(3, 2), (4, 6), (2, 4)])
def test_16_bit_colour_loses_bits_and_says_so(given_file, channels, colour_type):
    values = RNG.integers(256, 65536, (5, 4, channels), dtype=np.uint16)
    picture = read_picture(given_file("a.png", png(values.astype(">u2"), 16, colour_type)))
    assert any("16 bits" in note for note in picture.notes)
    assert picture.bits == 8 and picture.gray == (channels == 2)
    colour = values[..., :3] if channels > 2 else values[..., :1]
    assert np.abs(picture.rgb.permute(1, 2, 0).numpy() - colour / 65535).max() < 1 / 255


def test_16_bit_colour_gets_no_wrong_transparency(given_file):
    values = np.full((4, 3, 3), 0x0580, ">u2")  # 5 in eight bits
    picture = read_picture(given_file("a.png", png(values, 16, 2, chunk(b"tRNS", struct.pack(">HHH", 5, 5, 5)))))
    assert picture.alpha is None and any("transparent colour" in note for note in picture.notes)


def test_bmp_of_565_bits_is_not_taken_for_deep(given_file):
    header = b"BM" + struct.pack("<IHHI", 66 + 8, 0, 0, 66) + struct.pack(
        "<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0) + struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    assert not read_picture(given_file("a.bmp", header + b"\xff\xff" * 4)).notes


def test_floats(given_file):
    ramp = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    picture = read_picture(given_file("a.tif", Image.fromarray(ramp), "TIFF"))
    assert np.abs(picture.rgb[2].numpy() - ramp).max() < 1e-6 and not picture.notes
    strange = ramp * 4 - 1
    strange[0, 1], strange[0, 2] = np.nan, np.inf
    picture = read_picture(given_file("b.tif", Image.fromarray(strange), "TIFF"))
    assert torch.isfinite(picture.rgb).all() and picture.rgb.min() == 0 and picture.rgb.max() == 1
    assert len(picture.notes) == 3


def cmyk_profile() -> bytes:
    """A CMYK profile in which paper is white, black ink black and every colour mid-gray, so that its use shows."""
    table = b"".join(bytes((255 if inks == 0 else 0 if inks & 1 else 128, 128, 128)) for inks in range(16))
    identity = struct.pack(">9i", *(65536 if i in (0, 4, 8) else 0 for i in range(9)))
    lut = (b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + bytes(range(256)) * 4 + table
           + bytes(range(256)) * 3)
    tags = {b"A2B0": lut, b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
            b"cprt": b"text" + bytes(4) + b"none\0", b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0"
            + bytes(78)}
    offset, index, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        index += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = 128 + len(index) + len(body)
    head = (struct.pack(">I", size) + bytes(4) + struct.pack(">I", 0x02400000) + b"prtrCMYKLab " + bytes(12) + b"acsp"
            + bytes(28) + struct.pack(">3i", 63190, 65536, 54061))
    return head.ljust(128, b"\0") + index + body


def test_cmyk_with_and_without_a_profile(given_file, tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    plain = read_picture(given_file("a.jpg", image, "JPEG", quality=100))
    assert plain.rgb[0].min() > 0.95 and plain.rgb[1:].max() < 0.05  # red
    assert any("without a usable profile" in note for note in plain.notes)
    managed = read_picture(given_file("b.jpg", image, "JPEG", quality=100, icc_profile=cmyk_profile()))
    assert any("own profile" in note for note in managed.notes)
    assert float((managed.rgb - 0.466).abs().max()) < 0.03  # L* = 50
    assert managed.icc is None and plain.icc is None
    wrong = read_picture(given_file("c.jpg", image, "JPEG", icc_profile=b"not a profile"))
    assert wrong.rgb[0].min() > 0.95 and any("without a usable profile" in note for note in wrong.notes)
    write_picture(managed, tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as out:
        assert out.mode == "RGB"


@pytest.mark.parametrize("mode", ["LAB", "YCbCr"])
def test_other_colour_spaces_of_tiff(given_file, mode):
    image = Image.new(mode, (4, 4), (128, 128, 128))  # gray in both
    picture = read_picture(given_file("a.tif", image, "TIFF", icc_profile=SRGB))
    assert float((picture.rgb - 0.48).abs().max()) < 0.06 and picture.icc is None


def test_colours_of_an_uncompressed_ycbcr_tiff(given_file):
    image = Image.new("RGB", (5, 3), (200, 40, 90)).convert("YCbCr")
    assert (np.abs(pixels(read_picture(given_file("a.tif", image, "TIFF"))).astype(int) - [200, 40, 90]) <= 2).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_frame_of_an_animation_and_a_note(given_file, kind, count):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")][:count]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = given_file("a." + kind.lower(), frames[0], kind, save_all=True, append_images=frames[1:], **options)
    picture = read_picture(path)
    assert (pixels(picture) == [255, 0, 0]).all()
    assert [("3" in note and "first" in note) for note in picture.notes] == [True] * (count > 1)


@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000)])
def test_extreme_sizes(given_file, tmp_path, size):
    picture = read_picture(given_file("a.png", Image.new("RGBA", size, (1, 2, 3, 0))))
    assert picture.rgb.shape == (3, size[1], size[0]) and picture.alpha.max() == 0
    write_picture(picture, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == size


# -- reading: what is refused --------------------------------------------------------------------------------------

def noise_picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (120, 120, 3), dtype=np.uint8))


def half(data: bytes) -> bytes:
    return data[:len(data) // 2]


@pytest.mark.parametrize("name, data, words", [
    ("zero.png", b"", "empty"),
    ("text.png", b"these are only words\n" * 20, "not a picture"),
    ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    ("cut.jpg", half(saved(noise_picture(), "JPEG")), "damaged or cut short"),
    ("cut.png", half(saved(noise_picture(), "PNG")), "damaged or cut short"),
    ("cut.webp", half(saved(noise_picture(), "WEBP")), "damaged or cut short|not a picture"),
    ("signature.png", saved(noise_picture(), "PNG")[:20], "damaged or cut short|not a picture"),
])
def test_what_is_no_picture_is_named(given_file, name, data, words):
    with pytest.raises(InputError, match=words) as caught:
        read_picture(given_file(name, data))
    assert name in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.png: there is no such file"):
        read_picture(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="no pictures in this folder"):
        read_picture(tmp_path)
    with pytest.raises(InputError):
        read_picture(tmp_path / ("x" * 5000 + ".png"))


@pytest.mark.parametrize("side, limit, words", [
    (30000, 200_000_000, "limit of 200,000,000"), (16000, 200_000_000, "16000x16000"), (11, 120, "11x11")])
def test_bombs_are_refused_unread(given_file, side, limit, words, monkeypatch):
    path = given_file("bomb.png", png(np.zeros((1, 1), np.uint8), 8, 0, size=(side, side)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the picture was decoded"))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(), pytest.raises(InputError, match=words) as caught:
        warnings.simplefilter("error")
        read_picture(path, limit)
    assert "--max-pixels" in str(caught.value)
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_ours_and_not_pillows(given_file, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = given_file("a.png", Image.fromarray(COLOURS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(read_picture(path)) == COLOURS).all()
        assert read_settings(path) is None
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(InputError):
        read_picture(path, 6 * 9 - 1)
    assert Image.MAX_IMAGE_PIXELS == 10
    assert read_picture(path, 6 * 9).rgb.shape == (3, 6, 9)


def test_the_cause_named_is_the_true_one(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_picture(tmp_path / ("x" * 300 + ".png"))
    assert "damaged" not in str(caught.value)
    path = tmp_path / "a.png"
    path.write_bytes(saved(Image.fromarray(COLOURS), "PNG"))

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match=r"a\.png: no permission"):
        read_picture(path)


def test_paths_may_be_text(tmp_path):
    path = str(tmp_path / "a.png")
    write_picture(colour_picture(), path, settings={"seed": 1})
    assert read_picture(path).rgb.shape == (3, 4, 5) and read_settings(path) == {"seed": 1}


def test_programs_in_picture_clothes_are_not_run(given_file, monkeypatch):
    path = given_file("photo.png", Image.fromarray(COLOURS), "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("the file was run"))
    with pytest.raises(InputError, match=r"photo\.png: not a picture"):
        read_picture(path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_ends_is_an_error_of_ours(given_file, monkeypatch, error):
    path = given_file("a.png", Image.fromarray(COLOURS))

    def full(self):
        raise error
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", full)
    with pytest.raises(OutOfMemory, match=r"a\.png"):
        read_picture(path)


MAKE = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\x02\0\0\0a\0\0\0\0\0\0\0"
SEEDS = {"png": saved(Image.fromarray(COLOURS), "PNG", exif=MAKE),
         "jpg": saved(Image.fromarray(COLOURS), "JPEG", exif=MAKE),
         "gif": saved(Image.fromarray(COLOURS), "GIF"), "bmp": saved(Image.fromarray(COLOURS), "BMP"),
         "tif": saved(Image.fromarray(COLOURS), "TIFF", compression="tiff_lzw"),
         "webp": saved(Image.fromarray(COLOURS), "WEBP")}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SEEDS)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
       st.floats(0.2, 1))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_our_error(tmp_path_factory, kind, changes, keep):
    data = bytearray(SEEDS[kind])
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(data[:max(1, int(len(data) * keep))])
    try:
        picture = read_picture(path, 10_000)
    except InputError as error:
        assert path.name in str(error)
    else:
        assert torch.isfinite(picture.rgb).all() and min(picture.rgb.shape) > 0


def test_damaged_exif_is_dropped_and_the_picture_read(given_file, monkeypatch):
    path = given_file("a.png", Image.fromarray(COLOURS))

    def broken(self):
        raise struct.error("unpack requires more bytes")
    monkeypatch.setattr(Image.Image, "getexif", broken)
    picture = read_picture(path)
    assert (pixels(picture) == COLOURS).all() and any("EXIF" in note for note in picture.notes)


# -- invisible colours ---------------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.floats(0, 1))
def test_invisible_colours_come_from_visible_ones(height, width, seed, share):
    g = torch.Generator().manual_seed(seed)
    rgb = torch.rand(3, height, width, generator=g)
    alpha = (torch.rand(1, height, width, generator=g) < share).float() * torch.rand(1, height, width, generator=g)
    filled = fill_transparent(rgb, alpha)
    seen = alpha[0] > 0
    assert torch.equal(filled[:, seen], rgb[:, seen])
    if seen.any():
        low, high = rgb[:, seen].amin(1), rgb[:, seen].amax(1)
        assert (filled >= low[:, None, None] - 1e-5).all() and (filled <= high[:, None, None] + 1e-5).all()


@pytest.mark.parametrize("size", [(2048, 2048), (1, 5000), (3, 5000)])
def test_a_single_visible_pixel_gives_its_colour_to_all(size):
    alpha = torch.zeros(1, *size)
    alpha[0, 0, 7] = 1
    rgb = torch.where(alpha > 0, 0.75, 0.1).expand(3, -1, -1)
    assert (fill_transparent(rgb, alpha) - 0.75).abs().max() < 1e-5


def test_near_colours_win_over_far_ones():
    alpha = torch.zeros(1, 1, 400)
    alpha[..., :10], alpha[..., -10:] = 1, 1
    rgb = torch.zeros(3, 1, 400)
    rgb[..., -10:] = 1
    filled = fill_transparent(rgb, alpha)[0, 0]
    assert filled[20] < 0.2 and filled[-20] > 0.8


# -- writing -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_profile_settings_and_exif_survive(tmp_path, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.DateTime] = "Maker", "2020:01:02 03:04:05"
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitude: (1.0, 2.0, 3.0)}
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ExifImageWidth: 9, ExifTags.Base.FNumber: 2.5,
                               ExifTags.IFD.Interop: {1: "R98"}}
    source = tmp_path / "source.jpg"
    Image.fromarray(COLOURS).save(source, exif=exif, icc_profile=SRGB)
    picture = read_picture(source)
    assert picture.icc == SRGB
    made = {"seed": 7, "model": "sd15-vae", "title": "Größe \u2713", "scale": 2.0, "path": Path("x")}
    path = tmp_path / f"out{suffix}"
    picture.rgb = torch.rand(3, 12, 18)
    write_picture(picture, path, settings=made)
    assert read_settings(path) == {**made, "path": "x"}
    with Image.open(path) as image:
        assert image.format == output_format(path) and image.size == (18, 12)
        assert image.info["icc_profile"] == SRGB
        found = image.getexif()
        assert found[ExifTags.Base.Make] == "Maker" and found[ExifTags.Base.DateTime] == "2020:01:02 03:04:05"
        assert tuple(found.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude]) == (1, 2, 3)
        kept = found.get_ifd(ExifTags.IFD.Exif)
        assert kept[ExifTags.Base.FNumber] == 2.5 and found.get_ifd(ExifTags.IFD.Interop)[1] == "R98"
        assert kept[ExifTags.Base.ExifImageWidth] == 18  # of the new file
        if suffix.lower() == ".png":
            assert json.loads(image.info["uplift"])["seed"] == 7
        else:
            comment = kept[ExifTags.Base.UserComment]
            assert comment[:8] == b"ASCII\0\0\0" and json.loads(comment[8:])["seed"] == 7
    write_picture(read_picture(path), path, settings={"seed": 8}, overwrite=True)
    assert read_settings(path) == {"seed": 8}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_nothing_is_invented(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_picture(colour_picture(), path)
    assert read_settings(path) is None
    with Image.open(path) as image:
        assert "icc_profile" not in image.info and not len(image.getexif())
    write_picture(colour_picture(), path, settings={"seed": 1}, overwrite=True)
    assert read_settings(path) == {"seed": 1}


def test_the_exif_of_a_tiff_says_nothing_of_how_it_was_stored(given_file, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Someone"
    picture = read_picture(given_file("a.tif", Image.fromarray(COLOURS), "TIFF", exif=exif, icc_profile=SRGB))
    write_picture(picture, tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as image:
        assert dict(image.getexif()) == {ExifTags.Base.Artist: "Someone"}
        assert image.info["icc_profile"] == SRGB


def test_more_exif_than_a_jpeg_holds(given_file, tmp_path, caplog):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.MakerNote: bytes(65400)}
    picture = read_picture(given_file("a.jpg", Image.fromarray(COLOURS), "JPEG", exif=exif))
    write_picture(picture, tmp_path / "out.jpg", settings={"text": "x" * 300})
    assert read_settings(tmp_path / "out.jpg") == {"text": "x" * 300}
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.getexif()[ExifTags.Base.Make] == "Maker"
    assert "maker's notes" in caplog.text
    write_picture(picture, tmp_path / "out.webp", settings={"text": "x" * 300})
    with Image.open(tmp_path / "out.webp") as image:
        assert len(image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote]) == 65400


@pytest.mark.parametrize("said", [b"ASCII\0\0\0a holiday", b"UNICODE\0" + "a holiday".encode("utf-16")])
def test_the_comment_of_the_source_is_kept_with_the_settings(tmp_path, said):
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: said}
    first, second = tmp_path / "a.jpg", tmp_path / "b.webp"
    write_picture(colour_picture(exif=exif.tobytes()), first, settings={"seed": 3})
    assert read_settings(first) == {"seed": 3, "comment": "a holiday"}
    write_picture(read_picture(first), second, settings={"seed": 4})  # settings of an earlier run are not a comment
    assert read_settings(second) == {"seed": 4}


def test_settings_of_other_programs_are_not_ours(given_file):
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: b"ASCII\0\0\0a holiday"}
    assert read_settings(given_file("a.jpg", Image.fromarray(COLOURS), "JPEG", exif=exif)) is None
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: b"ASCII\0\0\0[1, 2]"}
    assert read_settings(given_file("a.png", Image.fromarray(COLOURS), exif=exif)) is None
    with pytest.raises(InputError, match="not a picture"):
        read_settings(given_file("b.png", b"words"))


def test_a_profile_goes_only_where_it_fits(tmp_path, caplog):
    gray = b"\0" * 16 + b"GRAY" + b"\0" * 108
    for suffix, gray_picture, icc, kept in [(".png", True, gray, True), (".png", True, SRGB, False),
                                            (".png", False, gray, False), (".webp", True, gray, False),
                                            (".webp", True, SRGB, True), (".jpg", True, gray, True)]:
        caplog.clear()
        path = tmp_path / f"a{suffix}"
        write_picture(colour_picture(icc=icc, gray=gray_picture), path, overwrite=True)
        with Image.open(path) as image:
            assert ("icc_profile" in image.info) == kept, (suffix, gray_picture, kept)
        assert ("dropped" in caplog.text) != kept


def test_jpeg_lays_transparency_over_white(tmp_path, caplog):
    picture = Picture(torch.zeros(3, 16, 16), torch.zeros(1, 16, 16))
    write_picture(picture, tmp_path / "a.jpg")
    assert read_picture(tmp_path / "a.jpg").rgb.min() > 0.98
    assert "transparency" in caplog.text


def test_values_out_of_range_are_clamped(tmp_path):
    write_picture(Picture(torch.tensor([-0.5, 0.5, 1.5]).view(3, 1, 1).half()), tmp_path / "a.png")
    assert pixels(read_picture(tmp_path / "a.png")).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("suffix, limit", [(".jpg", 65500), (".webp", 16383)])
def test_side_limits_are_those_of_the_writers(tmp_path, suffix, limit):
    path = tmp_path / f"a{suffix}"
    check_output(path, limit, 1)
    write_picture(Picture(torch.zeros(3, 1, limit)), path)
    with Image.open(path) as image:
        assert image.size == (limit, 1)
    for size in ((limit + 1, 1), (1, limit + 1)):
        with pytest.raises(InputError, match=str(limit)):
            check_output(tmp_path / f"b{suffix}", *size)
    check_output(tmp_path / "b.png", limit + 1, 1)


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(InputError, match=r"\.tiff"):
        output_format(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="use .png"):
        write_picture(colour_picture(), tmp_path / "a")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="folder"):
        check_output(tmp_path / "folder.png", 1, 1, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_files_are_not_replaced_unasked(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(InputError, match="--overwrite"):
        write_picture(colour_picture(), path)
    assert path.read_bytes() == b"precious"
    write_picture(colour_picture(), path, overwrite=True)
    assert read_picture(path).rgb.shape == (3, 4, 5)
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_link_is_not_replaced_unasked(tmp_path):
    path = tmp_path / "a.png"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="--overwrite"):
        write_picture(colour_picture(), path)
    assert path.is_symlink()


def test_a_file_that_appears_during_the_work_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save = Image.Image.save

    def slow(self, *args, **options):
        save(self, *args, **options)
        path.write_bytes(b"precious")
    monkeypatch.setattr(Image.Image, "save", slow)
    with pytest.raises(InputError, match="meanwhile"):
        write_picture(colour_picture(), path)
    assert path.read_bytes() == b"precious" and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("target", ["PIL.Image.Image.save", "os.replace", "os.fsync"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, target, error):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def stop(*args, **options):
        if target.endswith("save"):
            args[1].write(b"half a picture")
        raise error
    monkeypatch.setattr(target, stop)
    with pytest.raises(error):
        write_picture(colour_picture(), path, overwrite=True)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.png"]


def test_long_names_new_folders_and_permissions(tmp_path):
    path = tmp_path / "deep" / "er" / ("ü" * 120 + ".png")
    write_picture(colour_picture(), path)
    assert read_picture(path).rgb.shape == (3, 4, 5)
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(4))))
def test_png_round_trip(tmp_path_factory, values):
    values[..., 3] |= 1  # what is invisible may change
    path = tmp_path_factory.getbasetemp() / "round.png"
    rgb, alpha = torch.from_numpy(values).permute(2, 0, 1).float().div(255).split((3, 1))
    write_picture(Picture(rgb, alpha), path, overwrite=True)
    picture = read_picture(path)
    assert torch.equal(picture.rgb, rgb) and torch.equal(picture.alpha, alpha)


# -- folders -------------------------------------------------------------------------------------------------------

def test_pictures_of_folders(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "sub/deeper/d.tiff", ".hidden/e.png", "sub/.f.png", "notes.txt"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"x")
    (tmp_path / "photos" / "folder.png").mkdir()
    photos, single = tmp_path / "photos", tmp_path / "photos" / ".hidden" / "e.png"
    names = [str(name) for _, name in find_pictures([photos])]
    assert names == ["a.jpg", "b.PNG", os.path.join("sub", "c.webp"), os.path.join("sub", "deeper", "d.tiff")]
    assert all(path == photos / name for path, name in find_pictures([photos]))
    assert find_pictures([single, tmp_path / "none.png"]) == [(single, Path("e.png")),
                                                              (tmp_path / "none.png", Path("none.png"))]
    assert len(find_pictures([photos], tmp_path / "results")) == len(find_pictures([photos], photos)) == 4
    assert [str(name) for _, name in find_pictures([photos], photos / "sub")] == ["a.jpg", "b.PNG"]
    assert len(find_pictures([photos / "sub"], photos / "sub")) == 2
    (tmp_path / "empty").mkdir()
    ((source, _),) = find_pictures([tmp_path / "empty"])
    with pytest.raises(InputError, match="empty: no pictures in this folder"):
        read_picture(source)
