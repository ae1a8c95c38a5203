"""RandAugment: what each operation does to an image at a known strength."""

import numpy as np
import pytest
from PIL import Image

from jaxrec.training.data import randaugment as module
from jaxrec.training.data.randaugment import GREY, OPERATIONS, randaugment

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
NAMES = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add"),
    *("color", "contrast", "brightness", "sharpness"),
    *("shear_x", "shear_y", "shift_x", "shift_y"),
)


def applied(name, strength, pixels=COLOURS, seed=0):
    operation = OPERATIONS[NAMES.index(name)]
    return np.asarray(operation(Image.fromarray(pixels), strength, np.random.default_rng(seed)))


def test_what_changes_colours_changes_them_as_defined():
    np.testing.assert_array_equal(applied("invert", 0.9), 255 - COLOURS)
    np.testing.assert_array_equal(applied("posterize", 0.9), COLOURS & 0b11100000)
    bright = np.where(COLOURS < 230, COLOURS, 255 - COLOURS)
    np.testing.assert_array_equal(applied("solarize", 0.9), bright)
    added = np.where(COLOURS < 128, COLOURS.astype(int) + 99, COLOURS)
    np.testing.assert_array_equal(applied("solarize_add", 0.9), added)
    brighter = np.clip(COLOURS * 1.72, 0, 255)
    np.testing.assert_allclose(applied("brightness", 0.9), brighter, atol=1.0)
    for name in ("color", "contrast", "brightness", "sharpness"):
        np.testing.assert_array_equal(applied(name, 0.5), COLOURS)  # a factor of 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "axis"), [("shift_x", 1), ("shift_y", 0)])
def test_shifts_move_the_image_by_a_part_of_its_side(name, axis, seed):
    side = COLOURS.shape[axis]
    strength = 3 / (0.45 * side)  # three pixels
    got = np.moveaxis(applied(name, strength, seed=seed), axis, 0)
    image = np.moveaxis(COLOURS, axis, 0)
    to_the_front = np.abs(got[:-3].astype(int) - image[3:]).max() <= 1
    to_the_back = np.abs(got[3:].astype(int) - image[:-3]).max() <= 1
    assert to_the_front != to_the_back
    empty = got[-3:] if to_the_front else got[:3]
    assert (empty == GREY).all()


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y"])
def test_what_bends_keeps_an_even_middle_and_greys_corners(name):
    even = np.full((31, 31, 3), 200, np.uint8)
    got = applied(name, 1.0, even)
    assert (got[12:19, 12:19] == 200).all() and (got == GREY).all(-1).any()
    assert (applied(name, 0.0, even) == 200).all()


def test_every_operation_is_drawn_and_half_of_the_draws_are_applied(monkeypatch):
    called = []

    def spy(i):
        return lambda image, strength, rng: called.append((i, strength)) or image

    monkeypatch.setattr(module, "OPERATIONS", tuple(spy(i) for i in range(len(OPERATIONS))))
    rng, image = np.random.default_rng(0), Image.fromarray(COLOURS)
    for _ in range(2000):
        assert randaugment(image, rng) is image
    indices, strengths = np.array(called).T
    assert len(OPERATIONS) == len(NAMES) and set(indices) == set(range(len(NAMES)))
    assert abs(len(called) - 2000) < 150  # two draws each, half of them applied
    assert abs(strengths.mean() - 0.9) < 0.01 and strengths.max() <= 1
    assert abs(strengths.std() - 0.05) < 0.01
