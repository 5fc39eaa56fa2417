"""Fetch from the Hugging Face hub with a time limit; if it does not answer, use the files in the local cache."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from vitbench.base.errors import InputError

TIMEOUT_SECONDS = 10.0


@contextlib.contextmanager
def fetching(description: str, alternative: str) -> Iterator[None]:
    """Fetch from the hub inside the block; if the hub cannot be reached, only cached files are used.

    Args:
        description: what is fetched, for the error.
        alternative: what the user can give instead, for the error.

    Raises:
        InputError: the hub does not have the files, or it cannot be reached and they are not cached. A `TypeError` of
            the caller's arguments is not changed.
    """
    reason = unreachable_reason()
    try:
        with _offline() if reason else _socket_timeout():
            yield
    except (TypeError, InputError):
        raise
    except Exception as error:  # each library raises its own types and those of its network client
        if not reason:
            text = str(error).strip()
            reason = text.splitlines()[0].split(". ")[0][:160] if text else type(error).__name__
        raise InputError(f"{description} could not be fetched ({reason}); {_advice()}, or {alternative}") from error


def unreachable_reason() -> str:
    """The reason why the hub cannot be reached, in words; "" if it answers within `TIMEOUT_SECONDS`."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "the environment says to stay offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
    reasons = [f"the Hugging Face hub did not answer within {TIMEOUT_SECONDS:g} s"]

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
            reasons.append("")
        except Exception as error:  # the types depend on the version of the hub's client
            if "timeout" not in type(error).__name__.lower():
                reasons.append(f"the Hugging Face hub cannot be reached: {' '.join(str(error).split())[:120]}")

    asking = threading.Thread(target=ask, daemon=True)  # a name lookup has no time limit
    asking.start()
    asking.join(TIMEOUT_SECONDS)
    return reasons[-1]


def _advice() -> str:
    proxies = [name for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy") if os.environ.get(name)]
    return "check the name and the network" + (f", and the proxy that {proxies[0]} names" if proxies else "")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Make the hub's libraries use only their caches."""
    import huggingface_hub

    config_modules: list[Any] = [huggingface_hub.constants]
    if "datasets" in sys.modules:
        config_modules.append(sys.modules["datasets"].config)
    before = [config_module.HF_HUB_OFFLINE for config_module in config_modules]
    try:
        for config_module in config_modules:
            config_module.HF_HUB_OFFLINE = True
        with _socket_timeout():
            yield
    finally:
        for config_module, value in zip(config_modules, before, strict=True):
            config_module.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def _socket_timeout() -> Iterator[None]:
    """Set a time limit for other addresses, which the libraries fetch without one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
