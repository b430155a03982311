"""The Kubernetes operator: what a chart cannot do. `python -m controller` runs it; docs/kubernetes.md describes it.

It gives each hardware class as many pods as a router wants, in the first of its pools that has capacity, and chooses
which pods end. It holds nothing that the cluster does not have: it may be killed at any time.
"""
