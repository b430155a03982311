"""What changes while work waits: which jobs move to another class, and which devices serve another class."""
