"""The contract between producers and the fleet: requests, jobs, messages, key names and limits. No I/O."""
