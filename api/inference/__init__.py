"""The Open Inference Protocol v2.

`protocol` converts values to the protocol's; `infer` serves its busiest endpoint directly. `streaming` sends answers as
they are generated, and `progress` says which parts of them are new.
"""
