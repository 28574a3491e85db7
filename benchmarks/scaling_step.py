"""A training step on many GPUs, for `benchmarks/scaling.py`: collectives, memory, and what limits the step.

Nothing here is measured on many GPUs: communication comes from bytes, bandwidths and latencies. Times are
seconds, sizes bytes, rates a second, unless a name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.scaling_model import (
    BF16,
    CARDS,
    FP32,
    Card,
    Compute,
    Host,
    Job,
    Times,
    activation_bytes,
    compute_times,
    eager_host_ms,
)

MODES = ("replicate", "shard", "hybrid")
# bf16 out of the gathered buffer (read and written), gradients into the fp32 one that is scattered
SHARD_COPY_BYTES = 2 * BF16 + BF16 + FP32
USABLE = 0.9  # of a GPU's memory; the rest is the CUDA context's, NCCL's and lost between blocks
TIE = 0.15  # a mode has to be faster by more: absolute times are good to about a quarter, ratios to less
MOST_PASSES = 64  # forward-backward passes a step that are tried before a model counts as too large


@dataclass(frozen=True)
class Fabric:
    """What connects the GPUs; bandwidths are those of one direction."""

    gpus_per_node: int = 8
    """As in an HGX board."""
    nvlink_bandwidth: float = 360e9
    """Bytes a second and GPU: NVLink 4 has 450e9, NCCL's collectives reach about 80 % of it."""
    network_bandwidth: float = 340e9
    """Bytes a second and node: 8 InfiniBand ports of 400 Gbit/s are 400e9, of which 85 %; 100 Gbit/s Ethernet
    is about 10e9."""
    nvlink_latency: float = 4e-6
    """A hop in a node. Source: NCCL's own model (src/graph/tuning.cc), Simple protocol."""
    network_latency: float = 14e-6
    """A hop between nodes, likewise; with TCP rather 50e-6."""
    launch_latency: float = 8.4e-6
    """Of any collective, likewise."""
    tree_share: float = 0.92
    """Bandwidth of NCCL's trees over that of its rings, likewise."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: how many, over how many nodes, at what bandwidth."""

    ranks: int
    nodes: int
    bandwidth: float


def all_ranks(gpus: int, fabric: Fabric) -> Group:
    """All of them; across nodes a ring is as fast as the slower of NVLink and a node's network."""
    nodes = math.ceil(gpus / fabric.gpus_per_node)
    slower = min(fabric.nvlink_bandwidth, fabric.network_bandwidth)
    return Group(gpus, nodes, fabric.nvlink_bandwidth if nodes == 1 else slower)


def across_nodes(gpus: int, fabric: Fabric) -> Group:
    """One rank a node; the ranks of a node share its network."""
    nodes, local = math.ceil(gpus / fabric.gpus_per_node), min(gpus, fabric.gpus_per_node)
    return Group(nodes, nodes, fabric.network_bandwidth / local)


def all_reduce_bytes(size: float, ranks: int) -> float:
    """Sent by each rank of a ring: 2 (n - 1) / n of the buffer."""
    return 2.0 * (ranks - 1) / ranks * size


def gather_bytes(size: float, ranks: int) -> float:
    """Sent by each rank of a ring for an all-gather to, or a reduce-scatter of, `size` bytes: (n - 1) / n."""
    return (ranks - 1) / ranks * size


def all_reduce_seconds(size: float, group: Group, fabric: Fabric) -> float:
    """The faster of a ring and of a tree. Source: NCCL's own model."""
    if group.ranks == 1:
        return 0.0
    between = 2 * (group.nodes - 1)
    inside = 2 * (group.ranks - 1) - between
    ring = inside * fabric.nvlink_latency + between * fabric.network_latency
    ring += all_reduce_bytes(size, group.ranks) / group.bandwidth
    depth = math.ceil(math.log2(group.nodes)) * fabric.network_latency
    tree = 2 * ((group.ranks / group.nodes - 1) * fabric.nvlink_latency + depth)
    tree += 2.0 * size / (group.bandwidth * fabric.tree_share)
    return fabric.launch_latency + min(ring, tree)


