"""The guidance view: what is drawn for it, and the program that makes it."""
