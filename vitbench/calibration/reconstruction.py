"""Block-wise reconstruction: the codes of a block's layers are trained together to keep the block's output.

Rounding layer by layer ignores that one layer of a block can compensate the error of another. Here gradient descent moves
the weights and steps of a block's coders, and its biases and norms, to keep the block's output on calibration images (BRECQ,
Li et al. 2021, arXiv 2102.05426). Blocks follow one another, each with the inputs x' that the coded blocks before it produce:

    min E||block(x'; decoded weights) - original_block(x)||^2,

where rounding has the straight-through gradient (LSQ). A block that rounds its activations does so during the fit, and each
`LearnedRange` in it is fitted with the weights (QDrop, Wei et al. 2022, arXiv 2203.05740, section 3, without its drops).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.base.store import Store, StoredFile, work_key
from vitbench.calibration.coders import RowCoder
from vitbench.calibration.moments import CALIBRATION_BATCH
from vitbench.calibration.quantizers import LearnedRange
from vitbench.data.batches import eval_batches
from vitbench.data.splits import ImageData, Split
from vitbench.model import vit
from vitbench.model.artifact import model_digest

# of codes and steps, in units of the weights' root mean square; of biases and norms; of ranges, as multiples of their start
CODES_LR, VECTORS_LR, RANGES_LR = 2e-3, 2e-4, 1e-3


def reconstruct(
    model: nn.Module,
    original: nn.Module,
    coders: Mapping[str, RowCoder],
    split: Split,
    steps: int,
    seed: int = 0,
    block_file: Callable[[int], StoredFile] | None = None,
) -> None:
    """Fit the coders of `model`'s blocks, its biases and norms, and its learned ranges, in place.

    Args:
        model: the model to fit. Its dense layers get the decoded weights.
        original: the model whose block outputs are the targets.
        coders: layer name -> the coder of its weight.
        steps: of Adam for each block, with `CALIBRATION_BATCH` images each.
        block_file: block's index -> the file for the fitted block, from which a stopped run is resumed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        target = torch.cat(
            [
                vit.embed_patches(original, x)
                for x, _ in eval_batches(split, original.recipe.preprocess, CALIBRATION_BATCH)
            ]
        )
    inputs = target
    vit.set_fused_attention(model, False)  # the fused kernel's backward pass is the slower one here
    pairs = list(zip(model.blocks, original.blocks, strict=True))
    with progress.progress_bar(None, "fitting block by block", total=steps * len(pairs), unit="step") as bar:
        for index, (block, original_block) in enumerate(pairs):
            prefix = f"blocks.{index}."
            block_coders = {
                name.removeprefix(prefix): coder for name, coder in coders.items() if name.startswith(prefix)
            }
            target = _run_block(original_block, target)
            stored_file = block_file(index) if block_file else None
            state = stored_file.load() if stored_file else None
            if state is None:
                _fit(block, block_coders, inputs, target, steps, generator, bar)
                if stored_file:
                    stored_file.save(_state(block, block_coders, generator))
            else:
                _load_state(state, block, block_coders, generator)
                bar.update(steps)
            inputs = _run_block(block, inputs)
    vit.set_fused_attention(model, True)


def block_files(original: nn.Module, data: ImageData, settings: dict[str, Any]) -> list[StoredFile]:
    """A file for each fitted block of a reconstruction, under the key of all that decides it: model, images, `settings`."""
    key_inputs = {"model": model_digest(original), "data": data.fingerprint, "settings": settings}
    key = work_key("methods", key_inputs)
    return [Store("reconstructions").file(f"{key}-{index}") for index in range(len(original.blocks))]


def _fit(
    block: nn.Module,
    coders: Mapping[str, RowCoder],
    inputs: Tensor,
    target: Tensor,
    steps: int,
    generator: torch.Generator,
    bar,
) -> None:
    codes = [parameter for coder in coders.values() for parameter in coder.parameters()]
    vectors: list[nn.Parameter] = []
    ranges: list[nn.Parameter] = []
    for module in block.modules():
        parameters = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 1]
        (ranges if isinstance(module, LearnedRange) else vectors).extend(parameters)
    groups = [(codes, CODES_LR), (vectors, VECTORS_LR), (ranges, RANGES_LR)]
    optimizer = torch.optim.Adam([{"params": parameters, "lr": lr} for parameters, lr in groups if parameters])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    target_variance = target.var()
    with torch.enable_grad():
        for parameter in vectors + ranges:
            parameter.requires_grad_(True)
        for _ in range(steps):
            batch_idx = torch.randint(len(inputs), (CALIBRATION_BATCH,), generator=generator)
            output = torch.func.functional_call(block, _decoded_weights(coders), (inputs[batch_idx],))
            loss = (output - target[batch_idx]).square().mean() / target_variance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
    for parameter in vectors + ranges:
        parameter.requires_grad_(False)
    _write_weights(block, coders)


def _state(block: nn.Module, coders: Mapping[str, RowCoder], generator: torch.Generator) -> dict[str, Any]:
    """All that a fit changes: codes and steps, biases, norms and ranges, and the state of the random generator."""
    return {
        "coders": {name: coder.state_dict() for name, coder in coders.items()},
        "vectors": {name: parameter for name, parameter in block.named_parameters() if parameter.ndim == 1},
        "generator": generator.get_state(),
    }


@torch.no_grad()
def _load_state(
    state: dict[str, Any], block: nn.Module, coders: Mapping[str, RowCoder], generator: torch.Generator
) -> None:
    for name, coder in coders.items():
        coder.load_state_dict(state["coders"][name])
    for name, values in state["vectors"].items():
        block.get_parameter(name).copy_(values)
    generator.set_state(state["generator"])
    _write_weights(block, coders)


@torch.no_grad()
def _write_weights(block: nn.Module, coders: Mapping[str, RowCoder]) -> None:
    """Copy the decoded weights into the block, in place."""
    for key, weight in _decoded_weights(coders).items():
        block.get_parameter(key).copy_(weight)


def _decoded_weights(coders: Mapping[str, RowCoder]) -> dict[str, Tensor]:
    return {f"{name}.weight": next(iter(coder.decode().values())) for name, coder in coders.items()}


@torch.no_grad()
def _run_block(block: nn.Module, tokens: Tensor) -> Tensor:
    return torch.cat([block(part) for part in tokens.split(CALIBRATION_BATCH)])
