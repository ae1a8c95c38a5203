"""A picture of how tokens settle in the parallel sampler: position against step, coloured by the
change of the latent state; a line marks what is frozen.
"""

import base64
import struct
import zlib

import numpy as np

# Dark where nothing moves any more, bright where all does; in between linear in log10.
COLOURS = np.array(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float64
)
LEAST, MOST = -3.0, 0.0  # log10 of the changes at both ends of the colours
BACKGROUND = (255, 255, 255)
CELL, MARGIN = 6, 48  # pixels


def wavefront_svg(change: np.ndarray, frozen: np.ndarray, prompt: int) -> str:
    """The picture as an SVG document.

    Args:
      change: |change of S| / |S| of each step and position (n t); NaN where nothing was computed.
      frozen: int (n), tokens that were frozen after each step.
      prompt: int, tokens of the prompt.
    """
    steps = len(change)
    first = max(prompt - 2, 0)
    computed = np.flatnonzero(np.isfinite(change).any(axis=0))
    last = max(int(computed[-1]) + 1 if len(computed) else 0, int(frozen.max()))
    part = change[:, first:last]
    width, height = (last - first) * CELL, steps * CELL
    line = " ".join(
        f"{MARGIN + (count - first) * CELL},{MARGIN + (step + end) * CELL}"
        for step, count in enumerate(frozen)
        for end in (0, 1)
    )
    image = base64.b64encode(_png(_coloured(part))).decode()
    bar = base64.b64encode(_png(_coloured(np.logspace(LEAST, MOST, 64)[None]))).decode()
    right, bottom = MARGIN + width, MARGIN + height
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{max(right, 320) + 20}"\
 height="{bottom + 64}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<image x="{MARGIN}" y="{MARGIN}" width="{width}" height="{height}"\
 preserveAspectRatio="none" style="image-rendering:pixelated"\
 href="data:image/png;base64,{image}"/>
<rect x="{MARGIN}" y="{MARGIN}" width="{width}" height="{height}" fill="none" stroke="black"/>
<polyline points="{line}" fill="none" stroke="red" stroke-width="1.5"/>
<text x="{MARGIN}" y="20">position {first} to {last - 1}; red: frozen to the left of it</text>
<text x="{MARGIN}" y="{MARGIN - 6}">{first}</text>
<text x="{right}" y="{MARGIN - 6}" text-anchor="end">{last - 1}</text>
<text x="{MARGIN - 6}" y="{MARGIN + 12}" text-anchor="end">1</text>
<text x="{MARGIN - 6}" y="{bottom}" text-anchor="end">{steps}</text>
<text transform="translate(14,{MARGIN + height / 2}) rotate(-90)" text-anchor="middle">step</text>
<image x="{MARGIN}" y="{bottom + 16}" width="160" height="12" preserveAspectRatio="none"\
 href="data:image/png;base64,{bar}"/>
<text x="{MARGIN}" y="{bottom + 44}">change of the state: 0.001 to 1</text>
</svg>
"""


def _coloured(change: np.ndarray) -> np.ndarray:
    """uint8 (n t 3)."""
    with np.errstate(divide="ignore"):
        level = (np.log10(change) - LEAST) / (MOST - LEAST)
    level = np.clip(np.nan_to_num(level), 0, 1) * (len(COLOURS) - 1)
    low = np.minimum(level.astype(int), len(COLOURS) - 2)
    part = (level - low)[..., None]
    colours = (1 - part) * COLOURS[low] + part * COLOURS[low + 1]
    return np.where(np.isfinite(change)[..., None], colours, BACKGROUND).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 (height width 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum_)

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.tobytes()))
        + chunk(b"IEND", b"")
    )
