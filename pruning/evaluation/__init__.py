"""Measure models on text, questions and generation; functions take plain values and know no recipe."""
