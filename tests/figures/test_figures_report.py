"""Tables, figures and the report are made of rows alone."""

import re
import warnings
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from tests.conftest import ROOT
from vitbench.base.errors import InputError
from vitbench.figures import drawing, one_model
from vitbench.figures.accuracy_cost import COSTS, small_multiples, tradeoff
from vitbench.figures.layout import page
from vitbench.figures.report import write_report
from vitbench.rows.comparison_table import (
    comparison,
    label_of,
    progress_table,
    summary_sentences,
)
from vitbench.rows.experiment import Experiment, across_seeds
from vitbench.rows.records import Row, append_rows
from vitbench.rows.row_table import load_records
from vitbench.rows.statistics import compare_hits, pack_hits
from vitbench.rows.words import display_labels, method_name


def make_rows(methods=("baseline", "dynamic_int8"), top1=(0.97, 0.96), size=(800_000, 240_000), **about):
    rows = []
    for i, method in enumerate(methods):
        steps = [] if method == "baseline" else [{"method": method, "config": {"bits": 8}}]
        facts = {"model": "vit", "dataset": "digits", "data_fingerprint": "f", "method": method}
        facts |= {"config": {"origin": {"start": "random"}, "methods": steps}, "source": "measured: test", **about}
        test = {"split": "test", "images": 359, "cut": "given"}
        rows += [
            Row(
                **facts,
                metric="top1",
                value=top1[i],
                low=top1[i] - 0.02,
                high=top1[i] + 0.02,
                unit="fraction",
                context=test,
            ),
            Row(**facts, metric="bytes", value=size[i], unit="bytes"),
            Row(**facts, metric="bytes_predicted", value=size[i] - 9000, unit="bytes"),
            Row(**facts, metric="macs", value=3.5e6, unit="MACs"),
        ]
        for batch in (1, 8):
            context = {"batch": batch, "threads": 2, "backend": "eager", "device": "cpu: test"}
            samples = [1.0 + 0.01 * n + i for n in range(20)]
            rows.append(Row(**facts, metric="latency_p50", value=1.1 + i, unit="ms", samples=samples, context=context))
            if i:
                context = {**context, "versus": "baseline"}
                ratio = {"value": 0.5, "low": 0.4, "high": 0.6, "samples": [2.0] * 20}
                rows.append(Row(**facts, metric="latency_ratio", unit="ratio", context=context, **ratio))
    return rows


@pytest.fixture
def folder(tmp_path):
    append_rows(tmp_path / "records.jsonl", make_rows())
    return tmp_path


def test_the_table_holds_the_rows_numbers(folder):
    table = comparison(load_records(folder))
    assert list(table.index) == ["baseline", "dynamic_int8"]
    line = table.loc["dynamic_int8"]
    assert (line["top1 %"], line["MB"], line["ratio b1"]) == (96.0, 0.24, 0.5)
    assert line["x smaller"] == pytest.approx(800 / 240)


def test_the_sentence_has_the_difference_on_the_same_images(tmp_path):
    rows = []
    for row in make_rows(top1=(0.9, 0.8)):
        right = np.arange(359) < (300 if row.method == "baseline" else 270)
        rows.append(row.replace(hits=pack_hits(right), value=float(right.mean())) if row.metric == "top1" else row)
    append_rows(tmp_path / "records.jsonl", rows)
    (sentence,) = summary_sentences(load_records(tmp_path))
    test = compare_hits(np.arange(359) < 270, np.arange(359) < 300)
    interval = f"-8.36 points [{100 * test.low:+.2f}, {100 * test.high:+.2f}]"
    assert f"({interval} on the same 359 images, p = {test.p:.2g})" in sentence
    assert sentence.startswith("dynamic int8: 0.300 of the baseline's bytes")
    assert "overlap" not in sentence


def test_without_hits_the_sentence_says_whether_intervals_overlap(folder, tmp_path):
    (sentence,) = summary_sentences(load_records(folder))
    assert "0.300 of the baseline's bytes" in sentence
    assert "-1.00 points; the 95 % intervals overlap" in sentence
    append_rows(tmp_path / "far.jsonl", make_rows(top1=(0.97, 0.80)))
    assert "do not overlap" in summary_sentences(load_records(tmp_path / "far.jsonl"))[0]


