"""S5 against its original: eigenvalues, outputs, all gradients; and the HiPPO matrices it begins
with.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.convert.engine import find, to_tensors
from jaxrec.ops import hippo
from tests.golden.harness import Case, cases, check_round_trip

FOUND = cases("s5")
FOLDERS = [folder for folder in FOUND if (folder / "weights.safetensors").exists()]
MATRICES = [folder for folder in FOUND if folder not in FOLDERS]


def test_discretised_eigenvalues(case, model):
    decay, _ = jax.jit(lambda layer: layer.discretized())(model)
    # The stated gap is one of y, whose largest value may be much smaller than theirs.
    case.check("Lambda_bar_re", jnp.real(decay), gap_is_of_others=True)
    case.check("Lambda_bar_im", jnp.imag(decay), gap_is_of_others=True)


def test_outputs(case, model):
    y, _ = jax.jit(lambda layer, u: layer(u))(model, case["u"][None])
    case.check("y", y[0])


def test_gradients(case, model):
    def loss(layer, u):
        return jnp.sum(layer(u)[0] * case["cot_y"][None])

    of_layer, of_u = jax.jit(jax.grad(loss, argnums=(0, 1)))(model, case["u"][None])
    # The stated gap is one of y: a unit in the last place of the largest gradient is already more.
    # Measured here: at most 1.2e-6 of the largest, in log_step, to which every step adds.
    case.check("grad_u", of_u[0], gap_is_of_others=True)
    tensors = to_tensors(find(case.system), model, of_layer)
    for name in case.names("grad_"):
        if name != "grad_u":
            case.check(name, tensors[name.removeprefix("grad_")], gap_is_of_others=True)


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


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
