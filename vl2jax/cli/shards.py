"""Several processes that answer: all together on every row, or each by itself on its own rows.

Which of these it is, the mesh tells.  One whose sizes multiply to no more than the devices of one
process leaves the others free: each process has a mesh of its own and takes its share of the rows.
A larger one spans the processes: all run the same programs on the same rows, and process 0 writes.
"""

import argparse
import dataclasses

import jax

from vl2jax.common.errors import UserError
from vl2jax.parallel.processes import DistributedOptions
from vl2jax.parallel.sharding import parse_mesh, read_mesh


@dataclasses.dataclass(frozen=True)
class Shard:
    """This process's part in answering.

    Attributes:
      mesh: of the parameters; None: the default device has them.
      index, count: it answers every count-th row, from `index` on; all of them if `count` is 1.
    """

    mesh: jax.sharding.Mesh | None
    index: int = 0
    count: int = 1

    @property
    def together(self) -> bool:
        """Whether other processes answer the same rows, in step with this one."""
        return self.count < jax.process_count()


def add_distributed_flags(parser: argparse.ArgumentParser, whole) -> None:
    """Adds the flags by which processes find each other, as train.py has them.

    Args:
      whole: makes the type of a flag of whole numbers (`cli.whole`).
    """
    add = parser.add_argument
    add("--distributed", action="store_true", help="join the processes of this SLURM, GKE, TPU job")
    add("--coordinator", default="", metavar="HOST:PORT", help="of process 0, to join by hand")
    add("--num_processes", type=whole(1), default=-1, metavar="N", help="with --coordinator")
    add("--process_id", type=whole(0), default=-1, metavar="I", help="this one's, from 0")
    add("--join_timeout", type=whole(1), default=300, metavar="S", help="seconds to wait (300)")


def read_distributed_options(args: argparse.Namespace) -> DistributedOptions:
    """How the processes find each other.

    Raises:
      UserError: flags that need each other.
    """
    return DistributedOptions(
        auto=args.distributed,
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        timeout=args.join_timeout,
    )


def choose_shard(mesh: str, *, rows: bool) -> Shard:
    """Reads `--mesh`, and says what this process is to do.

    Args:
      mesh: the flag; "": the default device of a process.
      rows: there are many rows, which can be shared; else all processes answer the same prompt.

    Raises:
      UserError: sizes that do not fit, or no mesh where processes are to work on one prompt.
    """
    processes, local = jax.process_count(), jax.local_device_count()
    if processes == 1:
        return Shard(read_mesh(mesh))
    if not mesh and not rows:
        raise UserError(
            f"{processes} processes answer a prompt together, on a mesh of all their"
            f" {jax.device_count()} devices: give it, --mesh expert={jax.device_count()} or another"
            " of that size; or start one process"
        )
    if rows and parse_mesh(mesh)[1] <= local:
        own = read_mesh(mesh, jax.local_devices())
        return Shard(own, jax.process_index(), processes)
    return Shard(read_mesh(mesh))
