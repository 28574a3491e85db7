"""Triton kernels: launch code only, no modules and no autograd. Import as `lmim_fast.kernels`."""
