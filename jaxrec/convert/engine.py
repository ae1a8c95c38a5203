"""Runs a conversion table in both directions and refuses whatever the table does not say.

A system's file gives a `System`: its name, how its configuration file maps to ours and back, and
`Rule`s. A rule names a tensor of the original and the parameter or parameters it becomes, or
several tensors that become one parameter; the tensors of a name with `{i}` are stacked along a new
leading axis.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.config import beside, read_json
from jaxrec.errors import UserError, nearest

Shape = tuple[int, ...]
_INDEX = "model.safetensors.index.json"
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError)
"""What a table raises of fields that nobody checks, of any type and size."""
SYSTEMS = (
    "deer_elk",
    "hrm",
    "huginn",
    "mamba",
    "mamba2",
    "pararnn",
    "plstm",
    "plstm_graph",
    "prefix_linear_attention",
    "recurrentgemma",
    "rglru",
    "rwkv",
    "s5",
    "xlstm",
)
"""Names of the systems that can be converted; each is a module beside this one."""
DTYPES = ("float32", "bfloat16", "float16")
"""Of the numbers of an exported checkpoint."""
SHARD_BYTES = 5 * 10**9
"""Of numbers in one exported file, as the Hugging Face hub cuts checkpoints."""
DESCRIBED_BY = {"plstm_vision": "plstm", "plstm_gates": "plstm"}
"""Modules whose configurations are in the table of another name."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table."""

    source: str | tuple[str, ...]  # name in the original, such as "layers.{i}.mlp.up.weight"
    targets: tuple[str, ...]  # parameter paths, such as ("blocks/mlp/up/kernel",)
    load: Callable[
        [Any, Sequence[Shape]], Sequence[np.ndarray]
    ]  # tensor, or a list of them for several sources, and target shapes -> parameters
    save: Callable[[Sequence[np.ndarray]], Any]  # parameters -> tensor or list, inverse of `load`
    numbers: tuple[int, ...] | None = None  # what {i} runs over; None: all that a checkpoint has

    @property
    def sources(self) -> tuple[str, ...]:
        """All names in the original."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def is_stacked(self) -> bool:
        """Whether the tensors of several layers become one parameter."""
        return "{i}" in self.sources[0]


@dataclasses.dataclass(frozen=True)
class System:
    """All that the engine needs to know of one published format."""

    name: str
    read_config: Callable[[Mapping[str, Any]], Any]  # the original's config.json -> ours
    write_config: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any], Sequence[Rule]]  # our configuration -> the table
    hint: str = ""  # how to make config.json and tensors of an original that has other files
    ignored: tuple[str, ...] = ()  # tensors of the original that hold nothing learned
    prefix: str = ""  # of all names in the table, which a checkpoint may leave out in part
    # Tensors that a checkpoint may hold although they only repeat another one: name -> the other.
    repeated: Callable[[Any], Mapping[str, str]] = lambda config: {}
    # Names that only the tensors of another layout of the same model have -> what to do with it.
    other_layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Tokens at which the original ends a text, whatever the tokenizer calls them.
    stop_tokens: Callable[[Any], Sequence[int]] = lambda config: ()


def arrays(x: Any) -> Any:
    """The module whose functions take x: NumPy; or jax.numpy, where a table is traced for its
    shapes.
    """
    return jnp if isinstance(x, jax.Array) else np


def same(source: str, target: str) -> Rule:
    """The tensor is the parameter."""
    return Rule(source, (target,), lambda x, _: (x,), lambda xs: xs[0])


def folded(source: str, target: str) -> Rule:
    """A bias stored (out), kept (out...): the outputs folded as the parameter's."""
    return Rule(
        source,
        (target,),
        lambda x, shapes: (x.reshape(shapes[0]),),
        lambda xs: xs[0].reshape(-1),
    )


def transposed(source: str, target: str) -> Rule:
    """A linear map stored (out, in), kept (in, out...): transposed, and the outputs folded as the
    parameter's.
    """

    def fold(x: np.ndarray, shapes: Sequence[Shape]) -> tuple[np.ndarray]:
        if x.shape[1:] != shapes[0][:1]:  # a reshape alone would take any shape of this size
            raise ValueError(f"{x.shape} is not (out, {shapes[0][0]})")
        return (x.T.reshape(shapes[0]),)

    return Rule(source, (target,), fold, lambda xs: xs[0].reshape(xs[0].shape[0], -1).T)