def test_another_training_is_another_subject(folder):
    other = make_rows(methods=("baseline",))
    for row in other:
        changed = row.replace(config={"origin": {"start": "random", "train": {"epochs": 9}}, "methods": []})
        append_rows(folder / "records.jsonl", [changed])
    assert list(comparison(load_records(folder)).index) == ["baseline"]


def test_another_setting_is_named_by_what_differs_from_the_first(folder):
    for row in make_rows()[-5:]:
        steps = [{"method": "dynamic_int8", "config": {"bits": 4, "train": {"epochs": 3}}}]
        append_rows(folder / "records.jsonl", [row.replace(config={"origin": {"start": "random"}, "methods": steps})])
    rows = load_records(folder)
    assert list(comparison(rows).index) == ["baseline", "dynamic_int8", "dynamic_int8 (bits=4)"]
    assert label_of(rows, rows.tail(1)) == "dynamic_int8 (bits=4)"


def test_rows_that_have_labels_keep_them(folder):
    steps = [{"method": "dynamic_int8", "config": {"bits": bits}} for bits in (2, 3)]
    for step in steps:
        row = make_rows()[6].replace(config={"origin": {"start": "random"}, "methods": [step]})
        append_rows(folder / "records.jsonl", [row])
    rows = Experiment.of(load_records(folder)).rows
    last = rows[rows["label"] == "dynamic_int8 (bits=3)"]
    assert set(Experiment.of(last).rows["label"]) == {"dynamic_int8 (bits=3)"}


def test_what_was_not_timed_is_left_to_its_own_figures(folder):
    steps = [{"method": "dynamic_int8", "config": {"bits": 2}}]
    row = make_rows()[6].replace(config={"origin": {"start": "random"}, "methods": steps})
    append_rows(folder / "records.jsonl", [row])
    rows = load_records(folder)
    assert "dynamic_int8 (bits=2)" in set(Experiment.of(rows).rows["label"])
    assert list(comparison(rows).index) == ["baseline", "dynamic_int8"]


def seeded_rows(seed, top1):
    rows = []
    for row in make_rows(top1=top1):
        steps = [{**step, "config": {"bits": 8, "train": {"seed": seed}}} for step in row.config["methods"]]
        config = {"origin": {"train": {"seed": seed}}, "methods": steps}
        rows.append(row.replace(config=config, seed=seed))
    return rows


def test_seeds_are_put_side_by_side(tmp_path):
    for seed, top1 in ((0, (0.97, 0.96)), (1, (0.95, 0.96)), (2, (0.96, 0.95))):
        append_rows(tmp_path / "records.jsonl", seeded_rows(seed, top1))
    append_rows(tmp_path / "records.jsonl", seeded_rows(0, (0.5, 0.5)))  # the same again changes nothing
    table = across_seeds(load_records(tmp_path), "top1").pivot_table(index="seed", columns="label", values="value")
    assert table["baseline"].tolist() == [0.97, 0.95, 0.96]
    assert table["dynamic_int8"].tolist() == [0.96, 0.96, 0.95]


CLOSEUPS = {
    "training_curves": {"dynamic_int8": "ours"},
    "parts": {"baseline": "dense", "dynamic_int8": "ours"},
    "layer_errors": {"dynamic_int8": "ours"},
    "error_by_family": {"codes": ["dynamic_int8"]},
}


