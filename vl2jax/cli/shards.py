"""Decides whether several processes share the rows or answer every row together.

This depends on the size of the mesh.  If it fits the devices of one process, each process makes its
own mesh and answers its share of the rows.  A larger mesh spans all processes: they run the same
programs on the same rows, and process 0 writes the answers.
"""

import argparse
import dataclasses

import jax

from vl2jax.common.errors import UserError
from vl2jax.parallel.processes import DistributedOptions, assert_equal_across_processes
from vl2jax.parallel.sharding import parse_mesh, read_mesh


@dataclasses.dataclass(frozen=True)
class Shard:
    """The mesh of this process and its share of the rows.

    Attributes:
      mesh: mesh of the parameters; None: the default device.
      index, count: this process answers the rows `index`, `index + count`, ...
    """

    mesh: jax.sharding.Mesh | None
    index: int = 0
    count: int = 1

    @property
    def together(self) -> bool:
        """Whether all processes answer the same rows together."""
        return self.count < jax.process_count()


def add_distributed_flags(parser: argparse.ArgumentParser, whole) -> None:
    """Adds the flags of `jax.distributed`, the same as in train.py.

    Args:
      parser: parser to add them to.
      whole: `command.whole`.
    """
    add = parser.add_argument
    add("--distributed", action="store_true", help="join the processes of this SLURM, GKE, TPU job")
    add("--coordinator", default="", metavar="HOST:PORT", help="address of process 0")
    add("--num_processes", type=whole(1), default=-1, metavar="N", help="number of processes")
    add("--process_id", type=whole(0), default=-1, metavar="I", help="id of this process, from 0")
    add("--join_timeout", type=whole(1), default=300, metavar="S", help="seconds to wait (300)")


def read_distributed_options(args: argparse.Namespace) -> DistributedOptions:
    """Reads the flags of `add_distributed_flags`.

    Raises:
      UserError: a flag needs another one.
    """
    return DistributedOptions(
        auto=args.distributed,
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        timeout=args.join_timeout,
    )


def check_same_flags(args: argparse.Namespace) -> None:
    """Compares the flags of all processes, but for those that belong to one process.

    Raises:
      UserError: the flags of two processes differ.
    """
    own = ("process_id", "join_timeout")
    same = {name: str(value) for name, value in vars(args).items() if name not in own}
    assert_equal_across_processes(same, "flags")


def choose_shard(mesh: str, *, rows: bool) -> Shard:
    """Makes the mesh of `--mesh` and chooses the rows of this process.

    Args:
      mesh: the flag; "": the default device of each process.
      rows: whether there are many rows, which processes can share; if not, all processes answer the
        same prompt together.

    Raises:
      UserError: the mesh does not fit the devices, or several processes have one prompt and no
        mesh.
    """
    processes, local = jax.process_count(), jax.local_device_count()
    if processes == 1:
        return Shard(read_mesh(mesh))
    if not mesh and not rows:
        raise UserError(
            f"{processes} processes answer one prompt together and need a mesh of all their"
            f" {jax.device_count()} devices; give --mesh, for example expert={jax.device_count()},"
            " or start only one process"
        )
    if rows and parse_mesh(mesh)[1] <= local:
        own = read_mesh(mesh, jax.local_devices())
        return Shard(own, jax.process_index(), processes)
    return Shard(read_mesh(mesh))
