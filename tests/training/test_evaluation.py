"""Evaluation of a run folder: depths, parts of the text, other text, and what is refused."""

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.models import huginn
from jaxrec.training.evaluation import evaluate_run, evaluation_depths
from jaxrec.training.loop import train
from jaxrec.training.report import plot_curves, write_report
from tests.training.small import HUGINN, LINEAR_RNN, run_config, write_text

PATH = "jaxrec.models.linear_rnn:TINY"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    config = run_config(write_text(root / "text"), steps=2)
    return train(PATH, LINEAR_RNN, config, runs=root)


def test_all_of_the_text_is_read(outcome):
    some, step = evaluate_run(outcome.run.folder, batches=1)
    whole, _ = evaluate_run(outcome.run.folder)
    assert step == 2
    assert list(whole.loss) == ["-"]  # a model without a loop
    assert some.tokens < whole.tokens <= len(outcome.data.valid.tokens)
    tokens_per_byte = 1  # every token but the first of a document is a byte
    np.testing.assert_allclose(
        whole.bits_per_byte["-"], whole.loss["-"] / np.log(2) * tokens_per_byte, rtol=1e-6
    )


def test_other_text_is_another_number(outcome, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in "abcd":
        (other / f"{name}.txt").write_text(name * 400)
    here, _ = evaluate_run(outcome.run.folder, batches=1)
    there, _ = evaluate_run(outcome.run.folder, source=str(other), batches=1)
    assert here.loss != there.loss


def test_depths_belong_to_loops(outcome):
    with pytest.raises(UserError, match=r"has no loop\. Leave --depths out"):
        evaluate_run(outcome.run.folder, depths=(1, 2))


def test_the_usual_depths_go_to_four_times_the_mean(outcome):
    config = run_config("text", eval_depths=())
    assert evaluation_depths(huginn.TINY, config) == (1, 2, 4, 8, 16)
    assert evaluation_depths(HUGINN, run_config("text", eval_depths=(3,))) == (3,)
    assert evaluation_depths(LINEAR_RNN, config) == ()


def test_the_report_sets_the_model_beside_compressors(outcome):
    report = write_report(outcome)
    assert set(report["baselines"]["bits_per_byte"]) == {"gzip -9", "order-3 byte model"}
    assert report["bits_per_byte"] == outcome.evaluation.bits_per_byte
    picture = plot_curves(outcome.run.folder)
    assert picture.read_bytes().startswith(b"\x89PNG")
