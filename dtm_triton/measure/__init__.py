"""Measuring: cases, a correctness gate, timing, and the programs dtm-bench and dtm-tune. Training does not use this."""
