"""What a sublayer can become, one file a kind."""
