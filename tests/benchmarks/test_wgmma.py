"""Operands of wgmma decoded from PTX, and the pattern that Hopper may read past the end of shared memory."""

import os

import forked
import pytest

from benchmarks.wgmma import Operand, Range, hazards, operands

# 64-byte swizzle, 512 bytes between 8 rows; and 128-byte swizzle, 1024 bytes.
NARROW, WIDE = 2 << 62 | 32 << 32, 1 << 62 | 64 << 32


def signed(word: int) -> int:
    """A 64-bit word as PTX writes it."""
    return word - 2**64 if word >> 63 else word


def kernel(start: str, descriptor: int, transposed: int = 1) -> str:
    """PTX of a product whose b operand begins at the byte address in %r9."""
    return f"""
	mov.b32 	%r1, global_smem;
{start}
	bfe.u32 	%r10, %r9, 4, 14;
	cvt.u64.u32 	%rd1, %r10;
	or.b64 	%rd2, %rd1, {signed(descriptor)};
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {{%f1}}, {{%r2,%r3}}, %rd2, %p1, 1, 1, {transposed};
"""


def test_a_descriptor_is_decoded_into_place_offsets_and_swizzle() -> None:
    (found,) = operands(kernel("	add.s32 	%r9, %r1, 67584;", NARROW))
    assert found == Operand(
        "m64n32k16",
        "b",
        transposed=True,
        start=Range(67584, 67584),
        leading=0,
        stride=512,
        swizzle=64,
        size=1024,
    )
    assert found.end == 68608
    assert str(found) == ("b of m64n32k16, MN-major, 64-byte swizzle, LBO 0, SBO 512, 1024 bytes from 67584")


def test_both_operands_in_memory_have_their_own_order() -> None:
    ptx = f"""
	mov.b32 	%r1, global_smem;
	shr.u32 	%r2, %r1, 4;
	and.b32 	%r3, %r2, 16383;
	cvt.u64.u32 	%rd1, %r3;
	add.s64 	%rd2, %rd1, {signed(NARROW + 256)};
	add.s64 	%rd3, %rd1, {signed(WIDE | 128 << 16)};
	wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {{%f1}}, %rd2, %rd3, 0, 1, 1, 0, 1;
"""
    a, b = operands(ptx)
    assert (a.side, a.transposed, a.start.low, a.swizzle, a.size) == ("a", False, 4096, 64, 8 * 512)
    # 128 columns are two lines of the swizzle, 2048 bytes apart; 16 steps of the sum are two times 8 lines
    assert (b.side, b.transposed, b.leading, b.size) == ("b", True, 2048, 2048 + 1024 + 1024)


def test_a_place_that_depends_on_the_warp_is_a_range() -> None:
    start = """
	mov.u32 	%r2, %tid.x;
	shl.b32 	%r3, %r2, 6;
	and.b32 	%r4, %r3, 256;
	add.s32 	%r5, %r1, 8192;
	add.s32 	%r9, %r5, %r4;"""
    (found,) = operands(kernel(start, NARROW))
    assert found.start == Range(8192, 8448)


def test_a_place_that_a_loop_changes_may_be_anywhere() -> None:
    start = """
	mov.b32 	%r9, %r1;
$loop:
	add.s32 	%r9, %r9, 2048;"""
    (found,) = operands(kernel(start, NARROW))
    assert found.start == Range(0, 16 * 16383)
    assert list(hazards(kernel(start, NARROW), 65536)) == [found]
    assert list(hazards(kernel(start, WIDE), 65536)) == []


