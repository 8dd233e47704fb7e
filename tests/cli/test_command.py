"""Tests of all command lines: one line for what is wrong, never a traceback, never silence."""

import errno
import os
import shlex
import subprocess
import sys

import jax
import pytest
from absl import flags
from conftest import ROOT

from vl2jax import env
from vl2jax.cli import sample_flags, train_flags
from vl2jax.cli.command import Parser, run_cli, whole
from vl2jax.common.errors import UserError, storage_failure


def fail(error: BaseException):
    def body():
        raise error

    return body


# Standard streams.

CLOSED = "error: standard output is closed; redirect it to a file, or to /dev/null\n"
FULL = "error: [Errno 28] No space left on device\n"


def start(line: str) -> subprocess.Popen:
    """Starts a shell command line; PYTHON is the interpreter."""
    line = line.replace("PYTHON", shlex.quote(sys.executable))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = ["bash", "-o", "pipefail", "-c", line]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_closed_and_broken_streams(tmp_path):
    """A program says that its output is lost, and does its work without input or standard error."""
    wrote = "wrote 1 rows and 1 pictures: "
    expected = {
        ">&-": (1, "", CLOSED),
        "> /dev/full": (1, "", FULL),
        "| true": (0, "", ""),
        "<&- 2>&-": (0, wrote, ""),
        "<&- >&- 2>&-": (1, "", ""),
        "--split none 2>/dev/full": (1, "", ""),
    }
    running = {
        redirect: start(f"PYTHON -m vl2jax.synthetic --out {tmp_path / str(n)} -n 1 {redirect}")
        for n, redirect in enumerate(expected)
    }
    for redirect, process in running.items():
        out, errors = process.communicate(timeout=120)
        code, beginning, said = expected[redirect]
        assert (process.returncode, errors) == (code, said), redirect
        assert out.startswith(beginning) and len(out) < 200, redirect


def test_every_program_opens_closed_streams():
    """What a program opens must not get the number of a standard stream."""
    script = """
import os, sys
from vl2jax.cli.command import run_cli
import vl2jax.programs.sample
def body():
    for number in range(3):
        os.fstat(number)
    assert os.open(os.devnull, os.O_RDONLY) > 2
    assert sys.stdin.read() == ""
    print("lost", file=sys.stderr)
sys.exit(run_cli(body))
"""
    process = start(f"PYTHON -c {shlex.quote(script)} <&- 2>&- >&-")
    process.communicate(timeout=120)
    assert process.returncode == 0


# Errors.


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("wrong; do it right"), "wrong; do it right"),
        (OSError(errno.EFBIG, "File too large", "x"), "[Errno 27] File too large: 'x'"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "[Errno 122] Disk quota exceeded"),
        (OSError(errno.EROFS, "Read-only file system", "y"), "Read-only file system: 'y'"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), "File name too long: 'xx"),
        (OSError(errno.EACCES, "Permission denied", "a\nb"), "Permission denied: 'a\\nb'"),
        (MemoryError(), "not enough memory on this host"),
        (
            ValueError("OUT_OF_RANGE: Error writing: File too large [os_error_code='27']"),
            "File too large, for the file system or for `ulimit -f` (OUT_OF",
        ),
        (
            ValueError("Error writing: Disk quota exceeded [os_error_code='122' source='a\nb']"),
            "the disk quota is used up (Error writing",
        ),
        (Exception("Read-only file system (os error 30)"), "the file system is read-only (Read"),
        (RuntimeError("[Errno 13] Permission denied: 'x'"), "permission denied ([Errno 13]"),
        (
            RuntimeError(
                "Unable to initialize backend 'foo': not known. (set JAX_PLATFORMS='' to"
                " automatically choose an available backend)"
            ),
            "JAX cannot start the platform of JAX_PLATFORMS=foo (Unable to initialize backend",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
            "on the device; try less",
        ),
    ],
)
def test_known_failures_are_one_line(capsys, monkeypatch, error, message):
    monkeypatch.setenv("JAX_PLATFORMS", "foo")
    assert run_cli(fail(error), out_of_memory="less") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and len(captured.err) < 1200


@pytest.mark.parametrize("error", [ValueError("a bug"), AssertionError(), KeyError("x")])
def test_bugs_have_a_traceback(error):
    with pytest.raises(type(error)):
        run_cli(fail(error), out_of_memory="less")


def test_messages_are_bounded(capsys):
    lines = ["x" * 10_000] * 1000
    assert run_cli(fail(UserError("\n".join(lines)))) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 41 and max(map(len, said)) < 2100
    assert said[-1] == "  - and 960 more"


