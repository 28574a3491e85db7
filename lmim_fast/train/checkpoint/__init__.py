"""Checkpoints of a run: what they hold, how they are kept, and which one a run continues from."""
