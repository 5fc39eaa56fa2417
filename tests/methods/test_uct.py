"""UCT: the file's size, both orders, the closed form, the two forms of training, and what is refused."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitbench.base import store
from vitbench.base.errors import InputError
from vitbench.calibration.factors import closed_form_factors, output_grams, stack_weights
from vitbench.measurement.cost import count_macs
from vitbench.measurement.limits import peak_tensors
from vitbench.methods import uct
from vitbench.methods.registry import compress, make_config
from vitbench.methods.uct import OFFICIAL_UCT, UCT, with_order
from vitbench.model import artifact, vit
from vitbench.model.layers.factored import factored_layers
from vitbench.run.cache import compress_cached
from vitbench.training import loop
from vitbench.training.config import TrainConfig
from vitbench.training.loop import evaluate

ROUNDED = UCT(train=TrainConfig(epochs=0))
SHORT = UCT(train=TrainConfig(epochs=2, lr=2e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0))


def quick_factors(target, rank, gram=None):
    """Any factors: a file's size does not depend on them."""
    return target[:, :rank].contiguous(), target[:rank].contiguous()


@pytest.fixture(
    scope="module",
    params=[("deit_small_patch16_224", 277, 5.70, 14.7), ("deit_base_patch16_224", 502, 19.1, 17.2)],
    ids=["DeiT-S", "DeiT-B"],
)
def published(request, tmp_path_factory):
    """A model of the paper's shapes with random weights: dense and packed, the folders, and the limits."""
    name, rank, mebibytes, ratio = request.param
    folder = tmp_path_factory.mktemp("shapes")
    dense = vit.create_model(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uct, "closed_form_factors", quick_factors)
        small = compress(dense, UCT(rank=rank, start="weights", steps_rule="lsq", train=TrainConfig(epochs=0))).model
    paths = artifact.save(dense, folder / "dense"), artifact.save(small, folder / "small")
    return dense, small, *paths, mebibytes, ratio, rank


@pytest.mark.slow
def test_published_shapes_fit_the_published_sizes(published):
    _, small, dense_path, path, mebibytes, ratio, _ = published
    size = artifact.size_on_disk(path)
    assert size <= mebibytes * 2**20
    assert artifact.size_on_disk(dense_path) >= ratio * size
    assert sum(artifact.bytes_by_part(path).values()) == size
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(artifact.load(path)(x), small(x), atol=1e-5)


@pytest.mark.slow
@torch.inference_mode()
def test_both_orders_agree_on_published_shapes(published):
    _, small, *_ = published
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    first = small(x)
    for order in ("decode_first", "cheapest"):
        assert (with_order(small, order)(x) - first).abs().max() <= 1e-4 * first.abs().max()


@pytest.mark.slow
def test_multiply_accumulates_of_published_shapes(published):
    dense, small, *_, rank = published
    tokens, d = 197, dense.embed_dim
    linears = 12 * tokens * 12 * d**2
    others = count_macs(dense) - linears
    wanted = {384: 0.962, 768: 0.872}[d]
    assert (count_macs(small) - others) / linears == pytest.approx(wanted, abs=5e-4)


