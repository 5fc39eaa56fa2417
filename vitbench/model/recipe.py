"""The recipe in a saved model: how to rebuild the model's structure, and where its weights came from."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from vitbench.base.configs import Config

Reduction = Literal["cls_attention", "hsic", "hsic_cls", "merge", "ward"]  # see `vitbench.model.tokens`


LATER_KEYS = ("token_attention", "pool_weights")  # of an architecture: left out of files where they are None


class BlockShape(Config):
    """The sizes of one block: heads, dimensions of each head, hidden neurons, and tokens left after its attention.

    `tokens` includes class and fused tokens; None keeps all tokens.
    """

    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    neurons: int = Field(ge=1)
    tokens: int | None = Field(default=None, ge=2)


class Architecture(Config):
    """A timm (or vitbench) Vision Transformer by name, with the changes to the name's defaults.

    `blocks` holds the sizes of the blocks if something was removed; otherwise it is empty. `reduction` is how tokens are
    chosen. `distillation_token` is whether a second class token with its own head was added (DeiT). `global_pool` is set
    if the head does not read the name's default ("avg": the mean of the patch tokens, as in a fine-tuned MAE).
    `token_attention` is "official" in a T2T-ViT with the official scale and norms; files of early versions have neither, nor
    this key. `pool_weights` is "size" if the head's pooling weights a merged token by the number of tokens that it stands
    for; files of early versions weight all tokens equally, and have no such key.
    """

    name: str
    num_classes: int = Field(ge=1)
    img_size: int = Field(ge=1)
    depth: int | None = Field(default=None, ge=1)
    blocks: tuple[BlockShape, ...] = ()
    reduction: Reduction | None = None
    distillation_token: bool = False
    global_pool: Literal["avg"] | None = None
    token_attention: Literal["official"] | None = None
    pool_weights: Literal["size"] | None = None

    @model_serializer(mode="wrap")
    def _without_empty_form(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key not in LATER_KEYS or value}


class Preprocess(Config):
    """How an image becomes the model's input: resize, centre crop, scale to [0, 1], subtract `mean`, divide by `std`.

    The shorter side is resized to floor(size / crop_pct) pixels before a crop of size x size; crop_pct = 1 with a
    square image is a plain resize.
    """

    size: int = Field(ge=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    crop_pct: float = Field(default=1.0, gt=0, le=1)


class Step(Config):
    """One compression method that was applied, with its config, and the images that it used (`ImageData.identity`).

    `images` is empty, and left out of files, if the method used none.
    """

    method: str
    config: dict[str, Any]
    images: dict[str, Any] = {}

    @model_serializer(mode="wrap")
    def _without_empty_images(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key != "images" or value}


class Recipe(Config):
    """The description in a model's file: structure, input, origin, and the methods in the order they were applied.

    `layers` maps a module's name to the runtime layer that replaces it (see `vitbench.model.layers`). `shared` holds the
    modules that several layers share. `storage` is the type of floating-point tensors on disk; in memory they are float32.
    `deflate` is the level at which the file's tensors are coded (`vitbench.model.deflate`); 0, which files leave out: they are not.
    `origin` says how the weights were made: training config, data, seed, starting weights. A student whose architecture
    differs from its teacher's keeps the teacher's origin, and the teacher's name as `original`.
    """

    format: Literal[1] = 1
    architecture: Architecture
    preprocess: Preprocess
    origin: dict[str, Any] = {}
    original: str = ""
    methods: tuple[Step, ...] = ()
    layers: dict[str, dict[str, Any]] = {}
    shared: dict[str, dict[str, Any]] = {}
    storage: Literal["float32", "float16"] = "float32"
    deflate: int = Field(default=0, ge=0, le=9)

    @model_serializer(mode="wrap")
    def _without_default_coding(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key != "deflate" or value}

    @property
    def method(self) -> str:
        """`baseline`, or the names of the methods in the order they were applied, joined by `+`."""
        return "+".join(step.method for step in self.methods) or "baseline"
