from .deflate import Deflate as Deflate
from .diffq import DiffQ as DiffQ
from .distillation import Distillation as Distillation
from .dynamic_int8 import (
    DynamicInt8 as DynamicInt8,
    quantize_rows as quantize_rows,
    to_dynamic_int8 as to_dynamic_int8,
)
from .linear_attention import LinearAttention as LinearAttention
from .lsq import LSQ as LSQ
from .method import (
    Method as Method,
    register as register,
)
from .mixed_rank import MixedRank as MixedRank
from .multidimensional import MultiDimensional as MultiDimensional
from .nystroem import Nystroem as Nystroem
from .pruning import Pruning as Pruning
from .registry import (
    METHODS as METHODS,
    compress as compress,
    make_config as make_config,
)
from .simulated_integer import (
    FQ_VIT as FQ_VIT,
    REPQ_VIT as REPQ_VIT,
    SimulatedInteger as SimulatedInteger,
)
from .static_int8 import StaticInt8 as StaticInt8
from .token_merging import TokenMerging as TokenMerging
from .uct import (
    OFFICIAL_UCT as OFFICIAL_UCT,
    UCT as UCT,
    with_order as with_order,
)
from .weight_only import WeightOnly as WeightOnly
