"""Third-party models for `bench_accelerate.py`, and what is measured of them."""
