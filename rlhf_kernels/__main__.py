"""`python -m rlhf_kernels`: version, backends, and which backend serves which op."""

from rlhf_kernels.info import info

info()
