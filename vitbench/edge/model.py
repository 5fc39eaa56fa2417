"""What an answer costs on a device: T = transfer + load + infer, and E likewise.

A model that fits into the device's memory stays there. One that does not has to come again for every answer: from the device's
storage if it fits there, else over the link, as in the setting of DeepCompress-ViT (CVPR 2025), whose abstract compares the two.
All of it is arithmetic on constants that `profiles` names; `streaming` and `roofline` hold two of its parts against this machine.
"""

from dataclasses import dataclass
from typing import Literal

from vitbench.configs import Config
from vitbench.edge.profiles import Device, Link, Operations

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
