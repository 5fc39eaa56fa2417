"""What the pages say of devices are the rows' numbers."""

import math
import statistics

import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.measured_words import MEASURED, WORDS
from vitbench.comparison import MEGA, methods, subject, value
from vitbench.edge import backend_table
from vitbench.row_table import load_records
from vitbench.statistics import quiet_ratio

README = " ".join((ROOT / "README.md").read_text().split())
REFERENCE = ROOT / "results" / "reference"
SHAPES = ("tiny", "small", "base")


def lines():
    """One line a method: for each shape MB on disk, multiply-accumulates (G), and time at batch 1 and 8 in eager."""
    rows = {shape: subject(load_records(REFERENCE / f"edge-deit-{shape}")) for shape in SHAPES}
    for method in methods(rows["tiny"]):
        cells = []
        for own in rows.values():
            size, macs = value(own, method, "bytes")["value"] / MEGA, value(own, method, "macs")["value"] / 1e9
            times = [value(own, method, "latency_ratio", batch)["value"] for batch in (1, 8)]
            cells.append(
                f"{size:.1f} | {macs:.2f} | " + ("1 / 1" if method == "baseline" else "{:.2f} / {:.2f}".format(*times))
            )
        yield f"| {method} | {' | '.join(cells)} |"


@pytest.mark.parametrize("line", list(lines()))
def test_the_table_of_shapes(line):
    assert line in MEASURED


def test_memory_with_and_without_pytorch():
    rows = load_records(REFERENCE / "edge-bundle-deit-tiny").set_index(["method", "metric"])["value"] / MEGA
    peak, floor = rows["dynamic_int8", "peak_rss"], rows["dynamic_int8", "import_rss"]
    eager = value(subject(load_records(REFERENCE / "edge-deit-tiny")), "dynamic_int8", "peak_rss")["value"] / MEGA
    assert f"took {peak:.0f} MB at the peak in a bundle's process, of which {floor:.0f} are" in README
    assert f"a process with PyTorch took {eager:.0f}" in README


def test_memory_under_a_real_limit():
    rows = load_records(REFERENCE / "edge-limit-deit-tiny").set_index(["method", "metric"])
    assert rows.loc[("dynamic_int8", "answers_within"), "value"] == 1
    within = rows.loc[("dynamic_int8", "answers_within"), "context"]["limit"] / MEGA
    least, dense = (rows.loc[(method, "memory_limit"), "value"] / MEGA for method in ("dynamic_int8", "baseline"))
    assert f"it answers in {within:.0f} MB, and down to {least:.0f} (fp32: {dense:.0f};" in README


def paper_ratios():
    """The dense model's cost over the small one's on a Raspberry Pi 5, by where its weights are and the link: time, board, operations."""
    rows = subject(load_records(REFERENCE / "edge-paper-deit-base"))
    rows = rows[rows["metric"].isin(["edge_time", "edge_energy"])]
    about = pd.DataFrame(list(rows["context"]), index=rows.index)[["profile", "link", "memory", "storage", "energy"]]
    rows = rows[["label", "metric", "value"]].join(about).fillna({"memory": -1.0, "storage": -1.0})
    rows = rows[rows["profile"] == "raspberry_pi_5"]
    wide = rows.pivot_table(index=["memory", "storage", "link", "metric", "energy"], columns="label", values="value")
    return (wide["baseline"] / wide["uct"]).to_dict()


def short(ratio):
    return "-" if ratio is None else f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def paper_lines():
    ratios = paper_ratios()
    cases = [
        ("in memory, as the small one's", -1.0, -1.0, "ethernet"),
        ("on its microSD card, read every time", 1e8, -1.0, "ethernet"),
    ]
    cases += [
        (f"fetched every time, {link}", 1e8, 0.0, link) for link in ("ethernet", "wifi", "lte", "wifi_slow", "ble")
    ]
    for name, memory, storage, link in cases:
        kinds = (("edge_time", "board"), ("edge_energy", "board"), ("edge_energy", "operations"))
        found = [ratios.get((memory, storage, link, *kind)) for kind in kinds]
        yield f"| {name} | {' | '.join(map(short, found))} |"


@pytest.mark.parametrize("line", list(paper_lines()))
def test_the_papers_setting(line):
    assert line in MEASURED


def test_the_papers_setting_in_words():
    rows = subject(load_records(REFERENCE / "edge-paper-deit-base"))
    dense, small = (value(rows, label, "bytes")["value"] for label in ("baseline", "uct"))
    assert f"{small / 1e6:.1f} MB against {dense / 1e6:.1f}, {dense / small:.1f} times smaller" in WORDS
    share = value(rows, "uct", "macs")["value"] / value(rows, "baseline", "macs")["value"]
    assert f"{share:.2f} of the multiply-accumulates" in WORDS
    assert f"{paper_ratios()[1e8, 0.0, 'wifi', 'edge_time', 'board']:.0f} times over Wi-Fi" in WORDS


