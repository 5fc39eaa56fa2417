from .accuracy_cost import (
    small_multiples as small_multiples,
    tradeoff as tradeoff,
)
from .attention import (
    against_tokens as against_tokens,
    crossings as crossings,
    speed_for_accuracy as speed_for_accuracy,
)
from .drawing import (
    COLOURS as COLOURS,
    heading as heading,
    latencies as latencies,
    look as look,
    note as note,
    predicted_beside_measured as predicted_beside_measured,
    save_figure as save_figure,
    style as style,
)
from .gallery import GALLERY as GALLERY
from .measured_edge import (
    floors as floors,
    memory as memory,
    startup as startup,
)
from .one_model import (
    families as families,
    layer_errors as layer_errors,
    layer_map as layer_map,
    parts as parts,
    training_curves as training_curves,
)
from .ranking import (
    equal_budgets as equal_budgets,
    ranks as ranks,
)
from .report import write_report as write_report
from .search_policies import (
    by_budget as by_budget,
    policies as policies,
    search_progress as search_progress,
)
from .sliders import knob as knob