@pytest.mark.parametrize(
    "other",
    [
        "	@%p2 mov.b32 %r9, 68608;",
        "	ld.shared.v2.b32 {%r9, %r8}, [%r7];",
        "	shfl.sync.idx.b32 %r9|%p3, %r2, 0, 31, -1;",
        "	mov.b32 %r8, 1; mov.b32 %r9, 68608;",
        "$L1: mov.b32 %r9, 68608;",
        "	call.uni (%r9), f, (%r2);",
        "	selp.b32 %r9, 68608, 0, %p1;",
        "	mad.lo.s32 %r9, %r2, 4, 68608;",
    ],
)
def test_a_second_definition_of_any_kind_is_not_overlooked(other: str) -> None:
    ptx = kernel(f"	add.s32 	%r9, %r1, 4096;\n{other}", NARROW)
    assert [operand.start for operand in hazards(ptx, 69632)] == [Range(0, 16 * 16383)]


@pytest.mark.parametrize(
    "start",
    [
        "	mov.b32 	%r2, 4294967295;\n	add.s32 	%r9, %r2, 8192;",  # wraps around
        "	sub.s32 	%r2, %r1, 64;\n	shr.u32 	%r9, %r2, 1;",  # of a negative number
    ],
)
def test_numbers_that_32_bits_do_not_hold_are_unknown(start: str) -> None:
    (found,) = operands(kernel(start, NARROW))
    assert found.start == Range(0, 16 * 16383)


def test_addresses_of_15_bits_are_followed_too() -> None:
    ptx = kernel("	xor.b32 	%r9, %r1, 1;", NARROW).replace("%r9, 4, 14", "%r9, 4, 15")
    assert [operand.start for operand in operands(ptx)] == [Range(0, 16 * 16383)]


def test_a_product_that_cannot_be_read_is_an_error() -> None:
    ptx = kernel("	add.s32 	%r9, %r1, 0;", NARROW) + "	wgmma.mma_async.sync.aligned.new;"
    with pytest.raises(ValueError, match="2 products, of which 1 can be read"):
        list(operands(ptx))


def test_an_unknown_descriptor_is_an_error() -> None:
    ptx = kernel("	add.s32 	%r9, %r1, 0;", NARROW).replace("or.b64", "xor.b64")
    with pytest.raises(ValueError, match="cannot follow descriptor %rd2 of m64n32k16"):
        list(operands(ptx))


@pytest.mark.parametrize(
    ("start", "descriptor", "transposed", "dangerous"),
    [
        (68608, NARROW, 1, True),  # ends at the end
        (68096, 3 << 62 | 16 << 32, 1, False),  # 32 columns in 32-byte lines without an LBO: 512 bytes
        (68608, 3 << 62 | 16 << 32, 1, True),  # ends less than 1024 bytes before the end
        (67584, NARROW, 1, False),  # another tile follows
        (68608, NARROW, 0, False),  # K-major
        (65536, WIDE, 1, False),
        (67584, WIDE, 1, False),  # nobody reports it with 128 bytes
    ],
)
def test_only_narrow_transposed_tiles_at_the_end_are_hazards(
    start: int, descriptor: int, transposed: int, dangerous: bool
) -> None:
    ptx = kernel(f"	add.s32 	%r9, %r1, {start};", descriptor, transposed=transposed)
    assert [operand.start.low for operand in hazards(ptx, 69632)] == ([start] if dangerous else [])


FORMER = """
import sys
from unittest import mock
from lmim_fast.kernels import attention_backward
from benchmarks import static
former = attention_backward.Blocks(32, 32, 256, num_warps=8)
with mock.patch.object(attention_backward, "_blocks", lambda *given, **named: former):
    sys.exit(static.main(["--only", "self-attention decoder 257 bfloat16, p=0.0", "--jobs", "1"]))
"""


def test_the_former_blocks_of_the_decoders_backward_pass_fail() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = forked.run("-c", FORMER, env=environment)
    assert result.returncode == 1, result.stderr
    assert (
        "attention_backward for self-attention decoder 257 bfloat16, p=0.0: b of m64n32k16" in result.stderr
    )
    assert "may be read past the end of the" in result.stderr
    assert "1 FAILED" in result.stdout.splitlines()[-1]
