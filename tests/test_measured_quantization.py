"""The page's numbers on quantization are those of the reference rows."""

import pytest

from tests.conftest import ROOT
from tests.measured_words import MEASURED, WORDS, apart, times_of
from vitbench.comparison import accuracy_text, paired_loss, paired_rows, subject, value
from vitbench.row_table import load_records

REFERENCE = ROOT / "results" / "reference"
CIFAR, IMAGENET = REFERENCE / "quantization-cifar10", REFERENCE / "fewer-bits-imagenet-sample"
FOUR, SCRATCH = REFERENCE / "four-bits-imagenet-sample", REFERENCE / "diffq-scratch-cifar10"
BACKENDS = REFERENCE / "int8-backends-deit-small"
PEERS = REFERENCE / "int8-peers-imagenet-sample"


def name_of(method, config):
    """What was done, in the page's words, and its bits; None for what is not in its tables."""
    trained = config.get("train", {}).get("epochs")
    if method == "dynamic_int8":
        return "dynamic int8", "8"
    if method == "static_int8":
        usual = config["range"] == "mse" and config["equalise"] and config["compensation"]
        return ("static int8", "8") if usual else None
    if method == "weight_only":
        kind = "trained with the rounding (LSQ)" if trained else config["rounding"].replace("_", " ")
        kind += f", groups of {config['group']}" if config["group"] else ", a step a row"
        kind += ", fitted by block" if config["reconstruction"] else ""
        bits = "2 to 8" if config["target_bytes"] else str(config["bits"])
        return kind + (", bits by layer" if config["target_bytes"] else ""), bits
    if method == "lsq":
        how = "trained (LSQ)" if trained else "nearest"
        return f"weights and inputs, {how}", f"{config['weight_bits']} / {config['activation_bits']}"
    if method == "diffq":
        return "learned bits (DiffQ)", f"{config['bits']:g} on average"
    if method == "simulated_integer":
        bits = " / ".join(str(config[f"{what}_bits"]) for what in ("weight", "activation", "attention"))
        weights = ", second order" if config["rounding"] == "second_order" else ""
        return f"simulated integers, norms {config['norms']}, softmax {config['softmax']}{weights}", bits
    return None


def models(folder):
    """(what was done, bits, label) of each quantized model whose accuracy was measured in eager mode."""
    rows = subject(load_records(folder))
    found = {}
    for row in rows[(rows["metric"] == "top1") & rows["backend"].isna()].itertuples():
        steps = row.config["methods"]
        name = name_of(row.method, steps[0]["config"]) if len(steps) == 1 else None
        if name:
            found.setdefault(name, row.label)
    return rows, [(*name, label) for name, label in found.items()]


def lines(folder):
    """A line for each model: bits, MB, top-1, how far it is from fp32, and its time in eager mode where it was timed."""
    rows, found = models(folder)
    dense = value(rows, "baseline", "top1")
    for kind, bits, label in found:
        top1, size = value(rows, label, "top1"), value(rows, label, "bytes")
        cells = f"{accuracy_text(top1)} | {apart(top1, dense)} | {times_of(rows, label)}"
        yield f"| {kind} | {bits} | {size['value'] / 1e6:.2f} | {cells} |"


@pytest.mark.parametrize(("folder", "least"), [(CIFAR, 17), (IMAGENET, 24)], ids=["cifar10", "imagenet-sample"])
def test_the_tables_are_the_reference_rows(folder, least):
    found, text = list(lines(folder)), MEASURED
    assert len(found) >= least
    for line in found:
        assert line in text


def gains(folder, group, bits):
    """What the second order adds to the nearest codes, and fitting by block to that, as results/measured.md says it."""
    rows, found = models(folder)
    top1 = {(kind, own): value(rows, label, "top1") for kind, own, label in found}
    second = f"second order, groups of {group}"
    steps = [f"nearest, groups of {group}", second, f"{second}, fitted by block"]
    return [apart(top1[after, bits], top1[before, bits]) for before, after in zip(steps, steps[1:])]


