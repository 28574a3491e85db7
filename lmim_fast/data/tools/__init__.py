"""What a user runs on collections of crops."""
