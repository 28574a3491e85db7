"""`lmim doctor`: whether a machine and a run are fit, before hours are spent; no check stops another."""
