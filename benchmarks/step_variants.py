"""The variants of a training step, ready to run: released, sdpa, compiled, ours, ours+compile, ours+graph.

released      the oracle: eager, explicit softmax attention, fp32 residual stream
sdpa          the same with torch's fused attention
compiled      the strongest plain PyTorch: one compiled graph, fused attention, bf16 residual in bf16 steps
ours          LMIM on the fast ops
ours+compile  the same under torch.compile
ours+graph    the same as one CUDA graph
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.step_plain import fused_model, halve_residual
from lmim_fast.config import ModelConfig
from lmim_fast.models.lmim import LMIM
from lmim_fast.reference import ReferenceLMIM
from lmim_fast.train.graph import GraphedStep

_BATCHES = 3  # that take turns
_SEARCH_STEPS = 3  # timed ones of a candidate

_ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_MODES = ("default", "max-autotune-no-cudagraphs", "reduce-overhead")


class Setting(NamedTuple):
    """What all variants of a comparison share; `low`: bf16 autocast."""

    config: ModelConfig
    batch: int
    device: str
    low: bool


@dataclass(frozen=True)
class Candidate:
    """A way to compile; `attention` "default" leaves the backend to torch."""

    mode: str
    attention: str


def candidates(device: str, search: bool) -> list[Candidate]:
    """What "compiled" tries: by expected speed, the first that runs is taken; in a search, all of them."""
    if device == "cpu":
        return [Candidate("default", "default")]
    modes = _MODES if search else _MODES[:1]
    return [Candidate(mode, attention) for mode in modes for attention in _ATTENTION]


class Trainee:
    """A model, its optimiser, and the batches that it is trained on in turn."""

    def __init__(self, variant: str, setting: Setting) -> None:
        if variant == "ours+graph" and setting.device != "cuda":
            raise ValueError(f"{variant} needs a CUDA device, got {setting.device}")
        torch.manual_seed(0)
        self.setting, self.device = setting, torch.device(setting.device)
        self.model = _build(variant, setting).to(self.device).train()
        self.loss_of: Callable[..., Tensor] = self._loss_of
        graphed = variant == "ours+graph"
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True, capturable=graphed
        )
        self._batches = itertools.cycle(list(self._crops()))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Plain and guidance views (B, 3, height, width) in [-1, 1]."""
        return next(self._batches)

    def loss(self, images: Tensor, guidance: Tensor) -> Tensor:
        """The loss under newly drawn masks."""
        config, batch, _, low = self.setting
        noise = torch.rand(batch, config.num_patches, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            return self.loss_of(images, guidance, noise)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, images: Tensor, guidance: Tensor) -> Tensor:
        """Forward, backward, optimiser."""
        loss = self.loss(images, guidance)
        loss.backward()
        self.update()
        return loss.detach()

    def _loss_of(self, images: Tensor, guidance: Tensor, noise: Tensor) -> Tensor:
        loss: Tensor = self.model(images, guidance, noise).loss
        return loss

    def _crops(self) -> Iterator[tuple[Tensor, Tensor]]:
        dtype = torch.bfloat16 if self.setting.low else torch.float32
        shape = self.setting.batch, 3, *self.setting.config.image_size
        for _ in range(_BATCHES):
            first, second = (torch.rand(shape, device=self.device) * 2 - 1 for _ in range(2))
            yield first.to(dtype), second.to(dtype)


def _build(variant: str, setting: Setting) -> nn.Module:
    config, low = setting.config, setting.low
    if variant == "released":
        return ReferenceLMIM(config)
    if variant in ("sdpa", "compiled"):
        plain = fused_model(config)
        if variant == "compiled" and low:
            halve_residual(plain)
        return plain
    ours = LMIM(config)
    if low:
        ours.halve_teacher()
    return ours


@dataclass
class Prepared:
    """A variant that has run, ready to be timed.

    chosen, searched: of "compiled": the candidate that runs, and what was tried, each with the error, or with
    the milliseconds of its steps where the fastest was searched for.
    """

    run: Callable[[], None]
    chosen: Candidate | None = None
    searched: list[dict[str, Any]] = field(default_factory=list)


