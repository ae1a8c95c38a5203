"""Digits as images, and that a classifier of images learns from them."""

import dataclasses

import numpy as np
import pytest
from sklearn import datasets

from jaxrec.models.plstm_vision import vision_config
from jaxrec.training.classification import (
    ClassificationData,
    ClassificationSettings,
    Examples,
    train_classifier,
)
from jaxrec.training.data.digits import load_digits

HELD_OUT = 200


def test_they_are_those_of_the_package_in_another_order():
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.float32
    assert labels.dtype == np.int32 and (images.min(), images.max()) == (0, 1)
    rows, wanted = datasets.load_digits(return_X_y=True)
    got = {
        (label, row.tobytes()) for label, row in zip(labels, images.reshape(-1, 64), strict=True)
    }
    assert got == {
        (label, row.tobytes())
        for label, row in zip(wanted, (rows / 16).astype(np.float32), strict=True)
    }
    assert not np.array_equal(labels, wanted)


@pytest.mark.slow  # a model to compile and train
def test_plstm_learns_them():
    """In 48 steps; measured: 0.80 of the held-out ones."""
    images, labels = load_digits()
    data = ClassificationData(
        train=Examples(images[HELD_OUT:], labels[HELD_OUT:]),
        valid=Examples(images[:HELD_OUT], labels[:HELD_OUT]),
    )
    config = vision_config(width=16, heads=2, layers=1, patch=2, grid=(4, 4), classes=10, inputs=1)
    settings = ClassificationSettings(epochs=2, batch=64)
    settings = dataclasses.replace(
        settings, optimizer=dataclasses.replace(settings.optimizer, warmup_steps=5)
    )
    result = train_classifier(config, data, settings)
    assert result.losses[-5:].mean() < 0.7 * result.losses[:5].mean()
    assert result.accuracy > 0.6
