"""Run cells in processes of this machine or on a Dask cluster. Both are `concurrent.futures` executors."""

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
    """Workers that run requests.

    Attributes:
        submit: `submit(request, seconds)` returns a `concurrent.futures.Future` of `Worker.run`.
        alive: whether requests can still be submitted.
        dashboard_link: the address of the scheduler's dashboard, "" if it has none.
    """

    submit: Callable[[dict[str, Any], float], Future]
    alive: Callable[[], bool]
    dashboard_link: str = ""


def open_workers(scheduler: str, count: int, resources: dict[str, float]) -> contextlib.AbstractContextManager[Workers]:
    """Open `count` workers, which the context manager closes.

    Args:
        scheduler: "" for processes of this machine; `dask` for a Dask cluster on it; a queue of `QUEUES` for a
            cluster that is started there with the user's Dask configuration; or the address of a running scheduler, which
            has workers of its own, so that `count` is not used.
        resources: what a cell occupies.

    Raises:
        InputError: no such scheduler, one that does not answer, or more resources than this machine has.
    """
    check_scheduler(scheduler)
    if not scheduler:
        return _local(_workers_that_fit(count, resources), resources)
    return _dask(scheduler, count, resources)


def check_scheduler(scheduler: str) -> None:
    """Raise `InputError` if there is no such scheduler, or if a package that it needs is not installed."""
    if scheduler and "://" not in scheduler:
        one_of("scheduler", scheduler, ("dask", *QUEUES, "tcp://HOST:PORT"))
    if scheduler:
        import_optional("distributed", "dask")
    if scheduler in QUEUES:
        import_optional("dask_jobqueue", "dask")


@contextlib.contextmanager
def _local(count: int, resources: dict[str, float]) -> Iterator[Workers]:
    """Threads, each with a worker process of its own."""
    local_state, lock = threading.local(), threading.Lock()
    all_workers: list[Worker] = []
    gpus_per_worker = int(resources.get("GPU", 0))

    def begin() -> None:
        with lock:
            gpus = range(len(all_workers) * gpus_per_worker, (len(all_workers) + 1) * gpus_per_worker)
            local_state.worker = Worker({"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {})
            all_workers.append(local_state.worker)

    pool = ThreadPoolExecutor(count, thread_name_prefix="cells", initializer=begin)
    try:
        yield Workers(
            lambda request, seconds: pool.submit(lambda: local_state.worker.run(request, seconds)), lambda: True
        )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in all_workers:
            worker.close()


def _workers_that_fit(count: int, resources: dict[str, float]) -> int:
    """How many of `count` workers this machine's memory and GPUs allow."""
    import torch

    available = {"memory": float(psutil.virtual_memory().total), "GPU": float(torch.cuda.device_count())}
    for name, amount in resources.items():
        available_amount = available[one_of("resource of this machine", name, available)]
        if amount > available_amount:
            raise InputError(f"resources: a cell needs {name} = {amount:g} and this machine has {available_amount:g}")
        count = min(count, int(available_amount // amount))
    return count


@contextlib.contextmanager
def _dask(scheduler: str, count: int, resources: dict[str, float]) -> Iterator[Workers]:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(scheduler, count, resources, stack))
        executor: Executor = client.get_executor(
            pure=False, retries=0, **({"resources": resources} if resources else {})
        )
        yield Workers(
            lambda request, seconds: executor.submit(run_in_worker_process, request, seconds),
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
        worker_arguments = (
            ["--resources", " ".join(f"{name}={amount:g}" for name, amount in resources.items())] if resources else []
        )
        try:
            cluster = kind(processes=1, worker_extra_args=worker_arguments)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{scheduler}: {str(error)[:160]}; set the resources of a job under jobqueue.{scheduler} in ~/.config/dask/jobqueue.yaml"
            ) from None
        cluster.scale(jobs=count)
    stack.enter_context(cluster)
    return distributed.Client(cluster, set_as_default=False)


def run_in_worker_process(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run a request in a process of this Dask worker, so that a cell that hangs can be killed."""
    return _worker().run(request, seconds)


@functools.cache
def _worker() -> Worker:
    worker = Worker()
    atexit.register(worker.close)
    return worker
