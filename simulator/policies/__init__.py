"""Policies: which hardware class a request goes to. One concept per file; `catalogue` lists them by name.

A policy sees only pools and the job's figures, and the true output only if it declares itself clairvoyant.
"""
