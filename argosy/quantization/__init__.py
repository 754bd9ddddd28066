"""Number formats of weights: reading checkpoints into place, and the schemes that linears compose with."""
