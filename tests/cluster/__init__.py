"""The chart and the operator against a real Kubernetes API server, scheduler and controllers: `make cluster`."""
