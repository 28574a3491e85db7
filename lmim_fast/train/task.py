"""What a run trains, an objective a class: loop, step, metrics and report know no objective, only its task.

A new objective is a subclass of `Task` and a line of `TASKS`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from lmim_fast.config import Objective, PretrainConfig
from lmim_fast.data.batch import Batch
from lmim_fast.errors import UsageError, shared
from lmim_fast.models.attention_maps import AttentionMaps, lmim_maps, mae_maps
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.ops import attention_backends
from lmim_fast.ops.masking import draw_patches
from lmim_fast.ops.philox import Stream
from lmim_fast.train.start import NO_TEACHER, RANDOM_TEACHER, load_student, load_teacher
from lmim_fast.train.world import World

if TYPE_CHECKING:
    from lmim_fast.data.order import SampleOrder
    from lmim_fast.data.pipeline import ViewPipeline
    from lmim_fast.data.store.records import RecordStore

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
    _without_teacher: str
    """The option by which a run has no teacher, where it has none."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of what `losses` returns, in order."""
        return tuple(self.loss_titles)

    # --- the model ---

    def check(self) -> None:
        """Refuse options that the objective lacks or does not read, before anything is opened.

        Raises:
            UsageError: names the option.
        """
        teacher = self.config.teacher
        if self.has_teacher and teacher is None:
            raise shared(UsageError(NO_TEACHER))
        if teacher is not None and not self.has_teacher:
            message = f"--teacher {teacher}: {self._without_teacher} has no teacher; leave the option out"
            raise shared(UsageError(message))

    def build(self) -> nn.Module:
        """The model, on the CPU, with the weights that the run's seed gives."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return self._model()

    def start(self, model: nn.Module, say: Say) -> None:
        """Load the weights that the config names into a model that `build` made.

        Raises:
            UsageError:   a path does not exist.
            WeightsError: a file does not fit; lists names and shapes.
        """
        if self.config.init is not None:
            load_student(self.config.init, self.encoder(model))
            say(f"student starts from {self.config.init}")

    @abstractmethod
    def _model(self) -> nn.Module: ...

    @abstractmethod
    def encoder(self, model: nn.Module) -> nn.Module:
        """The encoder that is trained: what `--init` fills and a finished run leaves."""

    # --- its batches ---

    def pipeline(
        self, store: RecordStore, order: SampleOrder, world: World, start: int, end: int
    ) -> ViewPipeline:
        """This rank's batches from step `start` to the last one before `end`, in training order."""
        from lmim_fast.data.pipeline import ViewPipeline  # needs DALI, which a step does not

        config = self.config
        return ViewPipeline(
            store,
            order,
            guidance=config.view if self.guided else None,
            loader=config.loader,
            seed=config.seed,
            image_size=config.model.image_size,
            rank=world.rank,
            world_size=world.size,
            accumulation=config.accumulation,
            device=world.device,
            start_step=start,
            end_step=end,
        )

    def blank_batch(self, device: torch.device) -> Batch:
        """A batch of zeros with the shapes of a process's batches, where it has no peers."""
        size = self.config.batch_size // self.config.accumulation
        return Batch.blank(size, self.config.model.image_size, device, guided=self.guided)

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

    def facts(self) -> dict[str, str]:
        """Settings of the objective's own, for the report's head."""
        return {}

    @abstractmethod
    def maps(
        self, model: nn.Module, images: Tensor, guidance: Tensor | None, epochs: Tensor, indices: Tensor
    ) -> AttentionMaps:
        """What the model looks at in views (B, 3, H, W), under the masks that training drew for them."""


