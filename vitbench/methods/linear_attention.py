"""Linear attention as a control: softmax is replaced by a product of feature maps (`vitbench.model.layers.LinearAttention`).

Katharopoulos et al. 2020 (arXiv 2006.16236). It does not approximate softmax attention, so the model has to be trained
afterwards. Its multiply-accumulates grow linearly with the number of tokens, not quadratically.
"""

from torch import nn

from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import blocks
from vitbench.model.layers import LinearAttention as Layer
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tuned

TRAIN = TrainConfig(epochs=5, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


class LinearAttention(FineTuneConfig):
    """The blocks that get linear attention, counted from 0 (None: all), and the training afterwards."""

    blocks: tuple[int, ...] | None = None
    train: TrainConfig = TRAIN


@register(LinearAttention, identity=LinearAttention(blocks=(), train=TRAIN.replace(epochs=0)), reduces="macs")
def linear_attention(model: nn.Module, config: LinearAttention, data: ImageData | None) -> Compressed:
    """Replace the blocks' softmax attention by linear attention, then train."""
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    blocks.replace_attention(model, config.blocks, Layer.from_attention)
    return fine_tuned(model, config, data, teacher, title="training linear attention")