def gather_seconds(size: float, group: Group, fabric: Fabric) -> float:
    """An all-gather or a reduce-scatter, a ring. Source: NCCL's own model."""
    if group.ranks == 1:
        return 0.0
    between = group.nodes - 1
    latency = (group.ranks - 1 - between) * fabric.nvlink_latency + between * fabric.network_latency
    return fabric.launch_latency + latency + gather_bytes(size, group.ranks) / group.bandwidth


def memory_bytes(
    job: Job, mode: str, gpus: int, batch: int, fabric: Fabric, reshard: bool
) -> dict[str, float]:
    """Of a GPU, by part; `batch` is of one forward pass."""
    over = {"replicate": 1, "shard": gpus, "hybrid": min(gpus, fabric.gpus_per_node)}[mode]
    parts = {
        "weights": FP32 * job.trained / over,
        "gradients": FP32 * job.trained / over,  # the flat buffer, or the shards
        "moments": 2.0 * FP32 * job.trained / over,
        "teacher": float(BF16 * job.teacher),
        "activations": activation_bytes(job, batch),
    }
    if mode == "replicate":
        parts["casts"] = float(BF16 * job.trained)  # autocast keeps bf16 weights for the step
    else:
        largest = max(job.unit, job.rest)
        gathered = job.rest + 2 * job.unit if reshard else job.trained
        parts["gathered"] = float(BF16 * gathered)
        parts["unsharded gradients"] = float((BF16 + FP32) * largest)  # as they come, and as they are sent
    return parts


@dataclass(frozen=True)
class Setup:
    """Everything that a prediction assumes."""

    card: Card = CARDS["H200"]
    compute: Compute = field(default_factory=Compute)
    fabric: Fabric = field(default_factory=Fabric)
    host: Host = field(default_factory=Host)
    reshard: bool = False


@dataclass(frozen=True)
class Step:
    """A predicted step; the parts are milliseconds.

    batch:         images a GPU, in `passes` forward-backward passes.
    compute:       kernels of the model and the update.
    communication: all collectives; `exposed` of it is not hidden behind computing.
    host:          the training loop's own CPU time.
    serial:        the thread that prepares batches; `cores`: the data threads of the GPU's cores.
    sent_bytes:    by a GPU.
    memory:        bytes a GPU by part.
    """

    mode: str
    gpus: int
    batch: int
    passes: int
    compute: float
    communication: float
    exposed: float
    host: float
    serial: float
    cores: float
    total: float
    limit: str
    sent_bytes: float
    memory: dict[str, float]
    fits: bool

    @property
    def images_per_second(self) -> float:
        """Of all GPUs."""
        return 1e3 * self.gpus * self.batch / self.total


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step; `first` and `last` cannot overlap, the others can with the pass they are in."""

    first: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    last: float = 0.0
    sent_bytes: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all."""
        return self.first + self.forward + self.backward + self.last


def traffic(job: Job, mode: str, gpus: int, fabric: Fabric, reshard: bool = False) -> Traffic:
    """What is sent in a step, and when.

    replicate: one fp32 buffer of all gradients, after the backward pass. shard, hybrid (FSDP2): bf16 weights
    are gathered and fp32 gradients scattered a unit; `reshard` gathers the blocks again for the backward
    pass; hybrid reduces the shards between the nodes as well.
    """
    if mode == "replicate":
        size = float(FP32 * job.trained)
        time = all_reduce_seconds(size, all_ranks(gpus, fabric), fabric)
        return Traffic(last=time, sent_bytes=all_reduce_bytes(size, gpus))
    local = min(gpus, fabric.gpus_per_node) if mode == "hybrid" else gpus
    group, peers = all_ranks(local, fabric), across_nodes(gpus, fabric)

    def gather(parameters: int) -> float:
        return gather_seconds(BF16 * parameters, group, fabric)

    def scatter(parameters: int) -> float:
        time = gather_seconds(FP32 * parameters, group, fabric)
        if mode == "hybrid":
            time += all_reduce_seconds(FP32 * parameters / local, peers, fabric)
        return time

    again = job.units * job.unit if reshard else 0
    sent = gather_bytes(BF16 * (job.trained + again) + FP32 * job.trained, local)
    if mode == "hybrid":
        sent += all_reduce_bytes(FP32 * job.trained / local, peers.ranks)
    blocks = job.units * gather(job.unit)
    return Traffic(
        first=gather(job.rest),
        forward=blocks,
        backward=job.units * scatter(job.unit) + (blocks if reshard else 0.0),
        last=scatter(job.rest),
        sent_bytes=sent,
    )


