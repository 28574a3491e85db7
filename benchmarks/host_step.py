"""The host's work in a training step of LMIM: ours, and the plain reference.

The depth is ViT-S's and widths are tiny, so that the products of a CPU cost next to nothing. Ours records its
kernels and does not run them: what stays is Python, the dispatcher, autograd and small products. Triton's own
part of a launch (25 to 40 us) is in no time here, so launches are counted (`host_counts.py`). In the update
PyTorch's `_foreach` operators go through the parameters one by one, as they do on a CPU only.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmim_fast.config import ModelConfig, PretrainConfig, preset
from lmim_fast.kernels import runtime
from lmim_fast.models.lmim import LMIM
from lmim_fast.ops import dispatch
from lmim_fast.ops.products import WeightCopies
from lmim_fast.reference import ReferenceLMIM
from lmim_fast.train import optim
from lmim_fast.train import parallel as parallelism
from lmim_fast.train.step import TrainStep
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

Precision = Literal["bf16", "fp32"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")  # bf16 autocast is the recipe on a GPU
FORMS = ("ours", "reference")
PARTS = ("forward", "backward", "update")
TIMED_PARTS = ("teacher", "student", "decoder and loss")  # of the forward pass
DECODER = TIMED_PARTS[2]
MODEL_PARTS = {  # methods of ours, of the reference, of both
    "make_target": "teacher",
    "encode_views": "student",
    "model_maeenc.forward_encoder": "student",
    "decode": DECODER,
}
TIMED, COUNTED = (8, 32), (32, 128)  # image sizes, 17 and 257 tokens: the times' and the counts'
CAPABILITY = (9, 0)
_BATCH = 2
_WARMUP = 3
Mark = Callable[[str], None]


def config(image_size: tuple[int, int], depth: int = 12) -> ModelConfig:
    """ViT-S with encoder heads of 64 and decoder heads of 32, as few as there can be."""
    narrow: dict[str, Any] = dict(width=64, heads=1, mlp_ratio=1.0)
    narrow |= dict(decoder_width=64, decoder_heads=2, decoder_ffn=64, decoder_dropout=0.0)
    return preset("small", image_size=image_size, depth=depth, **narrow)


class Form:
    """A model and its optimiser, one of `FORMS`.

    The update of ours is `TrainStep`'s: gradient norm, a check that all is finite, AdamW that can skip; the
    bf16 copies of weights are its too, made in the forward part. The reference's update is fused AdamW alone.
    """

    def __init__(self, name: str, precision: Precision, model: ModelConfig) -> None:
        torch.manual_seed(0)
        self._ours, self._low, self._patches = name == "ours", precision == "bf16", model.num_patches
        dtype = torch.bfloat16 if self._low else torch.float32
        shape = _BATCH, 3, *model.image_size
        self._images, self._guidance = ((torch.rand(shape) * 2 - 1).to(dtype) for _ in range(2))
        self.model: nn.Module = (LMIM if self._ours else ReferenceLMIM)(model).train()
        self._copies = WeightCopies([], torch.bfloat16)
        if self._ours:
            self._update = self._as_trained(precision, model)
        else:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

            def update(loss: Tensor) -> None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            self._update = update

    def step(self, mark: Mark = lambda part: None) -> dict[str, list[runtime.Launch]]:
        """One step: the launches of each of `PARTS`; `mark` is called at the start and after each part."""
        noise = torch.rand(_BATCH, self._patches)
        ends = [0]
        with self._recording() as launches:
            mark("start")
            self._copies.refresh()
            with self._copies.read(), torch.autocast("cpu", torch.bfloat16, enabled=self._low):
                loss = self.model(self._images, self._guidance, noise).loss
            mark("forward")
            ends.append(len(launches))
            loss.backward()
            mark("backward")
            ends.append(len(launches))
            self._update(loss.detach())
            mark("update")
        ends.append(len(launches))
        return {part: launches[ends[number] : ends[number + 1]] for number, part in enumerate(PARTS)}

    @contextlib.contextmanager
    def _recording(self) -> Iterator[list[runtime.Launch]]:
        if not self._ours:
            yield []
            return
        with dispatch.backend("triton"), runtime.recording(CAPABILITY) as recording:
            yield recording.launches

    def _as_trained(self, precision: Precision, model: ModelConfig) -> Callable[[Tensor], object]:
        """What `lmim_fast.pretrain` does to the model, and its update."""
        config = PretrainConfig(
            data=("none",), teacher="random", model=model, batch_size=_BATCH, precision=precision
        )
        task, world = make_task(config), World(0, 1, torch.device("cpu"))
        parallelism.apply(self.model, task.config, world)
        optimizer = optim.make_optimizer(task.parameter_groups(self.model), config.optim)
        optim.set_learning_rate(optimizer, 1e-4)
        step = TrainStep(self.model, optimizer, task, world)
        self._copies = step._copies
        return lambda loss: step._update(loss.reshape(1))


class _Laps:
    """Milliseconds of CPU time of each step between marks, and in the parts of the model."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[dict[str, float]] = []
        self._last = 0.0
        self._decoder: float | None = None
        for path, part in MODEL_PARTS.items():
            *owners, method = path.split(".")
            owner = model.get_submodule(".".join(owners))
            if hasattr(owner, method):  # ours and the reference differ in some
                setattr(owner, method, self._timed(getattr(owner, method), part))

    def mark(self, part: str) -> None:
        """The end of a part."""
        now = time.process_time()
        if part == "start":
            self.steps.append(defaultdict(float))
        else:
            self._add(part, now - self._last)
        if part == "forward" and self._decoder is not None:
            self._add(DECODER, now - self._decoder)
            self._decoder = None
        self._last = time.process_time()

    def _add(self, part: str, seconds: float) -> None:
        self.steps[-1][part] += 1e3 * seconds

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            if part == DECODER:  # the loss follows: its end is that of the forward pass
                self._decoder = start
            result = function(*arguments, **options)
            if part != DECODER:
                self._add(part, time.process_time() - start)
            return result

        return run


def measure(precision: Precision, rounds: int, model: ModelConfig | None = None) -> dict[str, Any]:
    """Milliseconds of each round by form and part, forms taking turns; JSON-ready.

    `ratio` is ours / reference, the median of the rounds' ratios, by part and for the whole "step".
    """
    forms = {name: Form(name, precision, model or config(TIMED)) for name in FORMS}
    laps = {name: _Laps(form.model) for name, form in forms.items()}
    for number in range(_WARMUP + rounds):
        for name in FORMS if number % 2 else FORMS[::-1]:
            forms[name].step(laps[name].mark)
    times: dict[str, dict[str, list[float]]] = {}
    for name, lap in laps.items():
        steps = lap.steps[_WARMUP:]
        times[name] = {part: [step[part] for step in steps] for part in (*PARTS, *TIMED_PARTS)}
        times[name]["step"] = [sum(step[part] for part in PARTS) for step in steps]
    ratio = {
        part: statistics.median(
            ours / plain for ours, plain in zip(*(times[form][part] for form in FORMS), strict=True)
        )
        for part in ("forward", *TIMED_PARTS, "backward", "update", "step")
    }
    return {"precision": precision, "milliseconds": times, "ratio": ratio}
