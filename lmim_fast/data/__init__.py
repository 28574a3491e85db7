"""Records, sample order, guidance views and the input pipeline. Knows no model."""
