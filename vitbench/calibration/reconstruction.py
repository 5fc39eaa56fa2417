"""Block-wise reconstruction: the codes of a block's layers are trained together until the block answers as it should.

Rounding layer by layer does not see that one layer of a block can make up for another. Here the weights and steps of a
block's coders, and its biases and norms, are moved by gradient to keep the block's output on calibration images (BRECQ, Li
et al. 2021, arXiv 2102.05426), block after block, each with the inputs that the coded blocks before it really produce:

    min E||block(x'; decoded weights) - block_given(x)||^2,

where the gradient passes through the rounding as if it were not there (LSQ).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitbench.base import progress
from vitbench.base.store import StoredFile
from vitbench.calibration.coders import RowCoder
from vitbench.calibration.moments import BATCH
from vitbench.data.batches import eval_batches
from vitbench.data.splits import Split
from vitbench.model import vit

RATE, REST_RATE = 2e-3, 2e-4  # of the codes and their steps, in units of the weights' size; of biases and norms


def reconstruct(
    model: nn.Module,
    given: nn.Module,
    coders: Mapping[str, RowCoder],
    split: Split,
    steps: int,
    seed: int = 0,
    kept: Callable[[int], StoredFile] | None = None,
) -> None:
    """Fit the coders of `model`'s blocks, and its biases and norms, in place.

    Args:
        model: whose dense layers hold the decoded weights; they are kept up to date.
        given: what it should answer like.
        coders: layer name -> the coder of its weight.
        steps: of Adam for each block, `BATCH` images each.
        kept: block's number -> where the fitted block is kept, so that a run that was killed goes on after it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        wanted = torch.cat(
            [vit.embed_patches(given, x) for x, _ in eval_batches(split, given.recipe.preprocess, BATCH)]
        )
    present = wanted
    vit.set_fused_attention(model, False)  # the fused kernel's backward pass is the slower one here
    pairs = list(zip(model.blocks, given.blocks, strict=True))
    with progress.progress_bar(None, "fitting block by block", total=steps * len(pairs), unit="step") as bar:
        for index, (block, original) in enumerate(pairs):
            prefix = f"blocks.{index}."
            own = {name.removeprefix(prefix): coder for name, coder in coders.items() if name.startswith(prefix)}
            wanted = _through(original, wanted)
            file = kept(index) if kept else None
            state = file.load() if file else None
            if state is None:
                _fit(block, own, present, wanted, steps, generator, bar)
                if file:
                    file.save(_state(block, own, generator))
            else:
                _take(state, block, own, generator)
                bar.update(steps)
            present = _through(block, present)
    vit.set_fused_attention(model, True)


def _fit(
    block: nn.Module,
    coders: Mapping[str, RowCoder],
    present: Tensor,
    wanted: Tensor,
    steps: int,
    generator: torch.Generator,
    bar,
) -> None:
    codes = [parameter for coder in coders.values() for parameter in coder.parameters()]
    rest = [parameter for parameter in block.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.Adam([{"params": codes, "lr": RATE}, {"params": rest, "lr": REST_RATE}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    spread = wanted.var()
    with torch.enable_grad():
        for parameter in rest:
            parameter.requires_grad_(True)
        for _ in range(steps):
            chosen = torch.randint(len(present), (BATCH,), generator=generator)
            answer = torch.func.functional_call(block, _decoded(coders), (present[chosen],))
            loss = (answer - wanted[chosen]).square().mean() / spread
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
    for parameter in rest:
        parameter.requires_grad_(False)
    _put(block, coders)


def _state(block: nn.Module, coders: Mapping[str, RowCoder], generator: torch.Generator) -> dict[str, Any]:
    """What a fit changed: the codes and their steps, biases and norms, and the draws."""
    return {
        "coders": {name: coder.state_dict() for name, coder in coders.items()},
        "vectors": {name: parameter for name, parameter in block.named_parameters() if parameter.ndim == 1},
        "generator": generator.get_state(),
    }


@torch.no_grad()
def _take(state: dict[str, Any], block: nn.Module, coders: Mapping[str, RowCoder], generator: torch.Generator) -> None:
    for name, coder in coders.items():
        coder.load_state_dict(state["coders"][name])
    for name, values in state["vectors"].items():
        block.get_parameter(name).copy_(values)
    generator.set_state(state["generator"])
    _put(block, coders)


@torch.no_grad()
def _put(block: nn.Module, coders: Mapping[str, RowCoder]) -> None:
    """Put the decoded weights into the block."""
    for key, weight in _decoded(coders).items():
        block.get_parameter(key).copy_(weight)


def _decoded(coders: Mapping[str, RowCoder]) -> dict[str, Tensor]:
    return {f"{name}.weight": next(iter(coder.decode().values())) for name, coder in coders.items()}


@torch.no_grad()
def _through(block: nn.Module, tokens: Tensor) -> Tensor:
    return torch.cat([block(part) for part in tokens.split(BATCH)])
