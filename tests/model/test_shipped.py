"""The model that comes with the project."""

import pytest

from tests.conftest import ROOT
from vitbench.base.errors import InputError
from vitbench.data.splits import load_data
from vitbench.model import artifact
from vitbench.rows.row_table import load_records
from vitbench.run.cache import baseline, create_initial_model
from vitbench.run.verification import remake
from vitbench.training.config import TrainConfig

FOLDER = ROOT / "data" / "deit_tiny_patch16_96"


def test_its_file_has_the_size_of_its_row_and_less_than_six_megabytes():
    rows = load_records(ROOT / "results" / "reference" / "deit-tiny-96")
    row = rows[(rows["method"] == "weight_only") & (rows["metric"] == "bytes")].iloc[-1]
    assert artifact.size_on_disk(FOLDER) == row["value"] < 6e6
    assert row["context"]["artifact"] == artifact.read_manifest(FOLDER).sha256[: len(row["context"]["artifact"])]


def test_it_is_found_by_its_name_for_the_photographs_and_no_other_classes(image_folder):
    no_training, photographs = TrainConfig(epochs=0), load_data("photographs", test=20, train=20, val=20)
    model = create_initial_model("deit_tiny_patch16_96", photographs, no_training)
    assert model.recipe.architecture.img_size == 96
    assert not model.recipe.layers, "its weights are dense, so that every method can start from it"
    with pytest.raises(InputError, match="has 10 classes and set has 3"):
        create_initial_model("deit_tiny_patch16_96", load_data(image_folder()), no_training)


def test_a_row_of_it_is_rebuilt_from_its_name():
    photographs = load_data("photographs", test=20, train=20, val=20)
    base = baseline("deit_tiny_patch16_96", photographs, TrainConfig(epochs=0))
    again = remake(base.model.recipe.architecture.name, {"origin": base.model.recipe.origin}, photographs)
    assert artifact.weights_hash(again.model) == artifact.weights_hash(base.model)
