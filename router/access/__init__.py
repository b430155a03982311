"""Who may use the HTTP door, and how often. `keyring` and `limits` only decide; `file` does the I/O."""
