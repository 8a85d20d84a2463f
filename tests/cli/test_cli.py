"""Subcommands that compile no model, usage errors, and exit codes."""

import argparse
import dataclasses
import importlib
import os
import random
import re
import shlex
import signal
import subprocess
import sys

import pytest

from dcnv3_tvm import gpu, runtime
from dcnv3_tvm.cli import VERBS, env, parser, profile, verify
from dcnv3_tvm.cli.arguments import in_options
from dcnv3_tvm.cli.result import table
from dcnv3_tvm.systems import this_system

ALL_VERBS = {name: importlib.import_module(f"dcnv3_tvm.cli.{name}") for name in VERBS}

SUBPARSERS = next(a for a in parser(ALL_VERBS)._actions if a.dest == "verb").choices


def test_models(cli):
    found = cli("models", "--json")
    assert found.code == 0
    names = [row["name"].removeprefix("internimage_") for row in found.data]
    assert names == ["t", "s", "b", "l", "xl", "h", "g"]
    assert found.data[0]["parameters"] == 29_918_424
    assert found.data[3]["resolution"] == 384
    text = cli("models", "*_xl")
    assert "internimage_xl" in text.out
    assert "334.820M" in text.out
    assert "internimage_t" not in text.out
    assert cli("models", "resnet*").code == 2


def test_info(cli, artifact_path):
    found = cli("info", artifact_path, "--json")
    assert found.code == 0
    assert found.data["name"] == "toy"
    assert found.data["runs_here"] == "yes"
    assert set(found.data["files"]) >= {"model.so", "metadata.json"}
    text = cli("info", artifact_path).out
    assert "NCHW (1, 3, 8, 8)" in text
    assert "cpu-test" in text
    assert found.data["system"] == this_system().name


def test_info_of_an_artifact_for_another_machine(cli, toy, tmp_path):
    from dcnv3_tvm.runtime import TargetInfo

    path = toy.write(tmp_path / "x", target=TargetInfo("llvm", "riscv64-linux"))
    found = cli("info", path)
    assert found.code == 0
    assert "no: the artifact is for another system" in found.out
    assert re.search(r"system +riscv64-linux\n", found.out)
    failed = cli("run", path, "photo.jpg")
    assert failed.code == 2
    assert "another system" in failed.err


def test_device_does_not_fit(cli, artifact_path, photo):
    for verb in (("run", artifact_path, photo), ("verify", artifact_path, "--random-weights", 0)):
        found = cli(*verb, "--device", "cuda:1")
        assert found.code == 2
        assert "runs on cpu, not on cuda" in found.err


def test_env(cli, monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "7")
    found = cli("env", "--json")
    assert found.code == 0
    assert found.data["versions"]["tvm"].startswith("0.27")
    assert found.data["threads"] == 7
    assert found.data["warnings"] == []
    assert found.data["auto_target"].startswith("cpu-")
    assert "there is no" not in found.data["linker"]
    assert found.data["gpus"] == [dataclasses.asdict(device) for device in gpu.devices()]
    assert set(found.data["cuda"]) == {"NVIDIA driver", "CUDA runtime", "nvcc", "NVRTC"}
    assert {"name", "value", "read_by", "meaning"} == set(found.data["variables"][0])
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = cli("env").out
    assert "TVM_BIND_THREADS" in found
    assert re.search(r"linker +.*no-such-compiler", found)


