"""Real data: images, datasets, batches, and what each stage draws."""
