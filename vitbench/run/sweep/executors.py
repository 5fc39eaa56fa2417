"""Who runs the cells: processes of this machine, or a Dask cluster. Both are `concurrent.futures` executors."""

import atexit
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil

from vitbench.base.errors import InputError, import_optional, one_of
from vitbench.run.sweep.worker import Worker

QUEUES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "sge": "SGECluster", "lsf": "LSFCluster"}  # of dask-jobqueue
CONNECT_SECONDS = 30


@dataclass(frozen=True)
class Workers:
    """`submit(order, seconds)` gives a `concurrent.futures.Future` of `Worker.run`; `alive` says whether it still can.

    `link` is where the engine shows itself, "" for nowhere.
    """

    submit: Callable[[dict[str, Any], float], Future]
    alive: Callable[[], bool]
    link: str = ""


def open_workers(scheduler: str, count: int, resources: dict[str, float]) -> contextlib.AbstractContextManager[Workers]:
    """`count` workers, closed at the end.

    Args:
        scheduler: "" for processes of this machine; `dask` for a Dask cluster on it; a queue of `QUEUES` for one that is
            started there, as the user's Dask configuration says; or the address of a running one, whose workers count.
        resources: what a cell occupies.

    Raises:
        InputError: no such scheduler, one that does not answer, or resources that this machine does not have.
    """
    check_scheduler(scheduler)
    if not scheduler:
        return _local(_room(count, resources), resources)
    return _dask(scheduler, count, resources)


def check_scheduler(scheduler: str) -> None:
    """Raise `InputError` if there is no such scheduler, or if what it needs is not installed."""
    if scheduler and "://" not in scheduler:
        one_of("scheduler", scheduler, ("dask", *QUEUES, "tcp://HOST:PORT"))
    if scheduler:
        import_optional("distributed", "dask")
    if scheduler in QUEUES:
        import_optional("dask_jobqueue", "dask")


@contextlib.contextmanager
def _local(count: int, resources: dict[str, float]) -> Iterator[Workers]:
    """Threads, each with a worker process of its own."""
    own, every, lock = threading.local(), [], threading.Lock()
    cards = int(resources.get("GPU", 0))

    def begin() -> None:
        with lock:
            first = len(every) * cards
            shown = {"CUDA_VISIBLE_DEVICES": ",".join(str(first + i) for i in range(cards))} if cards else {}
            own.worker = Worker(shown)
            every.append(own.worker)

    pool = ThreadPoolExecutor(count, thread_name_prefix="cells", initializer=begin)
    try:
        yield Workers(lambda order, seconds: pool.submit(lambda: own.worker.run(order, seconds)), lambda: True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in every:
            worker.close()


def _room(count: int, resources: dict[str, float]) -> int:
    """How many workers of `count` this machine has room for."""
    import torch

    here = {"memory": float(psutil.virtual_memory().total), "GPU": float(torch.cuda.device_count())}
    for name, amount in resources.items():
        whole = here[one_of("resource of this machine", name, here)]
        if amount > whole:
            raise InputError(f"resources: a cell needs {name} = {amount:g} and this machine has {whole:g}")
        count = min(count, int(whole // amount))
    return count


@contextlib.contextmanager
def _dask(scheduler: str, count: int, resources: dict[str, float]) -> Iterator[Workers]:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(scheduler, count, resources, stack))
        executor: Executor = client.get_executor(
            pure=False, retries=0, **({"resources": resources} if resources else {})
        )
        yield Workers(
            lambda order, seconds: executor.submit(run_here, order, seconds),
            lambda: client.status == "running",
            client.dashboard_link or "",
        )


def _client(scheduler: str, count: int, resources: dict[str, float], stack: contextlib.ExitStack) -> Any:
    import distributed

    if "://" in scheduler:
        try:
            return distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise InputError(
                f"the scheduler {scheduler!r} does not answer ({str(error)[:120] or type(error).__name__}); start one with "
                "`dask scheduler` and workers with `dask worker`"
            ) from None
    if scheduler == "dask":
        cluster = distributed.LocalCluster(
            n_workers=count, threads_per_worker=1, resources=resources or None, dashboard_address="localhost:0"
        )
    else:
        kind = getattr(import_optional("dask_jobqueue", "dask"), QUEUES[scheduler])
        wanted = (
            ["--resources", " ".join(f"{name}={amount:g}" for name, amount in resources.items())] if resources else []
        )
        try:
            cluster = kind(processes=1, worker_extra_args=wanted)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{scheduler}: {str(error)[:160]}; say what a job gets under jobqueue.{scheduler} in ~/.config/dask/jobqueue.yaml"
            ) from None
        cluster.scale(jobs=count)
    stack.enter_context(cluster)
    return distributed.Client(cluster, set_as_default=False)


def run_here(order: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run an order in this Dask worker's own worker process, which a hanging cell can be killed with."""
    return _worker().run(order, seconds)


@functools.cache
def _worker() -> Worker:
    worker = Worker()
    atexit.register(worker.close)
    return worker
