"""What a training run is: data, optimizer, sizes, and how often it reports and saves.

Nothing here describes a model; a model's own config lies beside the model. Every check is made when
the object is built, so a run never stops half-way because of a number that was wrong from the
start.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from jaxrec.errors import UserError, nearest
from jaxrec.ops.depth.remat import REMAT_POLICIES, RematPolicy

Optimizer = Literal["adamw", "adam_atan2", "atan2", "lamb"]
Schedule = Literal["cosine", "trapezoid", "constant"]
Precision = Literal["float32", "bfloat16"]
MONITORS = ("depth", "state", "gates", "newton")
"""What may be watched inside of a model, see `training.monitors`."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule and the learning rate over the run."""

    name: Optimizer = "adamw"
    """adamw; adam_atan2: the rule Huginn was trained with (arXiv:2502.05171); atan2: the plainer
    one of HRM (arXiv:2506.21734), in which all parameters decay; or lamb, for large batches
    (arXiv:1904.00962)."""
    learning_rate: float = 2e-3
    """Peak learning rate, > 0."""
    beta1: float = 0.9
    """Decay of the first moment per step, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the second moment per step, in [0, 1)."""
    epsilon: float = 1e-8
    """adamw, lamb: added to the root of the second moment. adam_atan2: its square is the least
    second moment. atan2 has none. > 0."""
    weight_decay: float = 0.1
    """Share of a weight removed per step: times the learning rate in adamw and atan2, times
    learning rate / peak in adam_atan2; lamb scales it as all of its step."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient, > 0; None leaves the gradient as it is."""
    schedule: Schedule = "cosine"
    """cosine: down to final_fraction; trapezoid: constant, then linearly down in cooldown_steps;
    constant."""
    warmup_steps: int = 50
    """Steps of linear growth to the peak, >= 0. A run that is shorter ends while it still grows."""
    cooldown_steps: int = 0
    """trapezoid only: steps of linear decrease at the end of the run, >= 0."""
    final_fraction: float = 0.1
    """Learning rate at the end over the peak, in [0, 1]."""
    ema_decay: float | None = None
    """Decay per step of the running average of the parameters, in (0, 1); None keeps none."""

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, get_args(Optimizer))
        _one_of("optimizer.schedule", self.schedule, get_args(Schedule))
        _positive("optimizer.learning_rate", self.learning_rate)
        _positive("optimizer.epsilon", self.epsilon)
        _fraction("optimizer.beta1", self.beta1, "[0, 1)")
        _fraction("optimizer.beta2", self.beta2, "[0, 1)")
        _fraction("optimizer.final_fraction", self.final_fraction, "[0, 1]")
        _at_least("optimizer.weight_decay", self.weight_decay, 0)
        _at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        _at_least("optimizer.cooldown_steps", self.cooldown_steps, 0)
        if self.clip_norm is not None:
            _positive("optimizer.clip_norm", self.clip_norm)
        if self.ema_decay is not None:
            _fraction("optimizer.ema_decay", self.ema_decay, "(0, 1)")
        if self.cooldown_steps and self.schedule != "trapezoid":
            raise UserError(
                f"optimizer.cooldown_steps is {self.cooldown_steps} but the schedule is"
                f" {self.schedule}. Only trapezoid has a cool-down; choose it"
                " or leave out cooldown_steps."
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text a run learns from."""

    source: str = "python-docs"
    """python-docs, or a text file, a folder, a glob pattern, or a token file made by `jaxrec
    data`."""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json."""
    valid_fraction: float = 0.05
    """Share of the documents that is kept apart for validation, in (0, 0.5]."""

    def __post_init__(self) -> None:
        if not 0 < self.valid_fraction <= 0.5:
            raise UserError(f"data.valid_fraction must lie in (0, 0.5]; got {self.valid_fraction}.")
        for name in ("source", "tokenizer"):
            if not getattr(self, name):
                raise UserError(f"data.{name} is empty; expected a name or a path.")


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every run over a mesh has, whatever it learns."""

    batch: int
    """Rows per step over all devices, >= 1."""
    seed: int = 0
    """Seed of all that is random: parameters, the order of the data, draws of every step; >= 0."""
    precision: Precision = "float32"
    """Precision of activations and matrix products; parameters and optimizer state are always
    float32."""
    mesh: str = "data=1"
    """Devices per mesh axis (data, fsdp, seq, model), such as data=4,model=2; axes left out have
    size 1."""
    log_every: int = 10
    """Steps between two lines of metrics, >= 1."""
    batch_limit: float = 600.0
    """Seconds after which a run ends whose next batch is not there, > 0: the file system hangs."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, get_args(Precision))
        _at_least("batch", self.batch, 1)
        _at_least("seed", self.seed, 0)
        if self.seed >= 2**32:
            raise UserError(f"seed must be below 2**32; got {self.seed}.")
        _at_least("log_every", self.log_every, 1)
        _positive("batch_limit", self.batch_limit)


@dataclass(frozen=True, kw_only=True)
class RunConfig(CommonConfig):
    """What every run that has a folder of its own has."""

    FIXED: ClassVar[tuple[str, ...]] = ("seed", "batch", "precision")
    """Fields that a resumed run may not change: its numbers would be another run's."""

    name: str | None = None
    """Name of the run folder under runs/; None makes one from the model's name."""
    steps: int = 300
    """Length of the run in steps, >= 1."""
    remat: RematPolicy = "none"
    """What the backward pass computes again: nothing, all but products with weights and recurrences
    in time (the fastest on CPU for language models), each block, or blocks in groups of about the
    root of their number."""
    eval_every: int = 100
    """Steps between two evaluations, >= 0; 0 evaluates at the end only."""
    save_every: int = 100
    """Steps between two checkpoints, >= 0; 0 saves at the end only."""
    keep: int = 3
    """Checkpoints kept, the newest, >= 1."""
    monitors: str = ""
    """What to watch inside the model, of depth, state, gates and newton, with commas between; it
    goes to metrics.jsonl and curves.png."""
    monitor_every: int = 50
    """Steps between two looks of the monitors, >= 1."""
    tensorboard: bool = False
    """Also write TensorBoard files (extra tensorboard)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (extra wandb)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("remat", self.remat, REMAT_POLICIES)
        for name in self.monitor_names:
            _one_of("monitors", name, MONITORS)
        for name in ("steps", "keep", "monitor_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "save_every"):
            _at_least(name, getattr(self, name), 0)
        optimizer = self.optimizer
        if (
            optimizer.cooldown_steps
            and optimizer.warmup_steps + optimizer.cooldown_steps > self.steps
        ):
            raise UserError(
                f"optimizer.warmup_steps={optimizer.warmup_steps} and"
                f" cooldown_steps={optimizer.cooldown_steps} do not fit into"
                f" steps={self.steps}. Shorten them or train longer."
            )
        if self.name is not None and (not self.name.strip(".") or set(self.name) & set("/\\\0")):
            raise UserError(
                f"name is {self.name!r}; expected the name of one folder, without slashes."
            )

    @property
    def monitor_names(self) -> tuple[str, ...]:
        """The monitors, each once."""
        names = (name.strip() for name in self.monitors.split(","))
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """One training run of a language model. A step is one update of the parameters."""

    FIXED: ClassVar[tuple[str, ...]] = (*RunConfig.FIXED, "time", "accumulate")

    batch: int = 8
    """Sequences per step over all devices, >= 1."""
    time: int = 256
    """Tokens per sequence, >= 1."""
    accumulate: int = 1
    """Microbatches per step, >= 1; divides batch. More need less memory and compute the same."""
    remat: RematPolicy = "dots"
    """What the backward pass computes again: nothing, all but products with weights and recurrences
    in time (the fastest on CPU), each block, or blocks in groups of about the root of their
    number."""
    eval_batches: int = 4
    """Validation batches per evaluation, >= 1; the one at the end reads four times as many."""
    eval_depths: tuple[int, ...] | None = None
    """Loop counts at which a looped model is evaluated, each >= 1; None takes powers of two around
    its mean depth."""
    sample_every: int = 0
    """Steps between two printed samples, >= 0; 0 prints one at the end only."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("time", "accumulate", "eval_batches"):
            _at_least(name, getattr(self, name), 1)
        _at_least("sample_every", self.sample_every, 0)
        for depth in self.eval_depths or ():
            _at_least("eval_depths", depth, 1)
        if self.batch % self.accumulate:
            raise UserError(
                f"batch is {self.batch} and does not divide into accumulate={self.accumulate}"
                " microbatches. Choose a batch that is a multiple of accumulate."
            )


@dataclass(frozen=True, kw_only=True)
class PuzzleDataConfig:
    """The puzzles a run learns from."""

    source: str = "sudoku-4x4"
    """sudoku-4x4, sudoku-6x6, sudoku-9x9 or maze-NxN, which are made; a folder of ARC tasks
    (training/*.json and evaluation/*.json, or *.json); or a folder in the published format (train/
    and test/, each with a dataset.json)."""
    puzzles: int = 2000
    """Made puzzles to learn from, >= 1."""
    held_out: int = 200
    """Made puzzles that are kept apart, none of which is in training, >= 1."""
    augmentations: int | None = None
    """Copies of each puzzle beside itself: of a Sudoku by its symmetries, of a maze 0 or 7, turned
    and mirrored, of an ARC task its variants; None: 20, 7 and 20. >= 0."""
    clues: tuple[int, int] | None = None
    """Least and most clues of a made Sudoku; None: 8 to 10 of 4 x 4, and of others as few as keep
    one solution."""
    epochs: int | None = None
    """Epochs that are joined before batches are cut, of which the last, incomplete one is dropped,
    >= 1; None: as few as fill a batch. The original joins those between two evaluations."""
    seed: int = 0
    """Seed of made puzzles and of copies, >= 0."""

    def __post_init__(self) -> None:
        for name in ("puzzles", "held_out"):
            _at_least(f"data.{name}", getattr(self, name), 1)
        for name in ("augmentations", "seed"):
            _at_least(f"data.{name}", getattr(self, name) or 0, 0)
        if self.epochs is not None:
            _at_least("data.epochs", self.epochs, 1)
        if not self.source:
            raise UserError("data.source is empty; expected a name or a folder.")


@dataclass(frozen=True, kw_only=True)
class PuzzleConfig(RunConfig):
    """One training run of a solver of puzzles. A step is one segment; the defaults suit small
    puzzles on two CPU cores.
    """

    FIXED: ClassVar[tuple[str, ...]] = (
        *RunConfig.FIXED,
        "puzzle_rate",
        "puzzle_decay",
        "data.epochs",
    )

    batch: int = 64
    """Puzzles per step over all devices, >= 1."""
    steps: int = 2500
    """Length of the run in segments, >= 1."""
    log_every: int = 50
    """Steps between two lines of metrics, >= 1."""
    eval_every: int = 500
    """Steps between two evaluations, >= 0; 0 evaluates at the end only."""
    save_every: int = 500
    """Steps between two checkpoints, >= 0; 0 saves at the end only."""
    eval_puzzles: int = 256
    """Held-out puzzles per evaluation, spread over all of them, >= 1; the one at the end reads four
    times as many."""
    remat: RematPolicy = "block"
    """What the backward pass computes again: nothing, all but products with weights and recurrences
    in time, each block (the fastest on CPU), or blocks in groups of about the root of their
    number."""
    puzzle_rate: float = 1e-3
    """Peak learning rate of the puzzles' vectors, > 0; its schedule is the optimizer's."""
    puzzle_decay: float = 0.1
    """Share of a vector removed per step, times the learning rate, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            name="atan2", learning_rate=2e-3, clip_norm=None, warmup_steps=100
        )
    )
    """The rule of all other parameters, and the schedule."""
    data: PuzzleDataConfig = dataclasses.field(default_factory=PuzzleDataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("eval_puzzles", self.eval_puzzles, 1)
        _positive("puzzle_rate", self.puzzle_rate)
        _at_least("puzzle_decay", self.puzzle_decay, 0)


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """The labelled sequences a run learns from."""

    source: str = "digits"
    """digits, the 8 x 8 images that ship with scikit-learn as 64 numbers in a row (extra
    experiments); digits-permuted, these in a fixed random order; or an .npz file of inputs (b t
    features) and labels (b), lengths (b) if they differ, and valid_inputs and so on if some are to
    be held out by name."""
    rate: float = 1.0
    """Samples per pixel of digits, > 0, joined by straight lines: 0.5 takes every second one."""
    valid_fraction: float = 0.2
    """Share of the examples that is held out, in (0, 0.5], where the file does not say which."""

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("data.source is empty; expected a name or a file.")
        _positive("data.rate", self.rate)
        if not 0 < self.valid_fraction <= 0.5:
            raise UserError(f"data.valid_fraction must lie in (0, 0.5]; got {self.valid_fraction}.")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RunConfig):
    """One training run of a classifier of sequences. A step is one update of the parameters; the
    defaults suit a small model on the digits.
    """

    FIXED: ClassVar[tuple[str, ...]] = (*RunConfig.FIXED, "state_space_rate")

    batch: int = 64
    """Sequences per step over all devices, >= 1."""
    steps: int = 500
    """Length of the run in steps, >= 1."""
    state_space_rate: float = 2e-3
    """Peak learning rate of the state-space parameters and norms, which do not decay, > 0; its
    schedule is the optimizer's."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=8e-3,
            beta2=0.999,
            weight_decay=0.05,
            clip_norm=None,
            warmup_steps=20,
            final_fraction=0.0,
        )
    )
    """AdamW, for all other parameters, and the schedule."""
    data: ExamplesConfig = dataclasses.field(default_factory=ExamplesConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("state_space_rate", self.state_space_rate)
        if self.optimizer.name != "adamw":
            raise UserError(
                f"optimizer.name of a classifier must be adamw; got {self.optimizer.name}."
            )


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        raise UserError(
            f"{name} must be one of {', '.join(known)}; got {value!r}.{nearest(str(value), known)}"
        )


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least:  # also refuses NaN
        raise UserError(f"{name} must be at least {least}; got {value}.")


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UserError(f"{name} must be positive and finite; got {value}.")


def _fraction(name: str, value: float, interval: str) -> None:
    low = value > 0 if interval[0] == "(" else value >= 0
    high = value < 1 if interval[-1] == ")" else value <= 1
    if not (low and high):
        raise UserError(f"{name} must lie in {interval}; got {value}.")
