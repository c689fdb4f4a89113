"""The processes of a command: those of a job that torchrun or srun started, or one per GPU that it starts itself."""

import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from detectron2.utils import comm

from d2distill.common.engine.cli import debugging, exit_with_error, user_errors, user_message
from d2distill.common.engine.job import Job
from d2distill.common.engine.peers import Peers, RankEndedError, naming_ended_rank, watch_peers
from d2distill.common.engine.preemption import Preemption
from d2distill.common.errors import ConfigError

#: For the slowest node to start.
_TIMEOUT = timedelta(minutes=30)
#: Keys of the job's store: the part that rank 0 has opened; in there, how many processes have had something to say.
_ATTEMPT, _ERRORS = "d2distill_attempt", "d2distill_user_errors"
#: Exit codes of trainings that were asked to stop, and have saved.
_SAVED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


@contextmanager
def join_job() -> Iterator[None]:
    """Take part in the job that torchrun, or srun with several tasks, started; does nothing if none did.

    A user error inside is printed by the first rank that has it. The others, where it occurs too or where communication
    then fails, exit silently with the same code 2: one line in all. torchrun adds its own report and exits with 1; no
    worker can prevent that.
    """
    job = Job.from_environ()
    if job is None:
        yield
        return
    store = _connect(job)
    try:
        with _one_error(store, job.rank), naming_ended_rank():
            init_distributed(job, store)
            yield
            # No rank leaves while others still communicate with it.
            comm.synchronize()
    finally:
        watch_peers(None)
        comm._LOCAL_PROCESS_GROUP = None
        if dist.is_initialized():
            dist.destroy_process_group()


def processes_to_start(num_gpus: int, num_machines: int = 1) -> int:
    """How many processes :func:`launch` has to start here; 0 if this one is enough, or is one of a job."""
    if dist.is_initialized():
        return 0
    found = torch.cuda.device_count()
    if num_gpus > max(found, 1):
        raise ConfigError(
            f"--num-gpus {num_gpus}, but this machine has {found} GPU{'s' * (found != 1)}; "
            "for several processes on CPUs use torchrun --nproc-per-node N"
        )
    return max(num_gpus, 1) if num_gpus > 1 or num_machines > 1 else 0


