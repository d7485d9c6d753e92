"""Choosing what goes under a budget."""
