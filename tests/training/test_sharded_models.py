"""Every model on several meshes: the losses of 20 steps, and what the compiled step sends."""

import dataclasses
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
from jaxrec.models import huginn, linear_rnn
from jaxrec.training.config import TrainConfig
from jaxrec.training.sharding import batch_sharding, build_mesh, parse_mesh
from jaxrec.training.step import build_steps
from tests.training.spread import (
    BATCH,
    MESHES,
    OPTIMIZER,
    TIME,
    WIDTH,
    language_model,
    smaller,
    subjects,
    trial,
)

SUBJECTS = subjects()
QUICK = {("huginn", "data=2,model=4"), ("linear_rnn", "data=2,seq=4")}
"""The others are slow: each has a program to compile."""
SEES_ALL_OF_TIME = {
    # Softmax attention gathers keys and values over "seq", see docs/scaling.md.
    *("huginn", "universal_transformer", "recurrentgemma", "prefix_linear"),
    # Left to the compiler over "seq": cells that mix all channels step by step, the scan of LSSL,
    # which documents in a row need, and `mark_scan`.
    *("TINY_SLSTM", "TINY_LSSL", "plstm"),
    # The length of a puzzle, the patches of an image and the nodes of a graph are not split.
    *("hrm", "vit", "plstm_vision", "graph_classifier"),
}
OF_IMAGES = {"patch_kernel", "position"}
"""Parameters whose first axes are those of an image."""
GATHERED_ONCE = {"huginn"}
"""A looped core, whose layers are all gathered before the first loop: see `layers.gathered`."""


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
    # Adam's steps, and so the losses, hide a gradient of the wrong size. On one device, compiled
    # with other options, GLA's differ by 3.2e-3 and RetNet's by 4e-4: norms of heads near zero.
    np.testing.assert_allclose(many.gradients, one.gradients, rtol=3e-2)


@pytest.mark.parametrize(("subject", "mesh"), cases())
def test_nothing_whole_is_gathered(subject, mesh):
    """Over "data" only sums are exchanged, numbers of rows, and rows that change places, as mixup
    has them; over "model" no matrix that is split is put together; over "seq" nothing that is as
    long as a row but its numbers of documents and positions; over "fsdp" one layer's parameters at
    a time and nothing of the batch."""
    result = trial(subject, mesh)
    found = exchanges(result.text, parse_mesh(mesh))
    gathers = [one for one in found if one.kind not in ("all-reduce", "collective-permute")]

    def shapes(axis):
        return [shape for one in gathers if axis in one.axes for shape in one.shapes]

    # Of HRM, whose every place is asked, also numbers of places, where time is split too.
    numbers = BATCH * TIME if subject.module == "hrm" and "seq" in mesh else BATCH
    assert all(math.prod(shape) <= numbers for shape in shapes("data"))
    split, layers, stacks = set(), set(), set()  # of one layer and of all, the numbers that it has
    for path, x in jax.tree_util.tree_leaves_with_path(result.params):
        is_stack = x.ndim > 2 and x.sharding.spec[0] is None and path[0].key not in OF_IMAGES
        layers |= {math.prod(x.shape[1:] if is_stack or x.ndim == 2 else x.shape)}
        layers |= set() if is_stack else {math.prod(x.shape)}
        stacks |= {math.prod(x.shape)} if is_stack else set()
        if any("model" in (axes or ()) for axes in x.sharding.spec):
            # A stack, or one of its layers; vectors are left out.
            split |= {dimensions(x.shape), dimensions(x.shape[1:])}
    split = {shape for shape in split if math.prod(shape) >= WIDTH**2}
    assert not [shape for shape in shapes("model") if dimensions(shape) in split]
    if not {subject.module, subject.name} & SEES_ALL_OF_TIME:
        as_long = [shape for shape in shapes("seq") if any(size % TIME == 0 for size in shape)]
        assert all(math.prod(shape) <= BATCH * TIME for shape in as_long)
    if subject.module in GATHERED_ONCE:
        layers |= stacks
    # Beside weights, the few numbers of a row: its loss, its classes.
    of_weights = [shape for shape in shapes("fsdp") if math.prod(shape) > 4 * BATCH]
    if mesh == "fsdp=8":
        scattered = [one for one in gathers if one.kind == "reduce-scatter"]
        of_weights = [one for one in of_weights if all(one not in x.shapes for x in scattered)]
        # No row of a batch has as many numbers as a layer: TIME divides none of these.
        assert of_weights and not [one for one in of_weights if math.prod(one) not in layers]


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


@pytest.mark.slow
def test_accumulation_and_remat_of_a_looped_model_agree_over_devices():
    """Each microbatch draws its latent states by a key of its own, wherever its rows lie."""
    (plain,) = (each for each in SUBJECTS if (each.module, each.name) == ("huginn", "TINY"))
    program = functools.partial(language_model, smaller(huginn.TINY), batch=2 * BATCH, accumulate=2)
    one = trial(plain._replace(program=functools.partial(program, remat="none")), "data=1")
    many = plain._replace(program=functools.partial(program, remat="sqrt"))
    many = trial(many, "data=2,fsdp=2,model=2")
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(many.gradients, one.gradients, rtol=1e-4)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_no_device_ever_holds_a_whole_parameter_at_the_start(ema):
    """Of eight devices each draws its part: all that the program has in memory at once is less than
    twice that, and much less than the largest parameter."""
    config = dataclasses.replace(linear_rnn.TINY, vocab_size=4096, width=64, layers=2)
    optimizer = dataclasses.replace(OPTIMIZER, ema_decay=ema)
    run = TrainConfig(batch=BATCH, time=TIME, mesh="fsdp=8", optimizer=optimizer)
    steps = build_steps(config, run, build_mesh("fsdp=8"))
    memory = steps.init.lower().compile().memory_analysis()
    leaves = jax.tree.leaves(steps.abstract)
    parts = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    largest = max(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    assert memory.output_size_in_bytes < 1.1 * parts
    assert memory.temp_size_in_bytes < largest / 2


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
