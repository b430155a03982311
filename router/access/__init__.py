"""Who may use the HTTP door, and how often. `keyring` and `rates` only decide; `file` does the I/O."""
