from .alignment import align_blocks as align_blocks
from .coders import (
    Coder as Coder,
    RowCoder as RowCoder,
)
from .factors import (
    DECOMPOSITIONS as DECOMPOSITIONS,
    closed_form_factors as closed_form_factors,
    factorise as factorise,
    stack_weights as stack_weights,
)
from .gptq import gptq_codes as gptq_codes
from .moments import (
    Moments as Moments,
    collect_moments as collect_moments,
    forward_hooks as forward_hooks,
)
from .quantizers import (
    code_range as code_range,
    least_error_range as least_error_range,
    min_error_step as min_error_step,
    quantize as quantize,
)
from .rotation import (
    hadamard as hadamard,
    rotate as rotate,
)
from .shared import (
    FactorShape as FactorShape,
    output_directions as output_directions,
)
