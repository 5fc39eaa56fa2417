"""The tables of the pages, and the names of models in them: made of rows alone.

Each module tabulates one topic; `TABLES` holds the functions that templates know, by name. A table comes without its head, which
the template has.
"""

from docs.tables import (
    attention as attention,
    backends as backends,
    distillation as distillation,
    edge as edge,
    faults as faults,
    int8 as int8,
    low_rank as low_rank,
    pruning as pruning,
    quantization as quantization,
    repeats as repeats,
    runs as runs,
)
from docs.tables.common import TABLES as TABLES
