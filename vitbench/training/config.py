"""How to train: the settings of the one training loop."""

from typing import Literal

from pydantic import Field

from vitbench.base.configs import Config
from vitbench.data.batches import Augment


class TrainConfig(Config):
    """How to train: AdamW, linear warm-up, cosine decay to a hundredth of `lr`.

    `kd_weight` and `temperature` matter only with a teacher: the loss is then
    (1 - kd_weight) CE + kd_weight T^2 KL(teacher || student), both softened by T (Hinton et al. 2015), or with
    `kd_labels` "hard" the cross-entropy with the teacher's class in the second term (Touvron et al. 2021). Of a student with
    a distillation token the class token's head gets the first term and the other head the second. `feature_weight` and
    `attention_weight` add what the blocks hold (see `vitbench.training.distilling`), of a teacher that runs along.
    `views` is how many augmented copies of the images there are: in epoch e an image is augmented as (seed, image,
    e mod views) say, the same for a student with or without a teacher, and the teacher's answers to each are kept on
    disk, so that it runs once for each; with 0 every epoch is augmented anew and the teacher runs along.
    `beta2` is AdamW's second decay. `precision` "auto" is bf16 on a GPU and on a CPU with bf16 instructions for widths of 192 or more, else fp32.
    """

    epochs: int = Field(default=60, ge=0)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=4e-3, gt=0)
    beta2: float = Field(default=0.98, gt=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_epochs: float = Field(default=5.0, ge=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    augment: Augment = "none"
    mixup: float = Field(default=0.8, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    kd_weight: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    kd_labels: Literal["soft", "hard"] = "soft"
    feature_weight: float = Field(default=0.0, ge=0)
    attention_weight: float = Field(default=0.0, ge=0)
    views: int = Field(default=0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    seed: int = Field(default=0, ge=0)
