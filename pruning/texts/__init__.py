"""Text to calibrate on."""
