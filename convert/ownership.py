"""What the conversion wrote, and therefore may replace."""

import os
from pathlib import Path

from vl2jax.checkpoints import model_dir as checkpoint
from vl2jax.checkpoints.completeness import MARKER, PARAMS
from vl2jax.common.json_file import parse_object

STAGING = ".vl2jax-conversion"  # a file that marks a directory of an unfinished conversion
_OWN = frozenset(
    [
        *(checkpoint.MODEL_FILE, MARKER, PARAMS, STAGING),
        *(*checkpoint.REQUIRED_FILES, *checkpoint.OPTIONAL_FILES),
    ]
)
_OF_ORBAX = (
    "_",
    "d",
    "array_metadatas",
    "manifest.ocdbt",
    "ocdbt.process_",
    "commit_",
)  # how names begin


def not_ours(path: Path) -> str | None:
    """Looks for what makes a directory more or less than a converted model.

    A training workdir, and a model beside other files, are not what the conversion wrote.

    Args:
      path: an existing directory.

    Returns:
      The reason, as a phrase; None if the conversion wrote all of it.
    """
    names = sorted(entry.name for entry in path.iterdir())
    foreign = [name for name in names if name not in _OWN]
    if not foreign and (path / PARAMS).is_dir():
        foreign = _foreign_params(path)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        return f"has {', '.join(foreign[:3])}{more}, which no conversion wrote"
    absent = [name for name in (checkpoint.MODEL_FILE, PARAMS) if name not in names]
    if absent:
        return f"has no {absent[0]}, so it is not a converted model"
    return None


def _foreign_params(path: Path) -> list[str]:
    """Files among the parameters that the conversion did not write."""
    found = [
        Path(folder, name).relative_to(path).as_posix()
        for folder, _, names in os.walk(path / PARAMS)
        for name in names
    ]
    try:
        listed = parse_object((path / MARKER).read_bytes())["files"]
        return sorted(name for name in found if name not in listed)
    except (OSError, ValueError, KeyError, TypeError):  # from before there was a marker
        return sorted(name for name in found if not name.split("/")[1].startswith(_OF_ORBAX))
