"""A run folder gives back the model with the tokenizer that it was trained with."""

import json

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.config import DataConfig
from jaxrec.training.evaluation import evaluate_run
from jaxrec.training.loop import train
from jaxrec.training.runs import load_model, read_run
from tests.training.small import LINEAR_RNN, run_config, write_text
from tests.training.test_data_tokenizers import TEXT, train_tokenizer

PATH = "jaxrec.models.linear_rnn:TINY"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run made with a tokenizer.json that is gone since, and its text."""
    root = tmp_path_factory.mktemp("run")
    text, file = write_text(root / "text"), root / "tokenizer.json"
    data = DataConfig(
        source=str(text), tokenizer=str(train_tokenizer(file, vocab_size=270)), valid_fraction=0.2
    )
    train(PATH, LINEAR_RNN, run_config(text, steps=1, data=data), runs=root)
    file.unlink()
    return root / "run"


def test_the_tokenizer_is_the_copy_in_the_folder(run):
    tokenizer = load_model(run).tokenizer
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT.encode()
    assert tokenizer.vocab_size == 270


def test_a_run_is_evaluated_with_the_copy(run):
    result, step = evaluate_run(run, batches=1)
    assert step == 1
    assert np.isfinite(list(result.loss.values())).all()


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda note: note.pop("model_config"), "lacks the field 'model_config'"),
        (lambda note: note.update(layout=99), "has run layout 99; this jaxrec reads 1"),
        (lambda note: note["model_config"].update(widht=3), "widht.*Did you mean width"),
    ],
)
def test_a_damaged_note_is_told(run, tmp_path, change, says):
    note = json.loads((run / "run.json").read_text())
    change(note)
    (tmp_path / "run.json").write_text(json.dumps(note))
    with pytest.raises(UserError, match=says):
        read_run(tmp_path)


def test_half_a_note_is_told(run, tmp_path):
    text = (run / "run.json").read_text()
    (tmp_path / "run.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="is damaged"):
        read_run(tmp_path)