def launch(
    main: Callable[..., object],
    arguments: tuple[Any, ...],
    processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> None:
    """Run ``main(*arguments)`` in so many processes of this machine, each with a GPU of its own, as torchrun does.

    Detectron2's function hands no signal on, and ends the others at once where one has died, before they can say so.

    Raises:
        SystemExit: with the code of the first process that failed; after a signal to stop, 128 + its number.
    """
    host, port = _address(dist_url, num_machines)
    store = _store(host, port, is_master=machine_rank == 0)
    environ = {"WORLD_SIZE": processes * num_machines, "MASTER_ADDR": host, "MASTER_PORT": store.port}
    context, children = multiprocessing.get_context("spawn"), []
    for local_rank in range(processes):
        given = {**environ, "RANK": machine_rank * processes + local_rank, "LOCAL_RANK": local_rank}
        children.append(context.Process(target=_child, args=(given, main, *arguments)))
    signals = Preemption()
    signals.install()
    resource_tracker.ensure_running()  # whose start resets the mask
    # Ctrl-C reaches all processes of a terminal: the children inherit that they leave it to this one.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for child in children:
            child.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        failed = _wait(children, signals)
    finally:
        for child in filter(lambda child: child.pid, children):
            child.kill()
        signals.remove()
    if failed is None:
        return
    code = children[failed].exitcode
    if signals.requested == signal.SIGINT and code == -signal.SIGTERM:  # nothing was there to save
        raise KeyboardInterrupt
    if signals.requested and code in (*_SAVED, -signal.SIGTERM):
        raise SystemExit(128 + signals.requested)
    if code < 0:
        with suppress(dist.DistError):
            attempt = store.get(_ATTEMPT).decode() if store.check([_ATTEMPT]) else ""
            if dist.PrefixStore(attempt, store).add(_ERRORS, 1) == 1:
                rank = machine_rank * processes + failed
                print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    raise SystemExit(code if code > 0 else 128 - code)


def _wait(children: list[SpawnProcess], signals: Preemption) -> int | None:
    """Wait for all to end, and return which was the first that failed.

    SIGTERM and Ctrl-C are handed on. After a failure the others have 10 seconds to see that a connection is broken.
    """
    failed, told, deadline = None, False, float("inf")
    while running := [child for child in children if child.is_alive()]:
        connection.wait([child.sentinel for child in running], 0.1)
        if signals.requested and not told:
            told = True
            for child in running:
                child.terminate()
        if failed is None:
            failed = _first_failed(children)
            if failed is not None and not told and children[failed].exitcode not in _SAVED:
                deadline = time.monotonic() + 10
        if time.monotonic() > deadline:
            for child in running:
                child.kill()
    return _first_failed(children) if failed is None else failed


def _first_failed(children: list[SpawnProcess]) -> int | None:
    return next((index for index, child in enumerate(children) if child.exitcode), None)


def _address(dist_url: str, num_machines: int) -> tuple[str, int]:
    """Host and port of machine 0; port 0 is any free one."""
    url = urlsplit(dist_url)
    if url.scheme == "tcp":
        return url.hostname, url.port
    if num_machines > 1:
        raise ConfigError(f"--dist-url {dist_url}: several machines need tcp://HOST:PORT, of machine 0")
    return "127.0.0.1", 0


def _connect(job: Job) -> dist.Store:
    """The store by which the processes of a job find each other; that of this attempt alone.

    torchrun keeps its store when it starts the processes again after one has died, and each node counts its restarts
    for itself. So rank 0 opens a new part of it, and the others join that one in which it has seen them.
    """
    os.environ.update(MASTER_ADDR=job.master_addr, MASTER_PORT=str(job.master_port))
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _store(job.master_addr, job.master_port, is_master=job.rank == 0 and not hosted)
    own = uuid.uuid4().hex
    if job.rank == 0:
        store.set(_ATTEMPT, own)
        part = dist.PrefixStore(own, store)
        part.set("all", " ".join(part.get(str(rank)).decode() for rank in range(1, job.world_size)))
        return part
    while True:
        part = dist.PrefixStore(store.get(_ATTEMPT).decode(), store)
        part.set(str(job.rank), own)
        if part.check(["all"]) and own in part.get("all").decode():
            return part
        time.sleep(0.05)


def _store(host: str, port: int, is_master: bool) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            host, port, is_master=is_master, wait_for_workers=False, timeout=_TIMEOUT, multi_tenant=True
        )
    except (dist.DistError, ValueError) as error:
        what = "rank 0 cannot listen at" if is_master else "there is no rank 0 at"
        raise ConfigError(
            f"{what} {host}:{port} ({str(error).splitlines()[0]}): set MASTER_ADDR, MASTER_PORT or --dist-url to the "
            "machine of rank 0 and a free port"
        ) from error


def init_distributed(job: Job, store: dist.Store) -> None:
    """Initialize torch.distributed and Detectron2's `comm` for this process of a job."""
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=job.rank, world_size=job.world_size)
    # Detectron2's own function takes nodes in order and of one size only.
    nodes, pids = zip(*comm.all_gather((job.node, os.getpid())), strict=True)
    others = [rank for rank in range(job.world_size) if rank != job.rank]
    watch_peers(Peers(store, {rank: pids[rank] if nodes[rank] == job.node else None for rank in others}))
    if gpu:
        torch.cuda.set_device(job.device_index(torch.cuda.device_count(), nodes.count(job.node)))
    for node in sorted(set(nodes)):
        group = dist.new_group([rank for rank, other in enumerate(nodes) if other == node])
        if node == job.node:
            comm._LOCAL_PROCESS_GROUP = group


def _child(environ: Mapping[str, object], main: Callable[..., object], *arguments: object) -> None:
    os.environ.update({name: str(value) for name, value in environ.items()}, TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        with user_errors(), join_job():
            main(*arguments)
    except SystemExit as end:
        # Threads of torch's stores may abort the interpreter's end, which would replace the exit code by SIGABRT's.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


@contextmanager
def _one_error(store: dist.Store, rank: int = 0) -> Iterator[None]:
    """End this process after a user error, and print it if no process of this `store` had one before."""
    try:
        yield
    except Exception as error:
        mine = user_message(error) is not None
        try:
            earlier = store.add(_ERRORS, int(mine)) > mine
        except dist.DistError:
            # Rank 0, which hosts the store, has ended: it has printed why, or was killed, which one other says.
            earlier = rank != 1 or not isinstance(error, RankEndedError)
        if earlier:
            time.sleep(1)  # the end of this process may be the end of all: the first one prints before
            if not mine and not debugging():
                raise SystemExit(2) from None  # a consequence of the other's end
        exit_with_error(error, silent=earlier)
