from .artifact import (
    RECIPE as RECIPE,
    load as load,
    model_digest as model_digest,
    read_manifest as read_manifest,
    save as save,
    size_on_disk as size_on_disk,
)
from .blocks import (
    note_shapes as note_shapes,
    shapes as shapes,
    size_attention as size_attention,
)
from .layers import (
    RUNTIME_LAYERS as RUNTIME_LAYERS,
    PackedLinear as PackedLinear,
)
from .layers.attention import (
    iterative_inverse as iterative_inverse,
    landmarks as landmarks,
)
from .layers.factored import reordered_share as reordered_share
from .macs import analytic_macs as analytic_macs
from .names import model_names as model_names
from .recipe import (
    Architecture as Architecture,
    Preprocess as Preprocess,
    Recipe as Recipe,
    Step as Step,
)
from .tokens import (
    State as State,
    merge as merge,
)
from .vit import (
    LINEAR_TYPES as LINEAR_TYPES,
    create_model as create_model,
    embedded as embedded,
    layer_type as layer_type,
    linears as linears,
    replace_module as replace_module,
    set_fused_attention as set_fused_attention,
    skeleton as skeleton,
    token_count as token_count,
)