def fused(source: str, *targets: str) -> Rule:
    """Several linear maps stored as one (out, in), one after the other, each kept (in, out...)."""

    def split(x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        ends = np.cumsum([int(np.prod(shape[1:])) for shape in shapes])
        if ends[-1] != x.shape[0]:
            raise ValueError(f"{x.shape[0]} rows cannot be cut at {ends}")
        stretches = arrays(x).split(x, ends[:-1])
        return [part.T.reshape(shape) for part, shape in zip(stretches, shapes, strict=True)]

    def join(xs: Sequence[np.ndarray]) -> np.ndarray:
        return arrays(xs[0]).concatenate([x.reshape(x.shape[0], -1).T for x in xs])

    return Rule(source, targets, split, join)


def joined(sources: tuple[str, ...], target: str) -> Rule:
    """Several linear maps stored (out, in), or biases stored (out), kept as one parameter
    (in, map, out...) or (map, out...).
    """

    def load(xs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> tuple[np.ndarray]:
        axis = xs[0].ndim - 1
        wanted = shapes[0][:axis] + shapes[0][axis + 1 :]
        if any(x.shape[1:] != wanted[:axis] for x in xs):
            raise ValueError(f"not (out, {wanted[:axis]})")
        return (np.stack([x.T.reshape(wanted) for x in xs], axis=axis),)

    def save(xs: Sequence[np.ndarray]) -> list[np.ndarray]:
        [x] = xs
        if x.ndim == 4:
            return [part.reshape(part.shape[0], -1).T for part in np.moveaxis(x, 1, 0)]
        return [part.reshape(-1) for part in x]

    return Rule(sources, (target,), load, save)


def depthwise(source: str, target: str) -> Rule:
    """A depthwise convolution stored (channel, 1, tap), kept (tap, channel)."""

    def load(x: np.ndarray, shapes: Sequence[Shape]) -> tuple[np.ndarray]:
        if x.ndim != 3 or x.shape[1] != 1:
            raise ValueError(f"{x.shape} is not (channel, 1, tap)")
        return (x[:, 0].T,)

    return Rule(source, (target,), load, lambda xs: xs[0].T[:, None])


def load(system: str, directory: str | Path) -> Any:
    """Reads a published checkpoint.

    Args:
      system: which table to use, one of `SYSTEMS`.
      directory: holds config.json and safetensors files (one, several, or sharded with an index).

    Returns:
      The model, parameters in float32.

    Raises:
      UserError: the system is unknown, a file or a configuration field is missing or unknown, or
        tensors are unused, missing or misshapen; the message names them.
    """
    table, folder = find(system), Path(directory)
    has_config = (folder / "config.json").exists()
    if table.other_layouts and not has_config and any(folder.glob("*.safetensors")):
        _check_layout(table, read_tensors(folder))  # a layout that has no such file
    _check_there(table, folder)
    config = _config(table, folder)
    return from_tensors(table, config, read_tensors(folder))


def export(
    model: Any,
    directory: str | Path,
    system: str | None = None,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as its original would: config.json and model.safetensors, or, where that would
    be larger than a shard, several files and the index that says which tensor lies in which.

    Args:
      model: a model of a system that has a table.
      directory: made if missing; existing files in it are an error.
      system: the table; None: that of the file in which the model's configuration is defined.
      dtype: of the numbers, one of `DTYPES`; all but float32 are rounded to.
      shard_bytes: most bytes of numbers in a file; a larger tensor has a file for itself.

    Raises:
      UserError: no table fits the model, it is one of another system, there is no such dtype, or
        the directory holds a checkpoint already.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if dtype not in DTYPES:
        raise UserError(f"A checkpoint is of {', '.join(DTYPES)}, got dtype {dtype!r}.")
    module = type(model.config).__module__.rpartition(".")[2]
    described = DESCRIBED_BY.get(module, module)
    table = find(system or described)
    if system is not None and described in SYSTEMS and system != described:
        raise UserError(f"The model is one of {described}; it cannot be written as {system}.")
    folder = Path(directory)
    there = [*folder.glob("*.safetensors*"), *folder.glob("config.json")]
    there += folder.glob("tokenizer.json")
    if there:
        raise UserError(f"{there[0]} exists; choose another directory or remove it first.")
    config = table.write_config(model.config)  # refuses what the original cannot be told
    tensors = to_tensors(table, model)
    shards = _shards(tensors, jnp.dtype(dtype).itemsize, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for file, names in shards.items():
            rounded = {name: tensors[name].astype(jnp.dtype(dtype)) for name in names}
            save_file(rounded, folder / file, metadata={"format": "pt"})
    except SafetensorError as error:
        for file in shards:
            (folder / file).unlink(missing_ok=True)
        raise UserError(f"Cannot write {folder}: {error}. Make room, or choose another.") from error
    if len(shards) > 1:
        total = sum(tensor.size for tensor in tensors.values()) * jnp.dtype(dtype).itemsize
        files = {name: file for file, names in shards.items() for name in sorted(names)}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _shards(tensors: Mapping[str, np.ndarray], itemsize: int, most: int) -> dict[str, list[str]]:
    """Files and the names of their tensors, in order, each file with at most so many bytes or with
    one tensor.
    """
    groups: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.size * itemsize
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": names for i, names in enumerate(groups, 1)}


def find(system: str) -> System:
    """The table of a system by name."""
    if system not in SYSTEMS:
        raise UserError(
            f"There is no conversion for {system!r}.{nearest(system, SYSTEMS)}"
            f" Known: {', '.join(SYSTEMS)}."
        )
    return importlib.import_module(f"jaxrec.convert.{system}").SYSTEM


def from_tensors(system: System, config: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    """Builds the model of `config` from the original's tensors; see `load` for what is refused."""
    _check_layout(system, tensors)
    try:
        abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
        rules = system.rules(config)
    except (ValueError, TypeError, ArithmeticError, MemoryError) as error:  # beyond all memory
        raise UserError(
            f"{system.name}: no model of such a configuration can be built ({error!r})."
        ) from error
    tensors = {_with_prefix(name, system.prefix): value for name, value in tensors.items()}
    graph, state = nnx.split(abstract)
    shapes = {path: leaf.shape for path, leaf in _flat(nnx.to_pure_dict(state)).items()}
    filled: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for rule in rules:
        stacked, rows = rule.is_stacked, _rows(rule, tensors)
        absent = [name for row in rows for name in row if name not in tensors]
        if absent:
            raise UserError(f"{system.name}: the checkpoint has no tensor {absent[0]}.")
        used.update(name for row in rows for name in row)
        wanted = [shapes[path][1:] if stacked else shapes[path] for path in rule.targets]
        loaded = [_apply(rule, [tensors[name] for name in row], wanted, row) for row in rows]
        for path, columns in zip(rule.targets, zip(*loaded, strict=True), strict=True):
            value = arrays(columns[0]).stack(columns) if stacked else columns[0]
            if value.shape != shapes[path]:
                raise UserError(
                    f"{system.name}: {rule.sources[0]} gives {path} the shape {value.shape},"
                    f" but the configuration asks for {shapes[path]}."
                )
            filled[path] = value
    for name, other in system.repeated(config).items():
        if name in tensors and not np.array_equal(tensors[name], tensors[other]):
            raise UserError(
                f"{system.name}: {name} and {other} must be the same by the configuration,"
                " but the checkpoint has two different ones."
            )
        used.add(name)
    unused = sorted(name for name in tensors if name not in used and name not in system.ignored)
    if unused:
        raise UserError(
            f"{system.name}: the model has no place for {_listed(unused)} of the checkpoint."
        )
    unfilled = sorted(set(shapes) - set(filled))
    if unfilled:
        raise UserError(
            f"{system.name}: the checkpoint has nothing for the parameters {_listed(unfilled)}."
        )
    nested: dict[str, Any] = {}
    for path, value in filled.items():
        *parents, leaf = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(value, jnp.float32)
    return nnx.merge(graph, nested)


def to_tensors(system: System, model: Any, parameters: Any = None) -> dict[str, np.ndarray]:
    """The original's tensors, contiguous, for a model, or for a tree shaped like it, such as its
    gradient.
    """
    tree = model if parameters is None else parameters
    flat = _flat(nnx.to_pure_dict(nnx.split(tree)[1]))
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in flat.values()):
        flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    tensors: dict[str, np.ndarray] = {}
    for rule in system.rules(model.config):
        values = [flat[path] for path in rule.targets]
        layers = values[0].shape[0] if rule.is_stacked else 1
        for i in range(layers):
            saved = rule.save([value[i] for value in values] if rule.is_stacked else values)
            number = i if rule.numbers is None else rule.numbers[i]
            for name, tensor in zip(
                rule.sources, [saved] if isinstance(rule.source, str) else saved, strict=True
            ):
                tensors[name.format(i=number)] = tensor
    # The safetensors writer would store a transposed view with the right shape and the wrong order.
    return {
        name: np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value
        for name, value in tensors.items()
    }


def _check_there(system: System, folder: Path) -> None:
    """Says what a folder lacks and how it is made, of a system that has a hint.

    Raises:
      UserError: there is no config.json, or no safetensors file.
    """
    if system.hint and folder.is_dir():
        for wanted in ("config.json", "*.safetensors"):
            if not any(folder.glob(wanted)):
                raise UserError(f"{system.name}: {folder} holds no {wanted}. {system.hint}")


def _config(system: System, folder: Path) -> Any:
    """Our configuration from the original's file.

    Raises:
      UserError: it cannot be read, or does not describe a model of that kind.
    """
    file = beside(folder, "config.json")
    data = _read_json(file)
    try:
        return system.read_config(data)
    except UserError:
        raise
    except MALFORMED as error:
        # A table looks at the fields it knows; what stands in them may be of any type.
        raise UserError(
            f"{system.name}: {file} does not describe such a model"
            f" ({type(error).__name__}: {error})."
        ) from error


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the safetensors files of a folder; an index file, if there is one, says which
    files.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / _INDEX
    if index.exists():
        shards = _read_json(beside(folder, index.name)).get("weight_map", {})
        if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
            raise UserError(f"{index}: weight_map must map names of tensors to names of files.")
        names = sorted(set(shards.values()))
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
    files = [beside(folder, name) for name in names]
    if not files:
        pickled = [
            file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)
        ]
        if pickled:
            raise UserError(
                f"{folder} holds {pickled[0]}, which is a pickle and could run code; it is not"
                " read. Convert it where it came from:"
                " safetensors.torch.save_file(state_dict, 'model.safetensors')."
            )
        raise UserError(f"{folder} holds no .safetensors file.")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if name in tensors:
                        raise UserError(f"{file} holds {name} again; another file has it already.")
                    tensors[name] = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"Cannot read {file}: {error}. Fetch it again.") from error
    return tensors


def _check_layout(system: System, tensors: Mapping[str, np.ndarray]) -> None:
    """Refuses the same model in another layout, and says what to do with it."""
    for name, advice in system.other_layouts.items():
        if name in tensors:
            raise UserError(f"{system.name}: the checkpoint has a tensor {name}. {advice}")


def _with_prefix(name: str, prefix: str) -> str:
    """Completes a name that begins with the prefix, or with its end, or with none of it."""
    for part in (prefix[i:] for i in range(len(prefix)) if i == 0 or prefix[i - 1] == "."):
        if name.startswith(part):
            return prefix + name.removeprefix(part)
    return prefix + name


def _rows(rule: Rule, tensors: Mapping[str, np.ndarray]) -> list[list[str]]:
    """The names of a rule's tensors, one list for each layer, or one in all without {i}."""
    if not rule.is_stacked:
        return [list(rule.sources)]
    numbers = rule.numbers
    if numbers is None:
        numbers = tuple(range(_largest_number(rule.sources[0], tensors) + 1))
    return [[source.format(i=i) for source in rule.sources] for i in numbers]


def _largest_number(source: str, tensors: Mapping[str, np.ndarray]) -> int:
    """The largest {i} of a name that the checkpoint has; 0 if it has none."""
    before, after = source.split("{i}")
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    return max((int(match[1]) for name in tensors if (match := pattern.fullmatch(name))), default=0)


def _apply(
    rule: Rule, tensors: list[np.ndarray], wanted: Sequence[Shape], names: list[str]
) -> Sequence[np.ndarray]:
    try:
        return rule.load(tensors[0] if isinstance(rule.source, str) else tensors, wanted)
    except ValueError as error:
        raise UserError(
            f"{', '.join(names)} has shape {', '.join(str(x.shape) for x in tensors)}, which cannot"
            f" become {', '.join(rule.targets)} of shape {', '.join(map(str, wanted))}."
        ) from error


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _read_json(file: Path) -> dict[str, Any]:
    data = read_json(file)
    if not isinstance(data, dict):
        raise UserError(f"{file} must hold a JSON object.")
    return data
