"""What arrived and what became of it, kept for days as columns. `columns` is pure; the leader writes, anybody reads."""
