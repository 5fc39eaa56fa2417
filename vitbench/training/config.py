"""Settings of the training loop."""

from typing import Literal

from pydantic import Field

from vitbench.base.configs import Config
from vitbench.data.batches import Augment


class TrainConfig(Config):
    """Settings of a training: AdamW, linear warm-up, cosine decay to a hundredth of `lr`.

    `kd_weight` and `temperature` apply only with a teacher: the loss is then
    (1 - kd_weight) CE + kd_weight T^2 KL(teacher || student), both softened by T (Hinton et al. 2015). With `kd_labels` "hard"
    the second term is the cross-entropy with the teacher's top class (Touvron et al. 2021). In a student with a distillation
    token the class token's head has the first term and the distillation token's head the second. `feature_weight` and
    `attention_weight` add losses on the outputs of blocks (see `vitbench.training.distilling`); the teacher then runs at
    every step.
    `views` is the number of augmented copies of each image: in epoch e the augmentation depends on seed, image and
    e mod views, whether there is a teacher or not. The teacher's logits for each view are cached on disk, so that it runs once
    for each. With 0 each epoch has a new augmentation, and the teacher runs at every step.
    `beta2` is AdamW's second decay. `clip_norm` bounds the norm of the gradient, that of codes and that of other parameters
    separately. `precision` "auto" is bf16 on a GPU, and on a CPU with bf16 instructions for widths of 192 or more; otherwise it
    is fp32.
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
