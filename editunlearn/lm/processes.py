"""Several processes at one piece of work, started by torchrun or by Slurm's srun; one process needs none of this."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

from editunlearn.errors import EditUnlearnError

T = TypeVar("T")
PORTS = (29500, 1000)
"""Where the processes of a Slurm job meet: the first port, and how many of them; the job's number chooses."""
PATIENCE = timedelta(days=2)
"""How long a process waits for the others: the first one may train alone for hours."""


@dataclass(frozen=True)
class Processes:
    """The place of this process among those that share the work.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number among those on the same machine, which is that of its GPU.
        store: where the processes leave notes to each other; None: there are no others.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Any = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``world``-th item, beginning with number ``rank``."""
        return items[self.rank :: self.world]

    def union(self, mine: Sequence[str]) -> set[str]:
        """All that any process names."""
        if self.world == 1:
            return set(mine)
        return {one for of_process in self.each(lambda: list(mine)) for one in of_process}

    def each(self, make: Callable[[], T]) -> list[T]:
        """What each process makes, by its number; all of them get all of it.

        Raises:
            Exception: what one of them raised, in all of them, so that none waits for ever.
            EditUnlearnError: one of them is not there any more.
        """
        if self.world == 1:
            return [make()]
        from torch import distributed

        try:
            mine: tuple[Any, Exception | None] = (make(), None)
        except Exception as error:
            mine = (None, error)
        every: list[Any] = [None] * self.world
        try:
            distributed.all_gather_object(every, mine)
        except RuntimeError as error:  # the connection to one of them is gone
            if mine[1] is not None and not isinstance(mine[1], distributed.DistError):
                raise mine[1] from error
            raise EditUnlearnError(
                f"another of the {self.world} processes has ended. Finished work is kept; run the same command again "
                "to go on."
            ) from error
        for _, raised in every:
            if raised is not None:
                raise raised
        return [made for made, _ in every]

    def by_first(self, make: Callable[[], T]) -> T:
        """What the first process makes while the others wait; all of them get it."""
        made: list[Any] = self.each(make if self.first else _nothing)
        return made[0]  # type: ignore[no-any-return]

    def together(self, items: Sequence[T], make: Callable[[Sequence[T]], Sequence[Any]]) -> list[Any]:
        """What ``make`` finds for each of the items, parallel to them; each process looks at its share."""
        found: list[Any] = [None] * len(items)
        for rank, part in enumerate(self.each(lambda: list(make(self.share(items))))):
            found[rank :: self.world] = part
        return found

    def dealt(
        self, name: str, items: Sequence[T], make: Callable[[T], Any], begun: Callable[[int], None] | None = None
    ) -> list[Any]:
        """What ``make`` finds for each of the items, parallel to them; each goes to the process that is free first.

        Nothing is kept of who has which: after a crash the work is dealt anew.

        Args:
            name: of this work, which no other has.
            begun: gets how many more items the processes have come to, whenever this one has made one.

        Raises:
            Exception: what one of them raised, in all of them, when the others have made the rest.
        """

        def mine() -> dict[int, Any]:
            found: dict[int, Any] = {}
            seen = 0
            for number in self._turns(name, len(items)):
                found[number] = make(items[number])
                if begun is not None:
                    begun(number + 1 - seen)
                seen = number + 1
            if begun is not None:
                begun(len(items) - seen)
            return found

        together = {number: made for part in self.each(mine) for number, made in part.items()}
        return [together[number] for number in range(len(items))]

    def _turns(self, name: str, count: int) -> Iterator[int]:
        """Numbers below ``count``, each to one of the processes, in the order in which they ask."""
        if self.world == 1:
            yield from range(count)
            return
        while (number := self.store.add(f"dealt/{name}", 1) - 1) < count:
            yield number

    def add(self, tensor: Any) -> Any:
        """The sum of a tensor over all processes, in place."""
        if self.world > 1:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor


def _nothing() -> None:
    return None


def launched(environment: Mapping[str, str] | None = None) -> Processes:
    """What the launcher says: torchrun's RANK and WORLD_SIZE, or those of a Slurm step."""
    env = os.environ if environment is None else environment
    if int(env.get("WORLD_SIZE", "1")) > 1:
        rank = int(env["RANK"])
        return Processes(rank, int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", rank)))
    # A shell inside of an allocation has SLURM_NTASKS, too; only a step that srun started has a number.
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Processes(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", "0")))
    return Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Inside, this process can talk to the others launched with it; each has a GPU of its own, if there are any."""
    here = launched()
    if here.world == 1:
        yield here
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
    first, many = PORTS
    address = os.environ.get("MASTER_ADDR") or os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT") or str(first + int(os.environ.get("SLURM_JOB_ID", "0")) % many)
    # Sums are exchanged as they lie: those of sites on a GPU through NCCL, others through gloo.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, *_ = next(rendezvous(f"tcp://{address}:{port}", here.rank, here.world, timeout=PATIENCE))
    store.set_timeout(PATIENCE)
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore("group", store),  # type: ignore[attr-defined]
        rank=here.rank,
        world_size=here.world,
        timeout=PATIENCE,
    )
    try:
        yield replace(here, store=distributed.PrefixStore("editunlearn", store))  # type: ignore[attr-defined]
    finally:
        distributed.destroy_process_group()
