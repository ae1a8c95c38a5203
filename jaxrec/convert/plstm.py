"""pLSTM as the authors' PyTorch code stores it (github.com/ml-jku/plstm): transitions, layers on
sequences and on grids, the classifier of images and the language model.

A file holds one of them, by its class name or short name. What the original does not read, such as
the weights of constant transitions, is kept.
"""

from collections.abc import Sequence

import numpy as np

from jaxrec.convert.engine import Rule, System, depthwise, folded, same, transposed
from jaxrec.convert.plstm_config import BlockConfig, Config, LayerConfig, read_config, write_config
from jaxrec.layers.plstm import PLSTMConfig
from jaxrec.layers.plstm_block import NormConfig
from jaxrec.layers.plstm_gates import GateConfig, TransitionConfig, TransitionLayerConfig
from jaxrec.models.plstm import PLSTMLMConfig
from jaxrec.models.plstm_vision import PLSTMVisionConfig


def _reshaped(source: str, target: str, shape: Sequence[int]) -> Rule:
    """The same numbers in the same order; `shape` is theirs."""

    def load(x: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> tuple[np.ndarray]:
        if x.shape != tuple(shape):
            raise ValueError(f"{x.shape} is not {tuple(shape)}")
        return (x.reshape(shapes[0]),)

    return Rule(source, (target,), load, lambda xs: xs[0].reshape(shape))


def _patches(source: str, target: str) -> Rule:
    """A convolution stored (out, in, x, y), kept (x, y, in, out)."""
    return Rule(
        source,
        (target,),
        lambda x, _: (x.transpose(2, 3, 1, 0),),
        lambda xs: xs[0].transpose(3, 2, 0, 1),
    )


def _depthwise_2d(source: str, target: str) -> Rule:
    """A depthwise convolution stored (channel, 1, x, y), kept (x, y, channel)."""
    return Rule(
        source,
        (target,),
        lambda x, _: (x[:, 0].transpose(1, 2, 0),),
        lambda xs: xs[0].transpose(2, 0, 1)[:, None],
    )


def _rules(config: Config) -> list[Rule]:
    if isinstance(config, PLSTMLMConfig):
        return _lm_rules(config)
    if isinstance(config, PLSTMVisionConfig):
        return _vision_rules(config)
    if isinstance(config, TransitionLayerConfig):
        return _transition_rules("", "", config.tracked, config.options)
    return _layer_rules("", "", config)


def _transition_rules(
    theirs: str, ours: str, tracked: int, options: TransitionConfig
) -> list[Rule]:
    names = {"eigenvalues": "eigenvalues"}
    if tracked > 1:
        names |= {"into": "inproj"} | ({} if options.symmetric else {"out": "outproj"})
    return [
        same(f"{theirs}{name}_{part}", f"{ours}{own}/{part}")
        for own, name in names.items()
        for part in ("bias", "weight")
    ]


def _layer_rules(theirs: str, ours: str, config: LayerConfig) -> list[Rule]:
    rules: list[Rule] = []

    def gate(name: str, own: str, options: GateConfig) -> None:
        parts = ("bias", "weight") if options.weight else ("bias",)
        rules.extend(same(f"{theirs}{name}.{part}", f"{ours}{own}/map/{part}") for part in parts)

    def transition(name: str, own: str) -> None:
        options, tracked = config.transition, config.jt
        rules.extend(_transition_rules(f"{theirs}{name}.", f"{ours}{own}/", tracked, options))

    if isinstance(config, PLSTMConfig):
        gate("source", "source", config.source)
        transition("transition", "transition")
        gate("mark", "mark", config.mark)
        conv = f"{theirs}conv._conv"
        taps = depthwise(f"{conv}.weight", f"{ours}conv/kernel")
    else:
        one_way = config.mode == "P"
        for way, own in (("", "r"),) if one_way else (("_r", "r"), ("_d", "d")):
            gate(f"source{way}", f"source_{own}", config.source)
            transition(f"transition{way}", f"transition_{own}")
        for way, own in (("", "l"),) if one_way else (("_l", "l"), ("_u", "u")):
            gate(f"mark{way}", f"mark_{own}", config.mark)
        if one_way:
            shape = (len(config.orientations), config.heads)
            angle = f"{theirs}orientation"
            rules.append(_reshaped(f"{angle}_bias", f"{ours}angle/bias", shape))
            rules.append(
                _reshaped(f"{angle}_weight", f"{ours}angle/weight", (*shape, config.width))
            )
        else:
            transition("transition_rd", "transition_turn")
        conv = f"{theirs}convolution._conv"
        taps = _depthwise_2d(f"{conv}.weight", f"{ours}conv/kernel")
    if config.conv_width is not None:
        rules.append(taps)
        if config.conv_bias:
            rules.append(same(f"{conv}.bias", f"{ours}conv/bias"))
    gate("direct", "shared/direct", config.direct)
    for name, own in (("query", "query"), ("key", "key"), ("value_", "value")):
        options = getattr(config, own)
        if name == "key" and config.tie_query_key:
            continue
        parts = ("weight", "bias") if options.bias else ("weight",)
        rules += [same(f"{theirs}{name}.{part}", f"{ours}shared/{own}/{part}") for part in parts]
    heads = (config.heads, config.width // config.heads)
    for part in ("scale", "bias") if config.norm_bias else ("scale",):
        rules.append(_reshaped(f"{theirs}mhnorm.{part}", f"{ours}shared/norm/{part}", heads))
    if config.out:
        rules.append(transposed(f"{theirs}outprojection.weight", f"{ours}shared/out/kernel"))
        if config.out_bias:
            rules.append(same(f"{theirs}outprojection.bias", f"{ours}shared/out/bias"))
    if config.skip:
        rules.append(same(f"{theirs}passthrough.scale", f"{ours}shared/skip"))
    return rules


def _norm_rules(theirs: str, ours: str, norm: NormConfig) -> list[Rule]:
    parts = ("scale", "bias") if norm.bias else ("scale",)
    return [same(f"{theirs}.{part}", f"{ours}/{part}") for part in parts]


def _block_rules(theirs: str, ours: str, config: BlockConfig) -> list[Rule]:
    rules = [
        *_norm_rules(f"{theirs}norm", f"{ours}norm", config.norm),
        transposed(f"{theirs}upproj.weight", f"{ours}up/kernel"),
        folded(f"{theirs}upproj.bias", f"{ours}up/bias"),
        transposed(f"{theirs}downproj.weight", f"{ours}down/kernel"),
        same(f"{theirs}downproj.bias", f"{ours}down/bias"),
        *_layer_rules(f"{theirs}interaction_module.", f"{ours}mixer/", config.mixer),
    ]
    if config.kind == "post_up":
        rules += _norm_rules(f"{theirs}norm2", f"{ours}mlp_norm", config.norm)
    if config.scaled:
        rules.append(same(f"{theirs}scale1.scale", f"{ours}mixer_scale"))
        rules.append(same(f"{theirs}scale2.scale", f"{ours}mlp_scale"))
    return rules


def _lm_rules(config: PLSTMLMConfig) -> list[Rule]:
    rules = [
        same("token_embedding.weight", "embedding/table"),
        *_block_rules("block_stack.blocks.{i}.", "blocks/", config.block),
        *_norm_rules("post_blocks_norm", "norm", config.norm),
    ]
    if not config.tie_embeddings:
        rules.append(same("lm_head.weight", "head/table"))
    return rules


def _vision_rules(config: PLSTMVisionConfig) -> list[Rule]:
    blocks = "block_stack.blocks.{i}."
    rules = [
        _patches("patch_embed.proj.weight", "patch_kernel"),
        same("patch_embed.proj.bias", "patch_bias"),
        *_block_rules(f"{blocks}block0.", "blocks/first/", config.first),
        *_block_rules(f"{blocks}block1.", "blocks/second/", config.second),
        *_norm_rules("norm", "norm", config.norm),
        transposed("head.weight", "head/kernel"),
        same("head.bias", "head/bias"),
    ]
    if config.position:
        shape = (1, *config.grid, config.width)
        rules.append(_reshaped("pos_embed.embed", "position", shape))
    return rules


SYSTEM = System(name="plstm", read_config=read_config, write_config=write_config, rules=_rules)
