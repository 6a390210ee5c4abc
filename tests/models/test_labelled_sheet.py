"""Sheets with labels: pictures where they belong, and text that is cut where it does not fit."""

import numpy as np
import pytest
from PIL import Image

from mlcm_rl.models import labelled_sheet
from mlcm_rl.models.labelled_sheet import GAP, MIN_WIDTH, PADDING, PAPER, labelled

LINE = 11 + 2 * PADDING


def test_pictures_are_in_their_row_and_column_under_their_labels():
    images = [Image.new("RGB", (32, 24), (40 * i, 0, 0)) for i in range(4)]
    sheet = labelled(images, ["000  a cat", "001  a very long prompt " * 9], ["2 steps", "4 steps"])
    assert sheet.size == (MIN_WIDTH, LINE + 2 * (LINE + 24 + GAP))
    for i, image in enumerate(images):
        row, column = divmod(i, 2)
        left, top = GAP + column * (32 + GAP), 2 * LINE + row * (LINE + 24 + GAP)
        assert sheet.crop((left, top, left + 32, top + 24)).tobytes() == image.tobytes()
    pixels = np.asarray(sheet)
    labels = [pixels[:LINE], pixels[LINE : 2 * LINE], pixels[2 * LINE + 24 + GAP : 3 * LINE + 24 + GAP]]
    assert all((label != np.array(PAPER)).any() for label in labels)
    assert (labels[2][:, -GAP:] == np.array(PAPER)).all()  # cut before the edge


def test_columns_too_narrow_for_their_labels_have_what_differs():
    images = [Image.new("RGB", (64, 64))] * 2
    short, shared = (
        labelled(images, ["a"], names) for names in (["2 steps", "8 steps"], ["seed 0, 2 steps", "seed 0, 8 steps"])
    )
    assert short.tobytes() == shared.tobytes()
    wide = [Image.new("RGB", (256, 64))] * 2
    assert labelled(wide, ["a"], ["seed 0, 2 steps"] * 2).tobytes() != labelled(wide, ["a"], ["2 steps"] * 2).tobytes()


def test_letters_that_no_font_has_are_known():
    assert labelled_sheet.can_write("a cat")
    assert not labelled_sheet.can_write("\U0010fffd")


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("a cat", 5, "a cat"),
        ("a cat sits", 8, "a cat..."),
        ("a cat", 3, "..."),
        ("a cat", 1, "..."),
        ("a" * 100_000, 10, "aaaaaaa..."),
        ("", 1, ""),
    ],
)
def test_as_much_is_shown_as_fits_in_few_looks(text, width, shown):
    looks = []

    def fits(one: str) -> bool:
        looks.append(one)
        return len(one) <= width

    assert labelled_sheet._fitting(text, fits) == shown
    assert len(looks) <= 14
