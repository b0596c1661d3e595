"""Text to batches: sources, tokenizers, preparation, packing and the grain pipeline."""