def test_exit_codes(capsys):
    assert run_cli(lambda: None) == 0
    assert run_cli(lambda: 3) == 3
    assert run_cli(fail(KeyboardInterrupt()), interrupted="stopped") == 130
    assert capsys.readouterr().err == "\nstopped\n"
    assert run_cli(fail(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 0


def test_storage_failures_are_recognised():
    assert storage_failure(OSError(errno.ENOSPC, "x")) == "the disk is full"
    assert storage_failure(ValueError("x: No space left on device [a=b]")) == "the disk is full"
    assert storage_failure(OSError(errno.ENOENT, "No such file or directory")) is None
    assert storage_failure(ValueError("shape (28,) os_error_code='2'")) is None


def test_platforms_that_do_not_exist():
    """Without a package of its platform, JAX fails an assertion that has no message."""
    script = (
        "import sys, jax; from vl2jax.cli.command import run_cli; sys.exit(run_cli(jax.devices))"
    )
    running = {
        name: start(f"JAX_PLATFORMS={name} PYTHON -c {shlex.quote(script)}")
        for name in ("foo", "cuda", "rocm")
    }
    for name, process in running.items():
        out, errors = process.communicate(timeout=120)
        if process.returncode == 0:  # this host has it
            continue
        last = errors.strip().splitlines()[-1]
        assert (process.returncode, out) == (1, "")
        assert last.startswith(f"error: JAX cannot start the platform of JAX_PLATFORMS={name} (")
        assert "Traceback" not in errors


# Flags.


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "1e3", "99999999999", "9" * 5000])
def test_whole_numbers(text):
    parser = Parser("prog", None)
    parser.add_argument("-n", type=whole(0))
    with pytest.raises(
        UserError, match="expected a whole number from 0 to 2147483647, got"
    ) as error:
        parser.parse_args([f"-n={text}"])
    assert len(str(error.value)) < 300


def test_images_in_one_flag_or_in_several():
    def images(*words):
        argv = ["--ckpt", "x", "--prompt", "a", *words]
        return sample_flags.parse_flags(argv, None).image

    assert [str(path) for path in images("--image", "a.jpg", "b.png")] == ["a.jpg", "b.png"]
    several = images("--image", "a.jpg", "b.png", "--seed", "1", "--image", "c.png")
    assert [str(path) for path in several] == ["a.jpg", "b.png", "c.png"]
    assert images() == []
    with pytest.raises(UserError, match="--image: expected at least one argument"):
        images("--image")


def test_flags_of_env_are_checked(capsys):
    assert env.main(["--foo"]) == 1
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --foo; --help lists the flags\n"
    )


# The flags of train.py.

# Of ml_collections.
old_loader = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def defined_flags():
    if "workdir" not in flags.FLAGS:
        train_flags.define_flags(None)


def read(*arguments: str):
    flags.FLAGS.unparse_flags()
    return train_flags.read_flags(["train.py", *arguments])


@old_loader
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config():\n  return 1 / 0\n", "ZeroDivisionError in line 2: division by zero"),
        ("def get_config(:\n", "SyntaxError in line 1: "),
        ("import nothere\n", "ModuleNotFoundError in line 1: No module named 'nothere'"),
        ("x = 1\n", "AttributeError: "),
        ("import sys\ndef get_config():\n  sys.exit(3)\n", "SystemExit in line 3: 3"),
        ("def get_config():\n  raise ValueError('a' * 9999)\n", "ValueError in line 2: aaa"),
        ("def get_config():\n  return {'a': 1}\n", "get_config() returned {'a': 1}, expected an"),
        ("def get_config():\n  return\n", "get_config() returned None, expected an ml_coll"),
    ],
)
def test_configuration_files_that_fail(tmp_path, monkeypatch, content, message):
    file = tmp_path / "config.py"
    file.write_text(content)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of the file before
    with pytest.raises(UserError) as error:
        read(f"--config={file}")
    assert str(error.value).startswith(f"{file}: {message}")
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(file)) + 500


@old_loader
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no configuration; give one"),
        (["--config=nothere.py"], "--config nothere.py does not exist"),
        (["--config=/tmp"], "--config /tmp is a directory"),
        (["--config=configs/tiny.py:x"], "configs/tiny.py:x: TypeError: get_config()"),
        (["--config=configs/vl2_tiny.py:x"], "vl2_tiny has the stages align, pretrain, sft"),
        (["--config=configs/tiny.py", "x"], "'x' is not a flag"),
        (["--config=configs/tiny.py", "--x"], "Unknown command line flag 'x'"),
        (["--config=configs/tiny.py", "--workdir"], "Missing value for flag --workdir"),
        (["--config=configs/tiny.py", "--join_timeout=0"], "--join_timeout=0: 0 is not"),
        (["--config=configs/tiny.py", "--num_processes=x"], "flag --num_processes=x"),
        (["--config=configs/tiny.py", "--config.steps=x"], "--config.steps=x: invalid literal"),
        (["--config=configs/tiny.py", "--config.stepz=1"], "config has no field 'stepz'; did you"),
        (
            ["--config=configs/tiny.py", "--config.optim.lr_multipliers.adaptor=x"],
            "--config.optim.lr_multipliers.adaptor=x: the factor must be a number",
        ),
    ],
)
def test_flags_of_train(monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@old_loader
def test_multipliers_of_any_part(monkeypatch):
    """A part needs no field in the configuration file, and its factor may be a whole number."""
    monkeypatch.chdir(ROOT)
    flag = "--config.optim.lr_multipliers."
    values = read("--config=configs/tiny.py", f"{flag}adaptor=2", f"{flag}vision/pos_embed=0.5")
    assert values["optim"]["lr_multipliers"] == {"adaptor": 2.0, "vision/pos_embed": 0.5}
