"""The Hugging Face hub, asked with a time limit: where it does not answer, what was fetched before serves."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator

from vitbench.base.errors import InputError

TIMEOUT_SECONDS = 10.0  # to wait for an answer


@contextlib.contextmanager
def fetching(description: str, alternative: str) -> Iterator[None]:
    """Fetch `description` inside the block; if the hub is silent, only files that were fetched before are looked at.

    Args:
        alternative: what one can give instead, for the error.

    Raises:
        InputError: the hub does not answer and the files are not there, or it does not have them. A `TypeError` of the
            caller's own arguments is left as it is.
    """
    reason = unreachable_reason()
    try:
        with _offline() if reason else _socket_timeout():
            yield
    except (TypeError, InputError):
        raise
    except Exception as error:  # each library has kinds of its own, and those of its network client
        if not reason:
            text = str(error).strip()
            reason = text.splitlines()[0].split(". ")[0][:160] if text else type(error).__name__
        raise InputError(f"{description} could not be fetched ({reason}); {_advice()}, or {alternative}") from error


def unreachable_reason() -> str:
    """Why the hub gives no answer, in words; "" if it gives one within `TIMEOUT_SECONDS`."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "the environment says to stay offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
    reasons = [f"the Hugging Face hub did not answer within {TIMEOUT_SECONDS:g} s"]

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
            reasons.append("")
        except Exception as error:  # no network: the kinds differ with the hub client's version
            if "timeout" not in type(error).__name__.lower():
                reasons.append(f"the Hugging Face hub cannot be reached: {' '.join(str(error).split())[:120]}")

    asking = threading.Thread(target=ask, daemon=True)  # looking a name up has no time limit of its own
    asking.start()
    asking.join(TIMEOUT_SECONDS)
    return reasons[-1]


def _advice() -> str:
    proxies = [name for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy") if os.environ.get(name)]
    return "check the name and the network" + (f", and the proxy that {proxies[0]} names" if proxies else "")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Have the hub's libraries look at their caches alone."""
    import huggingface_hub

    config_modules = [huggingface_hub.constants]
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
    """A time limit for addresses beside the hub, which are fetched without one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
