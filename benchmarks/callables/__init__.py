"""Python functions that only benchmarks' models call. Only `benchmarks.spot_worker` lets a worker find them."""