@pytest.mark.parametrize("name", CLOSEUPS)
def test_closeups_show_rows_under_the_names_given(folder, tmp_path, name):
    about = make_rows()[6]
    curve = {"value": 0.9, "samples": [0.5, 0.9], "context": {"steps_per_epoch": 10}, "unit": "fraction"}
    extra = [about.replace(metric="val_top1", low=None, high=None, **curve)]
    for method, part in ((make_rows()[0], "block weights"), (about, "block weights"), (about, "shared factors")):
        size = {"metric": "part_bytes", "value": 1000.0, "unit": "bytes", "context": {"part": part}}
        extra.append(method.replace(low=None, high=None, **size))
    layers = {"layers": ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"]}
    error = {
        "metric": "weight_error",
        "value": 0.1,
        "samples": [0.1, 0.2],
        "context": layers,
        "low": None,
        "high": None,
    }
    append_rows(folder / "records.jsonl", [*extra, about.replace(**error)])
    rows = load_records(folder)
    figure, shown = getattr(one_model, name)(rows, CLOSEUPS[name])
    drawing.save_figure(figure, tmp_path, name, shown)
    assert len(shown)
    assert set(shown["key"]) <= set(rows["key"])
    words = figure.axes[0].get_legend_handles_labels()[1] + [
        text.get_text() for text in figure.axes[0].get_yticklabels()
    ]
    assert {"ours", "codes"} & set(words)
    plt.close(figure)


@pytest.mark.parametrize("cost", COSTS)
def test_the_tradeoff_shows_rows_and_names_every_method(folder, cost):
    rows = load_records(folder)
    if cost == "energy":  # as much as there are bytes
        spent = rows[rows["metric"] == "bytes"].assign(metric="energy", source="estimated: a stated 4 W times a time")
        rows = pd.concat([rows, spent], ignore_index=True)
    figure, shown = tradeoff(rows, cost)
    assert ("energy estimated" in figure.get_supxlabel()) == (cost == "energy")
    words = {text.get_text() for text in figure.axes[0].texts}
    assert {"baseline", "dynamic int8"} <= words
    assert set(shown["metric"]) == {"top1", cost}
    assert "%" in figure.axes[0].get_ylabel()
    plt.close(figure)


def test_figures_are_the_same_files_again(folder, tmp_path):
    rows = load_records(folder)
    for make in (drawing.predicted_beside_measured, drawing.latencies, tradeoff):
        for attempt in ("a", "b"):
            figure, shown = make(rows)
            drawing.save_figure(figure, tmp_path / attempt, "x", shown)
            plt.close(figure)
        for kind in ("png", "svg", "csv"):
            assert (tmp_path / "a" / f"x.{kind}").read_bytes() == (tmp_path / "b" / f"x.{kind}").read_bytes()
    keys = set(pd.read_csv(tmp_path / "a" / "x.csv")["key"])
    assert keys <= set(rows["key"])


FAMILIES = ("uct", "pruning", "weight_only", "distillation+dynamic_int8", "nystroem")
SETTINGS = {"group": 8, "layers": ["qkv", "proj"], "rounding": "nearest", "train": {"epochs": 0}}


def rows_of(count):
    """Rows of so many methods, some with many settings; every tenth is far less accurate than the others."""
    rows = []
    for i in range(count):
        method = FAMILIES[i % len(FAMILIES)] if i else "baseline"
        top1 = 0.3 if i % 10 == 9 else 0.95 - 0.001 * (i % 7)
        own = SETTINGS if i < len(FAMILIES) else SETTINGS | {"group": i, "layers": ["qkv"], "rounding": "second_order"}
        steps = [{"method": method, "config": own}] if i else []
        made = make_rows(("baseline", method), (top1, top1), (800_000, 800_000 - 9_000 * i))
        made = made[6:] if i else make_rows(("baseline",))
        rows += [row.replace(config={"origin": {"start": "random"}, "methods": steps}) for row in made]
    return rows


def assert_readable(figure):
    """No text outside the figure or on another one."""
    figure.draw_without_rendering()
    # of an annotation the words alone, without the line to its point
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in drawn_texts(figure)]
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, box), (other, near) in combinations(boxes, 2):
        assert not box.overlaps(near), f"{one!r} is on {other!r}"


def drawn_texts(figure):
    """All texts but those of the ticks that an axis keeps beyond its limits."""
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            beyond |= set() if low <= tick.get_loc() <= high else {tick.label1, tick.label2}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in beyond]


