from .batches import (
    eval_batches as eval_batches,
    train_batches as train_batches,
)
from .splits import (
    ImageData as ImageData,
    Split as Split,
    load_data as load_data,
)
