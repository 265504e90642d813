"""Real data: pictures, datasets, batches, and what each stage draws."""
