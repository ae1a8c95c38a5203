"""S5 against its original: eigenvalues, outputs, all gradients; and the HiPPO matrices it begins
with.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec import convert
from jaxrec.convert.engine import find, read_tensors, to_tensors
from jaxrec.ops import hippo
from tests.golden.harness import Case, cases

FOLDERS = cases("s5")
LAYERS = [folder for folder in FOLDERS if (folder / "weights.safetensors").exists()]
MATRICES = [folder for folder in FOLDERS if folder not in LAYERS]


@pytest.fixture(params=LAYERS, ids=lambda folder: folder.name, scope="module")
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def layer(case):
    return case.load_model()


def test_discretised_eigenvalues(case, layer):
    decay, _ = jax.jit(lambda layer: layer.discretized())(layer)
    case.check("Lambda_bar_re", jnp.real(decay))
    case.check("Lambda_bar_im", jnp.imag(decay))


def test_outputs(case, layer):
    y, _ = jax.jit(lambda layer, u: layer(u))(layer, case["u"][None])
    case.check("y", y[0])


def test_gradients(case, layer):
    def loss(layer, u):
        return jnp.sum(layer(u)[0] * case["cot_y"][None])

    of_layer, of_u = jax.jit(jax.grad(loss, argnums=(0, 1)))(layer, case["u"][None])
    # The stated gap is one of y: a unit in the last place of the largest gradient is already more.
    # Measured here: at most 1.2e-6 of the largest, in log_step, to which every step adds.
    case.check("grad_u", of_u[0], gap_is_of_others=True)
    tensors = to_tensors(find(case.system), layer, of_layer)
    for name in case.names("grad_"):
        if name != "grad_u":
            case.check(name, tensors[name.removeprefix("grad_")], gap_is_of_others=True)


def test_the_table_round_trips(case, layer, tmp_path):
    convert.export(layer, tmp_path)
    assert convert.load(case.system, tmp_path).config == layer.config
    tensors, exported = read_tensors(case.folder), read_tensors(tmp_path)
    assert exported.keys() == tensors.keys()
    for name, value in exported.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_every_array_was_looked_at(case):
    case.assert_all_looked_at()


@pytest.mark.parametrize("folder", MATRICES, ids=lambda folder: folder.name)
def test_hippo_matrices(folder):
    """A case without weights; its eigenvalues are in the order of eigh."""
    case = Case(folder)
    a, b = hippo.legs(case.config["N"])
    eigenvalues, _, low_rank = hippo.legs_normal_plus_rank_one(case.config["N"])
    case.check("A", a)
    case.check("B", b)
    case.check("P", low_rank)
    case.check("Lambda_re", eigenvalues.real)
    case.check("Lambda_im", eigenvalues.imag)
    case.check("Lambda_sorted_imag", np.sort(eigenvalues.imag))
    case.assert_all_looked_at()
