"""How the simulated fleet decides: the product, its opponents, and simple rules."""
