"""What one node of a grid sends: a direction in mode P, everywhere in mode D."""

import numpy as np
import pytest

from jaxrec.analysis.impulse import diffusion, impulse_figure, impulse_response, propagation


def reached(gates, orientations=(0,), shape=(9, 8), source=(2, 1)):
    return impulse_response(gates, shape, source, orientations=orientations)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0])
def test_mode_p_keeps_its_mass_and_its_direction(angle):
    response = reached(propagation(angle))
    x, y = np.indices(response.shape)
    for steps in range(1, 7):  # before it leaves the grid
        front = np.where(x + y == 3 + steps, response, 0.0)
        np.testing.assert_allclose(front.sum(), 1, atol=1e-6)
        np.testing.assert_allclose((front * (x - 2)).sum(), steps * angle, atol=1e-5)
    assert not response[:2].any() and not response[:, :1].any() and response[2, 1] == 0


def test_mode_d_reaches_every_node_ahead_once():
    response = reached(diffusion())
    want = np.zeros((9, 8))
    want[2:, 1:] = 1
    want[2, 1] = 0
    np.testing.assert_allclose(response, want, atol=1e-6)
    x, y = np.indices(response.shape)
    decayed = reached(diffusion(0.9, 0.9))
    steps = np.maximum(x - 2 + y - 1 - 1, 0)  # the first step is the source's own
    np.testing.assert_allclose(decayed, want * 0.9**steps, atol=1e-6)


def test_four_orientations_reach_all_four_quarters():
    response = reached(diffusion(), (0, 1, 2, 3), (7, 7), (3, 3))
    np.testing.assert_allclose(response, response[::-1], atol=1e-6)
    np.testing.assert_allclose(response, response[:, ::-1], atol=1e-6)
    assert response[0, 0] == 1 and response[3, 0] == 2 and response[3, 3] == 0


def test_the_figure_has_its_panels():
    figure = impulse_figure(8, angles=(0.2, 0.6))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == ["P, a = 0.2", "P, a = 0.6"] and len(titles) == 5
    assert all(len(axes.images) == 1 for axes in figure.axes)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"source \(9, 0\) lies outside of the grid \(9, 8\)"):
        reached(diffusion(), source=(9, 0))
    with pytest.raises(ValueError, match=r"angle must lie in \[0, 1\]"):
        propagation(1.5)
    with pytest.raises(ValueError, match="transition and turn must lie in"):
        diffusion(1.0, -2)
    with pytest.raises(ValueError, match="side must be >= 8, got 4"):
        impulse_figure(4)
