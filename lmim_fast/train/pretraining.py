"""The pre-training tasks: LMIM and MAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lmim_fast.config import PretrainConfig, RunConfig
from lmim_fast.data.batch import Batch
from lmim_fast.errors import UsageError, shared
from lmim_fast.models.attention_maps import AttentionMaps, lmim_maps, mae_maps
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.ops.masking import draw_patches
from lmim_fast.ops.philox import Stream
from lmim_fast.train.start import NO_TEACHER, RANDOM_TEACHER, load_student, load_teacher
from lmim_fast.train.task import Say, Task

if TYPE_CHECKING:
    from lmim_fast.data.store.records import Records


class _Masked(Task):
    """Common to LMIM and MAE: a share of the patches is masked and reconstructed."""

    config: PretrainConfig
    _without_teacher: str
    """The option by which a run has no teacher, where it has none."""
    mask_ratio: float
    num_visible: int
    _mask_stream: ClassVar[Stream]

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

    def start(self, model: nn.Module, say: Say) -> None:
        """Load the weights that the config names into a model that `build` made.

        Raises:
            UsageError:   a path does not exist.
            WeightsError: a file does not fit; lists names and shapes.
        """
        if self.config.init is not None:
            load_student(self.config.init, self.encoder(model), say)

    def _view_options(self, store: Records) -> dict[str, Any]:
        return {"guidance": self.config.view if self.guided else None}

    def blank_batch(self, images: int, device: torch.device) -> Batch:
        """Zeros, with a guidance view where steps read one."""
        return Batch.blank(images, self.config.model.image_size, device, guided=self.guided)

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

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.mask_ratio, self.num_visible = self.config.model.mask_ratio, self.config.model.num_visible
        config = self.config
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
        self.start_teacher(model, say)

    def start_teacher(self, model: nn.Module, say: Say) -> None:
        """Load what `--teacher` names; a random teacher is the one that `build` made."""
        if not self.has_teacher:
            return
        if self.config.teacher == RANDOM_TEACHER:
            say("warning: the teacher is random (--teacher random): an ablation, not a recipe")
            return
        load_teacher(str(self.config.teacher), model.get_submodule("model_maeenc_momentum"), say)

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

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.mask_ratio, self.num_visible = config.encoder.mae_mask_ratio, config.encoder.mae_num_visible

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