class Shapes(TorchDispatchMode):
    """The shapes of all that operators return."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.update(tuple(tensor.shape) for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor))
        return result

    def __init__(self):
        super().__init__()
        self.seen = set()


@pytest.mark.slow
@torch.inference_mode()
def test_reordered_inference_never_holds_a_decoded_matrix(published):
    _, small, *_ = published
    decoded = {(layer.in_features, layer.out_features) for layer in factored_layers(small).values()}
    decoded |= {pair[::-1] for pair in decoded}
    peaks = {}
    for order in ("reordered", "decode_first"):
        model = with_order(small, order)
        with Shapes() as shapes:
            model.blocks(torch.zeros(1, 197, model.embed_dim))
        assert bool(shapes.seen & decoded) == (order == "decode_first")
        peaks[order] = peak_tensors(model, torch.zeros(1, 3, 224, 224))
    assert peaks["reordered"] < peaks["decode_first"]


def test_the_closed_form_is_the_best_of_its_rank():
    M = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    Z, D = closed_form_factors(M, 7)
    assert torch.allclose(D @ D.T, torch.eye(7), atol=1e-5)
    least = torch.linalg.svdvals(M)[7:].square().sum()
    assert torch.isclose((Z @ D - M).square().sum(), least, rtol=1e-4)


def test_the_weighted_closed_form_keeps_outputs_better(base, digits):
    layers = vit.linear_layers(base.model, ("fc1",))
    grams = output_grams(base.model, layers, digits.calibration)
    assert torch.allclose(next(iter(grams.values())), next(iter(grams.values())).T, rtol=1e-4)
    target, gram = stack_weights(layers), sum(grams.values())

    def lost(right):  # of the outputs: tr(G) - tr(D G D^T) for orthonormal D
        return float(gram.trace() - (right.double() @ gram @ right.double().T).trace())

    plain, weighted = closed_form_factors(target, 20)[1], closed_form_factors(target, 20, gram)[1]
    assert lost(weighted) < 0.9 * lost(plain)


def test_full_rank_and_eight_bits_lose_almost_nothing(base, digits):
    config = UCT(layers=("proj", "fc2"), rank=64, bits=8, train=TrainConfig(epochs=0))
    small = compress(base.model, config, digits).model
    x = torch.randn(8, 3, 8, 8)
    assert (small(x) - base.model(x)).abs().max() < 0.03 * base.model(x).abs().max()


@pytest.mark.slow
def test_training_the_codes_pays_and_is_small(base, digits, tmp_path):
    trained_result = compress(base.model, SHORT, digits)
    rounded, trained = compress(base.model, ROUNDED, digits).model, trained_result.model
    sizes = [artifact.size_on_disk(artifact.save(m, tmp_path / str(i))) for i, m in enumerate((rounded, trained))]
    assert artifact.size_on_disk(base.path) >= 8 * max(sizes)
    assert evaluate(trained, digits.train).top1.mean() > evaluate(rounded, digits.train).top1.mean()
    assert len(trained_result.history) == 2
    assert not torch.equal(trained.blocks[0].norm1.weight, rounded.blocks[0].norm1.weight), "the rest is trained too"


@pytest.mark.slow
def test_the_encoder_form_fits_the_weights_and_leaves_no_encoder(base, digits, tmp_path):
    config = SHORT.replace(form="encoder", warm_steps=60, train=SHORT.train.replace(epochs=1, lr=1e-4))
    small = compress(base.model, config, digits).model
    names = set(artifact.load(artifact.save(small, tmp_path / "a")).state_dict())
    assert names == set(compress(base.model, ROUNDED.replace(start="activations"), digits).model.state_dict())
    errors = []
    for steps in (0, 60):
        off = config.replace(warm_steps=steps, train=TrainConfig(epochs=0))
        model = compress(base.model, off, digits).model
        layers = factored_layers(model)
        dense = vit.linear_layers(base.model)
        errors.append(sum(float((layers[name].dense() - dense[name].weight).square().sum()) for name in layers))
    assert errors[1] < 0.8 * errors[0]


def test_official_choices_are_kept_apart(base, digits):
    config = OFFICIAL_UCT.replace(warm_steps=5, train=OFFICIAL_UCT.train.replace(epochs=0))
    small = compress(base.model, config, digits).model
    assert (small.head.bits, small.patch_embed.proj.bits) == (4, 8)
    ours = compress(base.model, ROUNDED, digits).model
    assert (ours.head.bits, ours.patch_embed.proj.bits) == (8, 8)


@pytest.mark.slow
def test_a_killed_training_goes_on(base, digits, monkeypatch, stopped):
    whole = compress(base.model, SHORT, digits).model
    with stopped(1):
        compress(base.model, SHORT, digits)
    epochs = loop._TrainingRun.epoch
    monkeypatch.setattr(
        loop._TrainingRun,
        "epoch",
        lambda self, epoch, *rest: epoch == 0 and pytest.fail("begun anew") or epochs(self, epoch, *rest),
    )
    again = compress(base.model, SHORT, digits).model
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(base, digits, monkeypatch, home):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    steps = len(digits.train) // 128
    losses = loop._TrainingRun._loss

    def broken(self, *batch):
        self.seen = getattr(self, "seen", 0) + 1
        return losses(self, *batch) * (float("nan") if self.seen == steps + 3 else 1.0)

    monkeypatch.setattr(loop._TrainingRun, "_loss", broken)
    unfinished = home / "results" / "cache" / "unfinished"
    before = set(unfinished.glob("*.safetensors"))
    with pytest.raises(InputError, match=f"the loss is nan at step {steps + 3} .epoch 2.: .* stays on disk"):
        compress(base.model, SHORT.replace(train=SHORT.train.replace(seed=5)), digits)
    (kept,) = set(unfinished.glob("*.safetensors")) - before
    assert len(store.read_tree(kept)["history"]) == 1


def test_a_compressed_model_is_made_once(base, digits, monkeypatch):
    first = compress_cached(base, ROUNDED, digits)
    monkeypatch.setattr(uct, "train_codes", lambda *_: pytest.fail("trained again"))
    again = compress_cached(base, ROUNDED, digits)
    assert again.path == first.path
    assert again.model.recipe.method == "uct"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 65}, r"rank = 65 is more than proj, fc2 allow \(64\); give 1 to 64"),
        ({"rank": 65, "start": "weights"}, r"rank = 65 is more than qkv, proj, fc1, fc2 allow"),
        ({"rank": 0}, "rank = 0"),
        ({"ranks": {"fc1": 257}}, r"rank = 257 is more than fc1 allow \(256\)"),
        (
            {"start": "weights", "dense_bits": 2},
            "dense_bits, target_bytes, group and latent_bits are settings of start=second_order",
        ),
        ({"group": 8}, r"group = 8 does not divide the 46 inputs of D of qkv"),
        ({"layers": ["qkv"], "ranks": {"fc1": 8}}, "unknown layer type in ranks 'fc1'; allowed: qkv"),
        ({"dense_bits": 1.5}, "dense_bits = 1.5: .* or 1.58 for ternary codes"),
        (
            {"target_bytes": 9000},
            "target_bytes leaves .* bytes for the blocks' linear layers, and the smallest form takes",
        ),
        ({"bits": 1}, "bits = 1"),
        ({"bits": 9}, "bits = 9"),
        ({"layers": ["fc3"]}, "layers"),
        ({"train": {"epochs": -1}}, "epochs = -1"),
        ({"teacher": "/nowhere"}, "not a saved model"),
    ],
)
def test_wrong_settings(base, digits, values, message):
    with pytest.raises(InputError, match=message):
        compress(base.model, make_config("uct", values), digits)


def test_a_compressed_model_has_no_dense_layers_left(base, digits):
    small = compress(base.model, make_config("dynamic_int8")).model
    with pytest.raises(InputError, match="has a dense qkv layer in 0 of 4 blocks"):
        compress(small, ROUNDED, digits)


def test_a_teacher_of_other_classes_is_refused(base, digits, tmp_path):
    path = artifact.save(vit.create_model("vit_mini_patch2_8", num_classes=7), tmp_path / "seven")
    with pytest.raises(InputError, match="has 7 classes and the student 10"):
        compress(base.model, SHORT.replace(teacher=str(path)), digits)
    other = artifact.save(vit.create_model("vit_mini_patch4_32"), tmp_path / "larger")
    with pytest.raises(InputError, match="has another preprocessing"):
        compress(base.model, SHORT.replace(teacher=str(other)), digits)


@pytest.mark.slow
def test_another_teacher_gives_another_student(base, digits, tmp_path):
    path = artifact.save(vit.create_model("vit_mini_patch2_8", seed=3), tmp_path / "untrained")
    own, odd = (
        compress(base.model, SHORT.replace(teacher=teacher), digits).model for teacher in ("original", str(path))
    )
    assert evaluate(own, digits.val).top1.mean() > evaluate(odd, digits.val).top1.mean()


def test_images_are_needed_where_they_are(base):
    with pytest.raises(InputError, match="start=weights"):
        compress(base.model, ROUNDED)
    with pytest.raises(InputError, match="train.epochs=0"):
        compress(base.model, UCT(start="weights"))


def test_images_of_other_classes_are_refused(digits):
    model = vit.create_model("vit_mini_patch2_8", num_classes=7)
    with pytest.raises(InputError, match="7 outputs and digits has 10 classes"):
        compress(model, SHORT, digits)


def test_a_damaged_artefact_is_refused(base, digits, tmp_path):
    path = artifact.save(compress(base.model, ROUNDED, digits).model, tmp_path / "a")
    file = path / "model.safetensors"
    with open(file, "r+b") as handle:
        handle.seek(os.path.getsize(file) - 100)
        byte = handle.read(1)
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match="checksum"):
        artifact.load(path)


def test_recipes_that_lie_about_the_shared_factor_are_refused(base, digits, tmp_path):
    import json

    path = artifact.save(compress(base.model, ROUNDED, digits).model, tmp_path / "a")
    manifest = json.loads((path / "recipe.json").read_text())
    del manifest["check"]
    for change, message in (
        (lambda recipe: recipe["shared"].pop("qkv"), "unknown shared module in the recipe 'qkv'"),
        (lambda recipe: recipe["shared"].update({"a.b": recipe["shared"]["qkv"]}), "shared module"),
        (lambda recipe: recipe["shared"]["qkv"].update(in_features=3), "do not fit"),
        (lambda recipe: recipe["layers"]["blocks.0.attn.qkv"].update(order="sideways"), "order"),
    ):
        text = json.loads(json.dumps(manifest))
        change(text["recipe"])
        (path / "recipe.json").write_text(json.dumps(text))
        with pytest.raises(InputError, match=message):
            artifact.load(path)
