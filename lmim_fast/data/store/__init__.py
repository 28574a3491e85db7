"""Find, check, read and write records in LMDB folders."""
