"""Folders of images, one folder for each class, as ImageNet is kept; read with Pillow.

Training takes a random part of an image at one size, perhaps mirrored, and changes it: made grey,
solarised or blurred, with its colours moved, as DeiT III has it ("three"), or by `randaugment`.
Testing takes the middle.

Touvron et al., DeiT III: revenge of the ViT (2022), arXiv:2204.07118, section 3.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxrec.errors import UserError
from jaxrec.training.data.randaugment import randaugment

Augmentation = Literal["three", "randaugment"]

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
LEAST_AREA = 0.08  # of the part of an image that is taken
RATIOS = (3 / 4, 4 / 3)  # of its sides
JITTER = 0.3  # by how much brightness, contrast and saturation change at most
CROPS_TRIED = 10


class Images(NamedTuple):
    """Some images and their classes."""

    images: np.ndarray  # uint8 (b x y 3): x down, y right
    labels: np.ndarray  # int32 (b)


class ImageFolder:
    """The images below `folder/<class>/`, classes in the order of their names.

    Args:
      folder: such as imagenet/train.
      size: side of the squares that images become, in pixels, >= 1.
      augmentation: what is done to a part of an image in training.
      workers: threads that read.

    Raises:
      UserError: Pillow is not installed, there are no such folders or images, or no such
        augmentation.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int,
        *,
        augmentation: Augmentation = "three",
        workers: int = 8,
    ) -> None:
        _pillow()
        if augmentation not in get_args(Augmentation):
            raise UserError(
                f"augmentation must be one of {', '.join(get_args(Augmentation))}; got"
                f" {augmentation!r}."
            )
        if size < 1:
            raise UserError(f"The side of images must be >= 1 pixel, got {size}.")
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}. Give one with a folder for each class.")
        self.classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        if not self.classes:
            raise UserError(f"{folder} holds no folders; expected one for each class of images.")
        self.files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            files = [p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES]
            if not files:
                raise UserError(
                    f"{folder / name} holds no images; expected files that end in"
                    f" {', '.join(SUFFIXES)}."
                )
            self.files += sorted(files)
            labels += [label] * len(files)
        self.labels = np.array(labels, np.int32)
        self.size, self.augmentation = size, augmentation
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images")

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files)

    def read(self, indices: Sequence[int], seeds: Sequence[Sequence[int]] | None = None) -> Images:
        """Reads images.

        Args:
          indices: which.
          seeds: of NumPy's `default_rng`, one for each, by which it is changed; None: the middle of
            each, unchanged.

        Raises:
          UserError: a file is no image that Pillow reads.
        """
        rngs = [None] * len(indices) if seeds is None else map(np.random.default_rng, seeds)
        read = self._pool.map(self._one, indices, rngs)
        return Images(np.stack(list(read)), self.labels[np.asarray(indices)])

    def _one(self, index: int, rng: np.random.Generator | None) -> np.ndarray:
        from PIL import Image

        file = self.files[index]
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except Exception as error:  # its decoders raise whatever broken bytes lead them to
            raise UserError(f"{file} is no image that can be read ({error}).") from error
        if rng is None:
            return np.asarray(_middle(image, self.size), np.uint8)
        image = _part(image, self.size, rng)
        changed = _three(image, rng) if self.augmentation == "three" else randaugment(image, rng)
        return np.asarray(changed, np.uint8)


def _pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise UserError(
            'Reading images needs Pillow. Install it: pip install "jaxrec[images]".'
        ) from error


def _middle(image: Any, size: int) -> Any:
    """The square in the middle, all of the shorter side."""
    from PIL import Image

    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return image.crop(box).resize((size, size), Image.Resampling.BICUBIC)


def _part(image: Any, size: int, rng: np.random.Generator) -> Any:
    """A random part at this size, in half of the cases mirrored."""
    from PIL import Image, ImageOps

    image = image.crop(_box(image.size, rng)).resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _three(image: Any, rng: np.random.Generator) -> Any:
    """Grey, solarised or blurred, and its colours moved."""
    from PIL import ImageEnhance, ImageFilter, ImageOps

    match rng.integers(3):
        case 0:
            image = ImageOps.grayscale(image).convert("RGB")
        case 1:
            image = ImageOps.solarize(image, threshold=128)
        case _:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    moved = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for i in rng.permutation(len(moved)):
        image = moved[i](image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    return image


def _box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random box of some area and shape inside the image; the middle if none is found to fit."""
    width, height = size
    for _ in range(CROPS_TRIED):
        area = width * height * rng.uniform(LEAST_AREA, 1.0)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
