"""When requests arrive and what they ask: trace files, seeded synthetic traces, and the resulting workload."""
