"""The table of prefix linear attention: both ways, and what it refuses."""

import jax
import pytest
from flax import nnx

from jaxrec import convert
from jaxrec.convert.engine import read_tensors
from jaxrec.errors import UserError
from jaxrec.layers.prefix_linear_attention import PrefixLinearAttentionConfig
from tests.convert.folders import assert_loads_as, change


def build(**options):
    config = PrefixLinearAttentionConfig(width=6, heads=2, feature_width=4, epsilon=1e-6, **options)
    return jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))


def test_the_table_goes_both_ways(tmp_path):
    layer = build()
    convert.export(layer, tmp_path)
    shapes = {name: tensor.shape for name, tensor in read_tensors(tmp_path).items()}
    assert len(shapes) == 6
    assert shapes["proj_k_enc.weight"] == (8, 6) and shapes["proj_v_enc.weight"] == (6, 6)
    assert_loads_as("prefix_linear_attention", tmp_path, layer)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_head": 2}, r"unknown field num_head in config.json. Did you mean num_heads"),
        ({"embed_dim": None}, r"lacks the field embed_dim"),
        ({"feature_dim": "wide"}, r"feature_dim must be a count, got 'wide'"),
        ({"num_heads": 4}, r"width must be a multiple of heads, got 6 and 4"),
        ({"feature_dim": 3}, r"proj_q.weight has shape \(8, 6\), which cannot become"),
    ],
)
def test_what_does_not_fit_is_named(fields, message, tmp_path):
    convert.export(build(), tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        convert.load("prefix_linear_attention", tmp_path)


def test_an_option_that_the_format_cannot_say_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot say masks_before_features"):
        convert.export(build(masks_before_features=True), tmp_path)
