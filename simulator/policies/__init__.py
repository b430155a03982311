"""Policies: which hardware class a request goes to. One concept a file; `catalogue` lists them by name.

A policy sees pools and the job's figures, nothing else; the true output only if it says that it is clairvoyant.
"""
