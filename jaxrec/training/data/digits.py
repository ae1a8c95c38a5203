"""Handwritten digits of 8 x 8 pixels, which ship with scikit-learn.

Alpaydin & Kaynak, Optical recognition of handwritten digits (1998), UCI machine learning
repository, the part that was kept for testing.
"""

from typing import NamedTuple

import numpy as np

from jaxrec.errors import UserError


class Digits(NamedTuple):
    """Images and what they show, in a random order that is always the same."""

    images: np.ndarray  # float32 (1797 8 8 1) in [0, 1]: x down, y right
    labels: np.ndarray  # int32 (1797)


def load_digits() -> Digits:
    """Reads them.

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            "The digits come with scikit-learn, which is not installed. Install jaxrec with the"
            " extra `experiments`."
        ) from error
    rows, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (rows[order].astype(np.float32) / 16).reshape(-1, 8, 8, 1)
    return Digits(images, labels[order].astype(np.int32))
