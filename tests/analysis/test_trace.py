"""The table of operations: from texts and events that are known, and from a real trace."""

import doctest
import time

import jax
import jax.numpy as jnp
import pytest

from jaxrec.analysis import trace
from jaxrec.analysis.trace import Event, Operation
from jaxrec.errors import UserError

TEXT = """HloModule jit_f, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%body (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(f)/jvp(core)/while/body/mlp/dot_general"}
  ROOT %tuple.2 = (s32[], f32[2]{0}) tuple(%add, %dot.1)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %while.3 = (s32[], f32[2]{0}) while(%t), condition=%c, body=%body, metadata={op_name="jit(f)/w"}
  %fusion.4 = bf16[2]{0:T(256)(128)} fusion(%x), kind=kLoop, metadata={op_name="jit(f)/head/exp"}
  ROOT %copy.5 = f32[2]{0} copy(%fusion.4)
}
"""


def test_the_example_in_the_docstring():
    assert doctest.testmod(trace).failed == 0


def test_a_program_says_what_its_operations_are():
    assert trace.operations(TEXT) == {
        "dot.1": Operation("dot", "core/mlp"),
        "tuple.2": Operation("tuple", ""),
        "while.3": Operation("while", ""),
        "fusion.4": Operation("fusion", "head"),
        "copy.5": Operation("copy", ""),
    }


@pytest.mark.parametrize(
    "name, scope",
    [
        ("jit(train)/transpose(jvp(core))/while/body/attention/dot_general", "core/attention'"),
        ("jit(f)/jit(main)/mul", ""),
        ("jit(f)/core/core/checkpoint/rematted_computation/mlp/add", "core/mlp"),
        ("jit(f)/transpose(jvp())/mul", ""),
        ("mul", ""),
    ],
)
def test_scopes(name, scope):
    assert trace.scope_of(name) == scope


def test_time_is_counted_where_it_is_spent_and_of_one_program():
    events = [
        Event("while.3", "jit_f", 100.0),
        Event("dot.1", "jit_f", 30.0),
        Event("dot.1", "jit_f", 45.0),
        Event("copy.5", "jit_f", 24.0),
        Event("unknown.6", "jit_f", 1.0),
        Event("dot.1", "jit_g", 500.0),
    ]
    rows = trace.table(events, trace.operations(TEXT), "jit_f")
    assert [tuple(row) for row in rows] == [
        ("dot.1", "dot", "core/mlp", 2, 75.0, 0.75),
        ("copy.5", "copy", "", 1, 24.0, 0.24),
        ("unknown.6", "", "", 1, 1.0, 0.01),
    ]
    assert trace.by_scope(rows) == {"core/mlp": 0.75, "": 0.25}
    assert trace.table([], {}, "jit_f") == []


def test_a_real_trace(tmp_path):
    def f(x):
        with jax.named_scope("large"):
            x = jnp.sin(x @ x)
        with jax.named_scope("small"):
            return jnp.cumsum(x[:3])

    x = jnp.ones((300, 300))
    compiled = jax.jit(f).lower(x).compile()
    compiled(x).block_until_ready()
    begun = time.perf_counter_ns()
    with jax.profiler.trace(tmp_path):
        for _ in range(2):
            compiled(x).block_until_ready()
    spent = time.perf_counter_ns() - begun
    rows = trace.table(trace.read_events(tmp_path), trace.operations(compiled.as_text()), "jit_f")
    assert rows[0].scope == "large" and rows[0].runs % 2 == 0
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert 0 < rows[0].nanoseconds < spent


def test_no_trace_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no trace"):
        trace.read_events(tmp_path)