@pytest.mark.parametrize("count", [1, 2, 8, *(pytest.param(count, marks=pytest.mark.slow) for count in (31, 60))])
@pytest.mark.parametrize("make", [drawing.predicted_beside_measured, drawing.latencies, tradeoff])
def test_figures_are_readable_with_few_methods_and_with_many(tmp_path, make, count):
    append_rows(tmp_path / "records.jsonl", rows_of(count))
    rows = load_records(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, _ = make(rows)
        assert_readable(figure)
    width, height = figure.get_size_inches()
    assert width < 13
    assert height < 5 + 0.3 * count
    plt.close(figure)


@pytest.mark.parametrize("count", [2, 8, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 31))])
@pytest.mark.parametrize("make", [drawing.predicted_beside_measured, drawing.latencies, tradeoff, small_multiples])
def test_figures_are_readable_in_one_column_of_a_paper(tmp_path, make, count):
    if make is small_multiples:
        count = max(2, count)  # a panel for each method needs one beside the baseline
    append_rows(tmp_path / "records.jsonl", rows_of(count))
    rows = load_records(tmp_path)
    with page(width=3.3):
        figure, _ = make(rows)
        assert_readable(figure)
    assert figure.get_size_inches()[0] == 3.3
    assert min(text.get_fontsize() for text in drawn_texts(figure)) >= 5.5
    plt.close(figure)


def test_a_list_names_every_method_and_the_tradeoff_of_many_its_front(tmp_path):
    append_rows(tmp_path / "records.jsonl", rows_of(31))
    rows = load_records(tmp_path)
    labels = set(Experiment.of(rows).rows["label"])
    figure, shown = drawing.latencies(rows)
    names = {" ".join(text.get_text().split()) for text in figure.axes[0].get_yticklabels()}
    assert labels == {"baseline", *shown["label"]}
    assert names == set(display_labels(rows).values())
    assert len(names) == len(labels)
    plt.close(figure)
    figure, shown = tradeoff(rows)
    assert "baseline" in {text.get_text() for text in figure.axes[0].texts}
    methods = {text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()}
    assert methods == {method_name(method) for method in ("baseline", *FAMILIES)}
    assert len(figure.axes[0].texts) < len(labels) == shown["label"].nunique()
    assert "points further down, at 30.0 %" in " ".join(text.get_text() for text in figure.texts)
    plt.close(figure)


def test_a_family_has_one_colour_and_a_method_one_marker_in_every_figure():
    few, many = ["uct", "weight_only"], ["baseline", "pruning", "lsq", "uct+lsq", "uct", "weight_only", "uct+diffq"]
    assert all(drawing.method_style(method, few) == drawing.method_style(method, many) for method in few)
    styles = {method: drawing.method_style(method, many) for method in many}
    assert styles["lsq"]["color"] == styles["weight_only"]["color"] != styles["uct"]["color"]
    assert styles["uct+lsq"]["color"] == styles["uct+diffq"]["color"]
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == len(many)
    other = [drawing.method_style(kind, ["neurons", "heads", "uct"])["color"] for kind in ("neurons", "heads")]
    assert len({*other, styles["uct"]["color"]}) == 3


# a matrix of Machado et al. (2009) for each full dichromacy, in linear RGB
DICHROMACIES = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


