"""The fleet for those who run it: devices, queues, jobs, metrics, and what needs attention."""
