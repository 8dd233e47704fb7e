"""Writes synthetic samples as image files and JSON in the format of LLaVA.

    python -m vl2jax.synthetic --out DIR -n 20 [--split train] [--seed 0]

DIR/data.json is a list of {"id", "image", "conversations"}.  `image` is a path relative to DIR, or
a list of paths if a sample has several images; a sample without image has no `image`.
"""

import json
from pathlib import Path
from typing import Any

from vl2jax.cli.command import Parser, run_cli, whole
from vl2jax.common.errors import UserError
from vl2jax.common.paths import path_flag
from vl2jax.processing.image import load_image
from vl2jax.synthetic.scene import ALLOWED
from vl2jax.synthetic.source import LENGTH, Synthetic

DATA, IMAGES = "data.json", "images"
_PREFIX = "synthetic_"
_SPEAKERS = {"user": "human", "assistant": "gpt"}


def write_llava(directory: Path, source: Synthetic, count: int, *, name: str) -> int:
    """Writes rows 0 to count - 1, and removes the files that an earlier call wrote.

    Args:
      directory: the directory; it is made if it does not exist.
      source: the rows.
      count: number of rows.
      name: prefix of the ids.

    Returns:
      Number of images.

    Raises:
      UserError: the directory has files that this function did not write.
    """
    images = directory / IMAGES
    for old in _own_files(directory):
        old.unlink()
    images.mkdir(parents=True, exist_ok=True)
    entries, written = [], 0
    for index in range(count):
        row, paths = source[index], []
        for number, picture in enumerate(row.images):
            paths.append(f"{IMAGES}/{_PREFIX}{index:06d}_{number}.png")
            load_image(picture).save(directory / paths[-1])
        written += len(paths)
        entries.append(_entry(f"{name}_{index}", paths, row.messages))
    text = json.dumps(entries, ensure_ascii=False, indent=1)
    (directory / DATA).write_text(text + "\n", encoding="utf-8")
    return written


def _entry(identity: str, paths: list[str], messages: Any) -> dict[str, Any]:
    image = {} if not paths else {"image": paths[0] if len(paths) == 1 else paths}
    turns = [
        {"from": _SPEAKERS[message["role"]], "value": message["content"]} for message in messages
    ]
    return {"id": identity, **image, "conversations": turns}


def _own_files(directory: Path) -> list[Path]:
    """Files that an earlier call wrote; raises UserError if there are others."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise UserError(f"{directory}: is a file; --out needs a directory")
    found = []
    for path in directory.iterdir():
        if path.name == DATA:
            found.append(path)
        elif path.name == IMAGES and path.is_dir():
            found += path.iterdir()
        else:
            raise UserError(
                f"{directory}: has {path.name}, which this program did not write; give a new"
                " directory"
            )
    for path in found:
        mine = path.name == DATA or (path.name.startswith(_PREFIX) and path.suffix == ".png")
        if not mine or not path.is_file():
            raise UserError(f"{path}: this program did not write it; give a new directory")
    if found and not (directory / DATA).exists():
        raise UserError(f"{directory}: has pictures but no {DATA}; give a new directory")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    return run_cli(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> None:
    parser = Parser("python -m vl2jax.synthetic", __doc__)
    add = parser.add_argument
    add("--out", type=path_flag(), required=True, help="directory to make")
    add("-n", type=whole(1, LENGTH), default=20, help="rows (default 20)")
    add("--split", default="train", help=", ".join(ALLOWED))
    add("--seed", type=whole(0), default=0, help="another seed gives other rows")
    args = parser.parse_args(arguments)
    source = Synthetic(args.split, args.seed)
    pictures = write_llava(args.out, source, args.n, name=f"{args.split}_{args.seed}")
    print(f"wrote {args.n} rows and {pictures} pictures: {args.out / DATA}")


if __name__ == "__main__":
    raise SystemExit(main())
