"""The one digest: what names rows, cells, environments and kept work by what they are about."""

import hashlib
import json
from typing import Any


def digest(facts: Any, length: int = 16) -> str:
    """The first hex digits of the SHA-256 of JSON's values; a mapping's order does not count.

    Committed rows and cells have such names: the text that is hashed stays as it is.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:length]
