import warnings

import jax
import jax.numpy as jnp
import pytest


def test_eight_virtual_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_dtypes_are_not_promoted():
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)


def test_warnings_are_errors():
    with pytest.raises(UserWarning, match="as an error"):
        warnings.warn("raised as an error", UserWarning, stacklevel=1)


def test_compiled_programs_are_kept():
    assert jax.config.jax_compilation_cache_dir
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
