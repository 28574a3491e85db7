"""Fast forms of somebody else's layers, for `lmim_fast.accelerate`."""
