"""Text from a looped model, many positions at a time: loops and tokens on one moving wavefront.

Every outer step runs a few loops on a window of positions that are not settled yet, in one pass,
guesses the token after each, and appends new positions behind:

    E = (1 - m) embed(window) + m E_before          guesses are embedded anew in every step
    S = core(S, E), inner_loops times               with the keys of all tokens before the window
    guesses = head(coda(S));   window = window + headway new positions
    positions up to the last settled one are frozen: their tokens, keys and values stay as they are

The window is a buffer of fixed capacity, the cache an array of slots whose cut is a shorter length,
so that all steps are one compiled program. Rows of a batch are that program mapped over rows.

Geiping, Yang & Su, Efficient parallel samplers for recurrent-depth models and their connection to
diffusion language models (2025), arXiv:2510.14961, section 3.
"""

from jaxrec.generation.diffusion_forcing.options import DiffusionForcing, Freeze
from jaxrec.generation.diffusion_forcing.sampler import Tape, WaveStep, generate_diffusion

__all__ = ["DiffusionForcing", "Freeze", "Tape", "WaveStep", "generate_diffusion"]
