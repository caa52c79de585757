"""The cases of all operations between the matrix products, for tests that run them together."""

import test_embedding_smear_norm
import test_qk_norm_rope
import test_qkv_norm_rope
import test_residual_rms_norm
import test_two_lane_rms_norm
import test_xsa_gate

FILES = (
    test_embedding_smear_norm,
    test_qk_norm_rope,
    test_qkv_norm_rope,
    test_residual_rms_norm,
    test_two_lane_rms_norm,
    test_xsa_gate,
)
CASES = {name: case for file in FILES for name, case in file.CASES.items()}
RECORD = {name: case for file in FILES for name, case in file.RECORD.items()}  # at the record's widths, for a GPU
