from . import (
    base as base,
    calibration as calibration,
    cli as cli,
    data as data,
    edge as edge,
    figures as figures,
    measurement as measurement,
    methods as methods,
    model as model,
    removal as removal,
    rows as rows,
    run as run,
    training as training,
)
from .base.errors import InputError as InputError
from .data.splits import ImageData as ImageData, Split as Split, load_data as load_data
from .measurement.measures import Measures as Measures
from .measurement.measuring import measure as measure
from .methods.registry import METHODS as METHODS, compress as compress, make_config as make_config
from .model.artifact import load as load, save as save, size_on_disk as size_on_disk
from .model.vit import create_model as create_model
from .rows.records import Row as Row
from .rows.row_table import load_records as load_records
from .rows.runs import Run as Run
from .run.bench import Bench as Bench
from .run.cache import CachedModel as CachedModel, baseline as baseline, compress_cached as compress_cached
from .run.lessons import setup_notebook as setup_notebook
from .run.mining import mine as mine
from .training.config import TrainConfig as TrainConfig
from .training.loop import evaluate as evaluate, train as train

__version__: str
