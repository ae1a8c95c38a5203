"""Golden cases: numbers from the original implementations, found by folder and compared array by
array."""

import json
import os
import re
from decimal import Decimal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec import convert
from jaxrec.convert import engine
from jaxrec.testing import assert_close
from tests.convert.folders import assert_loads_as

OWN_COPY = Path(__file__).parent / "data"
LARGEST_RELATIVE_ERROR = 1e-4
# Where no gap is stated, the arrays were computed in float64 and then rounded to float32.
ROUNDED_RELATIVE_ERROR = 1e-5
# A stated gap may be 0, where both results of the original are equal after rounding; yet another
# order of sums is a unit in the last place of the largest value away, which is taken as the gap.
SMALLEST_RELATIVE_GAP = 2**-23


def cases(system: str) -> list[Path]:
    """Every case folder of a system under each root of JAXREC_GOLDEN."""
    roots = (os.environ.get("JAXREC_GOLDEN") or str(OWN_COPY)).split(os.pathsep)
    found = sorted(
        folder for root in roots for folder in (Path(root) / system).glob("*/") if folder.is_dir()
    )
    assert found, f"no golden case of {system} under {roots}"
    return found


def of_no_case(item) -> bool:
    """Whether a collected test stands for an empty list of parameters, which pytest marks to be
    skipped.
    """
    skips = (mark.kwargs.get("reason", "") for mark in item.iter_markers("skip"))
    return any(reason.startswith("got empty parameter set") for reason in skips)


class Case:
    """One case: configuration, weights through the public converter, and arrays that must all be
    looked at."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.system = folder.parent.name
        self.config = json.loads((folder / "config.json").read_text())
        with np.load(folder / "cases.npz", allow_pickle=False) as arrays:
            self.arrays = dict(arrays)
        self.looked_at: set[str] = set()
        readme = (folder / "README.md").read_text()
        self.gap, self.relative_gap = _stated_gap(readme), _stated_floor(readme)
        self.gaps = _stated_gaps_of_arrays(readme)
        self.cached_gap = _stated_gap_of_cached_decoding(readme)

    def check_fields(self, *known: str) -> None:
        """Fails on a configuration field that no test knows, where no table looks at them."""
        unknown = sorted(self.config.keys() - set(known))
        assert not unknown, f"{self.folder.name}: config.json has unknown fields {unknown}"

    def load_model(self):
        """The case's weights in our model."""
        return convert.load(self.system, self.folder)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """An input or expected array, which counts as looked at."""
        self.looked_at.add(name)
        return self.arrays[name]

    def names(self, prefix: str) -> list[str]:
        """Names of the arrays that begin with a prefix."""
        return [name for name in self.arrays if name.startswith(prefix)]

    def check(
        self,
        name: str,
        got,
        *,
        gap_is_of_others: bool = False,
        largest_relative_error: float = LARGEST_RELATIVE_ERROR,
        known_difference: float = 0.0,
    ) -> None:
        """Compares an expected array; integers exactly, floats within ten stated gaps and 1e-4 of
        the largest, unless a test shows by a measurement that it must be more.

        Where the original itself computes parts in float32, its README says below what part of the
        largest value its numbers mean nothing, and that counts as a gap too; so does a unit in the
        last place of the largest value. Without a stated gap 1e-5 of the largest is allowed, and at
        least as much with one of other arrays. A known difference, by which the README says that
        the array is not what its equations give, comes on top.
        """
        expected, got = self[name], np.asarray(got)
        if not np.issubdtype(expected.dtype, np.inexact):
            np.testing.assert_array_equal(got, expected, err_msg=name)
            return
        largest = np.max(np.abs(expected), initial=0)
        stated = [gap for gap in (self.gap, self.gaps.get(name)) if gap is not None]
        allowed = 0.0
        if stated:
            relative_gap = max(self.relative_gap, SMALLEST_RELATIVE_GAP)
            gap = max(*stated, relative_gap * largest)
            allowed = min(10 * gap, largest_relative_error * largest)
        if not stated or gap_is_of_others:
            allowed = max(allowed, ROUNDED_RELATIVE_ERROR * largest)
        assert_close(got, expected, atol=allowed + known_difference, name=name)

    def assert_all_looked_at(self, left: tuple[str, ...] = ()) -> None:
        """Fails when an array was not looked at, unless its name begins with one of `left`."""
        missed = [n for n in self.arrays if n not in self.looked_at and not n.startswith(left)]
        assert not missed, f"{self.folder.name}: nobody looked at {missed}"


def check_logits_and_gradients(case: Case, model, tokens, scales=None) -> None:
    """The logits of a language model, and the gradient of their sum weighted by cot_logits; of
    tensors in `scales` times a number.
    """
    cotangent = jnp.asarray(case["cot_logits"])

    @jax.jit
    def both(model):
        def loss(model):
            logits = model(tokens)[0]
            return jnp.sum(logits * cotangent), logits

        return jax.grad(loss, has_aux=True)(model)

    gradient, logits = both(model)
    case.check("logits", logits)
    tensors = engine.to_tensors(engine.find(case.system), model, gradient)
    for name in case.names("grad_"):  # the stated gap is one of the logits; gradients may be larger
        tensor = name.removeprefix("grad_").replace("__", ".")
        got = tensors[tensor] * (scales or {}).get(tensor, 1)
        case.check(name, got, gap_is_of_others=True)


