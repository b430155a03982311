"""A fleet under load while its processes, servers and cables are broken by a seeded plan: `make chaos`.

`plan` says what breaks when, `load` asks for jobs and `history` keeps what producers saw, `faults` break things in the
`fleet`, and `checker` holds the history and the state store against docs/guarantees.md.
"""
