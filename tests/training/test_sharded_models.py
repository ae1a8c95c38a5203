"""Every model on several meshes: the losses of 20 steps, and what the compiled step sends."""

import functools
import math
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrec import models
from jaxrec.analysis.collectives import exchanges
from jaxrec.layers.axes import constrain
from jaxrec.layers.embedding import Embedding
from jaxrec.models import linear_rnn
from jaxrec.training.sharding import batch_sharding, build_mesh, parse_mesh
from tests.training.spread import BATCH, MESHES, WIDTH, language_model, smaller, subjects, trial

SUBJECTS = subjects()
QUICK = {("huginn", "data=2,model=4"), ("linear_rnn", "data=2,seq=4")}
"""The others are slow: each has a program to compile."""


def cases(meshes=MESHES):
    return [
        pytest.param(
            subject,
            mesh,
            id=f"{mesh}-{subject.module}:{subject.name}",
            marks=[] if (subject.module, mesh) in QUICK else [pytest.mark.slow],
        )
        for subject in SUBJECTS
        for mesh in meshes
    ]


def test_every_model_is_among_them():
    known = {info.name for info in pkgutil.iter_modules(models.__path__)} - {"protocol"}
    assert {subject.module for subject in SUBJECTS} == known


@pytest.mark.parametrize(("subject", "mesh"), cases())
def test_losses_are_those_of_one_device(subject, mesh):
    one, many = trial(subject, "data=1"), trial(subject, mesh)
    assert np.all(np.isfinite(one.losses)) and np.ptp(one.losses) > 0
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)


@pytest.mark.parametrize(("subject", "mesh"), cases(("data=8", "data=2,model=4")))
def test_nothing_whole_is_gathered(subject, mesh):
    """Over "data" only sums are exchanged, numbers of rows, and rows that change places, as mixup
    has them; and over "model" no matrix that is split is put together."""
    result = trial(subject, mesh)
    found = exchanges(result.text, parse_mesh(mesh))
    gathers = [one for one in found if one.kind not in ("all-reduce", "collective-permute")]
    over_rows = [one for one in gathers if "data" in one.axes]
    assert all(math.prod(shape) <= BATCH for one in over_rows for shape in one.shapes)
    whole = set()
    for x in jax.tree.leaves(result.params):
        if any("model" in (axes or ()) for axes in x.sharding.spec):
            # A stack, or one of its layers; vectors are left out.
            whole |= {dimensions(x.shape), dimensions(x.shape[1:])}
    whole = {shape for shape in whole if math.prod(shape) >= WIDTH**2}
    assert not [one for one in gathers for shape in one.shapes if dimensions(shape) in whole]


def dimensions(shape):
    """Whatever their order: XLA transposes as it likes."""
    return tuple(sorted(size for size in shape if size > 1))


def test_the_embedding_is_looked_up_without_moving_the_batch(capfd):
    """Where both "data" and "fsdp" split the batch, XLA once put all vectors on every device and
    said so on stderr."""
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        mesh, width = build_mesh("data=2,fsdp=2,model=2"), 16
        model = Embedding(64, width, init=jax.nn.initializers.normal(), rngs=nnx.Rngs(0))
        table = jax.device_put(model.table[...], NamedSharding(mesh, P("model", "fsdp")))
        tokens = jax.device_put(np.zeros((8, 4), np.int32), batch_sharding(mesh))
        graph, _ = nnx.split(model)

        def lookup(table, tokens):
            x = nnx.merge(graph, {"table": table})(tokens)
            return constrain(jnp.sin(x), "batch", "time", None)

        with jax.set_mesh(mesh):
            text = jax.jit(lookup).lower(table, tokens).compile().as_text()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert "rematerialization" not in capfd.readouterr().err
    found = exchanges(text, parse_mesh("data=2,fsdp=2,model=2"))
    # The table's part, over fsdp; the vectors of own tokens, over model.
    assert {(one.kind, one.axes, one.shapes) for one in found} == {
        ("all-gather", ("fsdp",), ((32, width),)),
        ("all-reduce", ("model",), ((2, 4, width),)),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 4},
        {"remat": "none"},
        {"remat": "block"},
        {"remat": "sqrt", "accumulate": 2},
    ],
    ids=str,
)
def test_accumulation_and_remat_change_no_loss(changes):
    """Of the model without a loop: microbatches would draw a latent state anew. Remat is "dots" in
    the other tests."""
    (plain,) = (each for each in SUBJECTS if (each.module, each.name) == ("linear_rnn", "TINY"))
    config = smaller(linear_rnn.TINY)
    program = functools.partial(language_model, config, batch=4 * BATCH, **changes)
    # Four times the batch, so that a microbatch still has rows for every device.
    usual = functools.partial(language_model, config, batch=4 * BATCH)
    one = trial(plain._replace(program=usual), "data=1")
    many = trial(plain._replace(program=program), "data=2,fsdp=2,model=2")
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)


@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,model=4",
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in ("data=8", "data=2,seq=4", "fsdp=8", "data=2,fsdp=2,model=2")
        ),
    ],
)
def test_a_looped_core_exchanges_nothing_over_the_batch_while_it_loops(mesh):
    """Its weights are gathered once and its gradient is summed once, however deep it is."""
    (subject,) = (each for each in SUBJECTS if (each.module, each.name) == ("huginn", "TINY"))
    result = trial(subject, mesh)
    found = exchanges(result.text, parse_mesh(mesh), loops=99)
    over_rows = [one for one in found if set(one.axes) & {"data", "fsdp"}]
    assert over_rows and all(one.times == 1 for one in over_rows)
    np.testing.assert_allclose(result.losses, trial(subject, "data=1").losses, rtol=1e-5)
