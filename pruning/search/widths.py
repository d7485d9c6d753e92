"""How narrow each layer gets: the least sum of predicted losses within a budget in bytes. Pure Python."""

from collections.abc import Mapping


def widths(
    costs: Mapping[int, Mapping[int, float]], unit_bytes: Mapping[int, int], excess: int
) -> dict[int, int] | None:
    """Units that each layer keeps; layers that lose none are left out.

    Layers go down the lower convex hulls of their curves, the least loss for each byte first. The last step is cut to
    what the budget still asks for.

    Args:
        costs: Layer -> units left -> predicted loss; the most units are what the layer has.
        unit_bytes: Layer -> weight bytes of one unit.
        excess: Bytes that have to go.

    Returns:
        Layer -> units; None where the narrowest of all widths do not save as much.

    Source: inferred; the greedy of a knapsack whose items have convex costs.
    """
    units = {layer: max(curve) for layer, curve in costs.items()}
    saved = 0
    while saved < excess:
        steps = [
            ((cost - costs[layer][units[layer]]) / ((units[layer] - left) * unit_bytes[layer]), left, layer)
            for layer, curve in costs.items()
            for left, cost in curve.items()
            if left < units[layer]
        ]
        if not steps:
            return None
        _, left, layer = min(steps)
        missing = -(-(excess - saved) // unit_bytes[layer])
        enough = [other for other in costs[layer] if left <= other <= units[layer] - missing]
        left = max(enough, default=left)
        saved += (units[layer] - left) * unit_bytes[layer]
        units[layer] = left
    return {layer: left for layer, left in sorted(units.items()) if left < max(costs[layer])}