@pytest.mark.parametrize(
    ("tvm", "ffi", "warned"),
    [
        ("0.27.0.post1", "0.1.15", True),
        ("0.27.0", "0.2.0", True),
        ("0.27.0.post1", "0.1.14.post1", False),
        ("0.28.0", "0.1.15", False),
        (None, "0.1.15", False),
    ],
)
def test_version_warnings(tvm, ffi, warned):
    assert bool(env.version_warnings({"tvm": tvm, "tvm_ffi": ffi})) is warned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("fly",), "invalid choice"),
        (("run",), "required: artifact, image"),
        (("run", "nowhere", "x.jpg"), "does not exist"),
        (("info", "nowhere"), "does not exist"),
        (("compile", "internimage_t"), "-o"),
        (("compile", "internimage_u", "-o", "x"), "Did you mean"),
        (("compile", "internimage_t", "-o", "x"), "--random-weights SEED"),
        (("compile", "photo.pth", "-o", "x"), "there is no checkpoint"),
        (
            ("compile", "internimage_t", "-o", "x", "--size", "big"),
            "the image size is invalid; got 'big'",
        ),
        (("compile", "internimage_t", "-o", "x", "--size", "10000000x10000000"), "from 1 to 16384"),
        (("compile", "internimage_t", "-o", "x", "--batch", "0"), "1 or more"),
        (("compile", "internimage_t", "-o", "x", "--layer-scale", "much"), "none or auto"),
        (("compile", "internimage_t", "-o", "x", "--out-indices", "1,4"), "such as 1,2,3"),
        (("explain", "internimage_t", "--size", "16384", "--batch", "9"), "batch is too large"),
        (("run", "nowhere", "x.jpg", "--features", ""), "path is empty"),
        (("bench", "op", "--threads", "0"), "1 or more"),
        (("bench", "op", "--rounds", "-1"), "1 or more"),
        (
            ("compile", "internimage_t", "-o", "x", "--checkpoint", "no.pth"),
            "checkpoint does not exist",
        ),
        (
            ("compile", "internimage_t", "-o", "x", "--checkpoint", "a", "--random-weights", "0"),
            "not allowed with",
        ),
        (
            ("compile", "internimage_t_1k.pth", "-o", "x", "--random-weights", "0"),
            "specified twice",
        ),
        (("verify", "nowhere"), "--random-weights SEED"),
        (("verify", "nowhere", "--random-weights", "0"), "does not exist"),
    ],
)
def test_invalid_usage(cli, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = cli(*arguments)
    assert found.code == 2
    assert found.out == ""
    assert message in found.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "toaster"), "target is unknown"),
        (("--target", "cuda-sm75"), "GPU architecture is not supported"),
        (("--target", "llvm -mtriple=riscv64-linux-gnu"), "allowed: linux-x86_64 (this machine), "),
        (
            ("--target", "windows-x86_64", "--runtime-wheel", "none.whl"),
            "cannot be read; got none.whl",
        ),
        (("--dtype", "float8"), "allowed: float32, bfloat16, float16"),
        (("--target", "cpu", "--dtype", "float16"), "float16 is not supported on CPUs"),
        (("--database", "nowhere"), "nowhere"),
        (("--dynamic-size", "0"), "'0' is not an integer of 1 or more"),
        (("--dynamic-size", "--database", "nowhere"), "nowhere"),
    ],
)
def test_compile_checks_arguments_before_it_builds_the_model(cli, arguments, message, tmp_path):
    weights = ("--random-weights", "0")
    found = cli("compile", "internimage_h", *weights, "-o", tmp_path / "x", *arguments)
    assert found.code == 2
    assert message in found.err
    assert "build PyTorch model" not in found.err


