"""Equal budgets, and every figure of the gallery, from rows alone."""

import numpy as np
import pandas as pd
import pytest

from tests.figures.test_figures_report import assert_readable, make_rows, rows_of
from vitbench.base.errors import InputError
from vitbench.cli import main
from vitbench.edge import rows as backend_table
from vitbench.figures.accuracy_cost import small_multiples
from vitbench.figures.gallery import GALLERY, draw
from vitbench.figures.layout import page
from vitbench.figures.ranking import at_budgets, equal_budgets, ranks
from vitbench.rows import budgets
from vitbench.rows.records import Row, append_rows
from vitbench.rows.row_table import load_records
from vitbench.rows.statistics import mean_interval, pack_hits
from vitbench.rows.words import method_name

IMAGES = 1000


def answers(*wrong):
    """The answers of a model that is wrong on these ranges of images."""
    hits = np.ones(IMAGES, bool)
    for first, last in wrong:
        hits[first:last] = False
    return {"hits": pack_hits(hits), "value": float(hits.mean()), "low": hits.mean() - 0.02, "high": hits.mean() + 0.02}


@pytest.fixture
def folder(tmp_path):
    """A baseline and four models: 1/2 and 1/4 of the baseline's bytes, each once well and once badly or nearly as well."""
    found = {
        "baseline": (800_000, answers((0, 20))),
        "pruning": (390_000, answers((0, 30))),
        "uct": (190_000, answers((0, 40))),
        "lsq": (190_000, answers((0, 39), (900, 903))),  # wrong on others, but not on more than chance
        "diffq": (100_000, answers((0, 300))),
    }
    rows = []
    for method, (size, own) in found.items():
        for row in make_rows(("baseline", method), (0.9, 0.9), (800_000, size))[6 if method != "baseline" else 0 :]:
            if row.method == method:
                test = {"context": row.context | {"images": IMAGES}, **own} if row.metric == "top1" else {}
                rows.append(row.replace(**test))
    append_rows(tmp_path / "records.jsonl", rows)
    return tmp_path


def test_within_a_budget_the_most_accurate_wins_and_its_equals_are_named(folder):
    won = budgets.winners(load_records(folder), shares=(1 / 2, 1 / 4, 1 / 8, 1 / 100))
    assert [each.count for each in won] == [4, 3, 1, 0]
    assert [None if each.top1 is None else each.top1["label"] for each in won] == ["pruning", "uct", "diffq", None]
    assert won[0].indistinguishable == ()
    assert won[1].indistinguishable == ("lsq",)
    assert won[1].cost["value"] == 190_000


def test_at_a_budget_a_method_stands_at_its_largest_setting_that_fills_it():
    costs = {"a (bits=8)": 40, "a (bits=4)": 20, "a (bits=2)": 10, "b": 49, "c": 90}
    methods = {label: label.partition(" (")[0] for label in costs}
    assert budgets.at_budget(costs, methods, 50) == {"a": "a (bits=8)", "b": "b"}
    assert budgets.at_budget(costs, methods, 50, tolerance=0.1) == {"b": "b"}
    assert budgets.at_budget(costs, methods, 50, tolerance=0.2) == {"a": "a (bits=8)", "b": "b"}
    assert budgets.at_budget(costs, methods, 24) == {"a": "a (bits=4)"}
    assert budgets.at_budget(costs, methods, 15) == {}
    assert budgets.at_budget(costs, methods, 15, tolerance=1) == {"a": "a (bits=2)"}


def test_no_accuracy_chooses_the_setting_of_a_method(folder):
    smaller = {"config": {"origin": {"start": "random"}, "methods": [{"method": "uct", "config": {"bits": 2}}]}}
    rows = [row.replace(**smaller) for row in make_rows(("baseline", "uct"), (0.9, 0.9), (800_000, 150_000))[6:]]
    better = {"context": rows[0].context | {"images": IMAGES}, **answers((0, 1))}
    append_rows(folder / "records.jsonl", [rows[0].replace(**better), *rows[1:]])
    won = budgets.winners(load_records(folder), shares=(1 / 4, 1 / 5))
    assert (
        won[0].top1["label"] == "uct"
    )  # the larger setting, though the smaller one is more accurate on the test images
    assert won[1].top1["label"] == "uct (bits=2)"


def test_without_answers_image_by_image_the_intervals_decide(folder):
    rows = load_records(folder)
    rows["hits"] = ""
    assert budgets.winners(rows, shares=(1 / 2,))[0].indistinguishable == ("uct", "lsq")


