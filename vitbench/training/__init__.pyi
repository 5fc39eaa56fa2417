from . import loop as loop
from .compressed import Compressed as Compressed
from .config import TrainConfig as TrainConfig
from .distilling import load_teacher as load_teacher
from .loop import (
    evaluate as evaluate,
    train as train,
)
from .tuning import (
    FineTuneConfig as FineTuneConfig,
    fine_tune as fine_tune,
    fine_tuned as fine_tuned,
)
