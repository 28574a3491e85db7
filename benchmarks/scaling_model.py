"""What one GPU and one process do in a training step, for `benchmarks/scaling.py`.

Computing is the floor of the step over a stated efficiency; host and data are figures of one process. Times
are seconds, sizes bytes, rates a second, unless a name says otherwise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from benchmarks import floors
from benchmarks.floors import Ceilings, Passes, Work, floor_seconds
from benchmarks.step_floor import ADAMW_BYTES, step_passes, trained_parameters
from lmim_fast.config import ModelConfig, preset

RESULTS = Path(__file__).parent / "results"
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Card:
    """A GPU: what it reaches, and its memory."""

    name: str
    ceilings: Ceilings
    memory: float


# Copy (read and written) and 8192^3 bf16 product as measured on each; 16 exponentials a clock on each of
# 132 multiprocessors.
CARDS = {
    "H200": Card("H200", Ceilings(4.3e12, 790e12, 3.86e12), 141e9),
    "H100": Card("H100", Ceilings(3.0e12, 798e12, 3.86e12), 80e9),
}


@dataclass(frozen=True)
class Compute:
    """How near the GPU comes to its floor."""

    efficiency: float = 0.55
    """Share of the floor; estimated from the compiled kernels (4,800 of 8,830 images/s, H200), goal 0.8."""
    shortest_us: float = 5.0
    """Least time of a kernel in a graph, microseconds: launch gap, filling and draining. An assumption."""


def _rate_per_core(stage: str) -> float:
    """Images a second and core of a stage of the measured input pipeline."""
    result = json.loads((RESULTS / "cpu_data.json").read_text(encoding="utf-8"))
    row = next(row for row in result["rows"] if row["stage"] == stage)
    return float(row["images_per_second"] / result["cores"])


def _serial_us(*parts: str) -> float:
    """CPU time of these parts of preparing an image, in one thread: the medians of `bench_host`."""
    result = json.loads((RESULTS / "cpu_host.json").read_text(encoding="utf-8"))
    return sum(statistics.median(result["data"]["microseconds"][part]) for part in parts)


_IN_PYTHON = ("order", "draws", "feeding")  # under the interpreter's lock
_IN_CPP = ("records and probe", "programs")


@dataclass(frozen=True)
class Host:
    """CPU time of a process, and what its data threads make."""

    graph: bool = True
    """Replicated steps are one CUDA graph; sharded ones never are."""
    graph_ms: float = 1.0
    """Of a step as a graph: input copies, one launch, bookkeeping. An assumption."""
    eager_ms: float = 18.0
    """Of an eager ViT-S step on a GPU server's CPU: 16 to 20, estimated; others by their number of stages."""
    unit_ms: float = 0.4
    """Of FSDP2's hooks a sharded unit and step. An assumption."""
    serial_us: float = field(default_factory=lambda: _serial_us(*_IN_PYTHON, *_IN_CPP))
    """An image in the one thread that prepares batches: `results/cpu_host.json`."""
    plain_serial_us: float = field(
        default_factory=lambda: _serial_us("order", "records and probe", "feeding")
    )
    """The same where only plain views are made."""
    augmented_serial_us: float = 115.0
    """The same where crops are augmented: records and feeding 8, NumPy and torch 107 (ABINet's)."""
    lock_share: float = field(
        default_factory=lambda: _serial_us(*_IN_PYTHON) / _serial_us(*_IN_PYTHON, *_IN_CPP)
    )
    """Share of that thread's time in which the training loop waits for Python's lock: all that is not C++.
    Augmentation is not."""
    cores_per_gpu: float = 16.0
    """CPU cores whose data threads feed a GPU."""
    views_per_core: float = field(
        default_factory=lambda: _rate_per_core("whole pipeline, both views as bytes")
    )
    """Images a second and core, both views: `results/cpu_data.json`."""
    plain_per_core: float = field(default_factory=lambda: _rate_per_core("whole pipeline, plain view alone"))
    """The same for plain views alone."""

    def serial(self, views: str) -> tuple[float, float]:
        """Microseconds an image in the thread that prepares batches, and those under Python's lock."""
        if views == "augmented":
            return self.augmented_serial_us, self.augmented_serial_us
        serial = self.plain_serial_us if views == "plain" else self.serial_us
        return serial, self.lock_share * serial


@dataclass(frozen=True)
class Job:
    """What is trained, as the formulas need it.

    passes:  stages of a step by part for a batch; "optimiser" is one of them.
    trained: parameters with a gradient; `units` equal blocks of `unit` parameters and the rest.
    teacher: parameters of the frozen one.
    stored:  values that the backward pass needs, an image.
    views:   what is made of a crop.
    """

    name: str
    passes: Callable[[int], dict[str, Passes]]
    trained: int
    unit: int
    units: int
    teacher: int
    stored: float
    views: Literal["plain", "guided", "augmented"] = "guided"

    @property
    def rest(self) -> int:
        """Parameters outside the blocks: FSDP2's root unit."""
        return self.trained - self.units * self.unit


def block_parameters(width: int, mlp_ratio: float = 4.0) -> int:
    """Of a ViT block with biases: 4 D^2 + 4 D of attention, an MLP, two norms of 2 D."""
    hidden = int(width * mlp_ratio)
    return 4 * width * width + 4 * width + 2 * width * hidden + hidden + width + 4 * width


