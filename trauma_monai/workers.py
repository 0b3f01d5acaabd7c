"""Independent jobs in processes: one after the other here, on all cores, or on a Dask cluster."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import dask
from dask.distributed import Client, KilledWorker, LocalCluster, as_completed
from dask.system import CPU_COUNT
from distributed import Worker, WorkerPlugin

__all__ = ["run_jobs"]

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")

LOCAL_DASK: dict[str, Any] = {
    # A worker holds one series and no next one, so that a series which kills it is told from those that wait.
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.allowed-failures": 1,
    # Dask's own MALLOC_TRIM_THRESHOLD_ returns memory at every slice, and getting it back takes longer than decoding.
    "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": 1},
}
"""Settings of the local cluster. It has no memory limit either: Dask would restart a worker for a long series."""


def run_jobs(
    do: Callable[[Job], Outcome],
    jobs: Sequence[Job],
    workers: int | None,
    scheduler: str | None,
    when_killed: Outcome,
) -> Iterator[tuple[int, Outcome]]:
    """Do all jobs, in any order.

    Args:
        do: what is done for a job; a function of a module, that processes can find. What it raises ends the run.
        jobs: small, for they travel.
        workers: processes; all cores by default. With 1 everything runs in this process.
        scheduler: address of a Dask scheduler, to use its workers in place of own ones.
        when_killed: outcome of a job that takes its process along, again and again: a decoder that crashes, or memory
            that ran out. The other jobs go on.

    Yields:
        The index of a job, and its outcome.
    """
    workers = min(workers or CPU_COUNT, max(len(jobs), 1))
    if scheduler is None and workers == 1:
        yield from ((index, do(job)) for index, job in enumerate(jobs))
        return
    with _dask_client(workers, scheduler) as client:
        index_of = {future: index for index, future in enumerate(client.map(do, jobs, pure=False))}
        for future in as_completed(index_of, raise_errors=False):
            index, error = index_of.pop(future), future.exception()
            if error is not None and not isinstance(error, KilledWorker):
                raise error
            yield index, when_killed if error is not None else future.result()


class _IgnoreInterrupts(WorkerPlugin):
    """Ctrl-C reaches every process of the terminal; the one that answers it stops the workers."""

    def setup(self, worker: Worker) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _dask_client(workers: int, scheduler: str | None) -> Iterator[Client]:
    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
        return
    with (
        dask.config.set(LOCAL_DASK),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(_IgnoreInterrupts())
        yield client
