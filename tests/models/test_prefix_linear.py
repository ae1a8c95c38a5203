"""The JRT language model where its fellows do not look: sizes, prompts as a prefix, options."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.generation import SamplingConfig, complete
from jaxrec.models.prefix_linear import JRT_1_3B, JRT_360M, PrefixLMConfig
from tests.models import toy
from tests.models.toy import run

SMALLEST = PrefixLMConfig(
    vocab_size=13,
    width=16,
    mixers=("conv", "linear", "attention"),
    heads=2,
    mlp_width=24,
    feature_width=3,
    window=4,
    context=64,
)


@pytest.mark.parametrize("config, linear", [(JRT_360M, 5), (JRT_1_3B, 7)])
def test_layers_of_the_published_models(config, linear):
    places = [i for i, mixer in enumerate(config.mixers) if mixer == "linear"]
    assert len(places) == linear
    assert all(config.mixers[i + 1] == "attention" for i in places)
    assert config.mixers.count("attention") == linear


def test_generation_reads_the_prompt_as_a_prefix():
    """All but its last token, which is the first step; against whole passes."""
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    greedy = SamplingConfig(temperature=0)
    for reads_prefix in (True, False):
        config = dataclasses.replace(SMALLEST, reads_prefix=reads_prefix)
        model = toy.drawn(config)
        got = complete(model, prompts, max_new_tokens=3, config=greedy)
        for prompt, new in zip(prompts, got, strict=True):
            tokens = jnp.asarray([prompt + new], jnp.int32)
            prefix = None
            if reads_prefix:
                prefix = jnp.arange(tokens.shape[1])[None] < len(prompt) - 1
            logits, _ = run(model, tokens, prefix=prefix)
            best = np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1)
            np.testing.assert_array_equal(best, new)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"mixers": ()}, r"mixers must be made of .*got \(\)"),
        ({"mixers": ("mlp",)}, r"mixers must be made of .*got \('mlp',\)"),
        ({"heads": 3}, "width must be a multiple of heads, got 16 and 3"),
        ({"width": 6}, "attention needs heads of even width, got 3"),
        ({"conv_width": 1}, "conv_width must be >= 2, got 1"),
        ({"prefix_share": 1.0}, r"prefix_share must lie within \[0, 1\) .* got 1.0 and 0.15"),
        ({"mask_share": 1.5}, r"mask_share within \[0, 1\], got 0.5 and 1.5"),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALLEST, **changed)
