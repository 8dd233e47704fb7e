"""The model files of a workdir, and the parameters that training starts from."""

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vl2jax.checkpoints import model_dir as checkpoint
from vl2jax.checkpoints.model_dir import ModelDir
from vl2jax.common.errors import UserError, listed
from vl2jax.common.paths import local_path
from vl2jax.config import VL2Config

# Fields that do not affect the meaning of the parameters.
_FREE_FIELDS = frozenset(
    [
        *("torch_dtype", "transformers_version", "use_cache", "pretraining_tp", "ep_size"),
        *("initializer_range", "attention_dropout", "aux_loss_alpha", "seq_aux", "lm_head"),
        *("rm_head", "model_name", "candidate_resolutions"),
    ]
)
_COPIED_FILES = (*checkpoint.REQUIRED_FILES, *checkpoint.OPTIONAL_FILES)
_SECTIONS = {"vision": "vision_config", "adaptor": "projector_config", "decoder": "language_config"}


def prepare(
    path: str | os.PathLike,
    config: VL2Config,
    files_from: str | os.PathLike,
    *,
    dtype: str = "float32",
    dropped: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes the model files into a new workdir; checks that an existing one is of the same model.

    Args:
      path: the workdir.
      config: architecture.
      files_from: directory with tokenizer and processor files, to copy from.
      dtype: dtype of the parameters in the checkpoints, "float32" or "bfloat16".
      dropped: see `ModelDir`.

    Raises:
      UserError: see `check_workdir`.
    """
    path, files_from = local_path(path, "workdir"), local_path(files_from, "files_from")
    check_workdir(path, config, files_from, dtype=dtype)
    if (path / checkpoint.MODEL_FILE).is_file() or jax.process_index() != 0:
        return
    path.mkdir(parents=True, exist_ok=True)
    for name in _COPIED_FILES:
        if (files_from / name).is_file():
            shutil.copyfile(files_from / name, path / name)
    checkpoint.write_model_json(
        ModelDir(path=path, config=config, dtype=dtype, source_dtype=dtype, dropped=dropped)
    )


def check_workdir(path: Path, config: VL2Config, files_from: Path, *, dtype: str) -> None:
    """Checks that a directory is, or can become, the workdir of a model; writes nothing.

    Args:
      path, config, files_from, dtype: see `prepare`.

    Raises:
      UserError: the workdir is of another model, `path` is something else than a workdir, or files
        are missing.
    """
    if (path / checkpoint.PARAMS).exists():
        raise UserError(f"{path} is a converted model, not a workdir; choose another workdir")
    if (path / checkpoint.MODEL_FILE).is_file():
        _check_same(path, config, dtype)
        return
    absent = [name for name in checkpoint.REQUIRED_FILES if not (files_from / name).is_file()]
    if absent:
        raise UserError(
            f"{files_from} has no {' and no '.join(absent)}; expected a model directory's files"
        )
    # A start that was killed has left checkpoints/, which is made first.
    if path.is_dir() and not (path / checkpoint.CHECKPOINTS).is_dir():
        theirs = [name for name in ("config.json", *_COPIED_FILES) if (path / name).exists()]
        if theirs:
            raise UserError(
                f"{path} is not a workdir, and its {', '.join(theirs)} would be overwritten; choose"
                " a new directory, or an empty one"
            )
    elif path.exists() and not path.is_dir():
        raise UserError(f"workdir {path} is not a directory; choose another workdir")


def _check_same(path: Path, config: VL2Config, dtype: str) -> None:
    """Raises UserError if the workdir is of another model."""
    model = checkpoint.read_model_json(path)
    problems = config_differences(model.config, config)
    if model.dtype != dtype:
        problems.append(f"parameters are {model.dtype}, not {dtype}")
    if problems:
        raise UserError(
            f"workdir {path} is of another model; choose another workdir, or configure the model of"
            " this one:\n" + listed(problems)
        )


def init_params(
    path: str | os.PathLike,
    abstract: Any,
    shardings: Any,
    dtype: Any,
    *,
    config: VL2Config | None = None,
) -> dict[str, Any]:
    """Loads the parameters that training starts from.

    Args:
      path: a model directory or a training workdir.
      abstract: shapes of the variables, as from `abstract_params`.
      shardings: a tree like `abstract`; None: everything is on the default device.
      dtype: dtype of the parameters; the router's correction bias is always float32.
      config: architecture, to compare with the one at `path`; None: no comparison.

    Returns:
      Arrays in a tree like `abstract`.

    Raises:
      UserError: `path` is not a model directory, or its architecture or parameters differ; the
        message lists the differences.
    """
    model = checkpoint.read_model_dir(path)
    problems = [] if config is None else config_differences(model.config, config)
    if problems:
        raise UserError(
            f"the architecture of {model.path} differs from the configuration:\n" + listed(problems)
        )
    shapes = checkpoint.flat_shapes(abstract)
    loaded = checkpoint.load_params(model.params, shapes, dtype=dtype, shardings=shardings)
    by_path = checkpoint.flatten(loaded)
    leaves = [by_path[path] for path in shapes]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def config_differences(a: VL2Config, b: VL2Config) -> list[str]:
    """Compares two architectures in the fields that affect the meaning of the parameters.

    Returns:
      One line per different field, with its name in the Hugging Face config.json, its value in `a`
      and its value in `b`.
    """

    def values(config: VL2Config) -> dict[str, Any]:
        top = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        found = {name: value for name, value in top.items() if name not in _SECTIONS}
        for name, section in _SECTIONS.items():
            part = top[name]
            for field in dataclasses.fields(part):
                found[f"{section}.{field.name}"] = getattr(part, field.name)
        return found

    theirs = values(b)
    return [
        f"{name} is {value!r}, not {theirs[name]!r}"
        for name, value in values(a).items()
        if value != theirs[name] and name.split(".")[-1] not in _FREE_FIELDS
    ]
