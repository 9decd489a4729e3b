"""Measuring: cases, a correctness gate, timing, and the programs dtm-bench and dtm-tune. Knows nothing of training."""
