"""Prefix linear attention against its original: feature map, layer, gradients, decoding,
conversion; and the set-disjointness data.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.convert.engine import find, to_tensors
from jaxrec.ops import feature_maps
from jaxrec.training.data.synthetic import SPECIAL, set_disjointness
from tests.golden.harness import Case, cases, check_round_trip

FOUND = cases("prefix_linear_attention")
FOLDERS = [folder for folder in FOUND if (folder / "weights.safetensors").exists()]
DATA = [folder for folder in FOUND if folder not in FOLDERS]


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


def test_the_layer(case, model):
    x, prefix = beginning(case)
    y, _ = run(model, x, model.init_state(x.shape[0]), prefix)
    case.check("out", y)


def test_prefill_and_decoding(case, model):
    x, prefix = beginning(case)
    length = min(case.config["enc_length"], x.shape[1])
    y, state = run(model, x[:, :length], model.init_state(x.shape[0]), prefix[:, :length])
    # The stated gap is one of the output; states grow with the prefix.
    kv, k = jnp.swapaxes(state[..., :-1], -1, -2)[:, :, None], state[..., -1][:, :, None, None]
    case.check("prefill_kv_state", kv, gap_is_of_others=True)
    case.check("prefill_k_state", k, gap_is_of_others=True)
    steps = [x[:, length:length]]  # nothing, where the prefix is all there is
    for t in range(length, x.shape[1]):
        y, state = go_on(model, x[:, t : t + 1], state)
        steps.append(y)
    if "decode_out" in case:
        case.check("decode_out", jnp.concatenate(steps, axis=1))


def test_gradients(case, model):
    x, prefix = beginning(case)
    cotangent = jnp.asarray(case["cot_out"])

    @jax.jit
    def gradient(layer, x):
        def loss(layer, x):
            y, _ = layer(x, layer.init_state(x.shape[0]), prefix=prefix)
            return jnp.sum(y * cotangent)

        return jax.grad(loss, argnums=(0, 1))(layer, x)

    of_layer, of_x = gradient(model, x)
    case.check("grad_x", of_x, gap_is_of_others=True)
    tensors = to_tensors(find(case.system), model, of_layer)
    for name in case.names("grad_"):
        if name != "grad_x":
            tensor = tensors[name.removeprefix("grad_").replace("__", ".")]
            case.check(name, tensor, gap_is_of_others=True)


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last of those that share the case."""
    case.assert_all_looked_at()


@pytest.mark.parametrize("folder", DATA, ids=lambda folder: folder.name)
def test_set_disjointness(folder):
    case = Case(folder)
    for first, second in case.config["sizes"]:
        name = f"inputs_{first}_{second}"
        # The file does not say which pairs have the small vocabulary; one of both it must be.
        sizes = (case.config["vocab_small"], case.config["vocab_large"])
        tasks = [
            set_disjointness(len(case[name]), first, second, vocab=vocab, seed=case.config["seed"])
            for vocab in sizes
            if first <= vocab // 2 and second <= vocab - SPECIAL - vocab // 2
        ]
        same = [task for task in tasks if np.array_equal(task.inputs, case[name])]
        task = (same or tasks)[0]
        case.check(name, task.inputs)
        case.check(f"labels_{first}_{second}", task.labels)
    case.assert_all_looked_at()