class _Masked(Task):
    """Common to LMIM and MAE: a share of the patches is masked and reconstructed."""

    mask_ratio: float
    num_visible: int
    _mask_stream: ClassVar[Stream]

    def draw_patches(self, epochs: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the visible (B, K) and of the masked patches (B, L - K) of samples, both rising."""
        patches = self.config.model.num_patches
        return draw_patches(self.config.seed, epochs, indices, patches, self.num_visible, self._mask_stream)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """Plain view, guidance view, and patches of a batch."""
        # Pixel targets are made from the image and would inherit its rounding.
        low = self.config.precision == "bf16" and self.has_teacher
        images, guidance = batch.views(torch.bfloat16 if low else torch.float32)
        epochs, indices = (
            numbers.to(images.device, non_blocking=True) for numbers in (batch.epochs, batch.indices)
        )
        return images, guidance, self.draw_patches(epochs, indices)

    def facts(self) -> dict[str, str]:
        """The share of masked patches, and the teacher where there is one."""
        facts = {"masked": f"{self.mask_ratio:.0%} of {self.config.model.num_patches} patches"}
        return facts | ({"teacher": str(self.config.teacher)} if self.has_teacher else {})


class LmimTask(_Masked):
    """LMIM: masked patches are reconstructed by a decoder that looks at the guidance view."""

    title = "LMIM pre-training"
    loss_titles: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "loss_recon": "reconstruction loss",
        "loss_align": "cls alignment loss",
    }
    _mask_stream = Stream.MASK

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.mask_ratio, self.num_visible = config.model.mask_ratio, config.model.num_visible
        self.guided = config.model.guidance
        self.has_teacher = config.model.target == "teacher"
        self._without_teacher = f"--model.target {config.model.target}"

    def _model(self) -> nn.Module:
        return LMIM(self.config.model)

    def encoder(self, model: nn.Module) -> nn.Module:
        """LMIM's student."""
        return model.get_submodule("model_maeenc")

    def start(self, model: nn.Module, say: Say) -> None:
        """As `Task.start`, and the teacher."""
        super().start(model, say)
        if not self.has_teacher:
            return
        if self.config.teacher == RANDOM_TEACHER:
            say("warning: the teacher is random (--teacher random): an ablation, not a recipe")
            return
        path = load_teacher(str(self.config.teacher), model.get_submodule("model_maeenc_momentum"))
        say(f"teacher {path}")

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(3,) loss, loss_recon and loss_align."""
        images, guidance, patches = self._inputs(batch)
        with self._precision(images.device):
            output = model(images, guidance, patches=patches)
        return torch.stack([output.loss, output.loss_recon, output.loss_align])

    def maps(
        self, model: nn.Module, images: Tensor, guidance: Tensor | None, epochs: Tensor, indices: Tensor
    ) -> AttentionMaps:
        """Attention of encoder and decoder."""
        return lmim_maps(cast(LMIM, model), images, guidance, self.draw_patches(epochs, indices))


class MaeTask(_Masked):
    """MAE: masked patches are reconstructed from the visible ones alone; it makes LMIM's teacher."""

    title = "MAE pre-training"
    loss_titles: ClassVar[dict[str, str]] = {"loss": "loss"}
    maps_title = "Attention and prediction"
    _mask_stream = Stream.MAE_MASK
    _without_teacher = "--objective mae"

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.mask_ratio, self.num_visible = config.model.mae_mask_ratio, config.model.mae_num_visible

    def _model(self) -> nn.Module:
        return MAE(self.config.model)

    def encoder(self, model: nn.Module) -> nn.Module:
        """MAE is its encoder, with a decoder beside it."""
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(1,) loss."""
        images, _, patches = self._inputs(batch)
        with self._precision(images.device):
            output = model(images, patches=patches)
        return torch.stack([output.loss])

    def maps(
        self, model: nn.Module, images: Tensor, guidance: Tensor | None, epochs: Tensor, indices: Tensor
    ) -> AttentionMaps:
        """Attention of the encoder, and the predicted pixels."""
        return mae_maps(cast(MAE, model), images, self.draw_patches(epochs, indices))


TASKS: dict[Objective, type[Task]] = {"lmim": LmimTask, "mae": MaeTask}


def make_task(config: PretrainConfig) -> Task:
    """The task of a run."""
    return TASKS[config.objective](config)
