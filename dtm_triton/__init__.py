"""Dynamic Token Morphing for Vision Transformers: fused Triton kernels, nn.Modules and training.

Importing this package alone loads nothing heavy; `from dtm_triton import morph` gives the library.
"""

__version__ = "0.1.0"
