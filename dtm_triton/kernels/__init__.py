"""Triton kernels and their launchers. This floor imports torch and triton only."""
