"""GPUs, cores, memory, shared memory and open files of this machine."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lmim_fast.doctor.findings import Findings

if TYPE_CHECKING:
    import torch

GIB = 2**30
_CORES = 4  # for each GPU: fewer feed no modern one
_SHARED = GIB  # bytes of /dev/shm: containers begin with 64 MiB, on which processes that train together fail
_FILES = 1024  # open at a time: databases, checkpoints, sockets of the other processes
_SMALL = 4 * GIB  # of memory: a process that trains takes 2 to 3


def check_machine(findings: Findings) -> None:
    """Add what there is to say of it."""
    with findings.check("GPU"):
        _gpus(findings)
    with findings.check("cores"):
        _cores(findings)
    with findings.check("memory"):
        available = available_memory()
        text = f"{amount(available)} available"
        if available < _SMALL:
            findings.warning("memory", text, "free some: a process that trains takes 2 to 3 GiB")
        else:
            findings.ok("memory", text)
    with findings.check("/dev/shm"):
        _shared_memory(findings)
    with findings.check("open files"):
        _open_files(findings)


def available_memory() -> int:
    """Bytes that new processes can have, the limit of a container included."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = 1024 * int(rest.split()[0])
    available = values["MemAvailable"]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def cores() -> float:
    """CPU cores that this process may use, the quota of a container included."""
    count = float(len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        most, period = quota.read_text().split()
        if most != "max":
            count = min(count, int(most) / int(period))
    return count


def amount(size: float) -> str:
    """Bytes in the unit that people use for such a number."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def visible_gpus() -> int:
    """GPUs that torch sees; 0 where torch is missing."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpus(findings: Findings) -> None:
    import torch

    if not torch.cuda.is_available():
        _no_gpu(findings, torch.version.cuda)
        return
    for number in range(torch.cuda.device_count()):
        with findings.check(f"GPU {number}"):
            _gpu(findings, number)
    if torch.cuda.device_count() == 1:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_nccl_available():
        findings.ok("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        findings.error(
            "NCCL", "this torch has none: processes cannot train together", "install torch's own wheel"
        )


def _no_gpu(findings: Findings, cuda: str | None) -> None:
    if not os.path.exists("/dev/nvidiactl"):
        findings.warning(
            "GPU", "none here: training runs on the CPU", "for real runs take a machine with a GPU"
        )
    elif cuda is None:
        advice = "install the CUDA build of torch: pytorch.org/get-started"
        findings.error("GPU", "there is one, and this torch is built without CUDA", advice)
    else:
        advice = "compare `nvidia-smi` with torch.version.cuda; a newer driver, or an older torch"
        findings.error("GPU", f"there is one, and torch for CUDA {cuda} cannot use it", advice)


def _gpu(findings: Findings, number: int) -> None:
    import torch

    device = torch.device("cuda", number)
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    name = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    text = f"{name}, {amount(free)} of {amount(total)} free"
    what = f"GPU {number}"
    if properties.major < 8:
        findings.warning(
            what, f"{text}; it has no bf16 products", "pass --precision fp32, or take an Ampere or later"
        )
    elif free < 0.9 * total:
        findings.warning(what, text, "another process uses it: `nvidia-smi` shows which")
    else:
        findings.ok(what, text)
    problem = _kernel_problem(device)
    if problem is None:
        findings.ok(what, "a kernel of this package gives the numbers of its plain form")
    else:
        findings.error(what, problem, "LMIM_FAST_BACKEND=eager runs without kernels, slower")


def _kernel_problem(device: torch.device) -> str | None:
    """What one small kernel does wrong here, compiled and launched for the device."""
    import torch

    from lmim_fast.ops import dispatch
    from lmim_fast.ops.gelu import bias_gelu

    x = torch.linspace(-4, 4, 128 * 256, device=device).reshape(128, 256)
    with torch.no_grad():
        with dispatch.backend("eager"):
            expected = bias_gelu(x, x[0])
        try:
            with dispatch.backend("triton"):
                found = bias_gelu(x, x[0])
        except Exception as error:  # of whatever kind: compilers and drivers raise their own
            return f"a kernel cannot run: {type(error).__name__}: {str(error).splitlines()[0]}"
    apart = float((found - expected).abs().max())
    return None if apart < 1e-4 else f"a kernel differs from its plain form by {apart:.2g}"


def _cores(findings: Findings) -> None:
    count, gpus = cores(), visible_gpus()
    if gpus and count < _CORES * gpus:
        text = f"{count:g} for {gpus} GPUs"
        findings.warning("cores", text, f"views are made on them: {_CORES} or more for each GPU")
    else:
        findings.ok("cores", f"{count:g}")


def _shared_memory(findings: Findings) -> None:
    if not os.path.isdir("/dev/shm"):
        findings.warning("/dev/shm", "is not there", "processes that train together need it: mount a tmpfs")
        return
    free = shutil.disk_usage("/dev/shm").free
    text = f"{amount(free)} free"
    if free < _SHARED:
        findings.warning("/dev/shm", text, "docker run --shm-size=8g, if processes are to train together")
    else:
        findings.ok("/dev/shm", text)


def _open_files(findings: Findings) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    if unlimited or soft >= _FILES:
        findings.ok("open files", "no limit" if unlimited else f"{soft:,} allowed")
    else:
        findings.warning("open files", f"{soft:,} allowed", f"ulimit -n {min(hard, _FILES)}")
