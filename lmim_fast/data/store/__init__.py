"""Records in LMDB folders: found, checked, read, and written."""
