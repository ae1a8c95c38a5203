"""Mamba-2 against its original: hidden states, logits, gradients, cached decoding, conversion."""

from tests.golden.harness import (
    cases,
    check_cached_decoding,
    check_hidden_states,
    check_logits_and_gradients,
    check_round_trip,
)

FOLDERS = cases("mamba2")


def test_logits_and_gradients(case, model, tokens):
    check_logits_and_gradients(case, model, tokens)


def test_hidden_states(case, model, tokens):
    check_hidden_states(case, model, tokens)


def test_cached_decoding(case, model, tokens):
    check_cached_decoding(case, model, tokens)


def test_the_table_round_trips(case, model, tmp_path):
    check_round_trip(case, model, tmp_path)


def test_every_array_was_looked_at(case):
    """Last in this file: the tests above share the case and say what they have looked at."""
    case.assert_all_looked_at()
