from .bundle import (
    import_answers as import_answers,
    make_bundle as make_bundle,
)
from .figures import (
    cost_breakdown as cost_breakdown,
    fit_heatmap as fit_heatmap,
    memory_cliff as memory_cliff,
    paper_ratios as paper_ratios,
    transfer_check as transfer_check,
)
from .model import (
    Deployment as Deployment,
    cost as cost,
    load_profiles as load_profiles,
)
from .rows import (
    backend_table as backend_table,
    modelled as modelled,
    streamed as streamed,
    workloads as workloads,
)
