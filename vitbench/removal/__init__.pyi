from .criteria import score as score
from .cut import (
    masked as masked,
    prune as prune,
)
from .dependence import (
    gaussian_mixture as gaussian_mixture,
    hsic as hsic,
)
from .remover import (
    TRAIN as TRAIN,
    Removal as Removal,
    Remover as Remover,
)
from .scores import (
    OFFICIAL_CRITERION as OFFICIAL_CRITERION,
    Criterion as Criterion,
    choose as choose,
)
from .search import (
    SearchConfig as SearchConfig,
    expected_improvement as expected_improvement,
)
