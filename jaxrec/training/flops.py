"""The peak speed of a device, the denominator of model FLOPs utilisation (MFU)."""

import functools
import time

import jax
import jax.numpy as jnp

PEAK_FLOPS: dict[str, float] = {
    # TPU: Google Cloud documentation, "System architecture", peak compute per chip in bf16. A jax
    # device is one core, half a chip, on v2 and v3, and one chip from v4 on.
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e, Trillium
    "TPU v6e": 918e12,
    # NVIDIA: data sheets, dense (the sheets print twice as much, "with sparsity", from A100 on).
    "NVIDIA H200": 989e12,  # H200 data sheet: 1,979 TFLOPS with sparsity
    "NVIDIA H100 PCIe": 756e12,  # H100 data sheet: 1,513 TFLOPS with sparsity
    "NVIDIA H100 NVL": 835e12,  # H100 NVL data sheet: 1,671 TFLOPS with sparsity
    "NVIDIA H100": 989e12,  # H100 SXM data sheet: 1,979 TFLOPS with sparsity
    "NVIDIA A100": 312e12,  # A100 data sheet: 312 TFLOPS
    "Tesla V100": 125e12,  # V100 data sheet: 125 TFLOPS, in float16: it has no bf16 units
}
"""Published peak of dense bf16 matrix products in FLOP/s by the beginning of `device_kind`; the
longest match counts."""


def peak_flops(device: jax.Device) -> float:
    """Returns the peak speed of one device in FLOP/s.

    The published figure where there is one, otherwise the speed of a large float32 matrix product
    measured on the device (about half a second, once per kind of device), which is what a CPU can
    be expected to reach.
    """
    known = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    if known:
        return PEAK_FLOPS[max(known, key=len)]
    return measured_flops(device)


@functools.cache
def measured_flops(device: jax.Device, size: int = 1024, repeats: int = 5) -> float:
    """Returns the best speed of `repeats` float32 products of size x size matrices, in FLOP/s."""
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(matrix, matrix))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)
