"""Models on the fast operations, and released weights in and out."""
