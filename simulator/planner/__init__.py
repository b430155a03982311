"""What hardware to buy for a workload: demand, prices, the cheapest mix, and the report of a plan."""
