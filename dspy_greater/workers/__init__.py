"""One model on several workers: batches are dealt out, and what comes back is put together in their order."""
