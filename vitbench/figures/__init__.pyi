from .accuracy_cost import (
    small_multiples as small_multiples,
    tradeoff as tradeoff,
)
from .attention import (
    accuracy_for_macs as accuracy_for_macs,
    against_tokens as against_tokens,
    break_even_by_variant as break_even_by_variant,
)
from .drawing import (
    COLOURS as COLOURS,
    figure_title as figure_title,
    footnote as footnote,
    latencies as latencies,
    method_style as method_style,
    predicted_beside_measured as predicted_beside_measured,
    save_figure as save_figure,
    style as style,
)
from .gallery import GALLERY as GALLERY
from .layout import page as page
from .measured_edge import (
    floors as floors,
    memory as memory,
    startup as startup,
)
from .one_model import (
    error_by_family as error_by_family,
    layer_errors as layer_errors,
    layer_map as layer_map,
    parts as parts,
    training_curves as training_curves,
)
from .photographs import changed_answers as changed_answers
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
from .sliders import figure_slider as figure_slider
