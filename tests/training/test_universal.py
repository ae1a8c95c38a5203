"""An adaptive model is trained, evaluated and writes like any language model."""

import numpy as np
import pytest

from jaxrec.generation import complete
from jaxrec.generation.sampling import SamplingConfig
from jaxrec.training.evaluation import evaluate_run
from jaxrec.training.loop import train
from jaxrec.training.metrics import read
from jaxrec.training.runs import load_model
from tests.training.small import UNIVERSAL, run_config, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("data") / "text")
    runs = tmp_path_factory.mktemp("runs")
    config = run_config(text, steps=2, eval_every=2)
    name = "jaxrec.models.universal_transformer:TINY"
    return train(name, UNIVERSAL, config, runs=runs).run.folder


def test_ponder_steps_are_in_the_metrics(folder):
    (line,) = [line for line in read(folder / "metrics.jsonl") if line["kind"] == "model"]
    assert 1 <= line["ponder_steps"] <= UNIVERSAL.steps
    assert line["ponder_steps"] <= line["ponder_time"] <= line["ponder_steps"] + 1


def test_evaluation_needs_no_depth(folder):
    evaluation, _ = evaluate_run(folder, batches=1)
    (bits,) = evaluation.bits_per_byte.values()
    assert 4 < bits < 12


def test_cached_writing_gives_the_best_token_of_the_full_pass(folder):
    model, *_ = load_model(folder)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    written = complete(model, prompts, max_new_tokens=6, config=SamplingConfig(temperature=0.0))
    for prompt, new in zip(prompts, written, strict=True):
        tokens = np.array([prompt + new[:-1]], np.int32)
        best = np.argmax(model(tokens)[0][0, len(prompt) - 1 :], axis=-1)
        assert best.tolist() == new
