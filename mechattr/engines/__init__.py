"""What several methods share: sweeps that resume, and batches that shrink when memory runs out."""
