"""Torch-Pruning beside vitbench: one model, one budget, the same images, the same fine-tuning, timed in turn with one baseline.

    pip install torch-pruning
    python benchmarks/torch_pruning_peer.py --profile cifar10-deit --keep 0.6 --set dataset=FOLDER checkpoint=FILE ...

Both remove the same share of every block's hidden neurons and of every head's dimensions, chosen by a first-order Taylor
criterion on the calibration images. Torch-Pruning's result becomes a vitbench model of those sizes, so that all models share
one file format, one scorer and one clock; the softmax scale is corrected as for ours. The rows go to --out.
"""

import argparse
import copy

import torch
import torch.nn.functional as F

import vitbench as vb


def torch_pruned(base: torch.nn.Module, data: vb.ImageData, ratio: float) -> torch.nn.Module:
    """`base` after Torch-Pruning removed `ratio` of each block's neurons and of each head's dimensions."""
    try:
        import torch_pruning
    except ImportError:
        raise vb.InputError(
            "torch_pruning is not installed and this compares with it; pip install torch-pruning"
        ) from None
    model = copy.deepcopy(base).requires_grad_(True)
    vb.model.set_fused_attention(model, False)
    size = model.recipe.preprocess.size
    heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
    old_scales = [block.attn.scale for block in model.blocks]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.randn(1, 3, size, size),
        importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict={layer: ratio for block in model.blocks for layer in (block.mlp.fc1, block.attn.qkv)},
        num_heads=heads,
        ignored_layers=[model.patch_embed.proj, model.head],
    )
    for x, y in vb.data.eval_batches(data.calibration, model.recipe.preprocess, 32):
        F.cross_entropy(model(x), y).backward()
    pruner.step()
    for block, old in zip(model.blocks, old_scales, strict=True):
        attn = block.attn
        vb.model.set_attention_shape(attn, attn.num_heads, attn.qkv.out_features // (3 * attn.num_heads))
        with torch.no_grad():
            for tensor in attn.qkv.parameters():
                tensor[: attn.attn_dim] *= old / attn.scale
    model.recipe = base.recipe
    vb.model.record_block_shapes(model)
    vb.model.set_fused_attention(model, True)
    return model.requires_grad_(False).eval()


def ratio_for(base: torch.nn.Module, keep: float) -> float:
    """The ratio of neurons and of heads' dimensions to remove so that the share `keep` of the multiply-accumulates is left."""
    shapes, total, low, high = vb.model.block_shapes(base), vb.model.analytic_macs(base), 0.0, 0.99
    for _ in range(30):
        middle = (low + high) / 2
        smaller = tuple(
            shape.replace(
                neurons=max(1, int(shape.neurons * (1 - middle))), head_dim=max(1, int(shape.head_dim * (1 - middle)))
            )
            for shape in shapes
        )
        share = vb.model.analytic_macs(vb.model.meta_model(base.recipe.architecture.replace(blocks=smaller))) / total
        low, high = (middle, high) if share > keep else (low, middle)
    return (low + high) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--profile", default="quick", help="whose model, images and fine-tuning to take (default: quick)"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the profile")
    parser.add_argument("--keep", type=float, default=0.6, help="share of the multiply-accumulates that is left")
    parser.add_argument("--out", default="", help="results folder (default: results/runs/torch-pruning)")
    args = parser.parse_args()
    try:
        compare(
            vb.run.read_profile(args.profile, args.set, vb.run.find_lessons()),
            args.keep,
            args.out or "results/runs/torch-pruning",
        )
    except vb.InputError as error:
        raise SystemExit(f"error: {error}") from None


def compare(values: dict, keep: float, out: str) -> None:
    """Make, fine-tune and measure each of the models, and print the table."""
    torch.set_num_threads(values.get("threads", 2))
    run = vb.Run(out)
    data = vb.load_data(values["dataset"], name=values.get("dataset_name", ""), **values.get("splits", {}))
    start = {key: values[key] for key in ("pretrained", "checkpoint", "img_size") if key in values}
    base = vb.baseline(values["model"], data, vb.TrainConfig(**values["train"]), **start)
    vb.measure(base.path, data, run)
    ratio = ratio_for(base.model, keep)
    train = vb.removal.TRAIN.replace(**values.get("tuned", {"epochs": 5}), seed=values["train"].get("seed", 0))
    taylor = {"heads": 0.0, "neurons": ratio, "head_dims": ratio, "criterion": vb.removal.Criterion(name="taylor")}
    search = vb.removal.SearchConfig(evaluations=values.get("evaluations", 40))
    joint = vb.methods.MultiDimensional(
        keep=keep, most=0.6, objective=values.get("objective", "cross_entropy"), search=search
    )
    for epochs in (0, train.epochs):
        tuned = {"train": train if epochs else vb.removal.TRAIN}
        model = torch_pruned(base.model, data, ratio).requires_grad_(bool(epochs))
        vb.training.fine_tune(
            model,
            vb.training.FineTuneConfig(**tuned),
            data,
            copy.deepcopy(base.model),
            title="torch-pruning, fine-tuning",
        )
        step = vb.model.Step(
            method="torch_pruning", config={"ratio": round(ratio, 4), "train": tuned["train"].to_dict()}
        )
        model.recipe = model.recipe.replace(methods=(step,))
        paths = [vb.save(model.requires_grad_(False), run.models / f"torch-pruning-{epochs}")]
        for config in (
            vb.methods.Pruning(**taylor, compensation="none", **tuned),
            vb.methods.Pruning(**taylor, **tuned),
            joint.replace(**tuned),
        ):
            paths.append(vb.compress_cached(base, config, data).path)
        for path in paths:
            vb.measure(path, data, run, versus=base.path, what=("accuracy", "size", "latency"))
    print(vb.rows.comparison(vb.rows.experiment_rows(run.rows())).round(2).to_string())


if __name__ == "__main__":
    main()