def test_the_table_of_budgets_is_for_reading(folder):
    table = budgets.budget_table(load_records(folder))
    assert table.loc["1/4", "most accurate"] == "UCT, 8 bits"
    assert table.loc["1/4", "top-1 %"] == "96.00 [94.00, 98.00]"
    assert table.loc["1/4", "of them"] == "LSQ"
    assert table.loc["1/15", "most accurate"] == "-"


def test_budgets_need_a_baseline(folder):
    rows = load_records(folder)
    with pytest.raises(InputError, match="no bytes of the baseline"):
        budgets.winners(rows[rows["method"] != "baseline"])


@pytest.mark.parametrize("count", [2, 31])
def test_small_multiples_show_every_method_and_can_be_read(tmp_path, count):
    append_rows(tmp_path / "records.jsonl", rows_of(count))
    rows = load_records(tmp_path)
    figure, shown = small_multiples(rows)
    assert_readable(figure)
    titles = {axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()}
    assert {title.replace("\n", " ") for title in titles} == set(map(method_name, rows["method"])) - {"baseline"}
    assert set(shown["key"]) <= set(rows["key"])


def seeded():
    """A baseline, two settings of one method and one of another, over three seeds."""
    models = {
        ("baseline", None): (1000, 0.90),
        ("weight_only", 8): (248, 0.89),
        ("weight_only", 4): (124, 0.85),
        ("pruning", None): (480, 0.80),
    }
    for seed in range(3):
        for (method, bits), (size, accuracy) in models.items():
            steps = [] if method == "baseline" else [{"method": method, "config": {"bits": bits}}]
            facts = {"model": "m", "dataset": "d", "data_fingerprint": "f", "method": method, "seed": seed}
            facts |= {
                "config": {"origin": {"train": {"seed": seed, "epochs": 1}}, "methods": steps},
                "source": "measured: x",
            }
            yield Row(**facts, metric="top1", unit="fraction", value=accuracy + 0.01 * seed)
            yield Row(**facts, metric="bytes", unit="bytes", value=float(size + seed))


def test_methods_at_equal_budgets_over_seeds(tmp_path):
    append_rows(tmp_path / "records.jsonl", seeded())
    rows = load_records(tmp_path)
    found = at_budgets(rows, "bytes", (1 / 2, 1 / 4, 1 / 8, 1 / 16))
    lines = {(line.method, round(1 / line.share)): line for line in found.itertuples()}
    assert set(lines) == {("baseline", 1), ("weight_only", 4), ("weight_only", 8), ("pruning", 2)}
    assert lines["weight_only", 4].cost == 249  # which fills a quarter, and of a half too little
    assert lines["weight_only", 8].cost == 125
    first = lines["weight_only", 4]
    assert (first.seeds, first.top1) == (3, pytest.approx(0.90))
    assert (first.low, first.high) == pytest.approx(mean_interval([0.89, 0.90, 0.91])[1:])
    figure, _ = equal_budgets(rows)
    assert_readable(figure)
    figure, _ = ranks(rows)
    assert_readable(figure)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {"1   90.0", "1   81.0", "1   86.0"}
    for make in (equal_budgets, ranks):
        with page(width=3.3):
            figure, _ = make(rows)
            assert_readable(figure)
    assert draw("equal-size", rows, tmp_path / "x.png") == 0
    with pytest.raises(InputError, match="of the baseline"):
        at_budgets(rows[rows["method"] != "baseline"])
    with pytest.raises(InputError, match="no method is within"):
        equal_budgets(rows[rows["method"] == "baseline"])


NEEDS_MORE = {
    "equal-work": "no method is within",
    "floors": "latency_floor",
    "energy": "an energy",
    "memory": "peak_rss",
    "startup": "cold_start",
}


@pytest.mark.parametrize("name", GALLERY)
@pytest.mark.parametrize("kind", ["png", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("svg", "pdf"))])
def test_every_figure_is_drawn_again_as_it_was(folder, tmp_path, name, kind):
    rows = load_records(folder)
    if name in NEEDS_MORE:
        with pytest.raises(InputError, match=NEEDS_MORE[name]):
            draw(name, rows, tmp_path / f"x.{kind}")
        return
    files = [tmp_path / side / f"x.{kind}" for side in "ab"]
    for file in files:
        assert draw(name, rows, file) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert set(pd.read_csv(files[0].with_suffix(".csv"))["key"]) <= set(rows["key"])


def test_a_figure_from_the_command_line_in_ones_own_style(folder, tmp_path, capsys):
    style = tmp_path / "own.mplstyle"
    style.write_text("savefig.dpi: 50\n")
    plain, own = tmp_path / "plain.png", tmp_path / "own.png"
    assert main(["figure", "size", "--rows", str(folder), "--out", str(plain)]) == 0
    assert main(["figure", "size", "--rows", str(folder), "--out", str(own), "--style", str(style)]) == 0
    assert own.stat().st_size < plain.stat().st_size
    other = tmp_path / "other"
    append_rows(other / "records.jsonl", make_rows(dataset="other images"))
    assert main(["figure", "size", "--rows", str(other), str(folder), "--out", str(plain)]) == 0
    assert "rows of other models or images are not in it" in capsys.readouterr().out


