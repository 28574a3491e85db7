"""What a run trains, an objective a class: loop, step, metrics and report know no objective, only its task.

A new objective is a subclass of `Task` and a line of the table in `train/tasks.py`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lmim_fast.config import RunConfig
from lmim_fast.data.batch import Batch
from lmim_fast.data.order import SampleOrder
from lmim_fast.models import weights
from lmim_fast.models.attention_maps import AttentionMaps
from lmim_fast.ops import attention_backends
from lmim_fast.train import optim
from lmim_fast.train.checkpoint.files import write_file
from lmim_fast.train.start import open_records
from lmim_fast.train.world import World

if TYPE_CHECKING:
    from lmim_fast.data.pipeline import ViewPipeline
    from lmim_fast.data.store.records import Records
    from lmim_fast.train.validation import Validation

Say = Callable[[str], None]


class Task(ABC):
    """One objective under one config: its model, its batches, its losses and what people read of it."""

    title: ClassVar[str]
    loss_titles: ClassVar[dict[str, str]]
    """Name of each loss in metrics.jsonl -> its title; the first one carries the gradient."""
    maps_title: ClassVar[str] = "Attention"
    has_teacher = False
    """Whether a frozen teacher makes the target."""
    guided = False
    """Whether a step reads the guidance view."""
    second_view: ClassVar[str] = "guidance view"
    """What the report calls the view beside the plain one."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @classmethod
    def settle(cls, config: RunConfig) -> RunConfig:
        """The config with what other values of it, or files, decide."""
        return config

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of what `losses` returns, in order."""
        return tuple(self.loss_titles)

    # --- the model ---

    @abstractmethod
    def check(self) -> None:
        """Refuse options that the objective lacks or does not read, before anything is opened.

        Raises:
            UsageError: names the option.
        """

    def build(self) -> nn.Module:
        """The model, on the CPU, with the weights that the run's seed gives."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return self._model()

    @abstractmethod
    def start(self, model: nn.Module, say: Say) -> None:
        """Load the weights that the config names into a model that `build` made.

        Raises:
            UsageError:   a path does not exist.
            WeightsError: a file does not fit; lists names and shapes.
        """

    def start_teacher(self, model: nn.Module, say: Say) -> None:
        """Of `start`, the part that loads the frozen teacher."""
        return  # most objectives have none

    @abstractmethod
    def _model(self) -> nn.Module: ...

    @abstractmethod
    def encoder(self, model: nn.Module) -> nn.Module:
        """The encoder that is trained."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The trainable parameters as AdamW takes them; `lr_scale` multiplies a group's learning rate."""
        return optim.decay_groups(model, self.config.optim.weight_decay)

    def finish(self, model: nn.Module, run: Path, step: int) -> str:
        """Write what a run leaves into its folder when its last `step` is done, and say what that is."""
        path = run / "encoder.safetensors"
        write_file(path, weights.encoder_safetensors(weights.to_released(model), step))
        return f"encoder in {path}"

    # --- its batches ---

    def records(self, say: Say) -> Records:
        """The records that the run trains on.

        Raises:
            UsageError: a path holds none.
            DataError:  they cannot be used.
        """
        return open_records(self.config.data, self.config.loader.max_pixels)

    def order(self, store: Records) -> SampleOrder:
        """Which records make which batch."""
        return SampleOrder(len(store), self.config.batch_size, self.config.seed)

    def pipeline(
        self, store: Records, order: SampleOrder, world: World, start: int, end: int
    ) -> ViewPipeline:
        """This rank's batches from step `start` to the last one before `end`, in training order."""
        from lmim_fast.data.pipeline import ViewPipeline  # needs DALI, which a step does not

        config = self.config
        return ViewPipeline(
            store,
            order,
            loader=config.loader,
            seed=config.seed,
            image_size=config.encoder.image_size,
            rank=world.rank,
            world_size=world.size,
            accumulation=config.accumulation,
            device=world.device,
            start_step=start,
            end_step=end,
            **self._view_options(store),
        )

    @abstractmethod
    def _view_options(self, store: Records) -> dict[str, Any]:
        """What the pipeline makes beside the plain view: its options `guidance`, `augment`, `labels`."""

    @abstractmethod
    def blank_batch(self, images: int, device: torch.device) -> Batch:
        """A micro batch of zeros, of this many images."""

    def validation(self, world: World) -> Validation | None:
        """What measures the model during the run, if the run has data for that.

        Raises:
            UsageError: a path holds no labelled records.
        """
        return None

    # --- its losses ---

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(k,) fp32 losses of a micro batch on its device, in the order of `loss_names`."""

    @contextlib.contextmanager
    def _precision(self, device: torch.device) -> Iterator[None]:
        """Matmuls in the run's precision, attention with the same bits every time."""
        # PyTorch's fp32 attention on CUDA adds in changing order.
        exact = device.type == "cuda" and self.config.precision == "fp32"
        eager = exact and attention_backends.current() == "auto"
        with (
            attention_backends.backend("eager") if eager else contextlib.nullcontext(),
            torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"),
        ):
            yield

    # --- what people read of it ---

    def without_augmentation(self) -> Task | None:
        """The task with plain views, where the batches of this one have augmented views instead."""
        return None

    def facts(self) -> dict[str, str]:
        """Settings of the objective's own, for the report's head."""
        return {}

    @abstractmethod
    def maps(
        self, model: nn.Module, images: Tensor, guidance: Tensor | None, epochs: Tensor, indices: Tensor
    ) -> AttentionMaps:
        """What the model looks at in views (B, 3, H, W), under the masks that training drew for them."""
