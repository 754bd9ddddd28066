"""One step on one rank: pack the batch, run the model, sample."""