def shape_rows(shape):
    return load_records(REFERENCE / f"edge-deit-{shape}")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tables_of_all_backends_are_the_rows(shape):
    assert (REFERENCE / f"edge-deit-{shape}" / "table.md").read_text() == backend_table.table(shape_rows(shape))


def distance_lines():
    """One line a backend and what is allowed there: how many models, and the largest distance of their logits from eager's."""
    rows = pd.concat([shape_rows(shape) for shape in SHAPES])
    rows = rows[(rows["metric"] == "logit_distance") & (rows["status"] == "ok")]
    allowed = rows["source"].str.extract(r"; ([\d.]+) is allowed$")[0].astype(float)
    assert (rows["value"] <= allowed).all()
    for (backend, limit), found in rows.groupby(["backend", allowed]):
        yield f"| {backend} | {limit:g} | {len(found)} | {found['value'].max():.1e} |"


@pytest.mark.parametrize("line", list(distance_lines()))
def test_no_backend_is_further_from_eager_than_it_may(line):
    assert line in MEASURED


def executorch_lines():
    """One line a model that ExecuTorch can run: its time over eager fp32's and over fp32's in ExecuTorch, at batch 1 and 8."""
    rows = subject(load_records(REFERENCE / "edge-executorch-deit-tiny"))
    for method in methods(rows):
        eager, own = (
            [value(rows, method, "latency_ratio", batch, "executorch", versus) for batch in (1, 8)]
            for versus in ("eager", "")
        )
        over_eager = " / ".join(f"{row['value']:.2f}" for row in eager)
        over_own = "1 / 1" if method == "baseline" else " / ".join(f"{row['value']:.2f}" for row in own)
        yield f"| {method} | {over_eager} | {over_own} |"


@pytest.mark.parametrize("line", list(executorch_lines()))
def test_executorch(line):
    assert line in MEASURED


def test_how_far_executorch_is_from_eager():
    rows = load_records(REFERENCE / "edge-executorch-deit-tiny")
    apart = rows["value"][(rows["metric"] == "logit_distance") & (rows["status"] == "ok")]
    assert f"logits within {math.ceil(1e6 * apart.max())}e-6 of eager's" in WORDS


def floor_lines():
    """One line a shape and batch size: the fastest backend's time over the floor, of fp32 and of all models, and the products."""
    for shape in SHAPES:
        rows = subject(shape_rows(shape))
        for batch in (1, 8):
            found = {name: backend_table.fastest(rows, name, batch) for name in methods(rows)}
            best, least = found["baseline"], value(rows, "baseline", "latency_floor", batch)["value"]
            products = value(rows, "baseline", "products_time", batch)["value"] / least
            worst = max(found, key=lambda name: found[name][1])
            middle = statistics.median(factor for _, factor in found.values())
            yield (
                f"| DeiT-{shape.title()} | {batch} | {best[1]:.2f} ({best[0]}) | {products:.2f} | {middle:.2f} "
                f"| {found[worst][1]:.2f} ({worst}) |"
            )


@pytest.mark.parametrize("line", list(floor_lines()))
def test_how_far_from_the_floor(line):
    assert line in MEASURED


def timed_twice(runs):
    """For each comparison of the two runs: by how much their ratios differ, over all rounds and over the quietest quarter."""
    found = []
    for name in ("first", "again"):
        rows = subject(load_records(REFERENCE / f"{runs}-{name}")).fillna({"versus_backend": "same"})
        rows = rows[rows["method"] != "baseline"]
        own = rows[rows["metric"] == "latency_p50"].set_index(["method", "backend", "batch"])["samples"]
        keys, ratios = ["method", "backend", "batch", "versus_backend"], rows[rows["metric"] == "latency_ratio"]
        values = {}
        for row in ratios.itertuples():
            times = own.loc[(row.method, row.backend, row.batch)], row.samples
            values[tuple(getattr(row, key) for key in keys)] = (
                statistics.median(x / y for x, y in zip(*times, strict=True)),
                quiet_ratio(*times)[0],
            )
        found.append(pd.DataFrame(values, index=["all", "quiet"]).T)
    return (found[1] / found[0] - 1).abs()


