"""Making up for what went: emulation, compensation, recalibration, fusing, healing."""
