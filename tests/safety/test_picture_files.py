"""One reader of pictures: every mode a file may have, through every reader that a person's pictures come in by."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import Tensor

from mlcm_rl.data.pairs import PairTable
from mlcm_rl.data.picture_files import pictures_of, read_picture
from mlcm_rl.data.prompts import CaptionedImages, Prompt
from mlcm_rl.evaluation import instruments
from mlcm_rl.rewards.folder import read_pictures, score_files

SIDE = 8
PLAIN = Image.new("RGB", (SIDE, SIDE), (10, 200, 30))


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def png(color: int, depth: int, pixel: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of SIDE x SIDE equal pixels, of a kind that Pillow does not write."""
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, color, 0, 0, 0)
    row = b"\0" + pixel * (SIDE * depth // 8 if depth < 8 else SIDE)  # `pixel` is a byte of several below 8 bits
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(row * SIDE)), (b"IEND", b"")]
    crcs = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(crcs)


def tagged(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = turn
    return exif


def halves(first: str, second: str, mode: str = "RGB") -> Image.Image:
    """Left and right."""
    image = Image.new(mode, (SIDE, SIDE), first)
    image.paste(second, (SIDE // 2, 0, SIDE, SIDE))
    return image


GREY_16 = struct.pack(">H", 0x4040)
PALETTE = (b"PLTE", bytes([0, 0, 0, 200, 100, 50]))
ANIMATED = [Image.new("RGBA", (SIDE, SIDE), colour) for colour in ("red", "blue")]
ONE_COLOUR = {  # the file, and the colour that it shows
    "plain": (encoded(PLAIN), (10, 200, 30)),
    "16-bit grey": (png(0, 16, GREY_16), (64, 64, 64)),
    "16-bit grey, clear": (png(0, 16, GREY_16, (b"tRNS", GREY_16)), (255, 255, 255)),
    "16-bit grey, another clear": (png(0, 16, GREY_16, (b"tRNS", b"\x40\x41")), (64, 64, 64)),
    "16-bit grey and alpha": (png(4, 16, b"\x00\x00\x80\x00"), (127, 127, 127)),
    "16-bit RGB": (png(2, 16, b"\x80\x00\x10\x00\x00\x00"), (128, 16, 0)),
    "16-bit RGB, one clear": (
        png(2, 16, b"\x80\x00\x10\x00\x00\x00", (b"tRNS", b"\x80\x00\x10\x00\x00\x00")),
        (255, 255, 255),
    ),
    "16-bit RGB, one dark clear": (png(2, 16, b"\x00\x00" * 3, (b"tRNS", b"\x00\x55" * 3)), (255, 255, 255)),
    "16-bit RGB, another dark clear": (png(2, 16, b"\x55\x00" * 3, (b"tRNS", b"\x00\x55" * 3)), (85, 85, 85)),
    "1-bit grey, clear": (png(0, 1, b"\xff", (b"tRNS", b"\x00\x01")), (255, 255, 255)),
    "1-bit grey, another clear": (png(0, 1, b"\x00", (b"tRNS", b"\x00\x01")), (0, 0, 0)),
    "2-bit grey, clear": (png(0, 2, b"\x55", (b"tRNS", b"\x00\x01")), (255, 255, 255)),
    "2-bit grey, another clear": (png(0, 2, b"\x55", (b"tRNS", b"\x00\x02")), (85, 85, 85)),
    "4-bit grey, clear": (png(0, 4, b"\x55", (b"tRNS", b"\x00\x05")), (255, 255, 255)),
    "4-bit grey, another clear": (png(0, 4, b"\x55", (b"tRNS", b"\x00\x06")), (85, 85, 85)),
    "16-bit RGBA": (png(6, 16, b"\x00\x00" * 3 + b"\x00\x00"), (255, 255, 255)),
    "grey": (encoded(PLAIN.convert("L")), (124, 124, 124)),
    "grey and alpha": (encoded(Image.new("LA", (SIDE, SIDE), (0, 0))), (255, 255, 255)),
    "grey, one clear": (encoded(Image.new("L", (SIDE, SIDE), 7), transparency=7), (255, 255, 255)),
    "black and white": (encoded(Image.new("1", (SIDE, SIDE), 0)), (0, 0, 0)),
    "palette": (png(3, 8, b"\x01", PALETTE), (200, 100, 50)),
    "palette, clear": (png(3, 8, b"\x01", PALETTE, (b"tRNS", b"\xff\x00")), (255, 255, 255)),
    "palette, half clear": (png(3, 8, b"\x01", PALETTE, (b"tRNS", b"\xff\x80")), (227, 177, 152)),
    "RGB, one clear": (encoded(PLAIN, transparency=(10, 200, 30)), (255, 255, 255)),
    "RGBA": (encoded(Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))), (255, 255, 255)),
    "WebP RGBA": (encoded(Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "CMYK": (encoded(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
    "BMP": (encoded(PLAIN, "BMP"), (10, 200, 30)),
    "GIF, two frames": (encoded(ANIMATED[0], "GIF", save_all=True, append_images=ANIMATED[1:]), (255, 0, 0)),
    "PNG, two frames": (encoded(ANIMATED[0], save_all=True, append_images=ANIMATED[1:]), (255, 0, 0)),
    "WebP, two frames": (
        encoded(ANIMATED[0], "WEBP", save_all=True, append_images=ANIMATED[1:], lossless=True),
        (255, 0, 0),
    ),
}


class Seeing:
    """A reward that keeps the pictures that it was asked for."""

    differentiable, needs_prompt, languages = False, False, ()

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.seen = images
        return images.mean((1, 2, 3))


def by_captions(folder: Path, data: bytes) -> Tensor:
    (folder / "a.png").write_bytes(data)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "prompts": ["x"]}))
    return next(CaptionedImages(folder, SIDE).pictures())


def by_real_images(folder: Path, data: bytes) -> Tensor:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(data)
    return next(instruments.real_pictures(folder, SIDE, 1))[0]


def by_pair_folder(folder: Path, data: bytes) -> Tensor:
    (folder / "a.png").write_bytes(data)
    (folder / "b.png").write_bytes(encoded(Image.new("RGB", (4, 4))))
    (folder / "metadata.jsonl").write_text(json.dumps({"prompt": "x", "chosen": "a.png", "rejected": "b.png"}))
    return PairTable(folder).pictures(0, SIDE)[0]


def by_pair_table(folder: Path, data: bytes) -> Tensor:
    columns = {"prompt": ["x"], "chosen": [data], "rejected": [encoded(Image.new("RGB", (4, 4)))]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
    return PairTable(folder / "t.parquet").pictures(0, SIDE)[0]


def by_score(folder: Path, data: bytes) -> Tensor:
    (folder / "a.png").write_bytes(data)
    reward = Seeing()
    list(score_files(reward, "seeing", [folder / "a.png"], [Prompt("x", "en")], 4))
    return (reward.seen[0] * 255).round().byte()


def by_check(folder: Path, data: bytes) -> Tensor:
    (folder / "a.png").write_bytes(data)
    return (read_pictures([folder / "a.png"], SIDE)[0] * 255).round().byte()


READERS = [by_captions, by_real_images, by_pair_folder, by_pair_table, by_score, by_check]
READER = pytest.mark.parametrize("read", READERS, ids=[read.__name__ for read in READERS])
Read = Callable[[Path, bytes], Tensor]


@READER
@pytest.mark.parametrize("kind", ONE_COLOUR)
def test_a_picture_of_any_mode_has_the_colour_that_it_shows(tmp_path, read: Read, kind):
    data, colour = ONE_COLOUR[kind]
    pixels = read(tmp_path, data)
    assert (pixels.shape, pixels.dtype) == ((3, SIDE, SIDE), torch.uint8)
    assert (pixels.int() - torch.tensor(colour)[:, None, None]).abs().max() <= 2


@READER
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("turn", "light"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
def test_a_picture_is_turned_as_its_exif_says(tmp_path, read: Read, form, turn, light):
    pixels = read(tmp_path, encoded(halves("white", "black"), form, exif=tagged(turn))).float().mean(0)
    lightest = {"left": pixels[:, 0], "right": pixels[:, -1], "top": pixels[0], "bottom": pixels[-1]}
    assert max(lightest, key=lambda side: lightest[side].mean().item()) == light


def test_a_16_bit_grey_is_turned_too():
    image = Image.new("I;16", (SIDE, SIDE), 0)
    image.paste(65535, (0, 0, SIDE, 2))
    read = read_picture(encoded(image, exif=tagged(6)), "x")
    assert (read.getpixel((SIDE - 1, 4)), read.getpixel((0, 4))) == ((255,) * 3, (0,) * 3)


@READER
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF"])
def test_a_truncated_picture_is_told_by_its_name(tmp_path, read: Read, form):
    noise = Image.effect_noise((64, 64), 90)
    data = encoded(noise, form)
    if read is by_score:
        (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
        (answer,) = score_files(Seeing(), "seeing", [tmp_path / "a.png"], [Prompt("x", "en")], 4)
        assert "a.png is not a readable picture" in answer.why
        return
    with pytest.raises(ValueError, match=r"(a\.png|chosen) is not a readable picture"):
        read(tmp_path, data[: len(data) // 2])


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.gif", "._a.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in pictures_of(tmp_path)] == ["a.jpg", "b.PNG", "c.gif"]


def test_a_link_that_leads_nowhere_and_a_pipe_are_named_and_not_missed(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(PLAIN))
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "c.png")
    files = pictures_of(tmp_path)
    first, *others = score_files(Seeing(), "seeing", files, [Prompt("x", "en")] * 3, 4)
    assert first.score is not None
    assert [answer.file for answer in others] == ["b.png", "c.png"]
    assert "No such file" in others[0].why
    assert "a pipe" in others[1].why


def test_all_that_cannot_be_read_is_named_at_once(tmp_path):
    lines = [{"file_name": f"{i}.png", "prompts": ["x"]} for i in range(9)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(encoded(PLAIN) if i % 4 == 0 else b"no picture")
    with pytest.raises(ValueError, match=r":2: .*1\.png is .*:3: .*2\.png.*:7: .*6\.png .*; and 1 more$") as error:
        list(CaptionedImages(tmp_path, SIDE).pictures())
    assert str(error.value).count("is not a readable picture") == 5
    with pytest.raises(ValueError, match=r"real_images: .*1\.png .*2\.png .*; and 1 more$"):
        list(instruments.real_pictures(tmp_path, SIDE, 2))
