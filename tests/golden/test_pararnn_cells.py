"""ParaGRU and ParaLSTM against their originals: states, gradients, Jacobians, every iterate of
Newton's method, and the gradients at iterates that have not converged."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.convert.engine import find, to_tensors
from jaxrec.layers.activations import activation
from jaxrec.layers.pararnn import ParaRNN
from jaxrec.ops.cells import ParaLSTMParams, para_gru, para_lstm
from jaxrec.ops.newton import newton_scan
from jaxrec.ops.newton.jacobian import value_and_jacobian
from tests.golden.harness import cases, check_round_trip


def is_cell(folder):
    return "cell" in json.loads((folder / "config.json").read_text())


FOLDERS = [folder for folder in cases("pararnn") if is_cell(folder)]
RESOLUTION = 2.0**-52


def packed(states):
    """(b t 2 d) as the original packs it, (b t 2d)."""
    return np.asarray(states).reshape(*states.shape[:2], -1)


@pytest.mark.parametrize("method", ["newton", "sequential"])
def test_output_states_and_gradients(case, model: ParaRNN, method):
    """In float32, by the layer."""
    cotangent = jnp.asarray(case["cotangent"])
    solver = dataclasses.replace(model.solver, method=method)

    @jax.jit
    def run(model, x):
        def loss(model, x):
            model.solver = solver
            states, _ = model.solve(model.inputs(x), model.init_state(x.shape[0]))
            y = states[:, :, 1] if model.config.cell == "lstm" else states
            return jnp.sum(y * cotangent), (y, states)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(model, x)

    (gradient, dx), (y, states) = run(model, jnp.asarray(case["x"]))
    case.check("y_seq", y)
    case.check("state_seq", packed(states))
    case.check("grad_x", dx)
    for name, tensor in to_tensors(find("pararnn"), model, gradient).items():
        case.check(f"grad_{name}", tensor)


class Original:
    """The case's cell in float64, and Newton's method as the original iterates it."""

    def __init__(self, case):
        self.config = case.load_model().config
        self.tensors = {
            name: jnp.asarray(np.asarray(value), jnp.float64)
            for name, value in to_tensors(find("pararnn"), case.load_model()).items()
        }
        self.x = jnp.asarray(case["x"], jnp.float64)
        self.omega = case.config["omega_sor"]
        names = self.config.nonlinearities
        self.functions = [activation(name) for name in names]
        self.is_lstm = self.config.cell == "lstm"
        cell = para_lstm if self.is_lstm else para_gru
        self.cell = functools.partial(
            cell, **dict(zip(self.config.roles, self.functions, strict=True))
        )

    def params(self, tensors):
        if self.is_lstm:
            return ParaLSTMParams(tensors["A"], tensors["C"])
        return tensors["A"]

    def gates(self, tensors, x):
        heads, fan_in, *_ = tensors["B"].shape
        split = x.reshape(*x.shape[:2], heads, fan_in)
        u = jnp.einsum("bthi,higs->btghs", split, tensors["B"])
        return u.reshape(*u.shape[:3], -1) + tensors["b"][None, None]

    def zero(self):
        d = self.config.width
        return jnp.zeros((self.x.shape[0], 2, d) if self.is_lstm else (self.x.shape[0], d))

    def step(self, params, h, inputs):
        return self.cell(params, h, inputs[0])

    def as_differentiated(self, params, before, inputs):
        """A step with the original's derivatives: those of the LSTM take the output gate and the
        last tanh at the iterate's own c, and not at the c that follows from the state before."""
        u, own = inputs
        if not self.is_lstm:
            return self.cell(params, before, u)
        (a, p), (forget, output, candidate, squash) = params, self.functions
        c, h = before[:, 0], before[:, 1]
        f = forget(a[0][None] * h + u[:, 0] + p[0][None] * c)
        new = f * c + (1 - f) * candidate(a[2][None] * h + u[:, 2])
        new = own[:, 0] + new - jax.lax.stop_gradient(new)
        o = output(a[1][None] * h + u[:, 1] + p[1][None] * new)
        return jnp.stack([new, o * squash(new)], axis=1)

    def jacobian(self, params, before, inputs):
        def along(direction):
            run = functools.partial(self.as_differentiated, params)
            return jax.jvp(lambda h: run(h, inputs), (before,), (direction,))[1]

        if not self.is_lstm:
            return along(jnp.ones_like(before))
        columns = [along(jnp.zeros_like(before).at[:, j].set(1)) for j in range(2)]
        return jnp.stack(columns, axis=2)

    def solve(self, tensors, x, guess, relaxation):
        """One iteration."""
        h, _ = newton_scan(
            self.step,
            self.params(tensors),
            (self.gates(tensors, x), guess),
            self.zero(),
            jacobian=self.jacobian,
            method="newton",
            guess=guess,
            max_iters=1,
            tol=RESOLUTION,
            relaxation=relaxation,
            safeguard=False,
            check=False,
        )
        return h

    def stopped(self, tensors, x, iterate):
        """An iterate, with the gradient that the original gives it."""
        h, _ = newton_scan(
            self.as_differentiated,
            self.params(tensors),
            (self.gates(tensors, x), iterate),
            self.zero(),
            method="newton",
            guess=iterate,
            max_iters=0,
            safeguard=False,
        )
        return h

    def once(self, before, inputs):
        """f(h_{t-1}, x_t) at all times."""
        params = self.params(self.tensors)
        return jax.vmap(self.step, in_axes=(None, 1, 1), out_axes=1)(params, before, inputs)