def prepare(variant: str, setting: Setting, tries: Sequence[Candidate], search: bool) -> Prepared:
    """Build, compile or capture the variant, and run a step of it.

    Args:
        variant: one of `bench_step.VARIANTS`.
        setting: what it runs on.
        tries:   for "compiled", in the order of trying.
        search:  take the fastest of them, not the first that runs.
    Raises:
        RuntimeError: none of the tries runs.
    """
    trainee = Trainee(variant, setting)
    if variant == "compiled":
        return _prepare_compiled(trainee, tries, search)
    if variant == "ours+compile":
        trainee.loss_of = torch.compile(trainee.loss_of, dynamic=False)
    step: Callable[..., Tensor] = trainee.step
    if variant == "ours+graph":
        step = GraphedStep(step, trainee.next_batch())

    def run() -> None:
        step(*trainee.next_batch())

    run()
    return Prepared(run)


def _prepare_compiled(trainee: Trainee, tries: Sequence[Candidate], search: bool) -> Prepared:
    plain, searched = trainee.loss_of, list[dict[str, Any]]()
    fastest: dict[Candidate, float] = {}
    for candidate in tries:
        try:
            probe(candidate.attention, trainee.setting)
            run = _compile(trainee, plain, candidate)
            times = [_milliseconds(run, trainee.device) for _ in range(_SEARCH_STEPS if search else 0)]
        except Exception as error:  # the compiler and the backends raise whatever they like
            reason = " / ".join(line.strip() for line in str(error).splitlines() if line.strip())
            searched.append(asdict(candidate) | {"error": f"{type(error).__name__}: {reason[:300]}"})
            trainee.optimizer.zero_grad(set_to_none=True)
            continue
        if not search:
            return Prepared(run, candidate, [*searched, asdict(candidate)])
        searched.append(asdict(candidate) | {"milliseconds": times})
        fastest[candidate] = min(times)
    if not fastest:
        raise RuntimeError(f"no way to compile runs: {searched}")
    best = min(fastest, key=lambda candidate: fastest[candidate])
    run = _compile(trainee, plain, best)
    if trainee.device.type == "cuda":  # the peak of the others is not its own
        torch.cuda.reset_peak_memory_stats(trainee.device)
        run()
    return Prepared(run, best, searched)


def probe(attention: str, setting: Setting) -> None:
    """Run this attention on all shapes of a step, a few sequences each: compiling takes far longer.

    Raises:
        RuntimeError: it does not take one of them.
    """
    if attention not in _ATTENTION:
        return
    config, dtype = setting.config, torch.bfloat16 if setting.low else torch.float32
    shown, tokens = config.num_visible + 1, config.num_patches + 1
    encoder = config.heads, config.width // config.heads, 0.0
    decoder = config.decoder_heads, config.decoder_width // config.decoder_heads, config.decoder_dropout
    shapes = [(shown, shown, encoder), (tokens, tokens, encoder), (tokens, tokens, decoder)]
    for queries, keys, (heads, dim, p) in [*shapes, (tokens - shown, tokens, decoder)]:
        q, k, v = (
            torch.randn(2, heads, count, dim, device=setting.device, dtype=dtype).requires_grad_()
            for count in (queries, keys, keys)
        )
        with sdpa_kernel([_ATTENTION[attention]]):
            F.scaled_dot_product_attention(q, k, v, dropout_p=p).sum().backward()
    synchronise(torch.device(setting.device))


def _compile(trainee: Trainee, plain: Callable[..., Tensor], candidate: Candidate) -> Callable[[], None]:
    """The step by this candidate, after two runs; nothing that was compiled before is left."""
    torch.compiler.reset()
    if trainee.device.type == "cuda":
        torch.cuda.empty_cache()
    attention = _ATTENTION.get(candidate.attention)

    def loss_of(*inputs: Tensor) -> Tensor:
        if attention is None:
            return plain(*inputs)
        # In here it is part of the graph: the compiler's caches do not see what is set around a call.
        with sdpa_kernel([attention]):
            return plain(*inputs)

    trainee.loss_of = torch.compile(loss_of, mode=candidate.mode, fullgraph=True, dynamic=False)

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        trainee.step(*trainee.next_batch())

    for _ in range(2):
        run()
    return run


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
