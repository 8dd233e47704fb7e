"""The command line of train.py: a configuration file, overrides, and clear error messages."""

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from absl import app, flags
from ml_collections import config_flags

from vl2jax.common.errors import UserError
from vl2jax.common.paths import local_path, user_path
from vl2jax.parallel.processes import DistributedOptions

FLAGS = flags.FLAGS
# If a configuration file fails, the message contains a traceback; the last line is the error.
_LAST_LINE = re.compile(r"^\s*(?:[\w.]*(?:Error|Exception): )?(\S.*)$", re.MULTILINE)


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
    flags.DEFINE_integer("num_processes", -1, "number of processes, with --coordinator")
    flags.DEFINE_integer("process_id", -1, "id of this process, from 0, with --coordinator")
    flags.DEFINE_integer("join_timeout", 300, "seconds to wait for all processes")


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
    argv = [argv[0], *map(_config_path, argv[1:])]
    overrides = [arg for arg in argv[1:] if arg.lstrip("-").startswith("config.")]
    others = [arg for arg in argv[1:] if arg not in overrides]
    try:
        with _command_line([argv[0], *others]):
            surplus = FLAGS([argv[0], *others])[1:]
            config = FLAGS.config
            _ = config is not None and config.to_dict()  # fails if the file does not exist
    except (flags.Error, AttributeError, OSError) as error:
        raise UserError(_LAST_LINE.findall(str(error))[-1]) from error
    if config is None:
        raise UserError("no configuration; give one, for example --config=configs/tiny.py")
    if surplus:
        raise UserError(f"{surplus[0]!r} is not a flag; set fields with --config.NAME=VALUE")
    for override in overrides:
        _check_field(config, override)
    FLAGS.unparse_flags()
    try:
        with _command_line(argv):
            FLAGS(list(argv))
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"{error}; give a value of the type in the configuration file") from error
    for name in ("workdir", "compilation_cache"):
        if (value := FLAGS[name].value) not in (None, "off"):
            user_path(value, f"--{name}")
    return FLAGS.config.to_dict()


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
