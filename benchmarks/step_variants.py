"""The variants of a training step, ready to run.

released      the oracle: eager, explicit softmax attention, fp32 residual stream
sdpa          the same with torch's fused attention
compiled      the strongest plain PyTorch: one compiled graph, fused attention, bf16 residual in bf16 steps
ours          LMIM on the fast ops
ours+epilogue the same with GELU in the epilogues of products
ours+bias     the biases of attention's inputs in the epilogues of their products
ours+rows     normalised and activated rows recomputed by passes of their own: more traffic, less memory
ours+compile  ours under torch.compile
ours+graph    ours as one CUDA graph

"ours" keeps bf16 copies of its weights, as training does.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import dry_run
from benchmarks.step_plain import fused_model, halve_residual
from lmim_fast.config import ModelConfig
from lmim_fast.models.lmim import LMIM
from lmim_fast.ops.attention import BIAS_VARIABLE
from lmim_fast.ops.norm_step import VARIABLE as ROWS_VARIABLE
from lmim_fast.ops.products import WeightCopies
from lmim_fast.reference import ReferenceLMIM
from lmim_fast.train.graph import GraphedStep
from lmim_fast.train.parallel import frozen_to_bf16

VARIANTS = (
    *("released", "sdpa", "compiled", "ours", "ours+epilogue", "ours+bias", "ours+rows", "ours+compile"),
    "ours+graph",
)
CUDA_ONLY = ("ours+epilogue", "ours+bias", "ours+rows", "ours+graph")
_ENVIRONMENTS = {
    "ours+bias": {BIAS_VARIABLE: "product"},
    "ours+rows": {ROWS_VARIABLE: "recompute"},
}
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


class Search(NamedTuple):
    """How "compiled" is compiled.

    tries:   candidates by expected speed.
    modes:   tried after them, with the attention that is the fastest by then.
    seconds: the fastest of what is tried in this time is taken; None: the first that runs.
    report:  called with the JSON-ready rows of what is tried, after each candidate.
    """

    tries: Sequence[Candidate]
    modes: Sequence[str] = ()
    seconds: float | None = None
    report: Callable[[list[dict[str, Any]]], None] = lambda rows: None


def search_of(device: str, seconds: float | None) -> Search:
    """The default search on a device."""
    if device == "cpu":
        return Search([Candidate("default", "default")], seconds=seconds)
    tries = [Candidate(_MODES[0], attention) for attention in _ATTENTION]
    return Search(tries, _MODES[1:] if seconds is not None else (), seconds)


class Trainee:
    """A model, its optimiser, and the batches that it is trained on in turn."""

    def __init__(self, variant: str, setting: Setting) -> None:
        if variant in CUDA_ONLY and setting.device != "cuda":
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
        copied = setting.low and variant.startswith("ours") and variant != "ours+compile"
        self._copies = WeightCopies([p for p in trained if copied and p.dim() == 2], torch.bfloat16)
        self._batches = itertools.cycle(list(self._crops()))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Plain and guidance views (B, 3, height, width) in [-1, 1]."""
        return next(self._batches)

    def loss(self, images: Tensor, guidance: Tensor) -> Tensor:
        """The loss under newly drawn masks."""
        config, batch, _, low = self.setting
        noise = torch.rand(batch, config.num_patches, device=self.device)
        self._copies.refresh()
        with self._copies.read(), torch.autocast(self.device.type, torch.bfloat16, enabled=low):
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
    if variant == "ours+epilogue":
        config = replace(config, gelu_epilogue="on")
    ours = LMIM(config)
    if low:
        frozen_to_bf16(ours)
    return ours


@dataclass
class Prepared:
    """A variant that has run, ready to be timed.

    captured: later runs allocate nothing, since they replay graphs.
    chosen, searched: of "compiled": the candidate that runs, and what was tried, each with the error, or with
    the milliseconds of its steps where the fastest was searched for.
    """

    run: Callable[[], None]
    captured: bool = False
    chosen: Candidate | None = None
    searched: list[dict[str, Any]] = field(default_factory=list)


