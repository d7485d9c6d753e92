"""Writing what was made: weights, formats, the report and the model card."""
