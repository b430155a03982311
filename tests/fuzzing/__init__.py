"""Long random runs against what ships, apart from the tests: `make fuzz`."""
