"""That the interpreter of kernels does what a GPU does, and notices what a GPU may not."""

import numpy as np
import pytest

from tests.ops import ptx


def kernel(body, shared=""):
    """A kernel of two arguments, whose addresses are in `%rd1` and `%rd2`, `%r1` is the thread's number."""
    return f"""
.version 8.0
.target sm_80
.address_size 64
{shared}
.visible .entry it(
	.param .u64 it_param_0,
	.param .u64 it_param_1
)
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .f32 	%f<9>;
	.reg .b32 	%r<19>;
	.reg .b64 	%rd<9>;
	ld.param.u64 	%rd1, [it_param_0];
	ld.param.u64 	%rd2, [it_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
{body}
	ret;
}}
"""


def run(body, values, shared="", threads=32, **grid):
    result = np.zeros(len(values), values.dtype)
    ptx.run(kernel(body, shared), [values], [result], blocks=len(values) // threads, threads=threads, **grid)
    return result


MEMORY = ".shared .align 16 .b8 memory[128];"
NUMBERS = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r3, %r2, -5", lambda a: a - 5),
        ("shr.s32 %r3, %r2, 3", lambda a: a.astype(np.int32) >> 3),
        ("shl.b32 %r3, %r2, 35", lambda a: a * 0),
        ("mul.hi.u32 %r3, %r2, 1000", lambda a: a.astype(np.uint64) * 1000 >> 32),
        ("mad.lo.s32 %r3, %r2, 7, %r2", lambda a: a * 8),
        ("bfi.b32 %r3, 5, %r2, 4, 3", lambda a: a & ~np.uint32(0x70) | 0x50),
        ("shf.r.wrap.b32 %r3, %r2, 1, 8", lambda a: a >> 8 | 1 << 24),
        ("prmt.b32 %r3, %r2, 0, 0x4012", lambda a: a >> 16 & 0xFF | a & 0xFF00 | (a & 0xFF) << 16),
        ("lop3.b32 %r3, %r2, 255, 256, 0xea", lambda a: a & 255 | 256),
        ("min.s32 %r3, %r2, 9", lambda a: np.minimum(a.astype(np.int32), 9)),
        ("redux.sync.max.u32 %r3, %r2, -1", lambda a: a * 0 + a.max()),
        ("shfl.sync.bfly.b32 %r3|%p1, %r2, 5, 31, -1", lambda a: a[np.arange(32) ^ 5]),
        ("setp.lt.s32 %p1, %r2, 0;\n selp.b32 %r3, 1, %r1, %p1", lambda a: np.where(a >> 31, 1, np.arange(32))),
    ],
)
def test_instructions(instruction, expected):
    got = run(f"ld.global.u32 %r2, [%rd4];\n{instruction};\nst.global.u32 [%rd5], %r3;", NUMBERS)
    np.testing.assert_array_equal(got, expected(NUMBERS).astype(np.int64) & 0xFFFFFFFF)


def test_instructions_for_halves():
    values = np.random.default_rng(1).normal(size=64).astype(np.float16)
    got = run(
        "ld.global.u32 %r2, [%rd4];\nfma.rn.f16x2 %r3, %r2, %r2, %r2;\nst.global.u32 [%rd5], %r3;",
        values.view(np.uint32),
    )
    np.testing.assert_array_equal(got.view(np.float16), (values.astype("d") ** 2 + values).astype(np.float16))


def test_threads_that_part_come_together():
    body = """
	setp.gt.u32 %p1, %r1, 9;
	mov.u32 %r2, 0;
	@%p1 bra $L__BB0_2;
$L__BB0_1:
	add.s32 %r2, %r2, 1;
	setp.lt.u32 %p2, %r2, %r1;
	@%p2 bra $L__BB0_1;
$L__BB0_2:
	redux.sync.add.s32 %r3, %r2, -1;
	st.global.u32 [%rd5], %r3;"""
    assert run(body, NUMBERS)[0] == 1 + sum(range(10))


def test_blocks_have_shared_memory_of_their_own_and_meet_at_barriers():
    body = """
	ld.global.u32 %r2, [%rd4];
	shl.b32 %r4, %r1, 2;
	mov.u32 %r5, memory;
	add.s32 %r6, %r5, %r4;
	st.shared.u32 [%r6], %r2;
	bar.sync 0;
	xor.b32 %r7, %r4, 124;
	ld.shared.u32 %r3, [%r7];
	st.global.u32 [%rd5], %r3;"""
    np.testing.assert_array_equal(run(body, NUMBERS, MEMORY), NUMBERS[::-1])


def test_a_missing_barrier_shows_where_warps_do_not_go_in_step():
    body = """
	shl.b32 %r4, %r1, 2;
	st.shared.u32 [%r4], %r1;
	{barrier}
	xor.b32 %r7, %r4, 252;
	ld.shared.u32 %r3, [%r7];
	st.global.u32 [%rd5], %r3;"""
    memory, numbers = MEMORY.replace("128", "256"), np.tile(NUMBERS, 2)
    for barrier, order, right in (("", 0, True), ("", 1, False), ("", -1, False), ("bar.sync 0;", 1, True)):
        got = run(body.format(barrier=barrier), numbers, memory, threads=64, order=order)
        assert np.array_equal(got, np.arange(64)[::-1]) == right


COPY = """
	shl.b32 %r4, %r1, 2;
	cp.async.ca.shared.global [%r4], [%rd4], 4, 4;
	cp.async.commit_group;
	{wait}
	ld.shared.u32 %r3, [%r4];
	st.global.u32 [%rd5], %r3;"""


def test_copies_are_there_when_they_have_been_waited_for():
    np.testing.assert_array_equal(run(COPY.format(wait="cp.async.wait_group 0;"), NUMBERS, MEMORY), NUMBERS)
    for too_little in ("", "cp.async.wait_group 1;"):
        assert np.isnan(run(COPY.format(wait=too_little), NUMBERS, MEMORY).view("f")).all()


def test_shared_memory_begins_as_nan():
    assert np.isnan(run("ld.shared.u32 %r3, [0];\nst.global.u32 [%rd5], %r3;", NUMBERS, MEMORY).view("f")).all()


@pytest.mark.parametrize(
    ("body", "error", "sentence"),
    [
        ("ld.global.u32 %r2, [%rd4+4];", IndexError, "byte 128 of argument 0"),
        ("st.global.u32 [%rd5+-4], %r1;", IndexError, "of argument"),
        ("ld.global.u32 %r2, [%rd4+2];", IndexError, "no multiple of the 4 bytes"),
        ("ld.shared.u32 %r2, [128];", IndexError, "beyond the 128 bytes of shared memory"),
        ("sin.approx.f32 %f1, %f2;", NotImplementedError, "sin.approx.f32"),
        ("add.s32 %r3, %r2, 1;", RuntimeError, "%r2 is read before anything is written"),
        ("setp.gt.u32 %p1, %r1, 9;\n@%p1 redux.sync.max.u32 %r3, %r1, -1;", RuntimeError, "not all threads of a warp"),
    ],
)
def test_what_is_wrong_is_told(body, error, sentence):
    with pytest.raises(error, match=sentence):
        run(body, NUMBERS, MEMORY)
