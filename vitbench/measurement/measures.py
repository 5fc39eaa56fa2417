"""What is measured and how, as one config for Python, the notebooks, the command line and sweeps."""

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from vitbench.base.configs import Config
from vitbench.base.errors import one_of
from vitbench.rows.records import DEVICE_GROUPS, GROUPS


def _names(value: Any) -> Any:
    """A bare string stands for a tuple of that one name, and an empty one for none."""
    return ((value,) if value else ()) if isinstance(value, str) else value


class Measures(Config):
    """What `measure` measures of a saved model, and with what settings.

    Attributes:
        what: groups of metrics. By default accuracy, size, weights and outputs (their errors; need a baseline), latency and
            memory. Only on request: startup (time to the first inference), limit (the smallest limit of memory), energy, and
            roofline (the least time that this machine's measured peaks allow).
        backend: what runs the model: eager, torch_compile, onnxruntime, openvino, ... (see `vitbench.measurement.backends`).
        versus_backend: what runs the baseline; several give a ratio to each. By default the model's backend.
        batches: the batch sizes that are timed.
        rounds: timed calls of each model.
        starts: fresh processes that share the rounds, so that no single one decides.
        threads: of the timed process.
        device: where accuracy is computed. Latency and memory are measured on the CPU.
        power: watts that the device draws while it computes. Energy is estimated from it where no counter exists.
        within: a limit in bytes. If it is above 0, the group limit measures only whether the model runs within it.
    """

    what: tuple[str, ...] = GROUPS
    backend: str = "eager"
    versus_backend: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 8), min_length=1)
    rounds: int = Field(default=60, ge=10)
    starts: int = Field(default=1, ge=1)
    threads: int = Field(default=2, ge=1)
    device: str = "auto"
    power: float = Field(default=0.0, ge=0)
    within: int = Field(default=0, ge=0)

    @field_validator("what")
    @classmethod
    def _known_groups(cls, what: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one_of("group of metrics", group, (*GROUPS, *DEVICE_GROUPS)) for group in what)

    @field_validator("starts")
    @classmethod
    def _a_round_for_each_start(cls, starts: int, fields: ValidationInfo) -> int:
        if starts > fields.data.get("rounds", starts):
            raise ValueError(f"more than rounds = {fields.data['rounds']}; give at most one start a round")
        return starts

    @model_serializer(mode="wrap")
    def _without_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`device`, `power` and `within` only where they are set: keys of sweeps' cells hash the other fields."""
        values = serialize(self)
        defaults = type(self).model_fields
        return {
            key: value
            for key, value in values.items()
            if key not in ("device", "power", "within") or value != defaults[key].default
        }

    @property
    def versus_backends(self) -> list[str]:
        """The backends that run the baseline, each once."""
        return list(dict.fromkeys(name or self.backend for name in self.versus_backend or ("",)))
