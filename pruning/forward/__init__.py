"""Running subnetworks: the evaluator, walks over all blocks, blocks from disk, several processes."""
