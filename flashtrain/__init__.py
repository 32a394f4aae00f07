"""Pre-training of GPT models on one to thousands of GPUs."""
