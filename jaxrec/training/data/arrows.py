"""Pictures of an arrow and a disc: does the arrow point at the disc?

What matters lies between two objects that may be far apart, and a model that has learned to follow
a direction can do so on a larger picture than it was trained on. Pictures are drawn when they are
asked for, a function of the seed and their number.

Pöppel et al., pLSTM: parallelizable linear source transition mark networks (2025),
arXiv:2506.11997, section 4.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

WHITE, BLACK = 255, 0
HEAD_ANGLE = 0.5  # radians between the shaft and each stroke of the head


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrowsConfig:
    """What is drawn; lengths in pixels. The defaults are those of the published data."""

    image_size: tuple[int, int] = (192, 192)  # rows, columns
    boundary_padding: int = 30  # no centre is nearer to the boundary
    min_radius: float = 15  # of the disc
    max_radius: float = 30
    arrow_length_min: float = 15
    arrow_length_max: float = 30
    arrow_width_min: float = 2
    arrow_width_max: float = 4  # not reached: widths are rounded down
    min_dist_x_factor: float = 2.0  # least distance of the centres in radii, seen round the edges
    min_dist_y_factor: float = 2.0
    intersection_factor: float = 1.2  # by how much the ray hits, or misses, the disc
    intersection_ratio: float = 0.5  # share of arrows that point at the disc
    seed: int = 43

    def __post_init__(self) -> None:
        if min(self.image_size) <= 2 * self.boundary_padding:
            raise ValueError(
                "ArrowsConfig: image_size must leave room between the padding of"
                f" {self.boundary_padding} on both sides, got {self.image_size}."
            )
        for low, high in (
            ("min_radius", "max_radius"),
            ("arrow_length_min", "arrow_length_max"),
            ("arrow_width_min", "arrow_width_max"),
        ):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise ValueError(
                    f"ArrowsConfig: needs 0 < {low} <= {high}, got {getattr(self, low)} and"
                    f" {getattr(self, high)}."
                )
        if not self.intersection_factor > 1 or not 0 <= self.intersection_ratio <= 1:
            raise ValueError(
                "ArrowsConfig: needs intersection_factor > 1 and intersection_ratio in [0, 1], got"
                f" {self.intersection_factor} and {self.intersection_ratio}."
            )


def scaled(config: ArrowsConfig, factor: float) -> ArrowsConfig:
    """Everything but the lines' widths at `factor` times the size, lengths rounded to pixels, as a
    small picture needs it; the size of a picture alone is changed by `dataclasses.replace`.
    """
    lengths = ("min_radius", "max_radius", "arrow_length_min", "arrow_length_max")
    rows, columns = (round(size * factor) for size in config.image_size)
    return dataclasses.replace(
        config,
        image_size=(rows, columns),
        boundary_padding=round(config.boundary_padding * factor),
        **{name: round(getattr(config, name) * factor) for name in lengths},
    )


class Arrow(NamedTuple):
    """One picture in numbers; x runs over columns, y over rows, both down from the corner."""

    draw: float  # in [0, 1); it points at the disc if this is below the intersection ratio
    length: int
    width: int
    x: float  # of its middle
    y: float
    angle: float  # radians, from x to y
    circle_x: float
    circle_y: float
    radius: float


class Pictures(NamedTuple):
    """Several of them."""

    images: np.ndarray  # uint8 (b rows columns 3)
    labels: np.ndarray  # int32 (b): 1 if the arrow points at the disc


def arrow(config: ArrowsConfig, index: int) -> Arrow:
    """The numbers of picture `index` >= 0, exactly those of the published generator.

    With room W for x inside the padding, the disc stands at the arrow plus 2 r + (W - 4 r) u along
    each axis, taken back by W where that leaves the room. With the angle `half` under which a disc
    of radius r / 1.2 (1.2 r) is seen from the arrow, the arrow points evenly inside (outside) of
    it. Where 4 r exceeds W the disc may be nearer than 2 r, and may lie outside of the picture.

    Raises:
      ValueError: the disc covers the arrow, which can happen only where 4 r exceeds W.
    """
    first = int(np.random.default_rng(config.seed).integers(1 << 62))
    rng = np.random.default_rng(first + index)
    draw = rng.uniform(0, 1)
    hits = draw < config.intersection_ratio
    length = int(rng.uniform(config.arrow_length_min, config.arrow_length_max))
    width = int(rng.uniform(config.arrow_width_min, config.arrow_width_max))
    room_x, room_y = (size - 2 * config.boundary_padding for size in config.image_size)
    x, y = room_x * rng.random(), room_x * rng.random()  # the first size for both, as published
    radius = config.min_radius + (config.max_radius - config.min_radius) * rng.random()

    def away(start: float, room: float, factor: float) -> float:
        least = factor * radius
        place = start + least + (room - 2 * least) * rng.random()
        return place - room if place > room else place

    circle_x = away(x, room_x, config.min_dist_x_factor)
    circle_y = away(y, room_y, config.min_dist_y_factor)
    dx, dy = circle_x - x, circle_y - y
    seen = radius / config.intersection_factor if hits else config.intersection_factor * radius
    squared = dx**2 + dy**2
    if seen**2 > 2 * squared:
        raise ValueError(
            f"arrow: the disc of picture {index} covers the arrow; choose a larger image_size than"
            f" {config.image_size} or a smaller max_radius than {config.max_radius}."
        )
    half = math.acos(abs((squared - seen**2) / squared) ** 0.5)
    span, begin = (2 * half, -half) if hits else (2 * math.pi - 2 * half, half)
    angle = math.atan2(dy, dx) + rng.random() * span + begin
    padding = config.boundary_padding
    return Arrow(
        draw,
        length,
        width,
        x + padding,
        y + padding,
        angle,
        circle_x + padding,
        circle_y + padding,
        radius,
    )


def picture(config: ArrowsConfig, of: Arrow) -> np.ndarray:
    """Draws an arrow and its disc, black on white: uint8 (rows columns 3).

    Lines and disc hold the pixels whose centres they cover, as near as that comes to the published
    ones, which another program drew: a golden case compares the first eight.
    """
    rows, columns = (np.arange(size, dtype=np.float64) for size in config.image_size)
    at = np.stack(np.broadcast_arrays(columns[None, :], rows[:, None]), axis=-1)
    half, stroke = of.length // 2, of.length // 2.5

    def along(angle: float) -> np.ndarray:
        return np.array([math.cos(angle), math.sin(angle)])

    middle = np.array([of.x, of.y])
    tip = middle + half * along(of.angle)
    tails = [middle - half * along(of.angle)]
    tails += [tip - stroke * along(of.angle + turn) for turn in (-HEAD_ANGLE, HEAD_ANGLE)]
    black = _disc(at, np.array([of.circle_x, of.circle_y]), of.radius)
    for tail in tails:
        black |= _line(at, np.trunc(tail), np.trunc(tip), of.width)
    image = np.where(black, BLACK, WHITE).astype(np.uint8)
    return np.repeat(image[..., None], 3, axis=-1)


def pictures(config: ArrowsConfig, start: int, count: int) -> Pictures:
    """Pictures start .. start + count - 1.

    Raises:
      ValueError: start is negative, or there is nothing to draw.
    """
    if start < 0 or count < 1:
        raise ValueError(f"pictures: needs start >= 0 and count >= 1, got {start} and {count}.")
    arrows = [arrow(config, start + i) for i in range(count)]
    return Pictures(
        np.stack([picture(config, of) for of in arrows]),
        np.array([of.draw < config.intersection_ratio for of in arrows], np.int32),
    )


def _line(at: np.ndarray, tail: np.ndarray, tip: np.ndarray, width: int) -> np.ndarray:
    """Pixels in the rectangle of a line with square ends."""
    length = float(np.hypot(*(tip - tail)))
    along = (tip - tail) / length if length else np.array([1.0, 0.0])
    ahead = (at - tail) @ along
    beside = (at - tail) @ np.array([-along[1], along[0]])
    return (ahead >= -0.5) & (ahead <= length + 0.5) & (np.abs(beside) <= width / 2)


def _disc(at: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """Pixels inside a disc between whole pixels; 0.9 is what fits the published pictures best."""
    low, high = np.trunc(centre - radius), np.trunc(centre + radius)
    middle, half = (low + high) / 2, (high - low + 0.9) / 2
    return np.sum(((at - middle) / half) ** 2, axis=-1) <= 1
