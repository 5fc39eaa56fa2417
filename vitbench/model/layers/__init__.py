"""Runtime layers: the layers that replace dense layers and attention in a compressed model.

A runtime layer can be built empty from its `spec`, so loading a file needs no code of the method that made it. Codes are
buffers, so they are saved without conversion.
"""

from vitbench.model.layers.attention import ExactNystroemAttention, LinearAttention, NystroemAttention, RoundedAttention
from vitbench.model.layers.factored import FactoredLinear, LowRankLinear, SharedFactor, SharedFactorLinear, SplitLinear
from vitbench.model.layers.folded import BiasedLinear, RMSNorm
from vitbench.model.layers.int8 import DynamicInt8Linear, StaticInt8Linear, StaticInt8Rounding, flop_formulas
from vitbench.model.layers.packed import PackedConv2d, PackedLinear, pack, unpack
from vitbench.model.layers.registry import RUNTIME_LAYERS
from vitbench.model.layers.rounded import Log2Rounded, Rounded, RoundedNorm, fake_quantize

__all__ = [
    "RUNTIME_LAYERS",
    "BiasedLinear",
    "DynamicInt8Linear",
    "ExactNystroemAttention",
    "FactoredLinear",
    "LinearAttention",
    "Log2Rounded",
    "LowRankLinear",
    "NystroemAttention",
    "PackedConv2d",
    "PackedLinear",
    "RMSNorm",
    "Rounded",
    "RoundedAttention",
    "RoundedNorm",
    "SharedFactor",
    "SharedFactorLinear",
    "SplitLinear",
    "StaticInt8Linear",
    "StaticInt8Rounding",
    "flop_formulas",
    "pack",
    "fake_quantize",
    "unpack",
]
