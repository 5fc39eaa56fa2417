"""The command line: help, the way from weights to a report, and one clear line for wrong input."""

import json
import os
import subprocess
import sys

import pytest
import torch

from vitbench import cli
from vitbench.model import artifact, vit
from vitbench.rows.records import read_rows


def run(*arguments, cwd=None):
    command = [sys.executable, "-m", "vitbench.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.mark.parametrize("command", [[], ["run"], ["list"], ["compress"], ["measure"], ["report"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: vitbench" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["nonsense"], ["list", "nonsense"]])
def test_python_m_answers_as_the_command_does(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # else the width of help is the terminal's, and the child has none
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    done = subprocess.run([sys.executable, "-m", "vitbench", *arguments], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (status, said.out, said.err)
    assert status == (0 if arguments == ["--help"] else 2)


@pytest.mark.slow
def test_list(capsys):
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    for word in ("01_baseline", "quick", "cifar10", "imagenet", "dynamic_int8", "per_channel=True"):
        assert word in said
    assert cli.main(["list", "models"]) == 0
    assert "deit_tiny_patch16_224" in capsys.readouterr().out


def test_help_does_not_wait_for_pytorch():
    code = "import sys; from vitbench import cli\ncommands = [['--help'], ['measure', '--help'], ['run', '--help']]\n"
    code += "for each in commands:\n  try: cli.main(each)\n  except SystemExit: pass\n"
    code += "sys.exit(str({'torch', 'pandas', 'timm'} & sys.modules.keys() or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "usage: vitbench run" in done.stdout
    assert not done.stderr.strip()


@pytest.mark.slow
def test_a_reader_who_has_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)  # before anything is written, so that it does not hang on who is faster
    command = [sys.executable, "-m", "vitbench.cli", "list", "methods"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_from_weights_to_a_report(tmp_path, capsys):
    state = vit.create_model("vit_mini_patch2_8", seed=3).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    base, small, out = tmp_path / "base", tmp_path / "small", tmp_path / "out with spaces é"
    assert (
        cli.main(["compress", "vit_mini_patch2_8", "--checkpoint", str(tmp_path / "weights.pth"), "--out", str(base)])
        == 0
    )
    made = ["--method", "dynamic_int8", "--set", "layers=[fc1, fc2]", "per_channel=false", "--out", str(small)]
    assert cli.main(["compress", str(base), *made]) == 0
    assert artifact.read_manifest(small).recipe.methods[0].config == {"layers": ["fc1", "fc2"], "per_channel": False}
    assert cli.main(["measure", str(base), "--out", str(out), "--rounds", "10", "--batches", "1"]) == 0
    timed = ["--versus", str(base), "--rounds", "10", "--batches", "1", "--out", str(out), "--dataset-name", "digits"]
    assert cli.main(["measure", str(small), *timed]) == 0
    assert {row.method for row in read_rows(out)} == {"baseline", "dynamic_int8"}
    assert cli.main(["report", str(out)]) == 0
    assert "of the baseline's bytes" in capsys.readouterr().out
    assert (out / "report.html").is_file()


def test_sizes_of_a_shape_need_no_weights(tmp_path, capsys):
    base, small = str(tmp_path / "base"), str(tmp_path / "small")
    assert cli.main(["compress", "vit_mini_patch2_8", "--random", "--out", base]) == 0
    uct = ["--method", "uct", "--set", "rank=20", "start=weights", "train.epochs=0", "--out", small]
    assert cli.main(["compress", base, *uct]) == 0
    out = ["--out", str(tmp_path / "out"), "--versus", base, "--what", "size", "weights"]
    assert cli.main(["measure", small, *out]) == 0
    metrics = {row.metric for row in read_rows(tmp_path / "out")}
    assert {"bytes", "macs", "weight_error"} <= metrics
    assert "top1" not in metrics


def refuse(tmp_path):
    """Commands that must be refused, and what the one line says."""
    empty = tmp_path / "no images"
    empty.mkdir()
    foreign = tmp_path / "foreign.pth"
    torch.save(vit.create_model("vit_mini_patch4_32").state_dict(), foreign)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "records.jsonl").write_text('{"schema_version": 1, "key"\n')
    file = tmp_path / "file"
    file.write_text("")
    out = ["--out", tmp_path / "out"]
    return {
        "profile": (
            ["run", "quik", *out],
            "unknown profile 'quik' (did you mean 'quick'?); allowed: cifar10, cifar10-224, cifar10-deit, digits, imagenet, imagenet-sample, photographs, quick",
        ),
        "notebook": (["run", "quick", "--only", "77", *out], "unknown notebook '77'"),
        "set key": (["run", "quick", "--set", "epochs=3", *out], "unknown parameter 'epochs'"),
        "set type": (["run", "quick", "--set", "rounds=lots", *out], "the notebooks declare it as int"),
        "set inner key": (["run", "quick", "--set", "train.epoch=3", *out], "unknown key 'epoch'"),
        "splits key": (["run", "quick", "--set", "splits.tset=3", *out], "did you mean 'test'"),
        "dataset": (["run", "quick", "--set", f"dataset={tmp_path}/nowhere", *out], "does not exist"),
        "no images": (["run", "quick", "--set", f"dataset={empty}", *out], "holds no images"),
        "model": (["run", "quick", "--set", "model=vit_minni_patch2_8", *out], "did you mean 'vit_mini_patch2_8'"),
        "checkpoint": (["run", "digits", "--set", f"checkpoint={foreign}", *out], "of another architecture"),
        "workers": (["run", "quick", "--workers", "0", *out], "--workers 0"),
        "out": (["run", "quick", "--out", file], "cannot be written"),
        "method": (["compress", tmp_path, "--method", "dynamic", *out], "unknown method 'dynamic'"),
        "method key": (
            ["compress", tmp_path, "--method", "dynamic_int8", "--set", "bits=4", *out],
            "unknown key 'bits'",
        ),
        "no weights": (
            ["compress", "vit_mini_patch2_8", "--method", "dynamic_int8", *out],
            "give --checkpoint, --pretrained or --random",
        ),
        "nested key": (
            ["compress", tmp_path, "--method", "uct", "--set", "train.epoch=4", *out],
            "unknown key 'epoch'",
        ),
        "value and nested": (
            ["compress", tmp_path, "--method", "uct", "--set", "train=4", "train.epochs=4", *out],
            "train was given a value of its own before",
        ),
        "whose setting": (
            ["compress", tmp_path, "--method", "uct", "dynamic_int8", "--set", "bits=4", *out],
            "give METHOD.KEY=VALUE",
        ),
        "no model": (["measure", tmp_path, *out], "not a saved model"),
        "torn records": (["report", torn], "line 1 of"),
        "no records": (["report", empty], "no records at"),
    }


CASES = [
    *("profile", "notebook", "set key", "set type", "set inner key", "splits key", "dataset", "no images", "model"),
    *(
        "checkpoint",
        "workers",
        "out",
        "method",
        "method key",
        "no weights",
        "no model",
        "nested key",
        "value and nested",
        "whose setting",
        "torn records",
        "no records",
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_gets_one_line_and_status_2(case, tmp_path, capsys):
    arguments, message = refuse(tmp_path)[case]
    assert cli.main([str(word) for word in arguments]) == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("vitbench: ")
    assert message in lines[0]
    assert "Traceback" not in said.out + said.err
    assert not (tmp_path / "out").exists(), "something was written"


def test_every_refusal_is_tried(tmp_path):
    assert sorted(refuse(tmp_path)) == sorted(CASES)


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path):
    done = run("--debug", "report", tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    assert run("run", "quick", "--out", tmp_path / "out").returncode == 2


def test_a_full_disk_gets_one_line(base, tmp_path, capsys, monkeypatch):
    from vitbench.rows import runs

    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "environments"))

    monkeypatch.setattr(runs, "write_environment", full)
    assert cli.main(["measure", str(base.path), "--rounds", "10", "--batches", "1", "--out", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]


def test_two_suites_do_not_share_a_folder(tmp_path, capsys):
    from vitbench.base.locks import locked

    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / "suite.lock"):
        assert cli.main(["run", "quick", "--out", str(tmp_path / "out")]) == 2
    assert "another run is at work" in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_extra_says_how_to_install_it(tmp_path, capsys, monkeypatch, backend, extra):
    monkeypatch.setitem(sys.modules, backend, None)  # as if it were not installed
    assert cli.main(["measure", str(tmp_path), "--backend", backend, "--out", str(tmp_path / "out")]) == 2
    assert f"pip install 'vitbench[{extra}]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compress_on_a_part_of_the_images_keeps_its_time_in_a_row(base, tmp_path):
    results = tmp_path / "results"
    command = ["compress", base.path, "--method", "mixed_rank", "--set", "keep=0.5", "--dataset", "digits"]
    command += ["--out", tmp_path / "small", "--record", results, "--splits", "calibration=20"]
    done = run(*command)
    assert done.returncode == 0
    assert "mixed_rank, made in" in done.stdout
    assert done.stderr.strip().startswith("vitbench: warning: 20 calibration images give 340 tokens")
    (row,) = [json.loads(line) for line in (results / "records.jsonl").read_text().splitlines()]
    assert (row["metric"], row["unit"], row["context"]["depth"]) == ("compress_seconds", "s", 4)
    assert row["value"] > 0
    done = run(*command, "calibrations=3")
    assert done.returncode == 2
    assert "unknown key of splits 'calibrations' (did you mean 'calibration'?)" in done.stderr


def test_another_depth(tmp_path, capsys):
    command = ["compress", "vit_mini_patch2_8", "--random", "--depth", "2", "--out", str(tmp_path / "a")]
    assert cli.main(command) == 0
    assert len(artifact.load(tmp_path / "a").blocks) == 2
    assert cli.main(["compress", "vit_mini_patch2_8", "--random", "--depth", "0", "--out", str(tmp_path / "b")]) == 2
    assert "depth" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_of_a_stranger_runs_nothing(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\x00" * 32)
    (folder / "recipe.json").write_text(json.dumps({"recipe": {"architecture": "x"}, "sha256": ""}))
    done = run("measure", folder, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
