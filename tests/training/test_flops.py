"""Peak speeds are found by the kind of device, or measured."""

from types import SimpleNamespace

import jax
import pytest

from jaxrec.training.flops import PEAK_FLOPS, measured_flops, peak_flops


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("TPU v3", 61.5e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_published_peaks(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_an_unknown_device_is_measured():
    device = jax.devices()[0]
    assert device.device_kind not in PEAK_FLOPS
    speed = measured_flops(device, 128, 2)
    assert 1e7 < speed < 1e14
