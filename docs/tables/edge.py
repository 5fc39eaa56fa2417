"""Tables of modelled devices: the dense model's cost over the small one's, in the paper's setting."""

from collections.abc import Callable, Iterator

import pandas as pd

from docs.results import Results
from docs.tables.common import Cells, known, table


@known
def edge_ratios(results: Results, profile: str = "raspberry_pi_5") -> Callable[..., float | None]:
    """A function that gives the dense model's cost over the small one's on a device."""
    rows = results.rows[results.rows["metric"].isin(["edge_time", "edge_energy"])]
    settings = pd.DataFrame(list(rows["context"]), index=rows.index)[["profile", "link", "memory", "storage", "energy"]]
    rows = rows[["label", "metric", "value"]].join(settings).fillna({"memory": -1.0, "storage": -1.0})
    rows = rows[rows["profile"] == profile]
    wide = rows.pivot_table(index=["memory", "storage", "link", "metric", "energy"], columns="label", values="value")
    ratios = (wide["baseline"] / wide["uct"]).to_dict()
    memory_and_storage = {"memory": (-1.0, -1.0), "card": (1e8, -1.0), "fetched": (1e8, 0.0)}

    def ratio(location: str, link: str, metric: str, energy: str = "board") -> float | None:
        return ratios.get((*memory_and_storage[location], link, metric, energy))

    return ratio


LOCATIONS = {  # of the dense model's weights: the name on the page -> the location, and the link
    "in memory, as the small one's": ("memory", "ethernet"),
    "on its microSD card, read every time": ("card", "ethernet"),
    **{f"fetched every time, {link}": ("fetched", link) for link in ("ethernet", "wifi", "lte", "wifi_slow", "ble")},
}


@table
def transfers(ratio: Callable[..., float | None]) -> Iterator[Cells]:
    """A line for each location of the dense model's weights: its time and energies over the small one's."""
    for name, (location, link) in LOCATIONS.items():
        kinds = ("edge_time", "board"), ("edge_energy", "board"), ("edge_energy", "operations")
        yield name, *(_short(ratio(location, link, *kind)) for kind in kinds)


def _short(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
