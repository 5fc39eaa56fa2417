"""Linear attention as a control: softmax is replaced by a product of feature maps (`vitbench.model.layers.LinearAttention`).

Katharopoulos et al. 2020 (arXiv 2006.16236). It approximates nothing of what softmax had learned, so that it has to be
trained; its multiply-accumulates grow with the number of tokens, not with its square.
"""

from torch import nn

from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import blocks
from vitbench.model.layers import LinearAttention as Layer
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import FineTuneConfig, find_teacher, fine_tune

TRAIN = TrainConfig(epochs=5, lr=1e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


class LinearAttention(FineTuneConfig):
    """Which blocks get linear attention, counted from 0 (None: all), and how they are trained afterwards."""

    blocks: tuple[int, ...] | None = None
    train: TrainConfig = TRAIN


@register(LinearAttention, identity=LinearAttention(blocks=(), train=TRAIN.replace(epochs=0)), reduces="macs")
def linear_attention(model: nn.Module, config: LinearAttention, data: ImageData | None) -> nn.Module:
    """Put linear attention in the place of the blocks' softmax attention, and train on."""
    teacher = find_teacher(model, config, data) if config.train.epochs else None
    blocks.replace_attention(model, config.blocks, Layer.from_attention)
    model = model.requires_grad_(bool(config.train.epochs))
    fine_tune(model, config, data, teacher, title="training linear attention")
    return model.cpu()
