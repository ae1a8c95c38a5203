"""Training configs refuse what cannot work, in one line."""

import pytest

from jaxrec.config import from_dict, to_dict
from jaxrec.errors import UserError
from jaxrec.training.config import DataConfig, OptimizerConfig, TrainConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"batch": 6, "accumulate": 4}, "batch is 6 and does not divide into accumulate=4"),
        (
            {"remat": "bloc"},
            "remat must be one of none, dots, block, sqrt; got 'bloc'. Did you mean block",
        ),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"save_every": -1}, "save_every must be at least 0"),
        ({"eval_depths": (1, 0)}, "eval_depths must be at least 1"),
        ({"name": "a/b"}, "expected the name of one folder"),
        ({"name": ".."}, "expected the name of one folder"),
    ],
)
def test_a_run_that_cannot_work_is_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        TrainConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "adam"},
            "must be one of adamw, adam_atan2, atan2, lamb; got 'adam'. Did you mean adamw",
        ),
        ({"schedule": "linear"}, "optimizer.schedule must be one of"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate must be positive"),
        ({"beta2": 1.0}, r"optimizer.beta2 must lie in \[0, 1\)"),
        ({"final_fraction": 1.5}, r"optimizer.final_fraction must lie in \[0, 1\]"),
        ({"ema_decay": 1.0}, r"optimizer.ema_decay must lie in \(0, 1\)"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm must be positive"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay must be at least 0"),
        ({"cooldown_steps": 5}, "the schedule is cosine. Only trapezoid"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**options)


def test_a_cool_down_must_fit_into_the_run():
    optimizer = OptimizerConfig(schedule="trapezoid", warmup_steps=5, cooldown_steps=6)
    TrainConfig(steps=11, optimizer=optimizer)
    with pytest.raises(UserError, match=r"do not fit into steps=10"):
        TrainConfig(steps=10, optimizer=optimizer)


def test_data_must_be_named_and_split():
    with pytest.raises(UserError, match=r"data.valid_fraction must lie in \(0, 0.5\]"):
        DataConfig(valid_fraction=0.0)
    with pytest.raises(UserError, match=r"data.source is empty"):
        DataConfig(source="")


def test_configs_survive_a_round_trip():
    config = TrainConfig(
        steps=7,
        eval_depths=(1, 2),
        optimizer=OptimizerConfig(name="adam_atan2", clip_norm=None, ema_decay=0.9),
    )
    assert from_dict(TrainConfig, to_dict(config)) == config
