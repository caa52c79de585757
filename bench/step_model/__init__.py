"""A training step counted: its operations, bytes and FLOPs, from what the compiler makes of it."""
