"""The fine-tuning task: the recogniser learns to read labelled crops."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lmim_fast.config import AugmentConfig, FinetuneConfig, RunConfig, recipe
from lmim_fast.config.io import differences, to_dict
from lmim_fast.data.batch import Batch
from lmim_fast.data.charset import Charset
from lmim_fast.data.mix import MixedOrder
from lmim_fast.data.order import SampleOrder
from lmim_fast.errors import UsageError, shared
from lmim_fast.models.attention_maps import AttentionMaps, encoder_cls_attention, recognizer_maps
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.models.recognizer_files import recognizer_bytes
from lmim_fast.models.weight_names import split_key
from lmim_fast.train import optim
from lmim_fast.train.checkpoint.files import write_file
from lmim_fast.train.checkpoint.resume import MAY_CHANGE
from lmim_fast.train.recognizer_start import LAST, start_recognizer
from lmim_fast.train.start import open_records
from lmim_fast.train.task import Say, Task
from lmim_fast.train.world import World

if TYPE_CHECKING:
    from lmim_fast.data.labels import LabelledRecords
    from lmim_fast.data.store.records import Records
    from lmim_fast.train.validation import Validation

# What a recipe does not decide.
_FREE = {name.removeprefix("config.").partition(".")[0] for name in MAY_CHANGE}
_FREE |= {"preset", "seed", "precision", "compile", "weights", "characters"}


class RecognizerTask(Task):
    """Fine-tuning of the recogniser. Source: LMIM's fine-tuning; MAERec in OpenOCR."""

    config: FinetuneConfig
    title = "Recogniser"
    loss_titles: ClassVar[dict[str, str]] = {"loss": "loss per word"}
    maps_title = "Where it looks for each character"
    second_view = "augmented crop"

    @classmethod
    def settle(cls, config: RunConfig) -> FinetuneConfig:
        """The config with its characters, and the number of classes that they give.

        Raises:
            UsageError: the file of the characters cannot be used, or `--model.classes` says another number.
        """
        config = cast(FinetuneConfig, config)
        characters = config.characters
        if characters is None:
            characters = Charset.named(config.charset).characters
        classes = Charset(characters).classes
        if config.model.classes not in (classes, type(config.model)().classes):
            raise UsageError(
                f"--model.classes {config.model.classes}: the {len(characters)} characters of --charset "
                f"{config.charset} and the special ones are {classes}; leave the option out"
            )
        model = dataclasses.replace(config.model, classes=classes)
        return dataclasses.replace(config, characters=characters, model=model)

    @property
    def charset(self) -> Charset:
        """The characters that are read."""
        return Charset(cast(str, self.config.characters))

    # --- the model ---

    def check(self) -> None:
        """Refuse an `--init` that is not there.

        Raises:
            UsageError: names the path.
        """
        if self.config.init is not None and not split_key(self.config.init)[0].exists():
            message = f"--init {self.config.init} does not exist; it should be a file or a run folder"
            raise shared(UsageError(message))

    def _model(self) -> nn.Module:
        return Recognizer(self.config.model, self.config.characters)

    def encoder(self, model: nn.Module) -> nn.Module:
        """The recogniser's encoder."""
        return model.get_submodule("encoder")

    def start(self, model: nn.Module, say: Say) -> None:
        """Load what `--init` names: an encoder or a recogniser.

        Raises:
            UsageError:   a path does not exist.
            WeightsError: a file does not fit; lists names and shapes.
        """
        if self.config.init is None:
            say("encoder starts from random weights (no --init)")
        else:
            start_recognizer(self.config.init, cast(Recognizer, model), say)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups by layer, for layer-wise decay of the learning rate."""
        settings, depth = self.config.optim, self.config.encoder.depth
        return optim.layer_groups(
            model, "encoder", depth, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay
        )

    def finish(self, model: nn.Module, run: Path, step: int) -> str:
        """Write the recogniser."""
        write_file(run / LAST, recognizer_bytes(cast(Recognizer, model), step))
        return f"recogniser in {run / LAST}"

    # --- its batches ---

    def records(self, say: Say) -> Records:
        """The labelled records; what is wrong with labels is said first."""
        from lmim_fast.data.labels import LabelledRecords, LabelTable  # needs lmdb, which a step does not

        store = open_records(self.config.data, self.config.loader.max_pixels)
        table = LabelTable(store, self.charset, self.config.labels, self.config.model.max_length)
        for line in table.report_lines():
            say(line)
        return LabelledRecords(store, table)

    def order(self, store: Records) -> SampleOrder:
        """Shuffled records, mixed by `--weights` if there are any."""
        config = self.config
        if not config.weights:
            return super().order(store)
        groups = cast("LabelledRecords", store).groups(config.data)
        return MixedOrder(groups, config.weights, config.batch_size, config.seed)

    def _view_options(self, store: Records) -> dict[str, Any]:
        augment = self.config.augment
        return {
            "guidance": None,
            "augment": None if augment.kind == "none" else augment,
            "labels": cast("LabelledRecords", store).targets,
        }

    def blank_batch(self, images: int, device: torch.device) -> Batch:
        """Zeros."""
        config = self.config
        return Batch.blank(
            images,
            config.encoder.image_size,
            device,
            guided=False,
            target_length=config.model.max_length,
        )

    def validation(self, world: World) -> Validation | None:
        """Reading of the sets of `--val`."""
        if not self.config.val:
            return None
        from lmim_fast.train.validation import Validation  # needs DALI, which a step does not

        return Validation(self.config, world)

    # --- its losses ---

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(1,) loss."""
        images = batch.images(torch.bfloat16 if self.config.precision == "bf16" else torch.float32)
        with self._precision(images.device):
            output = model(images, batch.targets)
        return torch.stack([output.loss])

    # --- what people read of it ---

    def without_augmentation(self) -> Task | None:
        """Fine-tuning on plain views, unless it is this one."""
        if self.config.augment.kind == "none":
            return None
        return type(self)(dataclasses.replace(self.config, augment=AugmentConfig(kind="none")))

    def facts(self) -> dict[str, str]:
        """The recipe with what was changed in it, the characters and the augmentation."""
        config = self.config
        base = recipe(config.recipe, data=config.data, size=config.preset)
        names = [name for name in to_dict(base) if name not in _FREE]
        changed = [
            f"{name} {new}"
            for field in names
            for name, _, new in differences(to_dict(base)[field], to_dict(config)[field], field)
            if name != "model.classes"
        ]
        words = (
            f"{config.recipe}, changed: {', '.join(changed)}" if changed else f"{config.recipe}, unchanged"
        )
        return {
            "recipe": words,
            "characters": f"{len(self.charset.characters)} ({config.charset})",
            "augmentation": config.augment.kind,
            "starts from": config.init or "random weights",
        }

    def maps(
        self, model: nn.Module, images: Tensor, guidance: Tensor | None, epochs: Tensor, indices: Tensor
    ) -> AttentionMaps:
        """Attention of the encoder, and of each character that is read."""
        recognizer = cast(Recognizer, model)
        reading, characters = recognizer_maps(recognizer, images)
        encoder = encoder_cls_attention(recognizer.encoder, images)
        return AttentionMaps(encoder, None, readings=reading.strings, characters=characters)
