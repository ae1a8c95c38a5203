"""Where a computation first goes wrong: the operation that made a NaN or an Inf, named by module.

A function is traced and its operations are evaluated one after another. Loops and calls run as a
whole; only one whose result is not finite is opened, and of a loop only the iterations that went
wrong.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core, source_info_util

CALLS = (
    "jit closed_call call core_call checkpoint remat remat2 custom_jvp_call custom_vjp_call".split()
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The first operation that made a NaN or an Inf; `str` gives one line for people."""

    module: str  # names of `jax.named_scope`, outermost first: "core/attention"; "" outside of any
    gradient: bool  # the operation serves the gradient only
    loops: tuple[str, ...]  # iterations that it ran in, outermost first: ("while 0", "scan 3")
    operation: str  # name of the JAX primitive, such as "exp"
    value: str  # what it made: "NaN" or "Inf"
    shape: tuple[int, ...]  # of its result
    dtype: str
    source: str  # file and line, "jaxrec/layers/mlp.py:43"; "" if unknown

    def __str__(self) -> str:
        where = self.module or "outside any named scope"
        loops = f" [{', '.join(self.loops)}]" if self.loops else ""
        gradient = ", in the gradient" if self.gradient else ""
        made = f"{self.operation} made {self.value} in {self.dtype} {self.shape}"
        return f"{where}{loops}{gradient}: {made}" + (f" at {self.source}" if self.source else "")


def first_nonfinite(function: Callable[..., Any], *args: Any) -> Finding | None:
    """Runs `function(*args)` operation by operation and names the first that made a NaN or an Inf.

    An operation made a NaN if its result holds one, and an Inf if its result holds one while its
    inputs were finite. The -inf of a mask is no fault: constants are taken as written. `function`
    may be a gradient, `jax.value_and_grad(loss)`: operations of the backward pass are said to be in
    the gradient, and so are factors that the forward pass prepares for it, if the loss is finite.

    Args:
      function: any traceable function of pytrees of arrays. Parts of it run more than once.
      *args: concrete arguments. Ask `first_nonfinite_leaf` about them first: of a NaN that comes
        with them, only the first operation that passes it on can be named.

    Returns:
      What was found; None if all that `function` returns is finite, or no operation is at fault.
    """
    jaxpr = jax.make_jaxpr(function)(*args)
    with jax.debug_nans(False), jax.debug_infs(False):
        outputs, finding = _walk(jaxpr, [jnp.asarray(x) for x in jax.tree.leaves(args)], _Place())
    return None if all(map(_finite, outputs)) else finding


def first_nonfinite_leaf(tree: Any) -> str | None:
    """The path of the first leaf with a NaN or an Inf, "core/mlp/gate/kernel"; None without one."""
    numbers = (Array, np.ndarray, np.generic, float, complex)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, numbers) and not _finite(leaf):
            # In an nnx.Module the array is a child of its nnx.Param.
            return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
    return None


class _Place(NamedTuple):
    """Where an equation stands, through all the calls and loops around it."""

    scopes: str = ""  # joined name stacks: "transpose(jvp(core))/attention"
    loops: tuple[str, ...] = ()
    source: str = ""  # the innermost that is known: jax.numpy's own calls have none

    def of(self, equation: core.JaxprEqn) -> "_Place":
        scopes = f"{self.scopes}/{equation.source_info.name_stack}"
        return self._replace(scopes=scopes, source=_source(equation) or self.source)

    def at(self, iteration: str) -> "_Place":
        return self._replace(loops=(*self.loops, iteration))

    @property
    def module(self) -> str:
        names = re.sub(r"\w+\(|\)", "", self.scopes).split("/")
        names = [name for name in names if name not in ("", "checkpoint", "rematted_computation")]
        # The gradient of jax.checkpoint names its scope twice.
        return "/".join(a for a, b in zip(names, [None, *names], strict=False) if a != b)

    @property
    def backward(self) -> bool:
        return "transpose(" in self.scopes

    @property
    def forward(self) -> bool:
        """In the forward pass of a function that is being differentiated."""
        return "jvp(" in self.scopes and not self.backward


