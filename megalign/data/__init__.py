"""Records in, packed micro-batches out."""
