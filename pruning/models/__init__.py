"""The model: finding and loading it, its configuration, its pruned classes, the checkpoint contract, its bytes."""
