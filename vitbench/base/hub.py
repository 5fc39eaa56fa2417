"""The Hugging Face hub, asked with a time limit: where it does not answer, what was fetched before serves."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator

from vitbench.base.errors import InputError

SECONDS = 10.0  # to wait for an answer


@contextlib.contextmanager
def fetching(what: str, instead: str) -> Iterator[None]:
    """Fetch `what` inside the block; if the hub is silent, only files that were fetched before are looked at.

    Args:
        instead: what one can give instead, for the error.

    Raises:
        InputError: the hub does not answer and the files are not there, or it does not have them. A `TypeError` of the
            caller's own arguments is left as it is.
    """
    why = silence()
    try:
        with _files_at_hand() if why else _patience():
            yield
    except (TypeError, InputError):
        raise
    except Exception as error:  # each library has kinds of its own, and those of its network client
        if not why:
            text = str(error).strip()
            why = text.splitlines()[0].split(". ")[0][:160] if text else type(error).__name__
        raise InputError(f"{what} could not be fetched ({why}); {_advice()}, or {instead}") from error


def silence() -> str:
    """Why the hub gives no answer, in words; "" if it gives one within `SECONDS`."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "the environment says to stay offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)"
    found = [f"the Hugging Face hub did not answer within {SECONDS:g} s"]

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=SECONDS)
            found.append("")
        except Exception as error:  # no network: the kinds differ with the hub client's version
            if "timeout" not in type(error).__name__.lower():
                found.append(f"the Hugging Face hub cannot be reached: {' '.join(str(error).split())[:120]}")

    asking = threading.Thread(target=ask, daemon=True)  # looking a name up has no time limit of its own
    asking.start()
    asking.join(SECONDS)
    return found[-1]


def _advice() -> str:
    proxies = [name for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy") if os.environ.get(name)]
    return "check the name and the network" + (f", and the proxy that {proxies[0]} names" if proxies else "")


@contextlib.contextmanager
def _files_at_hand() -> Iterator[None]:
    """Have the hub's libraries look at their caches alone."""
    import huggingface_hub

    places = [huggingface_hub.constants]
    if "datasets" in sys.modules:
        places.append(sys.modules["datasets"].config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        with _patience():
            yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """A time limit for addresses beside the hub, which are fetched without one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
