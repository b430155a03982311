"""What benchmarks share: starting processes, statistics, output lines and charts."""
