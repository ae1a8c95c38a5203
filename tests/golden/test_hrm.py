"""HRM against its original: segments of training with their gradients and draws, evaluation, the
puzzles' vectors."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec import convert
from jaxrec.convert import engine
from jaxrec.models.hrm import Carry, Latent, Rows
from jaxrec.training import pondering
from jaxrec.training.optim import sign_sgd_rows
from tests.convert.folders import assert_loads_as
from tests.golden.harness import cases

FOLDERS = cases("hrm")
ROWS = ("inputs", "labels", "puzzle_identifiers")
METRICS = {
    "count": "count",
    "accuracy": "accuracy",
    "exact_accuracy": "exact_accuracy",
    "q_halt_accuracy": "q_halt_accuracy",
    "steps": "segments",
    "lm_loss": "answer_loss",
    "q_halt_loss": "q_halt_loss",
    "q_continue_loss": "q_continue_loss",
}


def rows_of(case, prefix):
    return Rows(*(jnp.asarray(case[prefix + name], jnp.int32) for name in ROWS))


def calls(case, kind):
    return sorted({int(name.split(":")[0].removeprefix(kind)) for name in case.names(kind)})


def draws_of(case, at, rows):
    """What exploration drew; where it cannot matter, the original need not draw."""
    if f"{at}explore_uniform" not in case:
        assert case.config["halt_max_steps"] == 1 or case.config["halt_exploration_prob"] == 0
        return pondering.Draws(jnp.ones(rows), jnp.full(rows, 2, jnp.int32))
    uniform, least = case[f"{at}explore_uniform"], case[f"{at}explore_min_steps"]
    return pondering.Draws(jnp.asarray(uniform), jnp.asarray(least))


def carry_after(case, at, model):
    """The original's own carry behind a call, from which the next one goes on.

    Segments amplify rounding: a chain of eight with three cycles of three, of random weights, ends
    in float32 between 1e-4 and 0.8 of the largest value off float64 (a NumPy port of the equations,
    12 seeds, three sizes), the original no better than ours. One segment from a given carry is at
    most 5e-5 off, and the carry behind each is compared, so that the whole chain is.
    """
    high, low = jnp.asarray(case[f"{at}z_H"]), jnp.asarray(case[f"{at}z_L"])
    assert high.dtype == model.compute_dtype
    return Carry(
        Latent(high, low),
        jnp.asarray(case[f"{at}steps"], jnp.int32),
        jnp.asarray(case[f"{at}halted"], jnp.bool_),
        rows_of(case, f"{at}current_"),
    )


@jax.jit
def run(model, carry, offered, explore):
    """A segment with its gradient by parameters and by the vectors of the puzzles."""
    carry = pondering.take_next(model, carry, offered)

    def loss(model, vectors):
        return pondering.segment(model, carry, vectors, explore)

    vectors = model.vectors_of(carry.rows.puzzle)
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, vectors)


def check(case, at, loss, segment):
    latent = segment.carry.latent
    case.check(f"{at}z_H", latent.high)
    case.check(f"{at}z_L", latent.low)
    case.check(f"{at}steps", segment.carry.steps)
    case.check(f"{at}halted", segment.carry.halted)
    for name, got in zip(ROWS, segment.carry.rows, strict=True):
        case.check(f"{at}current_{name}", got)
    case.check(f"{at}logits", segment.logits)
    case.check(f"{at}q_halt_logits", segment.q[:, 0])
    case.check(f"{at}q_continue_logits", segment.q[:, 1])
    case.check(f"{at}loss", loss)
    for name in case.names(f"{at}metric_"):
        case.check(name, segment.metrics[METRICS[name.removeprefix(f"{at}metric_")]])
    assert (segment.target is not None) == (f"{at}target_q_continue" in case)
    if segment.target is not None:
        case.check(f"{at}target_q_continue", segment.target)


def test_training(case, model):
    carry = model.init_carry(rows_of(case, "batch0:"))
    for i in calls(case, "train"):
        at = f"train{i}:"
        offered = rows_of(case, f"batch{i}:")
        explore = draws_of(case, at, len(offered.tokens))
        (loss, segment), (gradient, of_vectors) = run(model, carry, offered, explore)
        check(case, at, loss, segment)
        carry = carry_after(case, at, model)
        if f"{at}puzzle_ids_used" in case:
            np.testing.assert_array_equal(case[f"{at}puzzle_ids_used"], carry.rows.puzzle)
        for name in case.names(f"{at}grad:"):
            if name.endswith("puzzle_emb_per_example"):
                case.check(name, of_vectors)
            else:
                tensors = engine.to_tensors(engine.find("hrm"), model, gradient)
                prefix = engine.find("hrm").prefix
                case.check(name, tensors[prefix + name.removeprefix(f"{at}grad:")])


def test_evaluation(case, model):
    @jax.jit
    def run(model, carry, offered):
        carry = pondering.take_next(model, carry, offered)
        return pondering.segment(model, carry, model.vectors_of(carry.rows.puzzle))

    offered = rows_of(case, "batch0:")
    carry = model.init_carry(offered)
    for i in calls(case, "eval"):
        loss, segment = run(model, carry, offered)
        check(case, f"eval{i}:", loss, segment)
        carry = carry_after(case, f"eval{i}:", model)
    assert np.all(carry.halted)


def test_vectors_move_by_the_sign(case, model):
    if model.puzzle_vectors is None:
        assert "signsgd_weights_after" not in case
        return
    rate, weight_decay = case["signsgd_lr_wd"]
    [last] = [i for i in calls(case, "train")[::-1] if f"train{i}:puzzle_ids_used" in case][:1]
    after = sign_sgd_rows(
        model.puzzle_vectors[...],
        jnp.asarray(case[f"train{last}:puzzle_ids_used"]),
        jnp.asarray(case[f"train{last}:grad:puzzle_emb_per_example"]),
        rate=float(rate),
        weight_decay=float(weight_decay),
    )
    case.check("signsgd_weights_after", after)


def test_the_table_round_trips(case, model, tmp_path):
    convert.export(model, tmp_path, "hrm")
    assert_loads_as("hrm", tmp_path, model)
    tensors, exported = engine.read_tensors(case.folder), engine.read_tensors(tmp_path)
    for name, value in tensors.items():
        at = "_orig_mod." + name.removeprefix("_orig_mod.")
        np.testing.assert_array_equal(exported.pop(at), value, err_msg=name)
    assert not exported


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
