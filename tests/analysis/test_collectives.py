"""Collectives of compiled programs: how often they run, along which axis, and what they send."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxrec.analysis.collectives import Exchange, by_axis, exchanges, times_by_axis

SIZES = {"data": 2, "model": 4}
ROWS, WIDTH = 8, 12


def compiled(function, spec, *arguments):
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(spec, *(PartitionSpec() for _ in arguments)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return jax.jit(mapped).lower(jnp.ones((ROWS, WIDTH)), *arguments).compile().as_text()


def found(function, spec, *arguments, **options):
    return exchanges(compiled(function, spec, *arguments), SIZES, **options)


def test_a_sum_over_one_axis():
    text = functools.partial(lax.psum, axis_name="model")
    (one,) = found(text, PartitionSpec(None, "model"))
    assert one == Exchange("all-reduce", ("model",), 2 * ROWS * 3 * 4 * 3 / 4, 1, ((ROWS, 3),))


def test_a_sum_over_both_axes():
    text = functools.partial(lax.psum, axis_name=("data", "model"))
    (one,) = found(text, PartitionSpec("data", "model"))
    assert one == Exchange("all-reduce", ("data", "model"), 2 * 4 * 3 * 4 * 7 / 8, 1, ((4, 3),))


def test_a_gather_sends_what_all_others_lack():
    def gather(x):
        return lax.all_gather(x, "data", axis=0, tiled=True)

    (one,) = found(gather, PartitionSpec("data"))
    assert one == Exchange("all-gather", ("data",), 4 * WIDTH * 4, 1, ((ROWS, WIDTH),))


def test_loops_count_by_their_length():
    def looped(x, n):
        def body(x, _):
            return jnp.sin(lax.ppermute(x, "model", [(i, (i + 1) % 4) for i in range(4)])), None

        x, _ = lax.scan(body, x, None, length=5)
        return lax.fori_loop(0, n, lambda _, x: jnp.cos(lax.psum(x, "data")), x)

    one, other = found(looped, PartitionSpec(None, "model"), jnp.int32(3), loops=7)
    assert one == Exchange("collective-permute", ("model",), ROWS * 3 * 4, 5, ((ROWS, 3),))
    assert (other.kind, other.axes, other.times) == ("all-reduce", ("data",), 7)


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}",
        "replica_groups=[4,2]<=[2,4]T(1,0)",
        "replica_groups=mesh['a'=2,'b'=4] {'a'}",
        "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}",
    ],
)
def test_groups_in_every_notation(groups):
    text = f"""ENTRY %main (x: f32[2]) -> f32[2] {{
  ROOT %r = bf16[2,3]{{1,0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}"""
    (one,) = exchanges(text, SIZES)
    assert one == Exchange("all-reduce", ("data",), 2 * 12 / 2, 1, ((2, 3),))


def test_an_unknown_notation_is_refused():
    text = (
        "ENTRY %main (x: f32[2]) -> f32[2] {\n  %r = f32[2] all-reduce(%x), replica_groups=<8>\n}"
    )
    with pytest.raises(ValueError, match="unknown notation"):
        exchanges(text, SIZES)


def test_the_table_adds_up():
    parts = [
        Exchange("all-reduce", ("data",), 10.0, 2, ()),
        Exchange("all-reduce", ("data",), 1.0, 1, ()),
        Exchange("all-gather", ("data", "model"), 4.0, 3, ()),
    ]
    assert by_axis(parts) == {"data": {"all-reduce": 21.0}, "data*model": {"all-gather": 12.0}}
    assert np.isclose(sum(by_axis(parts)["data"].values()), 21)
    assert times_by_axis(parts) == {"data": {"all-reduce": 3}, "data*model": {"all-gather": 3}}
