"""The benchmark of colours: what it is held against, and its floor."""

import pytest

from benchmarks import bench_photometric, floors, harness
from lmim_fast.ops import dispatch


@pytest.mark.parametrize("number", [0, 1])
def test_the_kernel_is_held_against_plain_pytorch_at_the_size_of_a_crop(number: int) -> None:
    operation = list(bench_photometric.operations(1))[number]
    with dispatch.backend("triton"):
        assert harness.check(operation, "ours") == "kernels photometric._photometric"


def test_both_images_their_coverage_and_the_views_are_counted_once() -> None:
    (both,) = floors.photometric(512, 32 * 128, 2, guidance=True).forward
    (plain,) = floors.photometric(512, 32 * 128, 2, guidance=False).forward
    assert both.bytes == 512 * 4096 * (3 + 3 + 1 + 2 * 6)
    assert plain.bytes == 512 * 4096 * (3 + 6)
    assert floors.photometric(512, 32 * 128, 2, guidance=True).backward == ()
