"""Prefix linear attention against its original: feature map, layer, gradients, decoding; and the
set-disjointness data. The layer's tensors are no model's: the engine has no table for them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.convert.engine import read_tensors
from jaxrec.layers.prefix_linear_attention import PrefixLinearAttention
from jaxrec.ops import feature_maps
from jaxrec.training.data.synthetic import set_disjointness
from tests.golden.harness import Case, cases

FOUND = cases("prefix_linear_attention")
FOLDERS = [folder for folder in FOUND if (folder / "weights.safetensors").exists()]
DATA = [folder for folder in FOUND if folder not in FOLDERS]
NAMES = {  # theirs (out, in) -> ours (in, h, k)
    "proj_q": "query",
    "proj_k": "key",
    "proj_v": "value",
    "proj_k_enc": "prefix_key",
    "proj_v_enc": "prefix_value",
    "out_proj": "out",
}


@pytest.fixture(scope="module")
def layer(case):
    options, tensors = case.config, read_tensors(case.folder)
    init = jax.nn.initializers.zeros
    build = nnx.eval_shape(
        lambda: PrefixLinearAttention(
            options["embed_dim"],
            options["num_heads"],
            options["feature_dim"],
            epsilon=options["eps"],
            init=init,
            rngs=nnx.Rngs(0),
        )
    )
    graph, shapes = nnx.split(build)
    values = {
        ours: {"kernel": jnp.asarray(tensors.pop(f"{theirs}.weight").T)}
        for theirs, ours in NAMES.items()
    }
    assert not tensors
    like = nnx.to_pure_dict(shapes)
    return nnx.merge(graph, jax.tree.map(lambda x, y: x.reshape(y.shape), values, like))


@jax.jit
def run(layer, x, state, prefix):
    return layer(x, state, prefix=prefix)


@jax.jit
def go_on(layer, x, state):
    return layer(x, state)


def beginning(case):
    """x (b t d), and which positions are the prefix."""
    x = jnp.asarray(case["in_x"])
    prefix = np.arange(x.shape[1]) < case.config["enc_length"]
    return x, jnp.broadcast_to(jnp.asarray(prefix), x.shape[:2])


def test_the_feature_map(case):
    case.check("feature_map_out", jax.jit(feature_maps.taylor)(case["feature_map_in"]))


def test_the_layer(case, layer):
    x, prefix = beginning(case)
    y, _ = run(layer, x, layer.init_state(x.shape[0]), prefix)
    case.check("out", y)


def test_prefill_and_decoding(case, layer):
    x, prefix = beginning(case)
    length = case.config["enc_length"]
    y, state = run(layer, x[:, :length], layer.init_state(x.shape[0]), prefix[:, :length])
    case.check("prefill_kv_state", jnp.swapaxes(state[..., :-1], -1, -2)[:, :, None])
    case.check("prefill_k_state", state[..., -1][:, :, None, None])
    steps = []
    for t in range(length, x.shape[1]):
        y, state = go_on(layer, x[:, t : t + 1], state)
        steps.append(y)
    case.check("decode_out", jnp.concatenate(steps, axis=1))


def test_gradients(case, layer):
    x, prefix = beginning(case)
    cotangent = jnp.asarray(case["cot_out"])

    @jax.jit
    def gradient(layer, x):
        def loss(layer, x):
            y, _ = layer(x, layer.init_state(x.shape[0]), prefix=prefix)
            return jnp.sum(y * cotangent)

        return jax.grad(loss, argnums=(0, 1))(layer, x)

    of_layer, of_x = gradient(layer, x)
    case.check("grad_x", of_x)
    for name in case.names("grad_proj"):
        theirs = name.removeprefix("grad_").removesuffix("__weight")
        kernel = getattr(of_layer, NAMES[theirs]).kernel[...]
        case.check(name, kernel.reshape(kernel.shape[0], -1).T)


def test_every_array_was_looked_at(case):
    """Last of those that share the case."""
    case.assert_all_looked_at()


@pytest.mark.parametrize("folder", DATA, ids=lambda folder: folder.name)
def test_set_disjointness(folder):
    case = Case(folder)
    for first, second in case.config["sizes"]:
        # The long pairs have the large vocabulary; the file does not say where short ones end.
        name = f"inputs_{first}_{second}"
        for vocab in (case.config["vocab_small"], case.config["vocab_large"]):
            half = vocab // 2
            if max(first, second) > vocab - 4 - half or case[name].max() >= vocab:
                continue
            task = set_disjointness(
                case[name].shape[0], first, second, vocab=vocab, seed=case.config["seed"]
            )
            break
        case.check(name, task.inputs)
        case.check(f"labels_{first}_{second}", task.labels)
    case.assert_all_looked_at()
