"""Public operations: one a file, each with an eager form and the dispatch to its kernel."""