def in_backends(folder):
    """(method, backend) -> time over eager fp32's at batch 1 and 8, as results/measured.md says it."""
    rows, found = subject(load_records(folder)), {}
    for pair in (("dynamic_int8", "onnxruntime"), ("static_int8", "onnxruntime"), ("static_int8", "openvino")):
        own = [value(rows, pair[0], "latency_ratio", batch, pair[1], versus="eager")["value"] for batch in (1, 8)]
        found[pair] = "{:.2f} and {:.2f}".format(*own)
    return found


def test_the_times_in_backends_are_the_reference_rows():
    for (method, backend), times in in_backends(IMAGENET).items():
        assert times in WORDS, (method, backend)


@pytest.mark.parametrize("bits", ["4", "3", "2"])
def test_the_gains_of_groups_of_64_are_the_reference_rows(bits):
    for gained in gains(IMAGENET, 64, bits):
        assert f"{gained} at {bits}" in WORDS


def test_what_cross_entropy_tells_apart_at_4_bits():
    """The second order against nearest, image by image, with groups of 32 and of 64."""
    rows, found = models(FOUR)
    label = {kind: own for kind, _, own in found}
    for group in (32, 64):
        pair = (label[f"{kind}, groups of {group}"] for kind in ("second order", "nearest"))
        test = paired_loss(rows, *pair)
        assert (test.high < 0) == (group == 32), "the page says which of them is told apart"
        text = (
            f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}] (p = {test.p:.2g}) nats with groups of {group}"
        )
        assert text in WORDS


def test_static_int8_with_attention_is_the_reference_rows():
    rows = subject(load_records(FOUR))
    label, dense = "static_int8", value(rows, "baseline", "top1")
    times = [value(rows, label, "latency_ratio", batch, "openvino", versus="eager")["value"] for batch in (1, 8)]
    top1 = [value(rows, label, "top1", backend=backend)["value"] for backend in ("eager", "openvino")]
    assert "it takes {:.2f} and {:.2f} there".format(*times) in WORDS
    assert f"scores {100 * top1[0]:.2f} % ({100 * top1[1]:.2f} % there)" in WORDS
    assert f"{apart(value(rows, label, 'top1'), dense)} points from fp32" in WORDS


def test_diffq_from_scratch_is_the_reference_rows():
    rows = load_records(SCRATCH)
    rows = rows[(rows["status"] == "ok") & rows["backend"].isna()]
    for method, text in (
        ("baseline", "{:.2f} % in fp32 ({:.2f} MB)"),
        ("diffq", "{:.2f} % with learned bits, 3 on average ({:.2f} MB)"),
    ):
        own = rows[rows["method"] == method].set_index("metric")["value"]
        assert text.format(100 * own["top1"], own["bytes"] / 1e6) in WORDS
    top1 = rows[rows["metric"] == "top1"].set_index("method")
    assert f"{apart(top1.loc['diffq'], top1.loc['baseline'])} points" in WORDS


def test_what_training_is_worth_is_the_reference_rows():
    rows, found = models(CIFAR)
    top1 = {(kind, bits): value(rows, label, "top1") for kind, bits, label in found}
    pairs = [
        (("trained with the rounding (LSQ), a step a row", "4"), ("nearest, a step a row", "4")),
        (("weights and inputs, trained (LSQ)", "4 / 4"), ("weights and inputs, nearest", "4 / 4")),
        (("learned bits (DiffQ)", "3 on average"), ("trained with the rounding (LSQ), a step a row", "3")),
        (("second order, groups of 32", "2"), ("nearest, groups of 32", "2")),
        (("second order, groups of 32, fitted by block", "2"), ("second order, groups of 32", "2")),
        (("second order, groups of 32", "4"), ("nearest, groups of 32", "4")),
        (("second order, groups of 32, fitted by block", "4"), ("second order, groups of 32", "4")),
    ]
    for first, second in pairs:
        assert apart(top1[first], top1[second]) in WORDS, (first, second)
    dense = value(rows, "baseline", "top1")["value"]
    for trained, rounded in pairs[:2]:
        lost = [f"{100 * (dense - top1[name]['value']):.2f}" for name in (rounded, trained)]
        assert f"from {lost[0]} to {lost[1]}" in WORDS


