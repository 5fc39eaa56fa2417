from .artifact import (
    RECIPE as RECIPE,
    load as load,
    model_digest as model_digest,
    read_manifest as read_manifest,
    save as save,
    size_on_disk as size_on_disk,
)
from .blocks import (
    block_shapes as block_shapes,
    record_block_shapes as record_block_shapes,
    set_attention_shape as set_attention_shape,
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
    TokenState as TokenState,
    bipartite_soft_matching as bipartite_soft_matching,
)
from .vit import (
    LINEAR_TYPES as LINEAR_TYPES,
    create_model as create_model,
    embed_patches as embed_patches,
    layer_type as layer_type,
    linear_layers as linear_layers,
    meta_model as meta_model,
    replace_module as replace_module,
    set_fused_attention as set_fused_attention,
    token_count as token_count,
)
