"""Words rendered as scene-text crops: the data to start with."""
