"""Reads labelled test sets with a recogniser and counts what is right."""
