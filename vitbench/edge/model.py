"""Modelled cost of one inference on a device: T = transfer + load + infer, and energy likewise, from device and link profiles.

A model that fits into the device's memory stays there. Another one is transferred for every inference: from the device's storage
if it fits there, else over the link, as in the setting of DeepCompress-ViT (CVPR 2025), whose abstract compares the two. All of
it is arithmetic on the constants in `profiles.yaml` or a user's own file, each with its source. `stream` and `roofline` check two
parts of it against this machine.
"""

import functools
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vitbench.base import configs
from vitbench.base.configs import Config
from vitbench.base.errors import InputError, one_of


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
    own = configs.read_yaml(path, "profiles")
    if not isinstance(own, dict) or not all(isinstance(group, dict) for group in own.values()):
        raise InputError(f"profiles {str(path)!r}: give a mapping with devices, links or operations, each a mapping")
    for group in own:
        one_of("group of profiles", group, known)
    return Profiles(**{group: known[group] | own.get(group, {}) for group in known})


@functools.cache
def _read_own() -> dict[str, Any]:
    text = (files("vitbench.edge") / "profiles.yaml").read_text(encoding="utf-8")
    return configs.yaml_value(text, "profiles.yaml")


Place = Literal["memory", "storage", "server"]
PARTS = ("transfer", "load", "infer")


@dataclass(frozen=True)
class Work:
    """What a model brings: bytes on disk; bytes that it takes in memory while it answers, activations included; MACs an image."""

    bytes: float
    resident: float
    float_macs: float
    int8_macs: float = 0.0


class Setting(Config):
    """What is assumed of a deployment, beyond the profiles.

    Attributes:
        first: count the first answer after a restart, with the load from storage (and the transfer, if the model has
            never been there), in the place of one that follows others.
        memory: bytes that the model may take, in the place of the device's.
        storage: bytes of storage, in the place of the device's; 0 is a device that keeps nothing.
        energy: "board" is measured power times time, "operations" the sum of a chip's operations and bytes from memory, which
            leaves out all that a board draws besides.
    """

    first: bool = False
    memory: float | None = None
    storage: float | None = None
    energy: Literal["board", "operations"] = "board"


@dataclass(frozen=True)
class Cost:
    """Seconds and joules of one answer, by part, and where the weights come from."""

    place: Place
    time: dict[str, float]
    energy: dict[str, float]

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.time.values())

    @property
    def joules(self) -> float:
        """All parts together."""
        return sum(self.energy.values())


def place_of(work: Work, device: Device, setting: Setting | None = None) -> Place:
    """Where the weights of an answer come from: memory if the model fits there, else storage, else the server."""
    setting = setting or Setting()
    memory = device.memory.value if setting.memory is None else setting.memory
    storage = device.storage.value if setting.storage is None else setting.storage
    if work.resident <= memory:
        return "memory"
    return "storage" if work.bytes <= storage else "server"


def cost(work: Work, device: Device, link: Link, operations: Operations, setting: Setting | None = None) -> Cost:
    """One answer of a model on a device that is supplied over a link."""
    setting = setting or Setting()
    place = place_of(work, device, setting)
    fetched = place == "server" or setting.first
    loaded = place == "storage" or setting.first
    time = {
        "transfer": transfer_time(work.bytes, link) if fetched else 0.0,
        "load": work.bytes / device.storage_read.value if loaded else 0.0,
        "infer": infer_time(work, device),
    }
    energy = {
        "transfer": transfer_energy(work.bytes, link) if fetched else 0.0,
        "load": work.bytes * device.storage_energy.value if loaded else 0.0,
        "infer": operations_energy(work, operations),
    }
    if setting.energy == "board":
        idle, load = device.idle_power.value, device.load_power.value
        energy = {
            "transfer": energy["transfer"] + idle * time["transfer"],
            "load": energy["load"] + idle * time["load"],
            "infer": load * time["infer"],
        }
    return Cost(place, time, energy)


def transfer_time(count: float, link: Link) -> float:
    """Seconds for so many bytes."""
    return link.latency.value + count / link.bandwidth.value


def transfer_energy(count: float, link: Link) -> float:
    """Joules of the receiver for so many bytes."""
    return link.energy_per_transfer.value + count * link.energy_per_byte.value


def infer_time(work: Work, device: Device) -> float:
    """Seconds, whichever is longer: to compute, or to bring every byte of the weights from memory once."""
    compute = work.float_macs / device.float_macs.value + work.int8_macs / device.int8_macs.value
    return max(compute, work.bytes / device.memory_bandwidth.value)


def operations_energy(work: Work, operations: Operations) -> float:
    """Joules of the operations alone, and of every byte of the weights from memory once."""
    compute = work.float_macs * operations.float_mac.value + work.int8_macs * operations.int8_mac.value
    return compute + work.bytes * operations.memory_byte.value
