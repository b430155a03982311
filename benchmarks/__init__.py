"""Questions answered by a number, each by a module that starts what it measures and prints JSON lines."""
