"""What the operator decides, as functions from frozen values: no I/O, no clock."""
