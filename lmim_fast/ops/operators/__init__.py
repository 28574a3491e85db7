"""The kernels as operators of torch.library: fake forms and gradients, for tracers and for plain calls."""
