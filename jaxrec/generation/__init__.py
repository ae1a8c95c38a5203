"""Text from a trained model: how tokens are drawn, one by one, and when to stop."""

from jaxrec.generation.adaptive import AdaptiveStep, generate_adaptive
from jaxrec.generation.autoregressive import STOPPED, complete, generate
from jaxrec.generation.diffusion_forcing import (
    DiffusionForcing,
    Tape,
    WaveStep,
    generate_diffusion,
)
from jaxrec.generation.sampling import SamplingConfig
from jaxrec.generation.speculative import SpeculativeStep, generate_speculative
from jaxrec.generation.stopping import StopStrings
from jaxrec.generation.streaming import Decoder, Report, TextStream, stream_text, text_of
from jaxrec.generation.translate import translate
from jaxrec.ops.depth.exits import Exit
from jaxrec.ops.depth.noise import LatentNoise
