"""How many blocks fit on a multiprocessor of Hopper (sm_90)."""

WARPS_PER_SM = 64
_REGISTERS_PER_SM = 65536
_BLOCKS_PER_SM = 32
_SHARED_BYTES_PER_SM = 228 * 1024
_SHARED_BYTES_PER_BLOCK = 1024  # that the driver takes for itself


def blocks_per_sm(registers: int, num_warps: int, shared_bytes: int) -> int:
    """Resident blocks, by registers a thread, shared memory a block, warps a block and the limit of 32."""
    registers_per_warp = -(-registers * 32 // 256) * 256  # handed out by 256
    by_registers = _REGISTERS_PER_SM // max(registers_per_warp * num_warps, 1)
    by_shared = _SHARED_BYTES_PER_SM // (shared_bytes + _SHARED_BYTES_PER_BLOCK)
    return min(by_registers, by_shared, WARPS_PER_SM // num_warps, _BLOCKS_PER_SM)
