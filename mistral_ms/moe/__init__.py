"""The sparse layer: routing, dispatch, experts, combine, losses."""
