"""RecurrentGemma against its originals: the language model, and the RG-LRU alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.convert.engine import find, to_tensors
from jaxrec.ops import attention, rotary
from tests.golden.harness import (
    Case,
    cases,
    check_logits_and_gradients,
    check_round_trip,
    step_by_step,
)


def is_language_model(folder):
    """Such a case has token ids; the unit alone has not."""
    with np.load(folder / "cases.npz") as arrays:
        return "input_ids" in arrays


FOUND = cases("recurrentgemma")
FOLDERS = [folder for folder in FOUND if is_language_model(folder)]
UNITS = [folder for folder in FOUND if folder not in FOLDERS]


def test_logits_and_gradients(case, model, tokens):
    check_logits_and_gradients(case, model, tokens)


def test_step_by_step(case, model, tokens):
    """The ring of keys and the states give the logits of the whole pass, past the window too."""
    case.check("logits", step_by_step(model, tokens))


def test_hidden_states(case, model, tokens):
    for i, stream in enumerate(jax.jit(streams)(model, tokens)):
        if f"hidden_{i}" in case:
            case.check(f"hidden_{i}", stream, gap_is_of_others=True)  # it is one of the logits


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """After the tests of the language model, which share the case."""
    case.assert_all_looked_at()


def streams(model, tokens):
    """The embedding, the stream after every block but the last, and the normed one after that."""
    config = model.config
    view, _ = attention.open_view(None, tokens.shape, window=config.window)
    angles = None
    if "attention" in config.mixers:
        angles = rotary.rotation(view.positions, config.rotary_width, config.rotary_base)
    reset = view.positions == 0
    found = [model.embed(tokens)]
    for i, mixer in enumerate(config.mixers):
        group, place = divmod(i, len(config.pattern))
        if (group + 1) * len(config.pattern) <= config.layers:
            block = jax.tree.map(lambda leaf: leaf[group], model.groups.blocks[place])  # noqa: B023
        else:
            block = model.tail.blocks[place]
        if mixer == "recurrent":
            x, _ = block(found[-1], block.mixer.init_state(tokens.shape[0]), reset=reset)
        else:
            x, _ = block(found[-1], None, view=view, angles=angles)
        found.append(x)
    return [*found[:-1], model.norm(found[-1])]


@pytest.fixture(params=UNITS, ids=lambda folder: folder.name, scope="module")
def unit_case(request):
    case = Case(request.param)
    case.system = "rglru"  # the folder is named after the whole family
    return case


@pytest.fixture(scope="module")
def unit(unit_case):
    return unit_case.load_model()


def test_the_table_of_the_unit_round_trips(unit_case, unit, tmp_path):
    check_round_trip(unit_case, unit, tmp_path)


def test_the_unit_alone(unit_case, unit):
    x = jnp.asarray(unit_case["x"])
    reset = jnp.asarray(unit_case["segment_pos"] == 0)
    run = jax.jit(lambda unit, x, h, reset: unit(x, h, reset=reset))
    y, last = run(unit, x, unit.init_state(x.shape[0]), reset)
    unit_case.check("y", y)
    unit_case.check("last_h", last)
    half = x.shape[1] // 2
    first, middle = run(unit, x[:, :half], unit.init_state(x.shape[0]), reset[:, :half])
    unit_case.check("mid_h", middle)
    second, last = run(unit, x[:, half:], middle, reset[:, half:])
    unit_case.check("y", jnp.concatenate([first, second], axis=1))
    unit_case.check("last_h", last)


def test_the_gradients_of_the_unit(unit_case, unit):
    reset = jnp.asarray(unit_case["segment_pos"] == 0)
    cotangent = jnp.asarray(unit_case["cot_y"])

    @jax.jit
    def gradient(unit, x):
        def loss(unit, x):
            return jnp.sum(unit(x, unit.init_state(x.shape[0]), reset=reset)[0] * cotangent)

        return jax.grad(loss, argnums=(0, 1))(unit, x)

    of_unit, of_x = gradient(unit, jnp.asarray(unit_case["x"]))
    unit_case.check("grad_x", of_x)
    tensors = to_tensors(find(unit_case.system), unit, of_unit)
    for name in unit_case.names("grad_"):
        if name != "grad_x":
            unit_case.check(name, tensors[name.removeprefix("grad_").replace("__", ".")])


def test_every_array_of_the_unit_was_looked_at(unit_case):
    """Last in this file."""
    unit_case.assert_all_looked_at()
