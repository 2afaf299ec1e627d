"""Why two paths differ: their divergence split among named parts of weight, packing and recipe by swapping one at a time."""
