"""The Ray cluster that workers live in: found by its address, or started on this machine."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from dspy_greater.errors import MissingExtraError, WorkerError

_ANSWER_SECONDS = 10.0  # for the head of a cluster
_CLIENT, _CLIENT_PORT = "ray://", "10001"  # for programs outside the cluster
_NOISE = "Ray Client connection timed out"  # Ray warns, and then raises
_LATE = "Initialization failure from server"  # a heading, above what went wrong there
_TOKEN = "RAY_AUTH_MODE"
_REFUSED = "AuthenticationError"  # somewhere in what Ray says of a token; old versions know none
_DETAILS = re.compile(r'details = "(.+?)"')  # in what gRPC says, between figures for its makers


def refuse_without_ray(workers: object = None) -> None:
    """Raises `MissingExtraError` where Ray is not installed, or what it needs for this address."""
    if find_spec("ray") is None:
        raise MissingExtraError("workers= needs Ray: pip install 'dspy-greater[ray]'. Or leave it out.")
    if isinstance(workers, str) and workers.startswith(_CLIENT) and find_spec("grpc") is None:
        raise MissingExtraError(
            f"The cluster at {workers!r} is reached by Ray's client: pip install 'ray[client]', here and where the "
            "head of the cluster runs. Or run this on a machine of the cluster, with workers='HOST:6379'."
        )


def joined(address: str | None, count: int) -> Callable[[], object]:
    """Connect to a cluster, or start one here; returns what undoes it.

    Args:
        address: of a cluster; None: what `RAY_ADDRESS` says, and else one is started.
        count: workers that one that is started has to have room for.

    Raises:
        MissingExtraError: Ray's client is not installed.
        WorkerError: the cluster does not answer, or none could be started.
    """
    import ray

    if ray.is_initialized():
        return lambda: None
    where = address or os.environ.get("RAY_ADDRESS")
    refuse_without_ray(where)
    _refuse_silence(where)
    cpus = None if where else max(count, os.cpu_count() or 1)
    before = signal.getsignal(signal.SIGTERM)  # which Ray would replace
    try:
        _connect(where, cpus)
    except Exception as error:  # Ray raises what it likes, `Exception` itself where starting takes too long
        if where:
            raise WorkerError(_unanswered(where, error)) from error
        raise WorkerError(
            f"Ray could not be started on this machine ({first_line(error)}). Leave workers= out, or try "
            "`ray start --head`."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)
    return ray.shutdown


def _connect(where: str | None, cpus: int | None) -> None:
    """Join or start; again, once, where the process that a busy head starts for a client was not there in time."""
    import ray

    # Ray would run workers behind everything else on the machine, this process included.
    own: dict[str, Any] = {"include_dashboard": False, "_system_config": {"worker_niceness": 0}}
    options: dict[str, Any] = {"num_cpus": cpus, "log_to_driver": False, "logging_level": logging.ERROR}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NOISE, UserWarning)
        try:
            ray.init(where or "local", **options, **({} if where else own))
        except Exception as error:
            if _LATE not in str(error):
                raise
            ray.init(where, **options)


def cut_off(error: BaseException) -> WorkerError:
    """What is to be raised where the connection to a cluster broke."""
    details = _DETAILS.search(str(error))
    said = details[1] if details else first_line(error)
    return WorkerError(
        f"The connection to the Ray cluster broke: {said.rstrip('.')}. What was found so far is in log_dir=, if the "
        "run has one; once the cluster is there again, the same call goes on from it."
    )


def _refuse_silence(where: str | None) -> None:
    """Raises `WorkerError` where nothing listens at the address; Ray would try for minutes."""
    client = (where or "").startswith(_CLIENT)
    place = (where or "").rpartition("://")[2].partition("/")[0]
    host, _, port = place.rpartition(":")
    if client and not host:
        host, port = place, _CLIENT_PORT
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        head = " The head of a cluster listens for clients where ray[client] is installed, at port 10001 unless told."
        raise WorkerError(
            f"No Ray cluster answers at {where!r} ({error}).{head if client else ''} Check the address, or give "
            "workers='auto' for this machine."
        ) from error


def _unanswered(where: str, error: BaseException) -> str:
    """What to say where something listens, and Ray could not join it."""
    start = f"No Ray cluster answers at {where!r}"
    token = f"set {_TOKEN}=token before Python starts, with its token in ~/.ray/auth_token"
    if os.environ.get(_TOKEN, "").lower() == "token":
        token = "check that ~/.ray/auth_token here is the one of its head"
    if any(_REFUSED in f"{type(cause).__name__}: {cause}" for cause in _causes(error)):
        return f"{start}: it asks for a token, and this process has none or another one. To join, {token}."
    return (
        f"{start} ({first_line(error).rstrip('.')}), though something listens there. Check the address: 'HOST:6379' "
        f"from a machine of the cluster, '{_CLIENT}HOST:{_CLIENT_PORT}' from others. If the cluster asks for a token, "
        f"{token}. Or give workers='auto' for this machine."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of a long text of Ray's; below a heading, the end of it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0]