def prepare(variant: str, setting: Setting, search: Search) -> Prepared:
    """Build, compile or capture the variant, and run a step of it.

    "compiled" makes the compiler forget all that was compiled before in this process.

    Args:
        variant: one of `VARIANTS`.
        setting: what it runs on.
        search:  for "compiled".
    Raises:
        RuntimeError: no candidate runs.
    """
    trainee = Trainee(variant, setting)
    if variant == "compiled":
        return _prepare_compiled(trainee, search)
    if variant == "ours+compile":
        trainee.loss_of = torch.compile(trainee.loss_of, dynamic=False, **_compiler())
    step: Callable[..., Tensor] = trainee.step
    if variant == "ours+graph":
        step = GraphedStep(step, trainee.next_batch())

    environment = _ENVIRONMENTS.get(variant, {})

    def run() -> None:
        with mock.patch.dict(os.environ, environment):
            step(*trainee.next_batch())

    run()
    return Prepared(run, captured=variant == "ours+graph")


def _prepare_compiled(trainee: Trainee, search: Search) -> Prepared:
    plain, start = trainee.loss_of, time.monotonic()
    queue, modes = deque(search.tries), list(search.modes)
    searched, runs = list[dict[str, Any]](), dict[Candidate, Callable[[], None]]()
    fastest: dict[Candidate, float] = {}
    while queue or (modes and fastest):
        if not queue:
            attention = min(fastest, key=lambda candidate: fastest[candidate]).attention
            queue.extend(Candidate(mode, attention) for mode in modes)
            modes.clear()
        candidate = queue.popleft()
        row = asdict(candidate)
        searched.append(row)
        if fastest and time.monotonic() - start > (search.seconds or 0.0):
            row["not_tried"] = f"the {search.seconds:g} s of the search were spent"
            continue
        runs.clear()  # the compiler forgets what it made
        try:
            probe(candidate.attention, trainee.setting)
            run = runs[candidate] = _compile(trainee, plain, candidate)
            if search.seconds is None:
                return _compiled(run, candidate, searched)
            times = [_milliseconds(run, trainee.device) for _ in range(_SEARCH_STEPS)]
            row["milliseconds"], fastest[candidate] = times, min(times)
        except torch.AcceleratorError:
            raise  # whatever followed would fail
        except Exception as error:  # the compiler and the backends raise whatever they like
            reason = " / ".join(line.strip() for line in str(error).splitlines() if line.strip())
            row["error"] = f"{type(error).__name__}: {reason[:300]}"
            trainee.optimizer.zero_grad(set_to_none=True)
        search.report(searched)
    if not fastest:
        raise RuntimeError(f"no way to compile runs: {searched}")
    best = min(fastest, key=lambda candidate: fastest[candidate])
    return _compiled(runs.get(best) or _compile(trainee, plain, best), best, searched)


def _compiled(run: Callable[[], None], chosen: Candidate, searched: list[dict[str, Any]]) -> Prepared:
    return Prepared(run, chosen.mode == "reduce-overhead", chosen, searched)


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
        torch.cuda.reset_peak_memory_stats()  # the peak of other candidates is not its own
    attention = _ATTENTION.get(candidate.attention)

    def loss_of(*inputs: Tensor) -> Tensor:
        if attention is None:
            return plain(*inputs)
        # In here it is part of the graph: the compiler's caches do not see what is set around a call.
        with sdpa_kernel([attention]):
            return plain(*inputs)

    options = _compiler()
    trainee.loss_of = torch.compile(loss_of, mode=candidate.mode, fullgraph=True, dynamic=False, **options)

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        trainee.step(*trainee.next_batch())

    for _ in range(2):
        run()
    return run


def _compiler() -> dict[str, Any]:
    """Options of torch.compile; a dry run traces, and compiles nothing."""
    return {"backend": "eager"} if dry_run() else {}


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
