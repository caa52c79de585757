"""Triton kernels and their launchers, one operation a file; imports torch and triton only.

Installed as `pgolf.triton_kernels`: a top-level module of that name belongs to another distribution.
"""
