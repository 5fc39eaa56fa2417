"""Settings are plain data: what a YAML or JSON file may hold, how large it may become, and what the error says."""

import time
from datetime import date

import pytest

from tests.conftest import ROOT
from vitbench.base import configs
from vitbench.base.errors import InputError
from vitbench.cli import main
from vitbench.edge.model import load_profiles
from vitbench.run.lessons import find_lessons, parse_setting, read_profile

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
LADDER = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [[[[*a{i - 1}]]]]\n" for i in range(1, 30))
REFUSED = {  # a YAML text, and what the error says of it
    "bytes": ("train: !!binary aGVsbG8=", "line 1, column 8: a value has the type 'binary'"),
    "a set": ("train:\n  mixup: !!set {x: null}", "line 2, column 10: a value has the type 'set'"),
    "a date with its tag": ("model: !!timestamp 2024-01-01", "a value has the type 'timestamp'"),
    "an object": ("model: !!python/object/apply:os.getcwd []", "a value has the type 'python/object/apply:os.getcwd'"),
    "a tag of one's own": ("model: !colour red", "a value has the type '!colour'"),
    "pairs": ("model: !!pairs [a: 1]", "a value has the type 'pairs'"),
    "a number as a key": ("train: {7: 1}", "line 1, column 9: the key '7' is not text"),
    "bytes as an inner key": ("train:\n  !!binary aGk=: 1", "line 2, column 3: a value has the type 'binary'"),
    "true as a key": ("yes: 1", "the key 'yes' is not text; write it in quotes"),
    "a list as a key": ("? [a]\n: 1", "the key a list or mapping is not text"),
    "a key twice": ("rounds: 3\nthreads: 1\nrounds: 4", "line 3, column 1: the key 'rounds' is repeated"),
    "an inner key twice": ("train: {seed: 1, seed: 2}", "the key 'seed' is repeated"),
    "not a number": ("keep: .nan", "'.nan' is not a finite number"),
    "infinity": ("keep: -.inf", "'-.inf' is not a finite number"),
    "a number without an end": ("keep: 1e999", "'1e999' is not a finite number"),
    "digits without an end": ("rounds: " + "9" * 5000, "is not a valid int"),
    "half a character": ('model: "\\ud800"', "has a lone surrogate"),
    "aliases that multiply": (LAUGHS, "more than 20,000 values"),
    "aliases that nest": (LADDER, "values are nested more than 40 deep"),
    "an alias in itself": ("model: &x [*x]", "the alias *x refers to a value that contains it"),
    "an alias of nothing": ("model: *x", "not valid YAML (found undefined alias"),
    "brackets without an end": ("[" * 100_000, "values are nested more than 40 deep"),
    "many values": ("x: [" + "1, " * 30_000 + "1]", "more than 20,000 values"),
    "many letters": ("model: " + "x" * 500_000, "at most 400,000 are allowed"),
    "two documents": ("a: 1\n---\na: 2", "not valid YAML"),
    "a broken line": ("train: {epochs: 3\nrounds: 4", "line 2, column 7: not valid YAML"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_data_is_refused_in_one_line(kind):
    text, message = REFUSED[kind]
    start = time.monotonic()
    with pytest.raises(InputError) as refused:
        configs.yaml_value(text, "profile 'mine.yaml'")
    said = str(refused.value)
    assert said.startswith("profile 'mine.yaml'"), said
    assert message in said
    assert "\n" not in said
    assert len(said) < 400
    assert time.monotonic() - start < 5, "it took long to refuse"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("{a: ~, b: , c: null}", {"a": None, "b": None, "c": None}),
        ("[true, False, yes, off]", [True, False, True, False]),
        ("[0, -3, +4, 1_000, 0x10]", [0, -3, 4, 1000, 16]),
        ("[1.5, .5, 1., -2.5e-3, 1e-3, 3E4]", [1.5, 0.5, 1.0, -0.0025, 0.001, 30000.0]),
        ("[2024-01-01, 010, 1:30, ., 1.2.3]", ["2024-01-01", "010", "1:30", ".", "1.2.3"]),
        ("{a: &x {b: 1}, c: *x}", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1, d: 2}\nc: {<<: *x, b: 3}", {"a": {"b": 1, "d": 2}, "c": {"b": 3, "d": 2}}),
        ('"ä 漢"', "ä 漢"),
    ],
)
def test_plain_data_is_read_as_it_is_meant(text, value):
    assert configs.yaml_value(text, "a text") == value


def test_every_file_of_settings_of_the_project_is_plain():
    for file in (*(ROOT / "notebooks" / "profiles").glob("*.yaml"), *(ROOT / "benchmarks").glob("*.yaml")):
        assert isinstance(configs.read_yaml(file, "settings"), dict), file
    assert load_profiles().devices


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', "[NaN]", "[-Infinity]", "[1e999]", '["\\ud800"]', "[" * 100_000, "{", b"\xff\xfe"]
)
def test_json_has_the_same_rules(text):
    with pytest.raises(InputError, match="^the manifest") as refused:
        configs.json_value(text, "the manifest")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [
        date(2024, 1, 1),
        b"x",
        {1, 2},
        {"a": [b"x"]},
        {1: 2},
        {"a": {(1,): 2}},
        float("nan"),
        [float("inf")],
        object(),
        {"\ud800": 1},
    ],
)
def test_values_of_other_kinds_never_reach_a_notebook(value):
    with pytest.raises(InputError, match="^the parameters: "):
        configs.check_plain_data({"train": value}, "the parameters")


def test_a_mapping_that_holds_itself_is_refused():
    value = {}
    value["a"] = value
    with pytest.raises(InputError, match="deep"):
        configs.check_plain_data(value, "the parameters")


@pytest.mark.parametrize("content", [b"model: \xff\xfe\n", b"\x00", b"model: !!binary aGk=\n", b"- 1\n"])
def test_a_bad_profile_sweep_or_device_file_gives_one_line(content, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    out = ["--out", str(tmp_path / "out")]
    commands = [["run", str(file), *out], ["edge", str(tmp_path / "rows"), "--profiles", str(file)]]
    for command in commands:
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "mine.yaml" in line
    assert not (tmp_path / "out").exists()


def test_settings_on_the_command_line_go_through_the_same_check():
    for given in ("a=!!binary aGk=", "a=.nan", "a={1: 2}", "a=" + "[" * 100):
        with pytest.raises(InputError, match="^setting a"):
            parse_setting(given)
    assert parse_setting("a=1e-3") == ("a", 0.001)
    assert parse_setting("a=2024-01-01") == ("a", "2024-01-01")


def test_a_profile_cannot_name_what_pip_installs():
    with pytest.raises(InputError, match="unknown parameter 'install'"):
        read_profile("quick", ["install=vitbench; touch harmed"], find_lessons())
