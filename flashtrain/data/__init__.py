"""Text to tokens to batches: corpus, tokenizers, shards on disk, the order, the loader."""
