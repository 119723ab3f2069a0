"""Settings of what a run shows and records."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    tensorboard: bool = True  # event files in the run's folder, below tensorboard/
    wandb: bool = False  # Weights & Biases; needs the extra "wandb" and a login
    view: str = "auto"  # live view: "auto" (full screen on a terminal, else lines), "full", "lines" or "none"
    refresh_seconds: float = 1.0  # how often the live view asks the controller
