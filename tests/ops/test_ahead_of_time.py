"""Every shipped configuration of every Triton kernel compiles for Hopper with no GPU present.

None spills, and none makes its tensor cores wait (ptxas's C7515).
"""

from dataclasses import replace

import pytest

pytest.importorskip("triton")
import triton

from bench.kernels import aot
from pgolf.runtime.tried import release

VARIANTS = aot.variants()
# With Triton 3.5 the one asks for 240 KiB of shared memory, the other spills 8 bytes (docs/versions.md).
NOT_OF_TRITON_3_5 = (
    "leaky_relu2_mlp gradient fp16 98304x512x2048",
    "qk_norm_rope forward bf16 98304x(8+4)x64, 16 rotate, of 1088 columns",
)


def test_there_are_kernels_and_their_names_differ():
    names = [variant.name for variant in VARIANTS]
    assert any(name.startswith("unpack_dequantize int6 -> bf16 22x512x512") for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_no_spills_and_no_waiting_on_sm_90(variant):
    found = aot.compile_variant(variant, architecture=90)
    if release(triton.__version__) < (3, 6) and variant.name in NOT_OF_TRITON_3_5:
        pytest.skip("not with Triton 3.5: too much shared memory, or spills")
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
    assert not found.waiting
    assert 0 < found.registers <= 255
    assert found.blocks_per_sm >= 1
    assert variant.bytes_moved > 0
    assert variant.flops > 0
    if variant.name.startswith("unpack_dequantize"):
        assert found.wide_store_instructions > 0, "eight bfloat16 results leave in one access"
    if variant.name.startswith("leaky_relu2_mlp") or (
        variant.name.startswith("newton_schulz") and "tiles" in variant.name
    ):
        assert found.tma_instructions > 0
        assert (found.wgmma_instructions > 0) == ("fp32" not in variant.name), "float32 keeps all its bits"


def test_a_size_of_1_compiles():
    """Triton makes a Python number of an argument that is 1."""
    variant = next(v for v in VARIANTS if v.name.startswith("unpack_dequantize int6"))
    for names in (("count", "columns"), ("columns",)):
        single = replace(
            variant,
            signature={**variant.signature, **dict.fromkeys(names, "constexpr")},
            constexprs={**variant.constexprs, **dict.fromkeys(names, 1), "GROUP_IN_ROW": False},
            aligned=tuple(name for name in variant.aligned if name not in names),
        )
        assert aot.compile_variant(single).spill_instructions == 0


PRODUCTS = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry products(.param .u64 out, .param .u64 operand)
{
    .reg .f32 %f<4>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [operand];
    mov.f32 %f0, 0f00000000;
    mov.f32 %f1, %f0;
    mov.f32 %f2, %f0;
    mov.f32 %f3, %f0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd2, %rd2, 1, 1, 1, 0, 0;
    BETWEEN
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd2, %rd2, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.v4.f32 [%rd1], {%f0, %f1, %f2, %f3};
    ret;
}
"""


def test_the_reader_sees_waiting_tensor_cores():
    assert aot.waiting_wgmma(PRODUCTS.replace("BETWEEN", "")) == ""
    waiting = aot.waiting_wgmma(PRODUCTS.replace("BETWEEN", "add.f32 %f0, %f0, %f0;"))  # the sums, not yet there
    assert "(C75" in waiting
    assert "\n" not in waiting


def test_the_reader_sees_spills_and_tensor_cores():
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 STL.64 [R1+0x8], R2 ;    /* 0x0 */
        /*0020*/                   LDL R3, [R1] ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/             @UP0  UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;
    """
    assert aot._instructions(r"STL|LDL", text) == 2
    assert aot._instructions(r"HGMMA", text) == 1
    assert aot._instructions(r"UTMALDG|UTMASTG", text) == 1


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [(27, 8, 0, 8), (168, 8, 0, 1), (32, 4, 0, 16), (32, 4, 100 * 1024, 2), (255, 4, 0, 2), (16, 1, 0, 32)],
)
def test_blocks_per_multiprocessor(registers, warps, shared, blocks):
    assert aot.blocks_per_sm(registers, warps, shared) == blocks
