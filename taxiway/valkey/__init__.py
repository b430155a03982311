"""The wheel's own connection to Valkey or Redis: RESP3 in and out, without copies of large values."""