@pytest.fixture(scope="module")
def original(case):
    with jax.enable_x64(True):
        return Original(case)


@pytest.fixture(scope="module")
def iterates(case, original):
    """From f(x, 0) on, as many as the case has residuals of."""
    with jax.enable_x64(True):
        u = original.gates(original.tensors, original.x)
        zeros = jnp.zeros((*u.shape[:2], *original.zero().shape[1:]))
        guess = original.once(zeros, (u, zeros))
        improve = jax.jit(lambda h: original.solve(original.tensors, original.x, h, original.omega))
        found = [guess]
        for _ in range(len(case["newton_residual_inf"]) - 1):
            found.append(improve(found[-1]))
        return found


def test_every_iterate(case, original, iterates):
    with jax.enable_x64(True):
        u = original.gates(original.tensors, original.x)
        residuals, errors = [], []
        for h in iterates:
            before = jnp.pad(h[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (h.ndim - 2))
            residuals.append(np.max(np.abs(original.once(before, (u, h)) - h)))
            errors.append(np.max(np.abs(packed(h) - case["state_seq"])))
        for name in case.names("newton_state_"):
            case.check(name, packed(iterates[int(name.removeprefix("newton_state_"))]))
        case.check("newton_residual_inf", np.array(residuals))
        case.check("newton_error_inf", np.array(errors))


def test_jacobian_at_the_solution(case, original):
    with jax.enable_x64(True):
        states = jnp.asarray(case["state_seq"])
        size = 2 if original.is_lstm else 1
        states = states.reshape(*states.shape[:2], size, -1)
        before = jnp.pad(states[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])
        u = original.gates(original.tensors, original.x)

        def function(before):
            shaped = before if original.is_lstm else before[:, :, 0]
            return original.once(shaped, (u, shaped)).reshape(before.shape)

        _, jacobian = value_and_jacobian(function, before)
        if not original.is_lstm:
            case.check("jac_at_solution", jacobian[:, :, 0])
            return
        by_row = np.swapaxes(np.asarray(jacobian), -1, -2)  # (b t i d j)
        case.check("jac_at_solution", by_row.reshape(*by_row.shape[:2], -1, 2))


def test_outputs_and_gradients_after_few_iterations(case, original, iterates):
    """One solve backwards at whatever the iteration has come to."""
    with jax.enable_x64(True):
        cotangent = jnp.asarray(case["cotangent"], jnp.float64)

        @jax.jit
        def run(tensors, x, guess):
            def loss(tensors, x):
                h = original.stopped(tensors, x, guess)
                y = h[:, :, 1] if original.is_lstm else h
                return jnp.sum(y * cotangent), y

            return jax.grad(loss, argnums=(0, 1), has_aux=True)(tensors, x)

        for name in case.names("parallel"):
            match = re.fullmatch(r"parallel(\d+)_y", name)
            if match is None:
                continue
            (dtensors, dx), y = run(original.tensors, original.x, iterates[int(match[1])])
            case.check(name, y)
            for tensor, gradient in (dtensors | {"x": dx}).items():
                case.check(f"parallel{match[1]}_grad_{tensor}", gradient)


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
