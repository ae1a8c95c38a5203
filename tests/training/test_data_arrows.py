"""Arrows and discs: labels are true of the geometry, sizes, and what is refused."""

import dataclasses
import math

import numpy as np
import pytest

from jaxrec.training.data.arrows import ArrowsConfig, arrow, picture, pictures, scaled

SMALL = ArrowsConfig(
    image_size=(48, 48),
    boundary_padding=6,
    min_radius=4,
    max_radius=7,
    arrow_length_min=6,
    arrow_length_max=10,
)


def passes_at(of):
    """Least distance from the disc's centre of the ray that the arrow begins, in radii."""
    dx, dy = of.circle_x - of.x, of.circle_y - of.y
    ahead = dx * math.cos(of.angle) + dy * math.sin(of.angle)
    beside = abs(dy * math.cos(of.angle) - dx * math.sin(of.angle))
    return (beside if ahead > 0 else math.hypot(dx, dy)) / of.radius


@pytest.mark.parametrize("size", [48, 96, 192])
def test_an_arrow_points_at_its_disc_if_the_label_says_so_and_clearly(size):
    config = dataclasses.replace(SMALL, image_size=(size, size))
    hits = 0
    for i in range(200):
        of = arrow(config, i)
        if of.draw < config.intersection_ratio:
            assert passes_at(of) <= 1 / 1.2 + 1e-9
            hits += 1
        else:
            assert passes_at(of) >= 1.2 - 1e-9
    assert 70 < hits < 130


def test_what_is_drawn_lies_where_the_numbers_say():
    for i in range(20):
        of = arrow(SMALL, i)
        black = picture(SMALL, of)[..., 0] == 0
        rows, columns = np.indices(black.shape)
        to_disc = np.hypot(columns - of.circle_x, rows - of.circle_y)
        to_arrow = np.hypot(columns - of.x, rows - of.y)
        assert np.all(black[to_disc < of.radius - 1])
        assert not np.any(black[(to_disc > of.radius + 2) & (to_arrow > of.length / 2 + 3)])
        assert black[int(of.y), int(of.x)]


def test_pictures_are_a_function_of_seed_and_number():
    whole, part = pictures(SMALL, 0, 6), pictures(SMALL, 4, 2)
    np.testing.assert_array_equal(whole.images[4:], part.images)
    np.testing.assert_array_equal(whole.labels[4:], part.labels)
    assert whole.images.shape == (6, 48, 48, 3) and whole.images.dtype == np.uint8
    other = pictures(dataclasses.replace(SMALL, seed=1), 0, 6)
    assert np.any(other.images != whole.images)


def test_rows_and_columns_may_differ():
    assert pictures(dataclasses.replace(SMALL, image_size=(56, 64)), 0, 1).images.shape == (
        *(1, 56, 64),
        3,
    )


def test_everything_scales_with_the_picture():
    quarter = scaled(ArrowsConfig(), 0.25)
    assert quarter.image_size == (48, 48) and quarter.max_radius == 8
    assert quarter.boundary_padding == 8 and quarter.arrow_width_max == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": (30, 48)}, "image_size less the padding on both sides must hold"),
        ({"min_radius": 8}, "needs 0 < min_radius <= max_radius, got 8 and 7"),
        ({"arrow_length_min": 0}, "0 < arrow_length_min"),
        ({"intersection_factor": 1.0}, "intersection_factor > 1"),
        ({"intersection_ratio": 1.5}, r"intersection_ratio in \[0, 1\]"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_there_must_be_something_to_draw():
    with pytest.raises(ValueError, match="start >= 0 and count >= 1, got -1 and 2"):
        pictures(SMALL, -1, 2)
