import numpy as np
import pytest

from jaxrec.testing import assert_close


def test_close_arrays_pass():
    assert_close([1.0, 2.0], [1.0, 2.0 + 1e-7], rtol=1e-7)
    assert_close(np.zeros((0, 3)), np.zeros((0, 3)))


@pytest.mark.parametrize(
    ("got", "expected", "says"),
    [
        (
            [1.0, 2.5],
            [1.0, 2.0],
            r"x: 1 of 2 differ .* worst at \(1,\): 2.5 instead of 2.0, off by 5.00e-01",
        ),
        ([[1.0]], [1.0], r"x: shape \(1, 1\), expected \(1,\)"),
        ([1.0, np.nan], [1.0, 2.0], "x: 1 of 2 are not finite"),
        ([1.0, 2.0], [np.inf, 2.0], "x: 1 of 2 expected are not finite"),
        ([1j], [0j], "off by 1.00e"),
    ],
)
def test_the_message_says_where_and_how_much(got, expected, says):
    with pytest.raises(AssertionError, match=says):
        assert_close(got, expected, atol=1e-3, name="x")
