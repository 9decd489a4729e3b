"""A small controlled study of attention-driven masking, on images at hand: `python -m dtm_triton.train.study`."""