def backend_lines():
    """A line for each variant: file, backend, MB, and time over eager fp32's at batch 1 and 8."""
    rows = load_records(BACKENDS)
    rows = rows[rows["status"] == "ok"]
    timed = rows[rows["metric"] == "latency_ratio"]
    timed, sizes = (part.assign(file=part.apply(_file, axis=1)) for part in (timed, rows[rows["metric"] == "bytes"]))
    for (file, backend), own in timed.groupby(["file", "backend"], sort=False):
        size = sizes[sizes["file"] == file]["value"].iloc[-1]
        cells = [f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in own.sort_values("batch").itertuples()]
        yield f"| {file} | {backend} | {size / 1e6:.1f} | {' | '.join(cells)} |"


def _file(row):
    attention = any(step["config"].get("attention") for step in row["config"]["methods"])
    return row["method"] + (", attention too" if attention else "")


def test_the_backends_are_the_reference_rows():
    found, text = list(backend_lines()), MEASURED
    assert len(found) >= 6
    for line in found:
        assert line in text


PAIRS = [  # a peer and where it runs; ours of the same kind and where it runs
    ("peer_nncf", "openvino", "static_int8", "openvino"),
    ("peer_onnxruntime_static", "onnxruntime", "static_int8", "onnxruntime"),
    ("peer_pt2e", "inductor", "static_int8", "openvino"),
    ("peer_onnxruntime_dynamic", "onnxruntime", "dynamic_int8", "onnxruntime"),
    ("peer_torch_dynamic", "eager", "dynamic_int8", "eager"),
    ("peer_torchao_dynamic", "inductor", "dynamic_int8", "eager"),
]


def peer_pairs():
    """For each peer: its name and where it runs, rows of its top-1 and bytes, and the same of ours."""
    rows = load_records(PEERS)
    rows = rows[rows["status"] == "ok"].assign(file=lambda every: every.apply(_file, axis=1))

    def found(file, backend, metric):
        own = rows[(rows["file"] == file) & (rows["metric"] == metric)]
        here = own[own["backend"] == backend]
        return (here if len(here) else own[own["backend"].isna()]).iloc[-1]

    for *theirs, method, here in PAIRS:
        yield [
            [f"{name} ({there})", *(found(name, there, what) for what in ("top1", "bytes"))]
            for name, there in (theirs, (method, here))
        ]


def peer_lines():
    """A line for each peer: its MB and top-1, ours, and ours over it by the paired test on the same images."""
    for theirs, ours in peer_pairs():
        cells = [f"{name} | {size['value'] / 1e6:.2f} | {accuracy_text(top1)}" for name, top1, size in (theirs, ours)]
        yield f"| {' | '.join(cells)} | {apart(ours[1], theirs[1])} |"


@pytest.mark.parametrize("line", list(peer_lines()))
def test_ours_and_others_int8_on_the_same_images(line):
    assert line in MEASURED


def test_what_is_said_of_the_pairs():
    pairs = list(peer_pairs())
    tests = [paired_rows(ours[1], theirs[1]) for theirs, ours in pairs]
    assert all(test.difference < 0 for test in tests), "the page says that ours is the lower one"
    assert f"every p is at least {min(test.p for test in tests):.2f}" in WORDS
    assert f"by up to {-100 * min(test.difference for test in tests):.2f} points" in WORDS
    larger = [ours[2]["value"] / theirs[2]["value"] for theirs, ours in pairs if "pt2e" not in theirs[0]]
    assert f"{100 * min(larger) - 100:.0f} to {100 * max(larger) - 100:.0f} % larger" in WORDS
