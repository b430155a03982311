"""What producers and the fleet agree on: requests, jobs, messages, key names and their limits. No I/O here."""
