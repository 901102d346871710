"""8-bit numbers within Triton kernels, as `radixgen.kernels.triton_kernels` multiplies them."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether these kernels run in Triton's interpreter, which knows no PTX."""
LEAST_SCALE = tl.constexpr(2.0**-100)
"""Smaller scales of values count as this one, so that they have logarithms."""


@triton.jit
def unpack(pairs, DTYPE: tl.constexpr):
    """Return the even and the odd ones of 8-bit numbers, given in pairs: int8 as int16, fp8 (e4m3) as uint16."""
    if INTERPRETED or tl.float16 != DTYPE:
        if pairs.dtype == tl.int16:
            even, odd = (pairs << 8) >> 8, pairs >> 8
        else:
            even = pairs.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
            odd = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        even, odd = even.to(DTYPE), odd.to(DTYPE)
    elif pairs.dtype == tl.int16:  # byte b + 128 below byte 0x64 is b + 1152 in float16
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, high, bias;
            xor.b32 bytes, $2, 0x80808080;
            mov.b32 high, 0x64646464;
            mov.b32 bias, 0x64806480;
            prmt.b32 $0, bytes, high, 0x4240;
            prmt.b32 $1, bytes, high, 0x4341;
            sub.f16x2 $0, $0, bias;
            sub.f16x2 $1, $1, bias;
            }""",
            "=&r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=&r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return even, odd


@triton.jit
def log2(x):
    """Return the logarithm, in one instruction on a GPU."""
    if INTERPRETED:
        result = tl.log2(x)
    else:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def normalize(queries, ROWS: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Return the even and the odd numbers of each row over its largest, in float16 unless they are float32, and the
    largest.
    """
    peak = tl.max(tl.abs(queries.to(tl.float32)), 1)
    peak = tl.where(peak == 0.0, 1.0, peak)
    numbers = queries.to(tl.float32) * (1.0 / peak)[:, None]
    even, odd = tl.split(tl.reshape(numbers, [ROWS, PADDED_DIM // 2, 2]))
    if queries.dtype != tl.float32:
        even, odd = even.to(tl.float16), odd.to(tl.float16)
    return even, odd, peak