@pytest.mark.parametrize("kind", DICHROMACIES)
def test_families_can_be_told_apart_by_colour_blind_readers(kind):
    def lab(colour):
        red_green_blue = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        seen = np.clip(np.array(DICHROMACIES[kind]) @ ((red_green_blue + 0.055) / 1.055) ** 2.4, 0, 1)
        x, y, z = np.cbrt(np.array(XYZ) @ seen / [0.9505, 1, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    colours = combinations(drawing.FAMILY_COLOURS.values(), 2)
    assert min(np.linalg.norm(lab(one) - lab(other)) for one, other in colours) > 12


def test_colours_differ_in_lightness_too():
    def lightness(colour):
        r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.3 * r + 0.59 * g + 0.11 * b

    greys = [lightness(colour) for colour in drawing.COLOURS]
    assert all(abs(a - b) > 15 for a, b in zip(greys, greys[1:], strict=False))


def test_the_report_is_whole_in_itself(folder):
    page = write_report(folder).read_text()
    assert "0.24" in page
    assert page.count("<img") == 4
    assert not re.search(r'(src|href)="(https?:)?//', page)
    assert not list(folder.glob(".report*"))


def test_the_report_escapes_what_comes_from_data(tmp_path):
    append_rows(tmp_path / "records.jsonl", make_rows(dataset="<script>alert(1)</script>"))
    page = write_report(tmp_path).read_text()
    assert "&lt;script&gt;alert" in page
    assert "<script>alert" not in page


def test_failures_are_told(folder):
    failed = make_rows()[-1].replace(status="failed", value=None, error="no kernel", metric="energy")
    append_rows(folder / "records.jsonl", [failed])
    assert "no kernel" in write_report(folder).read_text()


def test_nothing_to_report(tmp_path):
    with pytest.raises(InputError, match="no records at"):
        write_report(tmp_path)
    failed = make_rows()[0].replace(status="failed", value=None, error="broken")
    append_rows(tmp_path / "records.jsonl", [failed])
    with pytest.raises(InputError, match="no ok row"):
        Experiment.of(load_records(tmp_path))


def test_a_model_timed_against_a_baseline_without_rows_of_its_own(tmp_path):
    append_rows(tmp_path / "records.jsonl", [row for row in make_rows() if row.method != "baseline"])
    _, shown = drawing.latencies(load_records(tmp_path))
    assert set(shown["method"]) == {"dynamic_int8"}
    assert "dynamic int8" in write_report(tmp_path).read_text()


def test_a_model_scored_in_eager_mode_and_timed_elsewhere_has_a_report(tmp_path):
    rows = [row for row in make_rows() if not (row.method == "baseline" and row.metric.startswith("latency"))]
    moved = [
        row.replace(context={**row.context, "backend": "openvino"}) if row.metric.startswith("latency") else row
        for row in rows
    ]
    append_rows(tmp_path / "records.jsonl", moved)
    page = write_report(tmp_path).read_text()
    assert "Accuracy against size on disk." in page
    assert "How long a call takes." not in page


def test_a_knob_draws_anew_where_it_is_turned():
    import matplotlib.pyplot as plt

    from vitbench.figures.sliders import figure_slider

    drawn, before = [], plt.get_fignums()

    def draw(value):
        drawn.append(value)
        figure, axes = plt.subplots(figsize=(2, 1))
        axes.plot([0, value])
        return figure

    slider, image = figure_slider(draw, "bits", 2, 8, start=3).children
    first = bytes(image.value)
    slider.value = 5
    assert drawn == [3, 5]
    assert first.startswith(b"\x89PNG")
    assert bytes(image.value).startswith(b"\x89PNG")
    assert bytes(image.value) != first
    assert plt.get_fignums() == before


def test_the_running_table_has_a_line_for_each_method_s_first_setting():
    rows = load_records(ROOT / "results" / "reference" / "digits-quick")
    table = progress_table(rows)
    assert table.index[0] == "baseline"
    experiment = Experiment.of(rows)
    timed = [method_name(method) for method in dict.fromkeys(label.split(" (")[0] for label in experiment.timed_labels)]
    words = {
        "weight-only quantization": "4-bit weights",
        "simulated integers": "simulated integers, ",
    }  # with their size
    assert len(table) == experiment.rows["method"].nunique()
    for shown, method in zip(table.index, timed, strict=False):
        assert shown.startswith(words.get(method, method))
    own = rows[rows["metric"] == "bytes"].drop_duplicates("method").set_index("method")["value"]
    assert table.loc["dynamic int8", "x smaller"] == round(own["baseline"] / own["dynamic_int8"], 2)
    assert table.loc["baseline", ["x smaller", "MACs", "time"]].tolist() == [1, 1, 1]
    assert "nan" not in table.loc["dynamic int8"].map(str).tolist()


def test_the_running_table_has_methods_that_were_not_timed_too():
    rows = load_records(ROOT / "results" / "reference" / "digits-quick")
    is_time = rows["metric"].str.startswith("latency") & (rows["method"] == "dynamic_int8")
    table = progress_table(rows[~is_time])
    assert "dynamic int8" in table.index
    assert table.loc["dynamic int8", "time"] == "-"
    assert table.loc["dynamic int8", "x smaller"] == progress_table(rows).loc["dynamic int8", "x smaller"]
