"""compress: compress a model and save it."""

import argparse
import time
from pathlib import Path
from typing import Any

from vitbench.base.errors import InputError
from vitbench.cli.common import add_settings, add_splits, add_weights, load_option_data, set_nested


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("compress", help="compress a model and save it")
    parser.add_argument(
        "model", help="a folder with a saved model, or a model's name with --checkpoint or --pretrained"
    )
    parser.add_argument(
        "--method",
        nargs="*",
        default=[],
        metavar="NAME",
        help="one method, or several in order; none saves the model unchanged",
    )
    add_settings(
        parser,
        "config of a method, nested keys with dots (train.epochs=5); with several methods write METHOD.KEY=VALUE",
    )
    parser.add_argument(
        "--budget",
        default="",
        metavar="COST=LIMIT",
        help="find the setting of the one method that saves least within bytes=, macs= or latency=: a share (0.25), or bytes or MACs",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to save the compressed model to")
    parser.add_argument("--record", metavar="DIR", help="results folder to add a row to, with the seconds that it took")
    parser.add_argument(
        "--dataset", default="", help="images for the methods that need some: digits, a hub name, a folder"
    )
    add_splits(parser)
    add_weights(parser)
    parser.add_argument(
        "--no-ema",
        dest="ema",
        action="store_false",
        help="of a checkpoint with weights as trained and averaged (EMA), take those as trained (default: averaged)",
    )
    parser.add_argument(
        "--random", action="store_true", help="random weights for a model given by name: to measure size and speed only"
    )
    parser.add_argument("--depth", type=int, metavar="N", help="blocks of a model given by name (default: its own)")
    parser.add_argument("--classes", type=int, metavar="N", help="outputs of a model given by name (default: its own)")
    parser.set_defaults(command=_compress)


def _compress(options: argparse.Namespace) -> int:
    from vitbench.base.files import check_target
    from vitbench.methods import registry
    from vitbench.model import artifact, vit
    from vitbench.rows.runs import Run
    from vitbench.run.history import seconds_row

    check_target(options.out, artifact.MODEL_FOLDER)
    record = Run(options.record) if options.record else None
    settings = _method_settings(options)
    configs = [registry.make_config(name, values) for name, values in settings.items()]
    if options.budget and len(settings) != 1:
        raise InputError(f"--budget {options.budget}: give one --method for it, not {len(settings)}")
    if (Path(options.model) / artifact.RECIPE).is_file():
        model = artifact.load(options.model)
    elif not (options.checkpoint or options.pretrained or options.random):
        raise InputError(
            f"{options.model!r} is not a folder with a saved model; "
            "for a model by name give --checkpoint, --pretrained or --random"
        )
    else:
        model = vit.create_model(
            options.model,
            num_classes=options.classes,
            img_size=options.img_size,
            pretrained=options.pretrained,
            checkpoint=options.checkpoint,
            depth=options.depth,
            ema=options.ema,
            new_head=any(_trains(config) for config in configs),
        )
    data, start = load_option_data(options) if options.dataset else None, time.monotonic()
    if options.budget:
        ((name, values),) = settings.items()
        configs = [_config_for_budget(options.budget, model, name, values, data)]
    small = registry.compress(model, configs, data).model
    seconds = time.monotonic() - start
    path = artifact.save(small, options.out)
    if record is not None:
        record.append([seconds_row(path, data, seconds)])
    print(f"{path}: {artifact.size_on_disk(path):,} bytes, {small.recipe.method}, made in {seconds:.1f} s")
    return 0


def _trains(config: Any) -> bool:
    """Whether the method trains, so that a new head learns its classes."""
    return getattr(getattr(config, "train", None), "epochs", 0) > 0


def _config_for_budget(budget: str, model: Any, name: str, values: dict[str, Any], data: Any) -> Any:
    """The config with which the method saves least and stays within a budget such as bytes=0.25."""
    from vitbench.run.combinations import fit_budget
    from vitbench.run.lessons import parse_setting

    cost, target = parse_setting(budget)
    if not isinstance(target, int | float):
        raise InputError(f"--budget {budget}: {target!r} is not a number; give for example bytes=0.25")
    return fit_budget(model, name, data, cost=cost, target=target, settings=values)


def _method_settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings of each method, from `--method` and `--set`."""
    from vitbench.run.lessons import parse_setting

    values: dict[str, dict[str, Any]] = {name: {} for name in options.method}
    if len(values) < len(options.method):
        raise InputError(
            f"--method {' '.join(options.method)}: name each method once; compress the result again for a second time"
        )
    for setting in options.settings:
        key, value = parse_setting(setting)
        first, dot, rest = key.partition(".")
        if first in values and dot:
            name, key = first, rest
        elif len(values) == 1:
            (name,) = values
        else:
            raise InputError(
                f"--set {setting}: give METHOD.KEY=VALUE with METHOD one of those in --method ({', '.join(values) or 'none given'})"
            )
        set_nested(values[name], key, value, setting)
    return values
