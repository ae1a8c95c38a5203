"""RandAugment: a few operations drawn from fifteen, all about as strong.

Each of `COUNT` draws takes one of the operations, at equal odds, and applies it with probability
1/2 at a strength of N(9, 1/2), cut to 0 .. 10. This is the set that is known as rand-m9-mstd0.5;
a parameter below is what strength 10 means.

Cubuk et al., RandAugment (2019), arXiv:1909.13719, section 3.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

COUNT = 2
PROBABILITY = 0.5
STRENGTH, DEVIATION, STRONGEST = 9.0, 0.5, 10.0
GREY = (124, 116, 104)  # the mean colour of ImageNet, where an image is moved away

Operation = Callable[[Any, float, np.random.Generator], Any]
"""(image, strength in 0 .. 1, random signs) -> image of the same size."""


def randaugment(image: Any, rng: np.random.Generator) -> Any:
    """Changes a Pillow image in RGB; a function of the state of rng."""
    for i in rng.integers(len(OPERATIONS), size=COUNT):
        if rng.random() < PROBABILITY:
            strength = np.clip(rng.normal(STRENGTH, DEVIATION), 0.0, STRONGEST) / STRONGEST
            image = OPERATIONS[i](image, float(strength), rng)
    return image


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _plain(name: str) -> Operation:
    """An operation of `PIL.ImageOps` that has no strength."""

    def operation(image: Any, _: float, __: np.random.Generator) -> Any:
        from PIL import ImageOps

        return getattr(ImageOps, name)(image)

    return operation


def _enhanced(name: str) -> Operation:
    """An enhancement of `PIL.ImageEnhance` by a factor that grows from 0.1 to 1.9."""

    def operation(image: Any, strength: float, _: np.random.Generator) -> Any:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(0.1 + 1.8 * strength)

    return operation


def _posterize(image: Any, strength: float, _: np.random.Generator) -> Any:
    from PIL import ImageOps

    return ImageOps.posterize(image, max(int(4 * strength), 1))


def _solarize(image: Any, strength: float, _: np.random.Generator) -> Any:
    from PIL import ImageOps

    return ImageOps.solarize(image, int(256 * strength))


def _solarize_add(image: Any, strength: float, _: np.random.Generator) -> Any:
    """Makes the darker half of all values brighter."""
    added = min(int(110 * strength), 128)
    return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


def _rotate(image: Any, strength: float, rng: np.random.Generator) -> Any:
    from PIL import Image

    degrees = _signed(30 * strength, rng)
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=GREY)


def _moved(along: str, amount: float, axis: int) -> Operation:
    """A shear ("shear") or a shift by a part of the side ("shift") along one axis."""

    def operation(image: Any, strength: float, rng: np.random.Generator) -> Any:
        from PIL import Image

        matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        size = image.size[axis] if along == "shift" else 1
        # Row `axis` of the matrix: the other coordinate's factor, or the constant.
        place = 3 * axis + (2 if along == "shift" else 1 - axis)
        matrix[place] = _signed(amount * strength * size, rng)
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix,
            resample=Image.Resampling.BICUBIC,
            fillcolor=GREY,
        )

    return operation


OPERATIONS: tuple[Operation, ...] = (
    _plain("autocontrast"),
    _plain("equalize"),
    _plain("invert"),
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _enhanced("Color"),
    _enhanced("Contrast"),
    _enhanced("Brightness"),
    _enhanced("Sharpness"),
    _moved("shear", 0.3, 0),
    _moved("shear", 0.3, 1),
    _moved("shift", 0.45, 0),
    _moved("shift", 0.45, 1),
)
