"""Makes the small weights that are committed in `models/`: each module is a program that a person runs by hand.

It reads its data and its network through the catalogue, and writes the file that model.yaml then names by hash.
"""
