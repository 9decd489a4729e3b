"""Pre-training, fine-tuning and probing of Vision Transformers by Dynamic Token Morphing."""
