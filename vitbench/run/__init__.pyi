from .bench import Bench as Bench
from .cache import (
    CachedModel as CachedModel,
    baseline as baseline,
    compress_cached as compress_cached,
)
from .combinations import (
    CombinationSearch as CombinationSearch,
    fit_budget as fit_budget,
    orders as orders,
    search_combinations as search_combinations,
    trial_rows as trial_rows,
)
from .history import (
    search_rows as search_rows,
    seconds_row as seconds_row,
    training_rows as training_rows,
)
from .lessons import (
    find_lessons as find_lessons,
    parse_setting as parse_setting,
    read_profile as read_profile,
    setup_notebook as setup_notebook,
)
from .mined import Mined as Mined, findings as findings, parse_budget as parse_budget
from .mining import load_images as load_images, mine as mine
from .pairs import list_pairs as list_pairs
from .suite import open_data as open_data
from .sweep.drive import (
    latest_cell_rows as latest_cell_rows,
)
from .verification import (
    remake as remake,
    verify as verify,
)
