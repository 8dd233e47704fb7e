"""The model directory: one directory is a whole model.

model.json          architecture (the original's schema), dtypes, what conversion left out
tokenizer.json ...  tokenizer and processor files as the original has them
params/             the parameters, an Orbax checkpoint

A training workdir is one too: in place of params/ it has checkpoints/STEP/params, and stands for
its newest step.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vl2jax.checkpoints.store import CheckpointError, ParamStore, Shape, read_array
from vl2jax.config import ConfigError, VL2Config

MODEL_FILE = "model.json"
PARAMS = "params"
CHECKPOINTS = "checkpoints"
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
    """What `model.json` says.

    Attributes:
      path: the directory with `model.json`, tokenizer and processor files.
      config: the architecture.
      dtype: what the parameters are stored as, for the most part: "float32" or "bfloat16".
      source_dtype: what the original tensors were, for the most part.
      source_dtypes: original tensor name -> dtype, where it differs from `source_dtype`.
      dropped: original tensors that conversion left out: [{"tensors": [...], "reason": ...}].
      step: the training step whose parameters are meant; None if it is not a training workdir.
    """

    path: Path
    config: VL2Config
    dtype: str
    source_dtype: str
    source_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dropped: Sequence[Mapping[str, Any]] = ()
    step: int | None = None

    @property
    def params(self) -> Path:
        return self.address / PARAMS

    @property
    def address(self) -> Path:
        """What `read_model_dir` reads this from again, even if training has gone on since."""
        return self.path if self.step is None else self.path / CHECKPOINTS / str(self.step)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file so that a crash leaves the old one or the new one, never a part."""
    text = json.dumps(content, indent=1) + "\n"
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_model_json(model: ModelDir) -> None:
    """Writes `model.json`; comes last, for a directory without it is not a model."""
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


def complete_steps(workdir: Path) -> list[int]:
    """Steps of a training workdir that are wholly saved, in order.

    A checkpoint gets its name only when it is whole.
    """
    directory = workdir / CHECKPOINTS
    if not directory.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in directory.iterdir()
        if entry.name.isdecimal() and (entry / PARAMS).is_dir()
    )


def read_model_dir(path: str | os.PathLike) -> ModelDir:
    """Reads and checks what a model directory says about itself.

    Args:
      path: the output of `convert.to_jax`, a training workdir (its newest complete step), or one
        step of it (WORKDIR/checkpoints/500).

    Raises:
      CheckpointError: there is no such directory, or it is not a whole vl2jax model.
    """
    path = Path(path).expanduser()
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
        fix = "convert it again" if step is None else "copy what the model has that it began with"
        raise CheckpointError(f"{path} is not whole: {', '.join(absent)} missing; {fix}")
    return model


def _step_of(path: Path) -> tuple[Path, int | None]:
    """The directory with model.json, and the step if it is a training workdir."""
    absolute = Path(os.path.abspath(path))
    if (path / MODEL_FILE).is_file() and not (path / CHECKPOINTS).is_dir():
        return path, None
    if absolute.parent.name == CHECKPOINTS and absolute.name.isdecimal():
        return absolute.parent.parent, int(absolute.name)
    if not (path / CHECKPOINTS).is_dir():
        return path, None
    steps = complete_steps(path)
    if not steps:
        raise CheckpointError(
            f"{path} is a training workdir without a complete checkpoint yet; wait for the first"
            " one, or train on"
        )
    return path, steps[-1]


def _what_instead(path: Path) -> str:
    """Says what a directory without model.json seems to be."""
    if (path / CHECKPOINTS).is_dir():
        return f"a training workdir that lost its {MODEL_FILE}; start its training again"
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
    """Reads `model.json` alone; see `read_model_dir`."""
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
        raise CheckpointError(f"{file} lacks or garbles {error}; convert it again") from error


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a nested dict by path: {"params/decoder/norm/scale": leaf, ...}."""
    import jax

    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def flat_shapes(tree: Any) -> dict[str, Shape]:
    """Shapes of a tree of arrays or `ShapeDtypeStruct`s by path, as `load_params` wants them."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def load_params(
    path: str | os.PathLike,
    expected: Mapping[str, Shape] | None = None,
    *,
    dtype: Any = None,
    shardings: Any = None,
    quantize: str | None = None,
    on_leaf: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Reads the parameters of a model leaf by leaf.

    Args:
      path: the `params` directory of a model (`ModelDir.params`).
      expected: path -> shape of the model; differences are reported all at once before anything
        is read.  None takes what is there.
      dtype: floating-point parameters are cast to it; stored as they are if None.  The `router`
        collection stays float32.
      shardings: tree like the result with a `jax.sharding.Sharding` per leaf; each device's part
        is read from the disk by itself.  None puts everything on the default device.
      quantize: "int8": the weights in `quantization.CONTRACTED_AXES` become `Int8`, each as soon as
        it is read.
      on_leaf: called with the path and the bytes of each leaf once it is on the device.

    Returns:
      {"params": {...}, "router": {...}} of `jax.Array`s.

    Raises:
      CheckpointError: the parameters do not fit `expected` or are damaged.
    """
    import jax

    from vl2jax.model.quantization import contracted_axes

    store = ParamStore(Path(path))
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
    """Reads one parameter onto its device or devices.

    Args:
      stored: from `ParamStore.open`.
      dtype: cast to it; the stored one if None.
      sharding: where it goes, each device's part read by itself; None: the default device.
    """
    import jax

    if sharding is None:
        return jax.device_put(read_array(stored, dtype=dtype), may_alias=True)
    parts: dict[tuple, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:  # a slice for each axis
        key = tuple(piece.indices(size) for piece, size in zip(index, stored.shape, strict=True))
        if key not in parts:  # devices that hold the same part share one read
            parts[key] = read_array(stored, index, dtype)
        return parts[key]

    return jax.make_array_from_callback(tuple(stored.shape), sharding, part)


def read_int8(stored, axes: tuple[int, ...], sharding: Any = None):
    """Reads one weight and quantises it where it lies, from what is stored.

    A stack that is stored layer by layer is read and quantised so: of the stored weights no more
    than one layer's is on a device, or in memory, at a time.

    Args:
      stored: from `ParamStore.open`.
      axes: that its products sum over.
      sharding: see `read_leaf`; each device quantises its part.

    Returns:
      A `quantize.Int8`.
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
