"""Triton kernels and their launchers, one operation a file. Installed as `pgolf.triton_kernels`; imports torch and triton only."""
