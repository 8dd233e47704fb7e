"""The command line of train.py: a configuration file, overrides, and clear error messages."""

import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from vl2jax.common.errors import UserError, clip, reason, shown
from vl2jax.common.paths import local_path, user_path
from vl2jax.parallel.processes import DistributedOptions

FLAGS = flags.FLAGS
_MULTIPLIER = re.compile(r"--?config\.optim\.lr_multipliers\.([^=]+)=(.*)", re.DOTALL)


def define_flags(description: str | None) -> None:
    """Defines --config, --workdir, --compilation_cache, --help and those of `jax.distributed`.

    Args:
      description: what --help prints first; absl takes it from the main module.
    """
    sys.modules["__main__"].__doc__ = description
    app.define_help_flags()
    what = "configuration file, with its argument if it has one: configs/FILE.py[:ARG]"
    config_flags.DEFINE_config_file("config", None, what)
    flags.DEFINE_string("workdir", None, "directory of the run; default: runs/<config.name>")
    flags.DEFINE_string("compilation_cache", None, "directory of compiled programs, or off")
    flags.DEFINE_bool("distributed", False, "join the processes of this SLURM, GKE or TPU job")
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, to join processes by hand")
    flags.DEFINE_integer("num_processes", -1, "number of processes, with --coordinator", -1)
    flags.DEFINE_integer("process_id", -1, "id of this process, from 0, with --coordinator", -1)
    flags.DEFINE_integer("join_timeout", 300, "seconds to wait for all processes", 1, 10**6)


def read_flags(argv: Sequence[str]) -> Mapping:
    """Parses the command line.

    Args:
      argv: the command line, with the name of the program.

    Returns:
      The configuration with its overrides, as a nested dict.

    Raises:
      UserError: the configuration file is missing or fails, a flag or field does not exist, a value
        has the wrong type, or a path is not one, see `user_path`.
    """
    argv, multipliers = _without_multipliers([argv[0], *map(_config_path, argv[1:])])
    overrides = [arg for arg in argv[1:] if arg.lstrip("-").startswith("config.")]
    others = [arg for arg in argv[1:] if arg not in overrides]
    named = any(arg.lstrip("-").partition("=")[0] == "config" for arg in others)
    if not named and not _asks_for_help(argv):
        raise UserError("no configuration; give one, for example --config=configs/tiny.py")
    surplus, config = _load_config([argv[0], *others])
    if surplus:
        raise UserError(f"{surplus[0]!r} is not a flag; set fields with --config.NAME=VALUE")
    for override in [*overrides, *("config.optim.lr_multipliers" for _ in multipliers)]:
        _check_field(config, override)
    FLAGS.unparse_flags()
    try:
        with _command_line(argv):
            FLAGS(list(argv))
    except (flags.Error, TypeError, ValueError) as error:
        what = "give a value of the type in the configuration file"
        raise UserError(f"{reason(error, 300)}; {what}") from error
    for name in ("workdir", "compilation_cache"):
        if (value := FLAGS[name].value) not in (None, "off"):
            user_path(value, f"--{name}")
    values = FLAGS.config.to_dict()
    if multipliers:
        values["optim"]["lr_multipliers"] |= multipliers
    return values


def _load_config(argv: Sequence[str]) -> tuple[list[str], ml_collections.ConfigDict]:
    """Parses the flags that are no overrides, which runs the configuration file.

    Returns:
      What is left of the command line, and the configuration.

    Raises:
      UserError: a flag does not exist, or the configuration file fails, whatever it raises.
    """
    file = _config_file(argv)
    path = Path(file.partition(":")[0])
    if file and not path.is_file() and not _asks_for_help(argv):
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"--config {clip(str(path))} {what}; expected a file, like configs/tiny.py")
    try:
        with _command_line(argv):
            surplus = FLAGS(list(argv))[1:]
            config = FLAGS.config
    except flags.Error as error:
        raise UserError(_failure_of_flag(argv, error)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of code that the user has written
        if isinstance(error, SystemExit) and error.code == 1 and _asks_for_help(argv):
            raise SystemExit(0) from None  # absl has printed the help
        raise UserError(_failure_of_file(argv, error)) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"{clip(_config_file(argv))}: get_config() returned {shown(config)}, expected an"
            " ml_collections.ConfigDict"
        )
    return surplus, config


def _asks_for_help(argv: Sequence[str]) -> bool:
    return any(arg.lstrip("-").startswith("help") for arg in argv[1:])


def _config_file(argv: Sequence[str]) -> str:
    """The last value of --config on a command line, with its argument if it has one."""
    found = ""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = arg.partition("=")
        if flag.lstrip("-") == "config":
            found = value if equals else following
    return found


def _failure_of_flag(argv: Sequence[str], error: flags.Error) -> str:
    """Describes a flag that absl refuses; what a configuration file raises may be one, too."""
    original: BaseException = error
    while original.__context__ is not None:
        original = original.__context__
    return _failure_of_file(argv, original) if "Traceback" in str(error) else reason(error, 300)


def _failure_of_file(argv: Sequence[str], error: BaseException) -> str:
    """Describes what a configuration file has raised, with the line where it happened."""
    if isinstance(error, UserError):
        return str(error)
    file = _config_file(argv)
    path = os.path.abspath(file.partition(":")[0])
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == path]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    where = f" in line {lines[-1]}" if lines else ""
    return f"{clip(file)}: {type(error).__name__}{where}: {reason(error, 300)}"


def read_distributed_options() -> DistributedOptions:
    """Reads the flags of `jax.distributed`; call it after `read_flags`.

    Raises:
      UserError: a flag needs another one.
    """
    return DistributedOptions(
        auto=FLAGS.distributed,
        coordinator=FLAGS.coordinator,
        num_processes=FLAGS.num_processes,
        process_id=FLAGS.process_id,
        timeout=FLAGS.join_timeout,
    )


def _without_multipliers(argv: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Takes `--config.optim.lr_multipliers.PART=FACTOR` out of a command line.

    The parts of the model are not fields: the configuration file need not name the part, and a
    factor may be written as a whole number.
    """
    kept, found = [], {}
    for arg in argv:
        match = _MULTIPLIER.fullmatch(arg)
        if match is None:
            kept.append(arg)
            continue
        try:
            found[match[1]] = float(match[2])
        except ValueError as error:
            raise UserError(f"{clip(arg)}: the factor must be a number") from error
    return kept, found


def _config_path(arg: str) -> str:
    """Converts the path in `--config=PATH`, see `user_path`; keeps all other arguments."""
    flag, equals, path = arg.partition("=")
    if not equals or flag.lstrip("-") != "config":
        return arg
    return f"{flag}={local_path(path, '--config')}"


@contextlib.contextmanager
def _command_line(argv: Sequence[str]) -> Iterator[None]:
    """Replaces `sys.argv` temporarily, because config_flags reads overrides from it."""
    before, sys.argv = sys.argv, list(argv)
    try:
        yield
    finally:
        sys.argv = before


def _check_field(config, override: str) -> None:
    """Raises UserError if the field of `--config.a.b=value` does not exist."""
    names = override.lstrip("-").partition("=")[0].split(".")[1:]
    for depth, name in enumerate(names):
        fields = list(config) if hasattr(config, "keys") else []
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            here = ".".join(["config", *names[:depth]])
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(fields) or 'none'}"
            raise UserError(f"{here} has no field {name!r}; {hint}")
        config = config[name]
