"""Attention maps of all training images: where they are kept, how they are made, which ones a run has."""
