"""Several fleets on one machine, with lines between them that can be slow and cut: `taxiway up --sites`."""
