"""Energy of a run, where its hardware is known. Pure."""

from typing import Any

# Rated board power in watts, from the makers' data sheets; the longest name that fits counts.
WATTS = {
    "A10": 150, "A100-PCIE-40GB": 250, "A100 80GB PCIe": 300, "A100-SXM4": 400, "B200": 1000, "GH200": 1000,
    "H100 PCIe": 350, "H100 80GB HBM3": 700, "H100 NVL": 400, "H200": 700, "L4": 72, "L40": 300, "L40S": 350,
    "MI250X": 560, "MI300X": 750, "RTX 3090": 350, "RTX 4090": 450, "RTX 5090": 575, "T4": 70,
    "V100-PCIE": 250, "V100-SXM2": 300,
}  # fmt: skip


def watts(device: str) -> int | None:
    """The rated power of a device by the name that its driver gives; None for one that is not in the table."""
    words = f" {device} "
    if "Laptop" in device:  # a part of the power, under the same name
        return None
    found = [name for name in WATTS if f" {name} " in words or f" {name}-" in words]
    return WATTS[max(found, key=len)] if found else None


def training_hours(rows: list[dict[str, Any]]) -> float:
    """Hours of updates in the rows of metrics.jsonl: evaluations, saves and restarts are not in them."""
    seconds, before = 0.0, 0
    for row in rows:
        if "perf/seconds_per_step" in row:
            seconds += row["perf/seconds_per_step"] * (row["step"] - before)
            before = row["step"]
    return seconds / 3600


def energy(device: str, devices: int, rows: list[dict[str, Any]]) -> str | None:
    """The estimate in words, with its formula; None where the device's power or the time is not known."""
    power, hours = watts(device), training_hours(rows)
    if power is None or hours == 0:
        return None
    return (
        f"at most {devices} x {power} W x {hours:,.2f} h = {devices * power * hours / 1000:,.3g} kWh (devices x rated power "
        "x hours of updates; neither the rest of the machines nor cooling). Times the carbon intensity of the grid "
        "(kg CO2e per kWh, which is not known here) it is the emission."
    )
