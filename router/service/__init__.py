"""The path of a request through a router: arrivals, admission, the fleet snapshot, submissions and results."""