def test_invalid_image(cli, artifact_path, tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("no image")
    found = cli("run", artifact_path, path)
    assert found.code == 2
    assert "image cannot be read" in found.err


def test_modified_artifact(cli, artifact_path, photo):
    data = bytearray((artifact_path / "model.so").read_bytes())
    data[5000] ^= 1
    (artifact_path / "model.so").write_bytes(data)
    found = cli("run", artifact_path, photo)
    assert found.code == 2
    assert "model.so was modified" in found.err


def test_compile_does_not_replace_without_force(cli, artifact_path, tmp_path):
    found = cli("compile", "internimage_t", "-o", artifact_path)
    assert found.code == 2
    assert "--force" in found.err
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("")
    found = cli("compile", "internimage_t", "-o", tmp_path / "home", "--force")
    assert found.code == 2
    assert "is not an artifact" in found.err


def test_verify_of_another_model(cli, artifact_path):
    found = cli("verify", artifact_path, "--random-weights", "0")
    assert found.code == 2
    assert "is not of an InternImage variant" in found.err


def test_interrupt(cli, artifact_path, photo, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "load", interrupt)
    found = cli("run", artifact_path, photo)
    assert found.code == 130
    assert "interrupted" in found.err


def run_program(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dcnv3_tvm", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_version_and_module():
    found = run_program("--version")
    assert found.returncode == 0
    assert found.stdout.startswith("dcnv3-tvm 0.")


def run_to(stdout, *, prepare=None):
    return subprocess.run(
        [sys.executable, "-m", "dcnv3_tvm", "models"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=prepare,
    )


def test_stdout_that_is_closed_or_full():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        piped = run_to(pipe)
    closed = run_to(None, prepare=lambda: os.close(1))
    for done in (piped, closed):
        assert done.stderr == ""
        assert done.returncode == 0
    with open("/dev/full", "w") as full:
        done = run_to(full)
    assert done.stderr.startswith("dcnv3-tvm models: error: the result cannot be written to stdout")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 1


def parsers(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def test_every_help_ends_with_an_example():
    whole = parser(ALL_VERBS)
    found = list(parsers(whole))
    assert (
        len(found) == 1 + len(VERBS) + 5 + 7 + 3
    )  # With the actions of records, bench and extensions.
    for each in found:
        example = each.format_help().splitlines()[-1]
        program, *arguments = shlex.split(example.removeprefix("Example: "))
        assert program == "dcnv3-tvm"
        assert f"dcnv3-tvm {' '.join(arguments)}".startswith(each.prog)
        whole.parse_args(arguments)
        if each.prog.count(" ") < 2 and each is not whole:
            assert "--json" in each.format_help()


def test_lists_may_be_interrupted_by_options():
    whole = parser({"verify": verify})
    for order in (["a", "b", "--seed", "1", "c"], ["--seed", "1", "a", "b", "c"]):
        found = whole.parse_args(["verify", *order])
        assert (str(found.artifact), [str(path) for path in found.image]) == ("a", ["b", "c"])
    for wrong in (["a", "--speed", "1", "b"], ["a", "--seed", "1", ""]):
        with pytest.raises(SystemExit):
            whole.parse_args(["verify", *wrong])


def test_an_optional_argument_may_follow_options():
    whole = parser({"profile": profile})
    for order in (["a", "b", "--calls", "2"], ["a", "--calls", "2", "b"]):
        found = whole.parse_args(["profile", *order])
        assert (str(found.artifact), str(found.image)) == ("a", "b")
    assert whole.parse_args(["profile", "a", "--calls", "2"]).image is None
    with pytest.raises(SystemExit):
        whole.parse_args(["profile", "a", "b", "--calls", "2", "c"])


def random_command_line(generator, words):
    """Return a subcommand with words and options in any order, most of them invalid."""
    verb = generator.choice(["info", "models", "records", "run", "verify", "worker"])
    options = [a for a in SUBPARSERS[verb]._actions if a.option_strings]
    line = [[generator.choice(words)] for _ in range(generator.randint(0, 4))]
    for option in generator.sample(options, min(len(options), generator.randint(0, 3))):
        values = [] if option.nargs == 0 else [generator.choice(words)]
        line.append([generator.choice(option.option_strings), *values])
    generator.shuffle(line)
    return [verb, *(word for part in line for word in part)]


def test_random_command_lines(cli, artifact_path, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("about.json", "records.jsonl", "metadata.json", "weights.pth"):
        (tmp_path / "folder" / name).write_text("[]")
    words = ["", "-1", "0", "2", "x", "1e9", "nan", "9" * 30, "é", "-", "--", "0,1", "%s"]
    words += ["nowhere", "folder", "folder/weights.pth", "loop", "pipe.jpg", "/dev/zero", "show"]
    words += ["check", "internimage_t", "cpu-znver4", str(photo), *3 * [str(artifact_path)]]
    generator = random.Random(15)
    codes = {cli(*random_command_line(generator, words)).code for _ in range(60)}
    assert codes <= {0, 1, 2}
    assert {0, 2} <= codes


def test_errors_name_the_options_of_the_command():
    arguments = argparse.Namespace(use_ema=None, layer_scale=None, value_range=None, dtype=None)
    text = (
        "Use layer_scale=None, or value_range=(0, 1) with use_ema=False and use_ema=True; "
        'dtype="float32", not num_classes=3.'
    )
    assert in_options(text, arguments) == (
        "Use --layer-scale none, or --value-range 0,1 without --use-ema and --use-ema; "
        "--dtype float32, not num_classes=3."
    )


@pytest.mark.parametrize("package", ["tvm", "torch"])
def test_missing_package_is_named(cli, monkeypatch, package):
    def missing(_):
        raise ModuleNotFoundError(name=package)

    monkeypatch.setattr(env, "execute", missing)
    found = cli("env")
    assert found.code == 1
    assert "pip install" in found.err


def test_termination_and_interruption_clean_up(tmp_path):
    code = (
        "import sys, tempfile, time\n"
        "from dcnv3_tvm.cli import env, main\n"
        "def execute(_):\n"
        f"    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "env.execute = execute\n"
        "sys.exit(main(['env']))\n"
    )
    for number, code_of_exit in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        assert process.returncode == code_of_exit
        assert "Traceback" not in err
        assert not list(tmp_path.iterdir())


def test_table():
    assert table(["a", "b"], [["x", 1.5], ["yy", 22]]) == "a     b\nx   1.5\nyy   22"


def test_completion(cli):
    script = cli("completion", "bash").out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for word in (*VERBS, "--dynamic-batch", "encoder", "--quiet"):
        assert word in script
    # As bash does for: dcnv3-tvm compile internimage_x<TAB>
    ask = "COMP_WORDS=(dcnv3-tvm compile internimage_x); COMP_CWORD=2; _shtab_dcnv3_tvm"
    done = subprocess.run(
        ["bash"],
        input=f"{script}\n{ask}; echo ${{COMPREPLY[@]}}",
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout == "internimage_xl\n"
