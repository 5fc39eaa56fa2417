"""Weights in timm's names put into a model: positions for its grid, a head for its classes, and nothing that does not fit."""

import math

import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitbench.errors import InputError
from vitbench.model.checkpoints import HEADS, Weights

PATCH = "patch_embed.proj.weight"
RGB = 3  # channels of an image


def pools_tokens(weights: Weights, model: VisionTransformer) -> bool:
    """Whether the weights are of a model that averages its tokens before the norm (MAE's `fc_norm`) and this one does not."""
    state = weights.state
    return "fc_norm.weight" in state and "norm.weight" not in state and isinstance(model.fc_norm, nn.Identity)


@torch.no_grad()
def load(model: VisionTransformer, weights: Weights) -> tuple[tuple[str, ...], str]:
    """Put the weights into `model`, in place; a head that they lack, or have for other classes, keeps its random start.

    Returns what was done to make them fit, in words, and why the head is random; "" where it is the weights' own.

    Raises:
        InputError: weights of another architecture, or that are no finite floating-point numbers.
    """
    file, own = weights.file, model.state_dict()
    _check_numbers(file, weights.state, own)
    state, said = _converted(file, weights, model)
    state, channels = _channels(file, state, own)
    _check_numbers(file, state, own)
    state, lacking = _head(state, own)
    _check_fit(file, state, own)
    model.load_state_dict(state)
    return (*said, *channels), lacking


def _converted(file: str, weights: Weights, model: VisionTransformer) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors with patches and positions resampled for this model, and with what timm converts itself."""
    state, own = dict(weights.state), model.state_dict()
    given = state.get(PATCH)
    linear = own.get(PATCH, Tensor()).dim() != 4  # T2T-ViT's; timm's filter takes it for a convolution
    proj = {PATCH: state.pop(PATCH)} if linear and given is not None else {}
    _check_grid(file, state, model)
    try:
        state = checkpoint_filter_fn(state, model, adapt_layer_scale=True) | proj
    except Exception as error:  # a layout that timm expects other tensors in
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"checkpoint {file!r} is of another architecture: its tensors cannot be converted to this model's ({reason}); "
            "name the model that it was made for"
        ) from None
    said = []
    if (
        given is not None
        and PATCH in own
        and given.dim() == own[PATCH].dim() == 4
        and given.shape[2:] != own[PATCH].shape[2:]
    ):
        said.append(f"patches resampled from {given.shape[-1]} to {own[PATCH].shape[-1]} pixels")
    before, after = weights.state.get("pos_embed"), own.get("pos_embed")
    if before is not None and after is not None and before.shape != after.shape:
        said.append(f"position embedding resampled from {before.shape[-2]} to {after.shape[-2]} tokens")
    return state, tuple(said)


def _check_grid(file: str, state: dict[str, Tensor], model: VisionTransformer) -> None:
    """Positions that have to be resampled must be those of a square grid of patches."""
    place, own = state.get("pos_embed"), model.pos_embed
    if place is None or own is None or place.shape == own.shape or "register_tokens" in state:
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    patches = place.shape[-2] - prefix if place.dim() == 3 else -1
    if patches < 1 or math.isqrt(patches) ** 2 != patches or place.shape[-1] != own.shape[-1]:
        raise InputError(
            f"checkpoint {file!r} is of another architecture: pos_embed is {tuple(place.shape)}, the model's "
            f"{tuple(own.shape)}, and can be resampled only from a square grid of patches behind {prefix} tokens of the same "
            "width; name the model that it was made for"
        )


def _channels(file: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A patch embedding of greyscale images made one of colour images, whose channels it sees the mean of."""
    changed = {}
    for key, wanted in own.items():
        given = state.get(key)
        if given is None or given.dim() != 4 or wanted.dim() != 4 or wanted.shape[1] != RGB or given.shape[1] == RGB:
            continue
        if given.shape[1] != 1:
            raise InputError(
                f"checkpoint {file!r} is of a model for images of {given.shape[1]} channels ({key}), and images have {RGB} "
                f"here; give one for {RGB} channels, or for 1"
            )
        changed[key] = given.expand(-1, RGB, -1, -1) / RGB
    return state | changed, tuple(f"{key} of 1 channel changed to see the mean of {RGB}" for key in changed)


def _check_numbers(file: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    for key, tensor in state.items():
        if key not in own or not own[key].is_floating_point():
            continue
        if not tensor.is_floating_point():
            raise InputError(
                f"checkpoint {file!r}: {key} holds {str(tensor.dtype).removeprefix('torch.')} values; weights are "
                "floating-point numbers here, so give those of before quantization"
            )
        if not tensor.float().isfinite().all():
            raise InputError(f"checkpoint {file!r}: {key} has values that are NaN or infinite; give undamaged weights")


def _head(state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state with the model's own random heads where its heads are missing or of another size, and what is amiss."""
    wanted = {key for key in own if key.rpartition(".")[0] in HEADS}
    given = {key for key in state if key.rpartition(".")[0] in HEADS}
    wrong = sorted(key for key in given & wanted if state[key].shape != own[key].shape)
    if given and not wrong:
        return state, ""
    rest = {key: tensor for key, tensor in state.items() if key not in given}
    lacking = "there is none" if not given else f"{wrong[-1]} is {tuple(state[wrong[-1]].shape)}"
    return rest | {key: own[key] for key in wanted}, lacking


def _check_fit(file: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if not (wrong or missing or surplus):
        return
    details = [f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}" for key in wrong[:2]]
    details += [f"{len(wrong) - 2} more of another size"] if len(wrong) > 2 else []
    details += [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unknown", surplus))
        if keys
    ]
    raise InputError(
        f"checkpoint {file!r} is of another architecture: {'; '.join(details)}; name the model that it was made for"
    )