def step_by_step(model, tokens, prefill: int = 1):
    """Logits (b t-prefill+1 vocab) of a language model after `prefill` tokens and each one more."""
    run = jax.jit(lambda model, tokens, state: model(tokens, state))
    state = model.init_state(tokens.shape[0], capacity=tokens.shape[1])
    new, state = run(model, tokens[:, :prefill], state)
    logits = [new[:, -1]]
    for t in range(prefill, tokens.shape[1]):
        new, state = run(model, tokens[:, t : t + 1], state)
        logits.append(new[:, 0])
    return np.stack(logits, axis=1)


def check_cached_decoding(case: Case, model, tokens) -> None:
    """Decoding one token at a time, against the logits of the whole sequence and, where the case
    has them, against the original's own: the last steps, of which the first ends the prefill.

    The original's decoding may differ from its own whole pass, by as much as the README says: that
    of Mamba-2 ignores a limit on the steps (time_step_limit), which its whole pass applies.
    """
    name, expected = "cached_step_logits", case["logits"]
    steps = case[name].shape[1] if name in case else tokens.shape[1]
    got = step_by_step(model, tokens, tokens.shape[1] - steps + 1)
    case.check("logits", np.concatenate([expected[:, :-steps], got], axis=1))
    if name in case:
        case.check(name, got, known_difference=case.cached_gap)


def check_hidden_states(case: Case, model, tokens) -> None:
    """The stream of a `RecurrentLM` after each block, from hidden_0 on, and then the normed one:
    the README says that hidden_0 is the embedding, which the arrays are not."""

    @jax.jit
    def streams(model, tokens):
        def body(x, layer):
            block, block_state = layer
            x, _ = block(x, block_state)
            return x, x

        blocks = model.init_state(tokens.shape[0]).blocks
        _, after = jax.lax.scan(body, model.embed(tokens), (model.blocks, blocks))
        return [*after, model.norm(after[-1])]

    for i, stream in enumerate(streams(model, tokens)):
        if f"hidden_{i}" in case:
            case.check(f"hidden_{i}", stream, gap_is_of_others=True)  # it is one of the logits


def check_round_trip(case: Case, model, folder: Path) -> None:
    """What is exported loads as the same model, and holds the tensors that the case came with."""
    convert.export(model, folder, case.system)
    assert_loads_as(case.system, folder, model)
    tensors, exported = engine.read_tensors(case.folder), engine.read_tensors(folder)
    system = engine.find(case.system)
    left_out = {*system.repeated(model.config), *system.ignored}
    assert exported.keys() == tensors.keys() - left_out
    for name, value in exported.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def _stated_gap(readme: str) -> float | None:
    """The float32-float64 gap of the original that the case's README states, if it does."""
    match = re.search(
        r"float32\s*-\s*float64[^|:]*\|[^:]*:\s*([\d.]+e[-+]\d+)|float32-vs-float64\D*([\d.]+e[-+]\d+)",
        readme,
    )
    return float(match[1] or match[2]) if match else None


def _stated_gaps_of_arrays(readme: str) -> dict[str, float]:
    """Gaps that the README states array by array: in a list below a line on float32 and float64,
    behind the name of one, or in a list of the output and of gradients of weights,
    `- grad key.weight: 1.2e-06, ...`.
    """
    _, _, listed = readme.partition("own float32 and float64 results (max abs):")
    found = re.findall(r"^- (\w+): ([\d.]+e[-+]\d+)$", listed, re.MULTILINE)
    found += re.findall(r"float32 vs float64: (\w+) ([\d.]+e[-+]\d+)", readme)
    weights = re.findall(r"^- (out|grad)( [\w.]+)?: ([\d.]+e[-+]\d+), ", readme, re.MULTILINE)
    found += [
        (kind + name.replace(" ", "_").replace(".", "__"), gap) for kind, name, gap in weights
    ]
    return {name: float(gap) for name, gap in found}


def _stated_gap_of_cached_decoding(readme: str) -> float:
    """By how much the original's decoding is away from its whole pass, at most: what is stated and
    half a unit of its last digit, for it is rounded; 0 if nothing is stated.
    """
    match = re.search(r"cached-vs-full difference ([\d.]+e[-+]\d+)", readme)
    if match is None:
        return 0.0
    stated = Decimal(match[1])
    return float(stated + Decimal((0, (5,), int(stated.as_tuple().exponent) - 1)))


def _stated_floor(readme: str) -> float:
    """The noise of the original relative to its largest value, where the README states it: the gap
    of one array in these terms, which holds for others of another size, or a floor for all.
    """
    stated = re.findall(
        r"relative to max\s+([\d.]+e[-+]\d+)|([\d.]+e[-+]\d+) (?:relative|of the largest)", readme
    )
    return max((float(a or b) for a, b in stated), default=0.0)
