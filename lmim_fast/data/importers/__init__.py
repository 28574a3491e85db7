"""Other people's collections of crops as LMDBs: a file for each format."""
