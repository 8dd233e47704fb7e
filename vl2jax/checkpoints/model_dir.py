"""The model directory: one directory that contains a complete model.

model.json          architecture (in the Hugging Face schema), dtypes, tensors that were dropped
tokenizer.json ...  tokenizer and processor files, as in the Hugging Face checkpoint
params/             the parameters, an Orbax checkpoint

A training workdir is a model directory, too.  Instead of params/ it has checkpoints/STEP/params;
the newest complete step is read.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vl2jax.checkpoints.completeness import (
    CHECKPOINTS,
    MARKER,
    PARAMS,
    all_steps,
    defect,
    describe_defects,
    newest_complete,
    warn_once,
)
from vl2jax.checkpoints.param_store import (
    CheckpointError,
    ParamStore,
    Shape,
    read_array,
    read_parts,
)
from vl2jax.common.atomic_file import write_json
from vl2jax.common.paths import AnyPath, is_remote, user_path
from vl2jax.common.storage import local_files
from vl2jax.config import ConfigError, VL2Config

MODEL_FILE = "model.json"
FORMAT, FORMAT_VERSION = "vl2jax", 1
REQUIRED_FILES = ("processor_config.json", "tokenizer.json")
OPTIONAL_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDir:
    """A model directory, as `model.json` describes it.

    Attributes:
      path: the directory with `model.json`, tokenizer and processor files; copies of them if the
        model is on an object store.
      stored: the directory with the parameters; None: `path`.
      config: architecture.
      dtype: dtype in which most parameters are stored, "float32" or "bfloat16".
      source_dtype: dtype of most tensors of the Hugging Face checkpoint.
      source_dtypes: dtypes of the other tensors, by Hugging Face name.
      dropped: tensors that the conversion dropped: [{"tensors": [...], "reason": ...}].
      step: training step whose parameters are read; None if it is not a training workdir.
    """

    path: Path
    config: VL2Config
    dtype: str
    stored: AnyPath | None = None
    source_dtype: str
    source_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dropped: Sequence[Mapping[str, Any]] = ()
    step: int | None = None

    @property
    def params(self) -> AnyPath:
        """The directory of the parameters."""
        return self.address / PARAMS

    @property
    def address(self) -> AnyPath:
        """A path from which `read_model_dir` reads the same step, even after newer ones exist."""
        root = self.stored or self.path
        return root if self.step is None else root / CHECKPOINTS / str(self.step)


def write_model_json(model: ModelDir) -> None:
    """Writes `model.json`.

    Call it after all other files are written: a directory without `model.json` is not a model.
    """
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtype": model.dtype,
        "source_dtype": model.source_dtype,
        "source_dtypes": dict(model.source_dtypes),
        "dropped": list(model.dropped),
        "config": model.config.to_hf(),
    }
    write_json(model.path / MODEL_FILE, content)


def read_model_dir(path: str | os.PathLike) -> ModelDir:
    """Reads `model.json` and checks that the directory is complete; reads no parameters.

    Args:
      path: the output of `convert.to_jax`, a training workdir (its newest complete step), or one
        of its steps (WORKDIR/checkpoints/500).

    Raises:
      CheckpointError: the directory does not exist or is not a complete vl2jax model.
    """
    path = user_path(path, "checkpoint")
    if is_remote(path):
        return _read_remote(path)
    assert isinstance(path, Path)
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "does not exist"
        raise CheckpointError(
            f"checkpoint {path} {what}; expected the output of convert.to_jax or a training workdir"
        )
    path, step = _step_of(path)
    if not (path / MODEL_FILE).is_file():
        raise CheckpointError(f"{path} is not a vl2jax checkpoint: {_what_instead(path)}")
    model = dataclasses.replace(read_model_json(path), step=step)
    absent = [name for name in REQUIRED_FILES if not (path / name).is_file()]
    absent += [] if model.params.is_dir() else [PARAMS + "/"]
    if absent:
        fix = (
            "convert it again"
            if step is None
            else "copy the files from the model that training started from"
        )
        raise CheckpointError(f"{path} is incomplete: {', '.join(absent)} missing; {fix}")
    _check_complete(model)
    return model


def processor_files(path: str | os.PathLike) -> Path:
    """The local directory with the tokenizer and processor files of a directory.

    Args:
      path: a directory with such files; those of an object store are copied.
    """
    found = user_path(path, "tokenizer")
    if is_remote(found):
        return local_files(found, (*REQUIRED_FILES, *OPTIONAL_FILES))
    assert isinstance(found, Path)
    return found


def _read_remote(path: AnyPath) -> ModelDir:
    """Reads a model on an object store, see `read_model_dir`."""
    root, step = path, None
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        root, step = path.parent.parent, int(path.name)
    files = local_files(root, (MODEL_FILE, MARKER, *REQUIRED_FILES, *OPTIONAL_FILES))
    if not (files / MODEL_FILE).is_file():
        raise CheckpointError(
            f"{root} is not a vl2jax checkpoint: it has no {MODEL_FILE}; expected the output of"
            " convert.to_jax or a training workdir"
        )
    if step is None and all_steps(root):
        step = _newest_step(root)
    model = dataclasses.replace(read_model_json(files), step=step, stored=root)
    absent = [name for name in REQUIRED_FILES if not (files / name).is_file()]
    if absent:
        raise CheckpointError(f"{root} is incomplete: {', '.join(absent)} missing; copy it again")
    _check_complete(model)
    return model


def _check_complete(model: ModelDir) -> None:
    """Raises CheckpointError if the parameters are not complete."""
    if model.step is None and not (model.path / MARKER).exists():
        return  # converted before there was a marker; `ParamStore` finds what is missing
    covered = (PARAMS, MODEL_FILE) if model.step is None else (PARAMS,)
    found = defect(model.address, covered)
    if found is not None:
        fix = "convert it again" if model.step is None else "give another step of the workdir"
        raise CheckpointError(f"{model.address} is incomplete: {found}; {fix}")


def _step_of(path: Path) -> tuple[Path, int | None]:
    """Returns the directory with model.json, and the step if it is a training workdir."""
    absolute = Path(os.path.abspath(path))
    if (path / MODEL_FILE).is_file() and not (path / CHECKPOINTS).is_dir():
        return path, None
    if absolute.parent.name == CHECKPOINTS and absolute.name.isdecimal():
        return absolute.parent.parent, int(absolute.name)
    if not (path / CHECKPOINTS).is_dir():
        return path, None
    return path, _newest_step(path)


def _newest_step(path: AnyPath) -> int:
    """The newest complete step of a training workdir."""
    step, defects = newest_complete(path, (PARAMS,))
    if defects and step is not None:
        warn_once(f"{describe_defects(path, defects)}; step {step} is used")
    if step is None:
        why = f": {describe_defects(path, defects)}" if defects else ""
        raise CheckpointError(
            f"{path} is a training workdir without a complete checkpoint{why}; wait for the first"
            " one, or continue the training"
        )
    return step


def _what_instead(path: Path) -> str:
    """Describes what a directory without model.json seems to be."""
    if (path / CHECKPOINTS).is_dir():
        return f"it is a training workdir without {MODEL_FILE}; start its training again"
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists():
        return (
            "it looks like a Hugging Face directory; convert it first:"
            f" python -m convert.to_jax {path} OUT_DIR"
        )
    if path.name.endswith(".partial") or (path / PARAMS).is_dir():
        return "it was left by an interrupted conversion; run the conversion again"
    names = sorted(entry.name for entry in path.iterdir())
    return f"no {MODEL_FILE} among its {len(names)} entries {names[:6]}"


def read_model_json(path: Path) -> ModelDir:
    """Reads `model.json` without checking the rest of the directory; see `read_model_dir`."""
    file = path / MODEL_FILE
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); convert it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f'{file} must say "format": "{FORMAT}"; expected a vl2jax checkpoint')
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version {content.get('format_version')!r}; this program reads"
            f" {FORMAT_VERSION}: update vl2jax"
        )
    try:
        return ModelDir(
            path=path,
            config=VL2Config.from_hf(content["config"]),
            dtype=content["dtype"],
            source_dtype=content["source_dtype"],
            source_dtypes=dict(content.get("source_dtypes", {})),
            dropped=list(content.get("dropped", [])),
        )
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: missing or malformed entry ({error}); convert it again"
        ) from error


def flatten(tree: Any) -> dict[str, Any]:
    """Flattens a tree to a dict by path: {"params/decoder/norm/scale": leaf, ...}."""
    import jax

    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def flat_shapes(tree: Any) -> dict[str, Shape]:
    """Shapes of a tree of arrays or `ShapeDtypeStruct`s by path, for `load_params`."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def load_params(
    path: str | os.PathLike | AnyPath,
    expected: Mapping[str, Shape] | None = None,
    *,
    dtype: Any = None,
    shardings: Any = None,
    quantize: str | None = None,
    on_leaf: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Loads the parameters of a model, one parameter at a time.

    Args:
      path: the `params` directory of a model (`ModelDir.params`).
      expected: expected shapes by path.  All differences are reported in one error, before any
        parameter is read.  None: load what is stored.
      dtype: floating-point parameters are cast to it; None: they keep their stored dtype.  The
        `router` collection is always float32.
      shardings: a tree like the result with a `jax.sharding.Sharding` per leaf; the shard of each
        device is read from disk separately.  None: everything is on the default device.
      quantize: "int8": each weight in `quantization.CONTRACTED_AXES` is quantised to `Int8` as soon
        as it is read, from its stored values.  None: no quantisation.
      on_leaf: called with the path and the bytes of each parameter once it is on its devices.

    Returns:
      {"params": {...}, "router": {...}} of `jax.Array`, or `Int8` for quantised weights.

    Raises:
      CheckpointError: the parameters do not match `expected`, or the stored data is damaged.
    """
    import jax

    from vl2jax.model.quantization import contracted_axes

    store = ParamStore(user_path(path, "parameters"))
    if expected is not None:
        store.check(expected)
    by_path = {} if shardings is None else flatten(shardings)
    result: dict[str, Any] = {"params": {}, "router": {}}
    for name in store.paths:
        is_router = name.startswith("router/")
        stored = store.open(name)
        is_float = stored.dtype.numpy_dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
        wanted = np.float32 if is_router else dtype if is_float else None
        axes = contracted_axes(name) if quantize == "int8" and is_float else None
        if axes is None:
            leaf = read_leaf(stored, wanted, by_path.get(name))
        else:
            leaf = read_int8(stored, axes, by_path.get(name))
        jax.block_until_ready(leaf)
        *parents, last = name.split("/")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
        if on_leaf is not None:
            on_leaf(name, sum(part.nbytes for part in jax.tree.leaves(leaf)))
    return result


def read_leaf(stored, dtype: Any = None, sharding: Any = None):
    """Reads one parameter onto its devices.

    Args:
      stored: the parameter, from `ParamStore.open`.
      dtype: dtype to cast to; None: the stored dtype.
      sharding: target sharding; each chunk that this process needs is read once.  None: the
        default device.
    """
    import jax

    if sharding is None:
        return jax.device_put(read_array(stored, dtype=dtype), may_alias=True)
    shape = tuple(stored.shape)

    def key(index: Any) -> tuple:  # index: one slice per axis
        return tuple(part.indices(size) for part, size in zip(index, shape, strict=True))

    wanted = {
        key(index): index for index in sharding.addressable_devices_indices_map(shape).values()
    }
    parts = dict(zip(wanted, read_parts(stored, list(wanted.values()), dtype), strict=True))
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[key(index)])


def read_int8(stored, axes: tuple[int, ...], sharding: Any = None):
    """Reads one weight and quantises it on its devices, from its stored values.

    If a stack of layers is stored with one layer per chunk, it is read and quantised one layer at a
    time, so that no more than one layer is in memory in the stored dtype.

    Args:
      stored: the weight, from `ParamStore.open`.
      axes: the axes that matrix products sum over.
      sharding: sharding of the weight; each device quantises its shard.  None: the default device.

    Returns:
      An `Int8`.
    """
    import jax
    import tensorstore as ts

    from vl2jax.model.quantization import layer_quantizer, quantizer

    if 0 in axes or stored.chunk_layout.read_chunk.shape[0] > 1:
        return quantizer(axes, sharding)(read_leaf(stored, sharding=sharding))
    empty, put = layer_quantizer(axes, sharding)
    stack = empty(tuple(stored.shape))
    for number in range(stored.shape[0]):
        layer = stored[number : number + 1][ts.d[0].translate_to[0]]
        stack = put(stack, read_leaf(layer, sharding=sharding), np.int32(number))
        jax.block_until_ready(stack)
    return stack
