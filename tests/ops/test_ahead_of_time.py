"""Every shipped configuration of every Triton kernel compiles for Hopper with no GPU present, and spills nothing."""

import pytest

pytest.importorskip("triton")
from bench.kernels import aot

VARIANTS = aot.variants()


def test_there_are_kernels_and_their_names_differ():
    names = [variant.name for variant in VARIANTS]
    assert any(name.startswith("unpack_dequantize int6 -> bf16 22x512x512") for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_no_spills_on_sm_90(variant):
    found = aot.compile_variant(variant, architecture=90)
    assert found.spill_instructions == 0
    assert found.stack_bytes == 0
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
