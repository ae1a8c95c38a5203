"""The first bad operation: found where it is, named by module, and masks are no fault."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxrec.analysis.nonfinite import Finding, first_nonfinite, first_nonfinite_leaf
from jaxrec.models.huginn import HuginnConfig
from jaxrec.ops.time import linear_scan

CONFIG = HuginnConfig(
    vocab_size=11,
    width=8,
    heads=2,
    mlp_width=12,
    prelude_layers=1,
    core_layers=2,
    coda_layers=1,
    context=8,
    mean_depth=3,
    backprop_depth=2,
)
TOKENS = jnp.array([[1, 4, 2, 8, 5]])


def log(x):
    """NaN where x < 0, in the scope "inner"."""
    with jax.named_scope("inner"):
        return jnp.log(x)


def test_an_operation_is_named_by_its_scopes_and_its_line():
    def function(x):
        with jax.named_scope("outer"):
            return log(x * 2).sum()

    finding = first_nonfinite(function, jnp.array([1.0, -1.0]))
    line = log.__code__.co_firstlineno + 3
    assert finding.source.endswith(f"tests/analysis/test_nonfinite.py:{line}")
    assert str(finding).startswith("outer/inner: log made NaN in float32 (2,) at ")
    assert (finding.loops, finding.gradient) == ((), False)


def test_nothing_is_found_in_a_clean_function_or_in_its_gradient():
    def loss(x):
        return log(x).sum()

    assert first_nonfinite(jax.value_and_grad(loss), jnp.array([1.0, 2.0])) is None


def test_an_infinity_is_found_where_it_begins_not_where_it_becomes_nan():
    def function(x):
        with jax.named_scope("overflow"):
            y = jnp.exp(x)
        with jax.named_scope("later"):
            return y - y

    finding = first_nonfinite(function, jnp.array([100.0]))
    assert (finding.module, finding.operation, finding.value) == ("overflow", "exp", "Inf")


@pytest.mark.parametrize("reverse", [False, True])
def test_in_a_scan_the_iteration_is_named(reverse):
    def function(x):
        def body(carry, x):
            return carry + x, log(x)

        with jax.named_scope("outer"):
            return lax.scan(body, jnp.zeros(()), x, reverse=reverse)

    finding = first_nonfinite(function, jnp.array([1.0, 1.0, 1.0, -1.0, 1.0]))
    assert (finding.module, finding.loops) == ("outer/inner", ("scan 3",))
    assert str(finding).startswith("outer/inner [scan 3]: log made NaN in float32 ()")


def test_in_a_while_loop_the_iteration_is_named():
    def function(x):
        def body(carry):
            i, x = carry
            return i + 1, x - 1 + 0 * log(x)

        return lax.while_loop(lambda carry: carry[0] < 5, body, (0, x))[1]

    finding = first_nonfinite(function, jnp.array(1.5))
    assert (finding.module, finding.loops, finding.operation) == ("inner", ("while 2",), "log")


def test_a_while_loop_with_an_end_per_element_is_followed():
    def until_above_2(x):
        return lax.while_loop(lambda x: x < 2, lambda x: x * x + 1 / (x - 1), x)

    assert first_nonfinite(jax.vmap(until_above_2), jnp.array([1.5, 3.0])) is None
    finding = first_nonfinite(jax.vmap(until_above_2), jnp.array([1.5, 3.0, 1.0]))
    assert (finding.operation, finding.loops) == ("div", ("while 0",))


def test_of_a_condition_the_branch_taken_is_followed():
    def function(chosen, x):
        return lax.cond(chosen, log, lambda x: x, x)

    assert first_nonfinite(function, False, jnp.array(-1.0)) is None
    finding = first_nonfinite(function, True, jnp.array(-1.0))
    assert (finding.module, finding.operation) == ("inner", "log")


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_calls_are_opened(wrap):
    def function(x):
        with jax.named_scope("outer"):
            return wrap(log)(x)

    finding = first_nonfinite(jax.value_and_grad(function), jnp.array(-1.0))
    assert (finding.module, finding.operation) == ("outer/inner", "log")


def test_what_is_spread_over_devices_is_judged_as_a_whole():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    function = jax.shard_map(log, mesh=mesh, in_specs=spec, out_specs=spec)
    assert first_nonfinite(function, jnp.ones(8)) is None
    assert first_nonfinite(function, -jnp.ones(8)).operation == "shard_map"


def test_inputs_of_a_donating_function_survive():
    x = jnp.array([-1.0])
    assert first_nonfinite(jax.jit(log, donate_argnums=0), x).operation == "log"
    assert x[0] == -1


def test_a_custom_gradient_rule_is_opened():
    def loss(a, b):
        with jax.named_scope("memory"):
            return linear_scan(a, b)[1].sum()

    b = jnp.ones((1, 4, 2))
    finding = first_nonfinite(jax.value_and_grad(loss), jnp.full((1, 4, 2), 1e20), b)
    assert (finding.module, finding.operation) == ("memory", "mul")
    assert finding.loops == ("scan 2",)  # 1e20, 1e40 > the largest float32
    assert finding.source.startswith("jaxrec/ops/time/scan.py:")


def test_a_custom_gradient_rule_may_fail_in_the_gradient_only():
    def loss(a, b, h0):
        with jax.named_scope("memory"):
            return linear_scan(a, b, h0)[1].sum()

    a = jnp.array([0.0, 1e30, 1e30]).reshape(1, 3, 1)
    zero = jnp.zeros((1, 3, 1))
    finding = first_nonfinite(jax.value_and_grad(loss), a, zero, jnp.ones((1, 1)))
    assert (finding.module, finding.gradient) == ("memory", True)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_failure_of_the_gradient_alone_is_said_to_be_in_the_gradient(wrap):
    def loss(x):
        def body(total, x):
            with jax.named_scope("norm"):
                return total + jnp.sqrt(x), None

        with jax.named_scope("core"):
            return lax.scan(body, jnp.zeros(()), x)[0]

    finding = first_nonfinite(wrap(jax.value_and_grad(loss)), jnp.array([1.0, 0.0]))
    assert (finding.module, finding.gradient, finding.loops) == ("core/norm", True, ("scan 1",))
    assert str(finding).startswith("core/norm [scan 1], in the gradient: div made Inf")


def test_a_failure_of_the_backward_pass_is_said_to_be_in_the_gradient():
    def loss(x):
        with jax.named_scope("core"):
            return (jax.checkpoint(jnp.sqrt)(x) * 1e-30 * 1e30).sum()

    finding = first_nonfinite(jax.grad(loss), jnp.array([0.0]))
    assert (finding.module, finding.gradient) == ("core", True)
    assert (
        "tests/analysis/test_nonfinite.py:" in finding.source
    )  # though jnp.sqrt's inside has none


def test_masks_are_no_fault():
    def attend(scores, mask, running):
        scores = jnp.where(mask, scores, -jnp.inf)
        lowest = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        running = lax.cummax(jnp.where(mask, running, -jnp.inf), axis=1)
        return jax.nn.softmax(scores), scores, lowest, running

    scores, mask = jnp.ones((3, 3)), jnp.tri(3, dtype=bool)
    assert first_nonfinite(attend, scores, mask, scores) is None
    assert first_nonfinite(jax.jit(attend), scores, mask, scores) is None


def test_a_mask_does_not_hide_a_failure():
    def attend(scores, mask):
        with jax.named_scope("attention"):
            return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))

    finding = first_nonfinite(
        jax.jit(attend), jnp.ones((2, 2)), jnp.array([[True] * 2, [False] * 2])
    )
    assert (finding.module, finding.value) == ("attention", "NaN")


def test_a_nan_that_was_written_is_a_fault_where_it_is_chosen():
    def function(x):
        return jnp.where(x > 0, x, jnp.nan)

    assert first_nonfinite(function, jnp.ones(2)) is None
    assert first_nonfinite(function, -jnp.ones(2)).operation == "select_n"


def huginn_loss(model):
    logits, _ = model(TOKENS, depth=jnp.asarray(3), remat="sqrt")
    return jax.nn.logsumexp(logits, axis=-1).mean()


@pytest.mark.parametrize(
    "part, module, loops",
    [
        ("prelude", "prelude/mlp", ("scan 0",)),
        ("core", "core/mlp", ("while 0", "scan 1")),
        ("coda", "coda/mlp", ("scan 0",)),
    ],
)
def test_an_overflow_in_a_model_is_named_by_its_block(part, module, loops):
    model = CONFIG.build(rngs=nnx.Rngs(0))
    kernel = getattr(model, part).mlp.up.kernel
    kernel[...] = kernel[...].at[-1].set(3e38)
    finding = first_nonfinite(jax.value_and_grad(huginn_loss), model)
    assert (finding.module, finding.loops, finding.gradient) == (module, loops, False)
    assert finding.source.startswith("jaxrec/layers/")


def test_a_fresh_model_and_its_gradient_are_clean():
    model = CONFIG.build(rngs=nnx.Rngs(0))
    assert first_nonfinite(jax.value_and_grad(huginn_loss), model) is None
    assert first_nonfinite_leaf(model) is None


def test_the_first_bad_leaf_is_named_by_its_path():
    model = CONFIG.build(rngs=nnx.Rngs(0))
    kernel = model.core.mlp.gate.kernel
    kernel[...] = kernel[...].at[1, 0, 0].set(jnp.inf)
    assert first_nonfinite_leaf(model) == "core/mlp/gate/kernel"
    assert first_nonfinite_leaf(nnx.to_pure_dict(nnx.state(model))) == "core/mlp/gate/kernel"
    assert first_nonfinite(huginn_loss, model).module == "core/mlp"


def test_leaves_of_any_kind_are_looked_at():
    tree = {"a": jax.random.key(0), "b": np.arange(3), "c": [1, "text", float("nan")]}
    assert first_nonfinite_leaf(tree) == "c/2"
    assert first_nonfinite_leaf({"m": jnp.array([jnp.inf], jnp.bfloat16)}) == "m"


def test_a_finding_outside_of_any_scope_reads_as_such():
    finding = first_nonfinite(jnp.log, jnp.array(-1.0))
    assert isinstance(finding, Finding)
    assert str(finding).startswith("outside any named scope: log made NaN in float32 ()")