def gpu_seconds(times: Times, sent: Traffic, passes: int = 1, copies: float = 0.0) -> float:
    """Computing and what of the communication it does not hide; only the last of the passes scatters."""
    plain = (passes - 1) * (times.forward + times.backward)
    forward, backward = max(times.forward, sent.forward), max(times.backward + copies, sent.backward)
    return sent.first + forward + plain + backward + sent.last + times.optimiser


def predict(job: Job, mode: str, gpus: int, batch: int, setup: Setup) -> Step:
    """A step of `batch` images a GPU, in as few passes as fit into memory."""
    passes, memory = 1, dict[str, float]()
    while passes <= MOST_PASSES:
        memory = memory_bytes(job, mode, gpus, math.ceil(batch / passes), setup.fabric, setup.reshard)
        if sum(memory.values()) <= USABLE * setup.card.memory or passes >= batch:
            break
        passes *= 2
    passes = min(passes, MOST_PASSES, batch)
    fits = sum(memory.values()) <= USABLE * setup.card.memory
    times = compute_times(job, math.ceil(batch / passes), setup.card, setup.compute)
    sent, copies, host = traffic(job, mode, gpus, setup.fabric, setup.reshard), 0.0, setup.host
    loop = eager_host_ms(job, host) * passes
    if mode == "replicate":
        if host.graph and passes == 1:
            loop = host.graph_ms
    else:
        over = min(gpus, setup.fabric.gpus_per_node) if mode == "hybrid" else gpus
        times = replace(times, optimiser=times.optimiser / over)
        copies = SHARD_COPY_BYTES * job.trained / setup.card.ceilings.bandwidth
        loop += host.unit_ms * (job.units + 1) * passes
    computing = passes * (times.forward + times.backward) + times.optimiser + copies
    device = gpu_seconds(times, sent, passes, copies)
    serial, locked = (batch * part / 1e3 for part in host.serial(job.views))
    views_per_core = host.plain_per_core if job.views == "plain" else host.views_per_core
    cores = 1e3 * batch / (host.cores_per_gpu * views_per_core)
    exposed = device - computing
    process = max(loop + locked, serial)
    total = max(1e3 * device, process, cores)
    if total == 1e3 * device:
        limit = "communication" if exposed > computing else "compute"
    else:
        limit = "host" if total == process and loop > serial else "data"
    return Step(
        mode,
        gpus,
        batch,
        passes,
        1e3 * computing,
        1e3 * sent.total,
        1e3 * exposed,
        loop,
        serial,
        cores,
        total,
        limit,
        sent.sent_bytes,
        memory,
        fits,
    )


def modes(gpus: int, fabric: Fabric) -> tuple[str, ...]:
    """That differ: one GPU shares nothing, and within a node hybrid is shard."""
    return MODES[:1] if gpus == 1 else MODES[:2] if gpus <= fabric.gpus_per_node else MODES


def best(steps: Sequence[Step]) -> Step:
    """The simplest (`MODES` has them in order) of those that fit and are about as fast as the fastest."""
    possible = [step for step in steps if step.fits] or steps
    fastest = min(step.total for step in possible)
    return next(step for step in possible if step.total <= (1 + TIE) * fastest)


def efficiency(step: Step, job: Job, setup: Setup) -> float:
    """Against one GPU that would compute the images of all, never waiting, over the GPUs; at most 1."""
    alone = compute_times(job, step.gpus * step.batch, setup.card, setup.compute).total
    return 1e3 * alone / step.gpus / step.total