def test_a_figure_of_some_models_under_names_of_ones_own(folder, tmp_path, capsys):
    usual = ["figure", "size", "--rows", str(folder), "--out", str(tmp_path / "x")]
    given = [
        "--format",
        "svg",
        "--width",
        "3.3",
        "--only",
        "UCT, 8 bits",
        "pruning",
        "--label",
        "uct=ours",
        "--no-title",
    ]
    assert main([*usual, *given]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert 'width="237.6pt"' in text  # 3.3 inches
    assert ">ours<" in text
    assert ">pruning<" in text
    assert "LSQ" not in text
    assert "accuracy against size" not in text
    assert set(pd.read_csv(tmp_path / "x.csv")["method"]) == {"baseline", "uct", "pruning"}


def test_a_figure_over_seeds_of_some_methods(tmp_path):
    append_rows(tmp_path / "records.jsonl", seeded())
    draw("ranks", load_records(tmp_path), tmp_path / "x.svg", only=["pruning"], names={"pruning": "ours"})
    assert set(pd.read_csv(tmp_path / "x.csv")["method"]) == {"baseline", "pruning"}
    assert ">ours<" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sizes"], "did you mean 'size'"),
        (["size", "--out", "x.jpg"], r".png, .svg, .pdf"),
        (["size", "--style", "none.mplstyle"], "no style file"),
        (["size", "--rows", "nowhere"], "no records at 'nowhere'"),
        (["size", "--width", "1"], "width = 1 inches; give 2.5 to 20"),
        (["size", "--only", "utc"], "unknown method or label 'utc' (did you mean 'uct'?); allowed: baseline"),
        (["size", "--label", "utc=ours"], "unknown method or label 'utc' (did you mean 'uct'?)"),
        (["size", "--label", "ours"], "is not OLD=NEW"),
        (["size", "--label", "uct=x", "lsq=x"], "would be called 'x'"),
        (["size", "--format", "pdf"], "ends in '.png' and --format is pdf"),
    ],
)
def test_wrong_input_to_figure(folder, tmp_path, capsys, given, message):
    usual = {"--rows": str(folder), "--out": str(tmp_path / "x.png")}
    for name, value in usual.items():
        given = [*given, *([] if name in given else [name, value])]
    assert main(["figure", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_a_style_file_of_nonsense_is_refused(folder, tmp_path):
    style = tmp_path / "own.mplstyle"
    style.write_text("font.size: large-ish\nno such thing\n")
    with pytest.raises(InputError, match="no matplotlib style file"):
        draw("size", load_records(folder), tmp_path / "x.png", style_file=style)


def in_another_backend(rows):
    """The rows, those of onnxruntime beside them, in which uct has no form, and floors."""
    for row in rows:
        yield row
        if not row.metric.startswith("latency"):
            continue
        there = row.context | {"backend": "onnxruntime", "artifact": row.method}
        if row.method == "uct":
            yield row.replace(context=there, status="skipped", value=None, error="no form of it", source="")
        else:
            yield row.replace(context=there)
            if row.metric == "latency_ratio":
                yield row.replace(context=there | {"versus_backend": "eager"}, value=0.25, low=0.2, high=0.3)
        if row.metric == "latency_p50":
            context = {"batch": row.context["batch"], "threads": 2, "artifact": row.method}
            yield row.replace(metric="latency_floor", value=0.5, context=context, samples=None)


def test_the_table_of_backends_has_both_baselines_the_reasons_and_the_floor(folder, tmp_path):
    rows = [*make_rows(), *make_rows(("baseline", "uct"))[6:]]
    rows = [row.replace(context=row.context | {"artifact": row.method}) for row in rows]
    append_rows(tmp_path / "more" / "records.jsonl", in_another_backend(rows))
    text = backend_table.backend_table(load_records(tmp_path / "more"))
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    assert lines["method"] == ["method", "MB", "G MACs", "eager", "onnxruntime", "floor, batch 1", "floor, batch 8"]
    assert lines["baseline"][3] == "1 / 1"
    assert lines["dynamic_int8"][3:5] == ["0.50 / 0.50", "0.25 / 0.25 (0.50 / 0.50)"]
    assert lines["dynamic_int8"][5] == "4.2 (eager)"
    assert lines["uct"][4] == "- [1]"
    assert "[1] no form of it" in text
