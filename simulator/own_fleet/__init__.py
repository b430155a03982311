"""A fleet as its queues.yaml describes it, with what its devices have learned: what it would do and cost.

`known` reads, `history` has what arrived, `difference` compares two files on one history.
"""
