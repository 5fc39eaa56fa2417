"""Runtime layers: what stands in a compressed model in the place of a dense layer or of attention.

A runtime layer can be built empty from its `spec`, so that a file needs no code of the method that made it; codes are
buffers, so that they are saved as they are.
"""

from vitbench.layers.attention import LinearAttention, RoundedAttention
from vitbench.layers.factored import FactoredLinear, SharedFactor
from vitbench.layers.int8 import DynamicInt8Linear, StaticInt8Linear, StaticInt8Rounding, flop_formulas
from vitbench.layers.low_rank import LowRankLinear, SplitLinear
from vitbench.layers.nystroem import ExactNystroemAttention, NystroemAttention
from vitbench.layers.packed import PackedConv2d, PackedLinear, pack, unpack
from vitbench.layers.registry import RUNTIME_LAYERS
from vitbench.layers.rounded import Log2Rounded, Rounded, RoundedNorm, rounded

__all__ = [
    "RUNTIME_LAYERS",
    "DynamicInt8Linear",
    "ExactNystroemAttention",
    "FactoredLinear",
    "LinearAttention",
    "Log2Rounded",
    "LowRankLinear",
    "NystroemAttention",
    "PackedConv2d",
    "PackedLinear",
    "Rounded",
    "RoundedAttention",
    "RoundedNorm",
    "SharedFactor",
    "SplitLinear",
    "StaticInt8Linear",
    "StaticInt8Rounding",
    "flop_formulas",
    "pack",
    "rounded",
    "unpack",
]