def dense_times(run, backend, batch):
    """Medians of eager fp32 in the race of a backend, ms, one for each process."""
    rows = load_records(REFERENCE / run).fillna({"versus_backend": "eager"})
    rows = rows[(rows["metric"] == "latency_ratio") & (rows["backend"] == backend) & (rows["batch"] == batch)]
    rows = rows[rows["versus_backend"] == "eager"]
    times, starts = rows["samples"].iloc[-1], rows["context"].iloc[-1]["starts"]
    each = len(times) // starts
    return [statistics.median(times[k : k + each]) for k in range(0, len(times), each)]


def says_how_near(apart):
    """The page's words on how far two runs of a comparison are from each other."""
    within, quiet = (apart <= 0.1).sum(), apart["quiet"]
    return (
        f"{within['quiet']} of {len(apart)} ratios are within 10 % of each other, half of them within {100 * quiet.median():.1f} %, "
        f"the furthest {100 * quiet.max():.1f} % apart (over all rounds {within['all']}, {100 * apart['all'].max():.0f} %)"
    )


def test_the_same_comparison_twice():
    one, two = timed_twice("edge-deit-tiny-one-thread"), timed_twice("edge-deit-tiny")
    assert f"With one thread (`edge-deit-tiny-one-thread-first`, `-again`) {says_how_near(one)}" in WORDS
    assert f"With two (`edge-deit-tiny-first`, `-again`) {says_how_near(two)}" in WORDS
    quiet = two["quiet"]
    assert {key[1:3] for key in quiet.index[quiet > 0.1]} == {("onnxruntime", 1)}
    eager = quiet[quiet.index.get_level_values(1) == "eager"]
    assert (
        f"those of eager mode, {len(eager)} of the 48, are within {100 * eager.max():.0f} % with two threads" in WORDS
    )
    slow, fast = (dense_times(f"edge-deit-tiny-{name}", "onnxruntime", 1) for name in ("first", "again"))
    assert (
        f"eager fp32 took {min(slow):.0f} to {max(slow):.0f} ms in the first run and {min(fast):.0f} to {max(fast):.0f} in the second"
        in WORDS
    )


def cores_near_and_far():
    """One line a model, backend and number of threads: its time and its ratio to eager fp32, where cores are near and far."""
    rows = load_records(REFERENCE / "edge-core-distance")
    rows = rows[rows["metric"] != "core_journey"]
    rows = rows.join(pd.DataFrame(list(rows["context"]), index=rows.index)[["cores"]])
    for (method, backend, threads), own in rows.groupby(["method", "backend", "threads"]):
        found = own.set_index(["cores", "metric"])["value"]
        times = [f"{found[place, 'latency_p50']:.1f}" for place in ("near", "far")]
        ratios = [f"{found[place, 'latency_ratio']:.2f}" for place in ("near", "far")]
        yield f"| {method} | {backend} | {threads:.0f} | {' / '.join(times)} | {' / '.join(ratios)} |"


@pytest.mark.parametrize("line", list(cores_near_and_far()))
def test_what_the_distance_of_the_cores_changes(line):
    assert line in MEASURED


def test_how_far_apart_the_cores_were():
    rows = load_records(REFERENCE / "edge-core-distance")
    rows = rows[rows["metric"] == "core_journey"]
    found = {row.context["cores"]: row for row in rows.itertuples()}
    near, far = found["near"], found["far"]
    assert (
        f"{near.value:.0f} ns where the two are near ({len(near.samples)} rounds), {far.value:.0f} where they are far"
        in WORDS
    )
    assert f"({len(far.samples)} rounds)" in WORDS


def test_the_same_comparison_twice_where_memory_was_given_back():
    apart = timed_twice("edge-deit-tiny-faults")
    dense = [time for name in ("first", "again") for time in dense_times(f"edge-deit-tiny-faults-{name}", "eager", 8)]
    near, quiet = (apart <= 0.1).sum(), apart["quiet"]
    assert (
        f"{near['quiet']} of 48 were within 10 % ({near['all']} over all rounds), the furthest {100 * quiet.max():.0f} % apart"
        in WORDS
    )
    assert f"eager fp32 took {min(dense):.0f} ms in one process and {max(dense):.0f} in another" in WORDS
    assert {key[1:3] for key in quiet.index[quiet > 0.1]} == {("eager", 8)}


def test_a_longer_comparison_twice():
    quiet = timed_twice("edge-deit-tiny-longer")["quiet"]
    assert (
        f"{(quiet <= 0.1).sum()} of {len(quiet)} are within 10 %, the furthest {100 * quiet.max():.0f} % apart" in WORDS
    )
    assert {key[1:3] for key in quiet.index[quiet > 0.1]} == {("eager", 1)}
