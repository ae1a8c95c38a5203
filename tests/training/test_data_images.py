"""Folders of images: which are read, what is changed, and what is refused."""

import sys

import numpy as np
import pytest
from PIL import Image

from jaxrec.errors import UserError
from jaxrec.training.data.images import ImageFolder


def write(folder, classes=("a", "b"), count=3, size=(20, 14)):
    """Images of one colour each, wider than high."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = rng.integers(0, 256, 3, np.uint8)
            pixels = np.broadcast_to(colour, (size[1], size[0], 3))
            Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name / f"{i}.png")
    return folder


def test_classes_are_folders_and_the_middle_is_read(tmp_path):
    write(tmp_path)
    strip = np.zeros((14, 20, 3), np.uint8)
    strip[:, 3:17] = 255  # the middle of an image that is 20 wide
    Image.fromarray(strip).save(tmp_path / "b" / "9.png")
    (tmp_path / "b" / "notes.txt").write_text("no image")
    data = ImageFolder(tmp_path, 8)
    assert data.classes == ("a", "b") and len(data) == 7
    got = data.read([6, 0])
    assert got.images.shape == (2, 8, 8, 3) and got.images.dtype == np.uint8
    np.testing.assert_array_equal(got.labels, [1, 0])
    assert got.images[0].min() == 255  # nothing but the middle
    np.testing.assert_array_equal(got.images[1], np.broadcast_to(got.images[1, 0, 0], (8, 8, 3)))


@pytest.mark.parametrize("augmentation", ["three", "randaugment"])
def test_changes_are_a_function_of_the_seed(tmp_path, augmentation):
    data = ImageFolder(write(tmp_path), 8, augmentation=augmentation)
    plain = data.read([2, 2, 2, 2]).images
    first, again = (data.read([2] * 4, [(0, i) for i in range(4)]).images for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != plain) and np.any(first[0] != first[1])
    other = data.read([2] * 4, [(1, i) for i in range(4)]).images
    assert np.any(first != other)


def test_grey_images_and_palettes_have_three_colours(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((6, 6), 7, np.uint8)).save(tmp_path / "a" / "0.png")
    Image.new("P", (6, 6), 3).save(tmp_path / "a" / "1.png")
    assert ImageFolder(tmp_path, 4).read([0, 1]).images.shape == (2, 4, 4, 3)


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        ImageFolder(tmp_path / "nowhere", 8)
    with pytest.raises(UserError, match="holds no folders; expected one for each class"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"a holds no images; expected files that end in .jpeg"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "a" / "0.png").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"0.png is no image that can be read"):
        ImageFolder(tmp_path, 8).read([0])
    with pytest.raises(UserError, match="must be >= 1 pixel, got 0"):
        ImageFolder(tmp_path, 0)
    with pytest.raises(UserError, match="augmentation must be one of three, randaugment; got 'no'"):
        ImageFolder(tmp_path, 8, augmentation="no")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"needs Pillow. Install it: pip install"):
        ImageFolder(tmp_path, 8)