def _walk(
    closed: core.ClosedJaxpr, arguments: Sequence[Any], place: _Place, fixed: Sequence[bool] = ()
) -> tuple[list[Any], Finding | None]:
    """The results and the first finding; `fixed` says which arguments are constants."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    constants = {var for var, is_fixed in zip(jaxpr.invars, fixed, strict=False) if is_fixed}
    last_use = {v: i for i, e in enumerate(jaxpr.eqns) for v in _variables(e.invars)}
    last_use.update(dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns)))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    finding: Finding | None = None
    for i, equation in enumerate(jaxpr.eqns):
        inputs = [read(atom) for atom in equation.invars]
        outputs = _evaluate(equation, inputs)
        fixed = [isinstance(a, core.Literal) or a in constants for a in equation.invars]
        if all(fixed):
            constants.update(equation.outvars)
        if finding is None and not all(map(_finite, outputs)):
            finding = _examine(equation, inputs, outputs, place.of(equation), fixed)
        values.update(zip(equation.outvars, outputs, strict=True))
        for var in {*_variables(equation.invars), *equation.outvars}:
            if last_use.get(var, i) <= i:  # as much memory as the function itself, not the sum
                values.pop(var, None)

    results = [read(atom) for atom in jaxpr.outvars]
    if finding is not None and not finding.gradient:
        # A factor such as 1 / sqrt(x) is made by the forward pass but serves only the gradient.
        forward = {v for e in jaxpr.eqns if place.of(e).forward for v in e.outvars}
        losses = [x for atom, x in zip(jaxpr.outvars, results, strict=True) if atom in forward]
        if losses and all(map(_finite, losses)):
            finding = replace(finding, gradient=True)
    return results, finding


def _variables(atoms: Sequence[Any]) -> list[core.Var]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _evaluate(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    params = equation.primitive.get_bind_params(equation.params)
    if "donated_invars" in params:  # the inputs are needed again, here and by the caller
        params = params | {"donated_invars": (False,) * len(inputs)}
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def _examine(
    equation: core.JaxprEqn,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    place: _Place,
    fixed: Sequence[bool],
) -> Finding | None:
    """What went wrong in an equation whose outputs are not all finite; None if that is no fault."""
    has_nan = any(map(_nan, outputs))
    if all(fixed) and (not has_nan or any(map(_nan, inputs))):
        return None
    for inside in _inside(equation, inputs, place, fixed):
        finding = _walk(*inside)[1]
        if finding is not None:
            return finding
    # Inside, an Inf was judged. A NaN is a fault even if operation by operation it does not show.
    opened = equation.primitive.name in (*CALLS, "cond", "scan", "while")
    if not has_nan and (opened or not all(map(_finite, inputs))):
        return None
    bad = next(x for x in outputs if (_nan(x) if has_nan else not _finite(x)))
    return Finding(
        module=place.module,
        gradient=place.backward,
        loops=place.loops,
        operation=equation.primitive.name,
        value="NaN" if has_nan else "Inf",
        shape=tuple(bad.shape),
        dtype=str(bad.dtype),
        source=place.source,
    )


def _inside(
    equation: core.JaxprEqn, inputs: Sequence[Any], place: _Place, fixed: Sequence[bool]
) -> Iterator[tuple[core.ClosedJaxpr, Sequence[Any], _Place, Sequence[bool]]]:
    """The jaxprs that the equation ran with results that are not finite, as `_walk` takes them."""
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        body = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        if not isinstance(body, core.ClosedJaxpr):
            body = core.ClosedJaxpr(body, ())
        yield body, inputs, place, fixed
    elif name == "cond":
        branch = min(max(int(inputs[0]), 0), len(params["branches"]) - 1)
        yield params["branches"][branch], inputs[1:], place, fixed[1:]
    elif name in ("scan", "while"):
        iterations = _scan if name == "scan" else _while
        for i, body, arguments, outputs in iterations(params, inputs):
            if not all(map(_finite, outputs)):
                yield body, arguments, place.at(f"{name} {i}"), ()


Iteration = tuple[int, core.ClosedJaxpr, list[Any], list[Any]]


def _scan(params: dict[str, Any], inputs: Sequence[Any]) -> Iterator[Iteration]:
    """The index, body, arguments and outputs of each iteration."""
    body, length, consts = params["jaxpr"], params["length"], params["num_consts"]
    xs_start = consts + params["num_carry"]
    carry, run = inputs[consts:xs_start], jax.jit(core.jaxpr_as_fun(body))
    for i in reversed(range(length)) if params["reverse"] else range(length):
        xs = [lax.dynamic_index_in_dim(x, i, keepdims=False) for x in inputs[xs_start:]]
        arguments = [*inputs[:consts], *carry, *xs]
        outputs = run(*arguments)
        yield i, body, arguments, outputs
        carry = outputs[: params["num_carry"]]


def _while(params: dict[str, Any], inputs: Sequence[Any]) -> Iterator[Iteration]:
    """As `_scan`. Under vmap the condition is an array, and elements that are done stay as is."""
    body, split = params["body_jaxpr"], params["cond_nconsts"]
    start = split + params["body_nconsts"]
    condition = jax.jit(core.jaxpr_as_fun(params["cond_jaxpr"]))
    run = jax.jit(core.jaxpr_as_fun(body))
    carry, i = inputs[start:], 0
    while (busy := condition(*inputs[:split], *carry)[0]).any():
        arguments = [*inputs[split:start], *carry]
        outputs = run(*arguments)
        if busy.ndim:
            outputs = [
                jnp.where(lax.expand_dims(busy, range(busy.ndim, new.ndim)), new, old)
                for new, old in zip(outputs, carry, strict=True)
            ]
        yield i, body, arguments, outputs
        carry, i = outputs, i + 1


def _source(equation: core.JaxprEqn) -> str:
    """The innermost line that is the user's or ours, rather than another library's."""
    frames = source_info_util.summarize(equation.source_info, num_frames=64).splitlines()[::-1]
    for frame in frames:
        if "/jaxrec/" in frame or "site-packages" not in frame:
            file, line = re.sub(r" \(.*", "", frame).split(":")[:2]
            return re.sub(r".*/(?=jaxrec/)", "", file) + f":{line}"
    return ""


def _finite(x: Any) -> bool:
    return not _is_inexact(x) or bool(_all_finite(x))


def _nan(x: Any) -> bool:
    return _is_inexact(x) and bool(_any_nan(x))


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.inexact)


_all_finite = jax.jit(lambda x: jnp.isfinite(x).all())
_any_nan = jax.jit(lambda x: jnp.isnan(x).any())