def lmim(name: str, config: ModelConfig) -> Job:
    """LMIM of these sizes."""
    unit = block_parameters(config.width, config.mlp_ratio)
    edges = (config.patch_pixels + 1) * config.width + 3 * config.width  # embedding, cls, last norm
    teacher = config.depth * unit + edges
    return Job(
        name,
        lambda batch: step_passes(config, batch, BF16),
        trained_parameters(config),
        unit,
        config.depth,
        teacher if config.target == "teacher" else 0,
        stored_values(config),
    )


def stored_values(config: ModelConfig) -> float:
    """An image; a token of a block keeps about 16 widths (residuals, norms, QKV, context, MLP), of a decoder
    layer 20."""
    full, shown = config.num_patches + 1, config.num_visible + 1
    encoder = 16.0 * config.depth * config.width * (full + shown)
    return encoder + 20.0 * config.decoder_depth * config.decoder_width * full


# --- computing ---


@dataclass(frozen=True)
class Times:
    """Seconds of the passes and of the update."""

    forward: float
    backward: float
    optimiser: float

    @property
    def total(self) -> float:
        """Of a step."""
        return self.forward + self.backward + self.optimiser


def compute_times(job: Job, batch: int, card: Card, compute: Compute) -> Times:
    """Floors over the efficiency, no kernel shorter than the shortest."""

    def seconds(stages: Iterable[Work]) -> float:
        times = (floor_seconds([stage], card.ceilings) / compute.efficiency for stage in stages)
        return sum(max(time, compute.shortest_us * 1e-6) for time in times)

    parts = dict(job.passes(batch))
    optimiser = seconds(parts.pop("optimiser").forward)
    forward = sum(seconds(passes.forward) for passes in parts.values())
    return Times(forward, sum(seconds(passes.backward) for passes in parts.values()), optimiser)


def eager_host_ms(job: Job, host: Host) -> float:
    """That of ViT-S, by the number of stages."""

    def stages(of: Job) -> int:
        return sum(len(passes.of("forward+backward")) for passes in of.passes(1).values())

    return host.eager_ms * stages(job) / stages(lmim("ViT-S", preset("small")))


# --- memory ---


def activation_bytes(job: Job, batch: int) -> float:
    """Half of a ViT-S step's peak in fp32, measured on a CPU, less its state; others by stored values."""
    result = json.loads((RESULTS / "cpu_step_small.json").read_text(encoding="utf-8"))
    row = next(row for row in result["rows"] if row["variant"] == "ours")
    small = lmim("ViT-S", preset("small"))
    state = FP32 * (4 * small.trained + small.teacher)  # weights, gradients, two moments; teacher
    measured = (row["peak_memory"] - state) / row["batch"] * BF16 / FP32
    return float(measured * job.stored / small.stored * batch)


# --- other stages of training, for expected times ---


def mae(name: str, config: ModelConfig) -> Job:
    """The MAE stage: the encoder on visible patches, ViT blocks on all tokens."""
    seen = replace(config, mask_ratio=config.mae_mask_ratio, guidance=False, target="norm_pixel")
    deep = replace(
        config, width=config.decoder_width, depth=config.mae_decoder_depth, heads=config.decoder_heads
    )
    unit = block_parameters(config.width, config.mlp_ratio)
    blocks = config.mae_decoder_depth * block_parameters(config.decoder_width, config.mlp_ratio)
    edges = (config.patch_pixels + 1 + 3) * config.width + (config.width + 1) * config.decoder_width
    edges += (
        3 * config.decoder_width + (config.decoder_width + 1) * config.patch_pixels
    )  # token, norm, pixels
    trained = config.depth * unit + blocks + edges

    def passes(batch: int) -> dict[str, Passes]:
        parts = {"masked": step_passes(seen, batch, BF16)["masked"]}
        parts["decoder"] = step_passes(deep, batch, BF16)["guidance"]
        return parts | {"optimiser": Passes((Work(float(ADAMW_BYTES * trained)),), ())}

    tokens = config.mae_num_visible + 1
    stored = 16.0 * config.depth * config.width * tokens
    stored += 16.0 * config.mae_decoder_depth * config.decoder_width * (config.num_patches + 1)
    return Job(name, passes, trained, unit, config.depth, 0, stored, views="plain")


def reader(name: str, config: ModelConfig, trained: int, layers: int, width: int) -> Job:
    """The recogniser: the encoder on all tokens; of its decoder keys and values, most of its work."""
    tokens = config.num_patches + 1

    def passes(batch: int) -> dict[str, Passes]:
        parts = {"encoder": step_passes(config, batch, BF16)["guidance"]}
        keys = floors.linear(batch * tokens, width, 2 * width, BF16)
        parts |= {f"keys {number}": keys for number in range(layers)}
        return parts | {"optimiser": Passes((Work(float(ADAMW_BYTES * trained)),), ())}

    stored = 16.0 * config.depth * config.width * tokens + 2.0 * layers * width * tokens
    unit = block_parameters(config.width, config.mlp_ratio)
    return Job(name, passes, trained, unit, config.depth, 0, stored, views="augmented")
