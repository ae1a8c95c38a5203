"""The picture of a wavefront: its pixels are the changes, its line is what is frozen."""

import base64
import re
import zlib

import numpy as np

from jaxrec.analysis.wavefront import CELL, COLOURS, MARGIN, wavefront_svg

CHANGE = np.array(
    [[np.nan, np.nan, 1.0, np.nan, np.nan], [np.nan, np.nan, 0.001, 5.0, np.nan]], np.float32
)


def pixels(svg):
    """uint8 (height width 3) of the first image."""
    data = base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1])
    width, height = np.frombuffer(data[16:24], ">u4")
    start = data.index(b"IDAT")
    size = int.from_bytes(data[start - 4 : start], "big")
    lines = zlib.decompress(data[start + 4 : start + 4 + size])
    lines = np.frombuffer(lines, np.uint8).reshape(height, 1 + 3 * width)
    return lines[:, 1:].reshape(height, width, 3)


def test_pixels_are_changes():
    shown = pixels(wavefront_svg(CHANGE, np.array([3, 4]), prompt=2))
    assert shown.shape == (2, 4, 3)
    still, moving, white = COLOURS[0], COLOURS[-1], [255] * 3
    expected = [[white, white, moving, white], [white, white, still, moving]]
    np.testing.assert_allclose(shown, expected, atol=1)


def test_the_line_is_what_is_frozen():
    svg = wavefront_svg(CHANGE, np.array([3, 4]), prompt=2)
    points = re.search(r'points="([^"]+)"', svg)[1].split()
    x, top = MARGIN + 3 * CELL, MARGIN
    assert points[:2] == [f"{x},{top}", f"{x},{top + CELL}"]
    assert points[2:] == [f"{x + CELL},{top + CELL}", f"{x + CELL},{top + 2 * CELL}"]
