from .coders import (
    Coder as Coder,
    RowCoder as RowCoder,
)
from .factors import (
    DECOMPOSITIONS as DECOMPOSITIONS,
    closed_form as closed_form,
    factorise as factorise,
    stacked as stacked,
)
from .gptq import second_order as second_order
from .moments import (
    Moments as Moments,
    collect as collect,
    watching as watching,
)
from .quantizers import (
    best_step as best_step,
    code_range as code_range,
    least_error_range as least_error_range,
    to_codes as to_codes,
)
