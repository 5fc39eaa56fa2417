"""Modelled time and energy of one inference on a device, transfer + load + infer, from device and link profiles.

A model that fits into the device's memory stays there. Another one is loaded for every inference: from the device's storage
if it fits there, else over the link, as in the setting of DeepCompress-ViT (CVPR 2025), whose abstract compares the two. The
constants come from `profiles.yaml` or a user's file, each with its source. `stream` and `roofline` check two parts of the
model on this machine.
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
        basis: measured (by the source), vendor (stated by it), derived (by the arithmetic in `source`), assumed (here).
    """

    value: float = Field(ge=0)
    basis: Literal["measured", "vendor", "derived", "assumed"]
    source: str = Field(min_length=1)


class Positive(Constant):
    """A constant above 0."""

    value: float = Field(gt=0)


class Device(Config):
    """Memory, storage, speed and power of a device.

    Attributes:
        memory: bytes that a model may take.
        storage: bytes of a card or of flash, kept over a restart; 0 if there is none.
        storage_read: bytes/s from storage to memory.
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
    """The connection over which a device receives bytes.

    Attributes:
        bandwidth: bytes/s of an application.
        latency: s before the first byte.
        energy_per_byte: J/byte of the receiver's radio or transceiver.
        energy_per_transfer: J of each transfer beyond its bytes, because a radio stays awake for a while.
    """

    title: str
    bandwidth: Positive
    latency: Constant
    energy_per_byte: Constant
    energy_per_transfer: Constant


class Operations(Config):
    """Energy of a chip's operations in J: a multiply-accumulate in fp32 and in int8, and a byte from memory."""

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
    """The default profiles, with those of a YAML file of the same form added; a profile of the same name replaces the default.

    Raises:
        InputError: a file that cannot be read, or a constant that is missing, negative or without a source; the message names it.
    """
    default_profiles = _default_profiles()
    if not path:
        return Profiles(**default_profiles)
    user_profiles = configs.read_yaml(path, "profiles")
    if not isinstance(user_profiles, dict) or not all(isinstance(group, dict) for group in user_profiles.values()):
        raise InputError(f"profiles {str(path)!r}: give a mapping with devices, links or operations, each a mapping")
    for group in user_profiles:
        one_of("group of profiles", group, default_profiles)
    return Profiles(**{group: default_profiles[group] | user_profiles.get(group, {}) for group in default_profiles})


@functools.cache
def _default_profiles() -> dict[str, Any]:
    text = (files("vitbench.edge") / "profiles.yaml").read_text(encoding="utf-8")
    return configs.yaml_value(text, "profiles.yaml")


WeightsLocation = Literal["memory", "storage", "server"]
PARTS = ("transfer", "load", "infer")


@dataclass(frozen=True)
class Workload:
    """What a model costs on any device.

    Attributes:
        bytes: on disk.
        resident_bytes: in memory during an inference, activations included.
        float_macs, int8_macs: multiply-accumulates for one image.
    """

    bytes: float
    resident_bytes: float
    float_macs: float
    int8_macs: float = 0.0


class Deployment(Config):
    """Assumptions about a deployment beyond the profiles.

    Attributes:
        first: whether the first inference is modelled, with transfer and load, instead of a later one.
        memory: bytes that the model may take, instead of the device's.
        storage: bytes of storage, instead of the device's; 0 for a device that stores nothing.
        energy: "board" is measured power times time. "operations" is the sum of a chip's operations and bytes from memory,
            without the rest of the board.
    """

    first: bool = False
    memory: float | None = None
    storage: float | None = None
    energy: Literal["board", "operations"] = "board"


@dataclass(frozen=True)
class Cost:
    """Seconds and joules of one inference, by part, and where the weights come from."""

    weights_location: WeightsLocation
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


def weights_location(workload: Workload, device: Device, deployment: Deployment | None = None) -> WeightsLocation:
    """Where the weights of an inference come from: memory if the model fits there, else storage, else the server."""
    deployment = deployment or Deployment()
    memory = device.memory.value if deployment.memory is None else deployment.memory
    storage = device.storage.value if deployment.storage is None else deployment.storage
    if workload.resident_bytes <= memory:
        return "memory"
    return "storage" if workload.bytes <= storage else "server"


def cost(
    workload: Workload, device: Device, link: Link, operations: Operations, deployment: Deployment | None = None
) -> Cost:
    """The cost of one inference on a device that receives models over a link."""
    deployment = deployment or Deployment()
    location = weights_location(workload, device, deployment)
    is_transferred = location == "server" or deployment.first
    is_loaded = location == "storage" or deployment.first
    time = {
        "transfer": transfer_time(workload.bytes, link) if is_transferred else 0.0,
        "load": workload.bytes / device.storage_read.value if is_loaded else 0.0,
        "infer": infer_time(workload, device),
    }
    energy = {
        "transfer": transfer_energy(workload.bytes, link) if is_transferred else 0.0,
        "load": workload.bytes * device.storage_energy.value if is_loaded else 0.0,
        "infer": operations_energy(workload, operations),
    }
    if deployment.energy == "board":
        idle, load = device.idle_power.value, device.load_power.value
        energy = {
            "transfer": energy["transfer"] + idle * time["transfer"],
            "load": energy["load"] + idle * time["load"],
            "infer": load * time["infer"],
        }
    return Cost(location, time, energy)


def transfer_time(count: float, link: Link) -> float:
    """Seconds to receive `count` bytes."""
    return link.latency.value + count / link.bandwidth.value


def transfer_energy(count: float, link: Link) -> float:
    """Joules of the receiver for `count` bytes."""
    return link.energy_per_transfer.value + count * link.energy_per_byte.value


def infer_time(workload: Workload, device: Device) -> float:
    """Seconds of an inference: the longer of its multiply-accumulates and one read of all weights from memory."""
    compute = workload.float_macs / device.float_macs.value + workload.int8_macs / device.int8_macs.value
    return max(compute, workload.bytes / device.memory_bandwidth.value)


def operations_energy(workload: Workload, operations: Operations) -> float:
    """Joules of the multiply-accumulates and of one read of all weights from memory."""
    compute = workload.float_macs * operations.float_mac.value + workload.int8_macs * operations.int8_mac.value
    return compute + workload.bytes * operations.memory_byte.value
