"""The published 3.5 B checkpoint's layout, name by name, without its 14 GB."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxrec import convert
from jaxrec.convert import engine
from jaxrec.errors import UserError
from jaxrec.models.huginn import HUGINN_3_5B
from tests.convert.folders import assert_loads_as
from tests.models import toy
from tests.models.test_huginn import SMALLEST

TABLE = engine.find("huginn")
MOVES = {  # what may happen to a number: it goes elsewhere, or is written wider
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "reshape",
    "slice",
    "split",
    "squeeze",
    "stack",
    "transpose",
}


def published():
    """Names and shapes of nebel-raven-3.5b, in bfloat16, all written out."""
    d, f, heads, v = 5280, 17920, 55, 65536
    block = {
        **{f"norm_{i}.weight": (d,) for i in (1, 2, 3, 4)},
        "attn.Wqkv.weight": (3 * d, d),
        "attn.qk_bias": (2, 1, heads, 96),
        "attn.proj.weight": (d, d),
        "mlp.fc.weight": (2 * f, d),
        "mlp.proj.weight": (d, f),
    }
    shapes = {
        "transformer.wte.weight": (v, d),
        "transformer.adapter.weight": (d, 2 * d),
        "transformer.ln_f.weight": (d,),
        "freqs_cis": (1, 4096, 1, 48, 2),
    }
    for part, layers in (("prelude", 2), ("core_block", 4), ("coda", 2)):
        for i in range(layers):
            shapes |= {f"transformer.{part}.{i}.{name}": s for name, s in block.items()}
    return {name: jax.ShapeDtypeStruct(s, jnp.bfloat16) for name, s in shapes.items()}


def there(tensors):
    return engine.from_tensors(TABLE, HUGINN_3_5B, tensors)


def back(model):
    return engine.to_tensors(TABLE, model)


def sizes(tree):
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def test_every_tensor_of_the_3_5_b_layout_finds_its_place_and_comes_back():
    tensors = published()
    model = jax.eval_shape(there, tensors)
    want = nnx.eval_shape(lambda: HUGINN_3_5B.build(rngs=nnx.Rngs(0)))
    assert jax.tree.structure(model) == jax.tree.structure(want)
    assert sizes(jax.tree.leaves(model)) == sizes(jax.tree.leaves(want))
    del tensors["freqs_cis"]
    assert sizes(jax.eval_shape(back, model)) == sizes(tensors)


def test_nothing_is_computed_on_the_way():
    """Each number is moved and no two become one: as many come out as go in."""
    tensors = published()
    del tensors["freqs_cis"]
    model = jax.eval_shape(there, tensors)
    for function, given in ((there, tensors), (back, model)):
        traced = jax.make_jaxpr(function)(given)
        assert {equation.primitive.name for equation in traced.eqns} <= MOVES
        before, after = (
            [x.aval.size for x in xs] for xs in (traced.jaxpr.invars, traced.jaxpr.outvars)
        )
        assert sum(before) == sum(after) == 3_564_976_800


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"transformer.coda.2.norm_1.weight": (5280,)},
            r"norm_1.* gives coda/.* the shape \(3, 5280\)",
        ),
        ({"transformer.wte.weight": (65535, 5280)}, r"embedding/table the shape \(65535, 5280\)"),
        ({"transformer.adapter.weight": (5280, 5280)}, "adapter"),
    ],
)
def test_another_layout_is_refused_before_anything_is_read(change, message):
    tensors = published()
    tensors |= {name: jax.ShapeDtypeStruct(s, jnp.bfloat16) for name, s in change.items()}
    with pytest.raises(UserError, match=message):
        jax.eval_shape(there, tensors)


def test_a_tied_head_may_be_stored_twice(tmp_path):
    model = toy.drawn(dataclasses.replace(SMALLEST, tie_embeddings=True))
    convert.export(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, file)
    assert_loads_as("huginn", tmp_path, model)
    save_file(tensors | {"lm_head.weight": np.zeros((13, 16), np.float32)}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight and .* must be the same"):
        convert.load("huginn", tmp_path)
