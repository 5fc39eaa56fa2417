"""Device and link profiles: constants with what each rests on, from a YAML file that can be extended."""

import functools
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vitbench.base import plain
from vitbench.configs import Config
from vitbench.errors import InputError, one_of


class Constant(Config):
    """A number in SI units, and where it comes from.

    Attributes:
        basis: measured (somebody says how), vendor (stated), derived (by the arithmetic in `source`), assumed (by us).
    """

    value: float = Field(ge=0)
    basis: Literal["measured", "vendor", "derived", "assumed"]
    source: str = Field(min_length=1)


class Positive(Constant):
    """Likewise, above 0."""

    value: float = Field(gt=0)


class Device(Config):
    """What a device is able to.

    Attributes:
        memory: bytes that a model may take.
        storage: bytes that outlast a restart, of a card or of flash; 0 where there are none.
        storage_read: bytes/s from there to memory.
        memory_bandwidth: bytes/s.
        float_macs, int8_macs: sustained multiply-accumulates/s.
        idle_power, load_power: W, of the whole device while it waits and while it computes.
        storage_energy: J/byte read from storage, beyond idle.
    """

    title: str
    memory: Positive
    storage: Constant
    storage_read: Positive
    memory_bandwidth: Positive
    float_macs: Positive
    int8_macs: Positive
    idle_power: Constant
    load_power: Positive
    storage_energy: Constant


class Link(Config):
    """What brings bytes to a device.

    Attributes:
        bandwidth: bytes/s, as an application sees them.
        latency: s before the first byte.
        energy_per_byte: J/byte that the receiving side's radio or transceiver takes.
        energy_per_transfer: J beyond that for each transfer, as a radio stays awake for a while.
    """

    title: str
    bandwidth: Positive
    latency: Constant
    energy_per_byte: Constant
    energy_per_transfer: Constant


class Operations(Config):
    """Energy of a chip's operations, J: a product and sum in fp32 and in int8, and a byte from memory."""

    float_mac: Constant
    int8_mac: Constant
    memory_byte: Constant


class Profiles(Config):
    """Devices and links by name, and the energy of operations."""

    devices: Annotated[dict[str, Device], Field(min_length=1)]
    links: Annotated[dict[str, Link], Field(min_length=1)]
    operations: Operations

    def device(self, name: str) -> Device:
        """The device of that name."""
        return self.devices[one_of("device", name, self.devices)]

    def link(self, name: str) -> Link:
        """The link of that name."""
        return self.links[one_of("link", name, self.links)]


def load_profiles(path: str | Path = "") -> Profiles:
    """vitbench's profiles, with those of a YAML file of the same form added or in their places.

    Raises:
        InputError: not readable, or a constant is missing, negative or without a source; the message names it.
    """
    known = _read_own()
    if not path:
        return Profiles(**known)
    own = plain.read_yaml(path, "profiles")
    if not isinstance(own, dict) or not all(isinstance(group, dict) for group in own.values()):
        raise InputError(f"profiles {str(path)!r}: give a mapping with devices, links or operations, each a mapping")
    for group in own:
        one_of("group of profiles", group, known)
    return Profiles(**{group: known[group] | own.get(group, {}) for group in known})


@functools.cache
def _read_own() -> dict[str, Any]:
    text = (files("vitbench.edge") / "profiles.yaml").read_text(encoding="utf-8")
    return plain.yaml_value(text, "profiles.yaml")
