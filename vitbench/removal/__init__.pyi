from .criteria import score as score
from .cut import (
    masked as masked,
    remove_units as remove_units,
)
from .dependence import (
    cka as cka,
    gaussian_median as gaussian_median,
    gaussian_mixture as gaussian_mixture,
    hsic as hsic,
)
from .knapsack import (
    OptionLosses as OptionLosses,
    option_losses as option_losses,
    removal_options as removal_options,
)
from .pruner import (
    TRAIN as TRAIN,
    Pruner as Pruner,
    RemovalConfig as RemovalConfig,
)
from .scores import (
    OFFICIAL_CRITERION as OFFICIAL_CRITERION,
    Criterion as Criterion,
    top_units as top_units,
)
from .search import (
    SearchConfig as SearchConfig,
    expected_improvement as expected_improvement,
)
