"""What `lmim doctor` looks at: this machine, and perhaps a run that is to be started or continued."""

from __future__ import annotations

from dataclasses import dataclass

from lmim_fast.config.checks import PathName, require
from lmim_fast.config.finetune import FinetuneConfig
from lmim_fast.config.pretrain import PretrainConfig


@dataclass(frozen=True)
class DoctorConfig:
    """The machine, and the run of a config.json."""

    run: tuple[PathName, ...]
    """Run folder or config.json of a run to check; none: the machine alone."""
    json: PathName | None = None
    """File to write the findings to as well."""
    processes: int = 0
    """Processes of the run; 0: one for each visible GPU, or one."""

    def __post_init__(self) -> None:
        require(len(self.run) <= 1, f"doctor looks at one run, got {len(self.run)}")
        require(self.processes >= 0, f"processes must be >= 0, got {self.processes}")


@dataclass(frozen=True)
class DoctorPretrainConfig(PretrainConfig):
    """The machine, and a pre-training run with these options."""

    json: PathName | None = None
    """File to write the findings to as well."""
    processes: int = 0
    """Processes of the run; 0: one for each visible GPU, or one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.processes >= 0, f"processes must be >= 0, got {self.processes}")


@dataclass(frozen=True)
class DoctorFinetuneConfig(FinetuneConfig):
    """The machine, and a fine-tuning run with these options."""

    json: PathName | None = None
    """File to write the findings to as well."""
    processes: int = 0
    """Processes of the run; 0: one for each visible GPU, or one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.processes >= 0, f"processes must be >= 0, got {self.processes}")
